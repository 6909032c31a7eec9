"""Recordings of a split, as the datamodules see them, and parts of them."""

from pathlib import Path
from typing import Protocol

import numpy as np


class AudioRows(Protocol):
    """Recordings of one split."""

    seconds: np.ndarray
    """(N,) float64, length of each."""
    texts: list[str] | None
    """What is said in each; None if that is not known."""
    labels: list[list[str]] | None
    """Names of the labels of each; None if there are none."""

    def __len__(self) -> int:
        """Number of recordings."""

    def waveform(self, row: int, rate: int, start: float = 0.0, end: float | None = None) -> np.ndarray:
        """The samples (S,) float32 of a row, one channel at `rate` samples per second.

        Args:
            row: its number.
            rate: samples per second.
            start: seconds from the beginning of the row to the first sample.
            end: the same to the end of the last one; None is the end of the row.

        Raises:
            TrunklineError: if it cannot be read; names file and row.
        """

    def name(self, row: int) -> str:
        """Name of the file or row, for messages."""

    def stored(self, row: int) -> list[bytes | Path]:
        """What is stored of a row, as it is, for `sampled_digest`."""


class AudioSubset:
    """Some rows of another `AudioRows`, or parts of them.

    Args:
        rows: the other rows.
        indices: (N,) their numbers.
        starts: (N,) seconds from the beginning of the row to that of each part; None is 0.
        longest: seconds of the longest part; None is the whole rest of the row.
    """

    def __init__(
        self, rows: AudioRows, indices: np.ndarray, starts: np.ndarray | None = None, longest: float | None = None
    ) -> None:
        self.rows, self.indices, self.longest = rows, indices, longest
        self.starts = np.zeros(len(indices)) if starts is None else starts
        self.seconds = np.minimum(rows.seconds[indices] - self.starts, np.inf if longest is None else longest)
        self.texts = None if rows.texts is None else [rows.texts[int(n)] for n in indices]
        self.labels = None if rows.labels is None else [rows.labels[int(n)] for n in indices]

    def __len__(self) -> int:
        return len(self.indices)

    def waveform(self, row: int, rate: int, start: float = 0.0, end: float | None = None) -> np.ndarray:
        first = float(self.starts[row])
        end = self.longest if end is None else end
        return self.rows.waveform(int(self.indices[row]), rate, first + start, None if end is None else first + end)

    def name(self, row: int) -> str:
        part = f", from {self.starts[row]:.2f} s on" if self.starts[row] else ""
        return self.rows.name(int(self.indices[row])) + part

    def stored(self, row: int) -> list[bytes | Path]:
        return self.rows.stored(int(self.indices[row]))


def windows(rows: AudioRows, seconds: float, slack: float = 0.0) -> AudioSubset:
    """Rows as parts of at most `seconds`. The parts of a longer row overlap evenly, so that each of them is full.

    Args:
        rows: the rows.
        seconds: length of the longest part.
        slack: seconds by which a row may be longer without another part for them.
    """
    counts = np.maximum(np.ceil((rows.seconds - slack) / seconds), 1).astype(np.int64)
    indices = np.repeat(np.arange(len(rows)), counts)
    numbers = np.arange(len(indices)) - np.repeat(np.cumsum(counts) - counts, counts)
    steps = np.maximum(rows.seconds - seconds, 0) / np.maximum(counts - 1, 1)
    return AudioSubset(rows, indices, numbers * steps[indices], seconds)
