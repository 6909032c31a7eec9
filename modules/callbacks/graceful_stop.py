"""Save the last step in a checkpoint when training ends, also when a signal ends it."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, WeightAveraging
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.utilities import rank_zero_info

from trunkline.modules.training.background_saves import save_and_wait
from trunkline.modules.training.exact_resume import accumulates, take_signals
from trunkline.modules.training.late import LateReduction
from trunkline.modules.training.slurm import end_without_fault, requeue, slurm_job


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


@contextmanager
def undisturbed_by_workers() -> Iterator[None]:
    """Keep torch from raising that a process that loads data was lost, which it does wherever the signal arrives."""
    if not hasattr(signal, "SIGCHLD") or threading.current_thread() is not threading.main_thread():  # Windows
        yield
        return
    raises = signal.getsignal(signal.SIGCHLD) or signal.SIG_DFL
    for _ in range(2):
        with suppress(RuntimeError):  # a signal that has arrived by now is still handled as before, in this call
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, raises)


class Stopped(SystemExit):
    """A signal has ended a run, after the last step was saved.

    Args:
        code: of the process's end.
        folder: of the run, from which it can be resumed.
    """

    def __init__(self, code: int, folder: str) -> None:
        super().__init__(code)
        self.folder = folder


class GracefulStop(Callback):
    """At a signal, finish the step, save `checkpoints/last.ckpt` and end the run, in all processes at the same step.

    The run exits with 128 + the signal's number: 130 after Ctrl-C, 143 after SIGTERM. After SIGUSR1, by which a
    scheduler announces the end of the time limit, a job of SLURM is also put back into its queue; the exit code is
    138. Lightning itself saves nothing on Ctrl-C, on SIGTERM it exits with 0, which a scheduler takes for success, and
    on SIGUSR1 it saves in the middle of a step.

    Each process tells the others at the end of a batch which signal it has received, and all know it at the end of the
    next one: no process waits, and the run ends at most one step later than if they did. In a validation the run ends
    after a batch: the step before it is saved, and a resume repeats the validation. Before the first step and after
    the last one a signal ends the process at once, because there is nothing to save. A second Ctrl-C does so at any
    time.

    Args:
        signals: names of the signals to handle; if processes receive different ones, the last in this list counts.
    """

    def __init__(self, signals: tuple[str, ...] = ("SIGTERM", "SIGINT", "SIGUSR1")) -> None:
        self.signals = [signal.Signals[name] for name in signals if hasattr(signal, name)]  # Windows has no SIGUSR1
        self.received = 0
        """Position in `signals`, from 1 on, of the signal that this process has received."""
        self.agreed = 0
        """Of the signal at which all processes end."""
        self.previous: dict[int, Any] = {}
        self.process = os.getpid()
        self.trainer: L.Trainer | None = None
        self.steps = False
        """Whether the end of a batch is still to come, after which the run can be saved."""
        self.error: Exception | None = None
        """With which all processes end after this step."""
        self.averaged = False
        """Whether the module holds averaged weights, for a validation."""
        self.news = LateReduction()
        self.shared_batches = 0.0
        """Number of batches that every process has in the current validation."""

    # --- listening

    def listen(self, trainer: L.Trainer) -> None:
        """Replace the handlers of the signals. Training starts this by itself; preparing the data may take long too."""
        take_signals(trainer)
        if self.process != os.getpid():  # a process that a strategy has spawned or forked
            self.previous = {}
        self.trainer, self.process = trainer, os.getpid()
        if not self.previous and threading.current_thread() is threading.main_thread():
            self.previous = {number: signal.signal(number, self._receive) for number in self.signals}

    def stop_listening(self) -> None:
        """Restore the handlers that were there before."""
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        self.previous = {}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self.process:
            return  # a process that loads data inherits the handler
        position = self.signals.index(signal.Signals(number)) + 1
        again = number == signal.SIGINT and self.received == position
        self.received = max(self.received, position)
        if again or not self.steps:
            assert self.trainer is not None
            launcher = self.trainer.strategy.launcher
            if launcher is not None and number != signal.SIGINT:  # a terminal sends Ctrl-C to all processes itself
                launcher.kill(number)
            self._leave(self.trainer, number)
        # Not through logging or print: a handler may interrupt either of them.
        more = " (again to stop at once)" if number == signal.SIGINT else ""
        os.write(2, f"\n{signal.Signals(number).name}: saving after this step{more}\n".encode())

    # --- hooks

    @staticmethod
    def end_all(trainer: L.Trainer, error: Exception) -> None:
        """End the run with an error, after its step is saved if this callback is there.

        Every process must call this at the end of the same batch.
        """
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, GracefulStop):
                callback.error = error
                return
        raise error

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Move this callback to the end, so that others, such as a weight average, finish the step before it saves."""
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        trainer.callbacks = sorted(callbacks, key=lambda c: c is self)  # type: ignore[attr-defined]
        self.listen(trainer)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.received, self.agreed, self.error = 0, 0, None
        self.news, self.steps = LateReduction(), True

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """If a process has received a signal, save and exit in all processes together."""
        self._agree(trainer)
        if not (self.agreed or self.error) or accumulates(trainer):  # a checkpoint cannot hold accumulated gradients
            return
        if self.error is not None:
            rank_zero_info(f"stopped after step {trainer.global_step}; saved {self._save(trainer)}")
            raise self.error
        self._save_and_leave(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Find out how many batches all processes have, because only in these they can agree."""
        if self.steps:
            own = [0.0 if count == float("inf") else count for count in trainer.num_val_batches]
            number = torch.full((1,), -float(sum(own)), device=pl_module.device)
            least = LateReduction()
            least.send(number)
            self.shared_batches = -(least.receive() or [0.0])[0]

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.averaged = True

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.averaged = False

    def on_validation_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any, **__: Any) -> None:
        """As at the end of a training step: a long validation must not use up the time until the scheduler kills."""
        self.shared_batches -= 1
        if self.steps and self.shared_batches >= 0:
            self._agree(trainer)
            if self.agreed and trainer.global_step > 0 and not accumulates(trainer):
                self._save_and_leave(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The last step is saved; end if a signal came since the last time that the processes agreed."""
        self._agree(trainer)
        self.agreed = max(self.agreed, int((self.news.receive() or [0.0])[0]))
        self.steps = False
        if self.agreed:
            self._leave_together(trainer)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.stop_listening()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Save the last step if the error came between two steps, such as from a file that cannot be read."""
        self.steps = False
        if isinstance(exception, Stopped):
            return
        self.stop_listening()
        if not isinstance(exception, Exception) or not between_steps(trainer):
            return
        try:
            path = self._save(trainer)
        except Exception as error:  # such as a full disk; the first error is the one to report
            rank_zero_info(f"the last step cannot be saved: {error}")
        else:
            rank_zero_info(f"stopped after step {trainer.global_step}; saved {path}")

    # --- stopping

    def _agree(self, trainer: L.Trainer) -> None:
        """Tell the other processes what this one has received; set `agreed` to what they said the time before."""
        if trainer.world_size == 1:
            self.agreed = self.received
            return
        own = torch.full((1,), float(self.received), device=trainer.strategy.root_device)
        self.agreed = max(self.agreed, int(self.news.exchange(own)[0]))

    def _save(self, trainer: L.Trainer) -> Path:
        """Save the last step; within a validation, put averaged weights back to their place first."""
        if self.averaged:
            self.averaged = False
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, WeightAveraging):
                    callback.on_validation_epoch_end(trainer, trainer.lightning_module)
        with undisturbed_by_workers():
            return save_last(trainer)

    def _save_and_leave(self, trainer: L.Trainer) -> None:
        path = self._save(trainer)
        rank_zero_info(f"stopped after step {trainer.global_step}; saved {path}")
        self._leave_together(trainer)

    def _leave_together(self, trainer: L.Trainer) -> None:
        end_without_fault()  # before the job is queued again, which may end this process and the script
        environment = getattr(trainer.strategy, "cluster_environment", None)
        # Lightning kills the first process, even while it requeues the job, once one that it started ends with a code.
        quiet = trainer.local_rank > 0 and isinstance(environment, LightningEnvironment)
        self._leave(trainer, self.signals[self.agreed - 1], quiet)

    def _leave(self, trainer: L.Trainer, number: int, quiet: bool = False) -> None:
        """End this process, `quiet` with code 0.

        Raises:
            Stopped: always.
        """
        for other in self.previous:  # nothing is left to do; a scheduler that asks again must not change the exit code
            signal.signal(other, signal.SIG_IGN)
        job = slurm_job()
        if number == getattr(signal, "SIGUSR1", None) and job and trainer.is_global_zero:
            rank_zero_info(requeue(job))
        raise Stopped(0 if quiet else 128 + number, trainer.default_root_dir)
