"""`trunkline generate`: continue texts with a checkpoint."""

from collections.abc import Iterator

import torch
from tokenizers import Tokenizer
from torch import Tensor

from trunkline import TrunklineError
from trunkline.datamodules.tokenizers import END_TOKENS
from trunkline.modules.generation.beams import beam_search
from trunkline.modules.generation.compiled import CompiledDecoder
from trunkline.modules.generation.decoding import STEPS_AT_ONCE
from trunkline.modules.generation.sampling import GenerationConfig
from trunkline.modules.generation.sampling import stream as next_tokens
from trunkline.modules.networks import GPT
from trunkline.pipelines.devices import find_device
from trunkline.pipelines.generating import NumberFormat, prepared, readers_may_leave, write
from trunkline.pipelines.trained import read_language_model

Writer = GPT | CompiledDecoder
HALF = "\ufffd"
"""The replacement character, which stands for bytes of an incomplete character."""


def generate_text(
    checkpoint: str,
    prompt: list[str] | str = "",
    max_new_tokens: int = 128,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    no_repeat_ngram: int | None = None,
    num_beams: int = 1,
    length_penalty: float = 1.0,
    stop: list[str] | str | None = None,
    num_samples: int = 1,
    seed: int = 0,
    stream: bool = True,
    dtype: NumberFormat = "float32",
    compile: bool = False,
    device: str = "auto",
    tokenizer: str | None = None,
) -> None:
    """Print prompts with their continuations: a single text while it is generated, several texts at the end.

    Several texts have `---` between them.

    Args:
        checkpoint: a checkpoint of a causal language model, from `trunkline fit`.
        prompt: one text, or several as "[one, two]"; an empty one starts a new text.
        max_new_tokens: largest number of tokens after the prompt; an end-of-text token ends the text earlier.
        temperature: divides the logits; 0 always takes the likeliest token.
        top_k: sample from this many likeliest tokens.
        top_p: sample from the likeliest tokens that together have this probability.
        min_p: sample from tokens with at least this fraction of the likeliest token's probability.
        repetition_penalty: above 1, tokens that are already in the text become less likely.
        no_repeat_ngram: no sequence of this many tokens occurs twice.
        num_beams: above 1, use beam search with this many beams instead of sampling.
        length_penalty: of beam search; above 0 favours longer texts.
        stop: end a text before this string, or before any of several, "[one, two]".
        num_samples: number of continuations of each prompt.
        seed: seed of sampling.
        stream: print a single text while it is generated.
        dtype: number format of the weights; int8 is the fastest on a CPU, float32 is exact.
        compile: compile the step that makes a token, on a GPU into a CUDA graph. The first token then takes up to a
            minute, so this is for many or long texts. Greedy texts in float32 stay the same.
        device: auto, cpu, cuda, cuda:1, mps, …
        tokenizer: a tokenizer.json to use instead of the checkpoint's own tokenizer.

    Raises:
        TrunklineError: for wrong options or a checkpoint that cannot be used, before any text is printed.
    """
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        no_repeat_ngram=no_repeat_ngram,
        num_beams=num_beams,
        length_penalty=length_penalty,
        seed=seed,
    )
    prompts = [prompt] if isinstance(prompt, str) else prompt
    stops = [stop] if isinstance(stop, str) else stop or []
    check_options(prompts, stops, num_samples, config)
    place = find_device(device)
    network, words = read_language_model(checkpoint, "generate", tokenizer)
    end = next((i for name in END_TOKENS if (i := words.token_to_id(name)) is not None), None)
    rows = prompt_ids(prompts, words, end, network.config.max_length)
    texts = [Text(words, row, stops) for row in rows for _ in range(num_samples)]
    if num_beams == 1:
        rows = [row for row in rows for _ in range(num_samples)]
    decoder: Writer = prepared(network, dtype, place)
    if compile:
        decoder = CompiledDecoder(decoder)
    one_by_one, ends = stream and len(texts) == 1 and num_beams == 1, [] if end is None else [end]
    if num_beams > 1:
        steps = grow_beams(texts, decoder, rows, config, ends)
    else:
        steps = grow(texts, decoder, rows, config, ends, every=STEPS_AT_ONCE if compile and not one_by_one else 1)
    with readers_may_leave():
        print_texts(texts, steps, prompts, one_by_one)


