import io
import math
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import torchaudio

from trunkline import TrunklineError
from trunkline.datamodules.audio.audio_files import audio_header, audio_paths, read_audio, resample

TONE = (0.5 * np.sin(2 * math.pi * 440 * np.arange(16_000) / 16_000)).astype(np.float32)
"""One second at 16 kHz."""


def encoded(samples: np.ndarray, rate: int = 16_000, format: str = "WAV", subtype: str | None = None) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=format, subtype=subtype)
    return file.getvalue()


@pytest.mark.parametrize(
    ("format", "subtype", "tolerance"),
    [
        ("WAV", "PCM_16", 1e-4),
        ("WAV", "PCM_24", 1e-6),
        ("WAV", "PCM_U8", 1e-2),
        ("WAV", "FLOAT", 0.0),
        ("FLAC", "PCM_16", 1e-4),
        ("OGG", "VORBIS", 0.05),
        ("OGG", "OPUS", 0.05),
        ("MP3", "MPEG_LAYER_III", 0.05),
    ],
)
def test_formats(tmp_path: Path, format: str, subtype: str, tolerance: float) -> None:
    content = encoded(TONE, format=format, subtype=subtype)
    file = tmp_path / "tone"  # the content decides, not the name
    file.write_bytes(content)
    for source in (content, file, str(file)):
        assert audio_header(source, "tone") == (16_000, 1, 1.0)
        samples = read_audio(source, "tone", 16_000)
        assert samples.dtype == np.float32
        assert samples.shape == (16_000,)
        assert np.abs(samples - TONE)[200:-1200].max() <= tolerance


def test_channels_are_averaged() -> None:
    content = encoded(np.stack((TONE, 0 * TONE, 0.5 * TONE), axis=1), subtype="FLOAT")
    assert audio_header(content, "three") == (16_000, 3, 1.0)
    np.testing.assert_allclose(read_audio(content, "three", 16_000), 0.5 * TONE, atol=1e-6)


@pytest.mark.parametrize("format", ["WAV", "FLAC", "OGG", "MP3"])
def test_a_part(format: str) -> None:
    ramp = np.linspace(-0.9, 0.9, 32_000, dtype=np.float32)
    content, whole = encoded(ramp, format=format), read_audio(encoded(ramp, format=format), "ramp", 16_000)
    part = read_audio(content, "ramp", 16_000, start=0.5, end=1.25, stated_rate=16_000)
    np.testing.assert_allclose(part, whole[8000:20_000], atol=1e-3)
    np.testing.assert_allclose(read_audio(content, "ramp", 16_000, start=1.5), whole[24_000:], atol=1e-3)
    np.testing.assert_allclose(read_audio(content, "ramp", 16_000, end=5.0), whole, atol=1e-3)


def test_only_the_part_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    read, counts = soundfile.SoundFile.read, []

    def counted(self: Any, frames: int = -1, **options: Any) -> Any:
        counts.append(frames)
        return read(self, frames, **options)

    monkeypatch.setattr(soundfile.SoundFile, "read", counted)
    assert len(read_audio(encoded(TONE), "tone", 16_000, start=0.25, end=0.5)) == 4000
    assert counts == [4000]


