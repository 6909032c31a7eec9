"""Finds files below a folder. The list of a large folder is kept in a file that all processes of a machine map.

Measured with 1.28 million names as those of ImageNet, a process needs 46 MiB for its list, all of it in pages that the
machine keeps once; the first process, which searches the folder, needs 220 MiB for a moment. A list of `Path`s took
437 MiB in each process, and was copied into each worker process as it was read. The command is
`python tests/support/data_memory.py images FOLDER 1.28`.
"""

import hashlib
import json
import os
import time
from bisect import bisect_left
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, overload

import numpy as np

from trunkline import TrunklineError
from trunkline.files import atomic_write, facts_at_end, lock, read_facts

LIST_FORMAT = 1
"""Version of the format of a list that is kept; with a new number, all folders are searched again."""
KEPT_FROM = 10_000
"""Number of files from which on a list is kept: a small folder is searched in no time."""


class FileNames(Sequence[Path]):
    """Files below a folder, sorted if they were searched: their names one after the other in one array, which worker
    processes share.

    Args:
        folder: the folder.
        borders: (N + 1,) where each name begins in `content`, and the end of the last one.
        content: the names, relative to the folder, as uint8.
        skip: number of bytes at the beginning of each name to leave out.
        linked: whether links were met on the way.
        suffixes: those that occur, of all files below the folder that was searched.
        file: the file that holds both arrays, and the first and the last of its files that this list has.
    """

    def __init__(
        self,
        folder: Path,
        borders: np.ndarray,
        content: np.ndarray,
        skip: int = 0,
        linked: bool = False,
        suffixes: Collection[str] = (),
        file: tuple[Path, int, int] | None = None,
    ) -> None:
        self.folder, self.borders, self.content = folder, borders, content
        self.skip, self.linked, self.suffixes, self.file = skip, linked, suffixes, file

    def __reduce__(self) -> tuple[Any, ...]:
        if self.file is None:
            return FileNames, (self.folder, self.borders, self.content, self.skip, self.linked, self.suffixes)
        return reopened, (self.folder, self.skip, self.file)  # else the names would be sent to each worker process

    def __len__(self) -> int:
        return len(self.borders) - 1

    @overload
    def __getitem__(self, number: int) -> Path: ...
    @overload
    def __getitem__(self, number: slice) -> list[Path]: ...
    def __getitem__(self, number: int | slice) -> Path | list[Path]:
        if isinstance(number, slice):
            return [self[n] for n in range(*number.indices(len(self)))]
        return self.folder / self.name(range(len(self))[number])

    def name(self, number: int) -> str:
        """The path of a file below the folder."""
        begin, end = self.borders[number] + self.skip, self.borders[number + 1]
        return os.fsdecode(self.content[begin:end].tobytes())

    def digest(self) -> str:
        """A hexadecimal digest of all names."""
        names = self.content[self.borders[0] : self.borders[-1]]
        return hashlib.blake2b(np.ascontiguousarray(names).data, digest_size=8).hexdigest()

    def groups(self) -> Iterator[tuple[str, int, int]]:
        """(name, first file, last file + 1) of each entry of the folder itself that is a file or holds files."""
        begin = 0
        while begin < len(self):
            name = self.name(begin).partition("/")[0]
            end = bisect_left(range(len(self)), True, begin, key=partial(self._outside, name))
            yield name, begin, end
            begin = end

    def _outside(self, name: str, number: int) -> bool:
        return self.name(number).partition("/")[0] != name

    def below(self, name: str) -> "FileNames":
        """The files below an entry of the folder itself."""
        first, last = next(((begin, end) for group, begin, end in self.groups() if group == name), (0, 0))
        file = None if self.file is None else (self.file[0], self.file[1] + first, self.file[1] + last)
        skip = self.skip + len(os.fsencode(name)) + 1
        borders = self.borders[first : last + 1]
        return FileNames(self.folder / name, borders, self.content, skip, self.linked, self.suffixes, file)


def reopened(folder: Path, skip: int, file: tuple[Path, int, int]) -> FileNames:
    """A part of a list that is kept in a file.

    Raises:
        OSError, ValueError, KeyError: if there is no such file, or if it is broken.
    """
    path, first, last = file
    facts = read_facts(path)
    files, size = facts["files"], facts["bytes"]
    borders = np.asarray(np.memmap(path, "<i8", "r", shape=(files + 1,)))
    content = np.asarray(np.memmap(path, np.uint8, "r", offset=8 * (files + 1), shape=(size,)))
    return FileNames(folder, borders[first : last + 1], content, skip, facts["linked"], facts["suffixes"], file)


def listed_files(folder: Path, suffixes: tuple[str, ...], cache: Path) -> FileNames:
    """All files below a folder that end with one of the suffixes, as `walk` finds them.

    The list of a large folder is kept in the cache, and used as long as no folder in it has changed, so that only one
    process of a machine searches it. If the cache cannot be written, each process does.
    """
    key = json.dumps([LIST_FORMAT, str(folder.resolve()), suffixes]).encode()
    file = cache / "folders" / f"{hashlib.blake2b(key, digest_size=12).hexdigest()}.files"
    kept = kept_list(file, folder)
    if kept is not None:
        return kept
    if len(list(islice(walk(folder, Visited()), KEPT_FROM))) < KEPT_FROM:
        return searched(folder, suffixes, Visited())
    found = None
    try:
        with lock(file.with_suffix(".lock")):
            found = kept_list(file, folder)
            if found is None:
                visited = Visited()
                found = searched(folder, suffixes, visited)
                if visited.steady():
                    keep(file, found, visited)
                    found = kept_list(file, folder)
    except TrunklineError:  # the cache cannot be written
        pass
    return searched(folder, suffixes, Visited()) if found is None else found


