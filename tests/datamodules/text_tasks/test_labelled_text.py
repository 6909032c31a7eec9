"""LabelledTextData: rows, truncation, classes and splits; what a broken table says; the offline emoji names."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from pyarrow import Table, parquet
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from trunkline import TrunklineError
from trunkline.datamodules.samplers import SampleKey
from trunkline.datamodules.splits import split_of
from trunkline.datamodules.text.text_sources import open_text
from trunkline.datamodules.text_tasks.labelled_text import LabelledTextData, evenly, truncated
from trunkline.datamodules.tokenizers import train_bpe
from trunkline.pipelines.benchmarks.ngrams import ngram_accuracy

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
WORDS = ["a", "b", "c", "d", "e", "f", "g", "h", "good", "bad"]
PAD, CLS, SEP = 0, 2, 3


@pytest.fixture(autouse=True)
def tokenizer(tmp_path: Path) -> Tokenizer:
    made = Tokenizer(models.WordPiece({w: n for n, w in enumerate(SPECIAL + WORDS)}, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.add_special_tokens(SPECIAL)
    made.save(str(tmp_path / "tokenizer.json"))
    return made


def write(file: Path, rows: list[dict[str, Any]]) -> str:
    if file.suffix == ".jsonl":
        file.write_text("\n".join(map(json.dumps, rows)))
    elif file.suffix == ".csv":
        names = list(rows[0])
        lines = [names, *([str(row.get(name, "")) for name in names] for row in rows)]
        file.write_text("\n".join(map(",".join, lines)))
    else:
        parquet.write_table(Table.from_pylist(rows), file)
    return str(file)


def rows(count: int = 20) -> list[dict[str, Any]]:
    return [{"text": f"{WORDS[n % 8]} b", "label": ("no", "yes")[n % 2]} for n in range(count)]


def data(path: str, folder: Path, **options: Any) -> LabelledTextData:
    return LabelledTextData(path, **{"tokenizer": str(folder / "tokenizer.json"), "max_length": 8, **options})


def ready(path: str, folder: Path, **options: Any) -> LabelledTextData:
    made = data(path, folder, **options)
    made.setup("fit")
    return made


def item(made: LabelledTextData, split: str, index: int) -> dict[str, Any]:
    return made.datasets[split][SampleKey(0, index)]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_rows_of_a_table(suffix: str, tmp_path: Path) -> None:
    made = ready(write(tmp_path / f"t{suffix}", rows()), tmp_path, batch_size=4)
    assert made.class_names == ["no", "yes"]
    assert made.facts.vocab_size == len(SPECIAL + WORDS)
    shares = {"train": 0.9, "val": 0.1}
    numbers = {split: [n for n in range(20) if split_of(n, shares) == split] for split in shares}
    assert {split: len(rows) for split, rows in made.datasets.items()} == {s: len(n) for s, n in numbers.items()}  # type: ignore[arg-type]
    for split, own in numbers.items():
        for index, number in enumerate(own):
            row = item(made, split, index)
            ids = [CLS, len(SPECIAL) + number % 8, len(SPECIAL) + 1, SEP]
            assert row["tokens"].tolist() == ids + [PAD] * 4
            assert row["mask"].tolist() == [True] * 4 + [False] * 4
            assert row["segment"].tolist() == [0] * 8
            assert (row["label"], row["index"], row["valid"]) == (number % 2, index, True)
    batch = next(iter(made.train_dataloader()))
    shapes = {name: tuple(value.shape) for name, value in batch.items()}
    assert shapes == {
        **dict.fromkeys(("tokens", "segment", "mask"), (4, 8)),
        **dict.fromkeys(("label", "index", "valid"), (4,)),
    }
    assert batch["tokens"].dtype == batch["label"].dtype == torch.int64


def test_pairs(tmp_path: Path) -> None:
    table = [{"x": "a b", "y": "c", "label": n % 2} for n in range(20)]
    table[0]["y"] = "c d e f g h a b"
    made = ready(write(tmp_path / "t.jsonl", table), tmp_path, text_column="x", pair_column="y", max_length=9)
    a, b, c, d, e, f, *_ = range(4, 14)
    row = item(made, "train", 1)
    assert row["tokens"].tolist() == [CLS, a, b, SEP, c, SEP, PAD, PAD, PAD]
    assert row["segment"].tolist() == [0, 0, 0, 0, 1, 1, 0, 0, 0]
    row = item(made, "train", 0)
    assert row["tokens"].tolist() == [CLS, a, b, SEP, c, d, e, f, SEP]
    assert row["mask"].all()


def test_longest_first_one_by_one() -> None:
    for n in range(12):
        for m in range(12):
            for room in (2, 5, 8):
                x, y = n, m
                while x + y > room:
                    x, y = (x - 1, y) if x > y else (x, y - 1)
                first, second = truncated(np.arange(n), np.arange(m), room)
                assert second is not None
                assert (len(first), len(second)) == (x, y), (n, m, room)
    assert truncated(np.arange(7), None, 5)[0].tolist() == [0, 1, 2, 3, 4]


def test_a_gpts_tokenizer(tmp_path: Path) -> None:
    bpe = train_bpe(["a b c d"], 257)
    bpe.save(str(tmp_path / "bpe.json"))
    made = ready(write(tmp_path / "t.jsonl", rows()), tmp_path, tokenizer=str(tmp_path / "bpe.json"), vocab_size=300)
    end = bpe.token_to_id("<|endoftext|>")
    row, ids = item(made, "train", 0), bpe.encode("a b").ids
    assert row["tokens"].tolist() == [*ids, end, *[end] * (7 - len(ids))]
    assert row["mask"].sum() == len(ids) + 1
    assert made.facts.vocab_size == 300


def test_a_special_tokens_name_is_text(tmp_path: Path) -> None:
    table = [{**row, "text": "a [SEP]"} for row in rows()]
    made = ready(write(tmp_path / "t.jsonl", table), tmp_path, max_length=12)
    assert (item(made, "train", 0)["tokens"] == SEP).sum() == 1


@pytest.mark.parametrize(("values", "names"), [([10, 9, 2], ["2", "9", "10"]), (["b", "a", "10"], ["10", "a", "b"])])
def test_class_names_are_sorted(values: list[Any], names: list[str], tmp_path: Path) -> None:
    table = [{"text": "a", "label": values[n % 3]} for n in range(30)]
    made = ready(write(tmp_path / "t.jsonl", table), tmp_path, val_fraction=0.0)
    assert made.class_names == names
    assert [item(made, "train", n)["label"] for n in range(3)] == [names.index(str(v)) for v in values]


def test_files_of_their_own(tmp_path: Path) -> None:
    train, val = write(tmp_path / "a.jsonl", rows(7)), write(tmp_path / "b.csv", rows(5))
    made = ready(train, tmp_path, val_source=val, test_source=train)
    assert {split: len(own) for split, own in made.datasets.items()} == {"train": 7, "val": 5, "test": 7}  # type: ignore[arg-type]


def test_few_rows_are_drawn_evenly(tmp_path: Path) -> None:
    classes = np.array([0] * 50 + [1] * 30 + [2] * 3)
    for count in (3, 9, 20, 83):
        chosen = evenly(classes, count, seed=1)
        share = Counter(classes[chosen].tolist())
        assert len(set(chosen.tolist())) == len(chosen) == count
        assert share[2] == min(3, count // 3)
        assert abs(share[0] - share[1]) <= 1 or share[1] == 30
    assert evenly(classes, 9, seed=1).tolist() == evenly(classes, 9, seed=1).tolist()
    assert evenly(classes, 9, seed=1).tolist() != evenly(classes, 9, seed=2).tolist()
    path = write(tmp_path / "t.jsonl", rows(40))
    made = ready(path, tmp_path, train_rows=6)
    assert Counter(item(made, "train", n)["label"] for n in range(6)) == {0: 3, 1: 3}
    assert len(made.datasets["val"]) == len(ready(path, tmp_path).datasets["val"])  # type: ignore[arg-type]
    for wrong in (0, 1000):
        with pytest.raises(TrunklineError, match=rf"train_rows={wrong} must be 1 to \d+, all there are"):
            ready(path, tmp_path, train_rows=wrong)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (
            {"label": None},
            {},
            r"t\.jsonl:3: 'label' is not a name or a whole number but null; fix the row or set .*label_column",
        ),
        ({"label": 0.5}, {}, r":3: 'label' is not a name or a whole number but float"),
        ({"label": ""}, {}, r":3: 'label' is empty"),
        ({"text": 7}, {}, r":3: 'text' is not a text but int; fix the row or set text_column"),
        ({}, {"text_column": "body"}, r"t\.jsonl:1 has no 'body'; it has text, label; set text_column"),
        ({}, {"pair_column": "second"}, r"t\.jsonl:1 has no 'second'; it has text, label; set pair_column"),
        ({}, {"label_column": "y"}, r"t\.jsonl:1 has no 'y'; it has text, label; set label_column"),
        ({}, {"label_column": "c"}, r"t\.jsonl:1 has no 'c'"),
        ({}, {"val_fraction": 1.0}, r"val_fraction=1.0 leaves nothing for training"),
        ({}, {"val_fraction": 0.001}, r"the val split .* is empty; give more rows, or .*val_source"),
        ({}, {"max_length": 4}, r"max_length=4 leaves no room"),
        ({}, {"vocab_size": 5}, r"vocab_size=5 is smaller than the 14 tokens"),
        (
            {},
            {"tokenizer": "wordpiece"},
            r"tokenizer=wordpiece: labelled data trains none; give the checkpoint",
        ),
    ],
)
def test_broken_rows_and_flags(change: Any, options: Any, message: str, tmp_path: Path) -> None:
    table = rows()
    table[2] |= change
    path = write(tmp_path / "t.jsonl", table)
    with pytest.raises(TrunklineError, match=message):
        assert ready(path, tmp_path, **options).facts.vocab_size


def test_labels_that_training_does_not_have(tmp_path: Path) -> None:
    train, val = (
        write(tmp_path / "a.jsonl", rows()),
        write(tmp_path / "b.jsonl", [*rows(3), {"text": "a", "label": "maybe"}]),
    )
    with pytest.raises(
        TrunklineError, match=r"b\.jsonl:4 \(val split\): no training row has the label 'maybe', but no, yes;"
    ):
        ready(train, tmp_path, val_source=val)
    one = write(tmp_path / "c.jsonl", [{"text": "a", "label": "x"}] * 20)
    with pytest.raises(TrunklineError, match=r"training rows have one class only, x; set label_column"):
        ready(one, tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "a"\n', r"a\.jsonl:1 is not JSON"),
        ("a.jsonl", "[1]\n", r"a\.jsonl:1 is not a JSON object but list"),
        ("a.jsonl", b"\n\xff\n", r"a\.jsonl, byte 1: not UTF-8"),
        ("a.csv", b"text,label\n\xff,1\n", r"a\.csv, byte 11: not UTF-8"),
        ("a.parquet", "no", r"a\.parquet is not a Parquet file"),
        ("a.xlsx", "", r"source needs \.jsonl, .* files, but .*a\.xlsx is none"),
    ],
)
def test_broken_files(name: str, content: str | bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(TrunklineError, match=message):
        ready(str(tmp_path / name), tmp_path)


def test_hub_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load(name: str, config: str | None, **options: Any) -> Any:
        asked.append((name, config, options["split"], options["revision"], options["streaming"]))
        if name == "nobody/none":
            raise FileNotFoundError("no such dataset")
        label = datasets.ClassLabel(names=["zero", "one"])
        features = datasets.Features({"text": datasets.Value("string"), "label": label})
        table = {"text": ["a b"] * 4, "label": [0, 1, 0, 1 if options["split"] == "train" else -1]}
        return datasets.Dataset.from_dict(table, features).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load)
    hub: dict[str, Any] = {"hub_config": "sst2", "revision": "abc"}
    made = ready("some/set", tmp_path, test_source="some/set", val_fraction=0.0, **hub)
    assert made.class_names == ["one", "zero"]
    assert [item(made, "train", n)["label"] for n in range(4)] == [1, 0, 1, 0]
    assert asked == [("some/set", "sst2", "train", "abc", True)] * 2
    message = r"some/set \(validation\), row 3 \(val split\): no training row has the label '-1', but one, zero;"
    with pytest.raises(TrunklineError, match=message):
        ready("some/set", tmp_path, val_source="some/set:validation", **hub)
    with pytest.raises(TrunklineError, match=r"cannot read source=nobody/none: .*FileNotFoundError: no such dataset"):
        ready("nobody/none", tmp_path)


def test_missing_files(tmp_path: Path) -> None:
    for name in (str(tmp_path / "none"), "none.jsonl"):
        with pytest.raises(TrunklineError, match=rf"source={name}: there is no such file or folder; fix the path"):
            ready(name, tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(TrunklineError, match=r"but the folder .*empty is empty"):
        ready(str(tmp_path / "empty"), tmp_path)


def test_checkpoints_remember_tokenizer_and_classes(tmp_path: Path, tokenizer: Tokenizer) -> None:
    made = ready(write(tmp_path / "t.jsonl", rows()), tmp_path)
    state = made.state_dict()
    settings = {"max_length": 8, "text_column": "text", "pair_column": None}
    about = {"source": str(tmp_path / "t.jsonl"), "rows": {"train": 19, "val": 1}}
    assert state == {"tokenizer": tokenizer.to_str(), "class_names": ["no", "yes"], "settings": settings} | about
    made.load_state_dict(state)
    with pytest.raises(TrunklineError, match=r"another tokenizer than tokenizer=.*give that checkpoint"):
        made.load_state_dict({**state, "tokenizer": "{}"})
    with pytest.raises(TrunklineError, match="knows the classes a, b, but the data has no, yes"):
        made.load_state_dict({**state, "class_names": ["a", "b"]})
    torch.save({"epoch": 3, "state_dict": {}, "LabelledTextData": state}, tmp_path / "run.ckpt")
    again = data(str(tmp_path / "t.jsonl"), tmp_path, tokenizer=str(tmp_path / "run.ckpt"))
    assert again.vocabulary.to_str() == tokenizer.to_str()
    torch.save({"epoch": 3, "ImageData": {"mean": 1}}, tmp_path / "image.ckpt")
    with pytest.raises(TrunklineError, match=r"tokenizer=.*image\.ckpt: this checkpoint has no tokenizer"):
        assert data("t", tmp_path, tokenizer=str(tmp_path / "image.ckpt")).vocabulary
    with pytest.raises(TrunklineError, match=r"none\.ckpt: there is no file .*none\.ckpt; fix the path"):
        assert data("t", tmp_path, tokenizer=str(tmp_path / "none.ckpt")).vocabulary
    (tmp_path / "broken.ckpt").write_bytes(b"no")
    with pytest.raises(TrunklineError, match=r"broken\.ckpt is not a checkpoint"):
        assert data("t", tmp_path, tokenizer=str(tmp_path / "broken.ckpt")).vocabulary


# --- the offline names


def test_emoji_names_are_held_out_by_concept_as_in_pre_training(tmp_path: Path) -> None:
    shares = {"train": 0.8, "val": 0.1, "test": 0.1}
    made = data("emoji", tmp_path, val_fraction=0.1, test_fraction=0.1)
    labelled = {split: [str(row.cells["text"]) for row in own] for split, own in made.splits.items()}
    unlabelled: dict[str, list[str]] = {split: [] for split in shares}
    for piece in open_text("emoji", "text").pieces(shares):
        unlabelled[piece.split].append(piece.text)
        assert piece.ends
    assert labelled == unlabelled
    concepts = {split: {row.number for row in own} for split, own in made.splits.items()}
    assert not concepts["train"] & concepts["val"] | concepts["train"] & concepts["test"]
    assert sum(map(len, concepts.values())) == 1927
    # One share held out is the end of the same order: what one run trained on, the other does not test.
    whole = data("emoji", tmp_path, val_fraction=0.2).splits
    assert {row.number for row in whole["val"]} == concepts["val"] | concepts["test"]


def test_emoji_names(tmp_path: Path) -> None:
    made = data("emoji", tmp_path, train_rows=140)
    table = made.read()
    assert made.class_names == ["ar", "de", "en", "es", "fa", "fr", "id", "it", "ja", "ko", "pt", "ru", "tr", "zh"]
    assert np.bincount(table["train"][1]).tolist() == [10] * 14
    assert np.bincount(table["val"][1]).tolist() == [192] * 14
    texts = {(row.number, row.cells["label"]): row.cells["text"] for own in made.splits.values() for row in own}
    assert len(texts) == 1927 * 14
    assert [texts[0, name] for name in ("en", "de", "ja")] == ["1st place medal", "goldmedaille", "金メダル"]
    assert not [text for text in texts.values() if not text.strip() or "_" in text or ":" in text[:1]]
    assert not [text for (_, name), text in texts.items() if name == "en" and "skin tone" in text and "light" in text]


def test_the_baseline_learns_the_same_rows(tmp_path: Path) -> None:
    table = [{"text": ("a b", "c d")[n % 2], "label": n % 2} for n in range(40)]
    path = write(tmp_path / "t.jsonl", table)
    assert ngram_accuracy(data(path, tmp_path, train_rows=4)) == 1.0
    wrong = write(tmp_path / "w.jsonl", [{"text": "a b", "label": 0}, {"text": "a b", "label": 1}])
    assert ngram_accuracy(data(path, tmp_path, val_source=wrong)) == 0.5
    assert ngram_accuracy(data(path, tmp_path, val_source=path, test_source=wrong)) == 0.5
