"""Warnings of files that are left out."""

import warnings

from trunkline import TrunklineError
from trunkline.datamodules.skipping import ADVICE, Skipped, first_names


def test_the_first_files_are_named_without_advice_that_is_followed_already() -> None:
    skipped = Skipped()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for number in (0, 0, 1, 1, 2, 0, 3, 4, 5):
            skipped.add(TrunklineError(f"cannot read {number}.png; remove it{ADVICE}"))
    said = [str(warning.message) for warning in caught]
    assert said[:3] == [f"skipped: cannot read {number}.png; remove it" for number in range(3)]
    assert said[3:] == ["skipped: more than 3 files that cannot be read"]


def test_first_names() -> None:
    assert first_names(["a", "b", "c"]) == "a, b, c"
    assert first_names(["a", "b", "c", "d"]) == "a, b, c, …"
