"""Workers and signals that are sent to all processes of a run: they stay until the training process ends."""

import multiprocessing
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from tiny import classifier, trainer, vit

from trunkline.datamodules import ImageData, workers
from trunkline.modules.callbacks.graceful_stop import GracefulStop, Stopped
from trunkline.modules.training.checkpoints import SafeCheckpointIO

LOOKS = 5
"""So often a worker looks before the test goes on."""


class Flag:
    """Whether the training process ends; each look writes a byte into a pipe."""

    def __init__(self, file: Path) -> None:
        self.file, (self.looks, self.writer) = file, os.pipe()

    @property
    def value(self) -> bool:
        os.write(self.writer, b".")
        return self.file.exists()

    def wait(self, number: int) -> None:
        for _ in range(number):
            assert os.read(self.looks, 1) == b"."


@pytest.fixture
def flag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Flag]:
    """In place of the training process's own, with short times between looks."""
    made = Flag(tmp_path / "ends")
    monkeypatch.setattr(workers, "LOOKS_EVERY", 0.01)
    monkeypatch.setattr(workers, "_ending", lambda process: made)
    yield made
    for end in (made.looks, made.writer):
        os.close(end)


def wait_for_signals(started: Any) -> None:
    workers.worker_start()(0)
    started.set()
    while True:
        signal.pause()


def test_a_worker_stays_until_the_training_process_ends(flag: Flag) -> None:
    context = multiprocessing.get_context("fork")
    started = context.Event()
    worker = context.Process(target=wait_for_signals, args=(started,))
    worker.start()
    try:
        assert started.wait(60)
        for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM):
            os.kill(worker.pid or 0, number)
        flag.wait(LOOKS)
        assert worker.exitcode is None
        flag.file.touch()
        worker.join(60)
        assert worker.exitcode == 0
    finally:
        worker.kill()
        worker.join()


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_python_ends_the_workers_that_are_left(method: str, tmp_path: Path) -> None:
    """It sends a SIGTERM to each at its end, and waits for it."""
    program = multiprocessing.get_context(method).Process(target=leaves_a_worker, args=(method, tmp_path / "pid"))
    program.start()
    program.join(120)
    assert program.exitcode == 0
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def leaves_a_worker(method: str, file: Path) -> None:
    context = multiprocessing.get_context(method)
    started = context.Event()
    worker = context.Process(target=begin_with, args=(workers.worker_start(), started), daemon=True)
    worker.start()
    assert started.wait(60)
    file.write_text(str(worker.pid))


def begin_with(start: Any, started: Any) -> None:
    start(0)
    started.set()
    while True:
        signal.pause()


class Terminated(Callback):
    """In a step, a SIGTERM to the training process and its workers, as a scheduler sends it; the step lasts long."""

    def __init__(self, flag: Flag) -> None:
        self.flag = flag

    def on_before_optimizer_step(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == 3:
            for worker in multiprocessing.active_children():
                os.kill(worker.pid or 0, signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
            self.flag.wait(LOOKS)


class SlowSaves(SafeCheckpointIO):
    def __init__(self, flag: Flag) -> None:
        super().__init__()
        self.flag = flag

    def save_checkpoint(self, *arguments: Any, **options: Any) -> None:
        self.flag.wait(LOOKS)
        super().save_checkpoint(*arguments, **options)


def test_a_long_step_and_a_long_save_are_finished(flag: Flag, tmp_path: Path) -> None:
    data = ImageData(image_size=8, channels=1, batch_size=100, num_workers=1, val_fraction=0.2)
    callbacks = [Terminated(flag), GracefulStop()]
    fitted = trainer(tmp_path, max_epochs=9, callbacks=callbacks, plugins=[SlowSaves(flag)])
    try:
        with pytest.raises(Stopped) as stop:
            fitted.fit(classifier(vit()), datamodule=data)
    finally:
        flag.file.touch()
    assert stop.value.code == 143
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 4
