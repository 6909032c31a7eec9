"""Pairs of texts from each format, and what files that are missing or do not fit together say."""

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
from pair_files import fake_hub, fault, opened, read, texts, write
from pyarrow import parquet

from trunkline import TrunklineError
from trunkline.datamodules.hub import NamedSource
from trunkline.datamodules.translation.parallel_sources import open_pairs
from trunkline.datamodules.translation.text_pairs import Pair, PairColumns

ROWS = [("a cat", "eine Katze"), ('two\nlines, "quoted"', "zwei"), ("ü", " 猫 ")]


def json_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    return write(path, gzip.compress(content) if path.suffix == ".gz" else content)


def write_csv(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as stream:
        table = csv.DictWriter(stream, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    return path


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


# --- tables

WRITERS: dict[str, Callable[[Path, list[dict[str, Any]]], Path]] = {
    "in.jsonl": json_lines,
    "in.json": json_lines,
    "in.jsonl.gz": json_lines,
    "in.csv": write_csv,
    "in.parquet": write_parquet,
}


@pytest.mark.parametrize("name", WRITERS)
def test_tables(name: str, tmp_path: Path) -> None:
    path = WRITERS[name](tmp_path / name, [{"id": "x", "source": a, "target": b} for a, b in ROWS])
    pairs = read(path)
    assert texts(pairs) == ROWS
    assert [pair.number for pair in pairs] == [0, 1, 2]
    assert {pair.language for pair in pairs} == {None}
    assert pairs[0].place.startswith(str(path))
    source = opened(path)
    assert source.files == [path]
    assert list(source.pairs()) == list(source.pairs()) == pairs  # as often as one asks


def test_named_columns_and_languages_of_rows(tmp_path: Path) -> None:
    rows = [{"en": "a", "text": "b", "to": "de"}, {"en": "c", "text": "d", "to": "fr"}]
    pairs = read(json_lines(tmp_path / "in.jsonl", rows), source="en", target="text", language="to")
    assert texts(pairs) == [("a", "b"), ("c", "d")]
    assert [pair.language for pair in pairs] == ["de", "fr"]


def test_directions_between_columns(tmp_path: Path) -> None:
    """Each row gives one pair for each direction, and they stay in one split."""
    rows = [{"en": "a", "de": "b", "pt_BR": "c"}, {"en": "d", "de": "e", "pt_BR": "f"}]
    pairs = read(json_lines(tmp_path / "in.jsonl", rows), pairs=["en-de", "de-en", "en-pt_BR"])
    assert texts(pairs) == [("a", "b"), ("b", "a"), ("a", "c"), ("d", "e"), ("e", "d"), ("d", "f")]
    assert [pair.language for pair in pairs] == ["de", "en", "pt_BR"] * 2
    assert [pair.number for pair in pairs] == [0, 0, 0, 1, 1, 1]


def test_a_folder_of_tables_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    write_csv(write(tmp_path / "in/b.csv", ""), [{"source": "c", "target": "d"}])
    json_lines(tmp_path / "in/a/z.jsonl", [{"source": "a", "target": "b"}])
    write(tmp_path / "in/.hidden", "x")
    write(tmp_path / "in/.git/x.jsonl", "x")
    pairs = read(tmp_path / "in")
    assert [(pair.number, pair.source) for pair in pairs] == [(0, "a"), (1, "c")]
    assert opened(tmp_path / "in").files == [tmp_path / "in/a/z.jsonl", tmp_path / "in/b.csv"]


def test_the_key_has_what_decides_the_texts(tmp_path: Path) -> None:
    path = json_lines(tmp_path / "in.jsonl", [{"source": "a", "target": "b"}])
    write(tmp_path / "a.txt", "a\n")
    keys = [
        opened(path).key,
        opened(path, source="x").key,
        opened(path, target="x").key,
        opened(path, language="x").key,
        opened(path, pairs=["en-de"]).key,
        opened(path, pairs=["de-en"]).key,
        opened(tmp_path / "a.txt", tmp_path / "a.txt").key,
        opened(tmp_path / "a.txt", tmp_path / "a.txt", pairs=["en-de"]).key,
        opened("owner/name").key,
        opened("owner/name:dev").key,
        opened("owner/other").key,
        open_pairs(NamedSource("owner/name", revision="abc"), None, PairColumns()).key,
        open_pairs(NamedSource("owner/name", hub_config="abc"), None, PairColumns()).key,
    ]
    assert len({json.dumps(key) for key in keys}) == len(keys)


# --- two text files


def test_two_text_files(tmp_path: Path) -> None:
    ours = write(tmp_path / "train.en", b"\xef\xbb\xbfa cat\r\nline\xe2\x80\xa8separator\rx\nlast")
    theirs = write(tmp_path / "train.de.gz", gzip.compress(b"eine Katze\nZeile\nletzte\n"))
    pairs = read(ours, theirs)
    assert texts(pairs) == [("a cat", "eine Katze"), ("line\u2028separator\rx", "Zeile"), ("last", "letzte")]
    assert [(pair.number, pair.place, pair.language) for pair in pairs[1:]] == [
        (1, f"{ours}:2", None),
        (2, f"{ours}:3", None),
    ]
    assert opened(ours, theirs).files == [ours, theirs]


def test_the_first_direction_says_the_languages_of_two_text_files(tmp_path: Path) -> None:
    ours, theirs = write(tmp_path / "a", "one\ntwo\n"), write(tmp_path / "b", "eins\nzwei\n")
    pairs = read(ours, theirs, pairs=["en-de", "de-en"])
    assert texts(pairs) == [("one", "eins"), ("eins", "one"), ("two", "zwei"), ("zwei", "two")]
    assert [pair.language for pair in pairs] == ["de", "en"] * 2
    assert [pair.number for pair in pairs] == [0, 0, 1, 1]
    error = fault(ours, theirs, pairs=["en-de", "en-fr"])
    assert "is in 'en' and" in str(error)
    assert "do not have en-fr" in str(error)
    assert error.field == "data.pairs"


@pytest.mark.parametrize(("first", "second"), [("1\n2\n3\n", "1\n2\n"), ("1\n2\n3", "1\n2"), ("1\n2\n3", "1\n2\n")])
def test_different_numbers_of_lines_are_both_said(first: str, second: str, tmp_path: Path) -> None:
    ours, theirs = write(tmp_path / "a", first), write(tmp_path / "b", second)
    error = fault(ours, theirs)
    assert f"{ours} has 3 lines, but {theirs} has 2;" in str(error)
    assert error.field == "data.target_source"
    assert f"{theirs} has 2 lines, but {ours} has 3;" in str(fault(theirs, ours))


def test_the_numbers_of_lines_are_compared_first(tmp_path: Path) -> None:
    pairs = opened(write(tmp_path / "a", "1\n" * 2345), write(tmp_path / "b", "1\n" * 2346)).pairs()
    with pytest.raises(TrunklineError, match=r"has 2,345 lines, but .* has 2,346;"):
        next(pairs)


@pytest.mark.parametrize(("name", "line"), [("a", "a:2"), ("b", "b:2")])
def test_blank_lines_are_named(name: str, line: str, tmp_path: Path) -> None:
    for other in "ab":
        write(tmp_path / other, "1\n \t\u3000\n3\n" if other == name else "1\n2\n3\n")
    assert f"{tmp_path / line} is empty" in str(fault(tmp_path / "a", tmp_path / "b"))


def test_text_files_that_cannot_be_read(tmp_path: Path) -> None:
    good = write(tmp_path / "good", "one\ntwo\n")
    assert "b.gz is not a gzip file" in str(fault(good, write(tmp_path / "b.gz", b"no gzip")))
    cut = gzip.compress(b"one\ntwo\n" * 100)[:-10]
    assert "c.gz is not a gzip file" in str(fault(good, write(tmp_path / "c.gz", cut)))
    assert "latin, byte 5: not UTF-8" in str(fault(good, write(tmp_path / "latin", b"one\nt\xe9\n")))
    empty = write(tmp_path / "empty", "")
    assert f"{empty} and {empty} are empty" in str(fault(empty, empty))


def test_a_missing_second_file_is_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path / "train.en", "a\n")
    error = fault(path)
    assert f"{path} is a text file, which has one side only; name it with source, and" in str(error)
    assert error.field == "data.target_source"
    with pytest.raises(TrunklineError, match="with val_target_source; or give "):
        opened(path, field="val_source")
    folder = write(tmp_path / "in" / "a.jsonl", "{}").parent
    write(folder / "b.txt", "b")
    assert "b.txt is a text file" in str(fault(folder))


def test_files_that_are_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(datasets, "load_dataset")
    there, missing = write(tmp_path / "a.txt", "a"), tmp_path / "no.txt"
    for source, target, field in ((missing, there, "data.source"), (there, missing, "data.target_source")):
        error = fault(source, target)
        assert f"{field.removeprefix('data.')}={missing}: there is no such file" in str(error)
        assert error.field == field
    assert f"source={tmp_path}: this is no file" in str(fault(tmp_path, there))
    for name in ("no.jsonl", "no.tmx", "no.tmx.gz", "no/such/folder", "no.txt"):
        error = fault(name)
        assert f"source={name}: there is no such file or folder here" in str(error)
        assert error.field == "data.source"


@pytest.mark.parametrize("name", ["in.jsonl", "in.csv", "in.tmx", "in.jsonl.gz", "dates", "phrases"])
def test_a_second_file_beside_a_source_that_has_both_sides(name: str, tmp_path: Path) -> None:
    source = name if "." not in name else write(tmp_path / name, "x")
    text = write(tmp_path / "b.txt", "x")
    error = fault(source, text)
    assert f"target_source={text} names a second text file, but source={source} has both sides; leave" in str(error)
    assert error.field == "data.target_source"
    if "." in name:
        assert f"target_source={source} is not a text file, as source={text} is" in str(fault(text, source))


def test_splits_belong_to_the_hub(tmp_path: Path) -> None:
    path = json_lines(tmp_path / "in.jsonl", [{"source": "a", "target": "b"}])
    for name, target in ((path, None), ("dates", None), (write(tmp_path / "a", "a"), NamedSource(str(tmp_path / "a")))):
        with pytest.raises(TrunklineError, match="train_split=x names a split of a hub dataset") as caught:
            open_pairs(NamedSource(str(name), split="x"), target, PairColumns())
        assert caught.value.field == "data.train_split"


# --- hub


def test_a_translation_column(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = fake_hub(monkeypatch, [{"id": 1, "translation": {"de": "eine", "en": "one"}}])
    source = open_pairs(
        NamedSource("owner/name", split="test", hub_config="de-en", revision="abc"), None, PairColumns(pairs=["en-de"])
    )
    assert not asked  # a prepared corpus needs no network
    assert source.files == []
    assert list(source.pairs()) == [Pair(0, "owner/name (test), row 0", "one", "eine", "de")]
    assert asked == [(("owner/name", "de-en"), {"split": "test", "revision": "abc", "streaming": True})]
    assert texts(read("owner/name", pairs=["de-en", "en-de"])) == [("eine", "one"), ("one", "eine")]
    assert [pair[2:] for pair in read("owner/name", source="de", target="en")] == [("eine", "one", "en")]


def test_a_translation_column_of_a_file(tmp_path: Path) -> None:
    rows = [{"translation": {"de": "eine", "en": "one"}}, {"translation": {"de": "zwei", "en": "two"}}]
    for name in ("in.jsonl", "in.parquet"):
        assert texts(read(WRITERS[name](tmp_path / name, rows), pairs=["de-en"])) == [("eine", "one"), ("zwei", "two")]


def test_two_columns_and_summaries_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_hub(monkeypatch, [{"id": "7", "document": "long", "summary": "short"}])
    assert texts(read("xsum")) == [("long", "short")]
    assert texts(read("xsum", source="summary", target="id")) == [("short", "7")]
    fake_hub(monkeypatch, [{"source": "a", "target": "b", "document": "c", "summary": "d", "translation": {}}])
    assert texts(read("owner/name")) == [("a", "b")]


def test_a_hub_that_cannot_be_reached_offers_what_needs_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*args: Any, **options: Any) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", load)
    message = str(fault("owner/name"))
    assert "ConnectionError: no network; give dates, " in message
    assert "phrases" in message


# --- offline names


def test_names_that_need_no_file() -> None:
    source = opened("dates:years")
    assert source.files == []
    pair = next(source.pairs())
    assert pair.number == 0
    assert pair.target[:2] in ("19", "20")
    for name in ("dates:nothing", "phrases:nothing"):
        error = fault(name)
        assert f"source={name}: there is no such set; choose among dates, " in str(error)
        assert error.field == "data.source"
