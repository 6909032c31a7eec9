"""Captions of images: which values a cell can have, and how a batch of captions becomes tokens."""

import hashlib
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from trunkline import TrunklineError
from trunkline.datamodules.tables import kind
from trunkline.datamodules.text_encoder import TextEncoder
from trunkline.datamodules.text_tasks.task_text import Frame
from trunkline.datamodules.tokenizers import check_room

START_OF_TEXT = "<|startoftext|>"
"""First token of a text in the tokenizer of OpenAI's CLIP."""


def caption_list(value: Any, place: str, column: str) -> list[str]:
    """The captions in a cell, which is a text or a list of texts.

    Raises:
        TrunklineError: for any other value, for no caption, or for an empty one; names the place.
    """
    captions = [value] if isinstance(value, str) else value
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        found = f"a list with {kind(next(c for c in value if not isinstance(c, str)))}" if captions else kind(value)
        if isinstance(value, dict):
            found = kind(value)
        raise TrunklineError(
            f"{place}: '{column}' is not a text or a list of texts but {found}; fix the row, set caption_column, or "
            "skip_corrupt=true",
            field="data.caption_column",
        )
    if not captions or not all(caption.strip() for caption in captions):
        raise TrunklineError(
            f"{place}: '{column}' {'has an empty caption' if captions else 'has no caption'}; write one, remove the "
            "row, or set skip_corrupt=true",
            field="data.skip_corrupt",
        )
    return captions


def caption_key(caption: str) -> int:
    """64-bit hash of a caption, to recognise equal captions."""
    return int.from_bytes(hashlib.blake2b(caption.encode(), digest_size=8).digest(), "little", signed=True)


class CaptionEncoder:
    """Turns captions into rows of tokens.

    A row is `[CLS] a [SEP]`, `<|startoftext|> a <|endoftext|>` or `a <|endoftext|>`, depending on the tokens that the
    tokenizer has. The name of a special token inside a caption is encoded as ordinary text.

    Args:
        tokenizer: the tokenizer; it is not changed.
        max_length: T, the number of tokens in a row, special tokens included.

    Raises:
        TrunklineError: if the tokenizer has no token that ends a text, or if T leaves no room for a token of text.
    """

    def __init__(self, tokenizer: Tokenizer, max_length: int) -> None:
        frame, start = Frame.of(tokenizer), tokenizer.token_to_id(START_OF_TEXT)
        self.first = frame.first or ([] if start is None else [start])
        self.end, self.pad, self.max_length = frame.end, frame.pad, max_length
        self.room = max_length - len(self.first) - 1
        check_room(max_length, smallest=len(self.first) + 2)
        self.encoder = TextEncoder(tokenizer)

    def encode(self, texts: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        """Encode captions. A caption that is too long loses its end, but keeps the special token at the end.

        Returns:
            tokens (N, T) int64; mask (N, T) bool, False for padding; truncated (N,) bool, True if it lost its end.
        """
        ids, counts = self.encoder.encode(texts)
        lengths, first = np.minimum(counts, self.room), len(self.first)
        starts = counts.cumsum() - counts
        tokens = np.full((len(texts), self.max_length), self.pad, np.int64)
        tokens[:, :first] = self.first
        places = np.arange(self.room)  # positions in a row without its special tokens
        kept = places < lengths[:, None]  # (N, room)
        tokens[:, first : first + self.room][kept] = ids[(starts[:, None] + places)[kept]]
        tokens[np.arange(len(texts)), first + lengths] = self.end
        mask = np.arange(self.max_length) <= first + lengths[:, None]
        return torch.from_numpy(tokens), torch.from_numpy(mask), torch.from_numpy(counts > self.room)
