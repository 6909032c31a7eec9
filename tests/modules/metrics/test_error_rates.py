"""Error rates against torchaudio, torchmetrics and a slow recursion."""

import random
from functools import cache

import pytest
from torchaudio.functional import edit_distance as torchaudio_distance
from torchmetrics.functional.text import char_error_rate, word_error_rate

from trunkline.modules.metrics.error_rates import UNITS, characters, edit_distance, error_rate
from trunkline.modules.metrics.translation import translation_scores


def slow_distance(ours: str, right: str) -> int:
    @cache
    def to(m: int, n: int) -> int:
        if not m or not n:
            return m + n
        return min(to(m - 1, n) + 1, to(m, n - 1) + 1, to(m - 1, n - 1) + (ours[m - 1] != right[n - 1]))

    return to(len(ours), len(right))


def texts(count: int, letters: str = "abc ") -> list[str]:
    draw = random.Random(0)
    return ["".join(draw.choices(letters, k=draw.randint(0, 14))) for _ in range(count)]


def test_distances() -> None:
    for ours, right in zip(texts(200), reversed(texts(200)), strict=True):
        assert edit_distance(ours, right) == slow_distance(ours, right) == torchaudio_distance(ours, right)
        assert edit_distance(ours.split(), right.split()) == torchaudio_distance(ours.split(), right.split())
    assert edit_distance("kitten", "sitting") == 3
    assert edit_distance("", "abc") == edit_distance("abc", "") == 3
    assert edit_distance("", "") == 0
    assert edit_distance(["one", "two"], ["one", "two", "two"]) == 1


def test_rates_of_a_corpus() -> None:
    """Sums of edits, not a mean of the rows' ratios; characters with single spaces between the words."""
    predictions, references = texts(100), texts(101)[1:]
    spaced = [[characters(text) for text in side] for side in (predictions, references)]
    want = {"wer": word_error_rate(predictions, references).item(), "cer": char_error_rate(*spaced).item()}
    found = {name: error_rate(predictions, references, units) for name, units in UNITS.items()}
    assert found == pytest.approx(want, rel=1e-6)
    scores = translation_scores(predictions, references, ("cer", "exact", "wer"))
    assert {name: scores[name] for name in UNITS} == found
    assert error_rate(["a", "b c d e"], ["x", "b c d e"], str.split) == 1 / 5


def test_rates_without_units() -> None:
    """Nothing was said: each word that was heard is one too many."""
    assert error_rate([], [], str.split) == 0
    assert error_rate(["", "a b"], ["", " "], str.split) == 2
    assert error_rate([" a  b "], ["a b"], characters) == 0
