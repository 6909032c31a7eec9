"""Save the last step in a checkpoint when training ends, also when Ctrl-C or SIGTERM ends it."""

import os
import signal
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info

from trunkline.modules.training.background_saves import save_and_wait
from trunkline.modules.training.exact_resume import accumulates


class LastCheckpoint(Callback):
    """Save `checkpoints/last.ckpt` at the end of training, except in a `fast_dev_run`, which only tries the code.

    It must come before a callback that averages weights: that one replaces the trained weights by their average.
    """

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            save_last(trainer)


def save_last(trainer: L.Trainer) -> Path:
    """Save the trainer's state as `checkpoints/last.ckpt`, and return the path when the file is on the disk."""
    path = Path(trainer.default_root_dir) / "checkpoints" / "last.ckpt"
    save_and_wait(trainer, path)
    return path


def between_steps(trainer: L.Trainer) -> bool:
    """Whether a single process has finished a step of training and not begun another; it may be in a validation.

    Other processes may have begun one, and would wait for ever in the saving.
    """
    progress = trainer.fit_loop.epoch_loop.batch_progress.current
    finished = trainer.global_step > 0 and progress.ready == progress.completed
    stage = trainer.training or trainer.validating
    return stage and trainer.world_size == 1 and finished and not accumulates(trainer)


class Stopped(SystemExit):
    """A signal has ended training, after the last step was saved.

    Args:
        code: of the process's end.
        folder: of the run, from which it can be resumed.
    """

    def __init__(self, code: int, folder: str) -> None:
        super().__init__(code)
        self.folder = folder


class GracefulStop(Callback):
    """At a signal, finish the step, save `checkpoints/last.ckpt` and end the run.

    The run exits with 128 + the signal's number. Lightning itself saves nothing on Ctrl-C, and on SIGTERM it exits
    with 0, which a scheduler takes for success. A second signal ends the run at once.

    Args:
        signals: names of the signals to handle.
    """

    def __init__(self, signals: tuple[str, ...] = ("SIGINT", "SIGTERM")) -> None:
        self.signals = [signal.Signals[name] for name in signals]
        self.received = 0
        self.previous: dict[int, Any] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Move this callback to the end, so that others, such as a weight average, finish the step before it saves."""
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        trainer.callbacks = sorted(callbacks, key=lambda c: c is self)  # type: ignore[attr-defined]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Replace Lightning's own signal handlers."""
        self.received = 0
        self.previous = {number: signal.signal(number, self._receive) for number in self.signals}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            self._stop_listening()
            raise KeyboardInterrupt
        self.received = number
        # Not through logging or print: a handler may interrupt either of them.
        os.write(2, f"\n{signal.Signals(number).name}: saving after this step (again to stop at once)\n".encode())

    def _stop_listening(self) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        self.previous = {}

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """If any process has received a signal, save and exit in all processes together."""
        if accumulates(trainer):
            return  # a checkpoint cannot hold accumulated gradients
        if not trainer.strategy.reduce_boolean_decision(self.received > 0, all=False):
            return
        path = save_last(trainer)
        rank_zero_info(f"stopped after step {trainer.global_step}; saved {path}")
        raise Stopped(128 + (self.received or signal.SIGTERM), trainer.default_root_dir)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._stop_listening()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Save the last step if the error came between two steps, such as from a file that cannot be read."""
        self._stop_listening()
        if not isinstance(exception, Exception) or not between_steps(trainer):
            return
        for final in (
            False,
            True,
        ):  # torch raises the loss of a worker anywhere, also in the first save
            try:
                path = save_last(trainer)
            except Exception as error:  # such as a full disk; the first error is the one to report
                if final:
                    rank_zero_info(f"the last step cannot be saved: {error}")
            else:
                rank_zero_info(f"stopped after step {trainer.global_step}; saved {path}")
                return
