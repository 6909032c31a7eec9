"""Answers to questions: spans by brute force, windows merged, scores as the official script of SQuAD 2.0 has them."""

import random
import re
import string
from collections import Counter

import pytest
import torch

from trunkline.modules.metrics.squad import WindowAnswer, best_spans, merge_windows, squad_scores


@pytest.mark.parametrize("longest", [1, 3, 30])
def test_best_spans_by_brute_force(longest: int) -> None:
    start, end = torch.randn(6, 9), torch.randn(6, 9)
    context = torch.rand(6, 9) < 0.6
    context[:, 4] = True
    score, first, last = best_spans(start, end, context, longest)
    for row in range(6):
        spans = {
            (s, e): (start[row, s] + end[row, e]).item()
            for s in range(9)
            for e in range(s, min(s + longest, 9))
            if context[row, s] and context[row, e]
        }
        best = max(spans, key=lambda span: spans[span])
        assert (first[row].item(), last[row].item()) == best
        assert score[row].item() == spans[best]


@pytest.mark.parametrize(
    ("answer", "golds", "exact", "f1"),
    [
        ("The Cat!", ["cat"], 1, 1),
        ("a  cat,  sat", ["the cat sat"], 1, 1),
        ("cat sat", ["the cat"], 0, 2 / 3),
        ("big cat", ["dog", "a big black cat"], 0, 0.8),
        ("dog", ["cat"], 0, 0),
        ("cat cat", ["cat"], 0, 2 / 3),  # a word counts as often as it stands there
        ("U.S.", ["US"], 1, 1),
        ("", ["cat"], 0, 0),
        ("", [], 1, 1),
        ("cat", [], 0, 0),
        ("the", ["a"], 1, 1),
    ],
)
def test_scores(answer: str, golds: list[str], exact: float, f1: float) -> None:
    assert squad_scores([(answer, golds)]) == {"exact": exact, "f1": pytest.approx(f1)}


def official(answer: str, golds: list[str]) -> tuple[float, float]:
    """Exact match and F1 of one question, as evaluate-v2.0.py counts them."""

    def normalised(text: str) -> str:
        text = "".join(character for character in text.lower() if character not in string.punctuation)
        return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())

    def f1(given: list[str], gold: list[str]) -> float:
        if not given or not gold:
            return float(given == gold)
        same = sum((Counter(given) & Counter(gold)).values())
        precision, recall = same / len(given), same / len(gold)
        return 2 * precision * recall / (precision + recall) if same else 0.0

    answer = normalised(answer)
    golds = [gold for gold in map(normalised, golds) if gold] or [""]
    return max(float(answer == gold) for gold in golds), max(f1(answer.split(), gold.split()) for gold in golds)


def test_scores_are_those_of_the_official_script() -> None:
    """Articles, punctuation, abbreviations, questions without an answer, alone and all together."""
    words = ["the", "a", "An", "U.S.", "US", "cat", "cat,", "(dog)", "é", "1,000", "1000", "well-known", "-", "…", "ß"]
    draw = random.Random(0)

    def text() -> str:
        return " ".join(draw.choices(words, k=draw.choice([0, 0, 1, 1, 2, 3, 6])))

    questions = []
    for _ in range(500):
        golds = [text() for _ in range(draw.choice([0, 1, 1, 3]))]
        questions.append((draw.choice([text(), *golds]), golds))
    wanted = [official(*question) for question in questions]
    assert 50 < sum(exact for exact, _ in wanted) < 450
    for question, (exact, f1) in zip(questions, wanted, strict=True):
        assert squad_scores([question]) == {"exact": exact, "f1": pytest.approx(f1, rel=1e-6)}, question
    exact, f1 = (sum(column) / len(wanted) for column in zip(*wanted, strict=True))
    assert squad_scores(questions) == {"exact": exact, "f1": pytest.approx(f1, rel=1e-7)}


def test_no_question_has_no_score() -> None:
    assert squad_scores([]) == {}


def test_merge_windows() -> None:
    found = [
        WindowAnswer(3, 1.0, 0.5, 0, 4),
        WindowAnswer(1, 2.0, 1.0, 5, 9),
        WindowAnswer(3, 2.0, 3.0, 7, 8),
        WindowAnswer(1, 0.0, 2.5, 1, 2),
    ]
    assert merge_windows(found, unanswerable=False) == {1: found[1], 3: found[2]}
    assert merge_windows(found, unanswerable=True) == {1: found[1], 3: found[2]}  # some window thinks that there is one
    assert list(merge_windows(found, False)) == [1, 3]
    sure = [window._replace(null_score=window.score + 5) for window in found]
    assert merge_windows(sure, unanswerable=True) == {1: None, 3: None}
    assert merge_windows(sure, unanswerable=False) == {1: sure[1], 3: sure[2]}
