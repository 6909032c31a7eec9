"""All code of `modules/` and `datamodules/` that uses private names of Lightning; most of it serves the exact resume.

Lightning may change private names in any release. So pyproject.toml allows only the tested minor versions, and
`tests/modules/training/test_exact_resume.py` fails if one of the names is missing or means something else.
"""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, WeightAveraging
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector
from torch.distributed.constants import default_pg_timeout
from torch.optim.swa_utils import AveragedModel

LONGEST_WAIT = timedelta(minutes=5)
"""How long a process waits for another one, unless the strategy in the recipe has a `timeout` of its own."""


def accumulates(trainer: L.Trainer) -> bool:
    """Whether the current batch ends without an optimiser step, because gradients are accumulated."""
    return trainer.fit_loop._should_accumulate()


def correct_step_count(trainer: L.Trainer) -> None:
    """Make loggers count optimiser steps: Lightning's own count is off by one after some resumes."""
    trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step


def drop_half_done_validation(trainer: L.Trainer) -> None:
    """Remove the begun validation that `settle_progress` may have entered into the counters."""
    trainer.fit_loop.epoch_loop.val_loop.batch_progress.total.reset_on_restart()


class _NoRequeuedCheckpoint(_CheckpointConnector):
    """Finds no checkpoint of Lightning's own requeue."""

    _hpc_resume_path = None


def _nothing() -> None:
    pass


def take_signals(trainer: L.Trainer) -> None:
    """Take signals and SLURM's requeue out of Lightning's hands; `GracefulStop` handles them.

    Lightning would save in the middle of a step, communicate inside a handler, which can hang, wait for the device in
    every step to ask whether a signal has come, and resume from a left-over `hpc_ckpt_*.ckpt` that nobody named.
    """
    trainer._signal_connector.register_signal_handlers = _nothing  # type: ignore[method-assign]
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = _nothing  # type: ignore[method-assign]
    trainer._checkpoint_connector.__class__ = _NoRequeuedCheckpoint


def limit_waiting(trainer: L.Trainer) -> None:
    """Let a process that waits for a stopped or unreachable one fail after `LONGEST_WAIT`.

    Torch's own limit is half an hour, in which all other devices of a cluster stand idle.
    """
    strategy: Any = trainer.strategy
    if getattr(strategy, "_timeout", None) == default_pg_timeout:
        strategy._timeout = LONGEST_WAIT


def averages_of(callbacks: Sequence[Callback]) -> list[AveragedModel]:
    """The averages that some of the callbacks hold."""
    copies = [callback._average_model for callback in callbacks if isinstance(callback, WeightAveraging)]
    return [copy for copy in copies if copy is not None]


def averaged_modules(trainer: L.Trainer) -> list[torch.nn.Module]:
    """The copies of the trained module in which callbacks average its weights."""
    return [copy.module for copy in averages_of(trainer.callbacks)]  # type: ignore[attr-defined]


def end_data_workers(trainer: L.Trainer) -> None:
    """End the workers of a run that has failed or was stopped.

    In a validation Lightning would end those of the validation only, and none if it is interrupted: torch raises the
    loss of a worker anywhere. The others would outlive the run by seconds, and their end would replace its exit code.
    """
    for loader in (trainer.fit_loop._combined_loader, trainer.fit_loop.epoch_loop.val_loop._combined_loader):
        if loader is not None:
            loader.reset()


def compute_dtype(precision: Precision) -> torch.dtype:
    """The data type of matrix products at this precision."""
    # Not Fabric's function of this name: it returns float32 for every precision plugin of the Trainer.
    from lightning.pytorch.callbacks.throughput_monitor import _plugin_to_compute_dtype

    return _plugin_to_compute_dtype(precision)


