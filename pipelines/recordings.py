"""Recordings for trained networks: files or rows of data, of any length, heard in windows of bounded length."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from trunkline import TrunklineError
from trunkline.datamodules.audio.audio_files import audio_header, audio_paths, read_audio
from trunkline.datamodules.audio.audio_rows import AudioRows
from trunkline.datamodules.audio.log_mel import LogMel
from trunkline.datamodules.samplers import SampleKey, plain_errors
from trunkline.datamodules.skipping import Skipped

CONTEXT_SHARE = 1 / 6
"""Share of a window at each of its ends that the next window hears too, and better."""


class AudioFiles:
    """Audio files, each a recording (`AudioRows`).

    Args:
        files: the files.
        seconds: length of each.
    """

    texts: list[str] | None = None
    labels: list[list[str]] | None = None

    def __init__(self, files: Sequence[Path], seconds: Sequence[float]) -> None:
        self.files, self.seconds = files, np.array(seconds)

    def __len__(self) -> int:
        return len(self.files)

    def name(self, row: int) -> str:
        return str(self.files[row])

    def stored(self, row: int) -> list[bytes | Path]:
        return [self.files[row]]

    def waveform(self, row: int, rate: int, start: float = 0.0, end: float | None = None) -> np.ndarray:
        # A whole file must not be silent; a part of one may be.
        return read_audio(self.files[row], self.name(row), rate, start or None, end)


def open_recordings(paths: Sequence[str], field: str, skip_corrupt: bool = False) -> tuple[AudioFiles, list[str]]:
    """The recordings in files, and in all audio files below folders; only their headers are read.

    Args:
        paths: files and folders.
        field: the option that named the paths, for messages.
        skip_corrupt: leave out files whose header cannot be read, and print their faults, instead of stopping.

    Returns:
        The recordings, and the paths of all files, in the same order.

    Raises:
        TrunklineError: if a path is missing, or a file cannot be read.
    """
    files: list[Path] = []
    for given in paths:
        path = Path(given)
        if not path.exists():
            raise TrunklineError(f"{given}: there is no such file or folder; fix the path", field)
        files += audio_paths(path, field) if path.is_dir() else [path]
    good, seconds = [], []
    for file in files:
        try:
            seconds.append(audio_header(file, str(file)).seconds)
            good.append(file)
        except TrunklineError as error:
            if not skip_corrupt or len(files) == 1:
                raise
            print(f"skipped: {error}", file=sys.stderr)
    if not good:
        raise TrunklineError(f"none of these {len(files)} recordings can be read; give others", field)
    return AudioFiles(good, seconds), [str(file) for file in files]


class AudioWindow(NamedTuple):
    """A part of a recording."""

    recording: int
    """Number of the recording."""
    start: int
    """First sample."""
    stop: int | None
    """The sample after the last; None for the last window, which ends where the recording ends."""


class Windowing(NamedTuple):
    """How long recordings are cut into windows that overlap. All lengths are in samples."""

    size: int
    """Length of a window."""
    unit: int
    """Samples for one state of the network; windows start at its multiples."""
    margin: int
    """What a window shares with its neighbour, which hears it better: half of the overlap."""

    @classmethod
    def of(cls, log_mel: LogMel, max_frames: int, step: int = 1, seconds: float | None = None) -> "Windowing":
        """Windows for a network.

        Args:
            log_mel: how waveforms become frames.
            max_frames: largest number of frames that the network hears at once.
            step: frames for one state.
            seconds: length of a window; None is that of the longest clip in training.

        Raises:
            TrunklineError: if a window is longer than the network can hear, or too short to overlap.
        """
        seconds = log_mel.max_seconds if seconds is None else seconds
        size, unit = round(seconds * log_mel.sample_rate), log_mel.hop * step
        if log_mel.padding == "fixed":
            longest = log_mel.max_samples
        else:
            longest = max(log_mel.max_samples, max_frames * log_mel.hop)
        margin, shortest = int(size * CONTEXT_SHARE) // unit * unit, max(unit, log_mel.window_samples)
        if margin < shortest or size > longest:
            least, most = (round(n / log_mel.sample_rate, 2) for n in (shortest / CONTEXT_SHARE, longest))
            raise TrunklineError(
                f"a window of {seconds:g} seconds does not suit the network, which hears {least:g} to {most:g} seconds "
                "at once",
                "window",
            )
        return cls(size, unit, margin)

    @property
    def stride(self) -> int:
        """From the start of a window to that of the next."""
        return self.size // self.unit * self.unit - 2 * self.margin

    def cut(self, recording: int, samples: int) -> Iterator[AudioWindow]:
        """The windows of a recording of this length."""
        start = 0
        while start + self.size < samples:
            yield AudioWindow(recording, start, start + self.size)
            start += self.stride
        yield AudioWindow(recording, start, None)

    def kept(self, window: AudioWindow) -> slice:
        """The states of a window that count: those of all windows together are those of the recording."""
        edge = self.margin // self.unit
        return slice(edge if window.start else 0, None if window.stop is None else self.stride // self.unit + edge)


class AudioWindows(Dataset[dict[str, Any]]):
    """The windows of recordings. The longest recordings come first, so that too large a batch fails at once.

    Items, of the same length in a batch: `features` (T, M); `mask` (T,) bool, except with `padding: fixed`; `index`,
    the number of the window; `valid`, False if it cannot be read; `frames`, their number without padding.

    Args:
        recordings: the recordings.
        log_mel: how waveforms become features.
        windowing: how they are cut.
        skip_corrupt: name what cannot be read in a warning, instead of stopping.
    """

    def __init__(
        self, recordings: AudioRows, log_mel: LogMel, windowing: Windowing, skip_corrupt: bool = False
    ) -> None:
        self.recordings, self.log_mel, self.skip_corrupt = recordings, log_mel, skip_corrupt
        self.skipped = Skipped()
        self.unpadded = replace(log_mel, padding="batch")
        lengths = np.rint(recordings.seconds * log_mel.sample_rate).astype(int)
        order = np.argsort(-lengths, kind="stable").tolist()
        self.windows = [window for n in order for window in windowing.cut(n, int(lengths[n]))]

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, key: SampleKey) -> dict[str, Any]:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: list[SampleKey]) -> list[dict[str, Any]]:
        clips = [self.waveform(self.windows[key.index]) for key in keys]
        features = [self.log_mel.features(torch.from_numpy(clip)) for clip in clips]
        longest = self.log_mel.batch_frames(max(map(len, features)))
        items = []
        for key, clip, own in zip(keys, clips, features, strict=True):
            item = {
                "features": F.pad(own, (0, 0, 0, longest - len(own))),
                "frames": min(len(own), self.unpadded.frames_of(len(clip))),
                "index": key.index,
                "valid": len(clip) > 0,
            }
            if self.log_mel.padding == "batch":
                item["mask"] = torch.arange(longest) < len(own)
            items.append(item)
        return items

    def waveform(self, window: AudioWindow) -> np.ndarray:
        """The samples (S,) of a window; none if it cannot be read and `skip_corrupt` is on.

        Raises:
            TrunklineError: if it cannot be read and `skip_corrupt` is off.
        """
        rate = self.log_mel.sample_rate
        end = None if window.stop is None else window.stop / rate
        try:
            return self.recordings.waveform(window.recording, rate, window.start / rate, end)
        except TrunklineError as error:
            if not self.skip_corrupt:
                raise
            self.skipped.add(error)
            return np.zeros(0, np.float32)

    def batches(self, batch_size: int, num_workers: int, doing: str) -> Iterator[dict[str, Tensor]]:
        """All windows in batches; a terminal shows the progress.

        Raises:
            TrunklineError: as `waveform`.
        """
        keys: Any = [SampleKey(0, n) for n in range(len(self))]
        loader = DataLoader(self, batch_size, sampler=keys, num_workers=num_workers)
        console = Console(stderr=True)  # the result may go to the standard output
        with plain_errors(num_workers):
            yield from track(loader, doing, console=console, transient=True, disable=not console.is_terminal)
