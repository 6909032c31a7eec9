"""Where pairs come from: lists, tables, shards, their splits, captions of all kinds, and what a broken source says."""

import gzip
import hashlib
import io
import json
import pickle
import tarfile
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from trunkline import TrunklineError
from trunkline.datamodules.pairs.pair_sources import PairRows, PairSubset, expanded, load_pairs
from trunkline.datamodules.splits import RowsOfSplit, split_of

NO_SPLITS: dict[str, str | None] = {"train": None, "val": None, "test": None}


def picture(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (4, 4), value).save(buffer, "png")
    return buffer.getvalue()


def load(source: str | Path, root: Path, image: str = "image", caption: str = "caption", **options: Any) -> Any:
    splits = {**NO_SPLITS, **{name: options.pop(name) for name in NO_SPLITS if name in options}}
    caches = {"cache": root / "cache", "cache_dir": str(root / "datasets")}
    return load_pairs(str(source), image, caption, splits, **caches, **options)


def contents(rows: PairRows) -> list[tuple[int, list[str]]]:
    return [(rows.image(n).getpixel((0, 0)), rows.captions(n)) for n in range(len(rows))]  # type: ignore[misc]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Pictures 0.png to 9.png of grey 0 to 9 in the folder `images`."""
    (tmp_path / "images").mkdir()
    for n in range(10):
        (tmp_path / "images" / f"{n}.png").write_bytes(picture(n))
    return tmp_path


def write_list(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".csv":
        names = list(rows[0])
        lines = [",".join(names), *(",".join(f'"{row[name]}"' for name in names) for row in rows)]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


# --- lists


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.csv", "pairs.jsonl.gz"])
def test_lists_of_image_files(name: str, folder: Path) -> None:
    rows = [{"image": f"images/{n}.png", "caption": f"nümber {n}", "more": "x"} for n in (3, 1, 2)]
    loaded = load(write_list(folder / name, rows), folder)
    assert list(loaded) == ["train"]
    assert contents(loaded["train"]) == [(3, ["nümber 3"]), (1, ["nümber 1"]), (2, ["nümber 2"])]
    assert loaded["train"].name(0) == f"{folder / name}:{2 if name.endswith('csv') else 1}"
    assert contents(pickle.loads(pickle.dumps(loaded["train"]))) == contents(loaded["train"])


def test_rows_of_the_same_image_become_one(folder: Path) -> None:
    # else the same image would stand in training and test
    rows = [{"image": f"{n}.png", "caption": f"{word} {n}"} for word in ("one", "two") for n in (5, 4)]
    rows[2]["caption"] = ["two 5", "three 5"]  # type: ignore[assignment]
    source = write_list(folder / "lists" / "pairs.jsonl", rows)
    loaded = load(source, folder, image_folder=str(folder / "images"))["train"]
    assert contents(loaded) == [(5, ["one 5", "two 5", "three 5"]), (4, ["one 4", "two 4"])]


def test_lists_with_other_columns_and_splits(folder: Path) -> None:
    for name, numbers in (("captions_train2017", (0, 1)), ("captions_val2017", (2,)), ("more", (3,))):
        rows = [{"file": f"{n}.png", "text": f"a {n}"} for n in numbers]
        write_list(folder / "in" / f"{name}.jsonl", rows)
    options: dict[str, Any] = {"image": "file", "caption": "text", "image_folder": str(folder / "images")}
    loaded = load(folder / "in", folder, **options)
    assert {split: contents(rows) for split, rows in loaded.items()} == {
        "train": [(0, ["a 0"]), (1, ["a 1"]), (3, ["a 3"])],
        "val": [(2, ["a 2"])],
    }
    loaded = load(folder / "in", folder, **options, val="more")
    assert contents(loaded["val"]) == [(3, ["a 3"])]
    with pytest.raises(TrunklineError, match=r"has no split 'minival'; it has .*; set val_split"):
        load(folder / "in", folder, **options, val="minival")
    # a split alone is all there is
    assert len(load(folder / "in" / "captions_val2017.jsonl", folder, **options)["train"]) == 1


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"picture": "1.png", "caption": "a"},
            "pairs.jsonl:2 has no 'image'; it has picture, caption; set image",
        ),
        ({"image": "1.png", "text": "a"}, "pairs.jsonl:2 has no 'caption'; it has image, text; set caption"),
        ({"image": 3, "caption": "a"}, "pairs.jsonl:2: 'image' is not a path but int; fix"),
        ({"image": "", "caption": "a"}, "pairs.jsonl:2: 'image' is not a path but empty; fix"),
        ({"image": "1.png", "caption": 3}, "pairs.jsonl:2: 'caption' is not a text or a list of texts but"),
        ({"image": "1.png", "caption": ["a", 3]}, "pairs.jsonl:2: 'caption' is not a text or a list of texts but"),
    ],
)
def test_broken_lists_stop_at_once(row: dict[str, Any], message: str, folder: Path) -> None:
    good = {"image": "images/0.png", "caption": "zero"}
    with pytest.raises(TrunklineError) as caught:
        load(write_list(folder / "pairs.jsonl", [good, row]), folder)
    assert message in str(caught.value)


