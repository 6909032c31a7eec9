import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from trunkline import TrunklineError
from trunkline.datamodules.audio.audio_augmentation import AudioAugmentation, moved_in_time, pink_noise, with_noise

RATE = 8000
ALL: dict[str, Any] = {
    "speed": (0.9, 1.1),
    "time_shift": 0.1,
    "noise": 1.0,
    "noise_kinds": ("white", "pink", "babble"),
    "gain_db": 6.0,
    "mel_warp": 0.15,
    "freq_masks": 2,
    "freq_width": 5,
    "time_masks": 2,
    "time_width": 10,
}


def tone(seconds: float = 1.0, hz: float = 440.0, rate: int = RATE) -> np.ndarray:
    return np.sin(2 * math.pi * hz * np.arange(round(rate * seconds)) / rate).astype(np.float32)


def other(generator: np.random.Generator) -> np.ndarray:
    return generator.uniform(-1, 1, int(generator.integers(2000, 20_000))).astype(np.float32)


def no_other(generator: np.random.Generator) -> np.ndarray:
    raise AssertionError("no clip should be read")


def augmented(seed: Any = 0, waveform: np.ndarray | None = None, **settings: Any) -> np.ndarray:
    waveform = tone() if waveform is None else waveform
    return AudioAugmentation(**settings).augment_waveform(waveform, RATE, np.random.default_rng(seed), other)


def decibels(x: np.ndarray) -> float:
    return 10 * math.log10(np.square(x, dtype=np.float64).mean())


def test_nothing_is_on() -> None:
    augmentation, waveform, features = AudioAugmentation(), tone(), torch.randn(20, 8)
    generator = np.random.default_rng(0)
    state = generator.bit_generator.state
    assert augmentation.augment_waveform(waveform, RATE, generator, no_other) is waveform
    assert augmentation.warp(generator) == 1.0
    assert augmentation.augment_features(features, generator) is features
    assert generator.bit_generator.state == state


def test_it_depends_on_the_generator_alone() -> None:
    augmentation, waveform, features = AudioAugmentation(**ALL), tone(), torch.randn(100, 40)
    before, before_features = waveform.copy(), features.clone()

    def results(*seed: int) -> tuple[Any, ...]:
        generator = np.random.default_rng(seed)
        sound = augmentation.augment_waveform(waveform, RATE, generator, other)
        return sound, augmentation.warp(generator), augmentation.augment_features(features, generator)

    first = results(1, 2, 3)
    np.random.seed(7)
    torch.manual_seed(7)
    again = results(1, 2, 3)
    np.testing.assert_array_equal(first[0], again[0])
    assert first[1] == again[1]
    assert torch.equal(first[2], again[2])
    another = results(1, 2, 4)
    assert len(another[0]) != len(first[0])
    assert another[1] != first[1]
    assert not torch.equal(another[2], first[2])
    np.testing.assert_array_equal(waveform, before)
    assert torch.equal(features, before_features)
    assert first[0].dtype == np.float32


@pytest.mark.parametrize("kind", ["white", "pink", "babble"])
def test_signal_to_noise_ratio(kind: str) -> None:
    waveform = tone() * np.linspace(0.01, 0.5, RATE, dtype=np.float32)
    for snr in (-5.0, 10.0, 30.0):
        result = augmented(3, waveform, noise=1.0, noise_kinds=(kind,), noise_snr=(snr, snr))
        assert result.dtype == np.float32
        assert decibels(waveform) - decibels(result - waveform) == pytest.approx(snr, abs=0.01)


def test_ratios_and_probability() -> None:
    waveform, ratios = tone(), []
    for seed in range(400):
        noise = augmented(seed, waveform, noise=0.75, noise_kinds=("white",), noise_snr=(0.0, 20.0)) - waveform
        if noise.any():
            ratios.append(decibels(waveform) - decibels(noise))
    assert 260 < len(ratios) < 340
    assert -0.01 < min(ratios) < 2
    assert 18 < max(ratios) < 20.01
    assert np.mean(ratios) == pytest.approx(10, abs=1.5)


def test_silence_stays_silent() -> None:
    silence = np.zeros(RATE, np.float32)
    assert not augmented(0, silence, **ALL).any()
    np.testing.assert_array_equal(with_noise(tone(), silence, 10.0), tone())


def test_pink_noise() -> None:
    """The power is the same in each octave."""
    noise = pink_noise(200_000, np.random.default_rng(0))
    assert noise.dtype == np.float32
    power = np.abs(np.fft.rfft(noise)) ** 2
    octaves = [power[2**n : 2 ** (n + 1)].sum() for n in range(8, 16)]
    assert max(octaves) / min(octaves) < 1.5
    assert [len(pink_noise(n, np.random.default_rng(0))) for n in (1, 2, 3, 1000)] == [1, 2, 3, 1000]


