"""Extractive question answering: where in a text the answer begins and ends."""

import re
import string
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import MeanMetric, Metric

from trunkline import TrunklineError
from trunkline.contract import Loss, WindowBatch
from trunkline.modules.networks import TextHeadConfig
from trunkline.modules.objectives.checks import facts_of
from trunkline.modules.objectives.text_task import TextTask

ARTICLES, PUNCTUATION = re.compile(r"\b(a|an|the)\b"), str.maketrans("", "", string.punctuation)


class Found(NamedTuple):
    """The likeliest answer of a window."""

    question: int
    score: float
    """Sum of the logits of its first and last token."""
    null_score: float
    """The same of there being no answer."""
    start: int
    """First character in the context."""
    end: int
    """The character after the last."""


class QuestionAnswering(TextTask):
    """Cross-entropy of the first and of the last token of an answer, as in BERT for SQuAD (arXiv:1606.05250).

    Logged in evaluation: `loss` over windows; `exact` and `f1` over questions, shares from 0 to 1 as SQuAD's own
    script counts them. Where any question has no answer (SQuAD 2.0, arXiv:1806.03822), no answer is
    predicted if it scores higher than each answer.

    Args:
        network: shape of body and output; `pool` must be `none` and `num_outputs` 2.
        max_answer_length: longest answer that is predicted, in tokens.
        **shared: see `TrunklineModule`; weights may also be those of `MaskedLM` or `CausalLM`.
    """

    shown: ClassVar[tuple[str, ...]] = ("exact", "f1")

    def __init__(self, network: TextHeadConfig, *, max_answer_length: int = 30, **shared: Any) -> None:
        super().__init__(**shared)
        config = self.configured(TextHeadConfig, network)
        self.keep_hyperparameters(network=config, max_answer_length=max_answer_length)
        if config.num_outputs != 2 or config.pool != "none":
            raise TrunklineError(
                f"question answering needs network.num_outputs 2, not {config.num_outputs}, and network.pool none, not "
                f"{config.pool}",
                field="model.network",
            )
        if max_answer_length < 1:
            raise TrunklineError(
                f"max_answer_length must be at least 1, not {max_answer_length}", field="model.max_answer_length"
            )
        self.max_answer_length = max_answer_length
        self.found: list[Found] = []
        """Likeliest answers of the evaluation so far."""
        self.make_network(config)

    def loss(self, batch: WindowBatch) -> Loss:
        """Over the windows."""
        losses = self.window_losses(self.outputs(batch), batch)
        return Loss(losses.sum(), len(losses))

    def window_losses(self, outputs: Tensor, batch: WindowBatch) -> Tensor:
        """(B,) mean of both cross-entropies; padding is nobody's answer."""
        logits = outputs.masked_fill(~batch["mask"][..., None], -torch.inf)  # (B, T, 2)
        first = F.cross_entropy(logits[..., 0], batch["start"], reduction="none")
        last = F.cross_entropy(logits[..., 1], batch["end"], reduction="none")
        return (first + last) / 2

    def make_metrics(self) -> dict[str, Metric]:
        return {"loss": MeanMetric()}

    def start_evaluation(self) -> None:
        self.found = []

    def evaluate(self, batch: WindowBatch, metrics: Any) -> None:
        outputs = self.outputs(batch)
        metrics["loss"].update(self.window_losses(outputs, batch)[batch["valid"]])
        self.found += self.likeliest(outputs, batch)

    def likeliest(self, outputs: Tensor, batch: WindowBatch) -> list[Found]:
        """The likeliest answer of each valid window."""
        start, end = outputs.unbind(dim=-1)
        score, first, last = best_spans(start, end, batch["context"], self.max_answer_length)
        row = torch.arange(len(start), device=start.device)
        null, offsets = batch["null"], batch["offsets"]
        columns = (
            batch["question"],
            score,
            start[row, null] + end[row, null],
            offsets[row, first, 0],
            offsets[row, last, 1],
        )
        lists = [column[batch["valid"]].tolist() for column in columns]
        return [Found(*values) for values in zip(*lists, strict=True)]

    def predict_step(self, batch: WindowBatch, batch_idx: int) -> list[Found]:
        """The likeliest answer of each window; see `merge`."""
        return self.likeliest(self.outputs(batch), batch)

    def finish_evaluation(self, stage: str, metrics: Any) -> dict[str, Any]:
        found = self.found
        if self.trainer.world_size > 1:
            parts: list[Any] = [None] * self.trainer.world_size
            torch.distributed.all_gather_object(parts, found)
            found = [window for part in parts for window in part]
        questions = facts_of(self.trainer).questions[stage]
        unanswerable = any(not question.answers for question in questions)
        scores = []
        for number, best in merge(found, unanswerable).items():
            question = questions[number]
            text = "" if best is None else question.context[best.start : best.end]
            scores.append((exact_match(text, question.answers), f1_score(text, question.answers)))
        exact, f1 = (sum(column) / len(column) for column in zip(*scores, strict=True))
        return {"exact": exact, "f1": f1}


def best_spans(start: Tensor, end: Tensor, context: Tensor, longest: int) -> tuple[Tensor, Tensor, Tensor]:
    """The likeliest valid span of each row: within the context, not ending before it starts, not too long.

    Args:
        start: (B, T) logits of the first token.
        end: (B, T) logits of the last token.
        context: (B, T) bool, where both may lie.
        longest: tokens of a span at most.

    Returns:
        (B,) sums of logits, first tokens and last tokens.
    """
    first = start.masked_fill(~context, -torch.inf)
    last = F.pad(end.masked_fill(~context, -torch.inf), (0, longest - 1), value=-torch.inf)
    sums = first[..., None] + last.unfold(1, longest, 1)  # (B, T, longest)
    score, place = sums.flatten(1).max(dim=1)
    begin = place // longest
    return score, begin, begin + place % longest


def merge(found: Sequence[Found], unanswerable: bool) -> dict[int, Found | None]:
    """The likeliest answer of each question among its windows, in the order of questions.

    Args:
        found: of all windows.
        unanswerable: whether None is a possible answer: if in each window it scores higher than the best answer.
    """
    windows: dict[int, list[Found]] = defaultdict(list)
    for window in found:
        windows[window.question].append(window)
    merged: dict[int, Found | None] = {}
    for question, own in sorted(windows.items()):
        best = max(own, key=lambda window: (window.score, -window.start))
        null = min(window.null_score for window in own)
        merged[question] = None if unanswerable and null > best.score else best
    return merged


def normalize(answer: str) -> str:
    """Lower case, without punctuation, articles and extra spaces: as SQuAD's own script."""
    return " ".join(ARTICLES.sub(" ", answer.lower().translate(PUNCTUATION)).split())


def exact_match(answer: str, golds: Sequence[str]) -> float:
    """1 if the answer is one of the right ones; without any, the empty one is."""
    return float(any(normalize(answer) == normalize(gold) for gold in worthwhile(golds)))


def f1_score(answer: str, golds: Sequence[str]) -> float:
    """F1 of the words that an answer shares with a right one; the highest of all right ones."""
    return max(word_f1(normalize(answer).split(), normalize(gold).split()) for gold in worthwhile(golds))


def worthwhile(golds: Sequence[str]) -> list[str]:
    """Those with something left after `normalize`, or the empty answer."""
    return [gold for gold in golds if normalize(gold)] or [""]


def word_f1(words: list[str], gold: list[str]) -> float:
    """F1 of two bags of words; of an empty one, whether both are."""
    if not words or not gold:
        return float(words == gold)
    same = sum((Counter(words) & Counter(gold)).values())
    return 2 * same / (len(words) + len(gold))
