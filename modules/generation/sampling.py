"""Text generation with a causal language model: sampling, greedy and beam search over a key/value cache.

Needs torch alone. Shape legend: B rows, T tokens of the prompt, V vocabulary, N beams, L new tokens.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from trunkline import TrunklineError
from trunkline.modules.generation.decoding import (
    GenerationConfig,
    Window,
    check_prompts,
    choose,
    draw,
    evaluating,
    filter_logits,
    row_generator,
    tokens_seen,
)
from trunkline.modules.networks import GPT

NEVER = -1e9
"""Score of a beam that cannot be chosen."""


def stream(
    network: GPT,
    tokens: Tensor,
    mask: Tensor | None = None,
    config: GenerationConfig | None = None,
    end_ids: Sequence[int] = (),
    ended: Tensor | None = None,
) -> Iterator[Tensor]:
    """Continue each row, a token at a time.

    Args:
        network: a causal language model.
        tokens: (B, T) prompts, padded on the left to one length.
        mask: (B, T) bool, False for padding; None without.
        config: how to choose; not for beam search.
        end_ids: tokens that end a row.
        ended: (B,) bool, all False at first: is kept up to date, and the caller may end a row by setting it.

    Returns:
        Iterator over the (B,) next tokens, at most `config.max_new_tokens` times, until all rows have ended. A row
        that has ended gives the first of `end_ids`, or 0.

    Raises:
        TrunklineError: for an empty prompt, one that the network cannot see at once, an unknown token, a mask that
            is not left padding, or beam search; before the first token.
    """
    config = config or GenerationConfig()
    if config.num_beams > 1:
        raise TrunklineError(f"num_beams={config.num_beams} gives no text before the end: call beam_search")
    tokens, mask = check_prompts(network, tokens, mask)
    if ended is None:
        ended = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
    return _stream(network, tokens, mask, config, tokens.new_tensor(end_ids), ended)


@torch.inference_mode()
def _stream(
    network: GPT, tokens: Tensor, mask: Tensor | None, config: GenerationConfig, ends: Tensor, ended: Tensor
) -> Iterator[Tensor]:
    """The loop of `stream`. Rows that have ended leave the batch; `rows` are the others."""
    rows = torch.arange(len(tokens), device=tokens.device)
    generators = [row_generator(config.seed, row) for row in range(len(tokens))] if config.temperature > 0 else []
    filler = ends[:1] if len(ends) else tokens.new_zeros(1)
    with evaluating(network):
        seen = tokens_seen(network, tokens, mask, config)
        window = Window(network, tokens, mask, config.max_new_tokens - 1)
        for step in range(config.max_new_tokens):
            draws = draw([generators[row] for row in rows.tolist()], tokens.device) if generators else None
            chosen = choose(filter_logits(window.logits.float(), config, seen), draws)
            given = filler.repeat(len(tokens)).index_copy_(0, rows, chosen)
            ended |= torch.isin(given, ends)
            yield given
            going = ~ended[rows]
            if not going.all():
                rows, chosen = rows[going], chosen[going]
                if not len(rows):
                    return
                window.take(going.nonzero()[:, 0])
                seen = None if seen is None else seen[going]
            if seen is not None:
                seen.scatter_(1, chosen[:, None], True)
            if step + 1 < config.max_new_tokens:
                window.append(chosen)


def generate(
    network: GPT,
    tokens: Tensor,
    mask: Tensor | None = None,
    config: GenerationConfig | None = None,
    end_ids: Sequence[int] = (),
) -> list[list[int]]:
    """The new tokens of each row, without the end token; by beam search with `config.num_beams` above 1.

    Arguments and errors are those of `stream`.
    """
    config = config or GenerationConfig()
    if config.num_beams > 1:
        return [beams[0].tokens for beams in beam_search(network, tokens, mask, config, end_ids)]
    steps = torch.stack(list(stream(network, tokens, mask, config, end_ids)), dim=1).tolist()
    return [cut(row, end_ids) for row in steps]


def cut(tokens: list[int], end_ids: Sequence[int]) -> list[int]:
    """The tokens before the first that is an end."""
    return tokens[: next((n for n, token in enumerate(tokens) if token in end_ids), len(tokens))]


class Beam(NamedTuple):
    """One text that beam search found."""

    tokens: list[int]
    """Without the end token."""
    score: float
    """Sum of the tokens' log-probabilities, the end token's too, / their number ** length_penalty."""


@torch.inference_mode()
def beam_search(
    network: GPT,
    tokens: Tensor,
    mask: Tensor | None = None,
    config: GenerationConfig | None = None,
    end_ids: Sequence[int] = (),
) -> list[list[Beam]]:
    """The N texts of each row that score best, the best first.

    As in Hugging Face with `early_stopping=False`: a row is done when its best running beam, at its present
    length, scores no better than its worst text. Arguments and errors are those of `stream`.
    """
    config = config or GenerationConfig(num_beams=4)
    tokens, mask = check_prompts(network, tokens, mask)
    ends = tokens.new_tensor(end_ids)
    beams = Beams(len(tokens), config, tokens.device)
    with evaluating(network):
        seen = tokens_seen(network, tokens, mask, config)
        window = Window(network, tokens, mask, config.max_new_tokens - 1)
        every = torch.arange(len(tokens), device=tokens.device).repeat_interleave(config.num_beams)
        window.take(every)
        seen = None if seen is None else seen[every]
        greedy = replace(config, temperature=0.0)
        while True:
            scores = filter_logits(window.logits.float().log_softmax(dim=1), greedy, seen)
            source, chosen = beams.grow(scores, ends)
            if not beams.going():
                return beams.results(end_ids)
            window.take(source)
            window.append(chosen)
            if seen is not None:
                seen = seen[source].scatter_(1, chosen[:, None], True)


class Beams:
    """The N running and the N best ended texts of each of B rows."""

    def __init__(self, rows: int, config: GenerationConfig, device: torch.device) -> None:
        self.config, self.length = config, 0
        shape = (rows, config.num_beams)
        self.texts = torch.full((*shape, config.max_new_tokens), -1, device=device)
        self.scores = torch.full(shape, NEVER, device=device)
        self.scores[:, 0] = 0.0  # at first the beams of a row are the same: only one counts
        self.ended_texts, self.ended_scores = self.texts.clone(), torch.full(shape, NEVER, device=device)
        self.open = torch.ones(rows, 1, dtype=torch.bool, device=device)
        """(B, 1) whether a running beam may still beat an ended text."""

    def grow(self, scores: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
        """Continue by the best tokens; `scores` (B * N, V) are log-probabilities.

        Returns:
            (B * N,) the window's row that each beam continues, and (B * N,) its token.
        """
        rows, beams = self.scores.shape
        total = (self.scores[:, :, None] + scores.unflatten(0, (rows, beams))).flatten(1)  # (B, N * V)
        count = min(beams * max(2, 1 + len(ends)), total.shape[1])  # N are left even if every beam ends
        best, index = total.topk(count)
        source, token = index // scores.shape[1], index % scores.shape[1]
        texts = take_beams(self.texts, source)
        texts[:, :, self.length] = token
        self.length += 1
        last = self.length == self.config.max_new_tokens
        ending = torch.isin(token, ends) | last
        self._keep_ended(best, texts, ending)
        self.scores, kept = (best + NEVER * ending).topk(beams)
        self.texts = take_beams(texts, kept)
        worst = self.ended_scores.amin(dim=1, keepdim=True)
        self.open &= self.scores[:, :1] / self.length**self.config.length_penalty > worst
        self.open &= not last
        offset = torch.arange(rows, device=token.device)[:, None] * beams
        return (source.gather(1, kept) + offset).flatten(), token.gather(1, kept).flatten()

    def _keep_ended(self, best: Tensor, texts: Tensor, ending: Tensor) -> None:
        """Let the best N candidates that end take the place of worse ended texts."""
        beams = self.config.num_beams
        counted = (ending & self.open)[:, :beams]
        score = (best[:, :beams] / self.length**self.config.length_penalty).masked_fill(~counted, NEVER)
        scores = torch.cat((self.ended_scores, score), dim=1)
        self.ended_scores, index = scores.topk(beams)
        self.ended_texts = take_beams(torch.cat((self.ended_texts, texts[:, :beams]), dim=1), index)

    def going(self) -> bool:
        """Whether any row is not done."""
        return bool(self.open.any())

    def results(self, end_ids: Sequence[int]) -> list[list[Beam]]:
        """The ended texts of each row, the best first."""
        pairs = zip(self.ended_texts.tolist(), self.ended_scores.tolist(), strict=True)
        return [[Beam(cut(t, [-1, *end_ids]), s) for t, s in zip(*row, strict=True) if s > NEVER] for row in pairs]


def take_beams(texts: Tensor, index: Tensor) -> Tensor:
    """(B, M, L), (B, N) -> (B, N, L)."""
    return texts.gather(1, index[:, :, None].expand(-1, -1, texts.shape[2]))
