"""Pairs of token sequences, read from disk and padded to the longest of a batch."""

from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from trunkline.contract import IGNORE
from trunkline.datamodules.samplers import SampleKey
from trunkline.datamodules.text.token_shards import DocumentTexts, TokenStream
from trunkline.datamodules.token_batches import padded_length


class SideTokens:
    """The tokens of all sources, or of all targets, of a split.

    Args:
        stream: the tokens of the split.
        borders: (documents + 1,) where each document begins in the stream, and the end of the stream. The last token of
            a document ends its text.
        texts: the documents as text, if they are kept.
        first: number of the first document of this side.
        step: 2 if documents of sources and targets alternate, 1 if each side has a stream of its own.
        limit: maximum number of tokens, with the end-of-text token; of a longer text the end is cut off.
    """

    def __init__(
        self,
        stream: TokenStream,
        borders: np.ndarray,
        texts: DocumentTexts | None = None,
        *,
        first: int,
        step: int,
        limit: int,
    ) -> None:
        self.stream, self.borders, self.first, self.step = stream, borders, first, step
        self.limit, self.texts = limit, texts

    def __len__(self) -> int:
        return len(self.borders[:-1][self.first :: self.step])

    @property
    def lengths(self) -> np.ndarray:
        """(N,) number of tokens of each text, before anything is cut off."""
        return np.diff(self.borders)[self.first :: self.step]

    def read(self, row: int) -> tuple[np.ndarray, bool]:
        """The tokens of a text, (n,) in the type on disk, and whether its end was cut off."""
        document = self.first + self.step * row
        start, stop = self.borders[document : document + 2].tolist()
        if stop - start <= self.limit:
            return self.stream.read(start, stop), False
        kept = self.stream.read(start, start + self.limit - 1)
        return np.concatenate([kept, self.stream.read(stop - 1, stop)]), True

    def text(self, row: int) -> str | None:
        """The text itself; None if texts are not kept."""
        return None if self.texts is None else self.texts[self.first + self.step * row]


class TranslationRows(Dataset[dict[str, Any]]):
    """Pairs as items of a `SequencePairBatch`. A filler (`valid` False) has no targets.

    Args:
        source: tokens of the sources.
        target: tokens of the targets.
        start_token: id that the decoder reads before a target.
        pairs: (N,) numbers of the pairs that are rows; None is all of them.
    """

    def __init__(
        self, source: SideTokens, target: SideTokens, start_token: int, pairs: np.ndarray | None = None
    ) -> None:
        self.source, self.target, self.start_token = source, target, start_token
        self.pairs = np.arange(len(source)) if pairs is None else pairs

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def lengths(self) -> np.ndarray:
        """(N, 2) tokens of source and target of each row."""
        sides = [np.minimum(side.lengths[self.pairs], side.limit) for side in (self.source, self.target)]
        return np.stack(sides, axis=1)

    def __getitem__(self, key: SampleKey) -> dict[str, Any]:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: list[SampleKey]) -> list[dict[str, Any]]:
        """The items of a batch, as a DataLoader asks for them: all of the same length."""
        pairs = [int(self.pairs[key.index]) for key in keys]
        sources, targets = [self.source.read(pair) for pair in pairs], [self.target.read(pair) for pair in pairs]
        shapes = [(len(keys), longest(side, texts)) for side, texts in ((self.source, sources), (self.target, targets))]
        batch: dict[str, np.ndarray] = {
            "tokens": np.zeros(shapes[0], np.int64),
            "mask": np.zeros(shapes[0], bool),
            "target_tokens": np.zeros(shapes[1], np.int64),
            "targets": np.full(shapes[1], IGNORE, np.int64),
        }
        batch["target_tokens"][:, 0] = self.start_token
        for n, ((source, _), (target, _)) in enumerate(zip(sources, targets, strict=True)):
            batch["tokens"][n, : len(source)] = source
            batch["mask"][n, : len(source)] = True
            batch["target_tokens"][n, 1 : len(target)] = target[:-1]
            if keys[n].valid:
                batch["targets"][n, : len(target)] = target
        tensors = {name: torch.from_numpy(values).unbind() for name, values in batch.items()}
        return [
            {
                **{name: values[n] for name, values in tensors.items()},
                "truncated": int(key.valid and (sources[n][1] or targets[n][1])),
                "index": key.index,
                "valid": key.valid,
            }
            for n, key in enumerate(keys)
        ]


def longest(side: SideTokens, texts: list[tuple[np.ndarray, bool]]) -> int:
    """Length to which the texts of a batch are padded; never more than the side's limit."""
    return min(int(padded_length(max(len(tokens) for tokens, _ in texts))), side.limit)
