"""Reads the files of a prepared corpus as one stream of tokens."""

from pathlib import Path
from typing import Any

import numpy as np

from trunkline.datamodules.content_digest import MOST_BYTES, SAMPLED, blocks, short_digest

INDEX = "index.json"


def token_type(vocab_size: int) -> type[np.unsignedinteger[Any]]:
    """The smallest type for ids below `vocab_size`."""
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


class TokenStream:
    """The tokens of a split, in all its shards, as one array on disk.

    Args:
        folder: folder of the prepared corpus.
        shards: [file name, number of tokens] of each shard, in order.
        dtype: type of the ids on disk.
    """

    def __init__(self, folder: Path, shards: list[tuple[str, int]], dtype: str) -> None:
        self.folder, self.shards, self.dtype = folder, shards, dtype
        # Slices of plain arrays are made 3 times as fast as slices of `np.memmap`s; both read from the disk.
        self.maps = [np.asarray(np.memmap(folder / name, dtype, "r", shape=(size,))) for name, size in shards]
        self.borders = np.cumsum([0, *(size for _, size in shards)])
        """(shards + 1,) where each shard begins in the stream, and the end of the stream."""

    def __reduce__(self) -> tuple[Any, ...]:
        # Else numpy would send the content of the memory maps to each worker process.
        return TokenStream, (self.folder, self.shards, self.dtype)

    def __len__(self) -> int:
        return int(self.borders[-1])

    def read(self, start: int, stop: int) -> np.ndarray:
        """The tokens from `start` up to `stop`, (stop - start,), in the type on disk; a view if one shard has them all.

        Raises:
            IndexError: outside the stream.
        """
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"tokens {start} to {stop} of a stream of {len(self)}")
        first = int(self.borders.searchsorted(start, "right")) - 1
        parts = []
        while start < stop:
            begin, end = int(self.borders[first]), min(stop, int(self.borders[first + 1]))
            parts.append(self.maps[first][start - begin : end - begin])
            start, first = end, first + 1
        return parts[0] if len(parts) == 1 else np.concatenate(parts or [np.zeros(0, self.dtype)])

    def digest(self) -> str:
        """A short digest of some of the tokens, evenly spaced over the stream."""
        most = SAMPLED * MOST_BYTES // np.dtype(self.dtype).itemsize
        parts = [self.read(first, first + number) for first, number in blocks(len(self), most, SAMPLED)]
        return short_digest(np.concatenate(parts).data)

    def document_ends(self) -> np.ndarray:
        """(documents,) int64, where each document ends in the stream: the position after its end-of-text token."""
        ends = [
            np.load(self.folder / ends_name(name)) + begin
            for (name, _), begin in zip(self.shards, self.borders[:-1], strict=True)
        ]
        return np.concatenate(ends or [np.zeros(0, np.int64)])


def ends_name(shard: str) -> str:
    """Name of the file with the document ends of a shard."""
    return shard.removesuffix(".bin") + ".ends.npy"


class DocumentTexts:
    """The documents of a split as text, in all its shards, read from disk one by one.

    Args:
        folder: folder of the prepared corpus.
        shards: names of the split's token shards, in order; each has files with the texts of its documents.
    """

    def __init__(self, folder: Path, shards: list[str]) -> None:
        self.folder, self.shards = folder, shards
        self.maps = [np.memmap(folder / texts_name(name), np.uint8, "r") for name in shards]
        self.ends = [np.load(folder / text_ends_name(name), "r") for name in shards]
        self.borders = np.cumsum([0, *map(len, self.ends)])
        """(shards + 1,) number of the first document of each shard, and the number of all documents."""

    def __reduce__(self) -> tuple[Any, ...]:
        return DocumentTexts, (self.folder, self.shards)

    def __len__(self) -> int:
        return int(self.borders[-1])

    def __getitem__(self, number: int) -> str:
        """The text of a document.

        Raises:
            IndexError: if there is no such document.
        """
        if not 0 <= number < len(self):
            raise IndexError(f"document {number} of {len(self)}")
        shard = int(self.borders.searchsorted(number, "right")) - 1
        place, ends = number - int(self.borders[shard]), self.ends[shard]
        return self.maps[shard][ends[place - 1] if place else 0 : ends[place]].tobytes().decode()


def texts_name(shard: str) -> str:
    """Name of the file with the texts of a shard's documents, in UTF-8."""
    return shard.removesuffix(".bin") + ".txt"


def text_ends_name(shard: str) -> str:
    """Name of the file with the byte where each of these texts ends."""
    return shard.removesuffix(".bin") + ".text-ends.npy"
