"""Writes files completely or not at all, recognises them by their content, and loads checkpoints without running code.

`modules/` and `datamodules/` both use this file. Only `load_checkpoint` imports torch.
"""

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from trunkline import TrunklineError
from trunkline.base_weights import whole
from trunkline.parts import Pieces, is_parts, read_parts
from trunkline.seal import MANIFEST, proves_itself

if TYPE_CHECKING:  # loading a network needs only torch and safetensors
    from filelock import FileLock

CACHE_FIELD = "data.cache_dir"
"""The field that set the folder of a file, unless the caller names another field."""
DIGEST_SUFFIX = ".sha256"
"""Appended to the name of a checkpoint: the name of the file with its digest, which older versions wrote."""

DAY = 24 * 60 * 60
"""In seconds."""


# --- writing


@contextmanager
def replacing(*paths: Path) -> Iterator[list[Path]]:
    """Temporary files that are renamed to `paths`, in this order, when the block ends without an error.

    All files are flushed to the disk before the first rename, and the renames are flushed afterwards. So each path has
    either its old or its new content, even after a power cut. After an error nothing is left behind.

    Yields:
        one temporary file for each of `paths`, in the same folder, for the block to write.

    Raises:
        OSError: if a file cannot be written; `cannot_write` makes a message of it.
    """
    temporaries = [path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp") for path in paths]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        for temporary in temporaries:
            temporary.touch()
        modes = [temporary.stat().st_mode for temporary in temporaries]
        yield temporaries
        for temporary, mode in zip(temporaries, modes, strict=True):
            temporary.chmod(mode)  # safetensors makes files that only their owner may read
            fsync(temporary)
        for temporary, path in zip(temporaries, paths, strict=True):
            os.replace(temporary, path)
        for folder in {path.parent for path in paths}:
            fsync(folder)
    finally:
        for temporary in temporaries:
            temporary.unlink(missing_ok=True)


@contextmanager
def in_use(file: Path) -> Iterator[None]:
    """Create a file, and keep it from `remove_unused` of other processes while the block writes it.

    The kernel frees the lock when this process ends, however that happens.
    """
    while True:
        with file.open("ab") as stream:
            _lock_file(stream, wait=True)
            if file.exists():  # otherwise it was removed before it was locked
                yield
                return


def remove_unused(files: Iterable[Path]) -> None:
    """Remove temporary files that no process is writing, see `in_use`; folders stay.

    Where the file system knows no locks, a file counts as unused a day after its last change.
    """
    for file in files:
        with suppress(OSError), file.open("r+b") as stream:  # another process may have removed it, or own it
            locked = _lock_file(stream, wait=False)
            if locked or (locked is None and time.time() - file.stat().st_mtime > DAY):
                file.unlink()


def _lock_file(stream: IO[bytes], wait: bool) -> bool | None:
    """Lock an open file; False if another process has locked it, None if that cannot be known."""
    try:
        import fcntl  # here, because Windows has none

        fcntl.flock(stream, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (OSError, ImportError):
        return None
    return True


def fsync(path: Path) -> None:
    """Flush a file's content, or the file names in a folder, to the disk, so that they survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def atomic_write(path: Path, content: Iterable[bytes | memoryview], field: str = CACHE_FIELD) -> None:
    """Write a file completely or not at all.

    Args:
        path: the file; its folder is created.
        content: parts of the content, written one after the other.
        field: the field that set the folder, for the message.

    Raises:
        TrunklineError: if the file cannot be written.
    """
    try:
        with replacing(path) as (temporary,), temporary.open("wb") as stream:
            for part in content:
                stream.write(part)
    except OSError as error:
        raise cannot_write(path, error, field) from error


def cannot_write(
    path: Path, error: OSError | RuntimeError, field: str = CACHE_FIELD, then: str = "", needed: int = 0
) -> TrunklineError:
    """The error for a file that cannot be written: it names the path, the reason, the free space and what to do.

    Args:
        path: the file.
        error: what writing raised. A RuntimeError of torch does not tell the reason; a full disk is assumed.
        field: the field that set the folder.
        then: what to do afterwards; the message ends with it.
        needed: how many bytes the file needs; 0 if that is not known.
    """
    existing_folder = next(folder for folder in path.absolute().parents if os.path.isdir(folder))
    free = f"{megabytes(shutil.disk_usage(existing_folder).free)} free there"
    free = f"needs {megabytes(needed)}, {free}" if needed else free
    reason, number = (error.strerror or error, error.errno) if isinstance(error, OSError) else (error, errno.ENOSPC)
    space = "free some space, or " if number in (errno.ENOSPC, errno.EDQUOT) else ""
    setting = field.rpartition(".")[2]
    return TrunklineError(f"cannot write {path} ({free}): {reason}; {space}choose another {setting}{then}", field)


def megabytes(size: int) -> str:
    """A number of bytes as messages say it."""
    return f"{size / 1e6:,.1f} MB"


def facts_at_end(facts: Any) -> bytes:
    """The end of a file that holds arrays: facts about them as JSON, then the size of that, for `read_facts`."""
    content = json.dumps(facts).encode()
    return content + len(content).to_bytes(8, "little")


def read_facts(file: Path) -> Any:
    """The facts at the end of a file, as `facts_at_end` made them; what stands before them is not read.

    Raises:
        OSError: if the file is missing, or is too short.
        ValueError: if it is broken.
    """
    with file.open("rb") as stream:
        stream.seek(-8, os.SEEK_END)
        size = int.from_bytes(stream.read(), "little")
        if size > stream.tell():
            raise ValueError(f"{file} is broken")
        stream.seek(-8 - size, os.SEEK_END)
        return json.loads(stream.read(size))


def write_json(path: Path, content: Any, field: str = CACHE_FIELD) -> None:
    """Write JSON with `atomic_write`."""
    atomic_write(path, [(json.dumps(content, indent=1) + "\n").encode()], field)


def read_json(path: Path) -> Any:
    """Content of a JSON file; None if the file is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def lock(path: Path, field: str = CACHE_FIELD) -> "FileLock":
    """A lock between processes; it is released when the process that holds it ends.

    Args:
        path: the file to lock; it is created, and never removed.
        field: the field that set the folder, for the message.

    Raises:
        TrunklineError: if the file cannot be created.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    except OSError as error:
        raise cannot_write(path, error, field) from error
    from filelock import FileLock

    return FileLock(path)


# --- recognising a file


def file_state(file: Path) -> list[int]:
    """[size, time of the last change in ns]: a file counts as unchanged if both are the same as before."""
    state = file.stat()
    return [state.st_size, state.st_mtime_ns]


def digest(file: Path, algorithm: str | Callable[[], Any] = "sha256") -> str:
    """Hexadecimal digest of a file's content.

    Args:
        file: the file.
        algorithm: name of an algorithm in hashlib, or a function that creates a hash object.
    """
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, algorithm).hexdigest()


def digests(files: list[Path], cache: Path, field: str = CACHE_FIELD) -> list[str]:
    """BLAKE2b digest of each file's content; remembered in the cache folder by path, size and time of change.

    Args:
        files: the files.
        cache: folder that holds `digests.json`.
        field: the field that set the cache folder, for the message.

    Raises:
        TrunklineError: if a file cannot be read or the cache cannot be written.
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
            # A file that changed just now may change again and keep its time stamp: file systems count in ticks.
            if time.time_ns() - state[1] > 2_000_000_000:
                known[path] = entry
            result.append(entry[1])
        if known != before:
            write_json(memory, known, field)
    return result


# --- checkpoints


def digest_file(checkpoint: Path) -> Path:
    """The file with an older checkpoint's digest, in the same folder; newer ones hold it themselves."""
    return checkpoint.with_name(checkpoint.name + DIGEST_SUFFIX)


def known_digests(checkpoint: Path) -> list[str]:
    """SHA-256 of a checkpoint, then of earlier checkpoints of the same name, newest first; empty if none is stored."""
    file = digest_file(checkpoint)
    return file.read_text(encoding="ascii", errors="replace").split() if file.exists() else []


def find_fault(checkpoint: Path, unchecked: bool = True) -> str | None:
    """What is wrong with a checkpoint file; None if nothing is.

    Args:
        checkpoint: the file, or the folder that `seal_folder` sealed. Its seal is checked, or for older files the
            digest beside it.
        unchecked: whether a file that has neither passes; those of other projects have neither.
    """
    if not checkpoint.is_file() and not (checkpoint / MANIFEST).is_file():
        url = re.sub(r"^(\w{2,}):/+", r"\1://", str(checkpoint))
        if "://" in url:
            return f"there is no file {url}: nothing is loaded from a URL, so download the file first"
        return f"there is no checkpoint {checkpoint}"
    if checkpoint.stat().st_size == 0:
        return f"the checkpoint {checkpoint} is empty"
    whole = proves_itself(checkpoint)
    if whole is False:
        return f"the checkpoint {checkpoint} is damaged: it is not as it was saved"
    if whole is None:
        known = known_digests(checkpoint)
        if known and digest(checkpoint) not in known:
            return f"the checkpoint {checkpoint} is damaged: it does not match its {DIGEST_SUFFIX} file"
        if not known and not unchecked:
            return f"the checkpoint {checkpoint} cannot be checked: it holds no digest"
    return None


def load_checkpoint(
    path: str | os.PathLike[str],
    map_location: Any = "cpu",
    *,
    mmap: bool | None = None,
    field: str | None = None,
    make: Callable[[Pieces], Any] | None = None,
) -> dict[str, Any]:
    """Load a training checkpoint after checking its digest. Code inside it never runs.

    One that holds only what LoRA has trained comes with the frozen weights, from the file beside it.

    Args:
        path: the file, or the folder of one in parts.
        map_location: where its tensors go, as in `torch.load`.
        mmap: whether tensors stay on the disk until they are used.
        field: the field that gave the path, for the message.
        make: as in `read_parts`, where the caller has checked the digest.

    Raises:
        TrunklineError: if the file is missing or damaged, or holds more than plain data.
    """
    import torch  # here, so that importing this file stays fast

    path = Path(path)
    fault = find_fault(path) if make is None else None
    if fault is not None:
        mend = "use an older checkpoint, or resume=auto, which finds the newest valid one"
        raise TrunklineError(f"{fault}; {mend if path.exists() else 'fix the path'}", field)
    try:
        if is_parts(path):
            return read_parts(path, make or Pieces.whole)
        content = torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)
    except Exception as error:  # torch raises many kinds of errors for files that are not checkpoints
        raise TrunklineError(
            f"{path} is not a checkpoint of plain data: {_why_refused(error)}; it is refused, because loading anything "
            "else could run code; give a checkpoint that `trunkline fit` wrote, or weights as safetensors",
            field,
        ) from error
    if not isinstance(content, dict):
        raise TrunklineError(
            f"{path} is not a checkpoint of a training run: it holds a {type(content).__name__}; give a .ckpt file of "
            "one",
            field,
        )
    return whole(content, path, field)


def check_parts(content: Mapping[str, Any], path: str | os.PathLike[str], parts: Mapping[str, type]) -> None:
    """Refuse a checkpoint without parts that are needed.

    Args:
        content: of the checkpoint.
        path: its file, for the message.
        parts: key -> what it must be.

    Raises:
        TrunklineError: naming the parts that are missing.
    """
    missing = [key for key, kind in parts.items() if not isinstance(content.get(key), kind)]
    if missing:
        raise TrunklineError(
            f"{path} is not a whole checkpoint of a training run: it holds no {' and no '.join(missing)}; give a .ckpt "
            "file as the run saved it"
        )


def _why_refused(error: Exception) -> str:
    """What torch could not load, without its advice to load the file all the same."""
    stranger = re.search(r"GLOBAL (\S+)", str(error))
    if stranger:
        return f"Unsupported global {stranger[1]}"
    if "zip archive" in str(error) or "inline_container" in str(error):
        return "its archive is broken"
    return "torch.save did not write it, or long ago"
