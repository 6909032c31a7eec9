"""A run's record tells later what was run."""

import json
import os
import subprocess
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning
import lightning as L
import pytest
import torch
import yaml

from trunkline import __version__
from trunkline.datamodules.base import TrunklineDataModule
from trunkline.pipelines import record
from trunkline.pipelines.cli import main
from trunkline.pipelines.record import RunRecord, device_name, git_state, packages

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
    assert "the data is not" not in "".join(capsys.readouterr())

    Path("small.yaml").write_text(SMALL.replace("max_epochs: 1", "max_epochs: 3"))
    with pytest.warns(UserWarning, match=r"it differs in data\.augmentation \(digest"):
        main([*FIT, "--name", "mine", "--resume", "auto", "--data.augmentation.hflip", "0.5"])
    assert read(run, "record.json") == first
    assert read(run, "record_3.json")["data"]["digest"] != first["data"]["digest"]
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


# --- a resume with other data


@dataclass(kw_only=True, eq=False, repr=False)
class Told(TrunklineDataModule):
    """Data that differs from other data by what it is told."""

    train: str = "a"
    val: str = "b"

    def data_key(self) -> dict[str, Any]:
        return {"train": self.train, "val": self.val}


def start(
    number: int, data: L.LightningDataModule, folder: Path, first: bool = True, resumed: bool = True, **entry: Any
) -> tuple[dict[str, Any], list[str]]:
    """What the record of a run's start number 1, 2, … says about the data, and what warnings there were.

    `entry` are changes of that record afterwards.
    """
    name = "" if number == 1 else f"_{number}"
    (folder / f"config{name}.yaml").touch()
    file = folder / f"record{name}.json"
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    ranks = {"global_rank": 1 - first, "world_size": 1, "is_global_zero": first}
    trainer: Any = SimpleNamespace(datamodule=data, fast_dev_run=False, precision="32-true", strategy=strategy, **ranks)
    checkpoint = folder / "checkpoints" / "step=4.ckpt" if resumed else None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        RunRecord(file, [], checkpoint).on_fit_start(trainer, L.LightningModule())
    said = [str(warning.message) for warning in caught if "the data" in str(warning.message)]
    if not first:
        return {}, said
    found = json.loads(file.read_text())
    changed = {name: value for name, value in (found["data"] | entry).items() if value is not None}
    file.write_text(json.dumps(found | {"data": changed}))
    return found["data"], said


def test_a_resume_with_other_data_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "step_in", lambda file: 4)
    before, said = start(1, Told(), tmp_path, resumed=False)
    assert said == []
    assert start(2, Told(), tmp_path) == (before, [])
    assert start(3, Told(val="c"), tmp_path, first=False) == ({}, [])
    now, (said,) = start(3, Told(val="c"), tmp_path)
    digests = f"(digest {before['digest'][:8]} in {tmp_path / 'record_2.json'}, now {now['digest'][:8]})"
    assert said.startswith(
        f"the data is not what it was when this run last started: it differs in val, data.val {digests}"
    )
    assert "this resume is not exact" in said
    assert "restore the data, and resume again" in said
    assert read(tmp_path, "record.json")["data"] == read(tmp_path, "record_2.json")["data"] == before
    assert start(4, Told(val="c"), tmp_path)[1] == []  # with the data of the last start
    assert len(start(5, Told(train="c"), tmp_path)[1]) == 1
    assert start(6, Told(), tmp_path, resumed=False)[1] == []  # a new run


def test_records_that_cannot_be_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of older versions, and what is no record."""
    monkeypatch.setattr(record, "step_in", lambda file: 4)
    start(1, Told(), tmp_path, resumed=False, format=None, parts=None)
    assert start(2, Told(val="c"), tmp_path, format=1)[1] == []
    assert start(3, Told(), tmp_path, digest=None, format=None, parts=None)[1] == []
    assert start(4, L.LightningDataModule(), tmp_path)[1] == []
    (tmp_path / "record_3.json").write_text("{ torn")
    (tmp_path / "record_4.json").unlink()
    assert start(5, Told(), tmp_path)[1] == []
    (tmp_path / "record_5.json").write_text("[]")
    assert start(6, Told(val="d"), tmp_path)[1] == []
    assert len(start(7, Told(), tmp_path)[1]) == 1
    start(8, Told(), tmp_path, digest=None, parts={})  # own data, which has a `data_key` only now
    assert start(9, Told(val="d"), tmp_path)[1] == []


def test_fields_of_another_version_are_no_other_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "step_in", lambda file: 4)
    now, _ = start(1, Told(), tmp_path, resumed=False)
    fields = {name: value for name, value in now["parts"]["settings"].items() if name != "seed"} | {"gone": 3}
    start(1, Told(), tmp_path, resumed=False, parts={**now["parts"], "settings": fields}, digest="0123")
    assert start(2, Told(), tmp_path)[1] == []


def test_a_digest_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says that the data differs, and not in what."""
    monkeypatch.setattr(record, "step_in", lambda file: 4)
    start(1, Told(), tmp_path, resumed=False, digest="0123456789")
    (said,) = start(2, Told(), tmp_path)[1]
    assert ": it differs (digest 01234567 in " in said
