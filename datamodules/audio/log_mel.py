"""Log-mel features of sound: what a network hears, as rows of frames with one number for each band of frequencies."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from trunkline import TrunklineError
from trunkline.datamodules.token_batches import padded_length

PRE_EMPHASIS = 0.97
"""Kaldi subtracts this share of the sample before, which lifts the high frequencies."""
KALDI_FLOOR = torch.finfo(torch.float32).eps
WHISPER_FLOOR = 1e-10
WHISPER_RANGE = 80.0
"""Whisper cuts off what is more than 80 dB below the loudest value of a clip."""
WARP_LOW, WARP_HIGH = 100.0, 500.0
"""Hz above the lowest, and below the highest frequency, between which `warp` scales frequencies."""


@dataclass
class LogMel:
    """How a waveform becomes the network's input; a checkpoint keeps it, so that all commands do the same.

    The samples of a waveform are between -1 and 1, as in torchaudio. `kaldi` equals
    `torchaudio.compliance.kaldi.fbank`, and with `padding="fixed"` the features of AST; `whisper` equals
    `WhisperFeatureExtractor`.

    Raises:
        TrunklineError: if a setting is unknown, or does not fit the others.
    """

    sample_rate: int = 16_000
    """Samples per second; recordings of other rates are resampled."""
    num_mels: int = 80
    """Bands of frequencies, equally wide on the mel scale."""
    convention: Literal["kaldi", "whisper"] = "kaldi"
    """`kaldi`: natural logarithm, pre-emphasis, only whole windows. `whisper`: logarithm to base 10, windows centred on
    their frames, the range of a clip limited to 80 dB."""
    window_ms: float = 25.0
    """Milliseconds of sound in a frame."""
    hop_ms: float = 10.0
    """Milliseconds from one frame to the next."""
    window: Literal["povey", "hanning"] = "povey"
    """Shape of Kaldi's window; AST's is `hanning`. Whisper's is always a (periodic) Hann window."""
    mean: float = 0.0
    """Subtracted from the features."""
    std: float = 1.0
    """Features are divided by it after the mean is subtracted."""
    per_clip: Literal[False, "mean", "mean_std"] = False
    """Statistics of each band over the clip that are removed before `mean` and `std` are applied."""
    range_db: float | None = None
    """What is further below the loudest value of a clip, in dB, is raised to this limit, so that digital silence looks
    like the quiet of a room, above all to `per_clip`. None is no limit for `kaldi`, and 80 for `whisper`."""
    max_seconds: float = 30.0
    """The longest clip."""
    padding: Literal["batch", "fixed"] = "batch"
    """`batch`: clips keep their lengths, and a batch is as long as its longest clip. `fixed`: all clips are as long as
    `max_seconds`, and the network sees the padding, as AST (whose features are padded) and Whisper (whose waveforms
    are) were trained."""

    def __post_init__(self) -> None:
        for name, known in (
            ("convention", ("kaldi", "whisper")),
            ("window", ("povey", "hanning")),
            ("padding", ("batch", "fixed")),
            ("per_clip", (False, "mean", "mean_std")),
        ):
            if (value := getattr(self, name)) not in known:
                raise _wrong(name, f"={value!r} is none of {', '.join(map(str, known))}")
        for name in ("sample_rate", "num_mels", "std", "hop_ms", "max_seconds"):
            if not getattr(self, name) > 0:
                raise _wrong(name, f"={getattr(self, name)} must be above 0")
        if self.range_db is not None and not self.range_db > 0:
            raise _wrong("range_db", f"={self.range_db} must be above 0, or null for no limit")
        if self.hop < 1 or self.window_samples < max(2, self.hop):
            raise _wrong(
                "window_ms",
                f"={self.window_ms} is {self.window_samples} samples and hop_ms={self.hop_ms} is {self.hop} at "
                f"{self.sample_rate} Hz; a window needs at least 2 samples, and as many as a hop",
            )
        if self.max_samples < self.window_samples:
            raise _wrong("max_seconds", f"={self.max_seconds} is shorter than a window of {self.window_ms} ms")

    @property
    def hop(self) -> int:
        """Samples from one frame to the next."""
        return int(self.sample_rate * self.hop_ms / 1000)

    @property
    def window_samples(self) -> int:
        """Samples in a window."""
        return int(self.sample_rate * self.window_ms / 1000)

    @property
    def frame_seconds(self) -> float:
        """Seconds from one frame to the next."""
        return self.hop / self.sample_rate

    @property
    def max_samples(self) -> int:
        """Samples of the longest clip."""
        return round(self.sample_rate * self.max_seconds)

    @property
    def max_frames(self) -> int:
        """Frames of the longest batch."""
        if self.padding == "fixed":
            return self.max_samples // self.hop
        return self.batch_frames(self._own_frames(self.max_samples))

    def batch_frames(self, longest: int) -> int:
        """Frames of a batch whose longest clip has `longest` frames."""
        return int(padded_length(longest)) if self.padding == "batch" else self.max_frames

    def frames_of(self, samples: int) -> int:
        """Frames of the features of a clip; at least 1."""
        return self._own_frames(samples) if self.padding == "batch" else self.max_frames

    def features(self, waveform: Tensor, warp: float = 1.0) -> Tensor:
        """Normalised features of a clip.

        A clip that is shorter than a window is filled up to one with zeros.

        Args:
            waveform: (S,) float32, at `sample_rate`.
            warp: multiplies the frequencies of the clip (vocal tract length perturbation, Jaitly and Hinton 2013):
                above 1 a voice sounds as if from a smaller body. As in Kaldi, the multiplication bends 100 Hz above the
                lowest and 500 Hz below the highest frequency, so that these two stay where they are.

        Returns:
            (`frames_of(S)`, `num_mels`) float32. With `padding="fixed"` what is longer than `max_seconds` is cut off.
        """
        if len(waveform) < self.window_samples:
            waveform = F.pad(waveform, (0, self.window_samples - len(waveform)))
        matrix = self._matrix if warp == 1 else self._mel_matrix(warp)
        features = self._kaldi(waveform, matrix) if self.convention == "kaldi" else self._whisper(waveform, matrix)
        return features if self.mean == 0 and self.std == 1 else features.sub_(self.mean).div_(self.std)

    def _kaldi(self, waveform: Tensor, matrix: Tensor) -> Tensor:
        if self.padding == "fixed":
            waveform = waveform[: (self.max_frames - 1) * self.hop + self.window_samples]
        # Kaldi takes the mean off each window, and then from each sample a share of the one before it. Both are linear,
        # so that the second is done once for the clip; a window's first sample counts for nothing, its weight being 0.
        emphasised = torch.cat((waveform[:1], torch.sub(waveform[1:], waveform[:-1], alpha=PRE_EMPHASIS)))
        emphasised = F.pad(emphasised, (0, self._fft_size - self.window_samples))
        means = waveform.unfold(0, self.window_samples, self.hop).mean(1, keepdim=True)
        frames = emphasised.unfold(0, self._fft_size, self.hop) - (1 - PRE_EMPHASIS) * means
        features = _power(frames.mul_(self._window)).mm(matrix).clamp_min_(KALDI_FLOOR).log_()
        if self.range_db is not None:  # a decibel is a tenth of a power of ten
            features.clamp_min_(float(features.max()) - self.range_db * math.log(10) / 10)
        features = self._clip_normalised(features)
        if self.padding == "fixed":
            features = F.pad(features, (0, 0, 0, self.max_frames - len(features)))
        return features

    def _whisper(self, waveform: Tensor, matrix: Tensor) -> Tensor:
        count = self.frames_of(len(waveform))
        if self.padding == "fixed":  # to the right of a clip are zeros; past the first ones all frames are equal
            longest = self.max_samples
            waveform = waveform[:longest]
            waveform = F.pad(waveform, (0, min(2 * self.window_samples, longest - len(waveform))))
        half = self.window_samples // 2
        mirrored = F.pad(waveform[None], (half, half), mode="reflect")[0]
        frames = mirrored.unfold(0, self.window_samples, self.hop)[: len(waveform) // self.hop] * self._window
        features = _power(frames).mm(matrix).clamp_min_(WHISPER_FLOOR).log10_()
        floor = max(float(features.max()) - (self.range_db or WHISPER_RANGE) / 10, math.log10(WHISPER_FLOOR))
        features = F.pad(features.clamp_min_(floor), (0, 0, 0, count - len(features)), value=floor)
        return self._clip_normalised(features.add_(4).div_(4))

    def _own_frames(self, samples: int) -> int:
        """Frames of a clip without padding."""
        samples = max(samples, self.window_samples)
        return samples // self.hop if self.convention == "whisper" else 1 + (samples - self.window_samples) // self.hop

    def _clip_normalised(self, features: Tensor) -> Tensor:
        """Without the clip's own statistics; a band that is constant becomes 0, but for rounding."""
        if self.per_clip:
            features = features - features.mean(0)
        if self.per_clip == "mean_std":
            features = features / features.square().mean(0).sqrt().clamp_min(1e-3)
        return features

    @property
    def _fft_size(self) -> int:
        """Kaldi fills windows up with zeros to a power of two."""
        return self.window_samples if self.convention == "whisper" else 1 << (self.window_samples - 1).bit_length()

    @cached_property
    def _window(self) -> Tensor:
        """(fft_size,) weights of the samples in a window."""
        if self.convention == "whisper":
            return torch.hann_window(self.window_samples)
        window = torch.hann_window(self.window_samples, periodic=False)
        if self.window == "povey":
            window = window.pow(0.85)
        return F.pad(window, (0, self._fft_size - self.window_samples))

    @cached_property
    def _matrix(self) -> Tensor:
        return self._mel_matrix(1.0)

    def _mel_matrix(self, warp: float) -> Tensor:
        """(fft_size // 2 + 1, num_mels) weights of the frequencies of a spectrum in each band: triangles."""
        top = self.sample_rate / 2
        bottom, to_mel, to_hz = (
            (0.0, _slaney_mel, _slaney_hz) if self.convention == "whisper" else (20.0, _kaldi_mel, _kaldi_hz)
        )
        lowest, highest = to_mel(torch.tensor([bottom, top], dtype=torch.float64)).tolist()
        edges = to_hz(torch.linspace(lowest, highest, self.num_mels + 2, dtype=torch.float64))
        if warp != 1:
            edges = _unwarped(edges, warp, bottom, top)
        frequencies = torch.linspace(0, top, self._fft_size // 2 + 1, dtype=torch.float64)
        if self.convention == "kaldi":  # whose triangles have straight sides on the mel scale, Whisper's have in Hz
            edges, frequencies = to_mel(edges), to_mel(frequencies)
        left, centre, right = edges[:-2], edges[1:-1], edges[2:]
        x = frequencies[:, None]
        triangles = torch.minimum((x - left) / (centre - left), (right - x) / (right - centre)).clamp_min(0)
        if self.convention == "whisper":  # all triangles have the same area
            triangles *= 2 / (right - left)
        return triangles.float()


def _wrong(name: str, fault: str) -> TrunklineError:
    return TrunklineError(f"{name}{fault}", field=f"data.{name}")


def _power(frames: Tensor) -> Tensor:
    """(T, W) samples -> (T, W // 2 + 1) power of each frequency."""
    real, imaginary = torch.view_as_real(torch.fft.rfft(frames)).unbind(-1)
    return torch.addcmul(real * real, imaginary, imaginary)


def _kaldi_mel(hz: Tensor) -> Tensor:
    return 1127 * torch.log1p(hz / 700)


def _kaldi_hz(mel: Tensor) -> Tensor:
    return 700 * torch.expm1(mel / 1127)


def _slaney_mel(hz: Tensor) -> Tensor:
    """Slaney's scale (Auditory Toolbox, 1998): linear up to 1 kHz, then 27 mels for a factor of 6.4."""
    return torch.where(hz < 1000, hz * 3 / 200, 15 + 27 / math.log(6.4) * (hz.clamp_min(1000) / 1000).log())


def _slaney_hz(mel: Tensor) -> Tensor:
    return torch.where(mel < 15, mel * 200 / 3, 1000 * ((mel - 15) * math.log(6.4) / 27).exp())


def _unwarped(hz: Tensor, warp: float, bottom: float, top: float) -> Tensor:
    """The frequencies that a warp moves to `hz`: piecewise linear, `bottom` and `top` stay."""
    low, high = (bottom + WARP_LOW) * max(1.0, warp), (top - WARP_HIGH) * min(1.0, warp)
    if not bottom < low < high < top:
        raise TrunklineError(f"frequencies up to {top:g} Hz cannot be multiplied by {warp:.2f}; use a smaller warp")
    below = bottom + (hz - bottom) * (low / warp - bottom) / (low - bottom)
    above = top + (hz - top) * (top - high / warp) / (top - high)
    return torch.where(hz < low, below, torch.where(hz < high, hz / warp, above))
