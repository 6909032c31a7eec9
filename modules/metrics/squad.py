"""Answers to questions: the likeliest spans of a text, the best one of several windows, and SQuAD's scores of them.

Shape legend: B windows of texts, T tokens of a window.
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
    """The likeliest answer in a window of a question's text."""

    question: int
    """Number of the question."""
    score: float
    """Sum of the logits of its first and last token."""
    null_score: float
    """The same sum for there being no answer in this window."""
    start: int
    """First character in the whole text."""
    end: int
    """The character after the last."""


def best_spans(start: Tensor, end: Tensor, context: Tensor, longest: int) -> tuple[Tensor, Tensor, Tensor]:
    """The likeliest valid span of each row: within the text, not ending before it starts, not too long.

    Args:
        start: (B, T) logits of the first token.
        end: (B, T) logits of the last token.
        context: (B, T) bool, True for tokens of the text, in which both must lie.
        longest: most tokens of a span.

    Returns:
        Three tensors (B,): sums of both logits, first tokens and last tokens.
    """
    first = start.masked_fill(~context, -torch.inf)
    last = F.pad(end.masked_fill(~context, -torch.inf), (0, longest - 1), value=-torch.inf)
    sums = first[..., None] + last.unfold(1, longest, 1)  # (B, T, longest)
    score, place = sums.flatten(1).max(dim=1)
    begin = place // longest
    return score, begin, begin + place % longest


def merge_windows(windows: Iterable[WindowAnswer], unanswerable: bool) -> dict[int, WindowAnswer | None]:
    """The likeliest answer to each question among its windows, in the order of the questions' numbers.

    Args:
        windows: of all questions, in any order.
        unanswerable: whether a question may have no answer (SQuAD 2.0). Then it is given None if "no answer" scores
            higher than the best answer, even in the window where it scores lowest.
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
    """Exact match and F1 over questions, as SQuAD's own script counts them, from 0 to 1.

    Args:
        answers: (given answer, all right ones) for each question. The empty answer means that there is none; it is
            right where no right one is listed.

    Returns:
        `exact` and `f1`; empty without questions.
    """
    metric = SQuAD()
    metric.set_dtype(torch.float64)  # in float32 a sum over many questions is too coarse
    for answer, golds in answers:
        metric.update(*torchmetrics_format(answer, worthwhile(golds)))
    if not metric.total:
        return {}
    # `compute` would give percentages.
    return {"exact": (metric.exact_match / metric.total).item(), "f1": (metric.f1_score / metric.total).item()}


def worthwhile(golds: Sequence[str]) -> list[str]:
    """Right answers that are more than articles and punctuation; without any, the empty one.

    torchmetrics has the script of SQuAD 1.1, in which each question has an answer. This is what that of SQuAD 2.0
    (arXiv:1806.03822) does before.
    """
    return [gold for gold in golds if not squad(*torchmetrics_format("", [gold]))["exact_match"]] or [""]


def torchmetrics_format(answer: str, golds: list[str]) -> tuple[dict[str, str], dict[str, Any]]:
    """One question as torchmetrics wants it."""
    return {"id": "", "prediction_text": answer}, {"id": "", "answers": {"text": golds}}
