"""What a run prints while it trains: the overview, and the bar with the time that is left."""

import math
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import batches, classifier, fit, vit

from trunkline.datamodules import ImageData
from trunkline.modules.callbacks import progress
from trunkline.modules.callbacks.progress import BAR, ProgressBar, clock, digits, fitting, overview
from trunkline.modules.callbacks.throughput import Throughput


@pytest.mark.parametrize(
    ("value", "want"),
    [
        (1.876, "1.876"),
        (1.8799, "1.880"),
        (0.12778, "0.1278"),
        (12.345, "12.35"),
        (1234.6, "1235"),
        (3, "3"),
        (2.0, "2.000"),
        (1e-5, "1.000e-05"),
        (math.nan, "nan"),
        ("a", "a"),
    ],
)
def test_digits(value: Any, want: str) -> None:
    assert digits(value) == want


@pytest.mark.parametrize(("seconds", "want"), [(0.4, "0:00"), (59.6, "1:00"), (3599, "59:59"), (7384, "2:03:04")])
def test_clock(seconds: float, want: str) -> None:
    assert clock(seconds) == want


def test_what_does_not_fit_is_left_out() -> None:
    values = {"left": "0:10", "loss": "1.876", "images/s": "900"}
    assert fitting(values, 200) == values
    assert fitting(values, len(", left=0:10, loss=1.876")) == {"left": "0:10", "loss": "1.876"}
    assert fitting(values, 3) == {}


def bar(columns: int, monkeypatch: pytest.MonkeyPatch, steps: float = 190) -> tuple[str, dict[str, Any]]:
    """The line of a bar after 19 of 190 steps, which took 20 s, and the values in it."""
    monkeypatch.setattr(progress.shutil, "get_terminal_size", lambda *_, **__: os.terminal_size((columns, 24)))
    monkeypatch.setattr(progress.time, "monotonic", lambda: 120.0)
    speed = Throughput()
    speed.per_second = 1384.2
    metrics = {"v_num": 0, "val/acc": 0.12778}
    trainer: Any = SimpleNamespace(
        callbacks=[speed], global_step=29, estimated_stepping_batches=steps, current_epoch=11, max_epochs=45
    )
    trainer.max_steps, trainer.progress_bar_metrics, trainer.loggers = -1, metrics, []
    trainer.num_training_batches, trainer.is_global_zero, trainer.lightning_module = 19, True, None
    shown = ProgressBar()
    shown.setup(trainer, None, "fit")  # type: ignore[arg-type]
    shown._train_progress_bar = shown.init_train_tqdm()
    shown.started, shown.first_step, shown.loss = 100.0, 10, {"train/loss": 1.8759}
    shown.on_train_epoch_start(trainer)
    found = shown.get_metrics(trainer, SimpleNamespace(unit="images"))  # type: ignore[arg-type]
    shown.train_progress_bar.set_postfix(found)
    line = str(shown.train_progress_bar)
    shown.train_progress_bar.close()
    return line, found


def test_the_bar_has_the_time_left_of_the_whole_run(monkeypatch: pytest.MonkeyPatch) -> None:
    line, found = bar(200, monkeypatch)
    assert found == {"left": "2:49", "loss": "1.876", "val/acc": "0.1278", "images/s": "1384"}  # 161 steps of 20/19 s
    assert line.startswith("Epoch 12/45 |" + " " * BAR + "| 0/19, left=2:49, loss=1.876, ")


def test_the_bar_keeps_its_width(monkeypatch: pytest.MonkeyPatch) -> None:
    line, found = bar(80, monkeypatch)
    assert "|" + " " * BAR + "|" in line
    assert len(line) < 80
    assert list(found) == ["left", "loss", "val/acc"]
    assert len(bar(40, monkeypatch)[0]) < 40


def test_a_run_without_end_has_no_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "left" not in bar(200, monkeypatch, steps=math.inf)[1]


def test_the_loss_is_that_of_the_last_logged_step(tmp_path: Path) -> None:
    seen: list[float] = []

    class Watched(ProgressBar):
        def on_train_batch_end(self, trainer: Any, *rest: Any) -> None:
            super().on_train_batch_end(trainer, *rest)
            seen.append(self.loss["train/loss"] == float(trainer.callback_metrics["train/loss"]))

    fit(classifier(), tmp_path, batches(7), callbacks=[Watched()], enable_progress_bar=True, log_every_n_steps=3)
    assert seen == [True, False, True, False, False, True, False]


def test_the_overview(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = classifier(vit(depth=2), freeze_blocks=1)
    trainer = fit(model, tmp_path / "runs", batches(1))
    data = ImageData("digits", image_size=8, channels=1)
    data.setup("fit")
    trainer.datamodule = data  # type: ignore[attr-defined]
    count = sum(p.numel() for p in model.network.parameters())
    learning = sum(p.numel() for p in model.network.parameters() if p.requires_grad)
    assert 0 < learning < count
    assert overview(trainer, model) == [
        ("device", "cpu, precision 32-true"),
        ("network", f"ViT, {count:,} parameters, {learning:,} of them learn"),
        ("data", "digits: 1,257 train, 180 val, 360 test"),
        ("run", "runs"),
    ]
    trainer.datamodule = None  # type: ignore[attr-defined]  # bare loaders
    plain = torch.nn.Linear(2, 3)
    assert [name for name, _ in overview(trainer, plain)] == ["device", "network", "run"]  # type: ignore[arg-type]
