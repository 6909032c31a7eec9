"""What is said about files and rows that are left out because they cannot be read."""

import warnings
from collections.abc import Callable
from typing import TypeVar

from trunkline import TrunklineError

MOST_NAMES = 3
"""Number of files that are named."""
MOST_IN_SUCCESSION = 1000
"""Rows after another that cannot be read until the source itself is taken for lost."""
ItemT = TypeVar("ItemT")
ADVICE = ", or set skip_corrupt=true"
"""The end of an error's message, which means nothing to who has set it."""


class Skipped:
    """Warns of the first files that a dataset leaves out, and once more that there are others, which metrics count."""

    def __init__(self) -> None:
        self.said: set[str] = set()

    def add(self, error: TrunklineError) -> None:
        """Warn of a file, unless it or enough others are named already."""
        message = f"skipped: {str(error).removesuffix(ADVICE)}"
        if message in self.said or len(self.said) > MOST_NAMES:
            return
        self.said.add(message)
        if len(self.said) <= MOST_NAMES:
            warnings.warn(message, stacklevel=3)
        else:
            warnings.warn(f"skipped: more than {MOST_NAMES} files that cannot be read", stacklevel=3)

    def first_readable(self, read: Callable[[int], ItemT], row: int, rows: int) -> tuple[ItemT, int]:
        """What `read` returns for a row, or else for the next one that it can read; and how many were skipped.

        A row is replaced rather than left out, so that every process keeps its batch size. Which row replaces it
        depends on nothing but the source, so that a resumed run trains on the same rows.

        Args:
            read: raises a `TrunklineError` for a row that cannot be read.
            row: number of the row.
            rows: rows of the source, after the last of which the first one comes; 1 skips none.

        Raises:
            TrunklineError: if the row, and many rows after it, cannot be read.
        """
        for skipped in range(most := min(rows, MOST_IN_SUCCESSION)):
            try:
                return read((row + skipped) % rows if rows > 1 else row), skipped
            except TrunklineError as error:
                if rows == 1:
                    raise
                if skipped == most - 1:
                    reason = str(error).removesuffix(ADVICE)
                    raise TrunklineError(
                        f"{most} rows after another cannot be read; the last: {reason}", error.field
                    ) from error
                self.add(error)
        raise AssertionError("a source without rows")


def first_names(names: list[str]) -> str:
    """`a, b, c, …`: the first names."""
    return ", ".join([*names[:MOST_NAMES], *(["…"] if len(names) > MOST_NAMES else [])])
