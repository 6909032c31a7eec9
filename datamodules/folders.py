"""Finds files below a folder."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from trunkline import TrunklineError


def files_below(folder: str | Path, suffixes: tuple[str, ...], kind: str, field: str) -> list[Path]:
    """All files below a folder that end with one of the suffixes, sorted, as `walk` finds them.

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
    files = [path for path in walk(folder) if path.name.lower().endswith(suffixes)]
    if not files:
        raise TrunklineError(f"{name}={folder} holds no {kind} file ({' '.join(suffixes)}); give one that does", field)
    return sorted(files)


def names_and_sizes(files: Iterable[Path], folder: Path) -> list[list[Any]]:
    """[path below the folder, bytes] of each file, to tell data from other data wherever it is."""
    return [[os.path.relpath(file, folder), file.stat().st_size] for file in files]


def walk(folder: Path) -> Iterator[Path]:
    """All files below a folder, each real file once: links to folders are followed, but not in circles.

    Hidden files and folders are left out, and so are pipes, devices, and links to a file that stands here itself.
    """
    root, known, waiting = folder.resolve(), set(), [folder]
    while waiting:
        place = waiting.pop()
        state = place.stat()
        if (state.st_dev, state.st_ino) in known:
            continue
        known.add((state.st_dev, state.st_ino))
        links: list[Path] = []  # a folder that stands here itself comes before its links
        with os.scandir(place) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                path = place / entry.name
                if entry.name.startswith(".") or not path.exists():  # a link may lead nowhere
                    continue
                if entry.is_dir():
                    (links if entry.is_symlink() else waiting).append(path)
                elif entry.is_file() and not (entry.is_symlink() and _stands_in(root, path)):
                    yield path
        waiting[:0] = links


def _stands_in(root: Path, link: Path) -> bool:
    """Whether the file that a link leads to is found below `root` without the link."""
    target = link.resolve()
    if not target.is_relative_to(root) or target.suffix.lower() != link.suffix.lower():
        return False
    return not any(part.startswith(".") for part in target.relative_to(root).parts)
