"""Image classification."""

from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassAccuracy

from trunkline import TrunklineError
from trunkline.contract import ImageBatch, Loss
from trunkline.modules.networks import ViT, ViTConfig
from trunkline.modules.objectives.base import TrunklineModule
from trunkline.modules.objectives.checks import check_loss_options
from trunkline.ranges import check_ranges


class ImageClassifier(TrunklineModule):
    """Cross-entropy on images with one label each.

    Logged in evaluation: `loss`, `acc`, and with more than five classes `acc_top5`.

    Args:
        network: shape of the ViT. Learned positions of trained weights are interpolated to its `image_size`.
        label_smoothing: share of the target spread evenly over all classes (arXiv:1512.00567).
        mixup: alpha of mixup (arXiv:1710.09412); 0 is off.
        cutmix: alpha of CutMix (arXiv:1905.04899); 0 is off. If both are on, each batch uses one of them.
        mix_prob: probability that a batch is mixed at all.
        **shared: see `TrunklineModule`.
    """

    network: ViT
    network_class = ViT
    unit = "images"
    counted: ClassVar[dict[str, str]] = {"skipped": "skipped_images"}
    shown: ClassVar[tuple[str, ...]] = ("acc",)

    def __init__(
        self,
        network: ViTConfig | None = None,
        *,
        label_smoothing: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        mix_prob: float = 1.0,
        **shared: Any,
    ) -> None:
        super().__init__(**shared)
        check_loss_options(label_smoothing)
        mixing = {"mixup": mixup, "cutmix": cutmix, "mix_prob": mix_prob}
        check_ranges("model", mixing, mixup="[0, inf)", cutmix="[0, inf)", mix_prob="[0, 1]")
        config = self.configured(ViTConfig, network)
        self.keep_hyperparameters(
            network=config, label_smoothing=label_smoothing, mixup=mixup, cutmix=cutmix, mix_prob=mix_prob
        )
        if config.num_classes < 2:
            raise TrunklineError(
                f"classification needs at least 2 classes, not num_classes={config.num_classes}",
                field="model.network.num_classes",
            )
        self.label_smoothing = label_smoothing
        self.mix: Any = None
        if mixup or cutmix:
            from timm.data.mixup import Mixup  # importing timm takes half a second

            self.mix = Mixup(mixup, cutmix, prob=mix_prob, label_smoothing=0.0, num_classes=config.num_classes)
        self.network = ViT(config)
        self.start()

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return self.network.config.num_classes

    def features(self, batch: ImageBatch) -> Tensor:
        """Pooled features (B, D) of the images: the input of the output layer."""
        return self.network.forward_head(self.network.forward_features(batch["image"]), pre_logits=True)

    def forward(self, image: Tensor) -> Tensor:
        """(B, C, height, width) -> (B, num_classes) logits."""
        return self.network(image)

    def loss(self, batch: ImageBatch) -> Loss:
        """The loss over the images, which are mixed first if the options say so.

        Raises:
            TrunklineError: if images are mixed in pairs and their number is odd.
        """
        image, target = batch["image"], batch["label"]
        if self.mix is not None:
            if len(image) % 2:
                raise TrunklineError(
                    f"mixup and CutMix pair images, but {len(image)} images per process is an odd number; set "
                    "batch_size to an even number per process",
                    field="data.batch_size",
                )
            image, target = self.mix(image.clone(), target)  # (B, num_classes) soft targets
        logits = self.network(image)
        return Loss(F.cross_entropy(logits, target, reduction="sum", label_smoothing=self.label_smoothing), len(image))

    def make_metrics(self) -> dict[str, Metric]:
        metrics: dict[str, Metric] = {
            "loss": MeanMetric(),
            "acc": MulticlassAccuracy(self.num_classes, average="micro"),
        }
        if self.num_classes > 5:
            metrics["acc_top5"] = MulticlassAccuracy(self.num_classes, top_k=5, average="micro")
        return metrics

    def evaluate(self, batch: ImageBatch, metrics: Any) -> dict[str, Tensor]:
        """Returns the valid images with `label` and `prediction` (B,)."""
        valid = batch["valid"]
        logits, label = self.network(batch["image"])[valid].float(), batch["label"][valid]
        metrics["loss"].update(F.cross_entropy(logits, label, reduction="none"))
        for name in metrics.keys() - {"loss"}:
            metrics[name].update(logits, label)
        return {"image": batch["image"][valid], "label": label, "prediction": logits.argmax(dim=-1)}

    def predict_step(self, batch: ImageBatch, batch_idx: int) -> dict[str, Tensor]:
        """`index` (B,) and `probability` (B, num_classes) of the valid samples."""
        valid = batch["valid"]
        return {
            "index": batch["index"][valid],
            "probability": self.network(batch["image"])[valid].float().softmax(dim=-1),
        }

    def flops_per_batch(self, batch: ImageBatch) -> int:
        return self.network_flops(batch["image"])
