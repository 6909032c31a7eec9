"""A user's own task, which the package does not know: tell which figure the points of a cloud show."""

from dataclasses import dataclass, field
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassAccuracy

from trunkline.contract import DataFacts, Loss
from trunkline.datamodules.base import TrunklineDataModule
from trunkline.datamodules.samplers import SampleKey
from trunkline.modules.backbone import Transformer, TransformerConfig
from trunkline.modules.callbacks.drawing import tensorboard
from trunkline.modules.networks import Network
from trunkline.modules.objectives.base import TrunklineModule

FIGURES = ("circle", "line", "cross")


@dataclass
class CloudConfig:
    num_classes: int = 2  # a recipe leaves it out, because the data knows it
    backbone: TransformerConfig = field(default_factory=lambda: TransformerConfig(dim=32, depth=2, num_heads=2))


class CloudNet(Network):
    """(B, N, 2) points -> (B, num_classes) logits, which do not depend on the order of the points."""

    config_class = CloudConfig

    def __init__(self, config: CloudConfig, trunk: Transformer | None = None) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Linear(2, config.backbone.dim)
        self.backbone = trunk or Transformer(config.backbone)
        self.head = nn.Linear(config.backbone.dim, config.num_classes)

    def forward(self, points: Tensor) -> Tensor:
        return self.head(self.backbone(self.embed(points)).x.mean(dim=1))


class CloudClassifier(TrunklineModule):
    network_class = CloudNet
    unit = "clouds"

    def __init__(self, network: CloudConfig | None = None, **shared: Any) -> None:
        super().__init__(**shared)
        config = self.configured(CloudConfig, network)
        self.keep_hyperparameters(network=config)
        self.network = CloudNet(config)
        self.start()

    def loss(self, batch: dict[str, Tensor]) -> Loss:
        return Loss(
            F.cross_entropy(self.network(batch["points"]), batch["label"], reduction="sum"), len(batch["label"])
        )

    def make_metrics(self) -> dict[str, Metric]:
        classes = self.network.config.num_classes
        return {"loss": MeanMetric(), "acc": MulticlassAccuracy(classes, average="micro")}

    def evaluate(self, batch: dict[str, Tensor], metrics: Any) -> dict[str, Tensor]:
        logits, label = self.network(batch["points"])[batch["valid"]], batch["label"][batch["valid"]]
        metrics["loss"].update(F.cross_entropy(logits, label, reduction="none"))
        metrics["acc"].update(logits, label)
        return {"points": batch["points"][batch["valid"]], "prediction": logits.argmax(dim=1)}


class CloudRows(Dataset[dict[str, Any]]):
    def __init__(self, first: int, count: int, seed: int) -> None:
        self.first, self.count, self.seed = first, count, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, key: SampleKey) -> dict[str, Any]:
        draw, label = np.random.default_rng((self.seed, self.first + key.index)), key.index % len(FIGURES)
        t, zero = draw.uniform(-1, 1, 24), np.zeros(24)
        circle, line = np.stack([np.cos(np.pi * t), np.sin(np.pi * t)], 1), np.stack([t, t], 1)
        cross = np.concatenate([np.stack([t, zero], 1)[:12], np.stack([zero, t], 1)[12:]])
        points = (circle, line, cross)[label] + draw.normal(0, 0.05, (24, 2))
        place = {"index": key.index, "valid": key.valid}
        return {"points": torch.tensor(points, dtype=torch.float32), "label": label, **place}


@dataclass(kw_only=True, eq=False, repr=False)
class CloudData(TrunklineDataModule):
    rows: int = 600

    @property
    def facts(self) -> DataFacts:
        return DataFacts(class_names=list(FIGURES))

    def setup(self, stage: str) -> None:
        self.datasets = {"train": CloudRows(0, self.rows, self.seed), "val": CloudRows(self.rows, 90, self.seed)}


class CloudPictures(Callback):
    """After each validation, draws the first clouds of the last batch with their predictions (`val/clouds`)."""

    def on_validation_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, *rest: Any) -> None:
        self.seen = outputs

    def on_validation_epoch_end(self, trainer: L.Trainer, module: Any) -> None:
        figure = Figure(figsize=(8, 2))
        for axes, points, named in zip(
            figure.subplots(1, 4), self.seen["points"], self.seen["prediction"], strict=False
        ):
            axes.scatter(*points.T.tolist(), s=4)
            axes.set_title(FIGURES[int(named)])
        if (writer := tensorboard(trainer)) is not None and not trainer.sanity_checking:
            writer.add_figure("val/clouds", figure, trainer.global_step)
