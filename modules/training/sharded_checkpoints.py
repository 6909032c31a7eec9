"""Writes checkpoints in parts (`trunkline.parts`), completely or not at all. Needs only torch."""

import os
import secrets
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.distributed.tensor import DTensor

from trunkline import TrunklineError
from trunkline.files import cannot_write, fsync
from trunkline.parts import META_FILE, replace_leaves, rows_name
from trunkline.seal import seal_folder

PREVIOUS = "-previous"
"""Between a checkpoint's name and its suffix: the older one of the name, while the new one takes its place."""


class Processes(Protocol):
    """What the writer needs of the processes that write together; a strategy of Lightning has it."""

    @property
    def global_rank(self) -> int:
        """Number of this process."""

    @property
    def world_size(self) -> int:
        """Number of processes."""

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """The first process's object, in all processes."""

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """Whether all processes say yes."""


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
        # A copy: torch.save writes the whole storage of a view.
        held[place] = (first, local.cpu().clone())
        return torch.empty(leaf.shape, dtype=leaf.dtype, device="meta")

    return replace_leaves(checkpoint, take), held


def save_parts(checkpoint: dict[str, Any], path: Path, processes: Processes) -> None:
    """Write a checkpoint into a temporary folder, each process its part, and rename it when all are done.

    If the name is taken, the older checkpoint steps aside as `NAME-previous.ckpt`, which is found as well, until the
    new one has taken its place.

    Args:
        checkpoint: with DTensors where tensors are sharded.
        path: the folder to write.
        processes: those that hold the shards; all of them call this.

    Raises:
        TrunklineError: in all processes, if one cannot write. Nothing is left of the new checkpoint then.
    """
    rank, first = processes.global_rank, processes.global_rank == 0
    token = processes.broadcast(secrets.token_hex(4))
    temporary = path.with_name(f".{path.name}.{token}.tmp")
    shared, held = split(checkpoint, rank, processes.world_size)

    def write() -> None:
        torch.save(held, temporary / rows_name(rank))
        if first:
            torch.save(shared, temporary / META_FILE)

    steps: list[Callable[[], None]] = [
        lambda: make_room(path, temporary) if first else None,
        write,
        lambda: put_in_place(temporary, path) if first else None,
    ]
    for step in steps:
        error: OSError | RuntimeError | None = None
        try:
            step()
        except (OSError, RuntimeError) as caught:  # torch.save reports a full disk as a RuntimeError
            error = caught
        if processes.reduce_boolean_decision(error is None):
            continue
        if first:
            shutil.rmtree(temporary, ignore_errors=True)
        if error is not None:
            raise cannot_write(path, error, "run_dir", then=", then resume the run") from error
        raise TrunklineError(f"another process cannot write its part of {path}; see its message", "run_dir")


def make_room(path: Path, temporary: Path) -> None:
    """Make the temporary folder, and remove those of saves that were killed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for left_over in path.parent.glob(".*.ckpt.*.tmp"):
        remove(left_over)
    if path.exists():
        remove(previous_of(path))  # of a save that was killed between two renames
    temporary.mkdir()


def put_in_place(temporary: Path, path: Path) -> None:
    """Seal the temporary folder and give it the checkpoint's name."""
    seal_folder(temporary)
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
