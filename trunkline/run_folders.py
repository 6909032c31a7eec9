"""Finds checkpoints in run folders: `runs/<recipe>/<time>/checkpoints/`.

What is newest is decided by what is inside the files, not by their times, which copying changes.
"""

import math
import re
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from trunkline import TrunklineError
from trunkline.files import find_fault
from trunkline.parts import META_FILE
from trunkline.seal import sealed_at

TIME_FORMAT = "%Y-%m-%d_%H-%M-%S"
"""Name of a run's folder: when it began, in local time."""
NAMED_BY_TIME = re.compile(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d")
DEPTH = 3
"""How far below a given folder runs are looked for: `runs` holds `<group>/<recipe>/<time>`."""


def is_checkpoint(path: Path) -> bool:
    """Whether a path is that of a checkpoint: a file, or the folder of one that several processes wrote in parts."""
    return path.suffix == ".ckpt" and path.exists()


def checkpoints_in(folder: Path) -> Iterator[Path]:
    """All checkpoints below a folder, whole or not, in no order."""
    return (path for path in folder.rglob("*.ckpt") if path.parent.suffix != ".ckpt")


def newest_valid(folder: Path) -> tuple[Path | None, list[str]]:
    """The valid checkpoint below a run's folder with the most steps, and what is wrong with those before it.

    Files that cannot be read come first. Among equal steps the one saved last is taken. A file that carries no digest
    is not valid, because it cannot be checked.
    """
    faults: list[str] = []
    steps = {path: step_in(path) for path in checkpoints_in(folder)}
    for path in sorted(steps, key=lambda p: (math.inf if steps[p] is None else steps[p], _saved_at(p)), reverse=True):
        fault = find_fault(path, unchecked=False)
        if fault is None and steps[path] is not None:
            return path, faults
        faults.append(fault or f"the checkpoint {path} is of no training run: it holds no step")
    return None, faults


def newest_first(folder: Path, depth: int = 1) -> list[Path]:
    """The runs that lie up to `depth` folders below a folder, the one that saved last first."""
    found = [run for level in range(1, depth + 1) for run in folder.glob("/".join("*" * level)) if is_run(run)]
    return sorted(found, key=last_saved, reverse=True)


def find_checkpoint(name: str | Path, field: str | None = None, other: str | None = None) -> Path:
    """The checkpoint that a name stands for.

    A checkpoint stands for itself. A run's folder, or its `checkpoints` folder, stands for its best checkpoint by the
    metric that the run monitored, or without one for its last; any folder above for that of the newest run below it.

    Args:
        name: a file or a folder.
        field: the field that gave the name, for the message.
        other: where a folder of another kind may stand too, the file by which that is known.

    Returns:
        the file. A name that is no folder comes back as it is, and so does a folder of the other kind or without runs
        where the other kind may stand.

    Raises:
        TrunklineError: if a folder holds no run, or its newest run no valid checkpoint.
    """
    folder = Path(name)
    if not folder.is_dir() or is_checkpoint(folder) or (other is not None and (folder / other).is_file()):
        return folder
    if next(folder.glob("*.ckpt"), None) is None and not is_run(folder):
        runs = [run for run in newest_first(folder, DEPTH) if next(checkpoints_in(run), None) is not None]
        if not runs and other is not None:
            return folder
        if not runs:
            raise TrunklineError(f"the folder {name} holds no checkpoint of a run; give a .ckpt file or a run", field)
        folder = runs[0]
    newest, faults = newest_valid(folder)
    if newest is None:
        raise TrunklineError(f"{folder} holds no valid checkpoint: {'; '.join(faults) or 'none at all'}", field)
    return _best_beside(newest) or newest


def _best_beside(checkpoint: Path) -> Path | None:
    """The best checkpoint of a run by the metric that it monitored, from what its newest checkpoint says."""
    for state in read_lazily(checkpoint).get("callbacks", {}).values():
        best = state.get("best_model_path") if isinstance(state, dict) else None
        if best and state.get("monitor") not in (None, "step"):
            beside = checkpoint.with_name(Path(best).name)  # the run may have been moved
            return beside if beside.exists() else None
    return None


def is_run(folder: Path) -> bool:
    """Whether a folder is that of one run."""
    return (folder / "checkpoints").is_dir() or (folder / "config.yaml").is_file()


def last_saved(run: Path) -> tuple[bool, float]:
    """Whether copying the run keeps what follows, and when it saved last, in seconds since 1970.

    For a run of an older version it is when the run began, by its name; without that, only its files' times are left.
    """
    files = list(checkpoints_in(run))
    sealed = [time for file in files if (time := sealed_at(file)) is not None]
    named = NAMED_BY_TIME.match(run.name)
    if sealed:
        return True, max(sealed)
    if named:
        return True, datetime.strptime(named[0], TIME_FORMAT).timestamp()
    return False, max((file.stat().st_mtime for file in files), default=0.0)


def _saved_at(path: Path) -> float:
    """When a checkpoint was saved, in seconds since 1970; the file's time for one of an older version."""
    return sealed_at(path) or path.stat().st_mtime


def read_lazily(path: Path) -> dict[str, Any]:
    """Content of a checkpoint whose weights stay on the disk; empty if it cannot be read."""
    import torch  # here, so that importing this file stays fast

    try:
        file = path / META_FILE if path.is_dir() else path
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # torch raises many kinds of errors; `find_fault` says what is wrong
        return {}
    return content if isinstance(content, dict) else {}


def step_in(path: Path) -> int | None:
    """The step at which a checkpoint was saved; None if it cannot be read."""
    step = read_lazily(path).get("global_step")
    return step if isinstance(step, int) else None
