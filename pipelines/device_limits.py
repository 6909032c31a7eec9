"""What a run's device cannot do: a precision that it lacks, compiling without a compiler, a batch that does not fit."""

import os
import re
import shutil
import sys
from collections.abc import Iterable
from importlib.util import find_spec
from typing import NamedTuple

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, WeightAveraging
from torch import Tensor

from trunkline import TrunklineError
from trunkline.modules.training.distributed import local_rows
from trunkline.modules.training.sharding import group_size, trunks_in

BFLOAT16, FLOAT8, TRITON = (8, 0), (8, 9), (7, 0)
"""Compute capabilities from which an NVIDIA GPU has instructions for these formats, and Triton generates code for it:
https://docs.nvidia.com/cuda/cuda-c-programming-guide/#compute-capabilities."""
NUMBER_FORMATS = {"bf16": torch.bfloat16, "16": torch.float16, "64": torch.float64}
"""First part of a precision -> format in which it computes."""


class DeviceLimits(Callback):
    """Refuses what the device of this process cannot do, before the first step; explains a batch that does not fit.

    Args:
        precision: `trainer.precision` as it was given: Lightning replaces some values by others.
        compiled: whether the network is compiled.
    """

    def __init__(self, precision: str | int | None = None, compiled: bool = False) -> None:
        self.precision, self.compiled = str(precision or "32-true"), compiled

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Look at the device, once this process has one.

        Raises:
            TrunklineError: naming the device, what it lacks, and what to choose instead.
        """
        device, trains = trainer.strategy.root_device, stage == "fit"
        check_precision(self.precision, device, trains)
        if self.compiled and trains:  # evaluations run uncompiled
            check_compiler(device)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Add to a lack of GPU memory, as its cause, what was measured and what would fit.

        Lightning calls this before it moves everything away from the device.
        """
        if isinstance(exception, torch.OutOfMemoryError) and trainer.strategy.root_device.type == "cuda":
            exception.__cause__ = out_of_memory(trainer, pl_module, exception)


def check_precision(precision: str, device: torch.device, trains: bool = True) -> None:
    """Check that a device computes in a precision without emulating it.

    Args:
        precision: as Lightning names them, such as `bf16-mixed`.
        device: where the run trains or evaluates.
        trains: whether gradients are computed.

    Raises:
        TrunklineError: naming the device and the precisions that it has.
    """
    kind = precision.partition("-")[0]
    kind = "fp8" if kind == "transformer" else kind  # NVIDIA's Transformer Engine
    if device.type == "cuda":
        capability, name = torch.cuda.get_device_capability(device), torch.cuda.get_device_name(device)
        which = f"{name} has compute capability {capability[0]}.{capability[1]}"
        if kind == "bf16" and capability < BFLOAT16 and not torch.version.hip:
            raise refusal(precision, f"{which}, and bfloat16 needs 8.0: it would be emulated", "16-mixed or 32-true")
        if kind == "fp8" and capability < FLOAT8 and not torch.version.hip:
            instead = "bf16-mixed" if capability >= BFLOAT16 else "16-mixed"
            raise refusal(precision, f"{which}, and 8-bit floating-point numbers need 8.9", instead)
    elif kind == "fp8":
        raise refusal(precision, f"8-bit floating-point numbers need an NVIDIA GPU, not {device.type}", "bf16-mixed")
    elif device.type == "cpu" and trains and precision in ("16", "16-mixed"):
        raise refusal(precision, "gradients in float16 are not scaled on a CPU", "bf16-mixed or 32-true")
    elif device.type != "cpu" and kind in NUMBER_FORMATS:
        try:
            matrix = torch.ones(2, 2, device=device, dtype=NUMBER_FORMATS[kind])
            matrix.mm(matrix)
        except (RuntimeError, TypeError, NotImplementedError) as error:
            reason = str(error).partition("\n")[0]
            raise refusal(precision, f"{device.type} does not compute in it ({reason})", "32-true") from error


def refusal(precision: str, reason: str, instead: str) -> TrunklineError:
    """The error for a precision that a device lacks."""
    return TrunklineError(f"precision {precision} cannot be used: {reason}; set {instead}", "trainer.precision")


def check_compiler(device: torch.device) -> None:
    """Check that torch.compile finds the compilers that it calls for a device.

    Raises:
        TrunklineError: naming what is missing.
    """
    missing = None
    if device.type == "cuda":
        if torch.cuda.get_device_capability(device) < TRITON and not torch.version.hip:
            missing = f"a GPU of compute capability 7.0 or newer, which {torch.cuda.get_device_name(device)} is not"
        elif find_spec("triton") is None:
            missing = "Triton, which is not installed: pip install triton"
        elif not finds_compiler("CC", "gcc", "clang", "cc", "cl"):
            missing = "a C compiler (gcc or clang, or the one that CC names), and none was found: install gcc"
    elif device.type == "cpu" and not finds_compiler("CXX", "clang++" if sys.platform == "darwin" else "g++", "cl"):
        missing = "a C++ compiler (g++, or the one that CXX names), and none was found: install g++"
    if missing:
        raise TrunklineError(f"torch.compile needs {missing}, or set compile to false", "compile")


def finds_compiler(variable: str, *names: str) -> bool:
    """Whether the compiler that an environment variable names exists, or one of these if it is not set."""
    given = os.environ.get(variable)
    return any(shutil.which(name) for name in ([given] if given else names))


