"""Trains tiny networks in two processes, with replicated and with sharded weights, and writes what came out."""

import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import machine_settings
import tiny
import torch
from half_on_cpu import HalfOnCPU
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging
from recorded_run import CONTEXT
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from trunkline.contract import IGNORE
from trunkline.modules.backbone import TransformerConfig
from trunkline.modules.callbacks import Throughput
from trunkline.modules.networks import BERTConfig, CLIPConfig, EncoderDecoderConfig, GPTConfig
from trunkline.modules.objectives.base import TrunklineModule
from trunkline.modules.objectives.causal_lm import CausalLM
from trunkline.modules.objectives.contrastive_image_text import ContrastiveImageText
from trunkline.modules.objectives.image_classifier import ImageClassifier
from trunkline.modules.objectives.seq2seq import Seq2Seq
from trunkline.modules.training import muon
from trunkline.modules.training.background_saves import BackgroundCheckpointIO, save_and_wait
from trunkline.modules.training.checkpoints import SafeCheckpointIO
from trunkline.modules.training.optim import OptimizerConfig
from trunkline.modules.training.sharding import ShardedStrategy

Batch = dict[str, Tensor]
V, T, ROWS = 11, 8, 3
PROCESSES = 2
MIDDLE = 10
"""Step after which a checkpoint is saved, from which a run is resumed."""
SCALE = 2.0**10
"""With which a run in 16-mixed begins."""


def optimizer(name: Any = "adamw", **options: Any) -> OptimizerConfig:
    """With its usual eps, AdamW makes steps of full size out of rounding errors."""
    return OptimizerConfig(name, lr=0.01, eps=1e-3, schedule="constant", warmup=0, **options)


def trunk(**options: Any) -> TransformerConfig:
    return TransformerConfig(**{"dim": 16, "depth": 2, "num_heads": 2, **options})


def gpt() -> CausalLM:
    """Tied embeddings, fused projections, and a vocabulary that two processes cannot halve."""
    return CausalLM(GPTConfig(V, T, backbone=trunk(causal=True, mlp="swiglu")), optimizer=optimizer("muon"))


def vit(**options: Any) -> ImageClassifier:
    return ImageClassifier(tiny.vit(), optimizer=optimizer(), **options)


def scaled() -> CausalLM:
    config = GPTConfig(V, T, tie_embeddings=False, backbone=trunk(causal=True, mlp="swiglu", num_kv_heads=1))
    return CausalLM(config, optimizer=optimizer(rms_scaled=True))


def clip() -> ContrastiveImageText:
    """One trunk for both towers, called twice in a step, and parameters of one entry."""
    bert = BERTConfig(V, T, num_segments=0, backbone=tiny.vit().backbone)
    network = CLIPConfig(tiny.vit(num_classes=0), bert=bert, text_pool="mean", dim=8, share_trunk=True)
    return ContrastiveImageText(network, optimizer=optimizer())


def seq2seq() -> Seq2Seq:
    """Two trunks, whose activations are recomputed."""
    trunks = {"encoder": trunk(activation_checkpointing=True), "decoder": trunk(activation_checkpointing=True)}
    return Seq2Seq(EncoderDecoderConfig(V, None, T, T, **trunks), optimizer=optimizer())


def t5() -> Seq2Seq:
    """Relative bias, keys that serve two query heads, norms of queries and keys; activations are recomputed."""
    config = trunk(num_heads=4, num_kv_heads=2, mlp="swiglu", qk_norm=True, activation_checkpointing=True)
    network = EncoderDecoderConfig(V, None, T, T, positions="relative", encoder=config, decoder=config)
    return Seq2Seq(network, optimizer=optimizer())


def dropout() -> CausalLM:
    return CausalLM(GPTConfig(V, T, backbone=trunk(causal=True, dropout=0.2, drop_path=0.2)), optimizer=optimizer())


MODULES: dict[str, Callable[[], TrunklineModule]] = {
    "gpt": gpt,
    "vit": vit,
    "scaled": scaled,
    "clip": clip,
    "seq2seq": seq2seq,
    "t5": t5,
    "drop_path": lambda: ImageClassifier(tiny.vit(drop_path=0.5), optimizer=optimizer()),
    "dropout": dropout,
    "frozen": lambda: vit(freeze_blocks=1),
    "bf16-true": vit,
    "bf16-mixed": vit,
    "16-mixed": vit,
}


def batch(kind: str, draw: torch.Generator) -> Batch:
    tokens, other = (torch.randint(0, V, (ROWS, T), generator=draw) for _ in range(2))
    targets = torch.where(torch.rand(ROWS, T, generator=draw) < 0.3, IGNORE, other)
    images = {"image": torch.randn(ROWS, 1, 8, 8, generator=draw), "valid": torch.ones(ROWS, dtype=torch.bool)}
    if kind in ("gpt", "scaled", "dropout"):
        return {"tokens": tokens, "targets": targets}
    if kind == "clip":
        keys = torch.randint(0, 1 << 40, (ROWS,), generator=draw)
        mask = torch.ones(ROWS, T, dtype=torch.bool)
        return {**images, "tokens": tokens, "mask": mask, "caption_key": keys, "index": torch.arange(ROWS)}
    if kind in ("seq2seq", "t5"):
        mask = torch.arange(T) < torch.randint(1, T + 1, (ROWS, 1), generator=draw)
        return {"tokens": tokens, "mask": mask, "target_tokens": other, "targets": targets}
    return {**images, "label": torch.randint(0, 10, (ROWS,), generator=draw)}


