"""Which rows go to training, validation and test if the source does not say so: the same rules for all modalities."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar

import numpy as np

from trunkline import TrunklineError

GOLDEN = (5**0.5 - 1) / 2


@dataclass(kw_only=True, eq=False, repr=False)
class Splits:
    """Which part of a source is for training, validation and test."""

    train_split: str | None = None
    """Name of the training split in the source; None is `train`."""
    val_split: str | None = None
    """Name of the validation split in the source. None uses `val_fraction`, except that sources with images and folders
    of sounds are first searched for a split with a usual name (val, validation, valid, dev)."""
    test_split: str | None = None
    """Name of the test split in the source. None uses `test_fraction`, except that sources with images and folders of
    sounds are first searched for a split named `test`."""
    val_fraction: float | None = None
    """Share of the training rows to set aside for validation, if the source has no split for it; None is 0.1."""
    test_fraction: float | None = None
    """Share of the training rows to set aside for testing, if the source has no split for it; None is 0.2 for labelled
    images, else 0."""

    usual_fractions: ClassVar[dict[str, float]] = {"val": 0.1, "test": 0.0}
    """Split -> share that is used for None. The rows of the first split in it are chosen first."""

    @property
    def split_names(self) -> dict[str, str | None]:
        """Our split -> its name in the source, as given."""
        return {"train": self.train_split, "val": self.val_split, "test": self.test_split}

    @property
    def fractions(self) -> dict[str, float]:
        """Split -> share of the rows to set aside for it, if the source lacks it: as given, else the usual share."""
        given = {"val": self.val_fraction, "test": self.test_fraction}
        return self.usual_fractions | {split: share for split, share in given.items() if share is not None}


def check_fractions(fractions: Mapping[str, float]) -> None:
    """Check that the shares of the splits leave rows for training.

    Raises:
        TrunklineError: if not; names the field.
    """
    wrong = [split for split, fraction in fractions.items() if not 0 <= fraction < 1]
    if sum(fractions.values()) >= 1:
        wrong.append(max(fractions, key=lambda split: fractions[split]))
    if wrong:
        raise TrunklineError(
            f"{wrong[0]}_fraction={fractions[wrong[0]]} leaves nothing for training; choose shares from 0 up that sum "
            "to less than 1",
            field=f"data.{wrong[0]}_fraction",
        )


def shares_of(fractions: Mapping[str, float]) -> dict[str, float]:
    """Split -> share of all rows, training first; splits with a share of 0 are left out."""
    return {"train": 1 - sum(fractions.values()), **{split: share for split, share in fractions.items() if share}}


def split_of(number: int, shares: Mapping[str, float]) -> str:
    """The split of a document or row, from its number alone.

    Multiples of the golden ratio spread evenly at any length (Weyl), so that a split gets its share even of a few
    documents, and no seed is needed. With a share of 10%, the ninth document is the first one that is set aside.
    """
    place = number * GOLDEN % 1
    return next((s for s, end in zip(shares, accumulate(shares.values()), strict=True) if place < end), [*shares][-1])


def rows_by_number(length: int, shares: Mapping[str, float]) -> dict[str, np.ndarray]:
    """Split -> its row numbers, ascending, for `length` rows: `split_of` for all rows at once."""
    places = np.arange(length) * GOLDEN % 1
    number = np.minimum(np.searchsorted([*accumulate(shares.values())], places, side="right"), len(shares) - 1)
    return {split: np.flatnonzero(number == n) for n, split in enumerate(shares)}


class RowsOfSplit:
    """The row numbers of one split as `rows_by_number` finds them, without keeping them: 400 million take 3.2 GB.

    Args:
        length: number of rows of all splits.
        shares: split -> its share of the rows.
        split: the split.
    """

    BLOCK, BLOCKS_AT_ONCE = 1024, 256
    """Rows of a block, whose members are found together; and blocks that are gone through at once."""

    def __init__(self, length: int, shares: Mapping[str, float], split: str) -> None:
        ends, number = [*accumulate(shares.values())], [*shares].index(split)
        self.length, self.first = length, ends[number - 1] if number else 0.0
        self.end = ends[number] if number < len(ends) - 1 else math.inf
        blocks = -(-length // self.BLOCK)
        counts = [
            self._members(np.arange(begin, min(begin + self.BLOCKS_AT_ONCE, blocks))).sum(axis=1)
            for begin in range(0, blocks, self.BLOCKS_AT_ONCE)
        ]
        self.before = np.concatenate([[0], *counts]).cumsum()
        """(blocks + 1,) number of rows of the split before each block."""

    def __len__(self) -> int:
        return int(self.before[-1])

    def __getitem__(self, index: int) -> int:
        """The row number at a place among those of the split.

        Raises:
            IndexError: if there is no such place.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of a split with {len(self)}")
        block = int(self.before.searchsorted(index, "right")) - 1
        members = np.flatnonzero(self._members(np.array([block]))[0])
        return block * self.BLOCK + int(members[index - self.before[block]])

    def parts(self) -> Iterator[np.ndarray]:
        """All row numbers, ascending, in parts."""
        for begin in range(0, len(self.before) - 1, self.BLOCKS_AT_ONCE):
            blocks = np.arange(begin, min(begin + self.BLOCKS_AT_ONCE, len(self.before) - 1))
            yield np.flatnonzero(self._members(blocks)) + begin * self.BLOCK

    def places(self, rows: np.ndarray) -> np.ndarray:
        """(N,) the place of each of the row numbers (N,) among those of the split; -1 if it is in another one."""
        number = np.full(len(self.before), -1)
        number[rows // self.BLOCK] = 0
        blocks = np.flatnonzero(number == 0)
        number[blocks] = np.arange(len(blocks))
        members = self._members(blocks)
        places = np.where(members, members.cumsum(axis=1) + (self.before[blocks] - 1)[:, None], -1)
        return places[number[rows // self.BLOCK], rows % self.BLOCK]

    def _members(self, blocks: np.ndarray) -> np.ndarray:
        """(blocks, BLOCK) bool, which rows of these blocks are in the split."""
        rows = blocks[:, None] * self.BLOCK + np.arange(self.BLOCK)
        place = rows * GOLDEN
        place -= np.floor(place)  # as % 1, which takes several times as long
        return (place >= self.first) & (place < self.end) & (rows < self.length)


def rows_by_class(labels: np.ndarray, fractions: Mapping[str, float], seed: int) -> dict[str, np.ndarray]:
    """Split -> its row numbers, with the same proportion of each class in all splits; `train` keeps the rest.

    Args:
        labels: (N,) class numbers of all rows.
        fractions: split -> share of all rows, rounded up. Splits are set aside in this order: with `test` first, the
            test rows do not depend on the share of validation.
        seed: seed of the choice.

    Raises:
        TrunklineError: if the shares leave no row for training, or if a class is too small to be in both parts.
    """
    from sklearn.model_selection import train_test_split

    check_fractions(fractions)
    train, chosen = np.arange(len(labels)), {}
    for split, fraction in fractions.items():
        if not fraction:
            continue
        size = math.ceil(fraction * len(labels))
        try:
            train, chosen[split] = train_test_split(train, test_size=size, random_state=seed, stratify=labels[train])
        except ValueError as error:
            raise TrunklineError(
                f"cannot set {fraction:.0%} of the training rows aside for {split}: {error}; give each class more "
                f"rows, name a split with {split}_split, or set {split}_fraction=0",
                field=f"data.{split}_fraction",
            ) from error
    return {"train": train, **chosen}
