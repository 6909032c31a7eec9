"""Where rows of images come from, and what a broken source says."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from trunkline import TrunklineError
from trunkline.datamodules import folders
from trunkline.datamodules.images.image_sources import (
    ImageTable,
    image_files,
    load_image_table,
)


def encoded(value: int | Image.Image = 0, kind: str = "png", **options: Any) -> bytes:
    """A picture as the content of a file."""
    buffer = io.BytesIO()
    picture = value if isinstance(value, Image.Image) else Image.new("L", (6, 4), value)
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def write_files(root: Path, files: dict[str, int]) -> str:
    """Grey pictures of one value each."""
    for name, value in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(encoded(value, "jpeg" if name.lower().endswith("jpg") else "png"))
    return str(root)


def table(labels: list[Any], kind: Any = None, first: int = 0, names: tuple[str, str] = ("image", "label")) -> Any:
    """Pictures of the values first, first + 1, …; `kind` is the type of the labels."""
    pictures = [encoded(first + n) for n in range(len(labels))]
    made = datasets.Dataset.from_dict({names[0]: pictures, names[1]: labels}).cast_column(names[0], datasets.Image())
    return made.cast_column(names[1], kind) if kind else made


def load(source: str | Path, image: str = "image", label: str = "label", **splits: str | None) -> ImageTable:
    """With the caches beside the source."""
    names = {"train": None, "val": None, "test": None, **splits}
    cache = Path(source).parent / "cache"
    return load_image_table(str(source), image, label, names, cache, str(cache))


def contents(loaded: ImageTable) -> dict[str, dict[int, str]]:
    """Split -> value of a picture's first pixel -> name of its class."""
    return {
        split: {rows.image(n).getpixel((0, 0)): loaded.class_names[label] for n, label in enumerate(rows.labels)}
        for split, rows in loaded.splits.items()
    }


# --- image folders


def test_folder_has_one_subfolder_a_class(tmp_path: Path) -> None:
    source = write_files(tmp_path / "a[1]", {"dog/2.png": 2, "dog/1.PNG": 1, "cat/old/x/3.png": 3, "cat/4.png": 4})
    loaded = load(source)
    assert loaded.class_names == ["cat", "dog"]
    assert contents(loaded) == {"train": {3: "cat", 4: "cat", 1: "dog", 2: "dog"}}
    train = loaded.splits["train"]
    assert [train.name(n) for n in (0, 3)] == [f"{source}/cat/4.png", f"{source}/dog/2.png"]
    assert train.labels.tolist() == [0, 0, 1, 1]


def test_folder_takes_names_like_splits_for_classes_and_files(tmp_path: Path) -> None:
    # `datasets` would make splits of these and drop the other files without a word
    source = write_files(tmp_path, {"bullet-train/a.png": 1, "test-tube/test_1.png": 2, "cup/train_1.png": 3})
    assert contents(load(source)) == {"train": {1: "bullet-train", 3: "cup", 2: "test-tube"}}


def test_folder_ignores_what_is_no_image_or_hidden_and_follows_links(tmp_path: Path) -> None:
    source = write_files(
        tmp_path / "in", {"a/1.png": 1, "a/._1.png": 2, ".cache/3.png": 3, "b/.x/4.png": 4, "b/5.png": 5}
    )
    for name in ("notes.txt", "metadata.csv", "a/notes.txt"):
        (tmp_path / "in" / name).write_text("file_name,label\n")
    write_files(tmp_path / "elsewhere", {"6.png": 6})
    (tmp_path / "in" / "c").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    assert contents(load(source)) == {"train": {1: "a", 5: "b", 6: "c"}}


@pytest.mark.parametrize("val", ["val", "validation", "valid", "dev"])
def test_folder_may_have_splits_that_lack_classes(val: str, tmp_path: Path) -> None:
    files = {"train/a/1.png": 1, "train/b/2.png": 2, "train/c/3.png": 3, f"{val}/c/4.png": 4, "test/b/5.png": 5}
    loaded = load(write_files(tmp_path, files))
    assert contents(loaded) == {"train": {1: "a", 2: "b", 3: "c"}, "val": {4: "c"}, "test": {5: "b"}}
    assert loaded.splits["val"].labels.tolist() == [2]


def test_folder_may_have_splits_of_any_name(tmp_path: Path) -> None:
    source = write_files(tmp_path, {"fold1/a/1.png": 1, "fold1/b/2.png": 2, "fold2/b/3.png": 3, "fold3/b/4.png": 4})
    assert contents(load(source, train="fold1", test="fold2")) == {"train": {1: "a", 2: "b"}, "test": {3: "b"}}


def test_image_files_are_sorted_and_at_any_depth(tmp_path: Path) -> None:
    write_files(tmp_path, {"b.png": 0, "a/c.jpg": 0, "a/B.JPG": 0, "a/.hidden.png": 0})
    assert [str(f.relative_to(tmp_path)) for f in image_files(tmp_path)] == ["a/B.JPG", "a/c.jpg", "b.png"]


