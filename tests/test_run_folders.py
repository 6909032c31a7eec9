"""What a folder of runs stands for, whatever the times of its files."""

import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from trunkline import TrunklineError
from trunkline.files import digest, digest_file
from trunkline.modules.training.checkpoints import SafeCheckpointIO
from trunkline.pipelines.runs import choose_run
from trunkline.run_folders import checkpoints_in, find_checkpoint, is_checkpoint, newest_first, newest_valid
from trunkline.seal import seal_folder

IO = SafeCheckpointIO()


def save(path: Path, step: int, best: str | None = None) -> Path:
    """A checkpoint of a step, which knows the best one of its run."""
    by_step = {"monitor": "step", "best_model_path": f"somewhere/else/step={step}.ckpt"}
    by_score = {"monitor": "val/acc", "best_model_path": f"somewhere/else/{best}.ckpt"}
    callbacks = {"steps": by_step, **({} if best is None else {"scores": by_score})}
    IO.save_checkpoint({"global_step": step, "callbacks": callbacks}, path)
    return path


def test_the_step_decides_not_the_time(tmp_path: Path) -> None:
    """As after a copy without times: the one with fewer steps is the younger file."""
    last, older = save(tmp_path / "checkpoints/last.ckpt", 855), save(tmp_path / "checkpoints/step=500.ckpt", 500)
    os.utime(last, (1, 1))
    assert newest_valid(tmp_path) == (last, [])
    last.unlink()
    assert newest_valid(tmp_path) == (older, [])


def test_of_equal_steps_the_last_saved(tmp_path: Path) -> None:
    """It has also finished the validation or the epoch at that step."""
    names = ["step=9", "best", "last"]
    for name in names:
        os.utime(save(tmp_path / f"{name}.ckpt", 9), (9 - len(name), 9 - len(name)))
    assert newest_valid(tmp_path)[0] == tmp_path / "last.ckpt"


def test_what_is_no_valid_checkpoint(tmp_path: Path) -> None:
    IO.save_checkpoint({"weights": 1}, tmp_path / "a.ckpt")
    (tmp_path / "b.ckpt").write_text("text")
    torch.save({"global_step": 8}, tmp_path / "c.ckpt")
    found, faults = newest_valid(tmp_path)
    assert found is None
    text = "; ".join(faults)
    assert len(faults) == 3
    for words in ("a.ckpt is of no training run: it holds no step", "b.ckpt cannot be checked", "c.ckpt cannot be che"):
        assert words in text


def write_old(path: Path, step: int) -> None:
    """A checkpoint of an older version, with its digest beside it."""
    path.parent.mkdir(parents=True)
    torch.save({"global_step": step}, path)
    digest_file(path).write_text(digest(path))


def test_runs_are_ordered_by_what_copying_keeps(tmp_path: Path) -> None:
    """By the last save, also of a run that began earlier; an older version's by its name, else by its files' times."""
    for age, name in enumerate(["2026-01-02_03-04-05", "2020-01-01_00-00-00.2", "mine"]):
        write_old(tmp_path / "source" / name / "checkpoints/last.ckpt", 9 - age)
        os.utime(tmp_path / "source" / name / "checkpoints/last.ckpt", (age, age))
    assert [run.name[:4] for run in newest_first(tmp_path / "source")] == ["2026", "2020", "mine"]
    for name in ("resumed", "2026-01-02_03-04-05"):
        save(tmp_path / "source" / name / "checkpoints/step=1.ckpt", 1)
    shutil.copytree(tmp_path / "source", tmp_path / "runs", copy_function=shutil.copyfile)
    assert [run.name[:7] for run in newest_first(tmp_path / "runs")] == ["2026-01", "resumed", "2020-01", "mine"]
    (tmp_path / "runs/notes").mkdir()
    assert len(newest_first(tmp_path / "runs")) == 4


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    for run in ("gpt/demo/one", "gpt/demo/two"):
        folder = tmp_path / "runs" / run / "checkpoints"
        save(folder / "best.ckpt", 5)
        save(folder / "last.ckpt", 9, best="best")
    return tmp_path / "runs"


