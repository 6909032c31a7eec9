"""Pairs of entries that the fewest edits match, against all ways to match them."""

from functools import cache
from itertools import product

import pytest

from trunkline.modules.metrics.error_rates import edit_distance, edit_pairs


@cache
def slow_distance(ours: str, right: str) -> int:
    if not ours or not right:
        return len(ours) + len(right)
    kept = slow_distance(ours[1:], right[1:]) + (ours[0] != right[0])
    return min(kept, slow_distance(ours[1:], right) + 1, slow_distance(ours, right[1:]) + 1)


@pytest.mark.parametrize("length", range(4))
def test_all_short_texts(length: int) -> None:
    texts = ["".join(text) for size in range(5) for text in product("ab", repeat=size)]
    for ours in ("".join(text) for text in product("abc", repeat=length)):
        for right in texts:
            pairs = edit_pairs(ours, right)
            assert "".join(our for our, _ in pairs if our is not None) == ours
            assert "".join(r for _, r in pairs if r is not None) == right
            assert (None, None) not in pairs
            edits = sum(our != r for our, r in pairs)
            assert edits == edit_distance(ours, right) == slow_distance(ours, right)


def test_other_entries_than_letters() -> None:
    assert edit_pairs([3, 0, 5], [3, 5]) == [(3, 3), (0, None), (5, 5)]
    assert edit_pairs(["the", "cat"], ["the", "black", "cat"]) == [("the", "the"), (None, "black"), ("cat", "cat")]
    assert edit_pairs([], []) == []
