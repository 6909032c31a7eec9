"""Which rows go to training, validation and test where a source does not say: the rules, once for all modalities."""

import math
from collections.abc import Mapping
from itertools import accumulate

import numpy as np

from trunkline import TrunklineError

GOLDEN = (5**0.5 - 1) / 2


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
