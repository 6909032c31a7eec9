"""Where rows of images come from: the offline digits, local files, or a Hugging Face hub name."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from trunkline import TrunklineError

SPLIT_NAMES = {"train": ("train",), "val": ("val", "validation", "valid", "dev"), "test": ("test",)}
IMAGE_SUFFIXES = frozenset(Image.registered_extensions())


class ImageRows(Protocol):
    """Labelled images of one split."""

    labels: np.ndarray
    """(N,) class numbers."""

    def image(self, row: int) -> Image.Image:
        """The decoded picture of a row, in its file's own mode."""

    def name(self, row: int) -> str:
        """File or row, for messages."""


@dataclass
class ImageTable:
    """All splits of a source."""

    class_names: list[str]
    splits: dict[str, ImageRows]


class ArrayRows:
    """Grey images in memory: (N, height, width) of 0 to 255."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, title: str) -> None:
        self.images, self.labels, self.title = images, labels.astype(np.int64), title

    def image(self, row: int) -> Image.Image:
        """See `ImageRows`."""
        return Image.fromarray(self.images[row])

    def name(self, row: int) -> str:
        """See `ImageRows`."""
        return f"{self.title}, row {row}"


class Subset:
    """Some rows of another `ImageRows`."""

    def __init__(self, rows: ImageRows, indices: np.ndarray) -> None:
        self.rows, self.indices, self.labels = rows, indices, rows.labels[indices]

    def image(self, row: int) -> Image.Image:
        """See `ImageRows`."""
        return self.rows.image(int(self.indices[row]))

    def name(self, row: int) -> str:
        """See `ImageRows`."""
        return self.rows.name(int(self.indices[row]))


class TableRows:
    """Rows of a `datasets.Dataset` whose image column holds undecoded files."""

    def __init__(self, table: Any, image_column: str, labels: np.ndarray, title: str) -> None:
        self.table, self.image_column, self.labels, self.title = table, image_column, labels, title

    def image(self, row: int) -> Image.Image:
        """See `ImageRows`."""
        cell = self.table[row][self.image_column]
        data = cell["bytes"] if cell["bytes"] is not None else Path(cell["path"]).read_bytes()
        return open_image(data, self.name(row))

    def name(self, row: int) -> str:
        """See `ImageRows`."""
        path = self.table[row][self.image_column]["path"]
        return f"{self.title}, row {row}" + (f" ({path})" if path else "")


def open_image(data: bytes, name: str) -> Image.Image:
    """Decode a whole image file.

    Raises:
        TrunklineError: if it is unreadable or cut short; names it.
    """
    try:
        image = Image.open(io.BytesIO(data))
        image.load()
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise TrunklineError(
            f"cannot read the image {name}: {error}; replace or remove it, or set --data.skip_corrupt true"
        ) from error
    return image


def to_channels(image: Image.Image, channels: int) -> Image.Image:
    """Upright 8-bit picture with 1 (grey) or 3 (RGB) channels; transparency is laid on white.

    Honours the EXIF orientation, palettes with transparency, and 16-bit grey (scaled to 8 bits).
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit grey: `convert` would cut it off at 255
        image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("L" if channels == 1 else "RGB")


def load_digits_table() -> ImageTable:
    """scikit-learn's 1,797 handwritten digits of 8x8 pixels, in memory, as one split."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = (data.images * (255 / 16)).round().astype(np.uint8)
    return ImageTable([str(n) for n in range(10)], {"train": ArrayRows(images, data.target, "digits")})


def load_image_table(
    source: str, image_column: str, label_column: str, split_names: dict[str, str | None], cache_dir: str | None = None
) -> ImageTable:
    """Read a source's splits.

    Args:
        source: `digits`; a folder with one sub-folder a class (optionally below train/, val/, test/); a
            Parquet or Arrow file, or a folder of them; a folder that `datasets` saved; or a hub name.
        image_column: of tables.
        label_column: of tables; class numbers or names.
        split_names: our split (train, val, test) -> the source's name of it; None finds the usual names.
        cache_dir: of `datasets`.

    Raises:
        TrunklineError: naming the folder, column, split or row that is at fault.
    """
    if source == "digits":
        return load_digits_table()
    tables = _open_tables(source, cache_dir)
    chosen = {}
    for split, name in split_names.items():
        found = [n for n in ([name] if name else SPLIT_NAMES[split]) if n in tables]
        if found:
            chosen[split] = tables[found[0]]
        elif name or split == "train":
            raise TrunklineError(
                f"{source} has no split '{name or split}'; it has {', '.join(tables)}; set --data.{split}_split"
            )
    for split, table in chosen.items():
        for flag, column in (("image_column", image_column), ("label_column", label_column)):
            if column not in table.column_names:
                raise TrunklineError(
                    f"{source} ({split}) has no column '{column}'; it has {', '.join(table.column_names)}; "
                    f"set --data.{flag}"
                )
    class_names = _class_names(chosen["train"], label_column)
    splits: dict[str, ImageRows] = {}
    for split, table in chosen.items():
        labels = _class_numbers(table, label_column, class_names, f"{source} ({split})")
        splits[split] = TableRows(_undecoded(table, image_column), image_column, labels, f"{source} ({split})")
    return ImageTable(class_names, splits)


def image_files(folder: str | Path) -> list[Path]:
    """All image files below a folder, sorted.

    Raises:
        TrunklineError: if the folder is missing or holds none.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise TrunklineError(f"there is no folder {folder}")
    files = sorted(f for f in folder.rglob("*") if f.suffix.lower() in IMAGE_SUFFIXES and f.is_file())
    if not files:
        raise TrunklineError(f"{folder} holds no image file ({', '.join(sorted(IMAGE_SUFFIXES)[:8])}, …)")
    return files


