"""Which rows go to training, validation and test where a source does not say: the rules, once for all modalities."""

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
    """The source's name of the training split; None finds `train`."""
    val_split: str | None = None
    """The same for validation. None takes `val_fraction`, unless a source of images has a split of a usual name."""
    test_split: str | None = None
    """The same for testing, with `test_fraction`."""
    val_fraction: float | None = None
    """Share of the training rows set aside for validation, if there is no such split; None is this data's usual one:
    0.1."""
    test_fraction: float | None = None
    """The same for testing; None is 0.2 of labelled images, else 0."""

    usual_fractions: ClassVar[dict[str, float]] = {"val": 0.1, "test": 0.0}
    """What None stands for; the first is taken first."""

    @property
    def split_names(self) -> dict[str, str | None]:
        """Our split -> the source's name of it, as given."""
        return {"train": self.train_split, "val": self.val_split, "test": self.test_split}

    @property
    def fractions(self) -> dict[str, float]:
        """Split -> share of the rows that is set aside for it, if it is missing: as given, else the usual one."""
        given = {"val": self.val_fraction, "test": self.test_fraction}
        return self.usual_fractions | {split: share for split, share in given.items() if share is not None}


def check_fractions(fractions: Mapping[str, float]) -> None:
    """Refuse shares of splits that leave nothing for training.

    Raises:
        TrunklineError: naming the field.
    """
    for split, fraction in fractions.items():
        if not 0 <= fraction < 1 or sum(fractions.values()) >= 1:
            raise TrunklineError(
                f"{split}_fraction={fraction} leaves nothing for training; choose shares from 0 up that sum to less "
                "than 1",
                field=f"data.{split}_fraction",
            )


def shares_of(fractions: Mapping[str, float]) -> dict[str, float]:
    """Split -> share of all rows, training first; splits of which nothing is set aside are left out."""
    return {"train": 1 - sum(fractions.values()), **{split: share for split, share in fractions.items() if share}}


def split_of(number: int, shares: Mapping[str, float]) -> str:
    """Split of a document or row by its number.

    Multiples of the golden ratio spread evenly at any length (Weyl), so that a split of few documents
    still gets its share, and the choice depends on no seed: 10% begin with the ninth document.
    """
    place = number * GOLDEN % 1
    return next((s for s, end in zip(shares, accumulate(shares.values()), strict=True) if place < end), [*shares][-1])


def rows_by_number(length: int, shares: Mapping[str, float]) -> dict[str, np.ndarray]:
    """Split -> ascending numbers of its rows, of rows 0 to `length`: `split_of` for all of them at once."""
    places = np.arange(length) * GOLDEN % 1
    number = np.minimum(np.searchsorted([*accumulate(shares.values())], places, side="right"), len(shares) - 1)
    return {split: np.flatnonzero(number == n) for n, split in enumerate(shares)}


def rows_by_class(labels: np.ndarray, fractions: Mapping[str, float], seed: int) -> dict[str, np.ndarray]:
    """Split -> numbers of its rows, each class in the same proportion (stratified); `train` keeps the rest.

    Args:
        labels: (N,) class numbers of all rows.
        fractions: split -> share of all rows, rounded up; the first is taken first, so that the test rows do not
            depend on how much is taken for validation.
        seed: of the choice.

    Raises:
        TrunklineError: if the shares leave nothing, or a class is too small to be in both parts.
    """
    from sklearn.model_selection import train_test_split

    check_fractions(fractions)
    kept, taken = np.arange(len(labels)), {}
    for split, fraction in fractions.items():
        if not fraction:
            continue
        size = math.ceil(fraction * len(labels))
        try:
            kept, taken[split] = train_test_split(kept, test_size=size, random_state=seed, stratify=labels[kept])
        except ValueError as error:
            raise TrunklineError(
                f"cannot set {fraction:.0%} of the training rows aside for {split}: {error}; give each class more "
                f"rows, name a split with {split}_split, or set {split}_fraction=0",
                field=f"data.{split}_fraction",
            ) from error
    return {"train": kept, **taken}
