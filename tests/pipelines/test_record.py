"""A run's record tells later what was run."""

import json
import os
import subprocess
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
import yaml

from trunkline import __version__
from trunkline.pipelines import record
from trunkline.pipelines.cli import main
from trunkline.pipelines.record import device_name, git_state, packages

FIT = ["fit", "--config", "vit/digits", "--config", "small.yaml", "--trainer.accelerator", "cpu"]
SMALL = """
model:
  init_args:
    network: {patch_size: 8, backbone: {dim: 16, depth: 1, num_heads: 2}}
data:
  init_args: {val_fraction: 0.2, test_fraction: 0.6, num_workers: 0}
trainer: {max_epochs: 1, enable_progress_bar: false}
test_with: none
"""


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr("sys.argv", ["trunkline"])
    for variable in ("TRUNKLINE_RUN", "PL_GLOBAL_SEED", "PL_SEED_WORKERS", "GIT_DIR", "GIT_WORK_TREE"):
        monkeypatch.setenv(variable, "")  # so that it is restored
        monkeypatch.delenv(variable)
    (tmp_path / "small.yaml").write_text(SMALL)


@pytest.fixture
def git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Runs git in a repository with one commit."""
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)

    def run(*arguments: str) -> str:
        named = ["-c", "user.name=me", "-c", "user.email=me@example.com"]
        return subprocess.run(
            ["git", *named, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout.strip()

    run("init", "-q")
    run("add", "small.yaml")
    run("commit", "-qm", "start")
    return run


def read(run: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / name).read_text())
    return found


def test_each_start_of_a_run_leaves_a_record(
    git: Callable[..., str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_SECRET_TOKEN", "hunter2")
    before = datetime.now().astimezone().replace(microsecond=0)
    main([*FIT, "--name", "mine"])
    (run,) = Path("runs/mine").iterdir()
    first = read(run, "record.json")
    assert first["command"] == f"trunkline {' '.join(FIT)} --name mine"  # as it was typed, not with long paths
    assert first["folder"] == os.getcwd()
    assert first["git"] == {"commit": git("rev-parse", "HEAD"), "dirty": False}
    assert before <= datetime.fromisoformat(first["started"]) <= datetime.fromisoformat(first["training_started"])
    assert datetime.fromisoformat(first["training_started"]) <= datetime.now().astimezone()
    assert (first["processes"], first["precision"], first["resumed"]) == (1, "32-true", None)
    assert first["hosts"] == [os.uname().nodename]
    assert first["devices"] == [device_name(torch.device("cpu"))]
    assert first["versions"]["trunkline"] == __version__
    installed = first["packages"]
    assert (installed["torch"], installed["lightning"]) == (torch.__version__.partition("+")[0], lightning.__version__)
    assert first["data"]["class"] == "trunkline.datamodules.images.image_data.ImageData"
    assert len(first["data"]["digest"]) == 16
    assert "hunter2" not in (run / "record.json").read_text()
    table = capsys.readouterr().out
    assert f"│ {run} " in table  # whole, in 40 columns
    assert f"│ {run}/checkpoints/last.ckpt " in table

    Path("small.yaml").write_text(SMALL.replace("max_epochs: 1", "max_epochs: 2"))
    main([*FIT, "--name", "mine", "--resume", "auto"])
    again = read(run, "record_2.json")
    assert read(run, "record.json") == first
    assert again["git"] == {"commit": first["git"]["commit"], "dirty": True}
    last = str(run / "checkpoints/last.ckpt")
    assert again["resumed"] == {"checkpoint": last, "step": 5}
    assert again["data"] == first["data"]
    assert yaml.safe_load((run / "config_2.yaml").read_text())["resume"] == "auto"


def test_nothing_is_recorded_of_a_run_that_keeps_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    main([*FIT, "--name", "mine", "--trainer.fast_dev_run", "true"])
    assert list(Path("runs").rglob("*.json")) == []
    assert "│ run " not in capsys.readouterr().out


def test_a_folder_without_a_repository_and_a_machine_without_git(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(Path.cwd().parent))
    assert git_state(Path.cwd()) is None
    monkeypatch.setenv("PATH", "")
    assert git_state(Path.cwd()) is None


def test_a_repository_that_is_slow_to_compare(
    git: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = subprocess.run

    def slow(command: list[str], **options: Any) -> Any:
        if "status" in command:
            raise subprocess.TimeoutExpired(command, options["timeout"])
        return run(command, **options)

    monkeypatch.setattr(record.subprocess, "run", slow)
    assert git_state(tmp_path) == {"commit": git("rev-parse", "HEAD"), "dirty": None}


def test_packages_are_sorted() -> None:
    names = list(packages())
    assert {"torch", "lightning", "numpy"} <= {*names}
    assert names == sorted(names, key=str.lower)