def print_texts(texts: list["Text"], steps: Iterator[None], prompts: list[str], one_by_one: bool) -> None:
    """Generate the texts, and print each after its prompt.

    Args:
        texts: the texts, the same number for each prompt.
        steps: generates the texts, one token at each step.
        prompts: the prompts.
        one_by_one: there is a single text; print it token by token.
    """
    if one_by_one:
        write(prompts[0])
        for _ in steps:
            write(texts[0].take())
        write(texts[0].take(last=True) + "\n")
        return
    list(steps)
    each = len(texts) // len(prompts)
    write("---\n".join(prompts[n // each] + text.take(last=True) + "\n" for n, text in enumerate(texts)))


def check_options(prompts: list[str], stops: list[str], num_samples: int, config: GenerationConfig) -> None:
    """Check the options that are not in `GenerationConfig`.

    Raises:
        TrunklineError: with the flag that is wrong.
    """
    if not prompts:
        raise TrunklineError('--prompt is an empty list; give at least one text, or "" to start a new one')
    if "" in stops:
        raise TrunklineError("--stop has an empty string, which is in every text; leave it out")
    if num_samples < 1:
        raise TrunklineError(f"--num_samples must be at least 1, not {num_samples}")
    if num_samples > 1 and config.num_beams == 1 and config.temperature == 0:
        raise TrunklineError(
            f"--num_samples {num_samples} with --temperature 0 gives the same text each time; raise the "
            f"temperature, or set --num_beams {num_samples}"
        )
    if 1 < config.num_beams < num_samples:
        raise TrunklineError(f"--num_samples {num_samples} needs at least as many beams: --num_beams {num_samples}")


def prompt_ids(prompts: list[str], words: Tokenizer, end: int | None, limit: int) -> list[list[int]]:
    """Token ids of each prompt; an empty prompt becomes the end-of-text token, so that a new text begins.

    Raises:
        TrunklineError: if a prompt is empty and there is no such token, or if one has more than `limit` tokens.
    """
    rows = []
    start = [] if end is None else [end]
    for number, prompt in enumerate(prompts):
        name = "--prompt" if len(prompts) == 1 else f"--prompt: text {number + 1}"
        ids = words.encode(prompt, add_special_tokens=False).ids
        if not ids and not start:
            raise TrunklineError(
                f"{name} is empty, and the tokenizer has no end-of-text token ({', '.join(END_TOKENS)}) to start from; "
                "give a prompt"
            )
        if len(ids) > limit:
            raise TrunklineError(
                f"{name} has {len(ids)} tokens, but the network can see {limit} (max_length); leave out at least "
                f"{len(ids) - limit} of them, or train with a larger --model.network.max_length"
            )
        rows.append(ids or start)
    return rows


def left_padded(rows: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Pad rows on the left: tokens (B, T) and their mask (B, T), False for padding."""
    width = max(len(row) for row in rows)
    tokens = torch.tensor([[0] * (width - len(row)) + row for row in rows], device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    return tokens, torch.arange(width, device=device) >= width - lengths[:, None]


def grow(
    texts: list["Text"],
    network: Writer,
    rows: list[list[int]],
    config: GenerationConfig,
    ends: list[int],
    every: int = 1,
) -> Iterator[None]:
    """Continue each row by sampling, one token at every step, and add the tokens to the texts.

    With a larger `every` the tokens of so many steps are added at once: to read them, the host waits for the device.
    """
    device = next(network.parameters()).device
    ended = torch.zeros(len(rows), dtype=torch.bool, device=device)
    waiting: list[Tensor] = []
    for given in next_tokens(network, *left_padded(rows, device), config, ends, ended):
        waiting.append(torch.stack((given, ended)))
        if len(waiting) == every:
            add_tokens(texts, waiting, ended)
            waiting = []
        yield
    if waiting:
        add_tokens(texts, waiting, ended)


def add_tokens(texts: list["Text"], steps: list[Tensor], ended: Tensor) -> None:
    """Add the tokens of some steps to the texts.

    Args:
        texts: a text for each row.
        steps: of each step (2, B): the tokens, and whether the row had ended with them.
        ended: (B,) bool; set to True where a stop string has ended the text.
    """
    for tokens, over in torch.stack(steps).tolist():
        for row, text in enumerate(texts):
            if not over[row] and not text.ended and text.add(tokens[row]):
                ended[row] = True


def grow_beams(
    texts: list["Text"],
    network: Writer,
    rows: list[list[int]],
    config: GenerationConfig,
    ends: list[int],
) -> Iterator[None]:
    """Continue each row by beam search, in one step; the texts of a row get its best beams."""
    device = next(network.parameters()).device
    per_row = len(texts) // len(rows)
    found = beam_search(network, *left_padded(rows, device), config, ends)
    for text, beam in zip(texts, (beam for beams in found for beam in beams[:per_row]), strict=True):
        for token in beam.tokens:
            if text.add(token):
                break
    yield


class Text:
    """The text of new tokens, with complete characters only, up to the first stop string.

    The pieces that `take` returns while the text grows are together the same as the whole text at the end.

    Args:
        words: the tokenizer.
        prompt: tokens before the new ones; the text of the first new token may depend on them.
        stops: strings that end the text.
    """

    def __init__(self, words: Tokenizer, prompt: list[int], stops: list[str]) -> None:
        self.words, self.stops = words, stops
        self.recent = prompt[-8:]
        """Tokens whose text is already known, as context, then tokens whose text is not yet final."""
        self.known = self.decode(self.recent)
        self.text = ""
        self.taken = 0
        self.ended = False

    def decode(self, tokens: list[int]) -> str:
        """Text of tokens, without special tokens."""
        return self.words.decode(tokens, skip_special_tokens=True)

    def add(self, token: int) -> bool:
        """Add a token; returns True if a stop string has ended the text."""
        self.recent.append(token)
        text = self.decode(self.recent)
        if text.endswith(HALF):  # the rest of the character is in the next token
            return False
        return self._extend(text)

    def _extend(self, text: str) -> bool:
        """Add the new part of `text`, which is the text of the tokens in `recent`; True if the text has ended."""
        start = max(0, len(self.text) - max((len(stop) for stop in self.stops), default=1) + 1)
        self.text += text[len(self.known) :]
        self.recent = self.recent[-8:]
        self.known = self.decode(self.recent)
        found = [at for stop in self.stops if (at := self.text.find(stop, start)) >= 0]
        if found:
            self.text, self.ended = self.text[: min(found)], True
        return self.ended

    def take(self, last: bool = False) -> str:
        """The part of the text that is new since the last call; the beginning of a stop string is held back."""
        if last and not self.ended:
            self._extend(self.decode(self.recent).rstrip(HALF))
        final = len(self.text)
        if not last and not self.ended:
            waiting = [n for stop in self.stops for n in range(1, len(stop)) if self.text.endswith(stop[:n])]
            final -= max(waiting, default=0)
        new = self.text[self.taken : final]
        self.taken = max(self.taken, final)
        return new
