"""Prepared corpora with special tokens before their texts, and with the texts themselves."""

import hashlib
import json
import pickle
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from small_data import save_tokenizers

from trunkline import TrunklineError
from trunkline.datamodules.text import preparation
from trunkline.datamodules.text.preparation import Preparation
from trunkline.datamodules.text.text_sources import Piece
from trunkline.datamodules.text.token_shards import INDEX
from trunkline.datamodules.tokenizers import size_of

SPLITS = {"train": 0.8, "val": 0.2}
TOKENS = ["<2de>", "<2fr>"]


@pytest.fixture(autouse=True)
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparation, "GROUP_BYTES", 1000)
    monkeypatch.setattr(preparation, "BATCH_BYTES", 170)


@dataclass
class Listed:
    """A source of listed pieces."""

    listed: list[Piece]
    files: list[Path] = field(default_factory=list)
    key: list[Any] = field(default_factory=lambda: ["listed"])

    def pieces(self, shares: dict[str, float]) -> Iterator[Piece]:
        yield from self.listed


def documents(count: int = 120) -> list[Piece]:
    """Documents of both splits, some of them with a special token."""
    tokens = [None, *TOKENS]
    return [
        Piece("val" if n % 5 == 4 else "train", f"Ünder <2de> {'word ' * (n % 7)}{n}", True, tokens[n % 3])
        for n in range(count)
    ]


def made(cache: Path, tokenizer: str = "bpe", size: int | None = 300, **options: Any) -> Preparation:
    options = {"special": TOKENS, "texts": ["val"], **options}
    return Preparation([(Listed(documents()), SPLITS)], tokenizer, size, cache, **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in sorted(folder.iterdir())}


# --- special tokens


@pytest.mark.parametrize("name", ["bpe", "chars", "wordpiece"])
def test_a_special_token_stands_before_its_text(name: str, tmp_path: Path) -> None:
    done = made(tmp_path, name)
    words = done.tokenizer
    end = words.token_to_id("[SEP]" if name == "wordpiece" else "<|endoftext|>")
    expected: dict[str, list[list[int]]] = {"train": [], "val": []}
    words.encode_special_tokens = True  # the `<2de>` inside a text is ordinary text
    for piece in documents():
        first = [] if piece.special is None else [words.token_to_id(piece.special)]
        expected[piece.split].append([*first, *words.encode(piece.text, add_special_tokens=False).ids, end])
    for split, rows in expected.items():
        stream = done.stream(split)
        assert len(stream.shards) > 1
        assert stream.read(0, len(stream)).tolist() == [token for row in rows for token in row]
        assert stream.document_ends().tolist() == np.cumsum([*map(len, rows)]).tolist()


def test_pieces_without_ends_can_begin_with_a_special_token(tmp_path: Path) -> None:
    pieces = [Piece("train", "ab", False, "<2fr>"), Piece("train", "c", True), Piece("train", "d", True, "<2de>")]
    done = Preparation([(Listed(pieces), {"train": 1.0})], "chars", None, tmp_path, special=TOKENS)
    assert done.tokenizer.get_vocab() == {
        "<|endoftext|>": 0, "<|unk|>": 1, "a": 2, "b": 3, "c": 4, "d": 5, "<2de>": 6, "<2fr>": 7,
    }  # fmt: skip
    stream = done.stream("train")
    assert stream.read(0, len(stream)).tolist() == [7, 2, 3, 4, 0, 6, 5, 0]
    assert stream.document_ends().tolist() == [5, 8]


def test_a_learnt_tokenizer_gets_them_within_its_size(tmp_path: Path) -> None:
    words = made(tmp_path, "bpe", 270).tokenizer
    assert size_of(words) == 270
    assert [words.token_to_id(token) for token in TOKENS] == [268, 269]
    assert words.decode([268, *words.encode("Ünder").ids]) == "Ünder"
    with pytest.raises(TrunklineError, match="vocab_size=258 is too small for bpe; set it to at least 259"):
        made(tmp_path, "bpe", 258).prepare()