class MemoryUse(NamedTuple):
    """Bytes on a GPU when it ran out of memory."""

    capacity: int
    """That this process could have: what it holds and what is free."""
    peak: int
    """The most that it held at once."""
    asked: int
    """Of the allocation that failed; 0 if unknown."""
    resident: int
    """Of weights, gradients and states of the optimiser that were there."""
    fixed: int
    """The same once a first step is done, when all of them are there."""


def bytes_of_tensors(tensors: Iterable[Tensor | None]) -> int:
    """Bytes of this process's parts of tensors."""
    return sum(part.numel() * part.element_size() for t in tensors if t is not None for part in [local_rows(t)])


def measure(trainer: L.Trainer, module: L.LightningModule, error: BaseException) -> MemoryUse:
    """What the GPU of this process holds."""
    device = trainer.strategy.root_device
    free, _ = torch.cuda.mem_get_info(device)
    amount = re.search(r"[Tt]ried to allocate ([\d.]+) ([KMG]?i?B|bytes)", str(error))
    scale = {"K": 10, "M": 20, "G": 30}
    asked = int(float(amount[1]) * 2 ** scale.get(amount[2][0], 0)) if amount else 0
    parameters = list(module.parameters())
    weights = bytes_of_tensors([*parameters, *module.buffers()])
    learnt = bytes_of_tensors(p for p in parameters if p.requires_grad)
    gradients = bytes_of_tensors(p.grad for p in parameters)
    states = bytes_of_tensors(
        value
        for optimizer in trainer.optimizers
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor) and value.device.type == device.type
    )
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    average = weights * any(isinstance(callback, WeightAveraging) for callback in callbacks)
    return MemoryUse(
        capacity=free + torch.cuda.memory_reserved(device),
        peak=torch.cuda.max_memory_allocated(device),
        asked=asked,
        resident=weights + gradients + states + average,
        fixed=weights + learnt + (states or 2 * learnt) + average,  # most optimisers keep two values for each weight
    )


def rows_that_fit(rows: int, use: MemoryUse) -> int:
    """The largest part of `rows` without a remainder that fits if each row takes what it took when memory ran out.

    The step was not done then, so that it may still be too many. 0 if not even one row fits.
    """
    each = max(use.peak + use.asked - use.resident, 1) / rows
    most = min(int((use.capacity - use.fixed) / each), rows - 1)
    return next((part for part in range(most, 0, -1) if rows % part == 0), 0)


def out_of_memory(trainer: L.Trainer, module: L.LightningModule, error: BaseException) -> TrunklineError:
    """What was tried, what was measured, what would fit, and which flags lower the need."""
    use, data = measure(trainer, module, error), getattr(trainer, "datamodule", None)
    evaluates = trainer.evaluating or trainer.sanity_checking
    size, own = getattr(data, "batch_size", None), getattr(data, "eval_batch_size", None) if evaluates else None
    size, shares = own or size, trainer.world_size // (1 if evaluates else group_size(trainer))
    rows = max(size // shares, 1) if isinstance(size, int) else 1
    by_length = [name for name in ("batch_tokens", "batch_seconds") if getattr(data, name, None) and not own]
    text = [
        f"the GPU's {in_gib(use.capacity)} are not enough (tried to allocate {in_gib(use.asked)} more; the most at a "
        f"time was {in_gib(use.peak)})"
    ]
    fitting = rows_that_fit(rows, use)
    if fitting == 0:
        text.append(f"weights, gradients and optimiser take {in_gib(use.fixed)}, so that no smaller batch would fit")
        field = None
    elif by_length:
        field = f"data.{by_length[0]}"
        less = getattr(data, by_length[0]) * fitting / rows
        text.append(f"batches were of {by_length[0]} {getattr(data, by_length[0]):g}; {less:g} may fit: set --{field}")
    else:
        field = "data.eval_batch_size" if evaluates else "data.batch_size"
        each = "" if trainer.world_size == 1 else " in each process"
        options = f"--{field} {fitting * shares}"
        if not evaluates:
            options += f" --trainer.accumulate_grad_batches {-(-rows * trainer.accumulate_grad_batches // fitting)}"
        text.append(f"a batch of {rows} rows{each} was tried; {fitting} may fit, with the same result: {options}")
    text.append(f"what lowers the need too: {', '.join(savings(trainer, module))}")
    return TrunklineError("; ".join(text), field)


def savings(trainer: L.Trainer, module: L.LightningModule) -> list[str]:
    """Other settings that take less memory, of those that the run does not have yet."""
    found = []
    if any(not trunk.config.activation_checkpointing for trunk in trunks_in(module)):
        found.append("activation_checkpointing true in the network's backbone")
    if str(trainer.precision).startswith(("32", "64")):
        old = torch.cuda.get_device_capability(trainer.strategy.root_device) < BFLOAT16
        found.append(f"--trainer.precision {'16-mixed' if old else 'bf16-mixed'}")
    return [*found, "--config trainer/fsdp on several GPUs", "a smaller network (dim, depth) or shorter rows"]


def in_gib(count: float) -> str:
    """Bytes as people read them."""
    return f"{count / 2**30:,.2f} GiB" if count >= 2**28 else f"{count / 2**20:,.1f} MiB"
