"""Cases of `trunkline benchmark` with images, and the overhead of the trainer."""

import tempfile
import time
from functools import partial
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader

from trunkline.datamodules import ImageData
from trunkline.modules.backbone import Transformer, TransformerConfig
from trunkline.modules.networks import ViT, ViTConfig
from trunkline.modules.training.muon import Muon
from trunkline.modules.training.optim import OptimizerConfig
from trunkline.pipelines.benchmarks.timing import Side, bare_loop, compare


def _vit_loops(batch_size: int | None, bf16: bool = False, compiled: bool = False) -> tuple[Side, Side]:
    """Training steps of our ViT-Ti/16 and of timm's."""
    import timm

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    size = batch_size or 16
    image, label = torch.randn(size, 3, 224, 224, device=device), torch.randint(0, 1000, (size,), device=device)
    loops = []
    for network in (ViT(ViTConfig()).to(device), timm.create_model("vit_tiny_patch16_224").to(device)):
        if compiled:
            network.compile()
        loops.append(bare_loop(network, partial(_classify, network, image, label), bf16))
    return loops[0], loops[1]


def _classify(network: nn.Module, image: Tensor, label: Tensor) -> Tensor:
    return F.cross_entropy(network(image), label)


def vit_eager(rounds: int, batch_size: int | None) -> list[dict[str, Any]]:
    """ViT-Ti/16 in float32, eager, on both sides."""
    return [compare("ViT-Ti/16 fp32 eager", "timm fp32 eager", *_vit_loops(batch_size), rounds)]


def vit_compiled(rounds: int, batch_size: int | None) -> list[dict[str, Any]]:
    """ViT-Ti/16 compiled in bfloat16, ours and timm's, each against timm in float32 eager."""
    peer = _vit_loops(batch_size)[1]
    fast = _vit_loops(batch_size, bf16=True, compiled=True)
    name = "timm fp32 eager"
    return [
        compare("ViT-Ti/16 bf16 compiled", name, fast[0], peer, rounds),
        compare("timm's own, bf16 compiled", name, fast[1], peer, rounds),
    ]


def muon_step(rounds: int, batch_size: int | None) -> list[dict[str, Any]]:
    """One optimiser step over the trunk's matrices; the gradients are computed before."""
    trunk = Transformer(TransformerConfig(dim=64, depth=4, num_heads=4))
    matrices = [m.weight for m in trunk.modules() if isinstance(m, nn.Linear)]
    for weight in matrices:
        weight.grad = torch.randn_like(weight)

    def side(optimizer: torch.optim.Optimizer, steps: int = 50) -> Side:
        def run() -> float:
            start = time.perf_counter()
            for _ in range(steps):
                optimizer.step()
            return (time.perf_counter() - start) / steps

        return run

    ours = Muon(matrices, lr=1e-3, momentum=0.95, weight_decay=0.1)
    return [compare("Muon step", "torch.optim.Muon", side(ours), side(torch.optim.Muon(matrices)), rounds)]


def svm_accuracy() -> float:
    """Test accuracy of scikit-learn's RBF SVM, trained on the training and validation rows of vit/digits."""
    from sklearn.svm import SVC

    data = ImageData(source="digits", image_size=8, channels=1)
    data.setup("fit")
    parts = {}
    for split, dataset in data.datasets.items():
        rows = dataset.rows  # type: ignore[attr-defined]
        pixels = np.stack([np.asarray(rows.image(row), dtype=np.float64).ravel() for row in range(len(rows.labels))])
        parts[split] = pixels / 255, rows.labels
    train = [np.concatenate([parts["train"][i], parts["val"][i]]) for i in range(2)]
    return float(SVC(C=10).fit(*train).score(*parts["test"]))


class StepClock(Callback):
    """Measures seconds per step over `steps` steps of a fit, after `warmup` steps."""

    def __init__(self, steps: int, warmup: int) -> None:
        self.steps, self.warmup, self.start, self.seconds = steps, warmup, 0.0, 0.0

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.warmup:
            self.start = time.perf_counter()
        elif trainer.global_step == self.warmup + self.steps:
            self.seconds = time.perf_counter() - self.start


def trainer_overhead(rounds: int, batch_size: int | None) -> list[dict[str, Any]]:
    """`trainer.fit` with the default callbacks and logger of recipes, against a bare loop.

    A step takes 40 ms or more on 2 CPU cores.
    """
    from trunkline.modules.callbacks import GracefulStop, ProgressBar, Throughput
    from trunkline.modules.objectives.image_classifier import ImageClassifier

    warmup, steps, size = 5, 50, batch_size or 16
    network = ViTConfig(image_size=64, patch_size=8, num_classes=10, backbone=TransformerConfig(dim=192, depth=4))
    module = ImageClassifier(network, optimizer=OptimizerConfig(schedule="constant", warmup=0))
    batches = [{"image": torch.randn(size, 3, 64, 64), "label": torch.randint(0, 10, (size,))} for _ in range(5)]
    data: Any = DataLoader([batches[i % 5] for i in range(steps + warmup)], batch_size=None)  # type: ignore[arg-type]

    def fit() -> float:
        clock = StepClock(steps, warmup)
        with tempfile.TemporaryDirectory() as folder:
            trainer = L.Trainer(
                accelerator="cpu",
                max_epochs=1,
                enable_checkpointing=False,
                enable_model_summary=False,
                default_root_dir=folder,
                logger=TensorBoardLogger(folder),
                callbacks=[ProgressBar(), Throughput(), GracefulStop(), clock],
            )
            trainer.fit(module, data)
        return clock.seconds / steps

    first = partial(_classify, module.network, **batches[0])
    bare = bare_loop(module.network, first, steps=steps)
    return [compare("trainer.fit", "bare loop", fit, bare, rounds)]
