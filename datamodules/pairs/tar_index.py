"""Where the samples of tar shards are: found once, then kept in one file that all processes of a machine map.

A process reads only the pages of the index that it needs, and the machine keeps each page once: 400 million samples are
a file of 13.2 GB, of which no process holds a copy. To begin an epoch of them, a process needs about 0.1 GiB of its own
(docs/measured.md). Setting a share of the rows aside takes 6 s per 100 million.
"""

import hashlib
import json
import tarfile
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from io import BytesIO
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from trunkline import TrunklineError
from trunkline.datamodules.images.image_sources import IMAGE_SUFFIXES
from trunkline.files import atomic_write, facts_at_end, file_state, lock, read_facts

INDEX_FORMAT = 1
"""Version of the format of a shard's own index; with a new number, all shards are scanned again."""
JOINED_FORMAT = 1
"""The same for the index of all shards, which is then joined again."""
ABSENT = -1
SAMPLE = np.dtype([("image", "<i8"), ("image_size", "<i8"), ("text", "<i8"), ("text_size", "<i8"), ("json", "?")])
"""Positions of a sample's image and text in the shard, in bytes, or `ABSENT`; their sizes; whether the text is JSON."""
SCANNERS = 8
"""Number of shards that are scanned at once, because on a network file system most of the time is waiting."""
GROUP_SHARDS = 256
"""Number of shards whose indices are in memory while the index is joined."""


