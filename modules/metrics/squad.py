"""Answers to questions: the likeliest span of each window, the best of several windows, and SQuAD's scores.

Shape legend: B windows, T tokens of a window.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.functional.text import squad
from torchmetrics.text import SQuAD


class WindowAnswer(NamedTuple):
    """The likeliest answer in one window of the text that belongs to a question."""

    question: int
    """Number of the question."""
    score: float
    """Sum of the logits of the answer's first and last token."""
    null_score: float
    """The same sum for "no answer in this window"."""
    start: int
    """The answer's first character in the whole text."""
    end: int
    """The character after the answer's last."""


def best_spans(start: Tensor, end: Tensor, context: Tensor, longest: int) -> tuple[Tensor, Tensor, Tensor]:
    """The likeliest valid span of each row: inside the text, with its end not before its start, not too long.

    Args:
        start: (B, T) logits of the first token.
        end: (B, T) logits of the last token.
        context: (B, T) bool, True for tokens of the text; first and last token must be among them.
        longest: largest number of tokens in a span.

    Returns:
        Three tensors (B,): sum of both logits, first token, last token.
    """
    first = start.masked_fill(~context, -torch.inf)
    last = F.pad(end.masked_fill(~context, -torch.inf), (0, longest - 1), value=-torch.inf)
    sums = first[..., None] + last.unfold(1, longest, 1)  # (B, T, longest)
    score, place = sums.flatten(1).max(dim=1)
    begin = place // longest
    return score, begin, begin + place % longest


def merge_windows(windows: Iterable[WindowAnswer], unanswerable: bool) -> dict[int, WindowAnswer | None]:
    """The likeliest answer to each question among its windows, sorted by the number of the question.

    Args:
        windows: windows of all questions, in any order.
        unanswerable: whether a question may have no answer (SQuAD 2.0). If so, the answer is None where in every window
            "no answer" scores higher than the question's best answer.
    """
    by_question: dict[int, list[WindowAnswer]] = defaultdict(list)
    for window in windows:
        by_question[window.question].append(window)
    merged: dict[int, WindowAnswer | None] = {}
    for question, own in sorted(by_question.items()):
        best = max(own, key=lambda window: (window.score, -window.start))
        null = min(window.null_score for window in own)
        merged[question] = None if unanswerable and null > best.score else best
    return merged


def squad_scores(answers: Iterable[tuple[str, Sequence[str]]]) -> dict[str, float]:
    """Exact match and F1 over questions, from 0 to 1, counted as by SQuAD's own script.

    Args:
        answers: (predicted answer, all right answers) for each question. An empty prediction means "no answer"; it is
            right if the list of right answers is empty.

    Returns:
        `exact` and `f1`; an empty dict if there are no questions.
    """
    metric = SQuAD()
    metric.set_dtype(torch.float64)  # in float32 a sum over many questions is too coarse
    for answer, golds in answers:
        metric.update(*torchmetrics_format(answer, worthwhile(golds)))
    if not metric.total:
        return {}
    # Not `metric.compute()`, which returns percentages.
    return {"exact": (metric.exact_match / metric.total).item(), "f1": (metric.f1_score / metric.total).item()}


def worthwhile(golds: Sequence[str]) -> list[str]:
    """The right answers that are more than articles and punctuation; the empty answer if none is left.

    torchmetrics implements the script of SQuAD 1.1, in which each question has an answer. The script of SQuAD 2.0
    (arXiv:1806.03822) also does this step.
    """
    return [gold for gold in golds if not squad(*torchmetrics_format("", [gold]))["exact_match"]] or [""]


def torchmetrics_format(answer: str, golds: list[str]) -> tuple[dict[str, str], dict[str, Any]]:
    """One question in the format of torchmetrics: prediction and target."""
    return {"id": "", "prediction_text": answer}, {"id": "", "answers": {"text": golds}}
