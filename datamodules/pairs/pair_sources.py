"""Sources of images with captions: offline emoji, local tables, tar shards, or the Hugging Face hub."""

import hashlib
import re
from collections.abc import Iterator
from functools import cached_property
from glob import glob
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from trunkline import TrunklineError
from trunkline.datamodules.content_digest import value_text
from trunkline.datamodules.images.image_decoding import open_image
from trunkline.datamodules.images.image_sources import (
    SPLIT_NAMES,
    check_columns,
    choose_splits,
    open_tables,
    stored_image,
    undecoded,
)
from trunkline.datamodules.pairs.captions import caption_list
from trunkline.datamodules.pairs.emoji_pictures import OPENMOJI, TWEMOJI, EmojiPictures
from trunkline.datamodules.pairs.tar_shards import TarPairs
from trunkline.datamodules.splits import RowsOfSplit
from trunkline.datamodules.tables import kind, read_table
from trunkline.files import file_state
from trunkline.names import check_regular

LISTS = (".jsonl", ".csv", ".jsonl.gz")
"""Suffixes of tables that list paths of images with captions."""
BATCH_ROWS = 10_000
"""Rows of a list that are read before they are converted to Arrow."""
BRACES = re.compile(r"\{([^{}]*)\}")


class PairRows(Protocol):
    """Images of one split, each with one or more captions. Large sources keep neither images nor captions in memory."""

    @property
    def key(self) -> list[Any]:
        """Everything that decides the captions, as plain data."""

    def __len__(self) -> int:
        """Number of images."""

    def image(self, row: int) -> Image.Image:
        """The decoded picture of a row, upright, in the mode of its file (such as RGB or palette).

        Raises:
            TrunklineError: if it cannot be read; names file and row.
        """

    def captions(self, row: int) -> list[str]:
        """One or more captions of a row, the main one first.

        Raises:
            TrunklineError: if there is no caption, or one is empty; names file and row.
        """

    def name(self, row: int) -> str:
        """Name of the file or row, for messages."""

    def stored(self, row: int) -> list[bytes | Path]:
        """What is stored of a row, as it is, for `sampled_digest`."""

    def order(self, generator: np.random.Generator) -> Iterator[np.ndarray]:
        """The row numbers of an epoch, shuffled; in parts, because all of them may not fit in memory."""


class PairSubset:
    """The rows of one split of another `PairRows`."""

    def __init__(self, rows: PairRows, indices: RowsOfSplit) -> None:
        self.rows, self.indices = rows, indices

    @cached_property
    def key(self) -> list[Any]:
        """Everything that decides the captions, as plain data."""
        numbers = hashlib.blake2b(digest_size=12)
        for part in self.indices.parts():
            numbers.update(part.tobytes())
        return [self.rows.key, numbers.hexdigest()]

    def __len__(self) -> int:
        return len(self.indices)

    def image(self, row: int) -> Image.Image:
        return self.rows.image(self.indices[row])

    def captions(self, row: int) -> list[str]:
        return self.rows.captions(self.indices[row])

    def name(self, row: int) -> str:
        return self.rows.name(self.indices[row])

    def stored(self, row: int) -> list[bytes | Path]:
        return self.rows.stored(self.indices[row])

    def order(self, generator: np.random.Generator) -> Iterator[np.ndarray]:
        for part in self.rows.order(generator):
            places = self.indices.places(part)
            yield places[places >= 0]


class PairTable:
    """Rows of a `datasets.Dataset`, whose images are undecoded files or paths.

    Args:
        table: the table.
        image_column: column that holds the images or their paths.
        caption_column: column that holds the captions, texts or lists of texts.
        image_folder: folder that paths are relative to.
        title: name of the table, for messages.
    """

    def __init__(self, table: Any, image_column: str, caption_column: str, image_folder: Path, title: str) -> None:
        self.images = undecoded(table, image_column, title)
        self.texts = table.select_columns([caption_column])
        self.image_column, self.caption_column = image_column, caption_column
        self.image_folder, self.title = image_folder, title
        self.key = ["table", caption_column, table._fingerprint]

    def __len__(self) -> int:
        return len(self.texts)

    def image(self, row: int) -> Image.Image:
        cell = self.images[row][self.image_column] or {"bytes": None, "path": None}
        file = cell["bytes"]
        if file is None and cell["path"]:
            file = self.image_folder / cell["path"]
        return open_image(file, self.name(row) + (f" ({cell['path']})" if cell["path"] else ""))

    def captions(self, row: int) -> list[str]:
        return caption_list(self.texts[row][self.caption_column], self.name(row), self.caption_column)

    def name(self, row: int) -> str:
        return f"{self.title}, row {row}"

    def stored(self, row: int) -> list[bytes | Path]:
        captions = value_text(self.texts[row][self.caption_column]).encode()
        return [stored_image(self.images[row][self.image_column], self.image_folder), captions]

    def order(self, generator: np.random.Generator) -> Iterator[np.ndarray]:
        yield generator.permutation(len(self))