@pytest.mark.parametrize("caption", ["", "  ", None, [], ["fine", ""]])
def test_an_empty_caption_is_found_when_its_row_is_read(caption: Any, folder: Path) -> None:
    rows = [{"image": "images/0.png", "caption": "zero"}, {"image": "images/1.png", "caption": caption}]
    loaded = load(write_list(folder / "pairs.jsonl", rows), folder)["train"]
    assert loaded.captions(0) == ["zero"]
    with pytest.raises(TrunklineError, match=r"pairs\.jsonl:2: 'caption' has an empty caption; .*skip_corrupt=true$"):
        loaded.captions(1)


def test_a_missing_image_is_found_when_its_row_is_read(folder: Path) -> None:
    loaded = load(write_list(folder / "pairs.jsonl", [{"image": "gone.png", "caption": "a"}]), folder)["train"]
    with pytest.raises(
        TrunklineError, match=r"cannot read the image .*pairs\.jsonl:1 \(.*/gone\.png\): .*No such file"
    ):
        loaded.image(0)
    (folder / "empty.jsonl").touch()
    with pytest.raises(TrunklineError, match=r"empty\.jsonl has no row"):
        load(folder / "empty.jsonl", folder)


# --- tables


def table(captions: list[Any], images: list[Any] | None = None) -> Any:
    data = {
        "image": images or [picture(n) for n in range(len(captions))],
        "caption": captions,
        "id": [0] * len(captions),
    }
    return datasets.Dataset.from_dict(data)


@pytest.mark.parametrize("captions", [["a", "b", "c"], [["a", "x"], ["b"], ["c", "y", "z"]]])
@pytest.mark.parametrize("kind", ["parquet", "saved"])
def test_tables_hold_images_and_captions(kind: str, captions: list[Any], tmp_path: Path) -> None:
    made = table(captions).cast_column("image", datasets.Image())
    source = tmp_path / ("rows.parquet" if kind == "parquet" else "saved")
    made.to_parquet(source) if kind == "parquet" else made.save_to_disk(source)
    rows = load(source, tmp_path)["train"]
    assert contents(rows) == [(n, [c] if isinstance(c, str) else c) for n, c in enumerate(captions)]
    assert rows.name(1) == f"{source} (train), row 1"
    assert rows.key == load(source, tmp_path)["train"].key


def test_tables_may_hold_paths_and_have_splits(folder: Path) -> None:
    made = table(["one", "two"], ["images/1.png", "images/2.png"])
    for split in ("train", "test"):
        made.to_parquet(folder / f"{split}.parquet")
    loaded = load(folder, folder)
    assert list(loaded) == ["train", "test"]
    assert contents(loaded["test"]) == [(1, ["one"]), (2, ["two"])]
    loaded = load(folder / "train.parquet", folder, image_folder=str(folder / "images" / ".."))
    assert contents(loaded["train"]) == [(1, ["one"]), (2, ["two"])]


def test_broken_tables(tmp_path: Path) -> None:
    table(["a", "", None, "d"], [picture(0), picture(1)[:45], None, b"x"]).to_parquet(tmp_path / "rows.parquet")
    rows = load(tmp_path / "rows.parquet", tmp_path)["train"]
    for row, reason in ((1, ".*(truncated|Truncated)"), (2, "the cell is empty"), (3, "its format is unknown")):
        with pytest.raises(
            TrunklineError, match=rf"cannot read the image .*rows\.parquet \(train\), row {row}: {reason}"
        ):
            rows.image(row)
    with pytest.raises(TrunklineError, match=r"row 1: 'caption' has an empty caption"):
        rows.captions(1)
    with pytest.raises(TrunklineError, match=r"row 2: 'caption' is not a text or a list of texts but null"):
        rows.captions(2)
    for flag, column in (("image", "img"), ("caption", "text")):
        with pytest.raises(TrunklineError, match=f"has no column '{column}'; .*set {flag}_column"):
            load(tmp_path / "rows.parquet", tmp_path, **{flag: column})
    with pytest.raises(TrunklineError, match="column 'id' does not hold images but"):
        load(tmp_path / "rows.parquet", tmp_path, image="id")


