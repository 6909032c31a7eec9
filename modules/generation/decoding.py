"""Parts of text generation: the decoder protocol, the options, the window of visible tokens, the choice of a token.

Needs only torch. Shape legend: B rows, T tokens of the prompt, V vocabulary.
"""

import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from trunkline import TrunklineError
from trunkline.ranges import check_ranges

STEPS_AT_ONCE = 16
"""Tokens for which the host and the device exchange something once: random numbers, and whether all rows have ended."""


@runtime_checkable
class Decoder(Protocol):
    """What a model must provide to generate text; a `GPT` does.

    If the tokens depend on anything else (the states of an encoder, embeddings before the prompt), the decoder keeps it
    for each row in its state. A decoder that is a torch module is set to evaluation mode while it generates.
    """

    @property
    def vocab_size(self) -> int:
        """Number V of tokens; ids are from 0 to V - 1."""

    @property
    def max_length(self) -> int:
        """Largest number of tokens seen at once. When a text is longer, its older half is forgotten."""

    def prefill(self, tokens: Tensor, mask: Tensor | None, room: int, state: Any = None) -> tuple[Tensor, Any]:
        """Read prompts.

        Args:
            tokens: (B, T) token ids, padded on the left.
            mask: (B, T) bool, False for padding; None without padding.
            room: number of tokens that will follow by `step`.
            state: None at first. Later, when texts have filled `max_length`, their state: the decoder replaces all its
                tokens by the given ones, and keeps whatever else the rows depend on.

        Returns:
            (B, V) logits of the next token, and a state that only the decoder itself reads.
        """

    def step(self, tokens: Tensor, state: Any) -> Tensor:
        """Add one token (B,) to each row, changing the state in place -> (B, V) logits of the next token."""

    def reorder(self, state: Any, rows: Tensor) -> Any:
        """A state in which row b continues row `rows[b]` of the given state, which is not used again.

        Beam search repeats and drops rows, and rows whose text has ended are dropped. So `rows` may have any length.
        """


@dataclass
class GenerationConfig:
    """How the next token is chosen. The filters are applied in the order of these fields.

    Raises:
        TrunklineError: for a value out of range, or options that exclude each other.
    """

    max_new_tokens: int = 128
    """Largest number of tokens after the prompt."""
    repetition_penalty: float = 1.0
    """Divides the positive and multiplies the negative logits of tokens that are in the text (arXiv:1909.05858)."""
    no_repeat_ngram: int | None = None
    """No N tokens in a row occur twice in what the decoder sees, prompt included (arXiv:1705.04304)."""
    first_token: int | None = None
    """Token id that is always the first new token, such as that of the target language."""
    temperature: float = 1.0
    """Divides the logits; 0 always chooses the likeliest token (greedy)."""
    top_k: int | None = None
    """Sample from the K likeliest tokens (arXiv:1805.04833)."""
    top_p: float | None = None
    """Sample from the likeliest tokens that together have this probability (arXiv:1904.09751)."""
    min_p: float | None = None
    """Sample from tokens with at least this fraction of the likeliest token's probability (arXiv:2407.01082)."""
    num_beams: int = 1
    """Above 1: beam search, which extends this many texts in parallel and returns the likeliest."""
    length_penalty: float = 1.0
    """A beam's score is its log-likelihood / length ** length_penalty; above 0 favours longer texts."""
    seed: int = 0
    """Seed of sampling; the random numbers of row b depend only on (seed, b), not on other rows."""

    def __post_init__(self) -> None:
        check_ranges(
            "model.generation",
            self,
            max_new_tokens="[1, inf)",
            num_beams="[1, inf)",
            top_k="[1, inf); leave it out to take all tokens",
            no_repeat_ngram="[1, inf); leave it out to allow repetitions",
            top_p="(0, 1]; leave it out to take all tokens",
            min_p="[0, 1]; leave it out to take all tokens",
            first_token="[0, inf); leave it out to choose it freely",
            temperature="[0, inf); 0 is greedy",
            repetition_penalty="(0, inf); 1 is none",
            length_penalty="[-10, 10]; 1 is the mean",
        )
        if not 0 <= self.seed < 2**63:
            raise TrunklineError(f"seed must be at least 0 and below 2 ** 63, not {self.seed}")
        drawn = [name for name in ("top_k", "top_p", "min_p") if getattr(self, name) is not None]
        drawn += ["temperature"] if self.temperature not in (0, 1) else []
        if self.num_beams > 1 and drawn:
            raise TrunklineError(
                f"num_beams={self.num_beams} is beam search, which does not sample: leave out {' and '.join(drawn)}, "
                "or set num_beams=1"
            )


