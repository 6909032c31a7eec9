"""Extractive question answering: find where the answer begins and ends in a text."""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import MeanMetric, Metric

from trunkline import TrunklineError
from trunkline.contract import Loss, WindowBatch
from trunkline.modules.metrics.squad import WindowAnswer, best_spans, merge_windows, squad_scores
from trunkline.modules.networks import TextHeadConfig
from trunkline.modules.objectives.checks import facts_of
from trunkline.modules.objectives.text_task import TextTask
from trunkline.modules.training.distributed import gather_lists


class QuestionAnswering(TextTask):
    """Cross-entropy of the first and of the last token of an answer, as in BERT for SQuAD (arXiv:1606.05250).

    Logged in evaluation: `loss` over windows; `exact` and `f1` over questions, from 0 to 1, counted as by SQuAD's own
    script. If some questions of the split have no answer (SQuAD 2.0, arXiv:1806.03822), "no answer" is predicted
    where it scores higher than every answer.

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
        self.found: list[WindowAnswer] = []
        """Likeliest answers of the windows evaluated so far."""
        self.make_network(config)

    def loss(self, batch: WindowBatch) -> Loss:
        """The loss over the windows."""
        losses = self.window_losses(self.outputs(batch), batch)
        return Loss(losses.sum(), len(losses))

    def window_losses(self, outputs: Tensor, batch: WindowBatch) -> Tensor:
        """Mean of the cross-entropies of first and last token (B,); padding cannot be an answer."""
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

    def likeliest(self, outputs: Tensor, batch: WindowBatch) -> list[WindowAnswer]:
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
        return [WindowAnswer(*values) for values in zip(*lists, strict=True)]

    def predict_step(self, batch: WindowBatch, batch_idx: int) -> list[WindowAnswer]:
        """The likeliest answer of each valid window; `merge_windows` takes them."""
        return self.likeliest(self.outputs(batch), batch)

    def finish_evaluation(self, stage: str, metrics: Any) -> dict[str, Any]:
        found = gather_lists(self.found, self.trainer.world_size)
        if stage not in facts_of(self.trainer).questions:
            raise TrunklineError(
                "answers are compared with the data's questions, which it does not tell; use SquadData"
            )
        questions = facts_of(self.trainer).questions[stage]
        unanswerable = any(not question.answers for question in questions)
        answers = [
            ("" if best is None else questions[n].context[best.start : best.end], questions[n].answers)
            for n, best in merge_windows(found, unanswerable).items()
        ]
        return squad_scores(answers)
