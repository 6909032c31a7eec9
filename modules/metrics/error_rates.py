"""Error rates of recognised speech: edits over a whole split, divided by the length of what was said."""

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import TypeVar

import numpy as np

UnitT = TypeVar("UnitT", bound=Hashable)


def edit_costs(ours: Sequence[Hashable], right: Sequence[Hashable]) -> Iterator[np.ndarray]:
    """The table of edit distances between beginnings of two sequences (Levenshtein, 1966), row by row.

    Row m has (len(ours) + 1,) distances, entry n from the first n entries of ours to the first m entries of the right
    ones. The cost of a run of insertions along a row is a running minimum.
    """
    numbers = {entry: number for number, entry in enumerate(dict.fromkeys((*ours, *right)))}
    row = np.array([numbers[entry] for entry in ours], dtype=np.int64)
    place = np.arange(len(row) + 1)
    cost = place
    yield cost
    for number in map(numbers.__getitem__, right):
        kept = np.minimum(cost[:-1] + (row != number), cost[1:] + 1)
        cost = np.minimum.accumulate(np.concatenate((cost[:1] + 1, kept)) - place) + place
        yield cost


def edit_distance(ours: Sequence[Hashable], right: Sequence[Hashable]) -> int:
    """Fewest insertions, deletions and substitutions that turn one sequence into the other."""
    for cost in edit_costs(ours, right):
        distance = cost[-1]
    return int(distance)


def edit_pairs(ours: Sequence[UnitT], right: Sequence[UnitT]) -> list[tuple[UnitT | None, UnitT | None]]:
    """The entries of both sequences side by side, as the fewest edits match them.

    The pairs are (ours, right); None stands where the other side has an entry without a partner. As many pairs are
    unequal as there are edits.
    """
    table = list(edit_costs(ours, right))
    pairs: list[tuple[UnitT | None, UnitT | None]] = []
    n, m = len(ours), len(right)
    while n or m:
        if n and m and table[m][n] == table[m - 1][n - 1] + (ours[n - 1] != right[m - 1]):
            n, m = n - 1, m - 1
            pairs.append((ours[n], right[m]))
        elif n and table[m][n] == table[m][n - 1] + 1:
            n -= 1
            pairs.append((ours[n], None))
        else:
            m -= 1
            pairs.append((None, right[m]))
    return pairs[::-1]


def characters(text: str) -> str:
    """What the character error rate compares: the text with single spaces between its words."""
    return " ".join(text.split())


UNITS: dict[str, Callable[[str], Sequence[str]]] = {"wer": str.split, "cer": characters}
"""Name of an error rate -> what it cuts a text into: words, or characters."""


def error_rate(predictions: Sequence[str], references: Sequence[str], units: Callable[[str], Sequence[str]]) -> float:
    """Edits of all rows / units of all references; not a mean of the rows' own rates.

    If all references are empty, it is the number of edits.

    Args:
        predictions: what was recognised.
        references: what was said in each row.
        units: cuts a text into what is counted.
    """
    pairs = [(units(ours), units(right)) for ours, right in zip(predictions, references, strict=True)]
    return sum(edit_distance(*pair) for pair in pairs) / max(1, sum(len(right) for _, right in pairs))