def settle_progress(trainer: L.Trainer, saved: dict[str, Any], entered: tuple[int, int] = (0, 0)) -> None:
    """Correct saved counters where Lightning 2.6 would resume from another point than the saved one.

    Without this it would lose the gradients of an unfinished accumulation, skip a validation that was due but not done,
    count wrongly after the last batch of an epoch, and leave out the rest of an epoch in which `max_steps`, `max_time`
    or a callback ended the run.

    Args:
        trainer: the trainer that is saving.
        saved: state of its fit loop, changed in place.
        entered: epoch and batch with which the trainer began.
    """
    loop = trainer.fit_loop.epoch_loop
    epochs, batches = saved["epoch_progress"], saved["epoch_loop.batch_progress"]
    ready = batches["current"]["ready"]
    if epochs["current"]["processed"] == epochs["current"]["ready"] and not loop._num_ready_batches_reached():
        for count in (epochs["current"], epochs["total"]):  # the run ended, but not the epoch
            count.update(processed=count["ready"] - 1, completed=count["ready"] - 1)
    if epochs["current"]["processed"] == epochs["current"]["ready"]:  # the epoch is done: resume with the next
        for count in (epochs["current"], epochs["total"]):
            count["completed"] = count["processed"]
        batches.update(current=dict.fromkeys(batches["current"], 0), is_last_batch=False)
    elif loop._should_accumulate():  # repeat the step from its first batch, as if saved at the end of the step before
        begun = ready % trainer.accumulate_grad_batches
        if entered[0] == epochs["current"]["processed"]:  # after a resume with other batches, amid an accumulation
            begun = min(begun, ready - entered[1])
        for count in (batches["current"], batches["total"]):
            first = count["ready"] - begun
            count.update(ready=first, started=first, processed=first, completed=first - 1)
    elif batches["current"]["processed"] == ready > batches["current"]["completed"]:  # the batch is done
        due = loop._should_check_val_fx(trainer.fit_loop._data_fetcher)  # type: ignore[arg-type]
        if due or loop._num_ready_batches_reached():
            for count in (batches["current"], batches["total"]):
                count["completed"] += 1
        if due:  # as if saved just after the validation began
            _begin_validation(saved, done=0)
    elif trainer.validating:
        validation = saved["epoch_loop.val_loop.batch_progress"]
        done = validation["current"]["ready"]
        if done != validation["current"]["completed"] or not validation["is_last_batch"]:  # it is repeated as a whole
            _begin_validation(saved, done)


def move_progress(trainer: L.Trainer, saved: dict[str, Any], batch: int, batches: int) -> None:
    """Set saved counters to another batch of their epoch, because the epoch is cut into other batches now.

    A validation that is due there is still to come, unless the checkpoint was saved just after one.

    Args:
        trainer: the trainer that resumes.
        saved: state of its fit loop, changed in place.
        batch: number of batches that count as done.
        batches: number of batches in an epoch.
    """
    epoch, counts = saved["epoch_progress"]["current"]["processed"], saved["epoch_loop.batch_progress"]
    waits = counts["current"]["ready"] > counts["current"]["completed"]  # for what follows a batch
    due = waits and _validates_at(trainer, epoch, batch, batches)
    for name, done in (("current", batch), ("total", epoch * batches + batch)):
        after = counts[name]["ready"] - counts[name]["completed"] - (due or (waits and batch == batches))
        counts[name].update(ready=done, started=done, processed=done, completed=done - after)
    counts["is_last_batch"] = batch == batches
    if due:
        _begin_validation(saved, done=0)


def _validates_at(trainer: L.Trainer, epoch: int, batch: int, batches: int) -> bool:
    """Whether a validation follows a batch of an epoch."""
    every, interval = trainer.check_val_every_n_epoch, trainer.val_check_interval
    timed = trainer._val_check_time_interval is not None  # type: ignore[attr-defined]
    if batch == 0 or timed or not trainer.enable_validation or (every is not None and (epoch + 1) % every):
        return False
    length = interval if isinstance(interval, int) else max(int(batches * interval), 1)
    return (batch if every is not None else epoch * batches + batch) % length == 0


def _begin_validation(saved: dict[str, Any], done: int) -> None:
    """Set the counters as just after a validation began, of which `done` batches are counted already."""
    counts = saved["epoch_loop.val_loop.batch_progress"]
    before = counts["total"]["ready"] - done
    counts["total"].update(ready=before + 1, started=before + 1, processed=before, completed=before)
    counts["current"].update(ready=1, started=1, processed=0, completed=0)
