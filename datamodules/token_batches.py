"""Batches of rows of like length, limited by tokens instead of rows. Only the lengths of the rows are known here."""

from collections.abc import Iterator

import numpy as np

from trunkline import TrunklineError

LENGTH_STEP = 8
"""Rows are padded to a multiple of this length: few different shapes, and sizes that matrix units like."""


def padded_length(length: np.ndarray | int) -> np.ndarray | int:
    """Lengths rounded up to a multiple of `LENGTH_STEP`, at least one."""
    return np.maximum(-(-length // LENGTH_STEP), 1) * LENGTH_STEP


class TokenBatches:
    """Cuts a data set into batches of similar length, so that rows * longest row is at most `batch_tokens`.

    Rows are sorted by their padded length. Rows of the same padded length are interchangeable: each epoch shuffles
    them, so that a row meets other rows, but the borders between batches stay where they are. So the number of batches
    is the same in all epochs, and no text is read to begin in the middle of one.

    A batch can hold rows of several padded lengths; each row is in one batch of an epoch. Only one batch, that of the
    shortest rows, can be much smaller than the limit.

    Args:
        lengths: (N,) tokens of each row, or (N, K) if a row has K sides that are padded separately (source and
            target): the limit holds for each side.
        batch_tokens: the limit, over all processes.

    Raises:
        TrunklineError: if a row alone is longer.
    """

    def __init__(self, lengths: np.ndarray, batch_tokens: int) -> None:
        self.batch_tokens = batch_tokens
        longest = lengths.max(axis=1) if lengths.ndim == 2 else lengths
        padded = np.asarray(padded_length(longest))
        if len(padded) and padded.max() > batch_tokens:
            row = int(padded.argmax())
            raise TrunklineError(
                f"batch_tokens={batch_tokens} is smaller than the longest row (row {row}: {longest[row]} tokens, "
                f"padded to {padded[row]}); set it to at least {padded[row]}, or shorten the rows",
                field="data.batch_tokens",
            )
        sizes, groups = np.unique(padded, return_inverse=True)
        self.group = groups.astype(np.uint16 if len(sizes) <= 1 << 16 else np.uint32)
        """(N,) number of each row's padded length, ascending; small integers are sorted fast."""
        stops, stop, ordered = [len(padded)], len(padded), np.repeat(sizes, np.bincount(groups, minlength=len(sizes)))
        while stop > 0:
            stop = max(stop - batch_tokens // int(ordered[stop - 1]), 0)
            stops.append(stop)
        self.stops = np.array(stops)
        """(batches + 1,) descending: batch n has the sorted rows from stops[n + 1] up to stops[n]."""

    def __len__(self) -> int:
        """Number of batches in an epoch."""
        return len(self.stops) - 1

    def epoch(self, generator: np.random.Generator | None, start: int = 0) -> Iterator[np.ndarray]:
        """The row numbers of each batch of an epoch, shorter rows first.

        Args:
            generator: of the epoch; it draws the rows of each batch and the order of the batches. Without it, long
                batches come first, and rows of the same length keep their order.
            start: number of batches to leave out.
        """
        rows, batches = np.arange(len(self.group)), np.arange(len(self))
        if generator is not None:
            rows, batches = generator.permutation(len(rows)), generator.permutation(len(batches))
        rows = rows[np.argsort(self.group[rows], kind="stable")]
        for batch in batches[start:]:
            yield rows[self.stops[batch + 1] : self.stops[batch]]
