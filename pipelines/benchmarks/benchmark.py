"""`trunkline benchmark`: speed side by side with peers, in one run on one machine."""

import json
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader

from trunkline import TrunklineError
from trunkline.datamodules import ImageData, LabelledTextData
from trunkline.modules.backbone import Transformer, TransformerConfig
from trunkline.modules.networks import ViT, ViTConfig
from trunkline.modules.objectives.image_classifier import ImageClassifier
from trunkline.modules.training.optim import Muon, OptimizerConfig
from trunkline.pipelines.benchmarks.clip_cases import clip_chunks, clip_compiled, clip_eager
from trunkline.pipelines.benchmarks.ngrams import ngram_accuracy
from trunkline.pipelines.benchmarks.text_cases import (
    bert_compiled,
    bert_eager,
    bert_memory,
    generation,
    gpt_compiled,
    gpt_eager,
    tokenization,
)
from trunkline.pipelines.benchmarks.timing import Side, bare_loop, compare


def benchmark(
    what: Literal[
        "all",
        "vit",
        "vit_compiled",
        "gpt",
        "gpt_compiled",
        "bert",
        "bert_compiled",
        "bert_memory",
        "clip",
        "clip_compiled",
        "clip_chunks",
        "generation",
        "tokenization",
        "muon",
        "overhead",
        "svm",
        "ngram",
    ] = "all",
    rounds: int = 10,
    batch_size: int | None = None,
    output: str | None = None,
) -> None:
    """Measure Trunkline side by side with its peers.

    Args:
        what: `vit`: training step of ViT-Ti/16 at 224 pixels, float32 eager, against timm's model in the
            same loop. `vit_compiled`: the same with bfloat16 and torch.compile, against timm's float32
            eager. `gpt` and `gpt_compiled`: likewise a GPT of 6 layers, width 384 and 256 tokens a row,
            against transformers' GPT-2. `bert` and `bert_compiled`: likewise BERT-mini on 128 tokens a row, 15%
            of them hidden; compiled on both sides. `bert_memory`: peak memory of such a step in float32, eager.
            `clip` and `clip_compiled`: likewise a CLIP at 72 pixels, width 256, 6 image and 4 text layers, against
            open_clip. `clip_chunks`: memory and time of 2,048 pairs in chunks of 128. `generation`: a token of GPT-2
            124M, batch 1. `tokenization`: byte-level BPE against the bare library. `muon`: an optimiser step on the
            digits recipe's network, against torch's Muon, which goes matrix by matrix. `overhead`: `trainer.fit` with
            progress bar, throughput, TensorBoard and signal handling, against a bare loop of the same network and
            batch size. `svm`: test accuracy of an RBF SVM on the splits of vit/digits. `ngram`: of a logistic
            regression over characters' n-grams on those of bert/classify_demo.
        rounds: turns that each side takes.
        batch_size: images or rows a step; None is 16 images, 8 rows of a GPT, 32 of BERT, 64 pairs, 1 in generation.
        output: a JSON file for the figures.
    """
    if output is not None and not Path(output).absolute().parent.is_dir():
        raise TrunklineError(f"--output {output}: there is no folder {Path(output).absolute().parent}; make it first")
    cases = {
        "vit": vit_eager,
        "vit_compiled": vit_compiled,
        "gpt": gpt_eager,
        "gpt_compiled": gpt_compiled,
        "bert": bert_eager,
        "bert_compiled": bert_compiled,
        "clip": clip_eager,
        "clip_compiled": clip_compiled,
        "clip_chunks": clip_chunks,
        "generation": generation,
        "tokenization": tokenization,
        "muon": muon_step,
        "overhead": trainer_overhead,
    }
    if what in ("all", "svm"):
        print(f"RBF SVM on the digits: test accuracy {svm_accuracy():.4f}")
    if what in ("all", "ngram"):
        data = LabelledTextData("emoji", tokenizer="", train_rows=1000, val_fraction=0.1, test_fraction=0.1)
        print(f"n-grams and logistic regression on bert/classify_demo: test accuracy {ngram_accuracy(data):.4f}")
    if what in ("all", "bert_memory"):
        ours, theirs = bert_memory(batch_size)
        print(f"BERT-mini fp32 eager, peak memory of a training step: {ours:.0f} MiB; transformers: {theirs:.0f} MiB")
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


def _vit_loops(batch_size: int | None, bf16: bool = False, compiled: bool = False) -> tuple[Side, Side]:
    """Training step of ours and of timm's ViT-Ti/16."""
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
    """ViT-Ti/16 in bfloat16 and compiled: ours, and timm's own, against timm in float32 eager."""
    peer = _vit_loops(batch_size)[1]
    fast = _vit_loops(batch_size, bf16=True, compiled=True)
    name = "timm fp32 eager"
    return [
        compare("ViT-Ti/16 bf16 compiled", name, fast[0], peer, rounds),
        compare("timm's own, bf16 compiled", name, fast[1], peer, rounds),
    ]


def muon_step(rounds: int, batch_size: int | None) -> list[dict[str, Any]]:
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


def trainer_overhead(rounds: int, batch_size: int | None) -> list[dict[str, Any]]:
    """`trainer.fit` with the callbacks and the logger that recipes have by default, against a bare loop.

    The step takes 40 ms or more on 2 CPU cores.
    """
    from trunkline.modules.callbacks import GracefulStop, ProgressBar, Throughput

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
