"""Batches of rows of like length: within the limit, each row once, the same borders in all epochs."""

from collections.abc import Sequence

import numpy as np
import pytest

from trunkline import TrunklineError
from trunkline.datamodules.token_batches import TokenBatches, padded_length

LENGTHS = np.random.default_rng(0).integers(1, 100, 500)
SIDES = np.random.default_rng(1).integers(1, 60, (300, 2))


def epoch(batches: TokenBatches, seed: int | None = 0, start: int = 0) -> list[list[int]]:
    generator = None if seed is None else np.random.default_rng(seed)
    return [rows.tolist() for rows in batches.epoch(generator, start)]


def cut_slowly(lengths: Sequence[int], limit: int) -> list[list[int]]:
    """The batches without shuffling: take the longest rows that are left, as many as fit."""
    left = sorted(range(len(lengths)), key=lambda row: (-(-lengths[row] // 8), row))
    batches = []
    while left:
        longest = -(-lengths[left[-1]] // 8) * 8
        size = min(limit // longest, len(left))
        batches.append(left[-size:])
        del left[-size:]
    return batches


def test_lengths_are_rounded_up_to_multiples_of_8() -> None:
    assert np.asarray(padded_length(np.array([0, 1, 7, 8, 9, 16, 17]))).tolist() == [8, 8, 8, 8, 16, 16, 24]
    assert padded_length(33) == 40


def test_rows_of_like_length_stand_together() -> None:
    batches = TokenBatches(np.array([3, 30, 8, 17, 1, 24, 9, 31, 16]), 64)
    # padded to 8: rows 0, 2, 4; to 16: 6, 8; to 24: 3, 5; to 32: 1, 7
    assert epoch(batches, None) == [[1, 7], [3, 5], [2, 4, 6, 8], [0]]


@pytest.mark.parametrize("limit", [104, 256, 1000, 100_000])
def test_borders_are_those_of_a_slow_loop(limit: int) -> None:
    assert epoch(TokenBatches(LENGTHS, limit), None) == cut_slowly(LENGTHS.tolist(), limit)
    longer = SIDES.max(axis=1).tolist()
    assert epoch(TokenBatches(SIDES, limit), None) == cut_slowly(longer, limit)


@pytest.mark.parametrize("seed", [None, 0, 1])
@pytest.mark.parametrize("limit", [64, 200, 1000])
def test_each_row_is_in_one_batch_within_the_limit_on_each_side(limit: int, seed: int | None) -> None:
    batches = TokenBatches(SIDES, limit)
    found = epoch(batches, seed)
    assert len(batches) == len(found)
    assert sorted(row for batch in found for row in batch) == list(range(len(SIDES)))
    for batch in found:
        for side in (0, 1):
            assert len(batch) * -(-SIDES[batch, side].max() // 8) * 8 <= limit
        assert np.diff([-(-SIDES[row].max() // 8) for row in batch]).min(initial=0) >= 0  # shorter rows first


def test_batches_are_full_except_one() -> None:
    found = epoch(TokenBatches(LENGTHS, 1000), None)
    spare = [1000 - len(batch) * -(-LENGTHS[batch].max() // 8) * 8 for batch in found]
    assert all(room < -(-LENGTHS[batch].max() // 8) * 8 for room, batch in zip(spare[:-1], found[:-1], strict=True))
    padding = sum(len(batch) * LENGTHS[batch].max() for batch in found) / LENGTHS.sum()
    assert padding < 1.2  # at random it is almost 2


def test_epochs_differ_in_rows_and_order_but_not_in_shapes() -> None:
    batches = TokenBatches(LENGTHS, 1000)
    first, second = epoch(batches, 0), epoch(batches, 1)
    shapes = [sorted((len(batch), -(-LENGTHS[batch].max() // 8)) for batch in found) for found in (first, second)]
    assert shapes[0] == shapes[1]
    assert [len(batch) for batch in first] != sorted(len(batch) for batch in first)
    together = [{frozenset(batch) for batch in found} for found in (first, second)]
    assert len(together[0] & together[1]) <= 1  # rows meet other rows


def test_an_epoch_is_a_function_of_its_generator_alone() -> None:
    batches = TokenBatches(LENGTHS, 500)
    whole = epoch(batches, 7)
    assert epoch(batches, 8) != whole
    np.random.seed(3)
    assert epoch(TokenBatches(LENGTHS.copy(), 500), 7) == whole
    for start in (0, 1, len(batches) - 1, len(batches)):
        assert epoch(batches, 7, start) == whole[start:]


def test_the_order_is_the_one_of_every_version() -> None:
    # A changed order would silently break the resume of every run that is under way.
    lengths = np.array([3, 30, 8, 17, 1, 24, 9, 31, 16])
    assert epoch(TokenBatches(lengths, 64), 0) == [[7, 1], [2, 0, 6, 8], [5, 3], [4]]


def test_few_and_no_rows() -> None:
    assert epoch(TokenBatches(np.array([5]), 8)) == [[0]]
    empty = TokenBatches(np.zeros(0, np.int64), 8)
    assert (len(empty), epoch(empty), epoch(empty, None)) == (0, [], [])


def test_a_limit_below_the_longest_row_is_refused() -> None:
    with pytest.raises(TrunklineError) as caught:
        TokenBatches(np.array([[3, 4], [2, 61], [50, 1]]), 63)
    assert str(caught.value) == (
        "batch_tokens=63 is smaller than the longest row (row 1: 61 tokens, padded to 64); set it to at least 64, or "
        "shorten the rows"
    )
    assert caught.value.field == "data.batch_tokens"
    assert len(TokenBatches(np.array([[3, 4], [2, 61], [50, 1]]), 64)) == 3