# --- shards and patterns


def write_shard(path: Path, *numbers: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for n in numbers:
            for name, content in ((f"{n}.png", picture(n)), (f"{n}.txt", f"a {n}".encode())):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))


def test_shards_of_a_file_a_folder_and_patterns(tmp_path: Path) -> None:
    for n in range(3):
        write_shard(tmp_path / "in" / f"cc-train-{n:04}.tar", 2 * n, 2 * n + 1)
    write_shard(tmp_path / "in" / "sub" / "cc-validation-0000.tar", 9)
    table(["beside the shards"]).to_parquet(tmp_path / "in" / "meta.parquet")
    everything = [(n, [f"a {n}"]) for n in range(6)]
    loaded = load(tmp_path / "in", tmp_path)
    assert {split: contents(rows) for split, rows in loaded.items()} == {"train": everything, "val": [(9, ["a 9"])]}
    for pattern, rows in (
        ("cc-train-{0000..0002}.tar", everything),
        ("cc-train-*.tar", everything),
        ("cc-{train,test}-000{0,1}.tar", None),
        ("cc-train-000[12].tar", everything[2:]),
        ("sub/cc-validation-0000.tar", [(9, ["a 9"])]),
    ):
        if rows is None:
            with pytest.raises(TrunklineError, match=r"there is no file .*cc-test-0000\.tar; fix the path or pattern"):
                load(tmp_path / "in" / pattern, tmp_path)
        else:
            assert contents(load(tmp_path / "in" / pattern, tmp_path)["train"]) == rows


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a.tar", ["a.tar"]),
        ("a{0..2}", ["a0", "a1", "a2"]),
        ("{08..11}.tar", ["08.tar", "09.tar", "10.tar", "11.tar"]),
        ("{a,b}{1..2}", ["a1", "a2", "b1", "b2"]),
        ("a{b}", ["ab"]),
    ],
)
def test_patterns_expand_as_in_a_shell(pattern: str, names: list[str]) -> None:
    assert expanded(pattern) == names


def test_sources_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("datasets.config", "huggingface_hub.constants"):  # what HF_HUB_OFFLINE=1 sets at their import
        monkeypatch.setattr(f"{module}.HF_HUB_OFFLINE", True)
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "1.png").write_bytes(picture(0))
    (tmp_path / "rows.jsonl").write_text('{"image": "1.png", "caption": "a"}\n')
    for source, message in (
        ("pipe:cat x.tar", "must be local files or on a mounted file system"),
        ("s3://bucket/x.tar", "must be local files or on a mounted file system"),
        (tmp_path / "x.jsonl", "there is no file .*x.jsonl; fix the path"),
        (tmp_path / "*.tar", "there is no file .*; fix the path or pattern"),
        (tmp_path / "a", "is a folder without captions; it needs .tar, .jsonl, .csv or .parquet files"),
    ):
        with pytest.raises(TrunklineError, match=message):
            load(source, tmp_path)
    with pytest.raises(TrunklineError, match=r"image_folder=nowhere: there is no such folder"):
        load(tmp_path / "rows.jsonl", tmp_path, image_folder="nowhere")
    with pytest.raises(TrunklineError, match=r"cannot read source=.*give `twemoji`, a local path"):
        load("nobody/nothing-of-this-name", tmp_path)


# --- subsets


def test_a_subset_keeps_the_order_of_the_whole(tmp_path: Path) -> None:
    for n in range(4):
        write_shard(tmp_path / f"{n}.tar", *range(10 * n, 10 * n + 10))
    whole = load(tmp_path, tmp_path, shard_window=1)["train"]
    shares = {"train": 0.4, "val": 0.6}
    chosen = np.array([n for n in range(40) if split_of(n, shares) == "val"])
    part = PairSubset(whole, RowsOfSplit(40, shares, "val"))
    assert contents(part) == [(n, [f"a {n}"]) for n in chosen]
    assert part.name(3) == whole.name(chosen[3])
    expected = [n for n in np.concatenate([*whole.order(np.random.default_rng(1))]) if n in chosen]
    assert chosen[np.concatenate([*part.order(np.random.default_rng(1))])].tolist() == expected
    # the key of every version, so that the tokenizers that were learnt from it are still found
    assert part.key == [whole.key, hashlib.blake2b(chosen.tobytes(), digest_size=12).hexdigest()]
    assert part.key != PairSubset(whole, RowsOfSplit(40, shares, "train")).key
