"""A pretended accelerator, whose tensors have no numbers: it shows what a step copies to its device, and waits for."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import lightning as L
import pytest
import torch
from device_reads import INDEXED, NoReads
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from trunkline.modules.training.late import LateReduction

aten = torch.ops.aten
MADE_ON_THE_HOST = {torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor}
"""They write their numbers to the host's memory, then copy them to the device; unlike `torch.full`."""
LAST = 4
"""Steps of a run."""


class BlockingCopy(AssertionError):
    """The host waits until the device has taken a copy, and so until it has done all that came before."""


def refuse_copy(what: Any) -> None:
    places = [f"{frame.filename}:{frame.lineno}" for frame in traceback.extract_stack()[:-2]]
    raise BlockingCopy(f"{what} at {' < '.join(reversed(places[-30:]))}")


def on_host(x: Any) -> bool:
    return isinstance(x, Tensor) and x.device.type == "cpu"


class _Copies(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result, packet = func(*args, **(kwargs or {})), func.overloadpacket
        given = dict(zip((each.name for each in func._schema.arguments), args, strict=False)) | (kwargs or {})
        if packet in (aten._to_copy, aten.copy_) and not given.get("non_blocking"):
            source = args[0] if packet is aten._to_copy else args[1]
            if on_host(source) and not on_host(result):
                refuse_copy(func)
        if packet in INDEXED and not on_host(args[0]) and any(map(on_host, args[1])):
            refuse_copy(func)
        return result


class _Lists(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in MADE_ON_THE_HOST and result.device.type != "cpu":
            content = args[1 if func is Tensor.new_tensor else 0]
            if not isinstance(content, Tensor):
                refuse_copy(func)
        return result


@contextmanager
def no_copies() -> Iterator[None]:
    """Raise `BlockingCopy` where the host copies something to a device and waits for it."""
    with _Lists(), _Copies():
        yield


class Enough(Exception):
    """Ends a run; what usually comes at the end would read results."""


class NoCopies(NoReads):
    """Refuses such copies in all training steps from the second on, and ends the run at the `LAST`."""

    refused = staticmethod(no_copies)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == LAST:
            for metrics in (trainer.callback_metrics, trainer.logged_metrics, trainer.progress_bar_metrics):
                metrics.clear()  # a trainer that ends takes them to the host
            raise Enough


class OnMeta(SingleDeviceStrategy):
    """Trains on the device `meta`."""

    def __init__(self) -> None:
        super().__init__("meta")

    def setup_environment(self) -> None:
        """Without asking the accelerator, which knows no such device."""

    def setup(self, trainer: L.Trainer) -> None:
        super().setup(trainer)
        trainer.fit_loop.epoch_loop.teardown = lambda: None  # type: ignore[method-assign]

    def reduce(self, tensor: Any, *args: Any, **kwargs: Any) -> Tensor:
        """A number that can be read: before the first step Lightning asks whether there are batches."""
        return torch.ones(())

    def teardown(self) -> None:
        """Without taking the module back to the host."""


def pretend(patch: pytest.MonkeyPatch) -> None:
    """Let a step run on `meta`: autocast does not know it, and what `LateReduction` sends never arrives."""
    patch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    patch.setattr(
        LateReduction, "send", lambda late, own: setattr(late, "waiting", (torch.zeros(len(own)), None, None))
    )
