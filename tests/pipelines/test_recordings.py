"""Recordings in windows: what is read, where windows begin, which of their states count."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_recognizer import LOG_MEL, RATE, STEP, tones, write_wav

from trunkline import TrunklineError
from trunkline.datamodules.audio.log_mel import LogMel
from trunkline.datamodules.samplers import SampleKey
from trunkline.pipelines.recordings import AudioWindows, Windowing, open_recordings


class Ramps:
    """Rows whose samples tell their own places (`AudioRows`)."""

    texts: list[str] | None = None
    labels: list[list[str]] | None = None

    def __init__(self, *lengths: int) -> None:
        self.lengths, self.seconds = lengths, np.array(lengths) / RATE
        self.asked: list[tuple[int, int]] = []

    def __len__(self) -> int:
        return len(self.lengths)

    def name(self, row: int) -> str:
        return f"ramp {row}"

    def waveform(self, row: int, rate: int, start: float = 0.0, end: float | None = None) -> np.ndarray:
        first, last = round(start * rate), self.lengths[row] if end is None else round(end * rate)
        self.asked.append((row, last - first))
        return np.arange(first, last, dtype=np.float32) / self.lengths[row]


@pytest.mark.parametrize("seconds", [None, 1.0, 0.37])
@pytest.mark.parametrize("step", [1, 4])
def test_the_states_of_windows_are_those_of_the_recording(seconds: float | None, step: int) -> None:
    """Whatever the length: each state of the whole is one of a window, once, and has context on both sides."""
    windowing = Windowing.of(LOG_MEL, LOG_MEL.max_frames, step, seconds)
    unit = LOG_MEL.hop * step
    for samples in [1, unit, windowing.size, windowing.size + 1, *range(windowing.size, 5 * windowing.size, 777)]:
        found, windows = [], list(windowing.cut(0, samples))
        for window in windows:
            stop = samples if window.stop is None else window.stop
            assert stop - window.start <= windowing.size
            assert window.start % unit == 0
            states = np.arange(-(-LOG_MEL.frames_of(stop - window.start) // step)) + window.start // unit
            kept = states[windowing.kept(window)]
            assert len(kept) > 0
            assert window.start == 0 or (kept[0] - states[0]) * unit >= windowing.margin
            assert window.stop is None or (states[-1] - kept[-1]) * unit >= windowing.margin - LOG_MEL.window_samples
            found += kept.tolist()
        assert found == [*range(-(-LOG_MEL.frames_of(samples) // step))]
        assert len(windows) == 1 or samples > windowing.size


@pytest.mark.parametrize("seconds", [0.0, -1.0, 0.1, 2.1, 1e9])
def test_windows_that_do_not_suit(seconds: float) -> None:
    with pytest.raises(TrunklineError, match=r"a window of .* seconds does not suit .* hears 0\.24 to 2 seconds") as e:
        Windowing.of(LOG_MEL, LOG_MEL.max_frames, STEP, seconds)
    assert e.value.field == "window"


def test_longer_windows_than_the_clips_of_training() -> None:
    """As long as the network can hear them; not if all clips are padded to one length."""
    assert Windowing.of(LOG_MEL, 400, STEP, 4.0).size == 4 * RATE
    fixed = LogMel(sample_rate=RATE, num_mels=12, max_seconds=2.0, padding="fixed")
    with pytest.raises(TrunklineError, match="does not suit the network"):
        Windowing.of(fixed, 400, STEP, 4.0)


def test_items_are_parts_of_the_recordings() -> None:
    rows = Ramps(3 * RATE, RATE // 2, 9 * RATE)
    windowing = Windowing.of(LOG_MEL, LOG_MEL.max_frames, STEP)
    data = AudioWindows(rows, LOG_MEL, windowing)
    assert [window.recording for window in data.windows] == sorted(
        (window.recording for window in data.windows), key=lambda n: -rows.lengths[n]
    )  # the longest recording first
    items = data.__getitems__([SampleKey(0, n) for n in range(len(data))])
    assert max(length for _, length in rows.asked) == windowing.size
    for item, window in zip(items, data.windows, strict=True):
        stop = rows.lengths[window.recording] if window.stop is None else window.stop
        samples = np.arange(window.start, stop, dtype=np.float32) / rows.lengths[window.recording]
        want = LOG_MEL.features(torch.from_numpy(samples))
        assert item["frames"] == len(want) == item["mask"].sum()
        assert torch.equal(item["features"][: len(want)], want)
        assert not item["features"][len(want) :].any()
        assert bool(item["mask"][: len(want)].all())
    assert len({len(item["features"]) for item in items}) == 1


def test_items_of_fixed_length_tell_their_own_frames() -> None:
    fixed = LogMel(sample_rate=RATE, num_mels=12, max_seconds=2.0, padding="fixed")
    data = AudioWindows(Ramps(RATE, 5 * RATE), fixed, Windowing.of(fixed, fixed.max_frames))
    items = data.__getitems__([SampleKey(0, n) for n in range(len(data))])
    assert all("mask" not in item and len(item["features"]) == fixed.max_frames for item in items)
    assert items[-1]["frames"] == LOG_MEL.frames_of(RATE) == 98
    assert items[0]["frames"] == LOG_MEL.frames_of(2 * RATE)


def test_files_and_folders(tmp_path: Path) -> None:
    """In the given order, those of a folder sorted, without its other files; other rates, several channels."""
    ours = tones("abc")
    write_wav(tmp_path / "s" / "b.wav", ours)
    write_wav(tmp_path / "s" / "deep" / "a.flac", np.stack([ours, np.zeros_like(ours)], axis=1) * 0.9, subtype="PCM_16")
    (tmp_path / "s" / "notes.txt").write_text("no sound")
    single = write_wav(tmp_path / "c.wav", np.repeat(ours, 2), 2 * RATE)
    rows, names = open_recordings([single, str(tmp_path / "s")], "audio")
    assert [rows.name(n) for n in range(3)] == names
    assert [Path(name).name for name in names] == ["c.wav", "b.wav", "a.flac"]
    assert rows.seconds == pytest.approx([len(ours) / RATE] * 3)
    assert np.array_equal(rows.waveform(1, RATE), ours)
    assert rows.waveform(2, RATE) == pytest.approx(0.45 * ours, abs=1e-4)
    assert np.array_equal(rows.waveform(1, RATE, 0.25, 0.5), ours[RATE // 4 : RATE // 2])


def test_files_that_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = write_wav(tmp_path / "a.wav", tones("abc"))
    (tmp_path / "b.wav").write_bytes(b"RIFF, but no sound")
    with pytest.raises(TrunklineError, match=r"cannot read the recording .*b\.wav") as error:
        open_recordings([str(tmp_path)], "audio")
    assert error.value.field == "data.skip_corrupt"
    rows, names = open_recordings([str(tmp_path)], "audio", skip_corrupt=True)
    assert (len(rows), rows.name(0), len(names)) == (1, good, 2)
    assert "skipped: cannot read the recording" in capsys.readouterr().err
    with pytest.raises(TrunklineError, match=r"cannot read the recording .*b\.wav"):  # nothing else to do
        open_recordings([str(tmp_path / "b.wav")], "audio", skip_corrupt=True)
    with pytest.raises(TrunklineError, match="none of these 2 recordings can be read; give others"):
        open_recordings([str(tmp_path / "b.wav")] * 2, "audio", skip_corrupt=True)
    with pytest.raises(TrunklineError, match=r"nowhere\.wav: there is no such file or folder; fix the path") as error:
        open_recordings(["nowhere.wav"], "audio")
    assert error.value.field == "audio"
    (tmp_path / "empty").mkdir()
    with pytest.raises(TrunklineError, match="empty holds no "):
        open_recordings([str(tmp_path / "empty")], "audio")


def test_a_window_that_cannot_be_read(tmp_path: Path) -> None:
    """It stops, or is told to be missing."""

    class Broken(Ramps):
        def waveform(self, row: int, rate: int, start: float = 0.0, end: float | None = None) -> np.ndarray:
            if row == 1 and start > 1:
                raise TrunklineError("ramp 1 is broken", field="data.skip_corrupt")
            return super().waveform(row, rate, start, end)

    rows, windowing = Broken(RATE, 5 * RATE), Windowing.of(LOG_MEL, LOG_MEL.max_frames)
    with pytest.raises(TrunklineError, match="ramp 1 is broken"):
        list(AudioWindows(rows, LOG_MEL, windowing).batches(2, 0, "reading"))
    data = AudioWindows(rows, LOG_MEL, windowing, skip_corrupt=True)
    with pytest.warns(UserWarning, match="skipped: ramp 1 is broken"):
        batches = list(data.batches(2, 0, "reading"))
    numbers, valid = (torch.cat([batch[name] for batch in batches]).tolist() for name in ("index", "valid"))
    assert [data.windows[n].recording for n in numbers] == [1, 1, 1, 1, 0]
    assert valid == [True, False, False, False, True]