@pytest.mark.parametrize(("old", "new"), [(44_100, 16_000), (8_000, 16_000), (48_000, 22_050), (11_025, 16_000)])
def test_resampling(old: int, new: int) -> None:
    time = np.arange(old // 2)
    tone = np.sin(2 * math.pi * 440 * time / old).astype(np.float32)
    ours = read_audio(encoded(tone, old, subtype="FLOAT"), "tone", new)
    theirs = torchaudio.functional.resample(torch.from_numpy(tone), old, new)
    torch.testing.assert_close(torch.from_numpy(ours), theirs, atol=1e-4, rtol=0)
    expected = np.sin(2 * math.pi * 440 * np.arange(len(ours)) / new)
    assert np.abs(ours - expected)[200:-200].max() < 0.01


def test_resampling_between_rates_without_a_common_divisor() -> None:
    """Its exact filter would have 16,000 times 44,101 weights."""
    time = np.arange(44_101)
    ours = resample(np.sin(2 * math.pi * 440 * time / 44_101).astype(np.float32), 44_101, 16_000)
    assert abs(len(ours) - 16_000) <= 1
    assert np.abs(ours - np.sin(2 * math.pi * 440 * np.arange(len(ours)) / 16_000))[200:-200].max() < 0.01


def test_the_same_rate_is_not_resampled() -> None:
    assert resample(TONE, 16_000, 16_000) is TONE


# --- bad input


def changed(content: bytes, place: int, code: str, value: int) -> bytes:
    result = bytearray(content)
    struct.pack_into(code, result, place, value)
    return bytes(result)


WAV, FLAC = encoded(TONE), encoded(TONE, format="FLAC")
HISS = np.random.default_rng(0).standard_normal(48_000).astype(np.float32) / 10
NOISE, OPUS = encoded(HISS, format="OGG"), encoded(HISS, format="OGG", subtype="OPUS")
W64 = encoded(TONE, format="W64")
BROKEN = {
    "an empty cell": (None, "the cell is empty"),
    "no file": ("nowhere/clip.wav", "there is no such file"),
    "a folder": (Path(__file__).parent, "there is no such file"),
    "nothing": (b"", "the file is empty"),
    "text": (b"these are words, and no audio at all " * 9, "it is no audio, or of a format that libsndfile .* FLAC"),
    "m4a": (b"\x00\x00\x00\x20ftypM4A " + bytes(200), "or of a format .* cannot read .*; convert it, to FLAC"),
    "no samples": (encoded(TONE[:0]), "it holds no sound"),
    "no channels": (changed(WAV, 22, "<H", 0), "Channel count is zero"),
    "a cut WAV": (WAV[:-1000], "it is cut short: it says that it has 32000 bytes of sound, and has 31000"),
    "a cut WAV header": (WAV[:30], "it is damaged or cut short .*No 'data' chunk marker"),
    "a cut AIFF": (encoded(TONE, format="AIFF")[:-1000], "it is cut short"),
    "a cut OGG": (NOISE[: len(NOISE) // 2], "it is cut short in the middle of an Ogg page"),
    "a cut OGG, at its end": (NOISE[:-10], "it is cut short in the middle of an Ogg page"),
    "a cut Opus": (OPUS[: len(OPUS) // 2], "it is cut short in the middle of an Ogg page"),
    "a cut Ogg header": (OPUS[: OPUS.rindex(b"OggS") + 9], "it is cut short in the middle of an Ogg page"),
    "a cut Ogg table": (OPUS[: OPUS.rindex(b"OggS") + 29], "it is cut short in the middle of an Ogg page"),
    "a cut W64": (W64[: len(W64) // 2], r"it is cut short: it says that it has 32\d+ bytes, and has 16\d+;"),
    "unknown length": (FLAC[:21] + bytes((FLAC[21] & 0xF0, 0, 0, 0, 0)) + FLAC[26:], "does not say how long it is"),
}
"""What -> content, and the message about it."""


@pytest.mark.parametrize("what", BROKEN)
def test_broken_files(what: str) -> None:
    content, message = BROKEN[what]
    for read in (lambda: audio_header(content, "talk 7"), lambda: read_audio(content, "talk 7", 16_000)):
        with pytest.raises(
            TrunklineError, match=f"cannot read the recording talk 7: .*{message}.*skip_corrupt"
        ) as error:
            read()
        assert error.value.field == "data.skip_corrupt"
        assert "BytesIO" not in str(error.value)


@pytest.mark.parametrize("content", [NOISE, OPUS], ids=["Vorbis", "Opus"])
@pytest.mark.parametrize("tail", [b"", b"TAG" + bytes(125), bytes(70_000)], ids=["none", "ID3", "much"])
def test_whole_ogg_files(content: bytes, tail: bytes, tmp_path: Path) -> None:
    """What other programs add after the last page cuts nothing off."""
    (tmp_path / "hiss.ogg").write_bytes(content + tail)
    for source in (content + tail, tmp_path / "hiss.ogg"):
        assert len(read_audio(source, "hiss", 16_000)) == 48_000


NAN, INF = TONE.copy(), TONE.copy()
NAN[700], INF[300] = np.nan, -np.inf
UNUSABLE: dict[str, tuple[bytes, dict[str, Any], str]] = {
    "a cut FLAC": (FLAC[: len(FLAC) // 2], {}, r"it is damaged or cut short \([^:]*\);"),
    "silence": (encoded(0 * TONE), {}, "it is silent: all of its samples are 0;"),
    "a constant": (encoded(0 * TONE + 0.5), {}, "it is silent: all of its samples are 0.5;"),
    "opposite channels": (encoded(np.stack((TONE, -TONE), 1), subtype="FLOAT"), {}, "it is silent"),
    "NaN": (encoded(NAN, subtype="FLOAT"), {}, "sample 700 is not a finite number"),
    "infinity": (encoded(INF, subtype="FLOAT"), {"start": 0.01}, "sample 300 is not a finite number"),
    "another rate": (WAV, {"stated_rate": 8000}, "it has 16000 samples per second, but is said to have 8000"),
    "a part after the end": (WAV, {"start": 1.5}, r"it lasts 1.000 s, and has no part from 1.5 s to 1.0 s"),
    "a part without length": (WAV, {"start": 0.5, "end": 0.5}, "has no part from 0.5 s to 0.5 s"),
    "a part before the start": (WAV, {"start": -0.5}, "has no part from -0.5 s"),
}
"""What -> content, arguments, and the message."""


@pytest.mark.parametrize("what", UNUSABLE)
def test_unusable_sound(what: str) -> None:
    content, arguments, message = UNUSABLE[what]
    assert audio_header(content, "talk 7").rate == 16_000
    with pytest.raises(TrunklineError, match=f"cannot read the recording talk 7: .*{message}") as error:
        read_audio(content, "talk 7", 16_000, **arguments)
    assert error.value.field == "data.skip_corrupt"


def test_a_cut_mp3() -> None:
    content = encoded(np.tile(TONE, 3), format="MP3")
    with pytest.raises(TrunklineError, match=r"it is cut short: 1\.\d of 3\.0 s are left"):
        read_audio(content[: len(content) // 2], "talk", 16_000)


def test_ten_hours() -> None:
    """8 bits at 8 Hz, so that the file is small."""
    content = encoded(np.random.default_rng(0).uniform(-1, 1, 36_000 * 8), 8, subtype="PCM_U8")
    assert audio_header(content, "night").seconds == 36_000
    message = "10.0 hours are more than the 1 that can be read at once; cut it up, or give the start and end"
    with pytest.raises(TrunklineError, match=message):
        read_audio(content, "night", 8)
    assert len(read_audio(content, "night", 8, start=30_000.0, end=30_010.0)) == 80


def test_a_silent_part_is_no_fault() -> None:
    content = encoded(np.concatenate((TONE, 0 * TONE)))
    assert not read_audio(content, "pause", 16_000, start=1.0).any()


@pytest.mark.parametrize("size", [0x7FFFF000, 0x80000000, 0xFFFFFFFF])
def test_a_wav_file_from_a_pipe(size: int) -> None:
    """Programs that cannot go back to write the size write a huge one, such as `espeak-ng --stdout`."""
    content = changed(changed(WAV, 40, "<I", size), 4, "<I", min(size + 36, 0xFFFFFFFF))
    assert audio_header(content, "pipe").seconds == 1
    np.testing.assert_array_equal(read_audio(content, "pipe", 16_000), read_audio(WAV, "file", 16_000))


def test_a_missing_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "soundfile", None)
    with pytest.raises(TrunklineError, match=r"cannot read audio files: .*; install soundfile"):
        audio_header(WAV, "tone")


def test_audio_paths(tmp_path: Path) -> None:
    for name in ("b.wav", "a.FLAC", "notes.txt", "c.mp3"):
        (tmp_path / name).touch()
    assert list(audio_paths(tmp_path, "data.source")) == [tmp_path / name for name in ("a.FLAC", "b.wav", "c.mp3")]
    (tmp_path / "empty").mkdir()
    with pytest.raises(TrunklineError, match=r"source=.*empty holds no sound file \(\.wav .*give one that does"):
        audio_paths(tmp_path / "empty", "data.source")