def batches(kind: str, rank: int, count: int) -> list[Batch]:
    draw = torch.Generator().manual_seed(1 + rank)
    return [batch(kind, draw) for _ in range(count)]


class Rest(Sampler[int]):
    """The numbers from one on; like ours it counts those before as well."""

    def __init__(self, first: int, count: int) -> None:
        self.first, self.count = first, count

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.first, self.count))

    def __len__(self) -> int:
        return self.count


class Overflow(Callback):
    """Makes the gradients infinite that one process holds of a sharded weight, once."""

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_rank == 1 and trainer.global_step == MIDDLE:
            pl_module.network.head.bias.grad.to_local().fill_(torch.inf)


class Save(Callback):
    """Saves a checkpoint after some step."""

    def __init__(self, path: Path, step: int) -> None:
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


class BlockCalls(Callback):
    """Counts how often the last block is computed in training; again in each step if activations are recomputed."""

    def __init__(self) -> None:
        self.count = 0

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        pl_module.network.backbone.blocks[-1].register_forward_pre_hook(self.add)

    def add(self, block: torch.nn.Module, *_: Any) -> None:
        self.count += block.training


class Draw(Callback):
    """Runs the network in the first process alone, as those callbacks do that draw pictures."""

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            pl_module.network(torch.zeros(1, 1, 8, 8))


def train(
    kind: str,
    strategy: str,
    folder: Path,
    rank: int = 0,
    steps: int = 20,
    devices: int = PROCESSES,
    save: bool = False,
    overflow: bool = False,
    resume: Path | None = None,
    tensor_parallel: int = 1,
    compiled: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Train and return weights, averaged weights and what was logged; the checkpoint `last.ckpt` holds all of it."""
    torch.manual_seed(0)
    module, products = MODULES[kind](), set()
    linear = next(part for part in module.modules() if isinstance(part, torch.nn.Linear))
    linear.register_forward_hook(lambda _, inputs, output: products.add(str(output.dtype)))
    if compiled:
        module.network.compile(backend="aot_eager")  # which traces, but needs no compiler
    folder = folder / f"{kind}-{strategy}"
    callbacks: list[Callback] = [Throughput()]
    calls = BlockCalls()
    if kind == "vit":
        callbacks += [calls, Draw(), EMAWeightAveraging(decay=0.9)]
    if save:
        callbacks.append(Save(folder / "middle.ckpt", MIDDLE))
    recompute = True if kind == "vit" else None
    plugins: list[Any] = [BackgroundCheckpointIO() if strategy == "sharded" else SafeCheckpointIO()]
    if kind == "16-mixed":
        plugins.append(HalfOnCPU())
        callbacks += [Overflow()] if overflow else []
    fitted = tiny.trainer(
        folder,
        devices=devices,
        strategy=ShardedStrategy(activation_checkpointing=recompute, tensor_parallel_size=tensor_parallel)
        if strategy == "sharded"
        else strategy,
        plugins=plugins,
        max_epochs=1,
        val_check_interval=5,
        log_every_n_steps=5,
        gradient_clip_val=1.0,
        callbacks=callbacks,
        precision=kind if kind.startswith("bf16") else None,
        **options,
    )
    accumulated = options.get("accumulate_grad_batches", 1)
    data = batches(kind, rank // tensor_parallel, steps * accumulated)
    # A text classifier's evaluation needs facts of a datamodule; here the images are validated.
    images = "image" in data[0] and kind != "clip"
    rest = Rest(0 if resume is None else MIDDLE, len(data))
    loaders = [DataLoader(data, None, sampler=order) for order in (rest, range(2))]  # type: ignore[arg-type]
    fitted.fit(module, loaders[0], loaders[1] if images else None, ckpt_path=resume)
    save_and_wait(fitted, folder / "last.ckpt")
    logged = {name: float(value) for name, value in fitted.callback_metrics.items()}
    scaler = getattr(fitted.precision_plugin, "scaler", None)
    found = {"steps": fitted.global_step, "logged": logged, "scale": scaler and scaler.get_scale()}
    return {**found, "products": sorted(products), "calls": calls.count}


def in_processes(work: Callable[..., None], *arguments: Any, processes: int = PROCESSES) -> None:
    """Run `work(rank, *arguments)` in processes that train together, as a cluster starts them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = [
        CONTEXT.Process(target=one_process, args=(rank, processes, port, work, *arguments)) for rank in range(processes)
    ]
    try:
        for process in started:
            process.start()
        for process in started:
            process.join(200)
        assert [process.exitcode for process in started] == [0] * processes
    finally:
        for process in started:
            process.kill()


def one_process(rank: int, processes: int, port: int, work: Callable[..., None], *arguments: Any) -> None:
    machine_settings.apply()
    muon.multiplies_bfloat16 = lambda device: False  # type: ignore[assignment]  # which would magnify rounding
    names: dict[str, Any] = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "TORCHELASTIC_RUN_ID": "test"}
    names |= {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()})
    work(rank, *arguments)
