"""Classification of texts and of pairs of texts."""

from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from trunkline import TrunklineError
from trunkline.contract import Loss, TextBatch
from trunkline.modules.networks import TextHeadConfig
from trunkline.modules.objectives.checks import check_loss_options
from trunkline.modules.objectives.text_task import TextTask


class TextClassifier(TextTask):
    """Cross-entropy on texts, or pairs of texts, with one label each.

    Logged in evaluation: `loss`, `acc`, and `f1`, the mean of the classes' F1 scores.

    Args:
        network: shape of body and output.
        label_smoothing: share of the target spread evenly over all classes (arXiv:1512.00567).
        **shared: see `TrunklineModule`; weights may also be those of `MaskedLM` or `CausalLM`.
    """

    shown: ClassVar[tuple[str, ...]] = ("acc",)

    def __init__(self, network: TextHeadConfig, *, label_smoothing: float = 0.0, **shared: Any) -> None:
        super().__init__(**shared)
        check_loss_options(label_smoothing)
        config = self.configured(TextHeadConfig, network)
        self.keep_hyperparameters(network=config, label_smoothing=label_smoothing)
        if config.num_outputs < 2 or config.pool == "none":
            raise TrunklineError(
                f"classification of texts needs network.num_outputs of 2 or more, not {config.num_outputs}, and a "
                f"network.pool of cls, mean or last, not {config.pool}",
                field="model.network",
            )
        self.label_smoothing = label_smoothing
        self.make_network(config)

    def loss(self, batch: TextBatch) -> Loss:
        """The loss over the texts."""
        outputs, label = self.outputs(batch), batch["label"]
        total = F.cross_entropy(outputs, label, reduction="sum", label_smoothing=self.label_smoothing)
        return Loss(total, len(label))

    def make_metrics(self) -> dict[str, Metric]:
        return {
            "loss": MeanMetric(),
            "acc": MulticlassAccuracy(self.num_classes, average="micro"),
            "f1": MulticlassF1Score(self.num_classes, average="macro"),
        }

    def evaluate(self, batch: TextBatch, metrics: Any) -> dict[str, Tensor]:
        """Returns the valid texts with `label` and `prediction` (B,)."""
        valid = batch["valid"]
        logits, label = self.outputs(batch)[valid], batch["label"][valid]
        metrics["loss"].update(F.cross_entropy(logits, label, reduction="none"))
        for name in ("acc", "f1"):
            metrics[name].update(logits, label)
        inputs: Any = {name: batch[name][valid] for name in ("tokens", "segment", "mask") if name in batch}
        return {**inputs, "label": label, "prediction": logits.argmax(dim=-1)}

    def predict_step(self, batch: TextBatch, batch_idx: int) -> dict[str, Tensor]:
        """`index` (B,) and `probability` (B, K) of the valid samples."""
        valid = batch["valid"]
        return {"index": batch["index"][valid], "probability": self.outputs(batch)[valid].softmax(dim=-1)}
