"""Run folders: `runs/<recipe>/<time>/` with the resolved config, checkpoints and event files."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from itertools import count, takewhile
from pathlib import Path

from trunkline import TrunklineError
from trunkline.files import find_fault
from trunkline.modules.training.checkpoints import newest_valid

RUN = "TRUNKLINE_RUN"
"""Environment variable with the name of a new run's folder."""


@contextmanager
def forgotten_run() -> Iterator[None]:
    """Remove a new run's name from the environment when the run ends; its processes inherit it from there."""
    inherited = RUN in os.environ
    try:
        yield
    finally:
        if not inherited:
            os.environ.pop(RUN, None)


@contextmanager
def removed_if_unused(folder: Path, root: Path) -> Iterator[None]:
    """After an error in the block, remove a run's folder that holds no checkpoint yet, and parents below `root`."""
    try:
        yield
    except BaseException:
        if os.environ.get("LOCAL_RANK", "0") == "0" and folder.is_dir() and not next(folder.rglob("*.ckpt"), None):
            shutil.rmtree(folder, ignore_errors=True)
            for parent in takewhile(lambda parent: parent.is_relative_to(root), folder.parents):
                if any(parent.iterdir()):
                    break
                parent.rmdir()
        raise


def choose_run(root: Path, recipe: str, resume: str | None) -> tuple[Path, Path | None, list[str]]:
    """Choose the folder of a training run, and the checkpoint that it resumes from.

    Args:
        root: folder of all runs.
        recipe: name of the recipe.
        resume: None starts a new run; `auto` resumes the newest run of the recipe with a valid checkpoint, or starts a
            new one; a run's folder or a checkpoint file resumes that run.

    Returns:
        The run's folder, the checkpoint or None, and what is wrong with newer checkpoints.

    Raises:
        TrunklineError: if `resume` names nothing that can be resumed.
    """
    if resume is None:
        return _new_run(root / recipe), None, []
    if resume == "auto":
        faults: list[str] = []
        folders = [f for f in (root / recipe).glob("*") if (f / "checkpoints").is_dir()]
        for folder in sorted(folders, key=_last_written, reverse=True):
            checkpoint, skipped = newest_valid(folder)
            faults += skipped
            if checkpoint is not None:
                return folder, checkpoint, faults
        return _new_run(root / recipe), None, faults
    path = Path(resume)
    if path.is_dir():
        checkpoint, faults = newest_valid(path)
        if checkpoint is None:
            raise TrunklineError(f"--resume {resume} holds no valid checkpoint: {'; '.join(faults) or 'none at all'}")
        return path, checkpoint, faults
    fault = find_fault(path)
    if fault is not None:
        raise TrunklineError(f"--resume {resume}: {fault}; give 'auto', a run's folder or one of its checkpoints")
    return (path.parent.parent if path.parent.name == "checkpoints" else path.parent), path, []


def configs(folder: Path) -> Iterator[Path]:
    """Where a run saves its config: `config.yaml`, then `config_2.yaml` and so on, one for each resume."""
    yield folder / "config.yaml"
    yield from (folder / f"config_{number}.yaml" for number in count(2))


def unused_config(folder: Path) -> str:
    """Name of the next config of a run."""
    return next(file.name for file in configs(folder) if not file.exists())


def newest_config(folder: Path) -> Path | None:
    """The last config of a run; None if it has none."""
    files = list(takewhile(Path.is_file, configs(folder)))
    return files[-1] if files else None


def _new_run(folder: Path) -> Path:
    """Path of a new run's folder, the same in all processes of the run."""
    if RUN not in os.environ:
        # Processes that Lightning starts inherit the variable; processes that a cluster starts share the job's id.
        multiple = int(os.environ.get("SLURM_NTASKS", os.environ.get("WORLD_SIZE", "1"))) > 1
        job = os.environ.get("SLURM_JOB_ID") or os.environ.get("TORCHELASTIC_RUN_ID")
        now = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
        os.environ[RUN] = f"job-{job}" if multiple and job else _unused(folder, now)
    return folder / os.environ[RUN]


def _unused(folder: Path, name: str) -> str:
    """The name, with a number if a run that started in the same second already has it."""
    number = 1
    while (folder / (name if number == 1 else f"{name}.{number}")).exists():
        number += 1
    return name if number == 1 else f"{name}.{number}"


def _last_written(folder: Path) -> int:
    return max((p.stat().st_mtime_ns for p in (folder / "checkpoints").iterdir()), default=0)
