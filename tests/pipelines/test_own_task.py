"""A task of one's own runs by its class path, without a change to the package (its resume: tests/modules/training)."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import own_task
import pytest
import torch
from PIL import Image, ImageChops
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from trunkline.modules.callbacks.curves import read_curves, read_events
from trunkline.pipelines.cli import main
from trunkline.pipelines.parser import of_own_constructor

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
    assert events.Scalars("throughput/flops_per_sec")[-1].value > 0  # counted, although it has no method for it


def test_its_callback_shows_in_tensorboard(folder: Path) -> None:
    events = EventAccumulator(str(run_of(folder)), size_guidance={"images": 0}).Reload()
    assert [image.step for image in events.Images("val/clouds")] == [20, 40, 60, 80]


def test_its_curves_are_in_the_run_folder(folder: Path, tmp_path: Path) -> None:
    """Those that `trunkline draw` makes of the finished run, over the clouds seen."""
    recorded = read_curves(read_events(run_of(folder)))
    assert recorded.unit == "clouds"
    assert list(recorded.values) == ["loss", "acc"]
    assert list(recorded.values["acc"]["val"]) == [1200, 2400, 3600, 4800]
    main(["draw", str(folder / "runs/own_task"), "--only", "curves", "--output", str(tmp_path / "again.png")])
    again = Image.open(tmp_path / "again.png")
    assert ImageChops.difference(Image.open(run_of(folder) / "curves.png"), again).getbbox() is None


def test_its_checkpoint_names_its_classes(folder: Path) -> None:
    content = torch.load(run_of(folder) / "checkpoints/last.ckpt", weights_only=True)
    names = {"objective": "CloudClassifier", "network": "CloudNet", "data": "CloudData"}
    assert content["classes"] == {role: f"own_task.{name}" for role, name in names.items()}
    assert content["hyper_parameters"]["network"]["num_classes"] == 3  # of the data's names


def test_other_commands(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    last = str(run_of(folder) / "checkpoints/last.ckpt")
    with pytest.raises(SystemExit):  # a file beside a checkpoint does not decide what code runs
        main(["validate", "--ckpt_path", last])
    config = f"{run_of(folder)}/config.yaml"
    assert f"name it: --config {config}" in " ".join(capsys.readouterr().err.split())
    main(["validate", "--ckpt_path", last, "--config", config])
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


MODULES = {
    "needs": "import not_there_at_all",
    "fails": "\nraise RuntimeError('the file is missing')",
    "cut": "def f(:",
    "fine": "class Cloud: pass",
}
FAULTS = [
    ("needs.Cloud", r"importing needs failed at \S*needs\.py, line 1: ModuleNotFoundError: .*'not_there_at_all'"),
    ("fails.Cloud", r"importing fails failed at \S*fails\.py, line 2: RuntimeError: the file is missing"),
    ("cut.Cloud", r"importing cut failed: SyntaxError: .*\(cut\.py, line 1\)"),
    ("fine.Clod", r"the module fine has no class 'Clod'; did you mean 'Cloud'\?"),
    ("nowhere.Cloud", r"there is no module nowhere in this folder"),
]


@pytest.mark.parametrize("place", ["--model", "--trainer.callbacks+", "mine.yaml, line 2"])
@pytest.mark.parametrize(("path", "message"), FAULTS)
def test_what_is_wrong_with_a_module(
    path: str,
    message: str,
    place: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    monkeypatch.setenv("COLUMNS", "500")
    for name, text in MODULES.items():
        (tmp_path / f"{name}.py").write_text(text + "\n")
        monkeypatch.delitem(sys.modules, name, raising=False)
    (tmp_path / "mine.yaml").write_text(f"model:\n  class_path: {path}\n")
    given = [place, path] if place.startswith("--") else ["--config", "mine.yaml"]
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", "vit/digits", *given])
    assert stop.value.code == 2
    said = " ".join(capsys.readouterr().err.split())
    assert re.search(f"error: {re.escape(place.removesuffix('+'))}: {message}", said), said
    for name in MODULES:
        sys.modules.pop(name, None)


def test_a_callback_that_cannot_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its own error with file and line, where the parser would list the types that do not fit."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    monkeypatch.setenv("COLUMNS", "500")
    lines = (
        "from lightning import Callback",
        "class Fussy(Callback):",
        "  def __init__(self): raise ValueError('not today')",
    )
    (tmp_path / "fussy.py").write_text("\n".join(lines) + "\n")
    monkeypatch.delitem(sys.modules, "fussy", raising=False)
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", "vit/digits", "--trainer.callbacks+=fussy.Fussy"])
    assert stop.value.code == 2
    assert re.search(r"error: \S*fussy\.py, line 3: ValueError: not today$", " ".join(capsys.readouterr().err.split()))
    assert not (tmp_path / "runs").exists()
    sys.modules.pop("fussy", None)


def test_it_stays_a_page() -> None:
    assert len(Path(own_task.__file__).read_text().splitlines()) <= 120


@pytest.mark.parametrize("linked", [False, True])
def test_an_error_of_a_library_is_not_of_ones_own_code(
    linked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if the environment is reached by a link, as home folders of clusters often are."""
    if linked:
        (tmp_path / "link").symlink_to(sysconfig.get_path("purelib"))
        monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / "link"))
    with pytest.raises(RuntimeError) as caught:
        torch.nn.Linear(4, -4)
    hidden = ValueError("what jsonargparse says")
    hidden.__cause__ = caught.value
    assert "test_own_task.py, line" in str(of_own_constructor(hidden))
    hidden.__cause__ = caught.value.with_traceback(caught.tb.tb_next)  # without this function
    assert of_own_constructor(hidden) is None