def test_a_loaded_tokenizer_must_have_them(tmp_path: Path) -> None:
    save_tokenizers(tmp_path)
    with pytest.raises(TrunklineError) as caught:
        made(tmp_path / "cache", str(tmp_path / "gpt.json"), field="data.target_tokenizer").prepare()
    assert f"the tokenizer {tmp_path}/gpt.json has no token <2de>, which" in str(caught.value)
    assert caught.value.field == "data.target_tokenizer"
    words = tokenizers.Tokenizer.from_file(str(tmp_path / "gpt.json"))
    words.add_special_tokens(TOKENS)
    words.save(str(tmp_path / "more.json"))
    loaded = made(tmp_path / "cache", str(tmp_path / "more.json"))
    assert loaded.stream("train").read(0, 1).tolist() != [words.token_to_id("<2de>")]
    start = int(loaded.stream("train").document_ends()[0])
    assert loaded.stream("train").read(start, start + 1).tolist() == [words.token_to_id("<2de>")]


def test_a_tokenizer_without_an_end_names_its_field(tmp_path: Path) -> None:
    tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / "a.json"))
    with pytest.raises(TrunklineError, match="has no token that ends a document") as caught:
        made(tmp_path, str(tmp_path / "a.json"), special=[], field="data.target_tokenizer").prepare()
    assert caught.value.field == "data.target_tokenizer"


# --- texts


@pytest.mark.parametrize("name", ["bpe", "wordpiece"])
def test_the_texts_of_a_split_are_kept_as_they_are(name: str, tmp_path: Path) -> None:
    done = made(tmp_path, name)
    expected = [piece.text for piece in documents() if piece.split == "val"]
    texts = done.texts("val")
    for read in (texts, pickle.loads(pickle.dumps(texts))):
        assert len(read.shards) > 1
        assert [read[n] for n in range(len(read))] == expected
    for number in (-1, len(expected)):
        with pytest.raises(IndexError):
            texts[number]
    assert not list(done.folder.glob("train*.txt"))


@pytest.mark.parametrize("damage", ["val-00001.txt", "val-00001.text-ends.npy", "group-00001.json"])
def test_missing_texts_are_written_again(damage: str, tmp_path: Path) -> None:
    done = made(tmp_path)
    done.prepare()
    whole = contents(done.folder)
    (done.folder / damage).unlink()
    if damage.startswith("group"):
        (done.folder / INDEX).unlink()
    again = made(tmp_path)
    again.prepare()
    assert contents(again.folder) == whole


# --- the folder


def test_a_corpus_without_them_keeps_its_folder_and_files(tmp_path: Path) -> None:
    """Else a new version would prepare every corpus again."""
    plain = Preparation([(Listed(documents()), SPLITS)], "bpe", 300, tmp_path)
    settings = [1, 1000, tokenizers.__version__, ["bpe", 300], [[["listed"], [], SPLITS]]]
    assert plain.folder.name == hashlib.blake2b(json.dumps(settings).encode(), digest_size=12).hexdigest()
    plain.prepare()
    assert {name.partition(".")[2] for name in contents(plain.folder)} == {"bin", "ends.npy", "json"}


def test_special_tokens_and_kept_texts_make_other_folders(tmp_path: Path) -> None:
    options: list[dict[str, Any]] = [
        {"special": (), "texts": ()},
        {"special": (), "texts": ["val"]},
        {"special": TOKENS, "texts": ()},
        {"special": TOKENS[::-1], "texts": ()},
        {"special": TOKENS, "texts": ["train", "val"]},
    ]
    folders = [made(tmp_path, **chosen).folder for chosen in options]
    assert len(set(folders)) == len(folders)
    assert (
        made(tmp_path, special=(), texts={"val", "train"}).folder
        == made(tmp_path, special=(), texts=["train", "val"]).folder
    )
