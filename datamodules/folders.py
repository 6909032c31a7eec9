"""Finds files below a folder."""

import os
from pathlib import Path

from trunkline import TrunklineError


def files_below(folder: str | Path, suffixes: tuple[str, ...], kind: str, field: str) -> list[Path]:
    """All files below a folder that end with one of the suffixes, sorted; hidden files and folders are left out.

    Args:
        folder: the folder.
        suffixes: in lower case, with their dots.
        kind: what a file holds (`image`), for messages.
        field: the field that named the folder, for messages.

    Raises:
        TrunklineError: if the folder does not exist, or holds no such file.
    """
    folder, name = Path(folder), field.rpartition(".")[2]
    if not folder.is_dir():
        raise TrunklineError(f"{name}={folder} is not a folder; give one that holds {kind}s", field)
    files = []
    for parent, subfolders, names in os.walk(folder, followlinks=True):
        subfolders[:] = [n for n in subfolders if not n.startswith(".")]
        files += [Path(parent, n) for n in names if n.lower().endswith(suffixes) and not n.startswith(".")]
    if not files:
        raise TrunklineError(f"{name}={folder} holds no {kind} file ({' '.join(suffixes)}); give one that does", field)
    return sorted(files)