class Window:
    """The newest tokens of each row, and the decoder's state after them.

    A row that fills the decoder's `max_length` forgets its older half, and the state is computed again from the rest.
    What a row sees depends only on that row, never on the length of other rows.

    Args:
        decoder: must be in evaluation mode.
        tokens: (B, T) prompts, padded on the left.
        mask: (B, T) bool, False for padding; None without padding.
        room: number of tokens that will follow.
    """

    state: Any = None
    logits: Tensor
    """(B, V) logits of the next token."""

    def __init__(self, decoder: Decoder, tokens: Tensor, mask: Tensor | None, room: int) -> None:
        self.decoder, self.limit = decoder, decoder.max_length
        self.tokens = tokens.new_zeros(len(tokens), min(self.limit, tokens.shape[1] + room))
        self.fill(tokens, mask)

    def fill(self, tokens: Tensor, mask: Tensor | None) -> None:
        """Replace all tokens by these (B, T) tokens; `logits` are then those of the token after them."""
        self.length = tokens.shape[1]
        self.tokens[:, : self.length] = tokens
        if mask is not None and bool(mask.all()):
            mask = None
        self.padding = self.tokens.new_zeros(len(tokens)) if mask is None else (~mask).sum(dim=1)  # (B,)
        room = self.tokens.shape[1] - self.length
        self.logits, self.state = self.decoder.prefill(tokens, mask, room, self.state)

    def append(self, tokens: Tensor) -> None:
        """Add one token (B,) to each row."""
        if self.length == self.limit:
            self.slide(tokens)
            return
        self.tokens[:, self.length] = tokens
        self.length += 1
        self.logits = self.decoder.step(tokens, self.state)

    def slide(self, tokens: Tensor) -> None:
        """Forget the older half of each row that is full, then add one token (B,) to each row."""
        held = self.limit - self.padding
        kept = torch.where(held == self.limit, self.limit // 2, held)
        width = int(kept.max())
        recent = torch.cat((self.tokens[:, self.limit - width :], tokens[:, None]), dim=1)
        columns = torch.arange(width + 1, device=tokens.device)
        self.fill(recent, columns >= width - kept[:, None])

    def repeats(self, length: int | None) -> Tensor | None:
        """(B, V) bool, True for tokens that would repeat `length` tokens of the row; None without a length.

        If this holds for all tokens of a row, it has no meaning, and the row is all False.
        """
        if length is None or self.length < length:
            return None
        vocabulary = self.logits.shape[1]
        ngrams = self.tokens[:, : self.length].unfold(1, length, 1)  # (B, number of n-grams, length)
        newest = self.tokens[:, None, self.length - length + 1 : self.length]  # what an n-gram must begin with
        begins = torch.arange(ngrams.shape[1], device=ngrams.device) >= self.padding[:, None]
        found = begins & (ngrams[:, :, :-1] == newest).all(dim=2)
        repeated = torch.zeros(len(found), vocabulary + 1, dtype=torch.bool, device=found.device)
        last = ngrams[:, :, -1].masked_fill(~found, vocabulary)  # an id that no token has
        repeated = repeated.scatter_(1, last, True)[:, :vocabulary]
        return repeated & ~repeated.all(dim=1, keepdim=True)

    def take(self, rows: Tensor, logits: bool = True) -> None:
        """Make row b continue the old row `rows[b]`; rows that are not in `rows` are dropped.

        Without `logits`, theirs are not copied; `append` must follow, which computes new ones.
        """
        self.tokens, self.padding = self.tokens[rows], self.padding[rows]
        self.logits = self.logits[rows] if logits else self.logits[:0]
        self.state = self.decoder.reorder(self.state, rows)


def filter_logits(
    logits: Tensor,
    config: GenerationConfig,
    seen: Tensor | None = None,
    repeated: Tensor | None = None,
    first: bool = False,
) -> Tensor:
    """Apply penalty, exclusions, temperature and filters, with the meaning and order of Hugging Face.

    Args:
        logits: (B, V) float32.
        config: with `temperature` 0 the filters of sampling are not applied.
        seen: (B, V) bool, True for tokens that are in the row's text.
        repeated: (B, V) bool, True for tokens that `no_repeat_ngram` excludes.
        first: whether this is the first new token, for which `first_token` is chosen.

    Returns:
        (B, V) logits, minus infinity for excluded tokens.
    """
    if seen is not None and config.repetition_penalty != 1:
        penalty = config.repetition_penalty
        logits = torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)
    if repeated is not None:
        logits = logits.masked_fill(repeated, -math.inf)
    if first and config.first_token is not None:
        logits = torch.full_like(logits, -math.inf)
        logits[:, config.first_token] = 0.0  # in beam search, a token that is forced costs nothing
    if config.temperature == 0:
        return logits
    if config.temperature != 1:
        logits = logits / config.temperature
    if config.top_k is not None and config.top_k < logits.shape[1]:
        least = logits.topk(config.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    if config.top_p is not None and config.top_p < 1:
        ascending, order = logits.sort(dim=1)
        out = ascending.softmax(dim=1).cumsum(dim=1) <= 1 - config.top_p
        out[:, -1] = False  # the likeliest stays
        logits = logits.masked_fill(out.scatter(1, order, out), -math.inf)
    if config.min_p is not None:
        probability = logits.softmax(dim=1)
        logits = logits.masked_fill(probability < config.min_p * probability.amax(dim=1, keepdim=True), -math.inf)
    return logits


def choose(logits: Tensor, draws: Tensor | None) -> Tensor:
    """Choose a token (B,) from logits (B, V): the likeliest, or with uniform `draws` (B,) a sample of the softmax."""
    if draws is None:
        return logits.argmax(dim=1)
    total = logits.softmax(dim=1, dtype=draws.dtype).cumsum(dim=1)
    aim = draws[:, None] * total[:, -1:]
    # The first token whose running sum exceeds the aim. An excluded token adds nothing, so it is never the first.
    return torch.searchsorted(total, aim, right=True)[:, 0].clamp(max=logits.shape[1] - 1)


@contextmanager
def evaluating(decoder: Decoder) -> Iterator[None]:
    """Set the decoder to evaluation mode if it is a module; afterwards restore the mode of all its modules."""
    modules = list(decoder.modules()) if isinstance(decoder, nn.Module) else []
    training = [module for module in modules if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def row_generator(seed: int, row: int) -> torch.Generator:
    """Random number generator of one row, independent of those of other rows and seeds."""
    return torch.Generator().manual_seed(random.Random(f"{seed} {row}").getrandbits(63))


class Draws:
    """Uniform random numbers of all rows for one step after the other; the device gets those of several at once.

    Args:
        seed: seed of sampling.
        rows: (B,) number of each row; with the seed it decides the row's numbers.
        device: where the numbers are read.
    """

    def __init__(self, seed: int, rows: Sequence[int], device: torch.device) -> None:
        self.device = device
        self.generators = [row_generator(seed, row) for row in rows]
        self.waiting: list[Tensor] = []

    def next(self) -> Tensor:
        """A number in [0, 1) for each row: (B,) float64, precise enough for rare tokens."""
        if not self.waiting:
            numbers = [torch.rand(STEPS_AT_ONCE, dtype=torch.float64, generator=one) for one in self.generators]
            block = torch.stack(numbers, dim=1).to(self.device, torch.float32 if self.device.type == "mps" else None)
            self.waiting = list(block.unbind())[::-1]
        return self.waiting.pop()


def tokens_seen(decoder: Decoder, tokens: Tensor, mask: Tensor | None, config: GenerationConfig) -> Tensor | None:
    """(B, V) bool, True for tokens in the prompt; None without a repetition penalty."""
    if config.repetition_penalty == 1:
        return None
    seen = torch.zeros(len(tokens), decoder.vocab_size, dtype=torch.bool, device=tokens.device)
    row, column = (torch.ones_like(tokens) if mask is None else mask).nonzero(as_tuple=True)
    seen[row, tokens[row, column]] = True
    return seen


def check_prompts(
    decoder: Decoder, tokens: Tensor, mask: Tensor | None, config: GenerationConfig
) -> tuple[Tensor, Tensor | None]:
    """Check prompts, and remove the columns that are padding in all rows; the mask is None if no padding is left.

    Raises:
        TrunklineError: for an empty prompt, one that is longer than the decoder's `max_length`, an unknown token in a
            prompt or as `first_token`, or a mask that is not left padding.
    """
    if config.first_token is not None and config.first_token >= decoder.vocab_size:
        raise TrunklineError(
            f"first_token is {config.first_token}, but the network knows the tokens 0 to {decoder.vocab_size - 1}; "
            "take the id from the tokenizer that it was trained with"
        )
    if mask is None:
        mask = torch.ones_like(tokens, dtype=torch.bool)
    if tokens.ndim != 2 or not len(tokens) or mask.shape != tokens.shape or mask.dtype != torch.bool:
        given = f"tokens {tuple(tokens.shape)} and a {mask.dtype} mask {tuple(mask.shape)}"
        raise TrunklineError(f"prompts are (B, T) token ids and a boolean mask of the same shape, but got {given}")
    if (mask[:, :-1] & ~mask[:, 1:]).any():
        raise TrunklineError("the mask of prompts is False after True: pad shorter prompts on the left, not the right")
    for row, length in enumerate(mask.sum(dim=1).tolist()):
        if length == 0:
            raise TrunklineError(f"prompt {row} has no token; begin it with the end-of-text token")
        if length > decoder.max_length:
            raise TrunklineError(
                f"prompt {row} has {length} tokens, but the network can see {decoder.max_length}; shorten it"
            )
    filled = mask.any(dim=0)
    tokens, mask = tokens[:, filled], mask[:, filled]
    if not 0 <= int(tokens.min()) <= int(tokens.max()) < decoder.vocab_size:
        raise TrunklineError(
            f"a prompt has token ids from {int(tokens.min())} to {int(tokens.max())}, but the network knows 0 to "
            f"{decoder.vocab_size - 1}; use the tokenizer that it was trained with"
        )
    return tokens, None if mask.all() else mask


def cut(tokens: list[int], end_ids: Sequence[int]) -> list[int]:
    """The tokens before the first end token."""
    return tokens[: next((n for n, token in enumerate(tokens) if token in end_ids), len(tokens))]
