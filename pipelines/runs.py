"""Run folders: `runs/<recipe>/<time>/` with the resolved config, checkpoints and event files."""

import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from itertools import count, takewhile
from pathlib import Path, PurePath

from filelock import FileLock, Timeout

from trunkline import TrunklineError
from trunkline.files import cannot_write, find_fault, read_json
from trunkline.run_folders import DEPTH, TIME_FORMAT, is_run, newest_first, newest_valid

RUN = "TRUNKLINE_RUN"
"""Environment variable with the name of a new run's folder."""
LOCK, HOLDER = ".lock", ".running.json"
"""Files in a run's folder: the lock of the process that trains it, and who that is."""
RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "JSM_NAMESPACE_RANK")
"""Environment variables that number the processes of a run, by whoever starts them."""


@contextmanager
def forgotten_run() -> Iterator[None]:
    """Remove a new run's name from the environment when the run ends; its processes inherit it from there."""
    inherited = RUN in os.environ
    try:
        yield
    finally:
        if not inherited:
            os.environ.pop(RUN, None)


def claim_run(stack: ExitStack, root: Path, recipe: str, resume: str | None) -> tuple[Path, Path | None, list[str]]:
    """Choose a run as `choose_run` does, and hold its folder until `stack` is closed.

    Raises:
        TrunklineError: also if another process trains that run, or if the folder cannot be made.
    """
    check_name(recipe)
    while True:
        named = RUN in os.environ or _job() is not None
        folder, checkpoint, faults = choose_run(root, recipe, resume)
        try:
            stack.enter_context(_held(folder, unused=checkpoint is None and not named))
        except FileExistsError:  # another run took the name in this very second
            os.environ.pop(RUN, None)
            continue
        return folder, checkpoint, faults


def holds_nothing(folder: Path) -> bool:
    """Whether a run's folder has no files but those that hold it."""
    return {file.name for file in folder.iterdir()} <= {LOCK, HOLDER} if folder.is_dir() else True


def remove_run(folder: Path, root: Path) -> None:
    """Remove the folder of a run that failed before its first step, and parents below `root` that hold nothing else."""
    if not is_first_process() or next(folder.rglob("*.ckpt"), None):
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
            new one; a run's folder or a checkpoint file resumes that run; a folder of runs means the newest of them.

    Returns:
        The run's folder, the checkpoint or None, and what is wrong with newer checkpoints.

    Raises:
        TrunklineError: if `resume` names nothing that can be resumed.
    """
    if resume is None:
        return _new_run(root / recipe), None, []
    if resume == "auto":
        found = _newest(root / recipe)
        return found if found[1] is not None else (_new_run(root / recipe), None, found[2])
    path = Path(resume)
    if path.is_dir():
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


def newest_config(folder: Path) -> Path | None:
    """The last config of a run; None if it has none."""
    files = list(takewhile(Path.is_file, configs(folder)))
    return files[-1] if files else None


def is_first_process() -> bool:
    """Whether this is the process of a run that writes its files, before Lightning knows the processes."""
    return all(os.environ.get(name, "0") in ("", "0") for name in RANKS)


@contextmanager
def _held(folder: Path, unused: bool) -> Iterator[None]:
    """Hold a run's folder, so that no other run writes into it; the other processes of this run hold nothing.

    The kernel frees the lock when the process ends, however that happens. A folder that this made and that holds
    nothing in the end is removed again, so that bad input leaves nothing behind.

    Args:
        folder: of the run; it is made.
        unused: whether it must not exist yet.

    Raises:
        FileExistsError: if it does.
        TrunklineError: if another process holds the folder, or if nothing can be written there.
    """
    if not is_first_process():
        yield
        return
    made = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        if unused and not made:
            raise FileExistsError(folder)
        folder.mkdir(exist_ok=not unused)
        lock.acquire()
        holder = {
            "process": os.getpid(),
            "host": socket.gethostname(),
            "since": datetime.now().isoformat(" ", "seconds"),
        }
        (folder / HOLDER).write_text(json.dumps(holder), encoding="utf-8")
    except Timeout:
        raise _in_use(folder) from None
    except (FileExistsError, NotADirectoryError):
        if unused and folder.is_dir():
            raise
        raise _no_folder(folder) from None
    except OSError as error:
        _clear(folder, lock, made)
        raise cannot_write(folder, error, "run_dir") from error
    try:
        yield
    finally:
        _clear(folder, lock, made)


def _clear(folder: Path, lock: FileLock, made: list[Path]) -> None:
    """Release a run's folder, and remove what `_held` made if the run left nothing in it."""
    with suppress(OSError):  # the disk may have become read-only
        (folder / HOLDER).unlink(missing_ok=True)
        if folder in made and {file.name for file in folder.iterdir()} <= {LOCK}:
            (folder / LOCK).unlink(missing_ok=True)
    lock.release()
    with suppress(OSError):  # one is not empty, or was never made
        for path in made:
            path.rmdir()


def _in_use(folder: Path) -> TrunklineError:
    holder = read_json(folder / HOLDER) or {}
    who = f"process {holder['process']} on {holder['host']}, since {holder['since']}" if holder else "another process"
    return TrunklineError(
        f"{folder} is being trained by {who}; wait for its end or stop it, or start a new run with resume=null",
        "resume",
    )


def _no_folder(folder: Path) -> TrunklineError:
    file = next(path for path in (folder, *folder.parents) if path.exists() and not path.is_dir())
    return TrunklineError(f"{file} is a file, so that no run can be saved below it; choose another run_dir", "run_dir")


def _newest(folder: Path, depth: int = 1) -> tuple[Path, Path | None, list[str]]:
    """The newest run up to `depth` folders below one that has a valid checkpoint, and what is wrong with newer ones."""
    faults: list[str] = []
    for run in newest_first(folder, depth):
        checkpoint, skipped = newest_valid(run)
        faults += skipped
        if checkpoint is not None:
            return run, checkpoint, faults
    return folder, None, faults


def _job() -> str | None:
    """Id of the job whose processes a cluster starts; None for a process that was started alone."""
    multiple = int(os.environ.get("SLURM_NTASKS", os.environ.get("WORLD_SIZE", "1"))) > 1
    return (os.environ.get("SLURM_JOB_ID") or os.environ.get("TORCHELASTIC_RUN_ID")) if multiple else None


def _new_run(folder: Path) -> Path:
    """Path of a new run's folder, the same in all processes of the run."""
    if RUN not in os.environ:
        # Processes that Lightning starts inherit the variable; processes that a cluster starts share the job's id.
        job = _job()
        os.environ[RUN] = f"job-{job}" if job else _unused(folder, datetime.now().strftime(TIME_FORMAT))
    return folder / os.environ[RUN]


def _unused(folder: Path, name: str) -> str:
    """The name, with a number if a run that started in the same second already has it."""
    number = 1
    while (folder / (name if number == 1 else f"{name}.{number}")).exists():
        number += 1
    return name if number == 1 else f"{name}.{number}"
