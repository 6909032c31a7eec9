"""Recordings that are decoded and resampled once, and then read from the disk as they are."""

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from pathlib import Path

import numpy as np

from trunkline import TrunklineError
from trunkline.datamodules.audio.audio_listing import ListedAudio
from trunkline.datamodules.text.preparation import write_array
from trunkline.files import cannot_write, lock, replacing

CACHE_BLOCK = 256
"""Recordings that are decoded at once: they wait in memory."""
WAVEFORM_FORMAT = 1
"""Version of the files here; with a new number they are written again."""


class CachedAudio:
    """Recordings whose samples stand in a file (`AudioRows`): the same samples as without it, read faster.

    The file is written by one process, the first time; the others wait. An hour at 16 kHz takes 230 MB.

    Args:
        rows: the recordings.
        rate: samples per second.
        cache: folder of what is prepared.
        skip_corrupt: leave out what cannot be decoded; `waveform` then raises its error.

    Raises:
        TrunklineError: for the first recording that cannot be decoded, if `skip_corrupt` is off; if the file cannot be
            written.
    """

    def __init__(self, rows: ListedAudio, rate: int, cache: Path, skip_corrupt: bool = False) -> None:
        self.rows, self.rate = rows, rate
        self.seconds, self.texts, self.labels = rows.seconds, rows.texts, rows.labels
        parts = [[row.content, row.start, row.end, row.rate] for row in rows.rows]
        key = rows.listing.key(row.content for row in rows.rows)  # of the other files one may be missing
        settings = json.dumps([WAVEFORM_FORMAT, rate, key, parts])
        file = cache / f"waveforms-{blake2b(settings.encode(), digest_size=12).hexdigest()}.f32"
        borders = file.with_suffix(".npy")
        if not borders.exists():
            with lock(file.with_suffix(".lock")):
                if not borders.exists():
                    self._write(file, borders, skip_corrupt)
        self.borders: np.ndarray = np.load(borders)
        self.samples = np.memmap(file, np.float32, "r") if self.borders[-1] else np.zeros(0, np.float32)

    def _write(self, file: Path, borders: Path, skip_corrupt: bool) -> None:
        """The samples first: if there are borders, the samples are complete."""
        places = [0]
        try:
            with replacing(file) as (temporary,), temporary.open("wb") as stream:
                for samples in self._decoded(skip_corrupt):
                    stream.write(samples.data)
                    places.append(places[-1] + len(samples))
        except OSError as error:
            raise cannot_write(file, error) from error
        write_array(borders, np.array(places))

    def _decoded(self, skip_corrupt: bool) -> Iterator[np.ndarray]:
        """The samples of all rows, in order; none for a row that cannot be decoded."""

        def decoded(row: int) -> np.ndarray:
            try:
                return np.ascontiguousarray(self.rows.waveform(row, self.rate))
            except TrunklineError:
                if not skip_corrupt:
                    raise
                return np.zeros(0, np.float32)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for first in range(0, len(self), CACHE_BLOCK):
                yield from pool.map(decoded, range(first, min(first + CACHE_BLOCK, len(self))))

    def __len__(self) -> int:
        return len(self.rows)

    def waveform(self, row: int, rate: int, start: float = 0.0, end: float | None = None) -> np.ndarray:
        first, last = self.borders[row : row + 2].tolist()
        if rate != self.rate or first == last:
            return self.rows.waveform(row, rate, start, end)
        stop = last if end is None else min(first + round(end * rate), last)
        return np.array(self.samples[first + round(start * rate) : stop])

    def name(self, row: int) -> str:
        return self.rows.name(row)

    def stored(self, row: int) -> list[bytes | Path]:
        return self.rows.stored(row)  # decoded samples may be rounded in another way on another machine
