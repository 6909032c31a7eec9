"""Tasks like `own_task`, each with one fault that `trunkline check` must find."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from own_task import CloudClassifier, CloudData
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from trunkline.contract import Loss
from trunkline.datamodules.samplers import SampleKey


class SumOfSums(CloudClassifier):
    """Its loss is not divided by the number of rows, so that it depends on how many processes share them."""

    def loss(self, batch: dict[str, Tensor]) -> Loss:
        return Loss(F.cross_entropy(self.network(batch["points"]), batch["label"], reduction="sum"), 1)


class Shifted(CloudClassifier):
    """Each batch adds a number to the loss, which has another name than usual; the gradients do not know of it."""

    def loss(self, batch: dict[str, Tensor]) -> Loss:
        found = super().loss(batch)
        return Loss(found.total + 1.0, found.count, name="cloud")


class Terms(CloudClassifier):
    """The loss has a second term, the number of points."""

    joint = True

    def loss(self, batch: dict[str, Tensor]) -> list[Loss]:  # type: ignore[override]
        return [super().loss(batch), Loss(batch["points"].square().sum(), len(batch["label"]), name="size")]


class ShiftedTerm(Terms):
    """Each batch adds a number to the second term."""

    def loss(self, batch: dict[str, Tensor]) -> list[Loss]:  # type: ignore[override]
        first, second = super().loss(batch)
        return [first, Loss(second.total + 1.0, second.count, name=second.name)]


class Untold(CloudClassifier):
    """It has a training step of its own, which tells nobody its terms."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        found = self.loss(batch)
        return found.total / found.count


class Unused(CloudClassifier):
    """With a layer that the loss does not use, and one whose output is multiplied by zero."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.network.spare = nn.Linear(3, 3)
        self.network.idle = nn.Linear(2, 1, bias=False)

    def loss(self, batch: dict[str, Tensor]) -> Loss:
        found = super().loss(batch)
        return Loss(found.total + 0 * self.network.idle(batch["points"]).sum(), found.count)


class Ungrouped(CloudClassifier):
    """With a parameter outside the network, which the optimiser does not get."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.temperature = nn.Parameter(torch.ones(()))

    def loss(self, batch: dict[str, Tensor]) -> Loss:
        logits = self.network(batch["points"]) * self.temperature
        return Loss(F.cross_entropy(logits, batch["label"], reduction="sum"), len(batch["label"]))


class Normed(CloudClassifier):
    """It normalises by the statistics of a batch, which are others in each process and each part."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.network.norm = nn.BatchNorm1d(2)

    def loss(self, batch: dict[str, Tensor]) -> Loss:
        return super().loss({**batch, "points": self.network.norm(batch["points"].mT).mT})


class Blind(CloudClassifier):
    """Its network sees nothing of the points."""

    def loss(self, batch: dict[str, Tensor]) -> Loss:
        return super().loss({**batch, "points": torch.zeros_like(batch["points"])})


class Motionless(CloudClassifier):
    """It wants to make its optimiser steps itself, and makes none."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.automatic_optimization = False


class Broken(CloudClassifier):
    """Its loss cannot be computed."""

    def loss(self, batch: dict[str, Tensor]) -> Loss:
        raise RuntimeError("no such head")


class ByNumber(Dataset[Any]):
    """A dataset whose rows are read by number, as an ordinary sampler does."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.rows[SampleKey(0, index)]


@dataclass(kw_only=True, eq=False, repr=False)
class AnyOrder(CloudData):
    """In an ordinary shuffled loader, which each process reads in full."""

    def train_dataloader(self) -> Any:
        return DataLoader(ByNumber(self.datasets["train"]), self.batch_size, shuffle=True, drop_last=True)


class Forgetful(Callback):
    """Changes the weights by a number that it counts, and does not save."""

    def __init__(self) -> None:
        self.count = 0

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.count += 1
        with torch.no_grad():
            pl_module.network.head.bias.add_(1e-3 * self.count)


class ForgetfulOfEpochs(Forgetful):
    """It changes them only between two epochs."""

    def on_train_batch_end(self, *_: Any) -> None:
        self.count += 1

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_batch_end(trainer, pl_module)


def own_config(model: str = "own_task.CloudClassifier", data: str = "own_task.CloudData") -> Iterator[str]:
    """Lines of a recipe."""
    yield from ("model:", f"  class_path: {model}", "  init_args:", "    optimizer: {lr: 3.0e-3}")
    yield from ("    network: {backbone: {dim: 16, depth: 1, num_heads: 2, dropout: 0.1}}",)
    yield from ("data:", f"  class_path: {data}", "  init_args: {rows: 120, batch_size: 24}")
    yield from ("trainer: {accelerator: cpu, max_epochs: 3}", "threads: 1")
