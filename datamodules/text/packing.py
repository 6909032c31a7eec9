"""Makes rows of equal length from a stream of tokens: blocks of running text, or packed documents."""

from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from trunkline.contract import IGNORE
from trunkline.datamodules.samplers import SampleKey
from trunkline.datamodules.text.token_shards import TokenStream


class Blocks:
    """Running text; the borders of documents are ignored.

    Row i holds the T tokens from position s = offset + i T on; their targets are the T tokens from s + 1 on. In
    training each epoch draws its offset from [0, T), so that the borders of rows move, and s is at most n - 1 - T. In
    evaluation the offset is 0, each token except the first is a target once, and the last row is padded.

    Args:
        stream: n tokens; training needs more than T.
        length: T.
        seed: seed of the offset; None for evaluation.
        overlap: tokens that a row shares with the next row: 1, because the last target of a row is the first token of
            the next; 0 for rows without such targets.
    """

    def __init__(self, stream: TokenStream, length: int, seed: int | None, overlap: int = 1) -> None:
        self.stream, self.length, self.seed, self.overlap = stream, length, seed, overlap
        self._offset = (-1, 0)  # of the last epoch that was read

    def __len__(self) -> int:
        """Number of rows; in training only full rows."""
        places = len(self.stream) - self.overlap
        return places // self.length if self.seed is not None else -(-places // self.length)

    def read(self, key: SampleKey) -> np.ndarray:
        """The T + overlap tokens of a row (fewer at the end of the text), in the type on disk."""
        start = key.index * self.length
        if self.seed is not None:
            if self._offset[0] != key.epoch:
                self._offset = key.epoch, int(np.random.default_rng((self.seed, key.epoch)).integers(self.length))
            start = min(start + self._offset[1], len(self.stream) - self.overlap - self.length)
        return self.stream.read(start, min(start + self.length + self.overlap, len(self.stream)))

    def fill(self, key: SampleKey, row: dict[str, np.ndarray]) -> None:
        """Write a row into `row`, where `tokens` (T,) is filled with 0 and `targets` (T,) with -100."""
        tokens = self.read(key)
        size = len(tokens) - 1
        row["tokens"][:size], row["targets"][:size] = tokens[:-1], tokens[1:]


class Documents:
    """Whole documents, packed into rows with little padding; documents longer than T are cut into chunks of T tokens.

    The target of a token is the next token of its document, even if that is in another chunk; the last token of a
    document has no target. So each token except the first of its document is a target once. Rows are the same in all
    epochs.

    Args:
        stream: the tokens.
        length: T.
    """

    def __init__(self, stream: TokenStream, length: int) -> None:
        self.stream, self.length = stream, length
        ends = stream.document_ends()
        starts, sizes = cut_documents(ends, length)
        rows = best_fit(sizes, length)
        order = np.argsort(rows, kind="stable")
        self.starts, self.sizes = starts[order], sizes[order]
        """(chunks,) where each chunk starts in the stream, and its size; sorted by row."""
        self.borders = np.concatenate([[0], np.bincount(rows).cumsum()]) if len(rows) else np.zeros(1, np.int64)
        """Row i has the chunks from borders[i] up to, but not including, borders[i + 1]."""
        stops = starts + sizes
        position = np.searchsorted(ends, stops)
        self.last = (ends[position] == stops)[order]
        """(chunks,) whether the chunk ends its document."""

    def __len__(self) -> int:
        return len(self.borders) - 1

    def fill(self, key: SampleKey, row: dict[str, np.ndarray]) -> None:
        """Write a row into `row`, where `tokens` and `document` (T,) are filled with 0 and `targets` (T,) with -100."""
        place = 0
        begin, end = self.borders[key.index : key.index + 2]
        for number, chunk in enumerate(range(begin, end), start=1):
            start, size, last = int(self.starts[chunk]), int(self.sizes[chunk]), bool(self.last[chunk])
            tokens = self.stream.read(start, start + size + (not last))
            stop = place + size
            row["tokens"][place:stop] = tokens[:size]
            row["targets"][place : place + len(tokens) - 1] = tokens[1:]
            row["document"][place:stop] = number
            place = stop


def cut_documents(ends: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut documents into chunks of at most `length` tokens, in the order of the text.

    Args:
        ends: (documents,) where each document ends in the stream.
        length: T.

    Returns:
        (chunks,) where each chunk starts in the stream, and (chunks,) its size.
    """
    sizes = np.diff(ends, prepend=0)
    counts = -(-sizes // length)
    first = counts.cumsum() - counts
    number = np.arange(counts.sum()) - np.repeat(first, counts)  # of each chunk in its document
    starts = np.repeat(ends - sizes, counts) + number * length
    return starts, np.minimum(np.repeat(ends, counts) - starts, length)


def best_fit(sizes: np.ndarray, length: int) -> np.ndarray:
    """Best-fit decreasing (arXiv:2404.10830): the largest chunk first, each into the fullest row that has room for it.

    Args:
        sizes: (N,) sizes of the chunks, from 1 to `length`.
        length: size of a row.

    Returns:
        (N,) the row of each chunk; rows are numbered from 0 without gaps.
    """
    order = np.argsort(-sizes, kind="stable")
    rows = np.empty(len(sizes), np.int64)
    full = int(np.count_nonzero(sizes == length))
    rows[order[:full]] = np.arange(full)
    count = full
    room: list[list[int]] = [[] for _ in range(length + 1)]
    """room[f] lists the rows with f free places."""
    free = 0  # bit f is set if room[f] is not empty: the lowest set bit from `size` on is the best fit
    placed = []
    for size in sizes[order[full:]].tolist():  # Python integers make this loop fastest
        fitting = free >> size
        if fitting:
            space = size + (fitting & -fitting).bit_length() - 1
            row = room[space].pop()
            if not room[space]:
                free ^= 1 << space
        else:
            space, row = length, count
            count += 1
        placed.append(row)
        space -= size
        if space:
            room[space].append(row)
            free |= 1 << space
    rows[order[full:]] = placed
    return rows


class PackedRows(Dataset[dict[str, Any]]):
    """Rows as items; an item is a pure function of (seed, epoch, index).

    Items: `tokens` and `targets` (T,) int64, `document` (T,) int64 if documents are packed, `index`, `valid`.
    A filler (`valid` False) has no targets.
    """

    def __init__(self, rows: Blocks | Documents) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: SampleKey) -> dict[str, Any]:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: list[SampleKey]) -> list[dict[str, Any]]:
        """The items of a batch, as a DataLoader asks for them."""
        shape = len(keys), self.rows.length
        batch = {"tokens": np.zeros(shape, np.int64), "targets": np.full(shape, IGNORE, np.int64)}
        if isinstance(self.rows, Documents):
            batch["document"] = np.zeros(shape, np.int64)
        for n, key in enumerate(keys):
            self.rows.fill(key, {name: values[n] for name, values in batch.items()})
            if not key.valid:
                batch["targets"][n] = IGNORE
        tensors = {name: torch.from_numpy(values) for name, values in batch.items()}
        return [
            {**{name: values[n] for name, values in tensors.items()}, "index": key.index, "valid": key.valid}
            for n, key in enumerate(keys)
        ]
