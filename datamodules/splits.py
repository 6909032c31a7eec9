"""Which rows go to training, validation and test if the source does not say so: the same rules for all modalities."""

import math
from collections.abc import Mapping
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
