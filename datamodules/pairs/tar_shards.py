"""Images with captions in tar files of the webdataset format, read by index: the order depends only on (seed, epoch).

Shards must be on a local or mounted file system, not in a pipe or an object store, because samples are read in any
order. Each process reads only its own samples, but from all shards, and keeps the index in memory, 33 bytes per sample.
"""

import hashlib
import json
import os
import tarfile
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO, FileIO
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from trunkline import TrunklineError
from trunkline.datamodules.images.image_sources import IMAGE_SUFFIXES, open_image
from trunkline.datamodules.pairs.captions import caption_list
from trunkline.files import atomic_write, file_state, lock

INDEX_FORMAT = 1
"""Version of the index format; with a new number, all indices are written again."""
ABSENT = -1
SAMPLE = np.dtype([("image", "<i8"), ("image_size", "<i8"), ("text", "<i8"), ("text_size", "<i8"), ("json", "?")])
"""Positions of a sample's image and text in the shard, in bytes, or `ABSENT`; their sizes; whether the text is JSON."""
OPEN_FILES = 64
"""Number of shards that a process keeps open."""
SCANNERS = 8
"""Number of shards that are scanned at once, because on a network file system most of the time is waiting."""


def read_index(shard: Path, cache: Path, skip_corrupt: bool) -> np.ndarray:
    """(samples,) `SAMPLE`s of a shard, from the cache if the shard has not changed.

    With `skip_corrupt`, a shard that is cut short gives a warning and the samples before the cut.

    Raises:
        TrunklineError: if the shard is missing, not an uncompressed tar file, or cut short (without `skip_corrupt`).
    """
    try:
        state = file_state(shard)
    except OSError as error:
        raise TrunklineError(f"cannot read the shard {shard}: {error.strerror}; fix source", "data.source") from error
    name = hashlib.blake2b(json.dumps([INDEX_FORMAT, str(shard.resolve()), state]).encode(), digest_size=12).hexdigest()
    file = cache / "tar" / f"{name}.npy"
    if file.exists():
        return np.load(file)
    samples, fault = scan(shard)
    if fault:
        if not skip_corrupt:
            raise TrunklineError(
                f"{fault}; write it again, or set skip_corrupt=true to use the samples before that",
                field="data.skip_corrupt",
            )
        warnings.warn(f"{fault}; only the {len(samples)} samples before that are used", stacklevel=2)
        return samples  # not stored in the cache, so that each run warns
    content = BytesIO()
    np.save(content, samples)
    atomic_write(file, [content.getbuffer()])
    return samples


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


class TarPairs:
    """Images with captions in tar files: `KEY.jpg` (or another image) with `KEY.txt` (one caption) or `KEY.json`.

    Args:
        shards: the files.
        caption_column: key in the JSON that holds the captions, a text or a list of texts.
        cache: folder for the indices of the shards.
        shard_window: number of shards whose samples are shuffled together; an epoch reads the shards in random order,
            in windows of this size, so that a process reads from few files at once.
        skip_corrupt: as in `read_index`.

    Raises:
        TrunklineError: the errors of `read_index`; if there is no sample.
    """

    def __init__(
        self, shards: list[Path], caption_column: str, cache: Path, shard_window: int, skip_corrupt: bool
    ) -> None:
        self.shards, self.caption_column, self.shard_window = shards, caption_column, shard_window
        # One process scans the shards; the others wait for the lock and then read the indices from the cache.
        with lock(cache / "tar" / ".lock"), ThreadPoolExecutor(SCANNERS) as pool:
            indices = list(pool.map(lambda shard: read_index(shard, cache, skip_corrupt), shards))
        self.samples = np.concatenate(indices)
        self.starts = np.cumsum([0, *map(len, indices)])
        """(shards + 1,) the first row of each shard, and the number of rows."""
        if not len(self.samples):
            raise TrunklineError(
                f"{shards[0]}{f' and {len(shards) - 1} more' if len(shards) > 1 else ''} holds no images with texts "
                "(KEY.jpg with KEY.txt or KEY.json); fix source",
                field="data.source",
            )
        self.key = ["tar", caption_column, [[str(shard.resolve()), *file_state(shard)] for shard in shards]]
        self.opened: OrderedDict[int, FileIO] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"opened": OrderedDict()}

    def __len__(self) -> int:
        return len(self.samples)

    def image(self, row: int) -> Image.Image:
        name, content = self._member(row, "image")
        return open_image(content, name)

    def captions(self, row: int) -> list[str]:
        place, content = self._member(row, "text")
        if content is None:
            raise TrunklineError(
                f"{place} has no .txt or .json beside it; add one, or set skip_corrupt=true", field="data.skip_corrupt"
            )
        try:
            text = content.decode("utf-8-sig")
            cells = json.loads(text) if self.samples[row]["json"] else {"txt": text.strip()}
        except ValueError as error:
            raise TrunklineError(
                f"{place}: the caption cannot be read: {error}; fix it, or set skip_corrupt=true",
                field="data.skip_corrupt",
            ) from error
        column = self.caption_column if self.samples[row]["json"] else "txt"
        return caption_list(cells.get(column) if isinstance(cells, dict) else None, place, column)

    def name(self, row: int) -> str:
        return self._member(row, "image", header_only=True)[0]

    def order(self, generator: np.random.Generator) -> np.ndarray:
        shards, parts = generator.permutation(len(self.shards)), []
        for begin in range(0, len(shards), self.shard_window):
            window = shards[begin : begin + self.shard_window]
            rows = np.concatenate([np.arange(self.starts[shard], self.starts[shard + 1]) for shard in window])
            parts.append(generator.permutation(rows))
        return np.concatenate(parts)

    def _member(self, row: int, member: str, header_only: bool = False) -> tuple[str, bytes | None]:
        """Name and content of the member `image` or `text`; if it is absent, the name of the other member and None."""
        sample, shard = self.samples[row], int(self.starts.searchsorted(row, "right")) - 1
        absent = sample[member] == ABSENT
        present = {"image": "text", "text": "image"}[member] if absent else member
        size = 0 if absent or header_only else int(sample[f"{member}_size"])
        # The header is the block before the content, and begins with the name.
        block = self._read(shard, int(sample[present]) - tarfile.BLOCKSIZE, tarfile.BLOCKSIZE + size)
        name = block[: tarfile.LENGTH_NAME].partition(tarfile.NUL)[0].decode("utf-8", "replace")
        return f"{self.shards[shard]}, {name}", None if absent else block[tarfile.BLOCKSIZE :]

    def _read(self, shard: int, start: int, size: int) -> bytes:
        """Bytes of a shard. `pread` is used because worker processes inherit open files and share their positions."""
        try:
            if shard not in self.opened:
                self.opened[shard] = self.shards[shard].open("rb", buffering=0)
                if len(self.opened) > OPEN_FILES:
                    self.opened.popitem(last=False)[1].close()
            self.opened.move_to_end(shard)
            content = os.pread(self.opened[shard].fileno(), size, start)
        except OSError as error:
            raise TrunklineError(
                f"cannot read the shard {self.shards[shard]}: {error.strerror}; fix source",
                field="data.source",
            ) from error
        if len(content) < size:
            raise TrunklineError(
                f"the shard {self.shards[shard]} became shorter while it was used; start again when it is complete"
            )
        return content
