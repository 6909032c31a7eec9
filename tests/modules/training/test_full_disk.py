"""A run whose disk becomes full: one message, the checkpoint before is whole, and a resume goes on from it exactly."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from full_disk import FULL, mount_small, umount
from recorded_run import Run
from resumed_run import arguments, assert_same_run, lines, run_to_the_end, write_config

from trunkline.run_folders import newest_valid

FILLED_AT, SAVED_AT = 15, 14
"""Steps of the run when the disk becomes full, and of the checkpoint before."""


@pytest.fixture(scope="module")
def reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run without a fault, on one or two processes."""
    return run_to_the_end(write_config(tmp_path_factory.mktemp("reference")), request.param)


@pytest.fixture
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The kind of disk on which `tmp_path/runs` is."""
    if request.param == "pretended":
        yield request.param
        return
    mount_small(tmp_path / "runs", "16m")
    yield request.param
    umount(tmp_path / "runs")


@pytest.mark.parametrize(
    ("reference", "disk"),
    [
        (1, "small"),
        (2, "pretended"),
        pytest.param(1, "pretended", marks=pytest.mark.slow),
        pytest.param(2, "small", marks=pytest.mark.slow),
    ],
    indirect=True,
)
def test_a_run_whose_disk_becomes_full(disk: str, reference: Path, tmp_path: Path) -> None:
    """The resume has the space again."""
    processes = len(list(reference.glob("rank*.jsonl")))
    config = write_config(tmp_path, logger=True)
    content = yaml.safe_load(config.read_text())
    options = {"folder": str(tmp_path / "runs"), "step": FILLED_AT, "pretended": disk == "pretended"}
    content["trainer"]["callbacks+"].append({"class_path": "full_disk.FullDisk", "init_args": options})
    config.write_text(yaml.safe_dump(content))

    run = Run(arguments(config, processes), tmp_path, processes)
    assert run.wait()[0] == 2, run.output()
    said = " ".join(run.output().split())
    assert said.count("error: cannot write") == 1
    free = r"0\.0 MB" if disk == "small" else r"[\d,.]+ MB"
    file = rf"runs/tiny/\S+/checkpoints/step={SAVED_AT + 2}\.ckpt"
    assert re.search(
        rf"error: cannot write {file} \(needs 0\.1 MB, {free} free there\): No space left on device;", said
    )
    assert "free some space, or choose another run_dir, then resume the run (--run_dir)" in said
    assert "Traceback" not in said
    assert said.count("error: ") == processes  # the other one only says that this one has ended

    (folder,) = (tmp_path / "runs/tiny").iterdir()
    saved = folder / f"checkpoints/step={SAVED_AT}.ckpt"
    assert newest_valid(folder) == (saved, [])
    assert {file.name for file in saved.parent.iterdir()} == {saved.name, "best.ckpt"}

    (tmp_path / "runs" / FULL).unlink(missing_ok=disk == "pretended")
    run = Run(arguments(config, processes, resume=True), tmp_path, processes)
    assert run.wait() == [0] * processes, run.output()
    assert [line["started_at"] for line in lines(tmp_path) if "started_at" in line] == [0, SAVED_AT]
    assert_same_run(tmp_path, reference)
