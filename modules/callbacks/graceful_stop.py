"""However a run ends, by itself or by Ctrl-C or SIGTERM, its last step is in a checkpoint."""

import os
import signal
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info

from trunkline.modules.training.exact_resume import accumulates


class LastCheckpoint(Callback):
    """Save `checkpoints/last.ckpt` at the end of training.

    Stands before any averaging of weights, which then replaces the weights that learn by their average.
    """

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the last step's state."""
        save_last(trainer)


def save_last(trainer: L.Trainer) -> Path:
    """Save the state as it is."""
    path = Path(trainer.default_root_dir) / "checkpoints" / "last.ckpt"
    trainer.save_checkpoint(path, weights_only=False)
    return path


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

    The run exits with 128 + the signal's number. Lightning itself saves nothing on Ctrl-C, and exits with 0
    on SIGTERM, which a scheduler takes for success. A second signal ends the run at once.

    Args:
        signals: names of the signals to act on.
    """

    def __init__(self, signals: tuple[str, ...] = ("SIGINT", "SIGTERM")) -> None:
        self.signals = [signal.Signals[name] for name in signals]
        self.received = 0
        self.previous: dict[int, Any] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Stand after the callbacks whose state belongs to a step, such as an average of the weights."""
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        trainer.callbacks = sorted(callbacks, key=lambda c: c is self)  # type: ignore[attr-defined]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Listen, from here on in place of Lightning's own handlers."""
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
        """If any process got a signal, all save and exit together."""
        if accumulates(trainer):
            return  # gradients of half a step are in no checkpoint
        if not trainer.strategy.reduce_boolean_decision(self.received > 0, all=False):
            return
        path = save_last(trainer)
        rank_zero_info(f"stopped after step {trainer.global_step}; saved {path}")
        raise Stopped(128 + (self.received or signal.SIGTERM), trainer.default_root_dir)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Give the signals back."""
        self._stop_listening()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Give the signals back."""
        self._stop_listening()
