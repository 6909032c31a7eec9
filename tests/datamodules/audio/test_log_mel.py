import math
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchaudio.compliance.kaldi import fbank
from transformers import ASTFeatureExtractor, WhisperFeatureExtractor

from trunkline import TrunklineError
from trunkline.datamodules.audio.log_mel import LogMel

AST = {"num_mels": 128, "window": "hanning", "mean": -4.2677393, "std": 2 * 4.5689974, "padding": "fixed"}
"""Mean and deviation of AudioSet; AST's features end up with a deviation of a half."""


def voice(rate: int, seconds: float, seed: int = 0, offset: float = 0.0) -> Tensor:
    """A hum with overtones and noise that swells, (S,) float32."""
    time = torch.arange(round(rate * seconds), dtype=torch.float64) / rate
    tones = sum(torch.sin(2 * math.pi * 140 * n * time + n) / n for n in range(1, 20))
    noise = torch.randn(len(time), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return ((0.02 * noise + 0.05 * tones) * (1.1 + torch.sin(3 * time)) + offset).float()


def assert_bands_equal(ours: Tensor, theirs: Tensor, tolerance: float = 1e-4) -> None:
    """Natural logarithms of powers are equal; of bands far below the loudest, float32 keeps fewer digits."""
    assert ours.shape == theirs.shape
    powers, expected = ours.double().exp(), theirs.double().exp()
    loudest = expected.max(dim=1, keepdim=True).values
    assert ((powers - expected).abs() <= tolerance * expected + 1e-7 * loudest).all()
    assert ((ours - theirs).abs() < 1e-4).double().mean() > 0.99


@pytest.mark.parametrize("window", ["povey", "hanning"])
@pytest.mark.parametrize("num_mels", [23, 40, 80, 128])
@pytest.mark.parametrize("rate", [8_000, 16_000, 22_050, 44_100])
def test_kaldi(rate: int, num_mels: int, window: Any) -> None:
    log_mel = LogMel(rate, num_mels, window=window)
    for seconds, offset in ((1.5, 0.0), (0.63, 0.1)):
        waveform = voice(rate, seconds, offset=offset)
        theirs = fbank(waveform[None], num_mel_bins=num_mels, sample_frequency=rate, window_type=window)
        assert log_mel.frames_of(len(waveform)) == len(theirs)
        assert_bands_equal(log_mel.features(waveform), theirs)


def test_kaldi_with_other_frames() -> None:
    waveform = voice(16_000, 1.0)
    theirs = fbank(waveform[None], num_mel_bins=40, frame_length=32.0, frame_shift=12.5)
    assert_bands_equal(LogMel(num_mels=40, window_ms=32, hop_ms=12.5).features(waveform), theirs)


@pytest.mark.parametrize("warp", [0.85, 0.97, 1.15])
@pytest.mark.parametrize("rate", [16_000, 22_050])
def test_warp_is_kaldis(rate: int, warp: float) -> None:
    waveform = voice(rate, 1.0)
    theirs = fbank(waveform[None], num_mel_bins=80, sample_frequency=rate, vtln_warp=warp, vtln_low=120.0)
    assert_bands_equal(LogMel(rate).features(waveform, warp), theirs, tolerance=5e-4)  # they warp in float32


@pytest.mark.parametrize("convention", ["kaldi", "whisper"])
def test_warp_moves_a_tone(convention: Any) -> None:
    """With a warp of 1.2, a tone of 1 kHz looks as one of 1.2 kHz."""
    log_mel = LogMel(convention=convention)

    def band(hz: float, warp: float = 1.0) -> float:
        tone = torch.sin(2 * math.pi * hz * torch.arange(16_000) / 16_000)
        return float(log_mel.features(tone, warp).mean(0).argmax())

    assert band(1000) < band(1200) == pytest.approx(band(1000, 1.2), abs=1)
    assert band(800) == pytest.approx(band(1000, 0.8), abs=1)
    assert band(1000, 1.0 + 1e-9) == band(1000)


def test_a_warp_without_room() -> None:
    with pytest.raises(TrunklineError, match=r"frequencies up to 500 Hz cannot be multiplied by 1\.10"):
        LogMel(sample_rate=1000).features(torch.zeros(1000), 1.1)


@pytest.mark.parametrize("seconds", [0.4, 3.33, 10.24, 12.0])
def test_ast(seconds: float) -> None:
    waveform = voice(16_000, seconds)
    theirs = torch.from_numpy(ASTFeatureExtractor()(waveform.numpy(), sampling_rate=16_000)["input_values"][0])
    log_mel = LogMel(max_seconds=10.24, **AST)
    ours = log_mel.features(waveform)
    assert log_mel.max_frames == log_mel.frames_of(len(waveform)) == len(ours) == 1024
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("num_mels", [80, 128])
@pytest.mark.parametrize("seconds", [0.01, 0.4, 3.333, 29.99, 30.0, 31.0])
def test_whisper(seconds: float, num_mels: int) -> None:
    waveform = voice(16_000, seconds)
    waveform[: len(waveform) // 3] *= 1e-5  # below the range that is kept
    extractor = WhisperFeatureExtractor(num_mels)
    theirs = torch.from_numpy(extractor(waveform.numpy(), sampling_rate=16_000)["input_features"][0]).T
    log_mel = LogMel(num_mels=num_mels, convention="whisper", padding="fixed")
    ours = log_mel.features(waveform)
    assert log_mel.max_frames == log_mel.frames_of(len(waveform)) == len(ours) == 3000
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_whisper_without_padding() -> None:
    waveform = voice(16_000, 1.234)
    extractor = WhisperFeatureExtractor(80)
    theirs = extractor(waveform.numpy(), sampling_rate=16_000, padding="do_not_pad")["input_features"][0]
    log_mel = LogMel(convention="whisper")
    assert log_mel.frames_of(len(waveform)) == 123
    torch.testing.assert_close(log_mel.features(waveform), torch.from_numpy(np.asarray(theirs)).T, atol=1e-4, rtol=0)


@pytest.mark.parametrize("convention", ["kaldi", "whisper"])
def test_a_clip_shorter_than_a_window_is_filled_up(convention: Any) -> None:
    log_mel, waveform = LogMel(convention=convention), voice(16_000, 0.02)
    assert len(waveform) == 320
    filled = torch.cat((waveform, torch.zeros(80)))
    frames = {"kaldi": 1, "whisper": 2}[convention]
    assert log_mel.frames_of(320) == log_mel.frames_of(0) == log_mel.frames_of(400) == frames
    assert log_mel.features(waveform).shape == (frames, 80)
    torch.testing.assert_close(log_mel.features(waveform), log_mel.features(filled), atol=0, rtol=0)


@pytest.mark.parametrize(
    "settings", [{}, {"convention": "whisper"}, AST, {"convention": "whisper", "padding": "fixed"}]
)
def test_silence_is_finite(settings: Any) -> None:
    features = LogMel(max_seconds=2.0, **settings).features(torch.zeros(8000))
    assert features.isfinite().all()
    assert len(features.unique()) <= 2  # the features of silence, and of AST's padding


@pytest.mark.parametrize("samples", [400, 401, 559, 560, 719, 720, 12_345])
@pytest.mark.parametrize("convention", ["kaldi", "whisper"])
def test_frames_of(convention: Any, samples: int) -> None:
    log_mel = LogMel(convention=convention)
    assert log_mel.frames_of(samples) == len(log_mel.features(voice(16_000, samples / 16_000)))


def test_longest_batch() -> None:
    assert LogMel(max_seconds=30).max_frames == 3000  # 2998 frames, rounded up to a multiple of 8
    assert LogMel(max_seconds=30).frames_of(480_000) == 2998
    assert [LogMel().batch_frames(frames) for frames in (1, 8, 9, 2998)] == [8, 8, 16, 3000]
    fixed = LogMel(max_seconds=10.24, padding="fixed")
    assert fixed.max_frames == fixed.batch_frames(1024) == 1024
    assert LogMel(22_050).frame_seconds == pytest.approx(220 / 22_050)


def test_mean_and_std() -> None:
    waveform = voice(16_000, 1.0)
    plain, scaled = LogMel().features(waveform), LogMel(mean=-4.0, std=2.0).features(waveform)
    torch.testing.assert_close(scaled, (plain + 4) / 2)


@pytest.mark.parametrize("convention", ["kaldi", "whisper"])
def test_statistics_of_the_clip(convention: Any) -> None:
    waveform = voice(16_000, 1.0)
    plain = LogMel(convention=convention).features(waveform).double()
    centred = LogMel(convention=convention, per_clip="mean").features(waveform).double()
    torch.testing.assert_close(centred, plain - plain.mean(0), atol=1e-5, rtol=0)
    unit = LogMel(convention=convention, per_clip="mean_std").features(waveform).double()
    torch.testing.assert_close(unit, (plain - plain.mean(0)) / plain.std(0, correction=0), atol=1e-4, rtol=1e-4)
    assert LogMel(convention=convention, per_clip="mean_std").features(torch.zeros(800)).abs().max() < 0.01
    kaldi = fbank(waveform[None], num_mel_bins=80, subtract_mean=True)
    torch.testing.assert_close(LogMel(per_clip="mean").features(waveform), kaldi, atol=1e-3, rtol=0)


@pytest.mark.parametrize(("convention", "nats"), [("kaldi", 10 / math.log(10)), ("whisper", 40.0)])
def test_range_of_a_clip(convention: Any, nats: float) -> None:
    """Only what is further below the loudest value is raised, to the limit; a decibel is the same in both."""
    waveform = voice(16_000, 1.0)
    waveform[4000:8000] = 0.0
    plain = LogMel(convention=convention).features(waveform) * nats  # in dB
    limited = LogMel(convention=convention, range_db=30.0).features(waveform) * nats
    assert plain.max() - plain.min() > 60
    assert (limited > plain + 1).float().mean() > 0.2
    torch.testing.assert_close(limited, plain.clamp(min=plain.max() - 30), atol=1e-3, rtol=0)


def test_the_waveform_is_not_changed() -> None:
    waveform = voice(16_000, 1.0)
    before = waveform.clone()
    for convention in ("kaldi", "whisper"):
        LogMel(convention=convention, mean=1.0, per_clip="mean").features(waveform, 1.1)  # type: ignore[arg-type]
    assert torch.equal(waveform, before)


def test_settings_are_plain() -> None:
    log_mel = LogMel(22_050, 128, window="hanning")
    log_mel.features(torch.zeros(1000))
    assert LogMel(**asdict(log_mel)) == log_mel
    assert {type(value) for value in asdict(log_mel).values()} <= {int, float, str, bool, type(None)}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"convention": "htk"}, "convention='htk' is none of kaldi, whisper"),
        ({"window": "hamming"}, "window='hamming' is none of povey, hanning"),
        ({"padding": "longest"}, "padding='longest' is none of batch, fixed"),
        ({"per_clip": "std"}, "per_clip='std' is none of False, mean, mean_std"),
        ({"std": 0.0}, "std=0.0 must be above 0"),
        ({"sample_rate": 0}, "sample_rate=0 must be above 0"),
        ({"range_db": 0.0}, "range_db=0.0 must be above 0, or null for no limit"),
        ({"num_mels": -1}, "num_mels=-1 must be above 0"),
        ({"max_seconds": float("nan")}, "max_seconds=nan must be above 0"),
        ({"max_seconds": 0.02}, "max_seconds=0.02 is shorter than a window of 25.0 ms"),
        ({"window_ms": 5.0}, "window_ms=5.0 is 80 samples and hop_ms=10.0 is 160 at 16000 Hz"),
        ({"hop_ms": 0.01}, "hop_ms=0.01 is 0 at 16000 Hz"),
    ],
)
def test_wrong_settings(settings: Any, message: str) -> None:
    with pytest.raises(TrunklineError, match=message) as error:
        LogMel(**settings)
    assert error.value.field == ("data.window_ms" if "hop_ms" in settings else f"data.{next(iter(settings))}")
