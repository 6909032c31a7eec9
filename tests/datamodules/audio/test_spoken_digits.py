"""Spoken digits: what is held out, and that every process makes the same clips."""

import hashlib
import importlib.util
import pickle
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("espeakng_loader")

from trunkline import TrunklineError
from trunkline.datamodules.audio import espeak, spoken_digits
from trunkline.datamodules.audio.espeak import ESPEAK_RATE, Utterance, espeak_voices, speak, speak_groups
from trunkline.datamodules.audio.spoken_digits import (
    ACCENTS,
    DIGITS,
    SPOKEN_SETS,
    TEST_ACCENT,
    SpokenDigits,
    draw_clips,
    family_of,
    open_spoken_digits,
    power,
    voices_of,
)


@pytest.fixture(scope="module")
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def val(cache_folder: Path) -> SpokenDigits:
    return open_spoken_digits("spoken_digits:val", cache_folder)


def utterances(name: str, count: int) -> list[Utterance]:
    return [clip.utterance() for clip in draw_clips(name)[:count]]


def fingerprint(clips: list[np.ndarray]) -> str:
    return hashlib.sha256(b"".join(clip.tobytes() for clip in clips)).hexdigest()


# --- what is drawn


def test_no_voice_or_family_is_in_two_parts() -> None:
    parts = [voices_of("train"), voices_of("val"), voices_of("test")]
    assert [len(part) for part in parts] == [73, 10, 21]
    assert sorted(voice for part in parts for voice in part) == espeak_voices()
    train, val, test = ({family_of(voice) for voice in part} for part in parts)
    assert not train & val
    assert not train & test
    assert not val & test
    for family in val | test:
        assert sum(family_of(voice) == family for voice in espeak_voices()) < 4


@pytest.mark.parametrize(
    ("voice", "family"),
    [
        ("m1", "m"),
        ("Mike", "mike"),
        ("mike2", "mike"),
        ("RicishayMax3", "max"),
        ("anikaRobot", "anika"),
        ("zac", "zac"),
    ],
)
def test_family(voice: str, family: str) -> None:
    assert family_of(voice) == family


@pytest.mark.parametrize("name", SPOKEN_SETS)
def test_clips_of_a_set(name: str) -> None:
    clips, settings = draw_clips(name), SPOKEN_SETS[name]
    assert len(clips) == settings.rows
    assert {clip.accent for clip in clips} == ({settings.accent} if settings.accent else set(ACCENTS))
    assert {clip.voice for clip in clips} == set(voices_of(settings.part))
    shortest, longest = settings.lengths
    assert {len(clip.digits) for clip in clips} == set(range(shortest, longest + 1))
    assert set("".join(clip.digits for clip in clips)) == set("0123456789")
    for values, low, high in (("rate", 130, 260), ("pitch", 20, 80), ("range", 20, 80)):
        drawn = {getattr(clip, values) for clip in clips}
        assert low <= min(drawn)
        assert max(drawn) <= high
        assert len(drawn) > 0.95 * (high - low)


def test_digits_are_drawn_evenly() -> None:
    counts = Counter("".join(clip.digits for clip in draw_clips("spoken_digits")))
    assert max(counts.values()) < 1.1 * min(counts.values())


def test_test_accent_is_the_only_difference_of_its_set() -> None:
    assert TEST_ACCENT not in ACCENTS
    pairs = zip(draw_clips("spoken_digits:voices"), draw_clips("spoken_digits:accent"), strict=True)
    assert all(second == first._replace(accent=TEST_ACCENT) for first, second in pairs)


def test_digits_are_said_as_words() -> None:
    clip = draw_clips("spoken_digits")[0]._replace(digits="3714", accent="en-US", voice="Andy")
    assert clip.utterance()[:2] == ("gmw/en-US+Andy", "three seven one four")


# --- what is said


def test_same_clips_in_each_call_and_process() -> None:
    wanted = utterances("spoken_digits:val", 12)
    here = fingerprint(speak(wanted))
    speak(utterances("spoken_digits", 3))
    assert fingerprint(speak(wanted)) == here
    code = (
        "from trunkline.pipelines.quick_imports import import_torchmetrics\n"
        "import_torchmetrics([])\n"  # without what takes it seconds
        "from test_spoken_digits import fingerprint, speak, utterances\n"
        "print(fingerprint(speak(utterances('spoken_digits:val', 12))))"
    )
    there = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
    )
    assert there.stdout.strip() == here


def test_groups_do_not_depend_on_each_other() -> None:
    groups = [utterances("spoken_digits:val", 3), utterances("spoken_digits", 4), utterances("spoken_digits:val", 3)]
    first, second, third = speak_groups(groups)
    assert [len(first), len(second)] == [3, 4]
    assert fingerprint(first) == fingerprint(third) == fingerprint(speak(groups[0]))


def test_parameters_are_heard() -> None:
    plain = Utterance("gmw/en-US+m1", "one two", 160, 50, 50)
    others = [
        plain._replace(voice="gmw/en+m1"),
        plain._replace(voice="gmw/en-US+f1"),
        plain._replace(text="one three"),
        plain._replace(rate=250),
        plain._replace(pitch=80),
        plain._replace(range=20),
    ]
    alone = [speak([utterance])[0] for utterance in (plain, *others)]
    assert len({fingerprint([clip]) for clip in alone}) == len(alone)
    assert len(alone[4]) < 0.8 * len(alone[0])
    assert 0.3 < len(alone[0]) / ESPEAK_RATE < 2


