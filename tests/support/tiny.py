"""A tiny image classifier that can learn, and quiet trainers for it."""

from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from trunkline.modules.backbone import TransformerConfig
from trunkline.modules.networks import ViTConfig
from trunkline.modules.objectives.base import TrunklineModule
from trunkline.modules.objectives.image_classifier import ImageClassifier
from trunkline.modules.objectives.reduction import as_terms
from trunkline.modules.training.optim import OptimizerConfig


def vit(depth: int = 2, **options: Any) -> ViTConfig:
    fields: dict[str, Any] = {"image_size": 8, "patch_size": 4, "in_chans": 1, "num_classes": 10, "pool": "mean"}
    trunk = {name: options.pop(name) for name in ("dim", "dropout", "drop_path") if name in options}
    backbone = TransformerConfig(**{"dim": 16, "depth": depth, "num_heads": 2, **trunk})
    return ViTConfig(**{**fields, **options}, backbone=backbone)


def classifier(network: ViTConfig | None = None, **options: Any) -> ImageClassifier:
    """A classifier with a random head: a new head is zero, and would give the same outputs for every image."""
    torch.manual_seed(0)
    model = ImageClassifier(
        network or vit(), optimizer=OptimizerConfig(schedule="constant", warmup=0, lr=0.01), **options
    )
    torch.nn.init.normal_(model.network.head.weight)
    torch.nn.init.normal_(model.network.head.bias)
    return model


def batches(count: int, size: int = 4) -> list[dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(1)
    return [
        {"image": torch.randn(size, 1, 8, 8, generator=draw), "label": torch.randint(0, 10, (size,), generator=draw)}
        for _ in range(count)
    ]


def trainer(folder: Path, **options: Any) -> L.Trainer:
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    rest = {"enable_checkpointing": False, "use_distributed_sampler": False, "default_root_dir": folder}
    return L.Trainer(**{"accelerator": "cpu", "devices": 1, **quiet, **rest, **options})


def fit(model: ImageClassifier, folder: Path, data: list[dict[str, Tensor]], **options: Any) -> L.Trainer:
    fitted = trainer(folder, max_epochs=1, **options)
    fitted.fit(model, DataLoader(data, batch_size=None))  # type: ignore[arg-type]
    return fitted


def weights(model: ImageClassifier) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.network.state_dict().items()}


def mean_loss(objective: TrunklineModule, batch: Any) -> Tensor:
    """The loss from which a training step goes backward in a single process."""
    terms = as_terms(objective.loss(batch))
    return torch.stack([term.total / term.count for term in terms]).sum()