class PairList:
    """Image files with captions, listed in JSON lines or CSV; rows with the same image become one row.

    Args:
        files: the lists; they are read completely and kept in memory as Arrow.
        image_column: column that holds the paths of the images.
        caption_column: column that holds the captions, texts or lists of texts.
        image_folder: folder that paths are relative to; None is the folder of each list.

    Raises:
        TrunklineError: naming the file and row that is broken or has values of another type.
    """

    def __init__(self, files: list[Path], image_column: str, caption_column: str, image_folder: Path | None) -> None:
        import pyarrow as pa

        columns = {"image": image_column, "caption": caption_column}
        schema = pa.schema([("image", pa.large_string()), ("caption", pa.large_string()), ("place", pa.large_string())])
        rows, batches = listed_pairs(files, columns, image_folder), []
        while batch := list(islice(rows, BATCH_ROWS)):
            batches.append(pa.RecordBatch.from_pylist(batch, schema))
        table = pa.Table.from_batches(batches, schema).group_by("image", use_threads=False)
        self.table = table.aggregate([("caption", "list"), ("place", "first")]).combine_chunks()
        self.caption_column = caption_column
        self.key = ["list", caption_column, [[str(file.resolve()), *file_state(file)] for file in files]]

    def __len__(self) -> int:
        return len(self.table)

    def image(self, row: int) -> Image.Image:
        file = self.table["image"][row].as_py()
        return open_image(file or None, f"{self.name(row)} ({file})")

    def captions(self, row: int) -> list[str]:
        return caption_list(self.table["caption_list"][row].as_py(), self.name(row), self.caption_column)

    def name(self, row: int) -> str:
        return self.table["place_first"][row].as_py()

    def stored(self, row: int) -> list[bytes | Path]:
        return [Path(self.table["image"][row].as_py())]  # the list itself is digested as a whole

    def order(self, generator: np.random.Generator) -> Iterator[np.ndarray]:
        yield generator.permutation(len(self))


def listed_pairs(files: list[Path], columns: dict[str, str], image_folder: Path | None) -> Iterator[dict[str, str]]:
    """`image` (the full path), `caption` and `place` for each caption in the lists."""
    for file in files:
        for place, cells in read_table(file):
            for role, column in columns.items():
                if column not in cells:
                    names = ", ".join(map(str, cells))
                    raise TrunklineError(
                        f"{place} has no '{column}'; it has {names}; set {role}_column", field=f"data.{role}_column"
                    )
            image, captions = cells[columns["image"]], cells[columns["caption"]]
            if not isinstance(image, str) or not image:
                raise TrunklineError(
                    f"{place}: '{columns['image']}' is not a path but {kind(image) if image != '' else 'empty'}; fix "
                    "the row or set image_column",
                    field="data.image_column",
                )
            path = str((image_folder or file.parent) / image)
            # An empty list becomes an empty caption, so that reading the row raises an error or skips the row.
            for caption in captions if isinstance(captions, list) and captions else [captions]:
                if caption and not isinstance(caption, str):
                    caption_list([caption], place, columns["caption"])  # raises
                yield {"image": path, "caption": caption or "", "place": place}


def expanded(pattern: str) -> list[str]:
    """Expand braces as a shell does: `a{00..02}` -> a00, a01, a02 and `a{b,c}` -> ab, ac."""
    braces = BRACES.search(pattern)
    if not braces:
        return [pattern]
    choices = braces[1].split(",")
    if ends := re.fullmatch(r"(\d+)\.\.(\d+)", braces[1]):
        width = len(ends[1]) if ends[1].startswith("0") else 0
        choices = [f"{number:0{width}}" for number in range(int(ends[1]), int(ends[2]) + 1)]
    before, after = pattern[: braces.start()], pattern[braces.end() :]
    return [name for choice in choices for name in expanded(before + choice + after)]


