"""Warnings of files that are left out."""

import warnings
from collections.abc import Callable

import pytest

from trunkline import TrunklineError
from trunkline.datamodules.skipping import ADVICE, MOST_IN_SUCCESSION, Skipped, first_names


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


def reader(broken: set[int]) -> Callable[[int], str]:
    def read(row: int) -> str:
        if row in broken:
            raise TrunklineError(f"cannot read row {row}{ADVICE}", "data.skip_corrupt")
        return f"row {row}"

    return read


@pytest.mark.filterwarnings("ignore")
def test_the_next_row_that_can_be_read_takes_the_place() -> None:
    skipped = Skipped()
    assert skipped.first_readable(reader({2, 3, 9}), 2, 10) == ("row 4", 2)
    assert skipped.first_readable(reader({2, 3, 9}), 9, 10) == ("row 0", 1)
    assert skipped.first_readable(reader({2, 3, 9}), 5, 10) == ("row 5", 0)
    with pytest.raises(TrunklineError, match=f"^cannot read row 2{ADVICE}$"):
        skipped.first_readable(reader({2}), 2, 1)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("rows", "most"), [(7, 7), (10**6, MOST_IN_SUCCESSION)])
def test_a_source_that_is_lost_is_not_read_to_its_end(rows: int, most: int) -> None:
    """Such as a disk that is no longer there: every row of a million would be tried for each row of a batch."""
    tried: list[int] = []

    def read(row: int) -> str:
        tried.append(row)
        raise TrunklineError(f"cannot read row {row}{ADVICE}", "data.skip_corrupt")

    with pytest.raises(
        TrunklineError, match=rf"^{most} rows after another cannot be read; the last: cannot read row \d+$"
    ):
        Skipped().first_readable(read, 3, rows)
    assert len(tried) == most
