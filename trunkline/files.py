"""Files on disk: written whole or not at all, known again by their content, and checkpoints read without running code.

Both wings use it. Only reading a checkpoint imports torch.
"""

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock

from trunkline import TrunklineError

CACHE_FIELD = "data.cache_dir"
"""The field that chooses the folder of what is written here, unless the caller names another."""
DIGEST_SUFFIX = ".sha256"
"""Added to the name of a checkpoint, for the file that holds its digest."""


# --- writing


@contextmanager
def replacing(*paths: Path) -> Iterator[list[Path]]:
    """Temporary files that become `paths`, in that order, when the block ends without an error.

    They are flushed to the disk before the first is renamed, and the renames afterwards. So each of `paths` has its old
    content or its new one, whatever ends the process or the machine. After an error nothing is left behind.

    Yields:
        one name for each path, in its folder, to be written by the block.

    Raises:
        OSError: if something cannot be written; see `cannot_write`.
    """
    temporaries = [path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp") for path in paths]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield temporaries
        for temporary in temporaries:
            fsync(temporary)
        for temporary, path in zip(temporaries, paths, strict=True):
            os.replace(temporary, path)
        for folder in {path.parent for path in paths}:
            fsync(folder)
    finally:
        for temporary in temporaries:
            temporary.unlink(missing_ok=True)


def fsync(path: Path) -> None:
    """Flush a file to the disk, or the names in a folder, so that they outlive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def atomic_write(path: Path, content: Iterable[bytes | memoryview], field: str = CACHE_FIELD) -> None:
    """Write a file that appears whole or not at all.

    Args:
        path: of the file; its folder is made.
        content: parts, written one after the other.
        field: that chose the folder, for the message.

    Raises:
        TrunklineError: if it cannot be written; see `cannot_write`.
    """
    try:
        with replacing(path) as (temporary,), temporary.open("wb") as stream:
            for part in content:
                stream.write(part)
    except OSError as error:
        raise cannot_write(path, error, field) from error


def cannot_write(path: Path, error: OSError | RuntimeError, field: str = CACHE_FIELD, then: str = "") -> TrunklineError:
    """The message for a disk that is full or that we may not write to: the path, the free space and what to do.

    Args:
        path: of the file.
        error: what came of writing. A RuntimeError is torch's, which says no more than that a write failed.
        field: that chose the folder.
        then: what to do afterwards.
    """
    there = next(folder for folder in path.absolute().parents if folder.exists())
    free = f"{shutil.disk_usage(there).free / 1e6:,.0f} MB free there"
    reason, number = (error.strerror or error, error.errno) if isinstance(error, OSError) else (error, errno.ENOSPC)
    space = "free some space, or " if number in (errno.ENOSPC, errno.EDQUOT) else ""
    setting = field.rpartition(".")[2]
    return TrunklineError(f"cannot write {path} ({free}): {reason}; {space}choose another {setting}{then}", field)


def write_json(path: Path, content: Any, field: str = CACHE_FIELD) -> None:
    """Write JSON by `atomic_write`."""
    atomic_write(path, [(json.dumps(content, indent=1) + "\n").encode()], field)


def read_json(path: Path) -> Any:
    """Content of a file of `write_json`; None if it is missing or was damaged since."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def lock(path: Path, field: str = CACHE_FIELD) -> FileLock:
    """A lock between processes, freed when its process ends.

    Args:
        path: of the file that is locked; it is made, and stays.
        field: that chose the folder, for the message.

    Raises:
        TrunklineError: if its folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    except OSError as error:
        raise cannot_write(path, error, field) from error
    return FileLock(path)


# --- knowing a file again


def file_state(file: Path) -> list[int]:
    """[size, time of the last change in ns]: as long as both are the same, the file is taken as unchanged."""
    state = file.stat()
    return [state.st_size, state.st_mtime_ns]


def digest(file: Path, algorithm: str | Callable[[], Any] = "sha256") -> str:
    """Hexadecimal digest of a file's content.

    Args:
        file: to read.
        algorithm: name of one in hashlib, or a function that makes one.
    """
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, algorithm).hexdigest()


def digests(files: list[Path], cache: Path, field: str = CACHE_FIELD) -> list[str]:
    """BLAKE2b of each file's content; remembered in the cache folder by path, size and time of change.

    Args:
        files: to read.
        cache: folder that holds `digests.json`.
        field: that chose the cache, for the message.

    Raises:
        TrunklineError: if a file cannot be read or the cache not written.
    """
    memory = cache / "digests.json"
    result = []
    with lock(memory.with_suffix(".lock"), field):
        known: dict[str, Any] = read_json(memory) or {}
        before = dict(known)
        for file in files:
            path = str(file.resolve())
            try:
                state = file_state(file)
                entry = known.get(path)
                if not entry or entry[0] != state:
                    entry = [state, digest(file, lambda: hashlib.blake2b(digest_size=20))]
            except OSError as error:
                raise TrunklineError(f"cannot read {file}: {error.strerror}; check its permissions") from error
            # A file that changed a moment ago may change again within the same tick of its clock.
            if time.time_ns() - state[1] > 2_000_000_000:
                known[path] = entry
            result.append(entry[1])
        if known != before:
            write_json(memory, known, field)
    return result


# --- checkpoints


def digest_file(checkpoint: Path) -> Path:
    """The file beside a checkpoint that holds its digest."""
    return checkpoint.with_name(checkpoint.name + DIGEST_SUFFIX)


def known_digests(checkpoint: Path) -> list[str]:
    """SHA-256 of a checkpoint, then of those that had its name before, the newest first; empty if none is kept."""
    file = digest_file(checkpoint)
    return file.read_text(encoding="ascii", errors="replace").split() if file.exists() else []


def find_fault(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint file, or None if it is whole."""
    if not checkpoint.is_file():
        return f"there is no checkpoint {checkpoint}"
    if checkpoint.stat().st_size == 0:
        return f"the checkpoint {checkpoint} is empty"
    known = known_digests(checkpoint)
    if known and digest(checkpoint) not in known:
        return f"the checkpoint {checkpoint} is damaged: it does not match its {DIGEST_SUFFIX} file"
    return None


def load_checkpoint(
    path: str | os.PathLike[str], map_location: Any = "cpu", *, mmap: bool | None = None, field: str | None = None
) -> dict[str, Any]:
    """Load a training checkpoint after comparing it with its digest. Code in it never runs.

    Args:
        path: of the file.
        map_location: where its tensors go, as in `torch.load`.
        mmap: whether tensors stay on the disk until they are used.
        field: that gave the path, for the message.

    Raises:
        TrunklineError: if it is missing, damaged, or holds more than plain data.
    """
    import torch  # importing this file must not cost it

    path = Path(path)
    fault = find_fault(path)
    if fault is not None:
        raise TrunklineError(f"{fault}; use an older checkpoint, or resume=auto, which finds the newest valid one", field)
    try:
        content = torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)
    except Exception as error:  # on other files torch raises nearly anything
        refused = re.search("WeightsUnpickler error: *(.*)", str(error))
        reason = (refused[1] if refused else str(error).partition("\n")[0]) or type(error).__name__
        raise TrunklineError(
            f"{path} is no checkpoint of plain data: {reason}; it is refused, because loading anything else could run "
            "code",
            field,
        ) from error
    if not isinstance(content, dict):
        raise TrunklineError(
            f"{path} is no checkpoint of a training run: it holds a {type(content).__name__}; give a .ckpt file of one",
            field,
        )
    return content