@pytest.mark.parametrize("split", ["", "train/"])
def test_a_large_folder_is_searched_once_for_all_processes(
    split: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Path(write_files(tmp_path / "in", {f"{split}a/1.png": 1, f"{split}b/2.png": 2, f"{split}b/3.png": 3}))
    if split:
        write_files(source, {"val/b/4.png": 4})
        (source / "val" / "a").symlink_to("b")  # no list but that of the source has the links
    searched: list[Path] = []
    original = folders.walk
    monkeypatch.setattr(folders, "walk", lambda folder, seen: searched.append(folder) or original(folder, seen))
    monkeypatch.setattr(folders, "KEPT_FROM", 1)
    monkeypatch.setattr(folders.time, "time_ns", lambda: 2 * source.stat().st_mtime_ns)
    if split:
        with pytest.raises(TrunklineError, match=r"val/a holds no image"):
            load(source)
        (source / "val" / "a").unlink()
        searched.clear()
    first = contents(load(source))
    assert searched == [source, source]  # the first time for a few files, to see whether there are many
    assert contents(load(source)) == first
    assert first["train"] == {1: "a", 2: "b", 3: "b"}
    assert first.get("val") == ({4: "b"} if split else None)
    assert searched == [source, source]


# --- tables

WRITERS: dict[str, Callable[[Any, Path], Path]] = {
    "parquet": lambda t, d: (t.to_parquet(d / "rows.parquet"), d / "rows.parquet")[1],
    "brackets": lambda t, d: ((d / "[1]").mkdir(), t.to_parquet(d / "[1]" / "rows.parquet"), d / "[1]")[2],
    "arrow": lambda t, d: (t.save_to_disk(d / "saved"), next((d / "saved").glob("*.arrow")))[1],
    "saved": lambda t, d: (t.save_to_disk(d / "saved"), d / "saved")[1],
    "saved_splits": lambda t, d: (datasets.DatasetDict(train=t).save_to_disk(d / "all"), d / "all")[1],
}


@pytest.mark.parametrize("writer", WRITERS)
def test_tables_of_all_kinds_of_files(writer: str, tmp_path: Path) -> None:
    source = WRITERS[writer](table([0, 1, 0], datasets.ClassLabel(names=["zebra", "ape"])), tmp_path)
    loaded = load(source)
    assert loaded.class_names == ["zebra", "ape"]
    assert contents(loaded) == {"train": {0: "zebra", 1: "ape", 2: "zebra"}}
    assert loaded.splits["train"].name(1) == f"{source} (train), row 1"


@pytest.mark.parametrize(
    ("labels", "kind", "class_names", "numbers"),
    [
        ([1, 0], datasets.ClassLabel(names=["b", "a", "unused"]), ["b", "a", "unused"], [1, 0]),
        ([3, 0, 1], datasets.Value("int32"), ["0", "1", "2", "3"], [3, 0, 1]),
        ([1, 0, 1], datasets.Value("uint8"), ["0", "1"], [1, 0, 1]),
        (["dog", "cat", "dog"], datasets.Value("string"), ["cat", "dog"], [1, 0, 1]),
        ([True, False], datasets.Value("bool"), ["0", "1"], [1, 0]),
    ],
)
def test_labels_of_all_kinds(
    labels: list[Any], kind: Any, class_names: list[str], numbers: list[int], tmp_path: Path
) -> None:
    table(labels, kind).to_parquet(tmp_path / "rows.parquet")
    loaded = load(tmp_path / "rows.parquet")
    assert loaded.class_names == class_names
    assert loaded.splits["train"].labels.tolist() == numbers
    assert loaded.splits["train"].labels.dtype == np.int64


def test_columns_and_splits_of_other_names(tmp_path: Path) -> None:
    tables = {name: table(["x", "y"], first=n, names=("img", "fine")) for n, name in ((10, "fit"), (20, "check"))}
    datasets.DatasetDict(tables).save_to_disk(tmp_path / "all")
    loaded = load(tmp_path / "all", "img", "fine", train="fit", test="check")
    assert contents(loaded) == {"train": {10: "x", 11: "y"}, "test": {20: "x", 21: "y"}}


def test_splits_may_number_their_classes_differently(tmp_path: Path) -> None:
    train, val = (table([0, 1], datasets.ClassLabel(names=names)) for names in (["a", "b"], ["b", "a"]))
    datasets.DatasetDict(train=train, validation=val).save_to_disk(tmp_path / "all")
    assert contents(load(tmp_path / "all")) == {"train": {0: "a", 1: "b"}, "val": {0: "b", 1: "a"}}


def test_image_cells_may_be_bytes_or_paths(tmp_path: Path) -> None:
    write_files(tmp_path, {"7.png": 7})
    for n, cell in enumerate([encoded(7), str(tmp_path / "7.png"), {"bytes": encoded(7), "path": "gone.png"}]):
        datasets.Dataset.from_dict({"image": [cell], "label": [0]}).to_parquet(tmp_path / f"{n}.parquet")
        assert contents(load(tmp_path / f"{n}.parquet")) == {"train": {7: "0"}}


def test_labels_are_read_without_decoding_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table(["a", "b"]).to_parquet(tmp_path / "rows.parquet")
    decoded: list[Any] = []
    monkeypatch.setattr(datasets.Image, "decode_example", lambda self, cell, **_: decoded.append(cell))
    monkeypatch.setattr(Image, "open", lambda file: decoded.append(file))
    assert load(tmp_path / "rows.parquet").splits["train"].labels.tolist() == [0, 1]
    assert decoded == []


# --- errors


def parquet(made: Callable[[], Any]) -> Callable[[Path], Path]:
    return lambda d: (made().to_parquet(d / "rows.parquet"), d / "rows.parquet")[1]


def saved_splits(**tables: list[Any]) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        datasets.DatasetDict({n: table(labels) for n, labels in tables.items()}).save_to_disk(folder / "all")
        return folder / "all"

    return write


def folder(*files: str, empty: str = ".") -> Callable[[Path], Path]:
    def write(root: Path) -> Path:
        (root / "in" / empty).mkdir(parents=True)
        return Path(write_files(root / "in", dict.fromkeys(files, 0)))

    return write


ERRORS: dict[str, tuple[Callable[[Path], Path], dict[str, str], list[str]]] = {
    "empty class": (folder("a/1.png", empty="b"), {}, ["in/b holds no image", "fill it or remove it"]),
    "empty class in a split": (folder("train/a/1.png", empty="train/b"), {}, ["in/train/b holds no image"]),
    "no images": (folder(empty="a"), {}, ["in holds no image file", ".png"]),
    "no class folders": (folder("1.png"), {}, ["in/1.png is not in a class folder", "move it into one below"]),
    "class that train lacks": (folder("train/a/1.png", "val/b/2.png"), {}, ["in/val/b is none of the 1 class folders"]),
    "no train": (folder("val/a/1.png"), {}, ["no split 'train'", "it has val", "train_split"]),
    "folder's split": (folder("a/1.png"), {"val": "dev2"}, ["no split 'dev2'", "val_split"]),
    "text file": (lambda d: (d / "a.txt", (d / "a.txt").touch())[0], {}, ["a.txt is not a folder, or a Parquet"]),
    "broken file": (
        lambda d: (d / "a.parquet", (d / "a.parquet").touch())[0],
        {},
        ["source", "a.parquet", "0 by"],
    ),
    "image column": (parquet(lambda: table([0])), {"image": "img"}, ["'img'", "image, label", "image_column"]),
    "label column": (parquet(lambda: table([0])), {"label": "fine"}, ["'fine'", "image, label", "label_column"]),
    "no images in it": (
        parquet(lambda: table([0])),
        {"image": "label"},
        ["'label' does not hold images", "image_column"],
    ),
    "split": (saved_splits(a=[0], b=[1]), {"train": "a", "test": "c"}, ["no split 'c'", "a, b", "test_split"]),
    "new class": (
        saved_splits(train=[0, 1], test=[1, 2]),
        {},
        ["(test), row 1", "label 2", "2 classes", "label_column"],
    ),
    "new name": (saved_splits(train=["a"], val=["a", "b"]), {}, ["(val), row 1", "label 'b'", "label_column"]),
    "negative": (parquet(lambda: table([0, 1, -1])), {}, ["(train), row 2", "label -1", "label_column"]),
    "gap": (parquet(lambda: table([0, None])), {}, ["(train), row 1", "label None", "label_column"]),
    "floats": (parquet(lambda: table([0.5, 1.0])), {}, ["'label'", "float64", "0.5", "label_column"]),
    "floats in test": (saved_splits(train=[0, 1], test=[0.5]), {}, ["(test), row 0", "0.5"]),
    "lists": (parquet(lambda: table([[0], [1]])), {}, ["'label'", "list", "label_column"]),
    "dates": (parquet(lambda: table([1_700_000_000])), {}, ["'label'", "1700000000", "label_column"]),
}


@pytest.mark.parametrize("name", ERRORS)
def test_mistakes_are_one_error_that_says_the_mend(name: str, tmp_path: Path) -> None:
    write, options, parts = ERRORS[name]
    source = write(tmp_path)
    with pytest.raises(TrunklineError) as caught:
        load(source, **options)
    assert [part for part in parts if part not in str(caught.value)] == [], str(caught.value)


@pytest.mark.parametrize("source", ["my_photos", "nobody/nothing", "/no/such/folder", "./photos/of/cats"])
def test_missing_sources_fail_fast_without_a_network(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("datasets.config", "huggingface_hub.constants"):  # what HF_HUB_OFFLINE=1 sets at their import
        monkeypatch.setattr(f"{module}.HF_HUB_OFFLINE", True)
    asked: list[Any] = []
    monkeypatch.setattr("socket.socket.connect", lambda _, address: asked.append(address))
    monkeypatch.setattr("socket.getaddrinfo", lambda *address, **_: asked.append(address))
    monkeypatch.setattr("time.sleep", lambda seconds: asked.append(seconds))
    with pytest.raises(TrunklineError) as caught:
        load_image_table(source, "image", "label", {"train": None}, Path("cache"))
    assert asked == []  # nobody is asked or waited for
    assert f"cannot read source={source}: there is no such file or folder here" in str(caught.value)
    assert "give `digits`, a local path" in str(caught.value)
