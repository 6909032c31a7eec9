"""Where recordings come from, and what a list of them can get wrong."""

import csv
import json
import pickle
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from sound_files import RATE, letter_tones, write_sound

from trunkline import TrunklineError
from trunkline.datamodules.audio.audio_listing import AudioListing, Listed
from trunkline.datamodules.audio.audio_manifests import AudioColumns
from trunkline.datamodules.audio.audio_rows import AudioRows, AudioSubset, windows
from trunkline.datamodules.audio.audio_sources import open_audio
from trunkline.datamodules.hub import NamedSource

SPEECH, SOUNDS = AudioColumns(text="text"), AudioColumns(label="label")
TEXTS = ["ab", "bcd", "dd", "abcd"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Recordings 0.wav to 3.flac, each of which says its text."""
    for number, text in enumerate(TEXTS):
        write_sound(tmp_path / f"clips/{number}.{'flac' if number == 3 else 'wav'}", letter_tones(text))
    return tmp_path


def paths() -> list[str]:
    return [f"clips/{number}.{'flac' if number == 3 else 'wav'}" for number in range(len(TEXTS))]


def listed() -> list[dict[str, Any]]:
    """The rows of a table of them."""
    return [{"audio": path, "text": text} for path, text in zip(paths(), TEXTS, strict=True)]


def opened(
    source: Path | str, columns: AudioColumns = SPEECH, *, split: str | None = None, **options: Any
) -> AudioRows:
    """The training rows of a source."""
    cache = options.pop("cache", Path(source).parent / "cache")
    splits, _ = open_audio(NamedSource(str(source), split=split), columns, cache=cache, **options)
    return splits["train"]


def assert_says(rows: AudioRows, texts: list[str]) -> None:
    """The rows have these texts, and their samples are those of the texts."""
    assert rows.texts == texts
    np.testing.assert_allclose(rows.seconds, [0.1 * len(text) for text in texts], atol=1e-9)
    for row, text in enumerate(texts):
        np.testing.assert_allclose(rows.waveform(row, RATE), letter_tones(text), atol=1e-4)


def write_table(file: Path, rows: list[dict[str, Any]]) -> Path:
    """Write JSON lines, CSV or Parquet by the suffix; returns the path."""
    if file.suffix == ".csv":
        with file.open("w", newline="") as stream:
            table = csv.DictWriter(stream, rows[0])
            table.writeheader()
            table.writerows(rows)
    elif file.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(str(file))
    else:
        file.write_text("\n".join(map(json.dumps, rows)))
    return file


# --- tables


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_a_table_lists_paths(suffix: str, folder: Path) -> None:
    assert_says(opened(write_table(folder / f"list{suffix}", listed())), TEXTS)


def test_paths_are_relative_to_the_audio_folder(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "lists").mkdir()
    table = write_table(tmp_path / "lists/a.jsonl", [{"path": "0.wav", "text": "ab"}])
    assert_says(opened(table, audio_folder=folder / "clips"), ["ab"])


@pytest.mark.parametrize("column", ["audio", "path", "file", "audio_filepath", "mine"])
def test_the_column_of_recordings_is_found_or_named(column: str, folder: Path) -> None:
    table = write_table(folder / "a.jsonl", [{column: paths()[0], "text": "ab"}])
    columns = AudioColumns(audio="mine" if column == "mine" else None, text="text")
    assert_says(opened(table, columns), ["ab"])


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_recordings_are_parts_of_files(suffix: str, folder: Path) -> None:
    """`abcd` is cut into its letters; the last part goes to the end of the file."""
    parts = [(0, 0.1), (0.1, 0.3), (0.3, None)]
    rows = [{"audio": "clips/3.flac", "text": "-", "start": start, "end": end} for start, end in parts]
    found = opened(write_table(folder / f"list{suffix}", rows))
    np.testing.assert_allclose(found.seconds, [0.1, 0.2, 0.1], atol=1e-9)
    for row, letters in enumerate(["a", "bc", "d"]):
        np.testing.assert_allclose(found.waveform(row, RATE), letter_tones(letters), atol=1e-4)
    np.testing.assert_allclose(found.waveform(1, RATE, 0.05, 0.15), letter_tones("bc")[400:1200], atol=1e-4)
    np.testing.assert_allclose(
        found.waveform(1, RATE, 0.15, 9.0), letter_tones("c")[400:], atol=1e-4
    )  # ends with its row


def test_a_listing_is_packed_and_reads_as_it_was_given() -> None:
    rows = [
        Listed(0, "a/\udcff é.wav", None, ["dog", "\udcfe"], 0.0, None, 16_000),
        Listed(1, "b.wav, row 1", "two words", None, 1.5, 2.25),
        Listed(1, "", "", [], 0.0, 2.0),
    ]
    files = [Path("/a/\udcff é.wav"), Path("b.wav"), "c d.wav"]
    listing = AudioListing(list(files), list(rows))
    assert [*listing.rows] == rows
    assert listing.rows[-1] == rows[-1]
    assert listing.rows[0:2] == rows[:2]
    assert list(map(str, listing.contents)) == list(map(str, files))
    for packed in (pickle.loads(pickle.dumps(listing)), AudioListing(listing.contents, listing.rows)):
        assert [*packed.rows] == rows
        assert [*packed.contents] == [*listing.contents]
    assert [*AudioListing([], []).rows] == []


def test_rows_of_a_listing_take_little_memory() -> None:
    rows = [Listed(n, f"sounds/class/{n:07}.wav", labels=["class"]) for n in range(20_000)]
    tracemalloc.start()
    listing = AudioListing([Path(row.name) for row in rows], rows)
    size = tracemalloc.get_traced_memory()[0] + listing.rows.table.nbytes  # type: ignore[attr-defined]  # Arrow's own
    tracemalloc.stop()
    names = sum(len(row.name) for row in rows)
    assert size < 3 * names + 70 * len(rows)  # 0.15 KB a row, of which 0.1 KB are the name, twice


def audio_parquet(file: Path, contents: list[bytes | None]) -> Path:
    cells = [None if content is None else {"bytes": content, "path": None} for content in contents]
    table = datasets.Dataset.from_dict({"audio": cells, "text": TEXTS[: len(cells)], "label": [1] * len(cells)})
    names = datasets.ClassLabel(names=["noise", "voice"])
    table.cast_column("label", names).to_parquet(str(file))
    return file


def test_a_table_holds_the_recordings(folder: Path) -> None:
    """Class numbers of a table are replaced by their names."""
    contents = [(folder / path).read_bytes() for path in paths()]
    file = audio_parquet(folder / "a.parquet", contents)
    assert_says(opened(file), TEXTS)
    assert opened(file, SOUNDS).labels == [["voice"]] * 4
    (folder / "shards").mkdir()
    shutil.copy(file, folder / "shards/0.parquet")
    shutil.copy(file, folder / "shards/1.parquet")
    assert_says(opened(folder / "shards"), TEXTS * 2)
    assert "row 1" in opened(file).name(1)


def test_a_folder_that_datasets_saved(folder: Path) -> None:
    contents = [{"bytes": (folder / path).read_bytes(), "path": None} for path in paths()]
    table = datasets.Dataset.from_dict({"audio": contents, "text": TEXTS})
    table.save_to_disk(str(folder / "one"))
    assert_says(opened(folder / "one"), TEXTS)
    datasets.DatasetDict({"train": table, "dev": table.select([1])}).save_to_disk(str(folder / "two"))
    assert_says(opened(folder / "two"), TEXTS)
    assert_says(opened(folder / "two", split="dev"), ["bcd"])
    with pytest.raises(TrunklineError, match=r"cannot read source=.*KeyError"):
        opened(folder / "two", split="tset")


def test_a_hub_dataset(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    contents = [{"bytes": (folder / path).read_bytes(), "path": f"{n}.wav"} for n, path in enumerate(paths())]
    table = datasets.Dataset.from_dict({"audio": contents, "text": TEXTS})
    table = table.cast_column("audio", datasets.Audio(decode=False))
    monkeypatch.setattr(datasets, "load_dataset", lambda *names, **options: asked.append((names, options)) or table)
    source = NamedSource("owner/speech", split="train.100", hub_config="clean", revision="v1")
    splits, faults = open_audio(source, SPEECH, cache=folder / "cache")
    assert_says(splits["train"], TEXTS)
    assert faults == []
    assert asked == [(("owner/speech", "clean"), {"split": "train.100", "revision": "v1"})]
    assert splits["train"].name(2) == "owner/speech (train.100), row 2"


def test_a_hub_dataset_that_cannot_be_reached(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(TrunklineError, match="as a hub name: ConnectionError: no network; give `spoken_digits`"):
        opened("owner/speech", cache=folder)


@pytest.mark.parametrize(
    ("row", "columns", "message", "field"),
    [
        (
            {"text": "a"},
            SPEECH,
            "a.jsonl:1 has no column 'audio or path .*it has text; set audio_column",
            "audio_column",
        ),
        ({"audio": 3, "text": "a"}, SPEECH, "a.jsonl:1: 'audio' is not a path but int", "audio_column"),
        ({"audio": "", "text": "a"}, SPEECH, "a.jsonl:1: 'audio' is empty", "audio_column"),
        ({"audio": "clips/0.wav"}, SPEECH, "a.jsonl:1 has no 'text'; it has audio; set text_column", "text_column"),
        ({"audio": "clips/0.wav", "text": 7}, SPEECH, "a.jsonl:1: 'text' is not a text but int", "text_column"),
        ({"audio": "clips/0.wav"}, SOUNDS, "a.jsonl:1 has no 'label'", "label_column"),
        (
            {"audio": "clips/0.wav", "label": None},
            SOUNDS,
            "a.jsonl:1: 'label' is not a name .* but null",
            "label_column",
        ),
        ({"audio": "clips/0.wav", "label": ["x", 0.5]}, SOUNDS, "'label' is not a name .* but float", "label_column"),
        ({"audio": "clips/0.wav", "text": "a", "start": "x"}, SPEECH, "a.jsonl:1: 'start' is not a number.*'x'", None),
        ({"audio": "clips/0.wav", "text": "a", "end": -1}, SPEECH, "a.jsonl:1: 'end' is not a number", None),
    ],
)
def test_wrong_cells_are_named(
    row: dict[str, Any], columns: AudioColumns, message: str, field: str | None, folder: Path
) -> None:
    with pytest.raises(TrunklineError, match=message) as error:
        opened(write_table(folder / "a.jsonl", [row]), columns)
    assert error.value.field == (None if field is None else f"data.{field}")


def test_labels_in_lists_and_with_a_separator(folder: Path) -> None:
    rows = [{"audio": "clips/0.wav", "label": label} for label in ("b, a", "c", "a,a")]
    columns = AudioColumns(label="label", separator=",")
    assert opened(write_table(folder / "a.csv", rows), columns).labels == [["b", "a"], ["c"], ["a"]]
    rows = [{"audio": "clips/0.wav", "label": label} for label in (["x", "y"], [], [3])]
    assert opened(write_table(folder / "a.jsonl", rows), SOUNDS).labels == [["x", "y"], [], ["3"]]


# --- folders


def test_folders_of_classes(folder: Path) -> None:
    for label, number in (("dog", 0), ("cat", 1), ("cat", 2)):
        write_sound(folder / f"sounds/{label}/deep/{number}.wav", letter_tones(TEXTS[number]))
    (folder / "sounds/readme.txt").write_text("no sound")
    rows = opened(folder / "sounds", SOUNDS)
    assert rows.labels == [["cat"], ["cat"], ["dog"]]
    assert rows.name(0).endswith("cat/deep/1.wav")
    np.testing.assert_allclose(rows.waveform(2, RATE), letter_tones("ab"), atol=1e-4)


def test_folders_of_splits(folder: Path) -> None:
    for split, label in (("train", "a"), ("train", "b"), ("validation", "a"), ("other", "b")):
        write_sound(folder / f"sounds/{split}/{label}/0.wav", letter_tones("ab"))
    splits, _ = open_audio(NamedSource(str(folder / "sounds")), SOUNDS, cache=folder)
    assert {split: rows.labels for split, rows in splits.items()} == {"train": [["a"], ["b"]], "val": [["a"]]}
    assert opened(folder / "sounds", SOUNDS, split="other").labels == [["b"]]
    with pytest.raises(TrunklineError, match=r"train_split=none: .* has no such sub-folder") as error:
        opened(folder / "sounds", SOUNDS, split="none")
    assert error.value.field == "data.train_split"


def test_a_file_outside_the_classes_is_refused(folder: Path) -> None:
    write_sound(folder / "sounds/a/0.wav", letter_tones("ab"))
    write_sound(folder / "sounds/1.wav", letter_tones("ab"))
    with pytest.raises(TrunklineError, match=r"sounds/1\.wav is in no class"):
        opened(folder / "sounds", SOUNDS)


def test_sources_that_are_none(folder: Path) -> None:
    (folder / "notes.txt").write_text("hello")
    for source, message in (
        (folder / "none.jsonl", "there is no such file or folder here"),
        (folder / "notes.txt", "is no list of recordings"),
        (folder / "clips", "has no transcripts: neither Kaldi's"),
        ("spoken_digits:none", "no set of spoken digits"),
    ):
        with pytest.raises(TrunklineError, match=message):
            opened(source, cache=folder)
    (folder / "empty").mkdir()
    with pytest.raises(TrunklineError, match="holds no sound file"):
        opened(folder / "empty", SOUNDS)
    with pytest.raises(TrunklineError, match="names a split of a hub dataset"):
        opened(write_table(folder / "a.jsonl", [{"audio": "clips/0.wav", "text": "ab"}]), split="dev")


# --- Kaldi and LibriSpeech


def kaldi(folder: Path, **files: str) -> Path:
    """A folder with these lists."""
    (folder / "kaldi").mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / "kaldi" / name.replace("wav", "wav.scp")).write_text(content)
    return folder / "kaldi"


def test_lists_of_kaldi(folder: Path) -> None:
    source = kaldi(folder, wav="one ../clips/0.wav\ntwo\t../clips/1.wav\n\n", text="two  bcd\none ab\n")
    assert_says(opened(source), ["ab", "bcd"])
    assert opened(source).name(1).endswith("wav.scp:2 (two, " + str(folder / "kaldi/../clips/1.wav") + ")")
    assert_says(opened(kaldi(folder, wav=f"one {folder}/clips/0.wav"), audio_folder=Path("/nowhere")), ["ab"])


def test_segments_of_kaldi(folder: Path) -> None:
    source = kaldi(
        folder,
        wav="long ../clips/3.flac\nunused nowhere.wav",
        segments="x-1 long 0.0 0.2\nx-2 long 0.2 -1\nx-3 long 0.1 0.2",
        text="x-1 ab\nx-2 cd",
    )
    rows = opened(source)
    assert rows.texts == ["ab", "cd", ""]  # without a text, which `SpeechData` refuses
    np.testing.assert_allclose(rows.seconds, [0.2, 0.2, 0.1], atol=1e-9)
    np.testing.assert_allclose(rows.waveform(1, RATE), letter_tones("cd"), atol=1e-4)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"wav": "one sox a.wav -t wav - |", "text": "one a"}, r"wav\.scp:1 is a command, which is not run"),
        ({"wav": "one", "text": "one a"}, r"wav\.scp:1 has only the name 'one'"),
        ({"wav": "one a.wav\none b.wav", "text": "one a"}, r"wav\.scp:2: 'one' stands already at .*:1"),
        ({"wav": "", "text": "one a"}, r"wav\.scp has no line"),
        ({"wav": "one ../clips/0.wav"}, r"cannot read .*kaldi/text"),
        ({"wav": "one ../clips/0.wav", "text": "", "segments": "a two 0 1"}, r"kaldi/text has no line"),
        ({"wav": "one ../clips/0.wav", "text": "a a", "segments": "a two 0 1"}, r"segments:1: wav\.scp has no .*two"),
        (
            {"wav": "one ../clips/0.wav", "text": "a a", "segments": "a one 0"},
            r"segments:1 is not `name recording start",
        ),
        ({"wav": "one ../clips/0.wav", "text": "a a", "segments": "a one 0.1 9"}, r"has no part from 0\.1 s to 9 s"),
    ],
)
def test_broken_lists_of_kaldi(files: dict[str, str], message: str, folder: Path) -> None:
    with pytest.raises(TrunklineError, match=message):
        opened(kaldi(folder, **files))


def test_lists_of_kaldi_have_no_labels(folder: Path) -> None:
    with pytest.raises(TrunklineError, match="has no labels; give a table"):
        opened(kaldi(folder, wav="one ../clips/0.wav", text="one ab"), SOUNDS)


def test_folders_as_in_librispeech(folder: Path) -> None:
    for number, text in enumerate(TEXTS):
        place = folder / f"speech/{number // 2}"
        write_sound(place / f"1-2-{number}.flac", letter_tones(text))
        with (place / "1-2.trans.txt").open("a") as stream:
            stream.write(f"1-2-{number} {text}\n")
    rows = opened(folder / "speech")
    assert_says(rows, TEXTS)
    assert rows.name(3).endswith("speech/1/1-2.trans.txt:2 (1-2-3)")


# --- headers


def broken(folder: Path) -> dict[str, Path]:
    """Files and what is wrong with them."""
    whole = (folder / "clips/0.wav").read_bytes()
    contents = {"no audio": b"hello" * 100, "cut": whole[: len(whole) // 2], "empty": b"", "header": whole[:44]}
    files = {name: folder / f"{name.replace(' ', '_')}.wav" for name in contents}
    for name, content in contents.items():
        files[name].write_bytes(content)
    return files | {"missing": folder / "missing.wav"}


@pytest.mark.parametrize("name", ["no audio", "cut", "empty", "header", "missing"])
def test_broken_files_are_found_before_the_training(name: str, folder: Path) -> None:
    """By file and row; or left out, and told."""
    file = broken(folder)[name]
    rows = listed()
    rows[1]["audio"] = str(file)
    table = write_table(folder / "a.jsonl", rows)
    with pytest.raises(TrunklineError, match=rf"a\.jsonl:2 \({file}\)") as error:
        opened(table)
    assert error.value.field == "data.skip_corrupt"
    splits, faults = open_audio(NamedSource(str(table)), SPEECH, skip_corrupt=True, cache=folder / "cache")
    assert_says(splits["train"], [TEXTS[0], *TEXTS[2:]])
    assert [str(fault) for fault in faults] == [str(error.value)]


def test_an_empty_cell_is_a_fault_of_its_row(folder: Path) -> None:
    content = (folder / paths()[0]).read_bytes()
    file = audio_parquet(folder / "a.parquet", [content, None])
    with pytest.raises(TrunklineError, match=r"a\.parquet, row 1"):
        opened(file)
    assert_says(opened(file, skip_corrupt=True), ["ab"])


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ({"sample_rate": 16_000}, r"a\.jsonl:1 .* has 8000 samples per second, but the list says 16000"),
        ({"start": 0.1, "end": 0.9}, r"a\.jsonl:1 .* lasts 0\.20 s, and has no part from 0\.1 s to 0\.9 s"),
        ({"start": 0.1, "end": 0.1}, "has no part from 0.1 s to 0.1 s"),
        ({"start": 5}, "has no part from 5 s to 0.2 s"),
    ],
)
def test_lists_that_say_something_else_than_the_file(cells: dict[str, Any], message: str, folder: Path) -> None:
    good = {"audio": "clips/1.wav", "text": "bcd", "sample_rate": RATE}
    table = write_table(folder / "a.jsonl", [{"audio": "clips/0.wav", "text": "ab", **cells}, good])
    with pytest.raises(TrunklineError, match=message) as error:
        opened(table)
    assert error.value.field == "data.skip_corrupt"
    assert_says(opened(table, skip_corrupt=True), ["bcd"])


def test_very_long_recordings_are_refused(folder: Path) -> None:
    table = write_table(folder / "a.jsonl", [{"audio": path, "text": "-"} for path in paths()])
    with pytest.raises(TrunklineError, match=r"a\.jsonl:2 .* lasts 0\.0 hours, and can be read only in parts"):
        opened(table, longest=0.25)
    assert len(opened(table, longest=0.25, skip_corrupt=True)) == 2
    assert len(opened(table, longest=np.inf)) == 4


def test_if_nothing_can_be_read_there_is_an_error(folder: Path) -> None:
    table = write_table(folder / "a.jsonl", [{"audio": "none.wav", "text": "ab"}])
    with pytest.raises(TrunklineError, match=r"no recording can be used; the first fault: .*a\.jsonl:1"):
        opened(table, skip_corrupt=True)


def test_headers_are_read_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until a file changes."""
    from trunkline.datamodules.audio import audio_listing

    read: list[str] = []
    header: Callable[..., Any] = audio_listing.audio_header
    monkeypatch.setattr(audio_listing, "audio_header", lambda file, name: read.append(name) or header(file, name))
    table = write_table(folder / "a.jsonl", [{"audio": path, "text": "-"} for path in paths()])
    first = opened(table).seconds
    assert len(read) == 4
    np.testing.assert_array_equal(opened(table).seconds, first)
    assert len(read) == 4
    write_sound(folder / paths()[1], letter_tones("abcdabcd"))
    np.testing.assert_allclose(opened(table).seconds, [0.2, 0.8, 0.2, 0.4], atol=1e-9)
    assert len(read) == 8


# --- parts of rows


def test_windows_overlap_evenly(folder: Path) -> None:
    """A row of 0.3 s as parts of 0.2 s, and one of 0.4 s as two that meet."""
    rows = opened(
        write_table(folder / "a.jsonl", [{"audio": p, "text": t} for p, t in zip(paths(), TEXTS, strict=True)])
    )
    parts = windows(rows, 0.2)
    assert parts.texts == ["ab", "bcd", "bcd", "dd", "abcd", "abcd"]
    np.testing.assert_allclose(parts.seconds, 0.2)
    np.testing.assert_allclose(parts.starts, [0, 0, 0.1, 0, 0, 0.2], atol=1e-12)
    np.testing.assert_allclose(parts.waveform(2, RATE), letter_tones("bcd")[800:], atol=1e-4)
    np.testing.assert_allclose(parts.waveform(4, RATE), letter_tones("ab"), atol=1e-4)
    np.testing.assert_allclose(parts.waveform(4, RATE, 0.1, 0.15), letter_tones("b")[:400], atol=1e-4)
    assert parts.name(2).endswith(", from 0.10 s on")
    assert len(windows(rows, 0.2, slack=0.11)) == 5  # 0.3 s are not long enough for two
    assert windows(rows, 9.0).seconds.tolist() == rows.seconds.tolist()


def test_a_subset_of_rows(folder: Path) -> None:
    rows = opened(
        write_table(folder / "a.jsonl", [{"audio": p, "text": t} for p, t in zip(paths(), TEXTS, strict=True)])
    )
    assert_says(AudioSubset(rows, np.array([3, 1])), ["abcd", "bcd"])
    assert_says(AudioSubset(AudioSubset(rows, np.array([3, 1])), np.array([1])), ["bcd"])
