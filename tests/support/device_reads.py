"""Finds reads of a device's results on a machine without one: on an accelerator, each would make the host wait."""

import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest.mock import patch

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
READS = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten.bincount, aten.unique_dim}
READS |= {aten._unique2, aten.unique_consecutive, aten.is_nonzero, aten.argwhere, aten.histc}
"""Operations whose result, or its size, is known only when the device has finished."""
INDEXED = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
METHODS = {Tensor.tolist, Tensor.numpy, Tensor.cpu, Tensor.__array__}
"""Methods that read a tensor without such an operation."""
ALLOWED = ("torch/utils/data/", "modules/training/late.py", "callbacks/weight_average.py")
"""Where tensors are read that are on the host anyway: those of the data, numbers that travelled there during a step,
and the number of averaged steps (`meta_device` would refuse to read another)."""


class HostReads(AssertionError):
    """The host reads what a device computes."""


def refuse(what: Any) -> None:
    places = [f"{frame.filename}:{frame.lineno}" for frame in traceback.extract_stack()[:-2]]
    if not any(part in place for place in places for part in ALLOWED):
        raise HostReads(f"{what} at {' < '.join(reversed(places[-30:]))}")


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = func.overloadpacket
        flagged = packet in INDEXED and any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
        sized = packet is aten.repeat_interleave and (kwargs or {}).get("output_size") is None
        if packet in READS or flagged or (sized and len(args) == 1):
            refuse(func)
        return func(*args, **(kwargs or {}))


class _Methods(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in METHODS:
            refuse(func)
        return func(*args, **(kwargs or {}))


@contextmanager
def no_reads() -> Iterator[None]:
    """Raise `HostReads` where the host would wait for a device, or for all other processes and their devices."""
    with _Methods(), _Operations(), patch.object(dist, "barrier", lambda *_, **__: refuse("barrier")):
        yield


@contextmanager
def no_waits() -> Iterator[None]:
    """Raise where an operation of PyTorch makes the host wait for a GPU; nothing is refused on another machine."""
    if not torch.cuda.is_available():
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


QUIET: list[int] = []
"""The steps in which `NoReads` found no read."""


class NoReads(Callback):
    """Refuses reads in all training steps from the second on that log nothing."""

    refused: Callable[[], AbstractContextManager[None]] = staticmethod(no_reads)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        loop = trainer.fit_loop.epoch_loop
        advance: Callable[..., None] = loop.advance

        def watched(*arguments: Any) -> None:
            step, interval = trainer.global_step, trainer.log_every_n_steps  # type: ignore[attr-defined]
            if step == 0 or (step + 1) % interval == 0:
                return advance(*arguments)
            with self.refused():
                advance(*arguments)
            QUIET.append(step)
            return None

        loop.advance = watched  # type: ignore[method-assign]

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert QUIET


class NoWaits(NoReads):
    """Refuses in the same steps what makes the host wait for a GPU, copies to it included."""

    refused = staticmethod(no_waits)