@pytest.mark.parametrize("name", ["gpt/demo/two/checkpoints", "gpt/demo/two", "gpt/demo", "gpt", "."])
def test_a_folder_stands_for_the_best_checkpoint_of_its_newest_run(name: str, runs: Path) -> None:
    two = runs / "gpt/demo/two/checkpoints"
    assert find_checkpoint(runs / name) == two / "best.ckpt"
    assert find_checkpoint(two / "last.ckpt") == two / "last.ckpt"
    (two / "best.ckpt").unlink()
    assert find_checkpoint(runs / name) == two / "last.ckpt"
    save(two / "last.ckpt", 9)  # of a run without a monitored metric
    save(two / "best.ckpt", 5)
    assert find_checkpoint(runs / name) == two / "last.ckpt"


def test_folders_without_a_checkpoint(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "pictures/cat").mkdir(parents=True)
    with pytest.raises(TrunklineError, match=r"the folder .*pictures holds no checkpoint of a run; give") as caught:
        find_checkpoint(tmp_path / "pictures", "checkpoint")
    assert caught.value.field == "checkpoint"
    assert find_checkpoint(tmp_path / "pictures", other="config.json") == tmp_path / "pictures"
    (runs / "config.json").touch()
    assert find_checkpoint(runs, other="config.json") == runs
    for path in (runs / "gpt/demo/two/checkpoints").iterdir():
        path.write_bytes(b"X" + path.read_bytes()[1:])
    with pytest.raises(TrunklineError, match=re.escape(f"{runs / 'gpt/demo/two'} holds no valid checkpoint: ")):
        find_checkpoint(runs)
    assert find_checkpoint(str(tmp_path / "none.ckpt")) == tmp_path / "none.ckpt"


def save_in_parts(path: Path, step: int) -> Path:
    """A checkpoint that several processes wrote, each its part, in a folder."""
    path.mkdir(parents=True)
    torch.save({"global_step": step, "callbacks": {}}, path / "meta.pt")
    for rank in range(2):
        (path / f"__{rank}_0.distcp").write_bytes(bytes(9))
    seal_folder(path)
    return path


def test_a_checkpoint_may_be_a_folder(tmp_path: Path) -> None:
    """It is one checkpoint, stands for itself, and is valid only with all its parts as they were saved."""
    run = tmp_path / "runs/gpt/demo/one"
    older, newer = (save_in_parts(run / f"checkpoints/step={step}.ckpt", step) for step in (5, 9))
    save(run / "checkpoints/step=3.ckpt", 3)
    assert is_checkpoint(newer)
    assert not is_checkpoint(run)
    assert newest_valid(run) == (newer, [])
    assert find_checkpoint(newer) == newer
    assert find_checkpoint(tmp_path / "runs") == newer
    assert choose_run(tmp_path / "runs", "gpt/demo", str(newer)) == (run, newer, [])
    assert choose_run(tmp_path / "runs", "gpt/demo", "auto") == (run, newer, [])
    (newer / "inner.ckpt").touch()  # is no checkpoint of its own
    assert len(list(checkpoints_in(run))) == 3
    (newer / "__1_0.distcp").write_bytes(bytes(8))
    found, (fault,) = newest_valid(run)
    assert found == older
    assert f"{newer} is damaged" in fault
    (older / "SHA256SUMS").unlink()  # as a kill leaves it before it is sealed
    found, faults = newest_valid(run)
    assert found == run / "checkpoints/step=3.ckpt"
    assert len(faults) == 2


def test_reading_steps_runs_no_code(tmp_path: Path) -> None:
    trace = tmp_path / "trace"

    class Hostile:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (trace,)

    torch.save({"global_step": Hostile()}, tmp_path / "a.ckpt")
    assert newest_valid(tmp_path)[0] is None
    assert not trace.exists()
