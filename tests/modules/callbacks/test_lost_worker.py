"""A data worker that is killed: one message, and the last step is saved and resumed exactly."""

import os
import signal
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from tiny import classifier, trainer, vit, weights

from trunkline import TrunklineError
from trunkline.datamodules import Augmentation, ImageData, samplers
from trunkline.datamodules.samplers import SampleKey
from trunkline.modules.callbacks import GracefulStop
from trunkline.modules.training.checkpoints import SafeCheckpointIO


class Deadly(torch.utils.data.Dataset[Any]):
    """Digits that kill the process that reads a row of the second epoch, as the kernel does when memory runs out."""

    def __init__(self, rows: Any, deadly: bool) -> None:
        self.rows, self.deadly = rows, deadly

    def __len__(self) -> int:
        return 64

    def __getitem__(self, key: SampleKey) -> Any:
        if self.deadly and key.epoch == 1 and key.index == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.rows[key]


class DeadlyDigits(ImageData):
    deadly = False

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if not isinstance(self.datasets["train"], Deadly):
            self.datasets = {"train": Deadly(self.datasets["train"], self.deadly)}


def run(folder: Path, deadly: bool = False, checkpoint: Path | None = None) -> dict[str, torch.Tensor]:
    data = DeadlyDigits(
        image_size=8, channels=1, batch_size=8, num_workers=1, augmentation=Augmentation((1.0, 1.0)), val_fraction=0
    )
    data.deadly = deadly
    model = classifier(vit())
    fitted = trainer(folder, max_epochs=2, callbacks=[GracefulStop()], plugins=[SafeCheckpointIO()])
    fitted.fit(model, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    assert fitted.global_step == 16
    return weights(model)


class Broken(Callback):
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_step == 6:
            raise RuntimeError("no such metric")


def test_an_error_of_a_validation_loses_no_step(tmp_path: Path) -> None:
    """Such as of a callback that waits for a metric that is never logged."""
    data = ImageData(image_size=8, channels=1, batch_size=200, num_workers=0, val_fraction=0.2)
    callbacks = [Broken(), GracefulStop()]
    fitted = trainer(tmp_path, max_epochs=9, callbacks=callbacks, plugins=[SafeCheckpointIO()], limit_train_batches=3)
    model = classifier(vit())
    with pytest.raises(RuntimeError, match="no such metric"):
        fitted.fit(model, datamodule=data)
    content = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert content["global_step"] == 6
    saved = {name.removeprefix("network."): value for name, value in content["state_dict"].items()}
    assert all(torch.equal(saved[name], value) for name, value in weights(model).items() if name in saved)


def test_a_killed_worker_loses_no_step(tmp_path: Path) -> None:
    with pytest.raises(TrunklineError, match="a process that loads data was killed") as caught:
        run(tmp_path, deadly=True)
    assert caught.value.field == "data.num_workers"
    last = tmp_path / "checkpoints" / "last.ckpt"
    assert 8 <= torch.load(last, weights_only=True)["global_step"] < 16
    resumed, whole = run(tmp_path, checkpoint=last), run(tmp_path)
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_the_signal_of_a_lost_worker_does_not_break_into_the_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may come while the thread is started that writes the file, which then said what Python had lost of it."""
    heard: list[int] = []

    def raises(number: int, frame: Any) -> None:
        heard.append(number)
        raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed.")

    class Interrupted(SafeCheckpointIO):
        def save_checkpoint(self, *arguments: Any, **options: Any) -> None:
            os.kill(os.getpid(), signal.SIGCHLD)
            super().save_checkpoint(*arguments, **options)

    before = signal.signal(signal.SIGCHLD, raises)
    try:
        data = ImageData(image_size=8, channels=1, batch_size=200, num_workers=0, val_fraction=0.2)
        callbacks = [Broken(), GracefulStop()]
        fitted = trainer(tmp_path, max_epochs=9, callbacks=callbacks, plugins=[Interrupted()], limit_train_batches=3)
        with pytest.raises(RuntimeError, match="no such metric"):
            fitted.fit(classifier(vit()), datamodule=data)
        assert signal.getsignal(signal.SIGCHLD) is raises
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert heard == []
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 6


def test_torch_is_heard_out(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[int] = []

    def fails_at_the_third_look() -> None:
        said.append(len(said))
        if len(said) == 3:
            raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed.")

    monkeypatch.setattr(samplers, "_error_if_any_worker_fails", fails_at_the_third_look)
    samplers.hear_torch_out()
    assert said == [0, 1, 2]
