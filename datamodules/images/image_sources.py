"""Sources of labelled images: the offline digits, local files, or the Hugging Face hub."""

import glob
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from trunkline import TrunklineError
from trunkline.datamodules.folders import FileNames, files_below, listed_files, some_files
from trunkline.datamodules.images.image_decoding import open_image
from trunkline.names import check_regular, hub_access, looks_like_path

SPLIT_NAMES = {"train": ("train",), "val": ("val", "validation", "valid", "dev"), "test": ("test",)}
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".avif", ".bmp", ".gif", ".jp2", ".pgm", ".ppm", ".tif", ".tiff")
SOURCE_SUFFIXES = (*IMAGE_SUFFIXES, ".parquet", ".arrow")
"""Of a folder that holds either images or tables, so that it is searched once for both."""
MAX_CLASSES = 1_000_000
"""More classes than any data set has: larger class numbers mean a wrong column, such as one of dates."""


class ImageRows(Protocol):
    """Labelled images of one split."""

    labels: np.ndarray
    """(N,) class numbers."""

    def image(self, row: int) -> Image.Image:
        """The picture of a row, upright, in the mode of its file (such as RGB or palette), as `open_image` gives it."""

    def name(self, row: int) -> str:
        """Name of the file or row, for messages."""

    def stored(self, row: int) -> list[bytes | Path]:
        """What is stored of a row, as it is, for `sampled_digest`."""


@dataclass
class ImageTable:
    """All splits of a source."""

    class_names: list[str]
    splits: dict[str, ImageRows]


class ArrayRows:
    """Grey images in memory: (N, height, width), values from 0 to 255."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, title: str) -> None:
        self.images, self.labels, self.title = images, labels.astype(np.int64), title

    def image(self, row: int) -> Image.Image:
        return Image.fromarray(self.images[row])

    def name(self, row: int) -> str:
        return f"{self.title}, row {row}"

    def stored(self, row: int) -> list[bytes | Path]:
        return [self.images[row].tobytes()]


class Subset:
    """Some rows of another `ImageRows`."""

    def __init__(self, rows: ImageRows, indices: np.ndarray) -> None:
        self.rows, self.indices, self.labels = rows, indices, rows.labels[indices]

    def image(self, row: int) -> Image.Image:
        return self.rows.image(int(self.indices[row]))

    def name(self, row: int) -> str:
        return self.rows.name(int(self.indices[row]))

    def stored(self, row: int) -> list[bytes | Path]:
        return self.rows.stored(int(self.indices[row]))


class FileRows:
    """Image files."""

    def __init__(self, files: Sequence[Path], labels: np.ndarray) -> None:
        self.files, self.labels = files, labels

    def image(self, row: int) -> Image.Image:
        return open_image(self.files[row], self.name(row))

    def name(self, row: int) -> str:
        return str(self.files[row])

    def stored(self, row: int) -> list[bytes | Path]:
        return [self.files[row]]


class TableRows:
    """Rows of a `datasets.Dataset` whose image column holds undecoded files."""

    def __init__(self, table: Any, image_column: str, labels: np.ndarray, title: str) -> None:
        self.table, self.image_column, self.labels, self.title = table, image_column, labels, title

    def image(self, row: int) -> Image.Image:
        cell = self._cell(row)
        return open_image(cell["path"] if cell["bytes"] is None else cell["bytes"], self._name(row, cell))

    def name(self, row: int) -> str:
        return self._name(row, self._cell(row))

    def stored(self, row: int) -> list[bytes | Path]:
        return [stored_image(self._cell(row), Path())]

    def _cell(self, row: int) -> dict[str, Any]:
        return self.table[row][self.image_column] or {"bytes": None, "path": None}

    def _name(self, row: int, cell: dict[str, Any]) -> str:
        return f"{self.title}, row {row}" + (f" ({cell['path']})" if cell["path"] else "")


def load_digits_table() -> ImageTable:
    """scikit-learn's 1,797 handwritten digits of 8x8 pixels, in memory, as one split."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = (data.images * (255 / 16)).round().astype(np.uint8)
    return ImageTable([str(n) for n in range(10)], {"train": ArrayRows(images, data.target, "digits")})


def load_image_table(
    source: str,
    image_column: str,
    label_column: str,
    split_names: dict[str, str | None],
    cache: Path,
    cache_dir: str | None = None,
    hub_config: str | None = None,
    revision: str | None = None,
) -> ImageTable:
    """Read the splits of a source.

    Args:
        source: `digits`; a folder with one sub-folder per class (optionally below train/, val/, test/); a
            Parquet or Arrow file, or a folder of them; a folder that `datasets` saved; or a hub name.
        image_column: column of a table that holds the images.
        label_column: column of a table that holds class numbers or class names.
        split_names: our split (train, val, test) -> its name in the source (in an image folder: the sub-folder);
            None looks for the usual names.
        cache: folder where the lists of the files of large folders are kept.
        cache_dir: folder where `datasets` keeps converted data.
        hub_config: configuration of a hub dataset.
        revision: commit or branch of a hub dataset.

    Raises:
        TrunklineError: naming the folder, column, split or row at fault.
    """
    if source == "digits":
        return load_digits_table()
    available = open_tables(source, split_names, cache, cache_dir, hub_config, revision)
    chosen = choose_splits(available, source, split_names)
    if isinstance(chosen["train"], Path):
        for field, column, usual in (("image_column", image_column, "image"), ("label_column", label_column, "label")):
            if column != usual:
                raise TrunklineError(
                    f"{field}={column} is of no use: {source} is a folder of pictures, whose sub-folders are the "
                    "classes; leave it out",
                    f"data.{field}",
                )
        return _read_folders(Path(source), chosen, cache)
    return _read_tables(chosen, source, image_column, label_column)