def test_babble_is_of_other_clips() -> None:
    """A short clip is repeated, of a long one a part is taken."""
    short, long = np.arange(1, 4, dtype=np.float32), np.arange(20_000, dtype=np.float32)
    for clip in (short, long):
        augmentation = AudioAugmentation(noise=1.0, noise_kinds=("babble",), noise_snr=(0.0, 0.0), babble_clips=1)
        given = lambda generator, clip=clip: clip  # noqa: E731
        noise = augmentation.augment_waveform(tone(), RATE, np.random.default_rng(1), given) - tone()
        steps = np.diff(noise / np.abs(noise).max())
        if clip is short:
            np.testing.assert_allclose(noise[3:], noise[:-3], atol=1e-5)
        else:
            assert np.ptp(steps) < 1e-5  # a ramp without a jump


def test_number_of_clips_in_a_babble() -> None:
    counts = []
    for seed in range(50):
        calls: list[int] = []

        def counted(generator: np.random.Generator, calls: list[int] = calls) -> np.ndarray:
            calls.append(1)
            return other(generator)

        settings = AudioAugmentation(noise=1.0, noise_kinds=("babble",), babble_clips=3)
        settings.augment_waveform(tone(), RATE, np.random.default_rng(seed), counted)
        counts.append(len(calls))
    assert set(counts) == {1, 2, 3}


def test_voices_in_a_babble_are_equally_loud() -> None:
    settings = AudioAugmentation(noise=1.0, noise_kinds=("babble",), noise_snr=(0.0, 0.0), babble_clips=2)
    ratios = []
    for seed in range(10):
        clips = [tone(hz=500.0), 0.001 * tone(hz=1500.0)]
        given = lambda generator, clips=clips: clips.pop()  # noqa: E731
        noise = settings.augment_waveform(tone(), RATE, np.random.default_rng(seed), given) - tone()
        spectrum = np.abs(np.fft.rfft(noise))
        ratios += [] if clips else [spectrum[500] / spectrum[1500]]  # else only one voice was drawn
    assert ratios
    assert ratios == pytest.approx(np.ones(len(ratios)), rel=0.01)


def test_noise_from_files(tmp_path: Path) -> None:
    """A part of the file, at the rate of the clip."""
    soundfile.write(tmp_path / "hum.wav", tone(5.0, 1000.0, 16_000), 16_000)
    settings = {"noise": 1.0, "noise_kinds": ("files",), "noise_snr": (10.0, 10.0), "noise_folder": str(tmp_path)}
    noise = augmented(0, **settings) - tone()
    assert decibels(tone()) - decibels(noise) == pytest.approx(10, abs=0.01)
    assert np.abs(np.fft.rfft(noise)).argmax() == 1000
    assert not np.allclose(augmented(1, **settings) - tone(), noise, atol=1e-3)  # another part
    short = augmented(0, tone(12.0), **settings) - tone(12.0)
    assert np.abs(np.fft.rfft(short)).argmax() == pytest.approx(12_000, abs=5)


def test_a_broken_noise(tmp_path: Path) -> None:
    (tmp_path / "hum.wav").write_bytes(b"no sound")
    with pytest.raises(
        TrunklineError, match=r"the noise .*hum\.wav cannot be used: .*remove it from noise_folder"
    ) as error:
        augmented(0, noise=1.0, noise_kinds=("files",), noise_folder=str(tmp_path))
    assert error.value.field == "data.augmentation.noise_folder"
    assert "skip_corrupt" not in str(error.value)


def test_speed() -> None:
    """A faster clip is shorter and higher."""
    result = augmented(0, tone(2.0), speed=(1.25, 1.25))
    assert len(result) == 12_800
    assert np.abs(np.fft.rfft(result)).argmax() / (len(result) / RATE) == pytest.approx(550, abs=1)
    lengths = [len(augmented(seed, tone(2.0), speed=(0.9, 1.1))) for seed in range(60)]
    assert 14_545 <= min(lengths) < 14_900
    assert 17_400 < max(lengths) <= 17_778


def test_time_shift() -> None:
    x = np.arange(1, 6)
    assert [moved_in_time(x, n).tolist() for n in (0, 2, -2)] == [[1, 2, 3, 4, 5], [0, 0, 1, 2, 3], [3, 4, 5, 0, 0]]
    waveform, starts = np.ones(RATE, np.float32), []
    for seed in range(60):
        result = augmented(seed, waveform, time_shift=0.1)
        assert len(result) == RATE
        starts.append(int(result.argmax()) or -int(result[::-1].argmax()))
    assert -800 <= min(starts) < -600
    assert 600 < max(starts) <= 800
    kept = [augmented(seed, waveform, time_shift=5.0).sum() for seed in range(20)]
    assert min(kept) >= RATE / 2  # a short clip is never moved out of itself


def test_gain() -> None:
    gains = [decibels(augmented(seed, gain_db=6.0)) - decibels(tone()) for seed in range(60)]
    assert -6.01 < min(gains) < -5
    assert 5 < max(gains) < 6.01


