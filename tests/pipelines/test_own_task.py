"""A task of one's own runs by its class path, without a change to the package (its resume: tests/modules/training)."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import own_task
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from trunkline.pipelines.cli import main

SUPPORT = Path(own_task.__file__).parent
ROOT = SUPPORT.parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a run by the command, in which the files of the task lie."""
    place = tmp_path_factory.mktemp("own")
    for name in ("own_task.py", "own_task.yaml"):
        shutil.copy(SUPPORT / name, place)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        main(["fit", "--config", "own_task.yaml", "--threads", "1"])
    return place


def run_of(folder: Path) -> Path:
    (run,) = (folder / "runs/own_task").iterdir()
    return run


def test_it_learns(folder: Path) -> None:
    events = EventAccumulator(str(run_of(folder))).Reload()
    assert events.Scalars("val/acc")[-1].value > 0.95
    assert events.Scalars("clouds_seen")[-1].value == 4 * 1200
    assert events.Scalars("throughput/clouds_per_sec")[-1].value > 0


def test_its_callback_shows_in_tensorboard(folder: Path) -> None:
    events = EventAccumulator(str(run_of(folder)), size_guidance={"images": 0}).Reload()
    assert [image.step for image in events.Images("val/clouds")] == [20, 40, 60, 80]


def test_its_checkpoint_names_its_classes(folder: Path) -> None:
    content = torch.load(run_of(folder) / "checkpoints/last.ckpt", weights_only=True)
    names = {"objective": "CloudClassifier", "network": "CloudNet", "data": "CloudData"}
    assert content["classes"] == {role: f"own_task.{name}" for role, name in names.items()}
    assert content["hyper_parameters"]["network"]["num_classes"] == 3  # of the data's names


def test_other_commands(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    last = str(run_of(folder) / "checkpoints/last.ckpt")
    main(["validate", "--ckpt_path", last])
    assert "val/acc" in capsys.readouterr().out
    main(
        ["fit", "--config", "own_task.yaml", "--name", "again", "--model.init_from", last, "--trainer.max_epochs", "1"]
    )
    (again,) = (folder / "runs/again").iterdir()
    first = EventAccumulator(str(again)).Reload().Scalars("train/loss")[0].value
    assert first < 0.2  # it goes on from what was learnt


def test_its_module_is_found_beside_the_config(folder: Path) -> None:
    """By the installed command, which knows no path of the tests."""
    command = [Path(sys.executable).with_name("trunkline"), "fit", "--config", "own_task.yaml", "--print_config"]
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, check=False)
    assert "class_path: own_task.CloudClassifier" in done.stdout, done.stderr


def test_it_stays_a_page() -> None:
    assert len(Path(own_task.__file__).read_text().splitlines()) <= 120
