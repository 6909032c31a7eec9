"""A tight loop of training in two processes, into which signals are sent, again and again without a new start."""

import itertools
import os
import signal
import socket
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import lightning as L
import machine_settings
import torch
from lightning.pytorch.callbacks import Callback
from recorded_run import CONTEXT
from tiny import classifier, trainer
from torch.utils.data import DataLoader

from trunkline.modules.callbacks.graceful_stop import GracefulStop, Stopped
from trunkline.modules.training.checkpoints import SafeCheckpointIO

LAST = "checkpoints/last.ckpt"


@dataclass
class Ending:
    """How a process ended a run."""

    code: int
    step: int
    """Steps when it ended."""
    received_at: int | None
    """Steps when this process received its signal; None if it received none."""
    seconds: float
    """From that signal to the end, when the checkpoint is saved."""


class Noting(GracefulStop):
    """Notes when the signal came."""

    at: int | None = None
    time = 0.0

    def _receive(self, number: int, frame: Any) -> None:
        if self.at is None and self.trainer is not None:
            self.at, self.time = self.trainer.global_step, time.monotonic()
        super()._receive(number, frame)


class Reporting(Callback):
    """Says when a number of steps is done."""

    def __init__(self, pipe: Connection, steps: int) -> None:
        self.pipe, self.steps = pipe, steps

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.steps:
            self.pipe.send("running")


class Endless(torch.utils.data.IterableDataset[dict[str, torch.Tensor]]):
    """The same few images for ever, or a number of times."""

    def __init__(self, count: int | None = None) -> None:
        self.count = count

    def __iter__(self) -> Any:
        batch = {"image": torch.randn(4, 1, 8, 8), "label": torch.zeros(4, dtype=torch.long)}
        batch["valid"] = torch.ones(4, dtype=torch.bool)
        for _ in itertools.count() if self.count is None else range(self.count):
            yield dict(batch)


class Counted(Endless):
    """Says how many batches it has."""

    def __len__(self) -> int:
        return self.count or 0


def loop(rank: int, port: int, folder: Path, pipe: Connection) -> None:
    """Train again whenever told to, until a signal ends the run."""
    machine_settings.apply()
    names = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "TORCHELASTIC_RUN_ID": "test", "WORLD_SIZE": 2}
    names |= {"LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()})
    while True:
        steps, uneven = pipe.recv()
        stop = Noting()
        options: dict[str, Any] = {"devices": 2, "strategy": "ddp", "plugins": [SafeCheckpointIO()], "max_steps": -1}
        options |= {"max_steps": 6, "val_check_interval": 2, "num_sanity_val_steps": 0} if uneven else {}
        fitted = trainer(folder, callbacks=[Reporting(pipe, steps), stop], **options)
        validation = DataLoader(Counted(2 + 3 * rank), batch_size=None) if uneven else None
        code = 0
        try:
            fitted.fit(classifier(), DataLoader(Endless(), batch_size=None), validation)
        except Stopped as error:
            code = int(error.code or 0)
        stop.stop_listening()
        pipe.send(Ending(code, fitted.global_step, stop.at, time.monotonic() - stop.time))


class Pair:
    """Two processes that train together."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.pipes, self.processes = [], []
        for rank in range(2):
            ours, theirs = CONTEXT.Pipe()
            process = CONTEXT.Process(target=loop, args=(rank, port, folder, theirs))
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, steps: int, ranks: list[int], delay: float, number: int = signal.SIGTERM) -> list[Ending]:
        """Train, send a signal `delay` seconds after a number of steps, and return how each process ended."""
        self.start(steps)
        time.sleep(delay)
        for rank in ranks:
            os.kill(self.processes[rank].pid or 0, number)
        return self.endings()

    def start(self, steps: int, uneven: bool = False) -> None:
        """Begin to train, and return after a number of steps.

        Args:
            steps: the number.
            uneven: train 6 steps, with a validation after every 2, in which the second process has more batches.
        """
        for pipe in self.pipes:
            pipe.send((steps, uneven))
        for pipe in self.pipes:
            assert pipe.poll(120), "no step"
            assert pipe.recv() == "running"

    def endings(self) -> list[Ending]:
        """How each process ends."""
        for pipe in self.pipes:
            assert pipe.poll(60), "deadlock"
        return [pipe.recv() for pipe in self.pipes]

    def end(self) -> None:
        """End both processes."""
        for process in self.processes:
            process.kill()
            process.join()