def choose_splits(available: dict[str, Any], source: str, split_names: dict[str, str | None]) -> dict[str, Any]:
    """Our split -> the entry of `available` with the given name, or else with a usual name.

    Raises:
        TrunklineError: if the source lacks the training split, or a split that was named.
    """
    chosen = {}
    for split, name in split_names.items():
        found = [n for n in ([name] if name else SPLIT_NAMES[split]) if n in available]
        if found:
            chosen[split] = available[found[0]]
        elif name or split == "train":
            raise TrunklineError(
                f"{source} has no split '{name or split}'; it has {', '.join(available)}; set {split}_split",
                field=f"data.{split}_split",
            )
    return chosen


def image_files(folder: str | Path) -> Sequence[Path]:
    """All image files below a folder, sorted, for a command.

    Raises:
        TrunklineError: if the folder does not exist, or holds no image file.
    """
    return files_below(folder, IMAGE_SUFFIXES, "image", "images")


def given_images(images: str | Path) -> Sequence[Path]:
    """One image file, or all below a folder, for a command; raises the errors of `image_files`."""
    file = Path(images)
    return [file] if file.is_file() and file.suffix.lower() in IMAGE_SUFFIXES else image_files(images)


def open_tables(
    source: str,
    split_names: dict[str, str | None],
    cache: Path,
    cache_dir: str | None,
    hub_config: str | None = None,
    revision: str | None = None,
    offline: str = "`digits`",
) -> dict[str, Any]:
    """All splits of a source, under their names there: `datasets` tables, or the `Path`s of image folders.

    If the source cannot be read, the message proposes the offline source `offline`; `load_image_table` tells the rest.

    Raises:
        TrunklineError: if the source is missing or broken, or cannot be reached.
    """
    import datasets

    datasets.disable_progress_bars()
    path = Path(source)
    check_regular(path, "data.source")
    if not path.exists() and looks_like_path(source):
        raise TrunklineError(
            f"cannot read source={source}: there is no such file or folder here; give {offline}, a local path that "
            "holds images or tables, or a hub name (`owner/name`)",
            "data.source",
        )
    literal = glob.escape(source)  # `datasets` reads a path as a pattern
    try:
        if (path / "dataset_dict.json").exists():
            return dict(datasets.load_from_disk(source))
        if (path / "state.json").exists():
            return {"train": datasets.load_from_disk(source)}
        found = listed_files(path, SOURCE_SUFFIXES, cache).suffixes if path.is_dir() else ()
        for kind in ("parquet", "arrow"):
            if path.is_file() and path.suffix == f".{kind}":
                return dict(datasets.load_dataset(kind, data_files={"train": literal}, cache_dir=cache_dir))
            if f".{kind}" in found:
                return dict(datasets.load_dataset(kind, data_dir=literal, cache_dir=cache_dir))
        if path.is_dir():
            known = {name for names in SPLIT_NAMES.values() for name in names} | set(split_names.values())
            return {f.name: f for f in _subfolders(path) if f.name in known} or {"train": path}
        if path.exists():
            raise TrunklineError(f"{source} is not a folder, or a Parquet (.parquet) or Arrow (.arrow) file")
        with hub_access():
            return dict(datasets.load_dataset(source, hub_config, revision=revision, cache_dir=cache_dir))
    except TrunklineError:
        raise
    except Exception as error:  # `datasets` raises many kinds for missing, broken and unreachable data
        missing = "" if path.exists() else "there is no such file or folder here, and as a hub name: "
        cause = error.__cause__ or error  # the message of `datasets` itself is often only "an error occurred"
        raise TrunklineError(
            f"cannot read source={source}: {missing}{type(cause).__name__}: {cause}; give {offline}, a "
            "local path that holds images or tables, or the name of a hub dataset that can be reached",
            field="data.source",
        ) from error


def _subfolders(folder: Path) -> list[Path]:
    """The sub-folders, sorted, without hidden ones."""
    return sorted(f for f in folder.iterdir() if f.is_dir() and not f.name.startswith("."))