def test_clips_are_kept(val: SpokenDigits, cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spoken_digits, "speak_groups", None)
    again = open_spoken_digits("spoken_digits:val", cache_folder)
    assert len(again) == 500
    assert again.seconds.sum() * ESPEAK_RATE == pytest.approx(len(again.samples))
    assert again.seconds.min() > 0.3
    for row in (0, 7, 499):
        np.testing.assert_array_equal(again.waveform(row, ESPEAK_RATE), val.waveform(row, ESPEAK_RATE))
    first_group = speak(utterances("spoken_digits:val", spoken_digits.GROUP))
    np.testing.assert_array_equal(val.waveform(7, ESPEAK_RATE), first_group[7].astype(np.float32) / 32_768)


def test_a_failure_leaves_nothing_half_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = list(speak_groups([utterances("spoken_digits:single_val", 5)]))

    def broken(groups: Any) -> Any:
        yield whole[0]
        raise KeyboardInterrupt

    monkeypatch.setattr(spoken_digits, "speak_groups", broken)
    with pytest.raises(KeyboardInterrupt):
        open_spoken_digits("spoken_digits:single_val", tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".lock"}
    monkeypatch.undo()
    assert len(open_spoken_digits("spoken_digits:single_val", tmp_path).waveform(499, ESPEAK_RATE)) > 1000


def test_rows(val: SpokenDigits, cache_folder: Path) -> None:
    assert val.texts == [clip.digits for clip in val.clips]
    assert val.labels is None
    assert val.name(3) == f"spoken_digits:val, clip 3 ({val.clips[3].accent}, {val.clips[3].voice})"
    waveform = val.waveform(3, ESPEAK_RATE)
    assert waveform.dtype == np.float32
    assert len(waveform) == round(val.seconds[3] * ESPEAK_RATE)
    assert 0.05 < np.abs(waveform).max() <= 1
    halved = val.waveform(3, ESPEAK_RATE // 2)
    assert len(halved) == -(-len(waveform) // 2)
    assert power(halved) == pytest.approx(power(waveform), rel=0.3)
    part = val.waveform(3, ESPEAK_RATE, 0.1, 0.3)
    np.testing.assert_array_equal(part, waveform[round(0.1 * ESPEAK_RATE) : round(0.3 * ESPEAK_RATE)])
    np.testing.assert_array_equal(val.waveform(3, ESPEAK_RATE, 0.1, 100.0), waveform[round(0.1 * ESPEAK_RATE) :])
    single = open_spoken_digits("spoken_digits:single_val", cache_folder)
    assert single.texts is not None
    assert single.labels == [[DIGITS[int(text)]] for text in single.texts]


def test_a_pickle_holds_no_samples(val: SpokenDigits) -> None:
    content = pickle.dumps(val)
    assert len(content) < 1000
    np.testing.assert_array_equal(pickle.loads(content).waveform(5, 16_000), val.waveform(5, 16_000))


# --- noise


@pytest.mark.parametrize("kind", ["white", "babble"])
def test_noise_is_ten_decibels_below_the_speech(kind: str, val: SpokenDigits, cache_folder: Path) -> None:
    noisy = open_spoken_digits(f"spoken_digits:val_{kind}", cache_folder)
    noises = []
    for row in (0, 11, 499):
        speech = val.waveform(row, ESPEAK_RATE).astype(np.float64)
        noise = noisy.waveform(row, ESPEAK_RATE) - speech
        assert 10 * np.log10(np.mean(speech**2) / np.mean(noise**2)) == pytest.approx(10, abs=1e-3)
        assert abs(np.corrcoef(speech, noise)[0, 1]) < 0.1
        np.testing.assert_array_equal(noisy.waveform(row, ESPEAK_RATE), noisy.waveform(row, ESPEAK_RATE))
        noises.append(noise[:5000])
    assert not np.allclose(noises[0], noises[1], atol=1e-3)
    spectrum = np.abs(np.fft.rfft(noises[0])) ** 2
    low = spectrum[: len(spectrum) // 4].sum() / spectrum.sum()
    assert 0.2 < low < 0.3 if kind == "white" else low > 0.6


def test_no_clip_is_its_own_babble(cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noisy = open_spoken_digits("spoken_digits:val_babble", cache_folder)
    heard: list[int] = []
    clean = noisy.clean
    monkeypatch.setattr(noisy, "clean", lambda row: (heard.append(row), clean(row))[1])
    for row in range(100):
        heard.clear()
        noisy.waveform(row, ESPEAK_RATE)
        assert len(heard) == len(set(heard)) == 6


# --- bad input


def test_unknown_set(tmp_path: Path) -> None:
    with pytest.raises(TrunklineError, match="no set of spoken digits spoken_digits:x; choose from spoken_digits, "):
        open_spoken_digits("spoken_digits:x", tmp_path)


def test_missing_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    voices_of.cache_clear()
    draw_clips.cache_clear()
    with pytest.raises(TrunklineError, match=r"espeakng-loader: pip install 'trunkline\[speech\]'"):
        open_spoken_digits("spoken_digits", tmp_path)


def test_broken_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(espeak, "espeak_folder", lambda: tmp_path)
    with pytest.raises(TrunklineError, match=r"eSpeak NG does not work: .*libespeak-ng.*; install it again: pip"):
        speak([Utterance("gmw/en+m1", "one", 160, 50, 50)])


def test_unknown_voice() -> None:
    with pytest.raises(TrunklineError, match="cannot say 'one' with the voice gmw/xx"):
        speak([Utterance("gmw/xx+m1", "one", 160, 50, 50)])


def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(TrunklineError, match=r"cannot write .*choose another cache_dir"):
        open_spoken_digits("spoken_digits:single_val", tmp_path / "file")
