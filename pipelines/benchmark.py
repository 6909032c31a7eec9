"""`trunkline benchmark`: speed side by side with peers, in one run on one machine.

Absolute seconds depend on what else a machine does, so every figure is a ratio: the two sides take turns,
and the median of the turns' ratios counts.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader

from trunkline.datamodules import ImageData
from trunkline.modules.backbone import Transformer, TransformerConfig
from trunkline.modules.image_classifier import ImageClassifier
from trunkline.modules.networks import ViT, ViTConfig
from trunkline.modules.optim import Muon, OptimizerConfig

Side = Callable[[], float]
"""Takes a turn and returns the seconds of one step."""


def benchmark(
    what: Literal["all", "vit", "vit_compiled", "muon", "overhead", "svm"] = "all",
    rounds: int = 10,
    batch_size: int = 16,
    output: str | None = None,
) -> None:
    """Measure Trunkline side by side with its peers.

    Args:
        what: `vit`: training step of ViT-Ti/16 at 224 pixels, float32 eager, against timm's model in the
            same loop. `vit_compiled`: the same with bfloat16 and torch.compile, against timm's float32
            eager. `muon`: an optimiser step on the digits recipe's network, against torch's Muon, which goes
            matrix by matrix. `overhead`: `trainer.fit` with progress bar, throughput, TensorBoard and signal
            handling, against a bare loop of the same network and batch size. `svm`: test accuracy of an RBF
            SVM on the splits of vit/digits.
        rounds: turns that each side takes.
        batch_size: images a step.
        output: a JSON file for the figures.
    """
    cases = {"vit": vit_eager, "vit_compiled": vit_compiled, "muon": muon_step, "overhead": trainer_overhead}
    if what in ("all", "svm"):
        print(f"RBF SVM on the digits: test accuracy {svm_accuracy():.4f}")
    chosen = {name: case for name, case in cases.items() if what in ("all", name)}
    rows = [row for case in chosen.values() for row in case(rounds, batch_size)]
    if not rows:
        return
    table = Table("case", "peer", "ms", "peer ms", "peer / ours", "range", title=f"{torch.get_num_threads()} threads")
    for row in rows:
        low, high = row["range"]
        figures = f"{row['ms']:.1f}", f"{row['peer_ms']:.1f}", f"{row['ratio']:.3f}", f"{low:.3f} to {high:.3f}"
        table.add_row(row["case"], row["peer"], *figures)
    Console().print(table)
    if output is not None:
        Path(output).write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


def compare(case: str, peer: str, ours: Side, theirs: Side, rounds: int) -> dict[str, Any]:
    """Let two sides take turns after two to warm up; ratios above 1 say that ours is faster."""
    for side in (ours, theirs) * 2:  # compilation, allocation and caches
        side()
    pairs = []
    for turn in track(range(rounds), description=case, transient=True):
        sides = (theirs, ours) if turn % 2 else (ours, theirs)
        seconds = {side: side() for side in sides}
        pairs.append((seconds[ours], seconds[theirs]))
    ratios = sorted(b / a for a, b in pairs)
    return {
        "case": case,
        "peer": peer,
        "ms": 1e3 * statistics.median(a for a, _ in pairs),
        "peer_ms": 1e3 * statistics.median(b for _, b in pairs),
        "ratio": statistics.median(ratios),
        "range": (ratios[0], ratios[-1]),
    }


def bare_loop(network: nn.Module, image: Tensor, label: Tensor, bf16: bool = False, steps: int = 1) -> Side:
    """Forward, backward and AdamW on one fixed batch."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)

    def loop() -> float:
        network.train()
        start = time.perf_counter()
        for _ in range(steps):
            with torch.autocast(image.device.type, torch.bfloat16, enabled=bf16):
                loss = F.cross_entropy(network(image), label)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        if image.is_cuda:
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / steps

    return loop


def _vit_pair(batch_size: int) -> tuple[ViT, nn.Module, Tensor, Tensor]:
    """Ours and timm's ViT-Ti/16, and a batch."""
    import timm

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    image, label = torch.randn(batch_size, 3, 224, 224), torch.randint(0, 1000, (batch_size,))
    ours, theirs = ViT(ViTConfig()).to(device), timm.create_model("vit_tiny_patch16_224").to(device)
    return ours, theirs, image.to(device), label.to(device)


def vit_eager(rounds: int, batch_size: int) -> list[dict[str, Any]]:
    """ViT-Ti/16 in float32, eager, on both sides."""
    ours, theirs, image, label = _vit_pair(batch_size)
    sides = bare_loop(ours, image, label), bare_loop(theirs, image, label)
    return [compare("ViT-Ti/16 fp32 eager", "timm fp32 eager", *sides, rounds)]


def vit_compiled(rounds: int, batch_size: int) -> list[dict[str, Any]]:
    """ViT-Ti/16 in bfloat16 and compiled: ours, and timm's own, against timm in float32 eager."""
    ours, theirs, image, label = _vit_pair(batch_size)
    ours.compile()
    compiled = _vit_pair(batch_size)[1]
    compiled.compile()
    peer = bare_loop(theirs, image, label)
    fast = bare_loop(ours, image, label, bf16=True), bare_loop(compiled, image, label, bf16=True)
    name = "timm fp32 eager"
    return [
        compare("ViT-Ti/16 bf16 compiled", name, fast[0], peer, rounds),
        compare("timm's own, bf16 compiled", name, fast[1], peer, rounds),
    ]


def muon_step(rounds: int, batch_size: int) -> list[dict[str, Any]]:
    """One optimiser step over the trunk's matrices, all gradients given."""
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
    """Seconds a step between the ends of the first and the last `steps` steps of a fit."""

    def __init__(self, steps: int, warmup: int) -> None:
        self.steps, self.warmup, self.start, self.seconds = steps, warmup, 0.0, 0.0

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Note the time."""
        if trainer.global_step == self.warmup:
            self.start = time.perf_counter()
        elif trainer.global_step == self.warmup + self.steps:
            self.seconds = time.perf_counter() - self.start


def trainer_overhead(rounds: int, batch_size: int) -> list[dict[str, Any]]:
    """`trainer.fit` with the callbacks and the logger that recipes have by default, against a bare loop.

    The step takes 40 ms or more on 2 CPU cores.
    """
    from trunkline.modules.callbacks import GracefulStop, ProgressBar, Throughput

    warmup, steps = 5, 50
    network = ViTConfig(image_size=64, patch_size=8, num_classes=10, backbone=TransformerConfig(dim=192, depth=4))
    module = ImageClassifier(network, OptimizerConfig(schedule="constant", warmup=0))
    batches = [
        {"image": torch.randn(batch_size, 3, 64, 64), "label": torch.randint(0, 10, (batch_size,))} for _ in range(5)
    ]
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

    bare = bare_loop(module.network, batches[0]["image"], batches[0]["label"], steps=steps)
    return [compare("trainer.fit", "bare loop", fit, bare, rounds)]
