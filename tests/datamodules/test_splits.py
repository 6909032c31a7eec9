"""Splits by name and by share: what each source takes, and which rows they get."""

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from trunkline import TrunklineError
from trunkline.datamodules import ImageData, ImageTextData, LabelledTextData, TextData
from trunkline.datamodules.splits import (
    RowsOfSplit,
    check_fractions,
    rows_by_class,
    rows_by_number,
    shares_of,
    split_of,
)


@pytest.mark.parametrize("fractions", [{"val": 0.1, "test": 0.0}, {"val": 0.25, "test": 0.3}, {"val": 0.01}])
def test_all_rows_at_once_go_where_each_would(fractions: dict[str, float]) -> None:
    shares = shares_of(fractions)
    assert list(shares) == ["train", *(split for split, share in fractions.items() if share)]
    found = rows_by_number(500, shares)
    assert {split: numbers.tolist() for split, numbers in found.items()} == {
        split: [n for n in range(500) if split_of(n, shares) == split] for split in shares
    }


@pytest.mark.parametrize("length", [0, 1, 1024, 5000])
def test_rows_of_a_split_are_found_without_keeping_them(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    shares = shares_of({"val": 0.1, "test": 0.3})
    for block in (3, 1024):
        monkeypatch.setattr(RowsOfSplit, "BLOCK", block)
        for split, expected in rows_by_number(length, shares).items():
            rows = RowsOfSplit(length, shares, split)
            assert len(rows) == len(expected)
            assert [rows[n] for n in range(0, len(rows), 7)] == expected[::7].tolist()
            assert np.concatenate([np.zeros(0, np.int64), *rows.parts()]).tolist() == expected.tolist()
            asked = np.random.default_rng(0).permutation(length)
            places = np.full(length, -1)
            places[expected] = np.arange(len(expected))
            assert rows.places(asked).tolist() == places[asked].tolist()
            for wrong in (-1, len(rows)):
                with pytest.raises(IndexError):
                    rows[wrong]


def test_large_row_numbers_are_in_the_same_split() -> None:
    shares = shares_of({"val": 0.1})
    rows = RowsOfSplit(0, shares, "val")
    rows.length = 1 << 40
    for block in (400_000_000 // 1024, (1 << 40) // 1024 - 1):
        numbers = block * 1024 + np.arange(1024)
        assert rows._members(np.array([block]))[0].tolist() == [split_of(int(n), shares) == "val" for n in numbers]


def test_classes_keep_their_proportion() -> None:
    labels = np.array([0] * 80 + [1] * 20)
    found = rows_by_class(labels, {"test": 0.2, "val": 0.1}, seed=0)
    assert {split: np.bincount(labels[rows]).tolist() for split, rows in found.items()} == {
        "train": [56, 14],
        "test": [16, 4],
        "val": [8, 2],
    }
    assert sorted(np.concatenate([*found.values()])) == list(range(100))
    assert rows_by_class(labels, {"test": 0.2, "val": 0.3}, seed=0)["test"].tolist() == found["test"].tolist()


@pytest.mark.parametrize("fractions", [{"val": 1.0}, {"val": 0.5, "test": 0.5}, {"val": -0.1}])
def test_shares_that_leave_nothing_name_their_field(fractions: dict[str, float]) -> None:
    with pytest.raises(TrunklineError, match="leaves nothing for training") as caught:
        check_fractions(fractions)
    assert caught.value.field == "data.val_fraction"


@pytest.mark.parametrize("cls", [ImageData, ImageTextData, TextData])
@pytest.mark.parametrize(
    ("fractions", "field"),
    [
        ({"val_fraction": 1.5}, "data.val_fraction"),
        ({"test_fraction": -0.1}, "data.test_fraction"),
        ({"val_fraction": 0.5, "test_fraction": 0.5}, "data.val_fraction"),
    ],
)
def test_shares_are_checked_before_anything_is_read(cls: Any, fractions: dict[str, float], field: str) -> None:
    with pytest.raises(TrunklineError, match="leaves nothing for training") as caught:
        cls(**fractions)
    assert caught.value.field == field


def test_a_usual_share_that_may_not_be_needed_is_checked_with_the_source() -> None:
    data = ImageData(val_fraction=0.85)  # and 0.2 for testing, if the source has no test split
    with pytest.raises(TrunklineError, match="leaves nothing for training"):
        data.setup("fit")


def test_what_is_not_given_is_the_usual_share_of_the_data() -> None:
    assert ImageData().fractions == {"test": 0.2, "val": 0.1}
    assert ImageTextData().fractions == TextData().fractions == {"val": 0.1, "test": 0.0}
    assert ImageData(test_fraction=0.0).fractions == {"test": 0.0, "val": 0.1}
    assert TextData(val_source="other.txt", test_fraction=0.3).fractions == {"val": 0.0, "test": 0.3}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What a hub is asked for; it has eight rows in each split."""
    found: list[Any] = []

    def load(*args: Any, **options: Any) -> list[dict[str, Any]]:
        found.append((*args, options["split"], options["revision"]))
        return [{"text": f"{options['split']} {n}", "label": n % 2} for n in range(8)]

    monkeypatch.setattr(datasets, "load_dataset", load)
    return found


def test_splits_of_a_hub_dataset_by_name(asked: list[Any], tmp_path: Path) -> None:
    hub = {"hub_config": "en", "revision": "abc", "train_split": "training", "val_split": "dev"}
    data = LabelledTextData("owner/name", tokenizer="none.json", **hub, test_source="owner/other:all")
    assert {split: [row.cells["text"] for row in rows][:1] for split, rows in data.splits.items()} == {
        "train": ["training 0"],
        "val": ["dev 0"],
        "test": ["all 0"],
    }
    assert [len(rows) for rows in data.splits.values()] == [8, 8, 8]  # nothing is set aside
    assert asked == [
        ("owner/name", "en", "training", "abc"),
        ("owner/name", "en", "dev", "abc"),
        ("owner/other", "en", "all", "abc"),
    ]


def test_a_split_in_the_name_is_of_the_training_rows(asked: list[Any]) -> None:
    data = LabelledTextData("owner/name:training", tokenizer="none.json", val_split="dev", test_split="test")
    assert {split: rows[0].cells["text"] for split, rows in data.splits.items()} == {
        "train": "training 0",
        "val": "dev 0",
        "test": "test 0",
    }
    assert [(name, split) for name, _, split, _ in asked] == [
        ("owner/name", split) for split in ("training", "dev", "test")
    ]


def test_separate_sources_name_their_own_splits(asked: list[Any]) -> None:
    data = LabelledTextData(
        "owner/name:a", tokenizer="none.json", train_split="a", val_source="owner/name:b", val_split="b",
        test_source="owner/other", test_split="c",
    )  # fmt: skip
    assert [len(rows) for rows in data.splits.values()] == [8, 8, 8]
    assert [(name, split) for name, _, split, _ in asked] == [
        ("owner/name", "a"),
        ("owner/name", "b"),
        ("owner/other", "c"),
    ]


def test_without_val_split_rows_of_the_split_in_the_name_are_set_aside(asked: list[Any]) -> None:
    data = LabelledTextData("owner/name:training", tokenizer="none.json", val_fraction=0.5)
    texts = {split: {row.cells["text"] for row in rows} for split, rows in data.splits.items()}
    assert texts["train"] | texts["val"] == {f"training {n}" for n in range(8)}
    assert not texts["train"] & texts["val"]
    assert len(asked) == 1


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_two_splits_for_the_same_rows_are_refused(split: str, asked: list[Any]) -> None:
    field = "source" if split == "train" else f"{split}_source"
    options: dict[str, Any] = {"source": "owner/name", field: "owner/name:dev", f"{split}_split": "other"}
    message = f"{split}_split=other, but {field}=owner/name:dev names the split dev; leave out one"
    for cls, tokenizer in ((LabelledTextData, "none.json"), (TextData, "chars")):
        with pytest.raises(TrunklineError, match=message) as caught:
            cls(tokenizer=tokenizer, **options)
        assert caught.value.field == f"data.{split}_split"
    assert asked == []


def test_a_colon_in_a_path_is_no_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("in:dev").mkdir()
    Path("in:dev/rows.jsonl").write_text('{"text": "a", "label": 1}\n' * 20)
    assert [len(rows) for rows in LabelledTextData("in:dev", tokenizer="t.json").splits.values()] == [19, 1]
    for field in ("train_split", "val_split"):
        data = LabelledTextData("in:dev", tokenizer="t.json", **{field: "other"})
        with pytest.raises(TrunklineError, match=f"{field}=other .* but source=in:dev is not one"):
            _ = data.splits


def test_texts_of_a_hub_s_splits(asked: list[Any], tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"tokenizer": "chars", "max_length": 8, "batch_size": 1}
    data = TextData("owner/name", val_split="tan", cache_dir=str(tmp_path), **sizes)  # letters that `train` has too
    data.setup("fit")
    texts = {split: data.vocabulary.decode(data.preparation.stream(split).read(0, 5)) for split in ("train", "val")}
    assert texts == {"train": "train", "val": "tan 0"}
    assert {(name, split) for name, _, split, _ in asked} == {("owner/name", "train"), ("owner/name", "tan")}


@pytest.mark.parametrize("source", ["kjv", "in.jsonl"])
@pytest.mark.parametrize("field", ["train_split", "val_split"])
def test_local_texts_have_no_splits_by_name(
    field: str, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("in.jsonl").write_text('{"text": "a", "label": 1}')
    with pytest.raises(
        TrunklineError, match=f"{field}=dev names a split of a hub dataset, but source={source} is not one"
    ) as caught:
        _ = TextData(source, **{field: "dev"}).preparation
    assert caught.value.field == f"data.{field}"
    if source != "kjv":
        with pytest.raises(TrunklineError, match=f"{field}=dev names a split of a hub dataset"):
            _ = LabelledTextData(source, tokenizer="t.json", **{field: "dev"}).splits


def test_images_ask_a_hub_for_configuration_and_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load(*args: Any, **options: Any) -> None:
        asked.append((args, options))
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", load)
    for cls in (ImageData, ImageTextData):
        data: Any = cls("owner/name", hub_config="small", revision="abc", cache_dir="cache")
        with pytest.raises(TrunklineError, match="cannot read source=owner/name") as caught:
            data.prepare_data()
        assert caught.value.field == "data.source"
    assert asked == [(("owner/name", "small"), {"revision": "abc", "cache_dir": "cache"})] * 2
