"""Training speed: samples and FLOP per second, utilisation, and curves over the samples seen."""

import time
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from trunkline.contract import IGNORE, CountsWaiting
from trunkline.modules.callbacks.drawing import tensorboard
from trunkline.modules.objectives.base import TrunklineModule
from trunkline.modules.training.distributed import sum_over_processes
from trunkline.modules.training.exact_resume import accumulates, compute_dtype
from trunkline.modules.training.peak_speed import peak_speed
from trunkline.modules.training.sharding import group_size, whole_weights

TOLERATED_WAIT = 0.1
"""Share of the time that training may wait for data before it warns."""
JUDGED_INTERVALS = 5
"""Over how many intervals: in a single one, something else may have kept the CPU busy."""


class Throughput(Callback):
    """Logs `throughput/*` each time the trainer logs, and the main curves once more over the samples seen.

    Unlike Lightning's `ThroughputMonitor` it never makes the host wait for the device: over a whole logging interval
    host and device advance together anyway. Time spent in validation does not count.

    Logged: `throughput/<unit>_per_sec` over all processes, where `<unit>` is `images`, `texts`, `audio_seconds`, …;
    `throughput/tokens_per_sec` if the samples hold text (without padding; all processes are assumed to have as many
    tokens as this one); `throughput/flops_per_sec` (FLOP of the model, a backward pass counted as two forward passes;
    those of a sample are taken from the first batch that is logged); `throughput/mfu` if the device's peak is known;
    `throughput/data_wait`, the share of the time in which this process waited for its loader, or made batches itself,
    and a GPU was through with its work before the batch was there;
    `<unit>_seen`, the units of all processes since the start of training; and under `by_<unit>/` the losses and
    metrics with the number of units seen as the x-axis. A unit is a sample, unless the objective has a `unit_size`.

    One warning says what to raise if more than a tenth of five intervals together was waiting for data. The first
    interval does not count, in which workers start and a network compiles. The host queues work for a GPU and may run
    a step ahead of it: what it loads meanwhile costs nothing.
    """

    def __init__(self) -> None:
        self.seen: Tensor | int | None = None
        """Samples of all processes in all optimiser steps so far; None if a checkpoint does not tell."""
        self.seen_before = 0
        """Their number at the start of the interval."""
        self.unfinished: Tensor | int = 0
        """Samples of this process in the optimiser step that is not done yet."""
        self.tokens: Tensor | int = 0
        self.samples_a_step = 0
        """Of a run whose checkpoint does not tell `seen`."""
        self.started = 0.0
        self.loader: Any = None
        """That of the interval: in an epoch there may be a new one."""
        self.waited_before = 0.0
        """Seconds that it was waited for until the last batch."""
        self.waited = 0.0
        """Seconds of the interval in which the device had nothing to do, because training waited for data."""
        self.work: torch.cuda.Event | None = None
        """What a GPU was given last; None on a device that is done when the host is."""
        self.intervals: list[tuple[float, float]] = []
        """Seconds waited and seconds in all, of each interval of this run that was logged, until it warns."""
        self.warned = False
        self.flops: int | None = None
        self.peak: float | None = None
        self.per_second = 0.0
        """Units per second over all processes in the last interval; shown in the progress bar."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.peak = peak_speed(trainer.strategy.root_device, compute_dtype(trainer.precision_plugin))
        self.unfinished = 0
        if trainer.global_step == 0:
            self.seen = 0
        self.intervals, self.warned = [], False
        self.work = event_of(trainer.strategy.root_device)
        self._begin_interval(trainer)

    def _begin_interval(self, trainer: L.Trainer) -> None:
        self._next_wait(trainer)
        self.seen_before = 0 if self.seen is None else int(self.seen)
        self.tokens, self.waited, self.started = 0, 0.0, time.perf_counter()

    def _next_wait(self, trainer: L.Trainer) -> float:
        """Seconds that the loader was waited for since this was asked last."""
        loader = trainer.train_dataloader
        before = self.waited_before if loader is self.loader else 0.0
        self.loader = loader
        self.waited_before = loader.waited if isinstance(loader, CountsWaiting) else 0.0
        return self.waited_before - before

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        waited = self._next_wait(trainer)
        if self.work is None or self.work.query():  # which does not wait for the device
            self.waited += waited

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: L.Trainer, pl_module: TrunklineModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.work is not None:
            self.work.record()
        size = pl_module.batch_size(batch)
        self.unfinished = self.unfinished + size
        if pl_module.unit != "tokens":
            self.tokens = self.tokens + count_tokens(batch)
        if accumulates(trainer):
            return
        step, self.unfinished = sum_over_processes(self.unfinished, trainer.world_size), 0
        step = step // group_size(trainer)  # so many processes have the same samples
        if self.seen is None:
            self.seen = self.seen_before = (trainer.global_step - 1) * (self.samples_a_step or int(step))
        self.seen = self.seen + step
        interval: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if trainer.global_step % interval:
            return
        if self.flops is None:
            with whole_weights(trainer):
                self.flops = flops_of(pl_module, batch) // max(int(size), 1)
        seen = int(self.seen)  # waits for the device, as Lightning does when it logs
        elapsed = time.perf_counter() - self.started
        samples_per_second = (seen - self.seen_before) / elapsed
        self.per_second = samples_per_second * pl_module.unit_size
        metrics = {
            f"throughput/{pl_module.unit}_per_sec": self.per_second,
            f"{pl_module.unit}_seen": seen * pl_module.unit_size,
        }
        if tokens := int(self.tokens):
            metrics["throughput/tokens_per_sec"] = tokens * trainer.world_size / group_size(trainer) / elapsed
        if self.flops:
            metrics["throughput/flops_per_sec"] = samples_per_second * self.flops
        if self.flops and self.peak:
            metrics["throughput/mfu"] = metrics["throughput/flops_per_sec"] / (self.peak * trainer.world_size)
        metrics |= self._data_wait(trainer, elapsed)
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)
        self._log_by_samples(trainer, pl_module, "train/")
        self._begin_interval(trainer)

    def _data_wait(self, trainer: L.Trainer, elapsed: float) -> dict[str, float]:
        """The share of an interval that was waiting for data; empty if the loader does not tell. Warns once."""
        loader = trainer.train_dataloader
        if not isinstance(loader, CountsWaiting):
            return {}
        self.intervals.append((self.waited, elapsed))
        judged = self.intervals[1:][-JUDGED_INTERVALS:]
        share = sum(waited for waited, _ in judged) / max(sum(seconds for _, seconds in judged), 1e-9)
        if len(judged) == JUDGED_INTERVALS and share > TOLERATED_WAIT and not self.warned:
            self.warned = True
            rank_zero_warn(waiting_message(share, loader.num_workers))
        return {"throughput/data_wait": self.waited / elapsed}

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.started -= time.perf_counter()  # stops the clock; `on_validation_end` starts it again

    def on_validation_end(  # type: ignore[override]
        self, trainer: L.Trainer, pl_module: TrunklineModule
    ) -> None:
        self.started += time.perf_counter()
        if not trainer.sanity_checking:
            self._log_by_samples(trainer, pl_module, "val/")

    def state_dict(self) -> dict[str, Any]:
        """The number of samples seen up to the last optimiser step: from there a resumed run goes on."""
        return {"seen": None if self.seen is None else int(self.seen), "samples_a_step": self.samples_a_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seen = state_dict.get("seen")  # older checkpoints have only the samples of a step, which were all alike
        self.samples_a_step = state_dict["samples_a_step"]

    def _log_by_samples(self, trainer: L.Trainer, pl_module: TrunklineModule, prefix: str) -> None:
        writer = tensorboard(trainer)
        if writer is not None:
            seen = trainer.global_step * self.samples_a_step if self.seen is None else int(self.seen)
            for name, value in trainer.callback_metrics.items():
                if name.startswith(prefix):
                    writer.add_scalar(f"by_{pl_module.unit}/{name}", value, int(seen * pl_module.unit_size))


def event_of(device: torch.device) -> torch.cuda.Event | None:
    """An event that tells whether a GPU has done what it was given before; None for another device."""
    return torch.cuda.Event() if device.type == "cuda" else None


def waiting_message(share: float, workers: int) -> str:
    """What to do about a share of the time in which training waited for data."""
    made = "the training process makes its batches itself" if workers == 0 else f"num_workers is {workers}"
    return (
        f"training waits for data in {share:.0%} of the time ({made}): raise num_workers while CPU cores are free; or "
        "make samples cheaper: pictures and recordings stored no larger than training needs them, less augmentation"
    )


def flops_of(module: TrunklineModule, batch: Any) -> int:
    """Floating-point operations of a training step on a batch; 0, and one line that says why, if counting fails."""
    try:
        return module.flops_per_batch(batch)
    except Exception as error:  # a figure is not worth a run, whatever the user's own method raises
        rank_zero_info(f"flops_per_sec is left out: counting failed with {type(error).__name__}: {error}")
        return 0


def count_tokens(batch: dict[str, Tensor]) -> Tensor | int:
    """Number of a batch's tokens without padding, as a tensor on its device; 0 if the batch has no tokens.

    Sources and targets both count. In a batch of sounds the mask is of frames.
    """
    if "features" in batch:
        return 0
    count = batch["mask"].sum() if "mask" in batch else batch["tokens"].numel() if "tokens" in batch else 0
    return count + (batch["targets"] != IGNORE).sum() if "target_tokens" in batch else count
