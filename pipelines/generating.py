"""What the commands that write text share: number formats, and texts that grow token by token."""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from tokenizers import Tokenizer
from torch import Tensor

from trunkline.modules.generation.beams import beam_search
from trunkline.modules.generation.decoding import Decoder, GenerationConfig
from trunkline.modules.generation.low_precision import TextNetwork, to_bfloat16, to_int8
from trunkline.modules.generation.sampling import stream

NumberFormat = Literal["float32", "bfloat16", "int8"]
HALF = "\ufffd"
"""The replacement character, which stands for bytes of an incomplete character."""


def prepared(network: TextNetwork, dtype: NumberFormat, device: torch.device) -> TextNetwork:
    """Move the network to a device and convert its weights to a number format."""
    network = network.to(device)
    if dtype == "float32":
        return network
    return to_int8(network) if dtype == "int8" else to_bfloat16(network)


def left_padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Pad rows on the left: tokens (B, T) and their mask (B, T), False for padding."""
    width = max(len(row) for row in rows)
    tokens = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows], device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    return tokens, torch.arange(width, device=device) >= width - lengths[:, None]


def grow(
    texts: Sequence["Text"], decoder: Decoder, tokens: Tensor, mask: Tensor, config: GenerationConfig, ends: list[int]
) -> Iterator[None]:
    """Continue prompts and add the new tokens to the texts.

    Args:
        texts: one text for each prompt; with beam search several, which get the best beams of their prompt.
        decoder: the model.
        tokens: (B, T) prompts, padded on the left.
        mask: (B, T) bool, False for padding.
        config: how tokens are chosen.
        ends: tokens that end a text.

    Yields:
        None after each token of all texts, or once after a beam search.
    """
    if config.num_beams > 1:
        per_row = len(texts) // len(tokens)
        found = beam_search(decoder, tokens, mask, config, ends)
        for text, beam in zip(texts, (beam for beams in found for beam in beams[:per_row]), strict=True):
            for token in beam.tokens:
                if text.add(token):
                    break
        yield
        return
    ended = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
    for given in stream(decoder, tokens, mask, config, ends, ended):
        for row, (token, over) in enumerate(zip(given.tolist(), ended.tolist(), strict=True)):
            if not over and texts[row].add(token):
                ended[row] = True
        yield


def write(text: str) -> None:
    """Print without delay."""
    sys.stdout.write(text)
    sys.stdout.flush()


@contextmanager
def readers_may_leave() -> Iterator[None]:
    """End the block quietly if the reader of the standard output, such as `head`, has stopped reading."""
    try:
        yield
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


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
