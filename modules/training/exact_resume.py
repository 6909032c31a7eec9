"""All that touches names that Lightning keeps to itself, most of it for the exact resume.

Lightning may change these names in any release, so pyproject.toml allows the tested minor version alone, and
`tests/modules/training/test_exact_resume.py` fails where one of them is missing or means something else.
"""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.plugins.precision import Precision


def accumulates(trainer: L.Trainer) -> bool:
    """Whether the batch that is trained on ends without an optimiser step, because gradients are accumulated."""
    return trainer.fit_loop._should_accumulate()


def correct_step_count(trainer: L.Trainer) -> None:
    """Let loggers count optimiser steps; Lightning's own count for them is one off after some resumes."""
    trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step


def drop_half_done_validation(trainer: L.Trainer) -> None:
    """Take back the validation that `settle_progress` may have put into the counters."""
    trainer.fit_loop.epoch_loop.val_loop.batch_progress.total.reset_on_restart()


def compute_dtype(precision: Precision) -> torch.dtype:
    """The type in which the device multiplies at this precision."""
    # Not Fabric's function of this name, which takes all of the Trainer's precisions for float32.
    from lightning.pytorch.callbacks.throughput_monitor import _plugin_to_compute_dtype

    return _plugin_to_compute_dtype(precision)


def settle_progress(trainer: L.Trainer, saved: dict[str, Any]) -> None:
    """Correct saved counters where Lightning 2.6 would resume from another point than it saved.

    It would lose the gradients of an accumulation that is under way, leave out a validation that was due
    but not done, and count wrongly from the last batch of an epoch on.

    Args:
        trainer: while it saves.
        saved: state of its fit loop, changed in place.
    """
    loop = trainer.fit_loop.epoch_loop
    epochs, batches = saved["epoch_progress"], saved["epoch_loop.batch_progress"]
    ready = batches["current"]["ready"]
    if epochs["current"]["processed"] == epochs["current"]["ready"]:  # the epoch's work is done: the next one follows
        for count in (epochs["current"], epochs["total"]):
            count["completed"] = count["processed"]
        batches.update(current=dict.fromkeys(batches["current"], 0), is_last_batch=False)
    elif loop._should_accumulate():  # the optimiser step begins again, as if saved at the end of the one before
        for count in (batches["current"], batches["total"]):
            first = count["ready"] - ready % trainer.accumulate_grad_batches
            count.update(ready=first, started=first, processed=first, completed=first - 1)
    elif batches["current"]["processed"] == ready > batches["current"]["completed"]:  # the batch's work is done
        due = loop._should_check_val_fx(trainer.fit_loop._data_fetcher)  # type: ignore[arg-type]
        if due or loop._num_ready_batches_reached():
            for count in (batches["current"], batches["total"]):
                count["completed"] += 1
        if due:  # as if saved after the validation has begun
            validation = saved["epoch_loop.val_loop.batch_progress"]
            validation["current"].update(ready=1, started=1, processed=0, completed=0)
            validation["total"]["ready"] += 1
            validation["total"]["started"] += 1
