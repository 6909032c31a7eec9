"""How a recording becomes a row of a batch: read, changed at random in training, turned into log-mel frames, padded."""

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from trunkline import TrunklineError
from trunkline.datamodules.audio.audio_rows import AudioRows
from trunkline.datamodules.audio.log_mel import LogMel
from trunkline.datamodules.samplers import SampleKey


class Clip(NamedTuple):
    """A row as the network hears it."""

    features: Tensor
    """(T, M) float32; with `padding: fixed` padded."""
    row: int
    """Number of the row that was read."""
    skipped: int
    """How many rows before it could not be read."""
    truncated: bool
    """Whether its end was cut off."""


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
    """

    def __init__(
        self,
        rows: AudioRows,
        log_mel: LogMel,
        augmentation: Any = None,
        seed: int = 0,
        skip_corrupt: bool = False,
        training: bool = False,
    ) -> None:
        self.rows, self.log_mel, self.augmentation = rows, log_mel, augmentation
        self.seed, self.skip_corrupt, self.training = seed, skip_corrupt, training

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def lengths(self) -> np.ndarray:
        """(N,) frames of each row, before any augmentation."""
        frames = frame_counts(self.rows.seconds, self.log_mel)
        return np.minimum(frames, self.log_mel.max_frames)

    def read(self, row: int) -> np.ndarray:
        """The samples (S,) of a row.

        Raises:
            TrunklineError: if it cannot be read.
        """
        return self.rows.waveform(row, self.log_mel.sample_rate)

    def readable(self, row: int) -> tuple[np.ndarray, int]:
        """The samples of a row, or else of the next one that can be read; and how many were skipped.

        Raises:
            TrunklineError: if the row cannot be read and `skip_corrupt` is off, or if no row can be read.
        """
        skipped = 0
        while True:
            try:
                return self.read((row + skipped) % len(self)), skipped
            except TrunklineError as error:
                if not self.skip_corrupt or skipped >= len(self):
                    raise
                # Take the next row instead, so that every process keeps its batch size.
                warnings.warn(f"skipped: {error}", stacklevel=2)
                skipped += 1

    def another(self, generator: np.random.Generator) -> np.ndarray:
        """The samples of a row drawn at random, for babble."""
        return self.readable(int(generator.integers(len(self))))[0]

    def clip(self, key: SampleKey) -> Clip:
        """A row of the network's input."""
        waveform, skipped = self.readable(key.index)
        log_mel, samples = self.log_mel, waveform[: self.log_mel.max_samples]
        if self.augmentation is None:
            features = log_mel.features(torch.from_numpy(samples))
        else:
            generator = np.random.default_rng((self.seed, key.epoch, key.index))
            samples = self.augmentation.augment_waveform(samples, log_mel.sample_rate, generator, self.another)
            features = log_mel.features(torch.from_numpy(samples), self.augmentation.warp(generator))
            features = self.augmentation.augment_features(features[: log_mel.max_frames], generator)
        truncated = bool(too_long(len(waveform), log_mel))
        return Clip(features, (key.index + skipped) % len(self), skipped, truncated)

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
        items = [
            {
                "index": key.index,
                "valid": counted,
                "skipped": int(clip.skipped > 0 and key.valid),
                "truncated": int(clip.truncated and key.valid),
            }
            for key, clip, counted in zip(keys, clips, valid, strict=True)
        ]
        columns = self.features(clips) | self.labels([clip.row for clip in clips], valid)
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

    def labels(self, rows: Sequence[int], valid: Sequence[bool]) -> dict[str, Tensor]:
        """What a batch says about its rows, by name, each (B, …); rows that are not `valid` are not counted."""
        raise NotImplementedError


def too_long(samples: Any, log_mel: LogMel) -> Any:
    """Whether clips of so many samples lose a frame or more."""
    return samples >= log_mel.max_samples + log_mel.hop


def frame_counts(seconds: np.ndarray, log_mel: LogMel) -> np.ndarray:
    """(N,) frames of clips of these lengths (N,)."""
    samples = np.rint(seconds * log_mel.sample_rate).astype(np.int64)
    sizes, places = np.unique(samples, return_inverse=True)
    return np.array([log_mel.frames_of(int(size)) for size in sizes], np.int64)[places]
