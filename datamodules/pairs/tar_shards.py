"""Images with captions in tar files of the webdataset format, read by index: the order depends only on (seed, epoch).

Shards must be on a local or mounted file system, not in a pipe or an object store, because samples are read in any
order. Each process reads only its own samples, but from all shards.
"""

import json
import os
import tarfile
from collections import OrderedDict
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from trunkline import TrunklineError
from trunkline.datamodules.images.image_decoding import open_image
from trunkline.datamodules.pairs.captions import caption_list
from trunkline.datamodules.pairs.tar_index import ABSENT, open_index

OPEN_FILES = 64
"""Number of shards that a process keeps open."""


class TarPairs:
    """Images with captions in tar files: `KEY.jpg` (or another image) with `KEY.txt` (one caption) or `KEY.json`.

    Args:
        shards: the files.
        caption_column: key in the JSON that holds the captions, a text or a list of texts.
        cache: folder for the indices of the shards.
        shard_window: number of shards whose samples are shuffled together; an epoch reads the shards in random order,
            in windows of this size, so that a process reads from few files at once.
        skip_corrupt: as in `open_index`.

    Raises:
        TrunklineError: the errors of `open_index`; if there is no sample.
    """

    def __init__(
        self, shards: list[Path], caption_column: str, cache: Path, shard_window: int, skip_corrupt: bool
    ) -> None:
        self.shards, self.caption_column, self.shard_window = shards, caption_column, shard_window
        self.index = open_index(shards, cache, skip_corrupt)
        if not len(self):
            raise TrunklineError(
                f"{shards[0]}{f' and {len(shards) - 1} more' if len(shards) > 1 else ''} holds no images with texts "
                "(KEY.jpg with KEY.txt or KEY.json); fix source",
                field="data.source",
            )
        self.opened: OrderedDict[int, FileIO] = OrderedDict()

    @property
    def key(self) -> list[Any]:
        """Everything that decides the captions, as plain data."""
        shards = zip(self.shards, self.index.states, strict=True)
        return ["tar", self.caption_column, [[str(shard.resolve()), *state] for shard, state in shards]]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"opened": OrderedDict()}

    def __len__(self) -> int:
        return len(self.index.samples)

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
            cells = json.loads(text) if self.index.samples[row]["json"] else {"txt": text.strip()}
        except ValueError as error:
            raise TrunklineError(
                f"{place}: the caption cannot be read: {error}; fix it, or set skip_corrupt=true",
                field="data.skip_corrupt",
            ) from error
        column = self.caption_column if self.index.samples[row]["json"] else "txt"
        return caption_list(cells.get(column) if isinstance(cells, dict) else None, place, column)

    def name(self, row: int) -> str:
        return self._member(row, "image", header_only=True)[0]

    def stored(self, row: int) -> list[bytes | Path]:
        return [self._member(row, member)[1] or b"" for member in ("image", "text")]

    def order(self, generator: np.random.Generator) -> Iterator[np.ndarray]:
        shards, starts = generator.permutation(len(self.shards)), self.index.starts
        for begin in range(0, len(shards), self.shard_window):
            window = shards[begin : begin + self.shard_window]
            yield generator.permutation(np.concatenate([np.arange(starts[n], starts[n + 1]) for n in window]))

    def _member(self, row: int, member: str, header_only: bool = False) -> tuple[str, bytes | None]:
        """Name and content of the member `image` or `text`; if it is absent, the name of the other member and None."""
        sample, shard = self.index.samples[row], int(self.index.starts.searchsorted(row, "right")) - 1
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
