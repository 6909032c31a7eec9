"""How a recording becomes a row of a batch: read, changed at random in training, turned into log-mel frames, padded."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from trunkline.datamodules.audio.audio_augmentation import AudioAugmentation
from trunkline.datamodules.audio.audio_rows import AudioRows
from trunkline.datamodules.audio.log_mel import LogMel
from trunkline.datamodules.samplers import SampleKey
from trunkline.datamodules.skipping import Skipped


class Mix(NamedTuple):
    """What a clip was mixed with."""

    row: int
    """Number of the other row."""
    share: float
    """Share of the clip itself."""


class Clip(NamedTuple):
    """A row as the network hears it."""

    features: Tensor
    """(T, M) float32."""
    row: int
    """Number of the row that was read."""
    skipped: int
    """How many rows before it could not be read."""
    truncated: bool
    """Whether its end was cut off."""
    mix: Mix | None = None


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread, as a worker does: Fourier transforms and convolutions round in another way on several, and
    features would depend on the number of workers.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class AudioClips(Dataset[dict[str, Any]]):
    """Base of datasets of recordings. An item is a pure function of (seed, epoch, index).

    Items: `features` (T, M), of the same T in a batch; `mask` (T,) bool, except with `padding: fixed`; `index`; `valid`
    (False if the row is not counted: a filler, or in evaluation a skipped row); `skipped` (1 if the row could not be
    read); `truncated` (1 if the clip was too long); and what `labels` adds.

    Args:
        rows: the recordings.
        log_mel: how waveforms become features.
        augmentation: random changes in training; None for evaluation.
        seed: seed of everything random in training.
        skip_corrupt: replace a row that cannot be read by the next one, instead of stopping.
        training: whether rows may be mixed, and a row that replaces another one counts.
    """

    def __init__(
        self,
        rows: AudioRows,
        log_mel: LogMel,
        augmentation: AudioAugmentation | None = None,
        seed: int = 0,
        skip_corrupt: bool = False,
        training: bool = False,
    ) -> None:
        self.rows, self.log_mel, self.augmentation = rows, log_mel, augmentation
        self.seed, self.skip_corrupt, self.training = seed, skip_corrupt, training
        self.long, self.skipped = too_long(rows.seconds, log_mel), Skipped()

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def lengths(self) -> np.ndarray:
        """(N,) frames of each row, before any augmentation."""
        return frame_counts(self.rows.seconds, self.log_mel)

    def read(self, row: int) -> np.ndarray:
        """The samples (S,) of a row, as far as the network hears them.

        Raises:
            TrunklineError: if it cannot be read.
        """
        rate, end = self.log_mel.sample_rate, self.log_mel.max_seconds if self.long[row] else None
        return self.rows.waveform(row, rate, end=end)[: self.log_mel.max_samples]

    def readable(self, row: int) -> tuple[np.ndarray, int]:
        """The samples of a row, or else of the next one that can be read; and how many were skipped.

        Raises:
            TrunklineError: if the row cannot be read and `skip_corrupt` is off, or if no row can be read.
        """
        return self.skipped.first_readable(self.read, row, len(self) if self.skip_corrupt else 1)

    def is_cut(self, row: int) -> bool:
        """Whether a row loses its end."""
        return bool(self.long[row])

    def drawn(self, generator: np.random.Generator) -> tuple[np.ndarray, int]:
        """The samples of a row drawn at random, and its number."""
        row = int(generator.integers(len(self)))
        samples, skipped = self.readable(row)
        return samples, (row + skipped) % len(self)

    def mix(self, samples: np.ndarray, generator: np.random.Generator) -> tuple[np.ndarray, Mix | None]:
        """The samples of a training row, mixed with those of another row or not."""
        return samples, None

    @one_thread()
    def clip(self, key: SampleKey) -> Clip:
        """A row as the network hears it."""
        samples, skipped = self.readable(key.index)
        row, mix, warp = (key.index + skipped) % len(self), None, 1.0
        generator = np.random.default_rng((self.seed, key.epoch, key.index))
        if self.training:
            samples, mix = self.mix(samples, generator)
        if self.augmentation is not None:
            rate, other = self.log_mel.sample_rate, lambda generator: self.drawn(generator)[0]
            samples = self.augmentation.augment_waveform(samples, rate, generator, other)
            warp = self.augmentation.warp(generator)
        features = self.log_mel.features(torch.from_numpy(samples), warp)
        features = features[: self.log_mel.max_frames]  # slower speech can be longer
        if self.augmentation is not None:
            features = self.augmentation.augment_features(features, generator)
        return Clip(features, row, skipped, self.is_cut(row), mix)

    def __getitem__(self, key: SampleKey) -> dict[str, Any]:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: list[SampleKey]) -> list[dict[str, Any]]:
        """The items of a batch, as a DataLoader asks for them: all of the same length.

        Raises:
            TrunklineError: if a row cannot be read and `skip_corrupt` is off.
        """
        clips = [self.clip(key) for key in keys]
        # Training can use the other row, but counting it twice would distort a metric.
        valid = [key.valid and (self.training or not clip.skipped) for key, clip in zip(keys, clips, strict=True)]
        items: list[dict[str, Any]] = [
            {
                "index": key.index,
                "valid": counted,
                "skipped": int(clip.skipped > 0 and key.valid),
                "truncated": int(clip.truncated and key.valid),
            }
            for key, clip, counted in zip(keys, clips, valid, strict=True)
        ]
        columns = self.features(clips) | self.labels(clips, valid)
        for name, values in columns.items():
            for item, value in zip(items, values.unbind(), strict=True):
                item[name] = value
        return items

    def features(self, clips: Sequence[Clip]) -> dict[str, Tensor]:
        """`features` (B, T, M), and `mask` (B, T) unless all clips are padded to the same length."""
        if self.log_mel.padding == "fixed":
            return {"features": torch.stack([clip.features for clip in clips])}
        longest = self.log_mel.batch_frames(max(len(clip.features) for clip in clips))
        features = torch.zeros(len(clips), longest, self.log_mel.num_mels)
        mask = torch.zeros(len(clips), longest, dtype=torch.bool)
        for n, clip in enumerate(clips):
            features[n, : len(clip.features)] = clip.features
            mask[n, : len(clip.features)] = True
        return {"features": features, "mask": mask}

    def labels(self, clips: Sequence[Clip], valid: Sequence[bool]) -> dict[str, Tensor]:
        """What a batch says about its clips, by name, each (B, …); those that are not `valid` are not counted."""
        raise NotImplementedError


def sample_counts(seconds: np.ndarray, log_mel: LogMel) -> np.ndarray:
    """(N,) samples of clips of these lengths (N,)."""
    return np.rint(seconds * log_mel.sample_rate).astype(np.int64)


def too_long(seconds: np.ndarray, log_mel: LogMel) -> np.ndarray:
    """(N,) bool, whether clips of these lengths (N,) lose a frame or more."""
    return sample_counts(seconds, log_mel) >= log_mel.max_samples + log_mel.hop


def frame_counts(seconds: np.ndarray, log_mel: LogMel) -> np.ndarray:
    """(N,) frames of clips of these lengths (N,)."""
    sizes, places = np.unique(sample_counts(seconds, log_mel), return_inverse=True)
    frames = np.array([log_mel.frames_of(int(size)) for size in sizes], np.int64)
    return np.minimum(frames, log_mel.max_frames)[places]