def local_files(source: str) -> tuple[Path, list[Path]]:
    """The shards of a source, or if it has none its lists: a file, all files in a folder, or all that match a pattern.

    Returns:
        the folder of the source, and the files; no files for other kinds of sources.

    Raises:
        TrunklineError: if there is no such file, or no file that matches the pattern.
    """
    path = Path(source)
    check_regular(path, "data.source")
    if path.is_dir():
        kinds = (".tar", ".parquet", ".arrow", *LISTS)
        files = sorted(f for f in path.rglob("*") if f.name.endswith(kinds) and not f.name.startswith("."))
        # Folders of shards often have tables about the shards too, and folders of tables have lists.
        tables = [file for file in files if file.suffix in (".parquet", ".arrow")]
        shards = [file for file in files if file.suffix == ".tar"]
        return path, shards or ([] if tables else [file for file in files if file.name.endswith(LISTS)])
    if path.exists():
        return path.parent, [path] if source.endswith((".tar", *LISTS)) else []
    if re.match(r"\w+:", source):
        raise TrunklineError(
            f"source={source}: data must be local files or on a mounted file system; mount or copy it first",
            field="data.source",
        )
    if not source.endswith((".tar", *LISTS)):
        return path, []
    files = []
    for name in expanded(source):
        found = sorted(glob(name)) if re.search(r"[*?[]", name) else [name]
        files += [Path(file) for file in found]
        if not found or not files[-1].exists():
            raise TrunklineError(f"source={source}: there is no file {name}; fix the path or pattern", "data.source")
    fixed = re.split(r"[{*?[]", source)[0].rpartition("/")[0]
    return Path(fixed), files


def by_split(folder: Path, files: list[Path], split_names: dict[str, str | None]) -> dict[str, list[Path]]:
    """Name of a split in the source -> its files; `load_pairs` tells the rule."""
    usual = [name for split, given in split_names.items() for name in ([given] if given else SPLIT_NAMES[split])]
    words = {name: re.compile(rf"(?<![a-zA-Z\d]){re.escape(name)}(?![a-zA-Z])") for name in sorted(usual, key=len)}
    groups: dict[str, list[Path]] = {}
    train = split_names["train"] or "train"
    for file in files:
        path = str(file.relative_to(folder) if file.is_relative_to(folder) else file)
        found = [name for name, word in words.items() if word.search(path)]
        groups.setdefault(found[-1] if found else train, []).append(file)
    return groups if len(groups) > 1 else {train: files}


def load_pairs(
    source: str,
    image_column: str,
    caption_column: str,
    split_names: dict[str, str | None],
    *,
    cache: Path,
    image_folder: str | None = None,
    cache_dir: str | None = None,
    hub_config: str | None = None,
    revision: str | None = None,
    shard_window: int = 16,
    skip_corrupt: bool = False,
    flags: bool = False,
) -> dict[str, PairRows]:
    """Read the splits of a source.

    A local list or shard belongs to the split whose name is a word in its path below the source (`train`, `val`, …), or
    to train if there is none. If all files belong to one split, they are all for train.

    Args:
        source: `twemoji` or `openmoji`; a .jsonl, .jsonl.gz or .csv list of image files with captions, or a folder of
            lists; a .tar file, a folder of .tar files, or a pattern (`cc3m-{0000..0331}.tar`, `*`); a Parquet or Arrow
            file, a folder of them, or a folder that `datasets` saved; else a hub name.
        image_column: column of tables and lists that holds the images or their paths.
        caption_column: column of tables and lists that holds the captions, texts or lists of texts; in shards the key
            in a .json file.
        split_names: our split (train, val, test) -> its name in the source; None looks for the usual names.
        cache: folder for the indices of shards.
        image_folder: folder that paths in tables are relative to; None is the folder of the table.
        cache_dir: folder where `datasets` keeps converted data.
        hub_config: configuration of a hub dataset.
        revision: commit or branch of a hub dataset.
        shard_window: as in `TarPairs`.
        skip_corrupt: as in `open_index`.
        flags: as in `EmojiPictures`.

    Raises:
        TrunklineError: naming the file, column, split or row at fault.
    """
    if source in (TWEMOJI, OPENMOJI):
        return {"train": EmojiPictures(source, flags)}
    folder = Path(image_folder) if image_folder else None
    if folder and not folder.is_dir():
        raise TrunklineError(f"image_folder={folder}: there is no such folder; fix the path", "data.image_folder")
    place, files = local_files(source)
    if files:
        chosen = choose_splits(by_split(place, files, split_names), source, split_names)
        if chosen["train"][0].suffix == ".tar":
            return {s: TarPairs(f, caption_column, cache, shard_window, skip_corrupt) for s, f in chosen.items()}
        return {s: PairList(files, image_column, caption_column, folder) for s, files in chosen.items()}
    available = open_tables(source, split_names, cache, cache_dir, hub_config, revision, f"`{TWEMOJI}`")
    chosen = choose_splits(available, source, split_names)
    if isinstance(chosen["train"], Path):
        raise TrunklineError(
            f"source={source} is a folder without captions; it needs .tar, .jsonl, .csv or .parquet files",
            field="data.source",
        )
    check_columns(chosen, source, {"image_column": image_column, "caption_column": caption_column})
    folder = folder or (Path(source) if Path(source).is_dir() else Path(source).parent)
    return {s: PairTable(t, image_column, caption_column, folder, f"{source} ({s})") for s, t in chosen.items()}
