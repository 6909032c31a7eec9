"""Error rates of recognised speech: edits over a whole split, divided by the length of what was said."""

from collections.abc import Callable, Hashable, Sequence

import numpy as np


def edit_distance(ours: Sequence[Hashable], right: Sequence[Hashable]) -> int:
    """Fewest insertions, deletions and substitutions that turn one sequence into the other (Levenshtein, 1966).

    A row of the table at a time: the cost of a run of insertions along a row is a running minimum.
    """
    numbers = {entry: number for number, entry in enumerate(dict.fromkeys((*ours, *right)))}
    row = np.array([numbers[entry] for entry in ours], dtype=np.int64)
    place = np.arange(len(row) + 1)
    cost = place.copy()  # from the first n entries of ours to the first m entries of the right ones
    for number in map(numbers.__getitem__, right):
        cost[1:] = np.minimum(cost[:-1] + (row != number), cost[1:] + 1)
        cost[0] += 1
        cost = np.minimum.accumulate(cost - place) + place
    return int(cost[-1])


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
