"""Writes checkpoints in parts (`trunkline.parts`), completely or not at all. Needs only torch."""

import os
import secrets
import shutil
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from trunkline import TrunklineError
from trunkline.files import cannot_write, fsync
from trunkline.parts import META_FILE, replace_leaves, rows_name
from trunkline.seal import flushed_digest, seal_folder

PREVIOUS = "-previous"
"""Between a checkpoint's name and its suffix: the older one of the name, while the new one takes its place."""


class Processes(Protocol):
    """What the writer needs of the processes that write together."""

    @property
    def global_rank(self) -> int:
        """Number of this process."""

    @property
    def world_size(self) -> int:
        """Number of processes."""

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, in all of them."""


class Writers:
    """The processes of a training, with a process group of their own: a thread may wait in it while training goes on.

    All processes must make it together.

    Args:
        timeout: how long one process may wait for another to reach the same point of a save; None is torch's default.
    """

    def __init__(self, timeout: timedelta | None) -> None:
        self.group: Any = dist.new_group(backend="gloo", timeout=timeout)
        self.global_rank, self.world_size = dist.get_rank(), dist.get_world_size()

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, in all of them.

        Raises:
            RuntimeError: if a process has ended, or is too late.
        """
        found: list[Any] = [None] * self.world_size
        dist.all_gather_object(found, value, self.group)
        return found


def own_span(rows: int, rank: int, processes: int) -> tuple[int, int]:
    """First and last (exclusive) of the rows that a process holds, as torch's `Shard(0)` splits them."""
    size = -(-rows // processes)
    return min(rank * size, rows), min((rank + 1) * size, rows)


def split(checkpoint: dict[str, Any], rank: int, processes: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The checkpoint with empty tensors in place of the sharded ones, and (first row, rows) of these by their place.

    Raises:
        TrunklineError: for a tensor that is sharded in another way than by rows.
    """
    held: dict[str, Any] = {}

    def take(place: str, leaf: Any) -> Any:
        if not isinstance(leaf, DTensor):
            return leaf
        first, last = own_span(leaf.shape[0], rank, processes)
        local = leaf.to_local().detach()
        if not all(placement.is_shard(0) for placement in leaf.placements) or len(local) != last - first:
            raise TrunklineError(f"{place} is not sharded by rows, but {leaf.placements}; it cannot be saved")
        # A copy, which training does not change; also, torch.save would write the whole storage of a view.
        held[place] = (first, local.to("cpu", copy=True))
        return torch.empty(leaf.shape, dtype=leaf.dtype, device="meta")

    return replace_leaves(checkpoint, take), held


def save_parts(checkpoint: dict[str, Any], path: Path, processes: Processes) -> None:
    """Write a checkpoint as `write_parts` does, before this returns.

    Args:
        checkpoint: with DTensors where tensors are sharded.
        path: the folder to write.
        processes: those that hold the shards; all of them call this.

    Raises:
        TrunklineError: as `split` and `write_parts`.
    """
    write_parts(*split(checkpoint, processes.global_rank, processes.world_size), path, processes)


def write_parts(shared: dict[str, Any], held: dict[str, Any], path: Path, processes: Processes) -> None:
    """Write what `split` made into a temporary folder, each process its part, and rename it when all are done.

    Each process also makes the digest of its own files. If the name is taken, the older checkpoint steps aside as
    `NAME-previous.ckpt`, which is found as well, until the new one has taken its place.

    Args:
        shared: all but the rows of sharded tensors; the first process's is written.
        held: the rows of this process.
        path: the folder to write.
        processes: those that hold the shards; all of them call this.

    Raises:
        TrunklineError: in all processes, if one cannot write. Nothing is left of the new checkpoint then.
        RuntimeError: if a process has ended meanwhile.
    """
    first = processes.global_rank == 0
    contents = {rows_name(processes.global_rank): held, **({META_FILE: shared} if first else {})}
    token = processes.gather(secrets.token_hex(4))[0]
    temporary = path.with_name(f".{path.name}.{token}.tmp")

    def write() -> dict[str, str]:
        digests = {}
        for name, content in contents.items():
            torch.save(content, temporary / name)
            digests[name] = flushed_digest(temporary / name)
        return digests

    def together(step: Callable[[], Any]) -> list[Any]:
        """What the step returns in each process; it ends in all before any goes on."""
        result, error = None, None
        try:
            result = step()
        except (OSError, RuntimeError) as caught:  # torch.save reports a full disk as a RuntimeError
            error = caught
        answers = processes.gather((error is None, result))
        if all(done for done, _ in answers):
            return [found for _, found in answers]
        if first:
            shutil.rmtree(temporary, ignore_errors=True)
        if error is not None:
            raise cannot_save(path, error, contents) from error
        raise TrunklineError(f"another process cannot write its part of {path}; see its message", "run_dir")

    together(lambda: make_room(path, temporary) if first else None)
    digests = {name: value for found in together(write) for name, value in found.items()}
    together(lambda: put_in_place(temporary, path, digests) if first else None)


def cannot_save(path: Path, error: OSError | RuntimeError, content: dict[str, Any]) -> TrunklineError:
    """The error for a checkpoint, or this process's part of one, that cannot be written: see `cannot_write`."""
    storages: dict[int, int] = {}

    def measure(place: str, leaf: Any) -> None:
        if isinstance(leaf, Tensor) and leaf.device.type != "meta":  # tensors that share memory are written once
            storages[leaf.untyped_storage().data_ptr()] = leaf.untyped_storage().nbytes()

    replace_leaves(content, measure)
    return cannot_write(path, error, "run_dir", then=", then resume the run", needed=sum(storages.values()))


def make_room(path: Path, temporary: Path) -> None:
    """Make the temporary folder, and remove those of saves that were killed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for left_over in path.parent.glob(".*.ckpt.*.tmp"):
        remove(left_over)
    if path.exists():
        remove(previous_of(path))  # of a save that was killed between two renames
    temporary.mkdir()


def put_in_place(temporary: Path, path: Path, digests: dict[str, str]) -> None:
    """Seal the temporary folder with the digests of its files, and give it the checkpoint's name."""
    seal_folder(temporary, digests)
    fsync(temporary)
    aside = previous_of(path)
    if path.exists():
        os.replace(path, aside)
    os.replace(temporary, path)
    fsync(path.parent)
    remove(aside)


def previous_of(path: Path) -> Path:
    """Where an older checkpoint of a name stands while the new one takes its place."""
    return path.with_name(path.stem + PREVIOUS + path.suffix)


def remove(path: Path) -> None:
    """Remove a checkpoint, a file or a folder. A folder loses its name first, so that a half-removed one is none."""
    if path.is_dir():
        hidden = path if path.name.startswith(".") else path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        os.replace(path, hidden)
        shutil.rmtree(hidden, ignore_errors=True)
    else:
        with suppress(FileNotFoundError):
            path.unlink()