def keep(file: Path, names: FileNames, visited: "Visited") -> None:
    """Write a list to a file.

    Raises:
        TrunklineError: if it cannot be written.
    """
    facts = {"files": len(names), "bytes": len(names.content), "linked": names.linked, "suffixes": names.suffixes}
    end = facts_at_end(facts | {"folders": visited.folders})
    atomic_write(file, [names.borders.astype("<i8").data, names.content.data, end])


def kept_list(file: Path, folder: Path) -> FileNames | None:
    """The list of a folder's files that a file holds; None if there is none, or if a folder has changed."""
    try:
        facts = read_facts(file)
        for place, *state in facts["folders"]:
            if folder_state(folder / place) != state:
                return None
        return reopened(folder, 0, (file, 0, facts["files"]))
    except (OSError, ValueError, KeyError):
        return None


def folder_state(folder: Path) -> list[int]:
    """[inode, time of the last change in ns]: new, renamed and removed entries change it.

    It is the time that only the system sets (ctime), because rsync and tar set the other one back.
    """
    state = folder.stat()
    return [state.st_ino, state.st_ctime_ns]


def searched(folder: Path, suffixes: tuple[str, ...], visited: "Visited") -> FileNames:
    """All files below a folder that end with one of the suffixes, sorted by the parts of their names."""
    names = [name for name in walk(folder, visited) if name.lower().endswith(suffixes)]
    names.sort(key=lambda name: name.replace("/", "\0"))
    found = sorted({os.path.splitext(name)[1] for name in names})
    return FileNames(folder, *packed(names), linked=visited.links, suffixes=found)


def packed(names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """`borders` and `content` of `FileNames`."""
    borders = np.cumsum([0, *(len(os.fsencode(name)) for name in names)])
    return borders, np.frombuffer(os.fsencode("".join(names)), np.uint8)


def files_below(folder: str | Path, suffixes: tuple[str, ...], kind: str, field: str) -> FileNames:
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
    return some_files(searched(folder, suffixes, Visited()), suffixes, kind, field)


def some_files(files: FileNames, suffixes: tuple[str, ...], kind: str, field: str) -> FileNames:
    """The files, if there are any; raises the error of `files_below` if not."""
    if not files:
        name, types = field.rpartition(".")[2], " ".join(suffixes)
        raise TrunklineError(f"{name}={files.folder} holds no {kind} file ({types}); give one that does", field)
    return files


def names_and_sizes(files: Iterable[Path], folder: Path) -> list[list[Any]]:
    """[path below the folder, bytes] of each file, to tell data from other data wherever it is."""
    return [[os.path.relpath(file, folder), file.stat().st_size] for file in files]


@dataclass
class Visited:
    """What `walk` saw on its way."""

    folders: list[list[Any]] = field(default_factory=list)
    """[path below the root, then `folder_state` before it was read] of each folder."""
    links: bool = False
    """Whether there was a link."""
    lost: bool = False
    """Whether a link led nowhere: a file that appears there changes no folder here."""

    def steady(self) -> bool:
        """Whether a change would show: file systems count time in ticks, so that two changes can have the same time."""
        return not self.lost and max(state[2] for state in self.folders) < time.time_ns() - 2_000_000_000


def walk(folder: Path, visited: Visited) -> Iterator[str]:
    """All files below a folder, relative to it, each real file once: links to folders are followed, but not in circles.

    Hidden files and folders are left out, and so are pipes, devices, and links to a file that stands here itself.
    """
    root, known, waiting = folder.resolve(), set(), [""]
    while waiting:
        place = waiting.pop()
        state = (folder / place).stat()
        if (state.st_dev, state.st_ino) in known:
            continue
        known.add((state.st_dev, state.st_ino))
        visited.folders.append([place, state.st_ino, state.st_ctime_ns])
        links: list[str] = []  # a folder that stands here itself comes before its links
        with os.scandir(folder / place) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                if entry.name.startswith("."):
                    continue
                name, linked = f"{place}/{entry.name}" if place else entry.name, entry.is_symlink()
                visited.links |= linked
                if linked and not os.path.exists(entry.path):
                    visited.lost = True
                elif entry.is_dir():
                    (links if linked else waiting).append(name)
                elif entry.is_file() and not (linked and _stands_in(root, Path(entry.path))):
                    yield name
        waiting[:0] = links


def _stands_in(root: Path, link: Path) -> bool:
    """Whether the file that a link leads to is found below `root` without the link."""
    target = link.resolve()
    if not target.is_relative_to(root) or target.suffix.lower() != link.suffix.lower():
        return False
    return not any(part.startswith(".") for part in target.relative_to(root).parts)
