"""TaggedTextData: tags stand at the first sub-word of their word, and no word is lost silently."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from pyarrow import Table, parquet
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from trunkline import TrunklineError
from trunkline.datamodules.samplers import SampleKey
from trunkline.datamodules.text_tasks.tagged_text import TaggedTextData, WordEncoder
from trunkline.datamodules.tokenizers import train_bpe

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
PIECES = ["anna", "ber", "##lin", "lives", "in", ".", "##na", "an"]
SENTENCE = {"tokens": ["Anna", "lives", "in", "Berlin", "."], "tags": ["B-PER", "O", "O", "B-LOC", "O"]}
NAMES = ["B-LOC", "B-PER", "O"]


@pytest.fixture(autouse=True)
def tokenizer(tmp_path: Path) -> Tokenizer:
    made = Tokenizer(models.WordPiece({w: n for n, w in enumerate(SPECIAL + PIECES)}, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.add_special_tokens(SPECIAL)
    made.save(str(tmp_path / "tokenizer.json"))
    return made


def write(file: Path, rows: list[Any]) -> str:
    if file.suffix == ".jsonl":
        file.write_text("\n".join(map(json.dumps, rows)))
    else:
        parquet.write_table(Table.from_pylist(rows), file)
    return str(file)


def ready(path: str, folder: Path, **options: Any) -> TaggedTextData:
    fields = {"tokenizer": str(folder / "tokenizer.json"), "max_length": 9, "val_fraction": 0.0}
    made = TaggedTextData(path, **{**fields, **options})
    made.setup("fit")
    return made


def check_sentence(made: TaggedTextData, index: int = 0) -> None:
    row = made.datasets["train"][SampleKey(0, index)]
    assert row["tokens"].tolist() == [2, 4, 7, 8, 5, 6, 9, 3, 0]
    assert row["targets"].tolist() == [-100, 1, 2, 2, 0, -100, 2, -100, -100]
    assert row["mask"].tolist() == [True] * 8 + [False]
    assert (row["index"], row["valid"]) == (index, True)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_tables(suffix: str, tmp_path: Path) -> None:
    made = ready(write(tmp_path / f"t{suffix}", [SENTENCE] * 3), tmp_path, batch_size=3)
    assert made.class_names == NAMES
    check_sentence(made, 2)
    batch = next(iter(made.train_dataloader()))
    assert {name: tuple(v.shape) for name, v in batch.items()} == {
        **dict.fromkeys(("tokens", "mask", "targets"), (3, 9)), **dict.fromkeys(("index", "valid"), (3,))
    }  # fmt: skip


def test_numbers_and_other_columns(tmp_path: Path) -> None:
    rows = [{"words": SENTENCE["tokens"], "ner": [10, 2, 2, 1, 2]}]
    made = ready(write(tmp_path / "t.jsonl", rows), tmp_path, tokens_column="words", tags_column="ner")
    assert made.class_names == ["1", "2", "10"]
    assert made.datasets["train"][SampleKey(0, 0)]["targets"].tolist() == [-100, 2, 1, 1, 0, -100, 1, -100, -100]


def test_classes_of_a_hub_dataset_have_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tags = datasets.List(datasets.ClassLabel(names=["O", "B-PER", "B-LOC"]))
    features = datasets.Features({"tokens": datasets.List(datasets.Value("string")), "tags": tags})
    rows = datasets.Dataset.from_dict({"tokens": [SENTENCE["tokens"]], "tags": [[1, 0, 0, 2, 0]]}, features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows.to_iterable_dataset())
    made = ready("some/set", tmp_path)
    assert made.class_names == NAMES
    check_sentence(made)


def test_conll_files(tmp_path: Path) -> None:
    lines = [f"{w} NN x {t}" for w, t in zip(SENTENCE["tokens"], SENTENCE["tags"], strict=True)]
    text = "-DOCSTART- -X- O O\n\n" + "\n".join(lines) + "\n\n\nIn\tO\r\n\r\n" + "\n".join(lines)
    (tmp_path / "t.conll").write_text(text)
    made = ready(str(tmp_path / "t.conll"), tmp_path)
    assert len(made.datasets["train"]) == 3  # type: ignore[arg-type]
    assert made.class_names == NAMES
    for index in (0, 2):
        check_sentence(made, index)
    assert made.datasets["train"][SampleKey(0, 1)]["targets"].tolist() == [-100, 2, *[-100] * 7]
    (tmp_path / "u.conll").write_text("Anna B-PER\nlives\n")
    with pytest.raises(TrunklineError, match=r"u\.conll:2 has one column; each line must be a word and its tag"):
        ready(str(tmp_path / "u.conll"), tmp_path)


def test_words_are_encoded_as_is_pretokenized_has_it(tokenizer: Tokenizer) -> None:
    for words in (["anna", "in"], ["Berlin."], ["xyz", "[SEP]", "an", "anna"]):
        ids, first = WordEncoder(tokenizer).encode(words, "here")
        plain = Tokenizer.from_str(tokenizer.to_str())
        plain.encode_special_tokens = True
        want = plain.encode(words, is_pretokenized=True, add_special_tokens=False)
        assert ids.tolist() == want.ids
        assert first.tolist() == [want.word_ids.index(n) for n in range(len(words))]


def test_byte_level_words_begin_with_their_space(tmp_path: Path) -> None:
    text = "a tower in a town in a tower"
    bpe = train_bpe([text] * 9, 270)
    ids, first = WordEncoder(bpe).encode(text.split(), "here")
    assert ids.tolist() == bpe.encode(text).ids
    assert [bpe.decode([ids[n]])[0] for n in first[1:]] == [" "] * 7
    bpe.save(str(tmp_path / "bpe.json"))
    made = ready(write(tmp_path / "t.jsonl", [SENTENCE]), tmp_path, tokenizer=str(tmp_path / "bpe.json"), max_length=40)
    row = made.datasets["train"][SampleKey(0, 0)]
    assert row["targets"][0] == 1  # no [CLS]
    assert row["tokens"][row["mask"]].tolist() == [*bpe.encode(" ".join(SENTENCE["tokens"])).ids, 0]


def test_words_of_which_nothing_is_left(tmp_path: Path, tokenizer: Tokenizer) -> None:
    words = ["\u200b", "anna", "\u0000", "\u200b", "Berlin", "\u200b"]
    ids, first = WordEncoder(tokenizer).encode(words, "here")
    assert ids.tolist() == [1, 4, 1, 1, 8 - 3, 6, 1]
    assert first.tolist() == [0, 1, 2, 3, 4, 6]
    without = Tokenizer(models.WordPiece({"a": 0}, unk_token="a"))
    without.normalizer = normalizers.BertNormalizer()
    with pytest.raises(TrunklineError, match=r"here: the tokenizer makes no token of word 1, '\\u200b'; fix the row"):
        WordEncoder(without).encode(["a", "\u200b"], "here")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tags": ["O"] * 4}, r"t\.jsonl:2 has 5 words, but 4 tags; fix the row"),
        ({"tokens": "Anna"}, r":2: 'tokens' is not a list but str; fix the row or set tokens_column"),
        ({"tokens": []}, r":2: 'tokens' is an empty list"),
        ({"tokens": ["a", 3, "b", "c", "d"]}, r":2: 'tokens' holds a int where"),
        ({"tags": ["O", None, "O", "O", "O"]}, r":2: 'tags' holds a null where .* set tags_column"),
        ({"tags": ["O", "", "O", "O", "O"]}, r":2: 'tags' is empty"),
        (
            {"tokens": ["Berlin"] * 5},
            r":2 has 10 sub-words, but there is room for 7; set max_length to at least 12, or cut",
        ),
    ],
)
def test_broken_rows(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", [SENTENCE, {**SENTENCE, **change}])
    with pytest.raises(TrunklineError, match=message):
        ready(path, tmp_path)


def test_missing_columns_and_unknown_tags(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", [SENTENCE])
    with pytest.raises(TrunklineError, match=r"t\.jsonl:1 has no 'ner'; it has tokens, tags; set tags_column"):
        ready(path, tmp_path, tags_column="ner")
    val = write(tmp_path / "v.jsonl", [{**SENTENCE, "tags": ["B-ORG", "O", "O", "O", "O"]}])
    with pytest.raises(
        TrunklineError, match=r"v\.jsonl:1 \(val split\): no training row has the tag 'B-ORG', but B-LOC"
    ):
        ready(path, tmp_path, val_source=val)
    same = write(tmp_path / "s.jsonl", [{**SENTENCE, "tags": ["O"] * 5}])
    with pytest.raises(TrunklineError, match=r"fewer than two different tags \(\['O'\]\); set tags_column"):
        ready(same, tmp_path)
