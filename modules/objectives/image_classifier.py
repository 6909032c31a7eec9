"""Image classification."""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from timm.data.mixup import Mixup
from torch import Tensor
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassAccuracy

from trunkline import TrunklineError
from trunkline.modules.networks import ViT, ViTConfig
from trunkline.modules.objectives.base import TrunklineModule, as_config, check_loss_options
from trunkline.modules.training.optim import OptimizerConfig


class ImageClassifier(TrunklineModule):
    """Cross-entropy on images with one label each.

    Batches: `image` (B, C, height, width) float and `label` (B,) class numbers; in evaluation also
    `valid` (B,), False where a sample is not to be counted.

    Args:
        network: shape of the ViT.
        optimizer: how it learns.
        label_smoothing: share of the target spread evenly over all classes (arXiv:1512.00567).
        mixup: alpha of mixup (arXiv:1710.09412); 0 is off.
        cutmix: alpha of CutMix (arXiv:1905.04899); 0 is off. With both, each batch takes one of them.
        mix_prob: probability that a batch is mixed at all.
        init_from: see `TrunklineModule.prepare_network`; learned positions are interpolated to `image_size`.
        freeze_blocks: see there.
        seed: see `TrunklineModule`.
    """

    network: ViT
    unit = "images"
    counted: ClassVar[dict[str, str]] = {"skipped": "skipped_images"}

    def __init__(
        self,
        network: ViTConfig | None = None,
        optimizer: OptimizerConfig | None = None,
        label_smoothing: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        mix_prob: float = 1.0,
        init_from: str | None = None,
        freeze_blocks: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(optimizer, seed)
        config = as_config(ViTConfig, network)
        self.keep_hyperparameters(
            network=config,
            optimizer=self.optimizer_config,
            label_smoothing=label_smoothing,
            mixup=mixup,
            cutmix=cutmix,
            mix_prob=mix_prob,
            init_from=init_from,
            freeze_blocks=freeze_blocks,
            seed=seed,
        )
        check_loss_options(label_smoothing)
        if config.num_classes < 2:
            raise TrunklineError(f"classification needs at least 2 classes, not num_classes={config.num_classes}")
        self.network = ViT(config)
        self.prepare_network(init_from, freeze_blocks)
        self.label_smoothing = label_smoothing
        self.mix = Mixup(mixup, cutmix, prob=mix_prob, label_smoothing=0.0, num_classes=config.num_classes)
        self.metrics = torch.nn.ModuleDict({stage: self._make_metrics() for stage in ("val", "test")})

    def _make_metrics(self) -> torch.nn.ModuleDict:
        classes = self.network.config.num_classes
        metrics: dict[str, Metric] = {"loss": MeanMetric(), "acc": MulticlassAccuracy(classes, average="micro")}
        if classes > 5:
            metrics["acc_top5"] = MulticlassAccuracy(classes, top_k=5, average="micro")
        return torch.nn.ModuleDict(metrics)

    def setup(self, stage: str) -> None:
        """Compare the network with the data before the first step.

        Raises:
            TrunklineError: if the data has another number of classes.
        """
        names = getattr(getattr(self.trainer, "datamodule", None), "class_names", None)
        if names and len(names) != self.network.config.num_classes:
            raise TrunklineError(
                f"the data has {len(names)} classes ({', '.join(names[:3])}, …), but the network has "
                f"{self.network.config.num_classes} outputs; set --model.network.num_classes {len(names)}"
            )

    @property
    def num_classes(self) -> int:
        """K."""
        return self.network.config.num_classes

    def features(self, batch: dict[str, Tensor]) -> Tensor:
        """(B, D) pooled features of `image`, as the output layer reads them."""
        return self.network.forward_head(self.network.forward_features(batch["image"]), pre_logits=True)

    def forward(self, image: Tensor) -> Tensor:
        """(B, C, height, width) -> (B, num_classes) logits."""
        return self.network(image)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Loss on one batch, mixed if so configured."""
        image, target = batch["image"], batch["label"]
        if self.mix.mixup_alpha or self.mix.cutmix_alpha:
            if len(image) % 2:
                raise TrunklineError(
                    f"mixup and CutMix pair images: {len(image)} a process is odd; set --data.batch_size"
                )
            image, target = self.mix(image.clone(), target)  # (B, num_classes) soft targets
        loss = F.cross_entropy(self.network(image), target, label_smoothing=self.label_smoothing)
        self.log("train/loss", loss, prog_bar=True)
        self.count(batch, "train")
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Count one batch towards `val/loss`, `val/acc` and `val/acc_top5`; returns it for callbacks."""
        return self._evaluate(batch, "val")

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Count one batch towards `test/loss`, `test/acc` and `test/acc_top5`."""
        self._evaluate(batch, "test")

    def _evaluate(self, batch: dict[str, Tensor], stage: str) -> dict[str, Tensor]:
        valid = batch["valid"]
        logits, label = self.network(batch["image"])[valid].float(), batch["label"][valid]
        metrics: Any = self.metrics[stage]
        metrics["loss"].update(F.cross_entropy(logits, label, reduction="none"))
        for name in metrics.keys() - {"loss"}:
            metrics[name].update(logits, label)
        for name, metric in metrics.items():
            self.log(f"{stage}/{name}", metric, prog_bar=name == "acc")
        self.count(batch, stage)
        return {"image": batch["image"][valid], "label": label, "prediction": logits.argmax(dim=-1)}

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """`index` (B,) and `probability` (B, num_classes) of the valid samples."""
        valid = batch["valid"]
        return {
            "index": batch["index"][valid],
            "probability": self.network(batch["image"])[valid].float().softmax(dim=-1),
        }

    def flops_per_batch(self, batch: dict[str, Tensor]) -> int:
        """Floating-point operations of a training step on this batch."""
        return self.network_flops(batch["image"])