class TarIndex:
    """The samples of all shards, in a file: their `SAMPLE`s, then facts about the shards.

    Args:
        file: the file.

    Raises:
        OSError, ValueError, KeyError: if it is missing or broken.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        facts = read_facts(file)
        self.states: list[list[int]] = facts["states"]
        """`file_state` of each shard when it was scanned."""
        self.faults: list[tuple[str, int]] = facts["faults"]
        """What is wrong with shards that are cut short, and the number of samples before the cut."""
        self.starts = np.cumsum([0, *facts["counts"]])
        """(shards + 1,) the first row of each shard, and the number of rows."""
        rows = int(self.starts[-1])
        # A plain array is sliced 3 times as fast as a `np.memmap`; both read from the disk.
        self.samples = np.asarray(np.memmap(file, SAMPLE, "r", shape=(rows,))) if rows else np.zeros(0, SAMPLE)
        """(rows,) `SAMPLE`s of all shards."""

    def __reduce__(self) -> tuple[Any, ...]:
        return TarIndex, (self.file,)  # else the content would be sent to each worker process


def open_index(shards: list[Path], cache: Path, skip_corrupt: bool) -> TarIndex:
    """The index of shards, in the order given; it is made now if there is none, or if a shard has changed.

    Only one process scans shards and joins the index; the others wait for it. With `skip_corrupt`, a shard that is cut
    short gives a warning in each process, and its samples before the cut.

    Raises:
        TrunklineError: if a shard is missing, not an uncompressed tar file, or cut short (without `skip_corrupt`); if
            the index cannot be written.
    """
    with ThreadPoolExecutor(SCANNERS) as pool:
        states = list(pool.map(shard_state, shards))
    folders = {folder: folder.resolve() for folder in {shard.parent for shard in shards}}
    paths = [str(folders[shard.parent] / shard.name) for shard in shards]
    name = hashlib.blake2b(json.dumps([JOINED_FORMAT, paths]).encode(), digest_size=12).hexdigest()
    file = cache / "tar" / f"{name}.joined"
    index = joined_index(file, states)
    if index is None:
        with lock(cache / "tar" / ".lock"):
            index = joined_index(file, states)
            if index is None:
                for leftover in file.parent.glob(".*.tmp"):  # of processes that were killed
                    leftover.unlink()
                atomic_write(file, joined(shards, states, cache, skip_corrupt))
                index = TarIndex(file)
    for fault, count in index.faults:
        if not skip_corrupt:
            raise broken_shard(fault)
        warnings.warn(f"{fault}; only the {count} samples before that are used", stacklevel=2)
    return index


def broken_shard(fault: str) -> TrunklineError:
    """The error for a shard that is cut short."""
    return TrunklineError(
        f"{fault}; write it again, or set skip_corrupt=true to use the samples before that", "data.skip_corrupt"
    )


def shard_state(shard: Path) -> list[int]:
    """The `file_state` of a shard.

    Raises:
        TrunklineError: if it cannot be read.
    """
    try:
        return file_state(shard)
    except OSError as error:
        raise TrunklineError(f"cannot read the shard {shard}: {error.strerror}; fix source", "data.source") from error


def joined_index(file: Path, states: list[list[int]]) -> TarIndex | None:
    """The index in a file; None if there is none of shards in these states."""
    try:
        index = TarIndex(file)
    except (OSError, ValueError, KeyError):
        return None
    return index if index.states == states else None


def joined(shards: list[Path], states: list[list[int]], cache: Path, skip_corrupt: bool) -> Iterator[bytes]:
    """The content of the file of a `TarIndex`, one shard after the other; raises the errors of `open_index`."""
    counts, faults = [], []
    with ThreadPoolExecutor(SCANNERS) as pool:
        for begin in range(0, len(shards), GROUP_SHARDS):
            group = slice(begin, begin + GROUP_SHARDS)
            for samples, fault in pool.map(partial(read_index, cache), shards[group], states[group]):
                if fault and not skip_corrupt:
                    raise broken_shard(fault)
                faults += [(fault, len(samples))] if fault else []
                counts.append(len(samples))
                yield samples.tobytes()
    yield facts_at_end({"states": states, "counts": counts, "faults": faults})


def read_index(cache: Path, shard: Path, state: list[int]) -> tuple[np.ndarray, str]:
    """(samples,) `SAMPLE`s of a shard, from the cache if they are there; and what is wrong with its end, as in `scan`.

    Each shard has its own file, so that a scan that is killed goes on where it was, and a new shard costs one scan.

    Raises:
        TrunklineError: if the shard is not an uncompressed tar file.
    """
    name = hashlib.blake2b(json.dumps([INDEX_FORMAT, str(shard.resolve()), state]).encode(), digest_size=12).hexdigest()
    file = cache / "tar" / f"{name}.npy"
    if file.exists():
        return np.load(file), ""
    samples, fault = scan(shard)
    if not fault:
        content = BytesIO()
        np.save(content, samples)
        atomic_write(file, [content.getbuffer()])
    return samples, fault


def scan(shard: Path) -> tuple[np.ndarray, str]:
    """(samples,) `SAMPLE`s of a shard, and what is wrong with its end ("" if nothing is).

    Raises:
        TrunklineError: if the file is not an uncompressed tar file at all.
    """
    members: list[tuple[str, str, int, int]] = []
    fault = ""
    try:
        with tarfile.open(shard, "r:") as archive:
            try:
                for member in archive:
                    if member.isreg():
                        folder, _, file = member.name.rpartition("/")
                        stem, _, suffix = file.partition(".")  # webdataset: up to the first dot
                        members.append((f"{folder}/{stem}", f".{suffix.lower()}", member.offset_data, member.size))
                    archive.members = []  # type: ignore[attr-defined]  # else all members stay in memory
                fault = broken_end(archive)
            except (tarfile.TarError, OSError, ValueError) as error:
                fault = f"{member.name} is cut short ({error})"
    except (tarfile.TarError, OSError) as error:
        raise TrunklineError(
            f"the shard {shard} is not an uncompressed tar file: {error}; shards must be .tar files that are not "
            "compressed"
        ) from error
    size = shard.stat().st_size
    members = [entry for entry in members if entry[2] + entry[3] <= size]
    samples = np.array(list(samples_of(members)), SAMPLE)
    if fault and len(samples) and ABSENT in (samples["image"][-1], samples["text"][-1]):
        samples = samples[:-1]  # the last sample lost a member by the cut
    return samples, f"the shard {shard} of {size} bytes is broken: {fault}" if fault else ""


def broken_end(archive: tarfile.TarFile) -> str:
    """What is wrong with an archive's end mark, or "" if it has one."""
    stream: Any = archive.fileobj
    stream.seek(archive.offset)
    block = stream.read(tarfile.BLOCKSIZE)
    if block == tarfile.NUL * tarfile.BLOCKSIZE:
        return ""
    what = (
        "there is something else than a member" if len(block) == tarfile.BLOCKSIZE else "it ends without its end mark"
    )
    return f"{what} at byte {archive.offset}"


def samples_of(members: list[tuple[str, str, int, int]]) -> Iterator[tuple[int, int, int, int, bool]]:
    """Make `SAMPLE`s of members (key, suffix, start, size).

    Neighbours with the same key are one sample; its text is the .txt member, or if it has none the .json member.
    """
    for _, group in groupby(members, key=lambda member: member[0]):
        places = {suffix: (start, size) for _, suffix, start, size in group}
        image = next((place for suffix, place in places.items() if suffix in IMAGE_SUFFIXES), None)
        text = places.get(".txt") or places.get(".json")
        if image or text:
            yield (*(image or (ABSENT, 0)), *(text or (ABSENT, 0)), ".txt" not in places)
