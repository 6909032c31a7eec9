"""Random changes to the sound of training clips, and masks on their features."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from trunkline import TrunklineError
from trunkline.datamodules.audio.audio_files import audio_header, audio_paths, read_audio, resample

OtherClip = Callable[[np.random.Generator], np.ndarray]
"""Gives the samples (S,) of another clip, drawn with the generator."""
NOISES = ("white", "pink", "babble", "files")


@dataclass
class AudioAugmentation:
    """Random changes to a training clip, in this order; all are off by default.

    Ranges are (smallest, largest) value.

    Raises:
        TrunklineError: if a setting is out of its range, or if `noise_folder` holds no sound.
    """

    speed: tuple[float, float] = (1.0, 1.0)
    """Range of the speed, in steps of 0.01; as with a tape, pitch changes with it."""
    time_shift: float = 0.0
    """Seconds by which a clip is at most moved to earlier or later, and never by more than half of it. It keeps its
    length, and the gap is silent."""
    pause: float = 0.0
    """Seconds of silence that are at most added before a clip, and after it."""
    noise: float = 0.0
    """Probability of adding a noise."""
    noise_snr: tuple[float, float] = (5.0, 20.0)
    """Range of the signal-to-noise ratio: the power of the clip over that of the noise, in dB."""
    noise_kinds: tuple[str, ...] = ("white", "pink")
    """The noises, each equally likely: `white`; `pink` (equal power in each octave); `babble` (other clips at the same
    time, equally loud); `files` (a part of a file in `noise_folder`)."""
    babble_clips: int = 4
    """The largest number of other clips in a babble; at least one is there."""
    noise_folder: str | None = None
    """Folder with recordings of noises, for the kind `files`."""
    gain_db: float = 0.0
    """Largest change of loudness, in dB."""
    mel_warp: float = 0.0
    """Largest change of frequencies on the mel scale, as a share: voices of smaller and larger bodies (vocal tract
    length perturbation, Jaitly and Hinton 2013)."""
    freq_masks: int = 0
    """Masks over bands of frequencies (SpecAugment, arXiv:1904.08779). A mask is filled with the clip's mean."""
    freq_width: int = 27
    """Bands in the widest mask."""
    time_masks: int = 0
    """Masks over frames (SpecAugment)."""
    time_width: int = 100
    """Frames in the widest mask."""
    time_share: float = 1.0
    """The same as a share of the clip's frames; the smaller limit counts."""

    def __post_init__(self) -> None:
        for name in ("time_shift", "pause", "gain_db", "freq_masks", "freq_width", "time_masks", "time_width"):
            if not getattr(self, name) >= 0:
                raise _unfit(name, f"={getattr(self, name)} must be at least 0")
        for name in ("noise", "time_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise _unfit(name, f"={getattr(self, name)} must be between 0 and 1")
        if not 0 <= self.mel_warp <= 0.5:
            raise _unfit("mel_warp", f"={self.mel_warp} must be between 0 and 0.5")
        if not 0.5 <= self.speed[0] <= self.speed[1] <= 2:
            raise _unfit("speed", f"={self.speed} must be a range from at least 0.5 to at most 2")
        if not -math.inf < self.noise_snr[0] <= self.noise_snr[1] < math.inf:
            raise _unfit("noise_snr", f"={self.noise_snr} must be a range of dB")
        if not self.noise_kinds or set(self.noise_kinds) - set(NOISES):
            raise _unfit("noise_kinds", f"={list(self.noise_kinds)} must be one or more of {', '.join(NOISES)}")
        if self.babble_clips < 1:
            raise _unfit("babble_clips", f"={self.babble_clips} must be at least 1")
        if ("files" in self.noise_kinds) != (self.noise_folder is not None):
            raise _unfit("noise_folder", f"={self.noise_folder} and the kind `files` in noise_kinds need each other")
        if self.noise_folder is not None:
            noise_files(self.noise_folder)

    def augment_waveform(
        self, waveform: np.ndarray, rate: int, generator: np.random.Generator, other: OtherClip
    ) -> np.ndarray:
        """A clip (S,) float32 with another speed, moved, with pauses, with noise, and with another loudness.

        Args:
            waveform: (S,) float32; it is not changed.
            rate: samples per second.
            generator: where everything random comes from.
            other: gives another clip for babble.

        Returns:
            (S / speed + pauses,) float32.
        """
        if self.speed != (1.0, 1.0):  # in steps, because each ratio of rates needs a filter of its own
            waveform = resample(waveform, round(100 * generator.uniform(*self.speed)), 100)
        if self.time_shift:
            furthest = min(rate * self.time_shift, len(waveform) / 2)
            waveform = moved_in_time(waveform, round(generator.uniform(-furthest, furthest)))
        if self.pause:
            waveform = np.pad(waveform, [int(rate * generator.uniform(0, self.pause)) for _ in range(2)])
        if self.noise and generator.random() < self.noise:
            noise = self._noise(len(waveform), rate, generator, other)
            waveform = with_noise(waveform, noise, generator.uniform(*self.noise_snr))
        if self.gain_db:
            waveform = waveform * np.float32(10 ** (generator.uniform(-self.gain_db, self.gain_db) / 20))
        return waveform

    def warp(self, generator: np.random.Generator) -> float:
        """A factor for the frequencies of a clip, for `LogMel.features`."""
        return 1 + generator.uniform(-self.mel_warp, self.mel_warp) if self.mel_warp else 1.0

    def augment_features(self, features: Tensor, generator: np.random.Generator) -> Tensor:
        """Features (T, M) with masks; those that are given are not changed."""
        if not (self.freq_masks or self.time_masks):
            return features
        frames, bands = features.shape
        features, fill = features.clone(), float(features.mean())
        for _ in range(self.freq_masks):
            features[:, _span(bands, min(self.freq_width, bands), generator)] = fill
        for _ in range(self.time_masks):
            features[_span(frames, min(self.time_width, int(self.time_share * frames)), generator)] = fill
        return features

    def _noise(self, samples: int, rate: int, generator: np.random.Generator, other: OtherClip) -> np.ndarray:
        """(samples,) float32 of any loudness."""
        kind = self.noise_kinds[generator.integers(len(self.noise_kinds))]
        if kind == "white":
            return generator.standard_normal(samples, dtype=np.float32)
        if kind == "pink":
            return pink_noise(samples, generator)
        if kind == "babble":
            count = generator.integers(1, self.babble_clips + 1)
            return np.sum([_equally_loud(_fitted(other(generator), samples, generator)) for _ in range(count)], axis=0)
        assert self.noise_folder is not None
        return _recorded_noise(noise_files(self.noise_folder), samples, rate, generator)


def _unfit(name: str, fault: str) -> TrunklineError:
    return TrunklineError(f"{name}{fault}", field=f"data.augmentation.{name}")


def moved_in_time(waveform: np.ndarray, shift: int) -> np.ndarray:
    """Samples (S,) that begin `shift` samples later (earlier, if it is negative); what leaves the clip is lost."""
    result, length = np.zeros_like(waveform), len(waveform)
    result[max(shift, 0) : length + min(shift, 0)] = waveform[max(-shift, 0) : length - max(shift, 0)]
    return result


def with_noise(waveform: np.ndarray, noise: np.ndarray, snr_db: float) -> np.ndarray:
    """Samples (S,) plus a noise (S,) that is scaled so that the ratio of their powers is `snr_db`.

    A clip that is silent, or whose noise is, stays as it is.
    """
    power, noise_power = (float(np.dot(x, x)) for x in (waveform, noise))
    if not power or not noise_power:
        return waveform
    return waveform + np.float32(math.sqrt(power / noise_power) * 10 ** (-snr_db / 20)) * noise


def pink_noise(samples: int, generator: np.random.Generator) -> np.ndarray:
    """(samples,) float32 of noise whose power falls with the frequency: the same in each octave."""
    size = 1 << max(samples - 1, 1).bit_length()  # Fourier transforms of powers of two are the fastest
    spectrum = generator.standard_normal((size // 2 + 1, 2), dtype=np.float32).view(np.complex64)[:, 0]
    spectrum[1:] /= np.sqrt(np.arange(1, len(spectrum), dtype=np.float32))
    spectrum[0] = 0
    return torch.fft.irfft(torch.from_numpy(spectrum), size)[:samples].numpy()


@lru_cache(maxsize=4)
def noise_files(folder: str) -> Sequence[Path]:
    """The recordings of noises in a folder.

    Raises:
        TrunklineError: if there are none.
    """
    return audio_paths(folder, "data.augmentation.noise_folder")


def _recorded_noise(files: Sequence[Path], samples: int, rate: int, generator: np.random.Generator) -> np.ndarray:
    """(samples,) float32 of a file, from anywhere in it."""
    file = files[int(generator.integers(len(files)))]
    seconds = samples / rate
    try:
        start = generator.uniform(0, max(audio_header(file, str(file)).seconds - seconds, 0))
        noise = read_audio(file, str(file), rate, start, start + seconds)
    except TrunklineError as error:
        raise TrunklineError(
            f"the noise {file} cannot be used: {error.__cause__}; replace it, or remove it from noise_folder",
            field="data.augmentation.noise_folder",
        ) from error
    return _fitted(noise, samples, generator)


def _fitted(noise: np.ndarray, samples: int, generator: np.random.Generator) -> np.ndarray:
    """(samples,) of a noise: a part of a longer one, or a shorter one again and again."""
    start = generator.integers(len(noise) - samples + 1 if len(noise) > samples else len(noise))
    return np.take(noise, np.arange(start, start + samples), mode="wrap")


def _equally_loud(waveform: np.ndarray) -> np.ndarray:
    """Samples (S,) with a power of 1; silence stays silent."""
    return waveform / max(np.float32(math.sqrt(np.dot(waveform, waveform) / len(waveform))), np.float32(1e-9))


def _span(length: int, widest: int, generator: np.random.Generator) -> slice:
    """A random part, of 0 to `widest`, of a row of this length."""
    width = int(generator.integers(widest + 1))
    start = int(generator.integers(length - width + 1))
    return slice(start, start + width)
