"""Files of a prepared corpus: written whole or not at all, read as one stream of tokens."""

import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from trunkline import TrunklineError

INDEX = "index.json"


def atomic_write(path: Path, content: Iterable[bytes | memoryview]) -> None:
    """Write a file that appears whole or not at all, whatever ends the process or the machine.

    Raises:
        TrunklineError: if it cannot be written; names the path and the free space.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as stream:
            for part in content:
                stream.write(part)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder outlive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def cannot_write(path: Path, error: OSError) -> TrunklineError:
    """The message for a disk that is full or closed to us."""
    there = next((p for p in path.parents if p.exists()), Path("/"))
    free = f"{shutil.disk_usage(there).free / 1e9:.1f} GB are free there"
    full = "make room, or " if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
    return TrunklineError(
        f"cannot write {path}: {error.strerror or error}; {free}; {full}choose another folder with --data.cache_dir"
    )


def write_json(path: Path, content: Any) -> None:
    """Atomically."""
    atomic_write(path, [(json.dumps(content, indent=1) + "\n").encode()])


def read_json(path: Path) -> Any:
    """Content of a file that we wrote; None if it is missing or was damaged since."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def token_type(vocab_size: int) -> type[np.unsignedinteger[Any]]:
    """The smallest type for ids below `vocab_size`."""
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


def file_state(file: Path) -> list[int]:
    """[size, time of the last change in ns], by which an unchanged file is known again."""
    state = file.stat()
    return [state.st_size, state.st_mtime_ns]


def digests(files: list[Path], cache: Path) -> list[str]:
    """BLAKE2b of each file's content; remembered in the cache folder by path, size and time of change.

    Raises:
        TrunklineError: if a file cannot be read or the cache not written.
    """
    memory = cache / "digests.json"
    result = []
    with lock(memory.with_suffix(".lock")):
        known: dict[str, Any] = read_json(memory) or {}
        before = dict(known)
        for file in files:
            path = str(file.resolve())
            try:
                state = file_state(file)
                entry = known.get(path)
                if not entry or entry[0] != state:
                    with file.open("rb") as stream:
                        digest = hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=20)).hexdigest()
                    entry = [state, digest]
            except OSError as error:
                raise TrunklineError(f"cannot read {file}: {error.strerror}; check its permissions") from error
            # A file that changed a moment ago may change again within the same tick of its clock.
            if time.time_ns() - state[1] > 2_000_000_000:
                known[path] = entry
            result.append(entry[1])
        if known != before:
            write_json(memory, known)
    return result


def lock(path: Path) -> FileLock:
    """A lock between processes, freed when its process ends.

    Raises:
        TrunklineError: if its folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    except OSError as error:
        raise cannot_write(path, error) from error
    return FileLock(path)


class TokenStream:
    """The tokens of a split, over all its shards, as one array on disk.

    Args:
        folder: of the prepared corpus.
        shards: [file name, number of tokens] of each, in order.
        dtype: of the ids on disk.
    """

    def __init__(self, folder: Path, shards: list[tuple[str, int]], dtype: str) -> None:
        self.folder, self.shards, self.dtype = folder, shards, dtype
        self.maps = [np.memmap(folder / name, dtype, "r", shape=(size,)) for name, size in shards]
        self.borders = np.cumsum([0, *(size for _, size in shards)])
        """(shards + 1,) where each begins, and the end."""

    def __reduce__(self) -> tuple[Any, ...]:
        # numpy would send a map's content to a worker process
        return TokenStream, (self.folder, self.shards, self.dtype)

    def __len__(self) -> int:
        """Number of tokens."""
        return int(self.borders[-1])

    def read(self, start: int, stop: int) -> np.ndarray:
        """(stop - start,) ids on disk's type; a view where one shard holds them all.

        Raises:
            IndexError: outside the stream.
        """
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"tokens {start} to {stop} of a stream of {len(self)}")
        first = int(self.borders.searchsorted(start, "right")) - 1
        parts = []
        while start < stop:
            begin, end = int(self.borders[first]), min(stop, int(self.borders[first + 1]))
            parts.append(self.maps[first][start - begin : end - begin])
            start, first = end, first + 1
        return parts[0] if len(parts) == 1 else np.concatenate(parts or [np.zeros(0, self.dtype)])

    def document_ends(self) -> np.ndarray:
        """(documents,) int64, where each document stops in the stream: one past its end-of-text token."""
        ends = [
            np.load(self.folder / ends_name(name)) + begin
            for (name, _), begin in zip(self.shards, self.borders[:-1], strict=True)
        ]
        return np.concatenate(ends or [np.zeros(0, np.int64)])


def ends_name(shard: str) -> str:
    """File of the document ends that belongs to a shard."""
    return shard.removesuffix(".bin") + ".ends.npy"
