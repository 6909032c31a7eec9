"""Classification of sounds: one label a clip, or several."""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassAccuracy

from trunkline import TrunklineError
from trunkline.contract import AudioBatch, Loss
from trunkline.modules.metrics.sounds import MeanPrecision
from trunkline.modules.networks import ViT
from trunkline.modules.networks.ast import AST, ASTConfig
from trunkline.modules.networks.base import Network
from trunkline.modules.objectives.audio_task import AudioTask
from trunkline.modules.objectives.checks import check_loss_options, facts_of
from trunkline.modules.training.start_parts import announce
from trunkline.modules.training.warm_start import TrainedWeights, load_matching


class AudioClassifier(AudioTask):
    """Cross-entropy on sounds with one label each, or binary cross-entropy, averaged over the classes, with several.

    Where the data mixes clips, it gives the share of each class as the target.

    Logged in evaluation: `loss`; with one label `acc`, and with more than five classes `acc_top5`; with several labels
    `mAP`, the mean of the classes' average precisions (of those that occur in the split).

    Args:
        network: shape of the AST.
        multi_label: whether a clip can have several labels; None takes it from the data.
        label_smoothing: share of the target spread evenly over all classes (arXiv:1512.00567), with one label only.
        **shared: see `TrunklineModule`; weights may also be those of a ViT, such as an `ImageClassifier` has.
    """

    network: AST
    network_class = AST
    shown: ClassVar[tuple[str, ...]] = ("acc", "mAP")

    def __init__(
        self,
        network: ASTConfig | None = None,
        *,
        multi_label: bool | None = None,
        label_smoothing: float = 0.0,
        **shared: Any,
    ) -> None:
        super().__init__(**shared)
        check_loss_options(label_smoothing)
        config = self.configured(ASTConfig, network)
        self.multi_label = bool(self.beginning.facts.multi_label) if multi_label is None else multi_label
        self.keep_hyperparameters(network=config, multi_label=self.multi_label, label_smoothing=label_smoothing)
        least = 1 if self.multi_label else 2
        if config.num_classes < least:
            raise TrunklineError(
                f"classification needs at least {least} {'class' if least == 1 else 'classes'}, not "
                f"num_classes={config.num_classes}",
                field="model.network.num_classes",
            )
        if self.multi_label and label_smoothing:
            raise TrunklineError(
                "label_smoothing is for clips with one label; leave it out where a clip can have several",
                field="model.label_smoothing",
            )
        self.label_smoothing = label_smoothing
        self.network = AST(config)
        self.start()

    @property
    def num_classes(self) -> int:
        """Number of classes K."""
        return self.network.config.num_classes

    def accepted(self) -> tuple[type[Network], ...]:
        return (AST, ViT)

    def copy_weights(self, weights: TrainedWeights) -> None:
        source = weights.network()
        if isinstance(source, ViT):
            source = AST.from_images(source, self.network.config)
        announce(self.network, weights, load_matching(self.network, source, weights.name, weights.argument))

    def setup(self, stage: str) -> None:
        """Also check that the data has as many labels a clip as the objective expects.

        Raises:
            TrunklineError: if it has not.
        """
        super().setup(stage)
        several = facts_of(self.trainer).multi_label
        if several is not None and several != self.multi_label:
            have, expects = ("several labels", "one") if several else ("one label", "several")
            raise TrunklineError(
                f"the data's clips have {have}, but the objective expects {expects}; leave multi_label out, which then "
                "follows the data",
                field="model.multi_label",
            )

    def features(self, batch: AudioBatch) -> Tensor:
        """Pooled features (B, D) of the clips: the input of the output layer."""
        states = self.network.forward_features(batch["features"], batch.get("mask"))
        return self.network.forward_head(states, pre_logits=True)

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """Frames (B, T, M), mask (B, T) -> (B, K) logits."""
        return self.network(features, mask)

    def outputs(self, batch: AudioBatch) -> Tensor:
        """Logits (B, K) of a batch in float32 or wider."""
        logits = self.network(batch["features"], batch.get("mask"))
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def clip_losses(self, logits: Tensor, batch: AudioBatch, smoothing: float = 0.0) -> Tensor:
        """Loss of each clip (B,)."""
        target = batch["target"].to(logits.dtype) if "target" in batch else batch["label"]
        if self.multi_label:
            return F.binary_cross_entropy_with_logits(logits, target, reduction="none").mean(dim=1)
        return F.cross_entropy(logits, target, reduction="none", label_smoothing=smoothing)

    def loss(self, batch: AudioBatch) -> Loss:
        """The loss over the clips."""
        losses = self.clip_losses(self.outputs(batch), batch, self.label_smoothing)
        # Its sum is a tensor, because batches of like length have different numbers of clips in different processes.
        valid = batch.get("valid", torch.ones_like(losses, dtype=torch.bool))
        return Loss(losses.where(valid, 0.0).sum(), valid.sum())

    # --- evaluation

    def make_metrics(self) -> dict[str, Metric]:
        if self.multi_label:
            return {"loss": MeanMetric(), "mAP": MeanPrecision(self.num_classes)}
        metrics: dict[str, Metric] = {
            "loss": MeanMetric(),
            "acc": MulticlassAccuracy(self.num_classes, average="micro"),
        }
        if self.num_classes > 5:
            metrics["acc_top5"] = MulticlassAccuracy(self.num_classes, top_k=5, average="micro")
        return metrics

    def evaluate(self, batch: AudioBatch, metrics: Any) -> dict[str, Tensor]:
        """Returns, of the valid clips, `index`, `features`, `mask`, and what is right and what the network says.

        These are `label` and `prediction` (B,) with one label a clip, `target` and `probability` (B, K) with several.
        """
        valid, logits = batch["valid"], self.outputs(batch)
        metrics["loss"].update(self.clip_losses(logits, batch)[valid])
        shown: dict[str, Tensor] = {"index": batch["index"][valid], "features": batch["features"][valid]}
        if "mask" in batch:
            shown["mask"] = batch["mask"][valid]
        logits = logits[valid]
        name = "target" if self.multi_label else "label"
        right = batch[name][valid].long()  # type: ignore[literal-required]
        if len(logits) or self.multi_label:  # torchmetrics' accuracy fails on no rows, its precisions want some update
            for metric in metrics.keys() - {"loss"}:
                metrics[metric].update(logits, right)
        if self.multi_label:
            return {**shown, "target": right, "probability": logits.sigmoid()}
        return {**shown, "label": right, "prediction": logits.argmax(dim=1)}

    def predict_step(self, batch: AudioBatch, batch_idx: int) -> dict[str, Tensor]:
        """`index` (B,) and `probability` (B, K) of the valid clips; with several labels each is one of its own."""
        logits = self.outputs(batch)[batch["valid"]]
        probability = logits.sigmoid() if self.multi_label else logits.softmax(dim=1)
        return {"index": batch["index"][batch["valid"]], "probability": probability}

    def flops_per_batch(self, batch: AudioBatch) -> int:
        return self.network_flops(batch["features"], batch.get("mask"))