def _open_tables(source: str, cache_dir: str | None) -> dict[str, Any]:
    """All splits of a local source or a hub name, as `datasets` tables."""
    import datasets

    datasets.disable_progress_bars()
    path = Path(source)
    try:
        if (path / "dataset_dict.json").exists():
            return dict(datasets.load_from_disk(str(path)))
        if (path / "state.json").exists():
            return {"train": datasets.load_from_disk(str(path))}
        suffixes = {"parquet": ("*.parquet",), "arrow": ("*.arrow",)}
        for kind, (pattern,) in suffixes.items():
            if path.is_file() and path.match(pattern):
                return dict(datasets.load_dataset(kind, data_files={"train": source}, cache_dir=cache_dir))
            if path.is_dir() and next(path.rglob(pattern), None):
                return dict(datasets.load_dataset(kind, data_dir=source, cache_dir=cache_dir))
        if path.is_dir():
            _check_class_folders(path)
            return dict(datasets.load_dataset("imagefolder", data_dir=source, drop_labels=False, cache_dir=cache_dir))
        if path.exists():
            raise TrunklineError(f"{source} is no folder, Parquet (.parquet) or Arrow (.arrow) file")
        return dict(datasets.load_dataset(source, cache_dir=cache_dir))
    except TrunklineError:
        raise
    except Exception as error:  # `datasets` raises many kinds for missing, broken and unreachable data
        raise TrunklineError(f"cannot read --data.source {source}: {type(error).__name__}: {error}") from error


def _check_class_folders(folder: Path) -> None:
    """An empty class folder is a mistake that would silently shift the class numbers."""
    image_files(folder)
    known = {name for names in SPLIT_NAMES.values() for name in names}
    subfolders = [f for f in sorted(folder.iterdir()) if f.is_dir()]
    splits = [f for f in subfolders if f.name in known]
    for classes in [sorted(s.iterdir()) for s in splits] or [subfolders]:
        for class_folder in (f for f in classes if f.is_dir()):
            if not any(f.suffix.lower() in IMAGE_SUFFIXES for f in class_folder.rglob("*")):
                raise TrunklineError(f"the class folder {class_folder} holds no image; fill it or remove it")


def _class_names(table: Any, column: str) -> list[str]:
    """Names of the classes, from the table's own list or from the labels that occur."""
    feature = table.features[column]
    if hasattr(feature, "names"):
        return list(feature.names)
    values = table.unique(column)
    if all(isinstance(v, str) for v in values):
        return sorted(values)
    if all(isinstance(v, int) for v in values):
        return [str(n) for n in range(max(values) + 1)]
    raise TrunklineError(
        f"the labels in column '{column}' are neither all names nor all whole numbers (first: {values[0]!r}); "
        "set --data.label_column"
    )


def _class_numbers(table: Any, column: str, class_names: Sequence[str], title: str) -> np.ndarray:
    """(N,) class numbers of a table.

    Raises:
        TrunklineError: for the first label outside the classes; names its row.
    """
    number = {name: n for n, name in enumerate(class_names)}
    labels = np.empty(len(table), np.int64)
    for row, value in enumerate(table[column]):
        found = number.get(value, -1) if isinstance(value, str) else value
        if found is None or not 0 <= found < len(class_names):
            raise TrunklineError(
                f"{title}, row {row}: the label {value!r} is outside the {len(class_names)} classes of the "
                "training split; mend the row or choose another --data.label_column"
            )
        labels[row] = found
    return labels


def _undecoded(table: Any, column: str) -> Any:
    """The table with its image column as {bytes, path}, so that a broken file is ours to report."""
    import datasets

    return table.cast_column(column, datasets.Image(decode=False)).select_columns([column])