def test_warp() -> None:
    augmentation, generator = AudioAugmentation(mel_warp=0.15), np.random.default_rng(0)
    warps = [augmentation.warp(generator) for _ in range(200)]
    assert 0.85 <= min(warps) < 0.87
    assert 1.13 < max(warps) <= 1.15


# --- SpecAugment


def masked(seed: int, frames: int = 50, bands: int = 20, **settings: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Features, and where they were masked."""
    features = torch.arange(1.0, 1.0 + frames * bands).reshape(frames, bands)
    result = AudioAugmentation(**settings).augment_features(features, np.random.default_rng(seed))
    changed = result != features
    assert (result[changed] == features.mean()).all()
    return result, changed


def test_masks_over_bands() -> None:
    widths, places = set(), torch.zeros(20)
    for seed in range(200):
        _, changed = masked(seed, freq_masks=1, freq_width=4)
        bands = changed.any(0)
        assert (changed == bands).all()  # all frames of a band, or none
        width = int(bands.sum())
        assert width == 0 or int(bands.nonzero()[-1] - bands.nonzero()[0]) == width - 1
        widths.add(width)
        places += bands
    assert widths == {0, 1, 2, 3, 4}
    assert (places > 0).all()


def test_masks_over_frames() -> None:
    widths = set()
    for seed in range(200):
        _, changed = masked(seed, time_masks=1, time_width=6)
        frames = changed.any(1)
        assert (changed == frames[:, None]).all()
        widths.add(int(frames.sum()))
    assert widths == set(range(7))


def test_share_of_the_frames() -> None:
    counts = [int(masked(seed, time_masks=1, time_width=100, time_share=0.1)[1].any(1).sum()) for seed in range(100)]
    assert max(counts) == 5
    counts = [int(masked(seed, time_masks=2, time_width=100, time_share=0.1)[1].any(1).sum()) for seed in range(100)]
    assert 5 < max(counts) <= 10


def test_masks_wider_than_the_clip() -> None:
    """They end at its borders, and can hide all of it."""
    shares = [
        masked(seed, frames=1, bands=4, freq_masks=3, freq_width=27, time_masks=3)[1].float().mean()
        for seed in range(30)
    ]
    assert min(shares) < 1 == max(shares)


def test_pauses() -> None:
    """Silence before and after the clip, of independent lengths up to the limit."""
    silences = []
    for seed in range(40):
        found = augmented(seed, waveform=np.ones(500, np.float32), pause=0.5)
        (sound,) = np.flatnonzero(np.diff(found, prepend=0, append=0) > 0)
        assert found[sound : sound + 500].tolist() == [1.0] * 500
        assert np.count_nonzero(found) == 500
        silences.append((sound, len(found) - sound - 500))
    for side in zip(*silences, strict=True):
        assert 0 <= min(side) < 0.1 * RATE
        assert 0.4 * RATE < max(side) <= 0.5 * RATE
    assert abs(np.corrcoef(np.array(silences).T)[0, 1]) < 0.5


def test_settings_are_plain() -> None:
    assert AudioAugmentation(**asdict(AudioAugmentation(**ALL))) == AudioAugmentation(**ALL)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"speed": (1.1, 0.9)}, r"speed=\(1\.1, 0\.9\) must be a range from at least 0\.5 to at most 2"),
        ({"speed": (0.0, 1.0)}, "speed="),
        ({"time_shift": -0.1}, "time_shift=-0.1 must be at least 0"),
        ({"noise": 1.5}, "noise=1.5 must be between 0 and 1"),
        ({"noise_snr": (20.0, 5.0)}, "noise_snr=.* must be a range of dB"),
        (
            {"noise_kinds": ("white", "brown")},
            "noise_kinds=.*'brown'.* must be one or more of white, pink, babble, files",
        ),
        ({"noise_kinds": ()}, "noise_kinds="),
        ({"babble_clips": 0}, "babble_clips=0 must be at least 1"),
        ({"noise_folder": "here"}, "noise_folder=here and the kind `files` in noise_kinds need each other"),
        ({"gain_db": float("nan")}, "gain_db=nan must be at least 0"),
        ({"mel_warp": 0.9}, "mel_warp=0.9 must be between 0 and 0.5"),
        ({"freq_masks": -1}, "freq_masks=-1 must be at least 0"),
        ({"time_share": 2.0}, "time_share=2.0 must be between 0 and 1"),
    ],
)
def test_wrong_settings(settings: Any, message: str) -> None:
    with pytest.raises(TrunklineError, match=message) as error:
        AudioAugmentation(**settings)
    assert error.value.field == f"data.augmentation.{next(iter(settings))}"


def test_noise_folder(tmp_path: Path) -> None:
    with pytest.raises(TrunklineError, match="noise_folder=None and the kind `files`"):
        AudioAugmentation(noise_kinds=("files",))
    with pytest.raises(TrunklineError, match=r"noise_folder=.* holds no sound file"):
        AudioAugmentation(noise_kinds=("files",), noise_folder=str(tmp_path))
