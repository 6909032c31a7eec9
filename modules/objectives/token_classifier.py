"""Classification of words, such as names of persons and places or parts of speech."""

from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from trunkline import TrunklineError
from trunkline.contract import IGNORE, Loss, TaggedBatch
from trunkline.modules.metrics.entities import EntityF1
from trunkline.modules.networks import TextHeadConfig
from trunkline.modules.objectives.checks import check_loss_options, facts_of
from trunkline.modules.objectives.text_task import TextTask


class TokenClassifier(TextTask):
    """Cross-entropy of one tag per word.

    Logged in evaluation: `loss` and `acc` over words, and `f1`. If the data's tags begin with `B-` and `I-`, `f1` is
    that of whole entities as CoNLL counts them (borders and type must be right), else the mean of the tags' F1 scores.

    Args:
        network: shape of body and output; `pool` must be `none`.
        label_smoothing: share of the target spread evenly over all tags (arXiv:1512.00567).
        **shared: see `TrunklineModule`; weights may also be those of `MaskedLM` or `CausalLM`.
    """

    shown: ClassVar[tuple[str, ...]] = ("f1",)

    def __init__(self, network: TextHeadConfig, *, label_smoothing: float = 0.0, **shared: Any) -> None:
        super().__init__(**shared)
        check_loss_options(label_smoothing)
        config = self.configured(TextHeadConfig, network)
        self.keep_hyperparameters(network=config, label_smoothing=label_smoothing)
        if config.num_outputs < 2 or config.pool != "none":
            raise TrunklineError(
                f"tagging needs network.num_outputs of 2 or more, not {config.num_outputs}, and network.pool none, not "
                f"{config.pool}",
                field="model.network",
            )
        self.label_smoothing = label_smoothing
        self.tags: list[str] = []
        """Names of the tags; empty unless they mark entities."""
        self.make_network(config)

    def loss(self, batch: TaggedBatch) -> Loss:
        """The loss over the words."""
        targets = batch["targets"].flatten()
        logits = self.outputs(batch).flatten(0, 1)  # (B T, K)
        total = F.cross_entropy(logits, targets, reduction="sum", label_smoothing=self.label_smoothing)
        return Loss(total, (targets != IGNORE).sum())

    def make_metrics(self) -> dict[str, Metric]:
        return {
            "loss": MeanMetric(),
            "acc": MulticlassAccuracy(self.num_classes, average="micro"),
            "f1": MulticlassF1Score(self.num_classes, average="macro"),
            "entity_f1": EntityF1(),
        }

    def logged(self, metrics: Any) -> dict[str, Metric]:
        f1 = metrics["entity_f1" if self.tags else "f1"]
        return {"loss": metrics["loss"], "acc": metrics["acc"], "f1": f1}

    def start_evaluation(self) -> None:
        names = facts_of(self.trainer).class_names or []
        self.tags = names if any(name.startswith(("B-", "I-")) for name in names) else []

    def evaluate(self, batch: TaggedBatch, metrics: Any) -> dict[str, Tensor]:
        """Returns `label` and `prediction` (N,) of the words in the valid sentences."""
        valid = batch["valid"]
        logits, targets = self.outputs(batch)[valid], batch["targets"][valid]
        counted, best = targets != IGNORE, logits.argmax(dim=-1)
        words, labels = logits[counted], targets[counted]  # (N, K), (N,)
        metrics["loss"].update(F.cross_entropy(words, labels, reduction="none"))
        metrics["acc"].update(words, labels)
        if self.tags:
            for row, own, tag in zip(counted, best, targets, strict=True):
                names = [[self.tags[i] for i in tags[row].tolist()] for tags in (own, tag)]
                metrics["entity_f1"].update(*names)
        else:
            metrics["f1"].update(words, labels)
        return {"label": labels, "prediction": words.argmax(dim=-1)}

    def predict_step(self, batch: TaggedBatch, batch_idx: int) -> dict[str, Tensor]:
        """`index` of the sentence, `prediction` and its `probability`, each (N,), for the words of valid sentences."""
        words = (batch["targets"] != IGNORE) & batch["valid"][:, None]
        probability, prediction = self.outputs(batch)[words].softmax(dim=-1).max(dim=-1)
        index = batch["index"][:, None].expand_as(words)[words]
        return {"index": index, "prediction": prediction, "probability": probability}
