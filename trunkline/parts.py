"""Checkpoints of sharded training: a folder in which each process has written the rows that it held.

`meta.pt` is the checkpoint with an empty tensor on the meta device in place of each sharded one. `rows_00000.pt` and
so on hold these tensors' rows, by their place in the checkpoint, as (first row, rows). All are files of `torch.save`
with plain data, and the folder is sealed (`trunkline.seal.seal_folder`). The format is our own because
`torch.distributed.checkpoint` reads its metadata, and all that is no tensor, by unrestricted unpickling, which would
run code from a file.
"""

from bisect import bisect_right
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trunkline.seal import MANIFEST

META_FILE = "meta.pt"
"""The file in a checkpoint's folder with all but the rows of sharded tensors."""


def rows_name(rank: int) -> str:
    """Name of the file with the rows of a process."""
    return f"rows_{rank:05d}.pt"


def is_parts(path: Path) -> bool:
    """Whether a path is a checkpoint in parts, whole or damaged."""
    return (path / MANIFEST).is_file()


def replace_leaves(tree: Any, change: Callable[[str, Any], Any], place: str = "") -> Any:
    """A copy of nested dictionaries, lists and tuples in which `change(place, leaf)` stands for each leaf."""
    if isinstance(tree, dict):
        return {key: replace_leaves(value, change, f"{place}/{key}") for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        changed = [replace_leaves(value, change, f"{place}/{number}") for number, value in enumerate(tree)]
        return changed if isinstance(tree, list) else tuple(changed)
    return change(place, tree)


class Pieces:
    """The rows of one sharded tensor in the files of all processes, which are read only where they are needed."""

    def __init__(self, empty: Any, found: list[tuple[int, Any]]) -> None:
        self.shape = empty.shape
        self.found = sorted(((first, rows) for first, rows in found if len(rows)), key=lambda piece: piece[0])

    def rows(self, first: int, last: int) -> Any:
        """Rows `first` to `last` (exclusive) as a new tensor.

        Raises:
            ValueError: if they are not all there.
        """
        import torch  # here, so that importing this file stays fast

        start = max(bisect_right([begin for begin, _ in self.found], first) - 1, 0)
        taken = [
            rows[max(first - begin, 0) : max(last - begin, 0)] for begin, rows in self.found[start:] if begin < last
        ]
        if not taken or first >= last:
            return self.found[0][1].new_empty(0, *self.shape[1:])
        result = torch.cat(taken)
        if result.shape != (last - first, *self.shape[1:]):
            raise ValueError(f"rows {first} to {last} of {tuple(self.shape)} are not all there")
        return result

    def whole(self) -> Any:
        """The whole tensor."""
        return self.rows(0, self.shape[0])


def read_parts(folder: Path, make: Callable[[Pieces], Any] = Pieces.whole) -> dict[str, Any]:
    """The content of a checkpoint in parts. Nothing is checked; `trunkline.files.load_checkpoint` does that.

    Args:
        folder: the checkpoint.
        make: what takes the place of each sharded tensor; by default it is put together.
    """
    import torch

    files = sorted(folder.glob("rows_*.pt"))
    parts = [torch.load(file, map_location="cpu", weights_only=True, mmap=True) for file in files]

    def fill(place: str, leaf: Any) -> Any:
        if not (isinstance(leaf, torch.Tensor) and leaf.is_meta):
            return leaf
        return make(Pieces(leaf, [part[place] for part in parts]))

    content = torch.load(folder / META_FILE, map_location="cpu", weights_only=True)
    filled: dict[str, Any] = replace_leaves(content, fill)
    return filled
