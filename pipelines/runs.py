"""Run folders: `runs/<recipe>/<time>/` with the resolved config, checkpoints and event files."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from itertools import count, takewhile
from pathlib import Path, PurePath
from typing import Any

from trunkline import TrunklineError
from trunkline.files import find_fault
from trunkline.pipelines.launch import agree, attempt_mark, command_mark, find_peers, is_first_process, may_be_restarted
from trunkline.pipelines.reachable import check_first_process
from trunkline.pipelines.run_lock import MARK, held
from trunkline.run_folders import (
    DEPTH,
    TIME_FORMAT,
    checkpoints_in,
    is_checkpoint,
    is_run,
    last_saved,
    newest_first,
    newest_valid,
)

RUN = "TRUNKLINE_RUN"
"""Environment variable with the name of a new run's folder."""
CHOSEN = "TRUNKLINE_CHOSEN"
"""Environment variable with what a process has chosen, for the processes that Lightning starts from it."""


@contextmanager
def forgotten_run() -> Iterator[None]:
    """Remove the choice of a run from the environment when the run ends; its processes inherit it from there."""
    inherited = {name: os.environ[name] for name in (RUN, CHOSEN) if name in os.environ}
    try:
        yield
    finally:
        for name in (RUN, CHOSEN):
            os.environ.pop(name, None)
        os.environ.update(inherited)


def claim_run(
    stack: ExitStack, root: Path, recipe: str, resume: str | None, nodes: int = 1, devices: Any = 1
) -> tuple[Path, Path | None, list[str]]:
    """Choose a run as `choose_run` does, and hold its folder until `stack` is closed.

    The first process of a launch does this, and tells the others what it chose, or what stands in the way.

    Args:
        stack: holds the folder, and what connects the processes.
        root: folder of all runs.
        recipe: name of the recipe.
        resume: see `choose_run`.
        nodes: see `find_peers`.
        devices: see there.

    Raises:
        TrunklineError: also if another process trains that run, or if the folder cannot be made.
    """
    check_name(recipe)

    def choose() -> list[Any]:
        folder, checkpoint, faults = _choose_and_hold(stack, root, recipe, resume)
        return [str(folder), checkpoint and str(checkpoint), faults]

    inherited = None if is_first_process() else json.loads(os.environ.get(CHOSEN, "null"))
    if inherited and inherited["process"] in (os.getppid(), os.getpid()):  # whose process Lightning has started
        found = inherited["found"]
    elif peers := find_peers(nodes, devices):
        check_first_process(peers)
        found = agree(stack, peers, choose)
    elif is_first_process():
        found = choose()
    else:
        return _unled(root, recipe, resume)
    os.environ[CHOSEN] = json.dumps({"process": os.getpid(), "found": found})
    folder, checkpoint, faults = found
    return Path(folder), checkpoint and Path(checkpoint), faults


def _choose_and_hold(
    stack: ExitStack, root: Path, recipe: str, resume: str | None
) -> tuple[Path, Path | None, list[str]]:
    while True:
        named = RUN in os.environ
        folder, checkpoint, faults = choose_run(root, recipe, resume)
        # A folder without a checkpoint may be there only if it has this name already, or is of an earlier attempt.
        unused = checkpoint is None and not named and os.environ.get(RUN) == folder.name
        try:
            stack.enter_context(held(folder, unused, [mark for mark in (attempt_mark(), command_mark()) if mark]))
        except FileExistsError:  # another run took the name in this very second
            os.environ.pop(RUN, None)
            continue
        return folder, checkpoint, faults


def _unled(root: Path, recipe: str, resume: str | None) -> tuple[Path, Path | None, list[str]]:
    """What a process finds whose first process is not known: a run that is there already."""
    named = RUN in os.environ
    found = choose_run(root, recipe, resume)
    if found[1] is None and not named:
        raise TrunklineError(
            "the environment says that this is not the first process of the run, but not where that one is; set "
            "MASTER_ADDR, MASTER_PORT, RANK and WORLD_SIZE for each process, or start them with torchrun or srun",
            "trainer.num_nodes",
        )
    return found


def remove_run(folder: Path, root: Path) -> None:
    """Remove the folder of a run that failed before its first step, and parents below `root` that hold nothing else."""
    if not is_first_process() or next(checkpoints_in(folder), None):
        return
    shutil.rmtree(folder, ignore_errors=True)
    for parent in takewhile(lambda parent: parent.is_relative_to(root), folder.parents):
        with suppress(OSError):  # it holds other runs
            parent.rmdir()


