"""`curves.png`: what is read back from TensorBoard's files, what is drawn, and when the callback draws."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch.utils.data import DataLoader
from written_run import opened, write_scalars

from trunkline.modules.backbone import TransformerConfig
from trunkline.modules.callbacks import Curves, Throughput, curves
from trunkline.modules.callbacks.curves import RunCurves, draw_curves, png_of, read_curves, read_events
from trunkline.modules.networks import GPTConfig
from trunkline.modules.objectives.causal_lm import CausalLM


def read(folder: Path) -> RunCurves:
    return read_curves(read_events(folder))


def test_what_is_read(tmp_path: Path) -> None:
    """Losses and scores over samples, the loss first; no learning rate, and no counts that stay 0."""
    shared = {"by_images/train/lr": {8: 0.1}, "by_images/train/grad_norm": {8: 2.0}, "images_seen": {1: 8.0}}
    zero = {"by_images/train/skipped_images": {8: 0.0, 16: 0.0}, "by_images/val/skipped_images": {16: 0.0}}
    both = {"by_images/train/cut": {8: 0.0}, "by_images/val/cut": {16: 0.5}}
    losses = {"by_images/train/loss": {8: 3.0, 16: 2.0}, "by_images/val/loss": {16: 2.5}, "train/loss": {1: 7.0}}
    write_scalars(tmp_path, {"by_images/val/acc": {16: 0.25}, **shared, **zero, **both, **losses, "test/acc": {2: 1.0}})
    found = read(tmp_path)
    assert found.unit == "images"
    assert list(found.values) == ["loss", "acc", "cut"]
    assert found.values == {
        "loss": {"train": {8: 3.0, 16: 2.0}, "val": {16: 2.5}},
        "acc": {"val": {16: 0.25}},
        "cut": {"train": {8: 0.0}, "val": {16: 0.5}},
    }


def test_steps_that_a_resume_repeats(tmp_path: Path) -> None:
    write_scalars(tmp_path, {"by_tokens/train/loss": {10: 4.0, 20: 3.0, 30: 2.5}}, started=1)
    write_scalars(tmp_path, {"by_tokens/train/loss": {20: 3.25, 25: 2.75}}, started=2)
    found = read(tmp_path)
    assert list(found.values["loss"]["train"].items()) == [(10, 4.0), (20, 3.25), (25, 2.75), (30, 2.5)]


def test_without_samples_the_axis_is_of_steps(tmp_path: Path) -> None:
    write_scalars(tmp_path, {"train/loss": {1: 3.0}, "train/lr": {1: 0.1}, "epoch": {1: 0.0}, "val/acc": {1: 0.5}})
    assert read(tmp_path) == RunCurves("steps", {"loss": {"train": {1: 3.0}}, "acc": {"val": {1: 0.5}}})
    (tmp_path / "empty").mkdir()
    assert read(tmp_path / "empty") == RunCurves("steps", {})


def drawn_lines(figure: Any) -> dict[str, dict[str, tuple[list[float], str]]]:
    """Title of a panel -> label of a line -> its values and its colour."""
    return {
        axes.get_title(): {line.get_label(): (list(line.get_ydata()), line.get_color()) for line in axes.lines}
        for axes in figure.axes
    }


def test_what_is_drawn() -> None:
    one = RunCurves(
        "audio_seconds", {"loss": {"train": {8: 3.0, 16: 2.0}, "val": {16: 2.5}}, "acc": {"val": {16: 0.25}}}
    )
    figure = draw_curves({"": one})
    assert drawn_lines(figure) == {
        "loss": {"train, last 2": ([3.0, 2.0], "C0"), "val, last 2.5": ([2.5], "C1")},
        "acc": {"val, last 0.25": ([0.25], "C1")},
    }
    assert list(figure.axes[0].lines[0].get_xdata()) == [8, 16]
    assert figure.get_supxlabel() == "audio seconds seen"
    assert figure.axes[0].get_legend() is not None


def test_runs_beside_each_other() -> None:
    """A colour for each run, whatever the stage; a score that one of them lacks is that of the other."""
    ours = RunCurves("texts", {"loss": {"train": {8: 1.0}, "val": {8: 1.5}}, "acc": {"val": {8: 0.75}}})
    other = RunCurves("steps", {"loss": {"val": {4: 3.0}}, **{f"score_{n}": {"val": {4: 0.1}} for n in range(2)}})
    figure = draw_curves({"ours": ours, "baseline": other})
    found = drawn_lines(figure)
    assert list(found) == ["loss", "acc", "score_0", "score_1"]  # two rows, and no empty panels
    assert found["loss"] == {
        "ours train, last 1": ([1.0], "C0"),
        "ours val, last 1.5": ([1.5], "C0"),
        "baseline val, last 3": ([3.0], "C1"),
    }
    assert found["acc"] == {"ours val, last 0.75": ([0.75], "C0")}
    assert figure.get_supxlabel() == "texts or steps"
    assert png_of(figure).startswith(b"\x89PNG")


# --- the callback


def fit(folder: Path, logger: Any = None, resume: Path | None = None, **options: Any) -> L.Trainer:
    rows = torch.arange(9).repeat(4, 1, 1) % 11
    batches: Any = DataLoader([{"tokens": r[:, :-1], "targets": r[:, 1:]} for r in rows], batch_size=None)  # type: ignore[arg-type]
    torch.manual_seed(0)
    model = CausalLM(GPTConfig(11, 8, backbone=TransformerConfig(dim=8, depth=1, num_heads=2)))
    trainer = L.Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        logger=TensorBoardLogger(folder, name="", version="") if logger is None else logger,
        callbacks=[Throughput(), Curves(), ModelCheckpoint(folder, "{step}")],
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        log_every_n_steps=2,
        **options,
    )
    trainer.fit(model, batches, batches, ckpt_path=resume)
    return trainer


def test_curves_of_a_run_and_of_its_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[RunCurves] = []

    def witness(runs: dict[str, RunCurves]) -> Any:
        drawn.extend(runs.values())
        return draw_curves(runs)

    monkeypatch.setattr(curves, "draw_curves", witness)
    fit(tmp_path, max_epochs=1)
    first = opened(tmp_path / "curves.png")
    assert first.ndim == 3
    assert drawn[0].unit == "tokens"
    assert list(drawn[0].values["loss"]["train"]) == [16, 32]
    assert list(drawn[0].values["loss"]["val"]) == [32]
    fit(tmp_path, max_epochs=3, resume=tmp_path / "step=4.ckpt")
    assert list(drawn[1].values["loss"]["train"]) == [16, 32, 48, 64, 80, 96]
    assert list(drawn[1].values["loss"]["val"]) == [32, 64, 96]
    assert drawn[1].values["loss"]["train"].items() > drawn[0].values["loss"]["train"].items()
    assert first.tobytes() != opened(tmp_path / "curves.png").tobytes()


@pytest.mark.parametrize("logger", ["csv", "none"])
def test_nothing_is_drawn_without_tensorboard(tmp_path: Path, logger: str) -> None:
    fit(tmp_path, CSVLogger(tmp_path) if logger == "csv" else False, max_epochs=1)
    assert not list(tmp_path.rglob("*.png"))


def test_nothing_is_drawn_without_a_step(tmp_path: Path) -> None:
    fit(tmp_path, max_epochs=0)
    assert not list(tmp_path.rglob("*.png"))


def test_a_picture_that_cannot_be_written_stops_no_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "curves.png").mkdir()
    assert fit(tmp_path, max_epochs=1).state.finished
    assert f"cannot write {tmp_path / 'curves.png'}" in caplog.text
    assert not list(tmp_path.rglob("*.tmp"))