def _read_folders(source: Path, folders: dict[str, Path], cache: Path) -> ImageTable:
    """Read image folders (our split -> folder). Each has one sub-folder per class, with images at any depth."""
    class_names = [f.name for f in _subfolders(folders["train"])]
    number = {name: n for n, name in enumerate(class_names)}
    splits: dict[str, ImageRows] = {}
    for split, folder in folders.items():
        files = _files_of(source, folder, cache)
        classes: dict[str, int] = {}
        for name, begin, end in files.groups():
            classes[name] = end - begin
            if name == files.name(begin):
                raise TrunklineError(
                    f"the image {files[begin]} is not in a class folder; move it into one below {folder}"
                )
            if name not in number:
                raise TrunklineError(
                    f"{folder / name} is none of the {len(class_names)} class folders of the training split in "
                    f"{folders['train']}; rename or remove it"
                )
        # An empty class folder is a mistake that would silently shift the class numbers.
        for empty in {f.name for f in _subfolders(folder)} - set(classes):
            raise TrunklineError(f"the class folder {folder / empty} holds no image; fill it or remove it")
        numbers = np.array([number[name] for name in classes])
        splits[split] = FileRows(files, np.repeat(numbers, list(classes.values())))
    return ImageTable(class_names, splits)


def _files_of(source: Path, folder: Path, cache: Path) -> FileNames:
    """The images of a split, whose folder is that of the source or stands in it.

    Raises:
        TrunklineError: if there is none.
    """
    files = listed_files(source, SOURCE_SUFFIXES, cache)
    if folder != source:
        # a link from one split to a file of another is a file of both, but not of the whole source
        files = listed_files(folder, SOURCE_SUFFIXES, cache) if files.linked else files.below(folder.name)
    return some_files(files, IMAGE_SUFFIXES, "image", "data.source")


def _read_tables(tables: dict[str, Any], source: str, image_column: str, label_column: str) -> ImageTable:
    """Read labelled tables (our split -> `datasets` table)."""
    check_columns(tables, source, {"image_column": image_column, "label_column": label_column})
    class_names = _class_names(tables["train"], label_column)
    splits: dict[str, ImageRows] = {}
    for split, table in tables.items():
        title = f"{source} ({split})"
        labels = _class_numbers(table, label_column, class_names, title)
        splits[split] = TableRows(undecoded(table, image_column, title), image_column, labels, title)
    return ImageTable(class_names, splits)


def check_columns(tables: dict[str, Any], source: str, columns: dict[str, str]) -> None:
    """Check that `datasets` tables (split -> table) have the columns (field -> column name).

    Raises:
        TrunklineError: for the first missing column.
    """
    for split, table in tables.items():
        for field, column in columns.items():
            if column not in table.column_names:
                raise TrunklineError(
                    f"{source} ({split}) has no column '{column}'; it has {', '.join(table.column_names)}; set {field}",
                    field=f"data.{field}",
                )


def _class_names(table: Any, column: str) -> list[str]:
    """Names of the classes: the list in the table if it has one, else the labels that occur."""
    feature = table.features[column]
    if hasattr(feature, "names"):
        return list(feature.names)
    kind = getattr(feature, "dtype", "list")
    values = [] if kind == "list" else [v for v in table.unique(column) if v is not None]
    if "string" in kind:
        return sorted(values)
    if re.match("u?int|bool", kind) and max(values, default=0) < MAX_CLASSES:
        return [str(n) for n in range(max(values, default=-1) + 1)]
    raise TrunklineError(
        f"the labels in column '{column}' are neither all names nor all class numbers from 0 up, but {kind} "
        f"(such as {values[:1]}); set label_column",
        field="data.label_column",
    )


def _class_numbers(table: Any, column: str, class_names: list[str], title: str) -> np.ndarray:
    """(N,) class numbers of a table.

    Raises:
        TrunklineError: for the first label outside the classes; names its row.
    """
    number = {name: n for n, name in enumerate(class_names)}
    names = getattr(table.features[column], "names", None)  # each split may number its classes in another order
    labels = np.empty(len(table), np.int64)
    for row, value in enumerate(table[column][:]):
        label = names[value] if names and value in range(len(names)) else value
        class_number = number.get(label, -1) if isinstance(label, str) else label
        if not isinstance(class_number, int) or not 0 <= class_number < len(class_names):
            raise TrunklineError(
                f"{title}, row {row}: the label {label!r} is outside the {len(class_names)} classes of the "
                "training split; fix the row or choose another label_column",
                field="data.label_column",
            )
        labels[row] = class_number
    return labels


def stored_image(cell: dict[str, Any] | None, folder: Path) -> bytes | Path:
    """The file in a cell of `undecoded`, or its path, which may be relative to the folder; b"" if there is neither."""
    content, path = (cell or {}).get("bytes"), (cell or {}).get("path")
    return folder / path if content is None and path else content or b""


def undecoded(table: Any, column: str, title: str) -> Any:
    """The table with only its image column, as {bytes, path} without decoding, so that we report broken files."""
    import datasets

    try:
        return table.cast_column(column, datasets.Image(decode=False)).select_columns([column])
    except Exception as error:  # pyarrow raises different errors for different types of columns
        raise TrunklineError(
            f"{title}: column '{column}' does not hold images but {table.features[column]}; set image_column",
            field="data.image_column",
        ) from error
