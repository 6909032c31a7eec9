"""Checkpoints that are written while training goes on."""

import copy
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from trunkline import TrunklineError
from trunkline.modules.training.checkpoints import SafeCheckpointIO


class BackgroundCheckpointIO(SafeCheckpointIO):
    """Holds up training only while it copies what to save; a thread of its own writes the copy as `SafeCheckpointIO`.

    One file at a time is written: a save waits for the one before. What training wants removed stays until that file is
    whole, and for good if it cannot be written. Such an error is raised once, by the next call that waits, or after the
    current step (`FailedSaves`). While a file is being written, its copy takes as much memory of the host again.

    Lightning's AsyncCheckpointIO copies accelerators' tensors within their own memory, and tensors that share memory
    one by one; it lets any number of copies wait, removes files at once, and reads files that are not yet written.
    """

    def __init__(self) -> None:
        super().__init__()
        # A thread only while there is a file to write: processes that load data are forked from this one.
        self._thread: futures.ThreadPoolExecutor | None = None
        self._jobs: list[futures.Future[None]] = []
        """A save, then what is to be removed after it."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any | None = None
    ) -> None:
        """Copy the content, and return while it is written.

        Raises:
            TrunklineError: if the save before could not be written.
        """
        self.wait()
        self.start(super().save_checkpoint, snapshot(checkpoint), path, storage_options)

    def start(self, write: Callable[..., None], *arguments: Any) -> None:
        """Write in the thread, after `wait`: for `ShardedStrategy`, whose checkpoints are folders."""
        self._thread = futures.ThreadPoolExecutor(1, "checkpoint")
        self._jobs = [self._thread.submit(write, *arguments)]

    def load_checkpoint(self, path: str | os.PathLike[str], *arguments: Any, **options: Any) -> dict[str, Any]:
        self.wait()
        return super().load_checkpoint(path, *arguments, **options)

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        if self._thread is None:
            super().remove_checkpoint(path)
        else:
            self._jobs.append(self._thread.submit(self._remove_after, self._jobs[0], path))

    def _remove_after(self, save: futures.Future[None], path: str | os.PathLike[str]) -> None:
        if save.exception() is None:
            super().remove_checkpoint(path)

    def wait(self) -> None:
        """Return when the last save is on the disk.

        Raises:
            TrunklineError: if it could not be written.
            RuntimeError: if another process that writes with this one has ended.
        """
        if self._thread is None:
            return
        futures.wait(self._jobs)
        self._thread.shutdown()
        jobs, self._thread, self._jobs = self._jobs, None, []
        for job in jobs:
            job.result()

    def check(self) -> bool:
        """Whether the last save is on the disk; returns at once.

        Raises:
            TrunklineError: if it could not be written.
        """
        done = all(job.done() for job in self._jobs)
        if done:
            self.wait()
        return done

    def teardown(self) -> None:
        handled = sys.exception()
        try:
            self.wait()
        except (TrunklineError, RuntimeError) as error:
            if handled is None:
                raise
            warnings.warn(str(error), stacklevel=2)  # the error that ends the run comes first


class FailedSaves(Callback):
    """Ends training after the step in which a save has failed in the background."""

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        writer = trainer.strategy.checkpoint_io
        if isinstance(writer, BackgroundCheckpointIO):
            writer.check()


def save_and_wait(trainer: L.Trainer, path: Path) -> None:
    """Save the trainer's state; when this returns, in any process, the file is on the disk."""
    trainer.save_checkpoint(path, weights_only=False)
    writer = trainer.strategy.checkpoint_io
    if isinstance(writer, BackgroundCheckpointIO):
        writer.wait()
        trainer.strategy.barrier("save_and_wait")


def snapshot(content: dict[str, Any]) -> dict[str, Any]:
    """A copy, in the memory of the host, that no later change of the original reaches.

    Tensors that share memory share it in the copy too, so that a file does not hold it twice.
    """
    copies: dict[int, Any] = {}
    storages: dict[tuple[torch.device, int, int], torch.UntypedStorage] = {}
    for tensor in _tensors(content):
        storage = tensor.untyped_storage()
        key = (storage.device, storage.data_ptr(), storage.nbytes())
        if key not in storages:
            storages[key] = storage.clone() if storage.device.type == "cpu" else storage.cpu()
        part = torch.empty(0, dtype=tensor.dtype)
        part.set_(storages[key], tensor.storage_offset(), tensor.size(), tensor.stride())
        copies[id(tensor)] = part.requires_grad_(tensor.requires_grad)
    return copy.deepcopy(content, copies)


def _tensors(value: Any) -> Iterator[Tensor]:
    """The plain tensors in nested containers; `deepcopy` itself copies all other kinds well."""
    if type(value) is Tensor:
        plain = value.layout is torch.strided and value.device.type != "meta"
        if plain and not (value.is_quantized or value.is_conj() or value.is_neg()):
            yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