def choose_run(root: Path, recipe: str, resume: str | None) -> tuple[Path, Path | None, list[str]]:
    """Choose the folder of a training run, and the checkpoint that it resumes from.

    Args:
        root: folder of all runs.
        recipe: name of the recipe.
        resume: None starts a new run; `auto` resumes the newest run of the recipe with a valid checkpoint, or starts a
            new one; a run's folder or a checkpoint resumes that run; a folder of runs means the newest of them. What is
            started again (see `attempt_mark`) goes on with its own earlier attempt. Another job of SLURM, whose script
            always says `auto`, takes only a run that had the same command line: two jobs that differ in one flag never
            go on with each other's weights.

    Returns:
        The run's folder, the checkpoint or None, and what is wrong with newer checkpoints.

    Raises:
        TrunklineError: if `resume` names nothing that can be resumed.
    """
    if resume is None:
        return _new_run(root / recipe), None, []
    if resume == "auto":
        own = _own_attempt(root / recipe)
        same = MARK + command_mark() if os.environ.get("SLURM_JOB_ID") else ""
        found = _newest(root / recipe, holding=same) if own is None else (own, *newest_valid(own))
        if own is not None and found[1] is None and not found[2]:
            return found  # it ended before it saved
        return found if found[1] is not None else (_new_run(root / recipe), None, found[2])
    path = Path(resume)
    if path.is_dir() and not is_checkpoint(path):
        path = path.parent if path.name == "checkpoints" else path
        single = is_run(path) or next(path.glob("*.ckpt"), None) is not None
        found = (path, *newest_valid(path)) if single else _newest(path, DEPTH)
        if found[1] is None:
            reasons = "; ".join(found[2]) or "none at all"
            raise TrunklineError(f"--resume {resume} holds no valid checkpoint: {reasons}")
        return found
    fault = find_fault(path)
    if fault is not None:
        raise TrunklineError(f"--resume {resume}: {fault}; give 'auto', a run's folder or one of its checkpoints")
    return (path.parent.parent if path.parent.name == "checkpoints" else path.parent), path, []


def check_name(recipe: str) -> None:
    """Refuse a recipe's name that would leave the folder of all runs.

    Raises:
        TrunklineError: for an absolute path, or one with `..`.
    """
    path = PurePath(recipe)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise TrunklineError(f"the name {recipe} leaves the folder of all runs; give one such as vit/mine", "name")


def configs(folder: Path) -> Iterator[Path]:
    """Where a run saves its config: `config.yaml`, then `config_2.yaml` and so on, one for each resume."""
    yield folder / "config.yaml"
    yield from (folder / f"config_{number}.yaml" for number in count(2))


def unused_config(folder: Path) -> str:
    """Name of the next config of a run."""
    return next(file.name for file in configs(folder) if not file.exists())


def record_beside(config: Path) -> Path:
    """Where the record of the same start stands: `record.json`, `record_2.json` and so on."""
    return config.with_name(config.name.replace("config", "record", 1)).with_suffix(".json")


def newest_config(folder: Path) -> Path | None:
    """The last config of a run; None if it has none."""
    files = list(takewhile(Path.is_file, configs(folder)))
    return files[-1] if files else None


def _newest(folder: Path, depth: int = 1, holding: str = "") -> tuple[Path, Path | None, list[str]]:
    """The newest run up to `depth` folders below one that has a valid checkpoint, and what is wrong with newer ones.

    Runs without the file `holding` are passed over.
    """
    faults: list[str] = []
    for run in newest_first(folder, depth):
        if not (run / holding).exists():
            continue
        checkpoint, skipped = newest_valid(run)
        faults += skipped
        if checkpoint is not None:
            return run, checkpoint, faults
    return folder, None, faults


def _own_attempt(folder: Path) -> Path | None:
    """The run that an earlier attempt of this job has trained, whatever others are newer; None if there is none."""
    mark = attempt_mark()
    if mark is None or not may_be_restarted():
        return None
    found = [file.parent for file in folder.glob(f"*/{MARK}{mark}")]
    return max(found, key=last_saved, default=None)


def _new_run(folder: Path) -> Path:
    """Path of a new run's folder.

    Raises:
        TrunklineError: if the environment names one that holds checkpoints.
    """
    if RUN not in os.environ:
        os.environ[RUN] = _unused(folder, datetime.now().strftime(TIME_FORMAT))
    run = folder / os.environ[RUN]
    if next(checkpoints_in(run), None) is not None:
        raise TrunklineError(
            f"{run} holds checkpoints, which a new run would overwrite; go on from them with resume={run}, or choose "
            f"another name in the environment variable {RUN}",
            "resume",
        )
    return run


def _unused(folder: Path, name: str) -> str:
    """The name, with a number if a run that started in the same second already has it."""
    number = 1
    while (folder / (name if number == 1 else f"{name}.{number}")).exists():
        number += 1
    return name if number == 1 else f"{name}.{number}"
