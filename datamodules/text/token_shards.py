"""Files of a prepared corpus, read as one stream of tokens."""

from pathlib import Path
from typing import Any

import numpy as np

INDEX = "index.json"


def token_type(vocab_size: int) -> type[np.unsignedinteger[Any]]:
    """The smallest type for ids below `vocab_size`."""
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


class TokenStream:
    """The tokens of a split, over all its shards, as one array on disk.

    Args:
        folder: of the prepared corpus.
        shards: [file name, number of tokens] of each, in order.
        dtype: of the ids on disk.
    """

    def __init__(self, folder: Path, shards: list[tuple[str, int]], dtype: str) -> None:
        self.folder, self.shards, self.dtype = folder, shards, dtype
        self.maps = [np.memmap(folder / name, dtype, "r", shape=(size,)) for name, size in shards]
        self.borders = np.cumsum([0, *(size for _, size in shards)])
        """(shards + 1,) where each begins, and the end."""

    def __reduce__(self) -> tuple[Any, ...]:
        # numpy would send a map's content to a worker process
        return TokenStream, (self.folder, self.shards, self.dtype)

    def __len__(self) -> int:
        """Number of tokens."""
        return int(self.borders[-1])

    def read(self, start: int, stop: int) -> np.ndarray:
        """(stop - start,) ids on disk's type; a view where one shard holds them all.

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

    def document_ends(self) -> np.ndarray:
        """(documents,) int64, where each document stops in the stream: one past its end-of-text token."""
        ends = [
            np.load(self.folder / ends_name(name)) + begin
            for (name, _), begin in zip(self.shards, self.borders[:-1], strict=True)
        ]
        return np.concatenate(ends or [np.zeros(0, np.int64)])


def ends_name(shard: str) -> str:
    """File of the document ends that belongs to a shard."""
    return shard.removesuffix(".bin") + ".ends.npy"
