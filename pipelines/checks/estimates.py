"""Estimates of the memory of each process, the size of a checkpoint and the time of an epoch, from a few steps."""

import re
import resource
import statistics
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor

from trunkline.modules.training.background_saves import save_and_wait
from trunkline.modules.training.distributed import local_rows
from trunkline.pipelines.checks.trial import Trial
from trunkline.pipelines.checks.trial_process import TrialObserver

FIRST, MEASURED = 3, 6
"""Steps before the measurement, and measured steps."""


class CostObserver(TrialObserver):
    """Measures memory and time."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.saved: dict[int, int] = {}
        self.weights = {storage(p)[0] for p in pl_module.parameters()}
        self.times: list[float] = []
        self.hooks: Any = None

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 0 and not self.saved:  # of one forward pass
            self.hooks = torch.autograd.graph.saved_tensors_hooks(self._count, lambda tensor: tensor)
            self.hooks.__enter__()

    def _count(self, tensor: Tensor) -> Tensor:
        place, size = storage(tensor)
        if place not in self.weights:
            self.saved[place] = size
        return tensor

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        if self.hooks is not None:
            self.hooks.__exit__(None, None, None)
            self.hooks = None

    def after_step(self, trainer: L.Trainer, module: L.LightningModule, rows: list[Any]) -> None:
        device = trainer.strategy.root_device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self.times.append(time.perf_counter())
        if trainer.global_step < FIRST + MEASURED:
            return
        states = [value for state in trainer.optimizers[0].state.values() for value in state.values()]
        averaged = any(isinstance(c, WeightAveraging) for c in trainer.callbacks)  # type: ignore[attr-defined]
        parts = {
            "weights": bytes_of([*module.parameters(), *module.buffers()]),
            "gradients": bytes_of(p.grad for p in module.parameters() if p.grad is not None),
            "optimiser": bytes_of(value for value in states if isinstance(value, Tensor)),
            "average": bytes_of(module.parameters()) if averaged else 0,
            "activations": sum(self.saved.values()),
        }
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
        if peak is not None:
            parts["activations"] = max(peak - sum(parts.values()) + parts["activations"], 0)
        steps = [after - before for before, after in zip(self.times, self.times[1:], strict=False)]
        batches = float(trainer.num_training_batches) / trainer.accumulate_grad_batches
        self.result = {
            "parts": parts,
            "resident": None if peak is not None else peak_resident(),
            "step": statistics.median(steps[FIRST - 1 :]),
            "steps": batches,
            "checkpoint": self.checkpoint_size(trainer),
        }

    def checkpoint_size(self, trainer: L.Trainer) -> int:
        """Bytes of a checkpoint that is written and removed again."""
        file = self.folder / "size.ckpt"
        save_and_wait(trainer, file)
        if not trainer.is_global_zero:
            return 0
        files = [part for part in file.rglob("*") if part.is_file()] if file.is_dir() else [file]
        return sum(part.stat().st_size for part in files)


def storage(tensor: Tensor) -> tuple[int, int]:
    """Address and bytes of a tensor's memory."""
    memory = local_rows(tensor).untyped_storage()
    return memory.data_ptr(), memory.nbytes()


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors; memory that they share counts once."""
    return sum(dict(map(storage, tensors)).values())


def peak_resident() -> int:
    """The largest resident memory of this process so far, in bytes."""
    status = Path("/proc/self/status")
    if status.exists() and (found := re.search(r"^VmHWM:\s*(\d+) kB$", status.read_text(), re.MULTILINE)):
        return 1024 * int(found[1])
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes if sys.platform == "darwin" else 1024 * kilobytes


def cost_trial(processes: int) -> Trial:
    """A few steps as the recipe makes them, with its batch size, precision and weight average."""
    steps = FIRST + MEASURED
    places = "" if processes == 1 else f" in {processes} processes"
    return Trial(f"{steps} steps{places}, measured", CostObserver(), steps, processes, callbacks="average", still=False)


def in_mebibytes(count: float) -> str:
    """Bytes as people read them."""
    return f"{count / 2**30:,.1f} GiB" if count >= 10 * 2**30 else f"{count / 2**20:,.1f} MiB"


def estimate_rows(result: dict[str, Any]) -> dict[str, str]:
    """What was estimated -> in words."""
    parts = {name: size for name, size in result["parts"].items() if size}
    text = f"{in_mebibytes(sum(parts.values()))}: " + ", ".join(
        f"{name} {in_mebibytes(size)}" for name, size in parts.items()
    )
    if result["resident"] is not None:
        text += f"; the whole process {in_mebibytes(result['resident'])} at its peak"
    seconds = result["step"] * result["steps"]
    epoch = f"{seconds:,.0f} s" if seconds < 600 else f"{seconds / 60:,.0f} min" if seconds < 36000 else ""
    return {
        "memory of a process": text,
        "a checkpoint": in_mebibytes(result["checkpoint"]),
        "an epoch": f"{epoch or f'{seconds / 3600:,.1f} h'}: {result['steps']:,.0f} steps of {result['step']:.3g} s, "
        "without validation",
    }
