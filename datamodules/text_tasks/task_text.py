"""What the datamodules of text tasks share: reading rows, splits, the tokenizer, special tokens, padding."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from trunkline import TrunklineError
from trunkline.contract import DataFacts
from trunkline.datamodules.base import TrunklineDataModule
from trunkline.datamodules.content_digest import value_text
from trunkline.datamodules.hub import NamedSource, TextSplits
from trunkline.datamodules.splits import check_fractions, shares_of, split_of
from trunkline.datamodules.tables import TABLES, kind, read_table
from trunkline.datamodules.text.masking import NAMES
from trunkline.datamodules.tokenizers import TRAINED, Vocabulary, check_room, end_of_text_id, load_tokenizer
from trunkline.files import load_checkpoint
from trunkline.run_folders import find_checkpoint


class Row(NamedTuple):
    """A row of a table."""

    number: int
    """Number of the row, which decides its split."""
    place: str
    """File and line, or row, for messages."""
    cells: Mapping[str, Any]
    """Column -> value."""


def table_files(source: NamedSource, suffixes: Sequence[str]) -> list[Path]:
    """The local files of a source: one file, or all files in a folder; an empty list for a hub name.

    Raises:
        TrunklineError: if a file is missing or has another suffix, or if a split is named, because files have none.
    """
    path, at = Path(source.name), f"data.{source.field}"
    if source.is_hub_name(suffixes):
        return []
    if not path.exists():
        raise TrunklineError(f"{source.field}={path}: there is no such file or folder; fix the path", at)
    source.refuse_split()
    files = [path]
    if path.is_dir():
        files = sorted(f for f in path.rglob("*") if f.is_file() and not f.name.startswith("."))
    wrong = [file for file in files if file.suffix not in suffixes]
    if wrong or not files:
        found = f"{wrong[0]} is none" if wrong else f"the folder {path} is empty"
        raise TrunklineError(f"{source.field} needs {', '.join(suffixes)} files, but {found}; fix the path", at)
    return files


def table_rows(source: NamedSource) -> Iterator[Row]:
    """All rows of a source of tables.

    Raises:
        TrunklineError: naming the broken file and row.
    """
    files = table_files(source, tuple(TABLES))
    pairs = chain.from_iterable(map(read_table, files)) if files else source.hub_rows()
    for number, (place, cells) in enumerate(pairs):
        yield Row(number, place, cells)


def cell(row: Row, column: str, field: str) -> Any:
    """The value of a row in a column; `field` is the field that named the column.

    Raises:
        TrunklineError: if there is no such column.
    """
    if column not in row.cells:
        names = ", ".join(map(str, row.cells))
        raise TrunklineError(f"{row.place} has no '{column}'; it has {names}; set {field}", f"data.{field}")
    return row.cells[column]


def text_cell(row: Row, column: str, field: str) -> str:
    """The value of a row in a column, which must be a text.

    Raises:
        TrunklineError: if there is no such column, or if the value is not a text.
    """
    value = cell(row, column, field)
    if not isinstance(value, str):
        raise TrunklineError(
            f"{row.place}: '{column}' is not a text but {kind(value)}; fix the row or set {field}", f"data.{field}"
        )
    return value


def class_name(value: Any, place: str, column: str, field: str) -> str:
    """Name of a class; the value is the name or a whole number.

    Raises:
        TrunklineError: for any other value.
    """
    if not isinstance(value, str | int) or value == "":
        what = "empty" if value == "" else f"not a name or a whole number but {kind(value)}"
        raise TrunklineError(f"{place}: '{column}' is {what}; fix the row or set {field}", f"data.{field}")
    return str(value)


def in_order(names: set[str]) -> list[str]:
    """Sort names of classes: by number if all are numbers, else by alphabet."""
    numbers = all(name.removeprefix("-").isdecimal() for name in names)
    return sorted(names, key=int) if numbers else sorted(names)


@dataclass
class Frame:
    """Ids of the special tokens around texts: `[CLS] a [SEP] b [SEP]`, or `a <|endoftext|> b <|endoftext|>`."""

    first: list[int]
    """`[CLS]`, or empty if the tokenizer has none."""
    end: int
    """`[SEP]` or `<|endoftext|>`."""
    pad: int

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "Frame":
        """The special tokens of a tokenizer.

        Raises:
            TrunklineError: if the tokenizer has no token that ends a text.
        """
        special = {}
        for role, names in NAMES.items():
            ids = [tokenizer.token_to_id(name) for name in names if tokenizer.token_to_id(name) is not None]
            special[role] = ids[0] if ids else None
        first, end = special["cls"], special["sep"]
        if first is None or end is None:
            first, end = None, end_of_text_id(tokenizer)
        return cls([] if first is None else [first], end, end if special["pad"] is None else special["pad"])


def cells_digest(rows: Sequence[Row]) -> str:
    """The short digest of all cells of rows; their texts are in memory, wherever they come from."""
    found = hashlib.blake2b(digest_size=8)
    for first in range(0, len(rows), 1000):  # many at once are faster than one by one
        found.update(value_text([dict(row.cells) for row in rows[first : first + 1000]]).encode())
    return found.hexdigest()


class Ragged:
    """Arrays of different lengths, stored in one array."""

    def __init__(self, parts: Sequence[Any], dtype: Any) -> None:
        self.values = np.concatenate([np.zeros(0, dtype), *(np.asarray(part, dtype) for part in parts)])
        self.ends = np.cumsum([0, *map(len, parts)])

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        return self.values[self.ends[index] : self.ends[index + 1]]


def padded(values: Any, length: int, fill: int) -> np.ndarray:
    """Pad values (n,) at the end with `fill` to (length,) int64."""
    result = np.full(length, fill, np.int64)
    result[: len(values)] = values
    return result


def row_length_of_checkpoint(name: str) -> int | None:
    """Tokens that the network of a training checkpoint sees at most; None for anything else that has a tokenizer."""
    file = find_checkpoint(name, "data.tokenizer", other="tokenizer.json")
    if file.suffix == ".json" or not file.is_file():
        return None
    network = load_checkpoint(file, mmap=True, field="data.tokenizer").get("hyper_parameters", {}).get("network") or {}
    for config in (network, network.get("bert"), network.get("gpt")):
        if config and config.get("max_length"):
            return int(config["max_length"])
    return None


@dataclass(kw_only=True, eq=False, repr=False)
class TaskTextData(Vocabulary, TextSplits, TrunklineDataModule):
    """Base of the labelled text datamodules: splits, the tokenizer, and what a checkpoint keeps.

    A subclass fills `datasets` in `setup` from `splits`, has a method `dataset` that `predict` uses too, and sets
    `setting_names`. The number of a row alone decides its split.
    """

    source: str = field(kw_only=False)
    """A table or a folder of tables, or a Hugging Face hub name (a split can follow after a colon)."""
    tokenizer: str = field()
    """A training checkpoint (.ckpt) that contains a tokenizer, a tokenizer.json or a hub name. No tokenizer is learnt
    here, because a network is fine-tuned with the tokenizer of its pre-training."""
    max_length: int | None = None  # type: ignore[assignment]  # `length` is never None
    """Number of tokens in a row, special tokens included; None is 128 (256 for tagged words), or as many as the network
    of the checkpoint in `tokenizer` sees, if they are fewer."""
    batch_size: int = 32

    setting_names: ClassVar[tuple[str, ...]] = ("max_length",)
    """Names of the fields that decide how a text becomes a row."""
    usual_length: ClassVar[int] = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokenizer in TRAINED:
            raise TrunklineError(
                f"tokenizer={self.tokenizer}: labelled data trains none; give the checkpoint (.ckpt) that the network "
                "starts from, a tokenizer.json or a hub name",
                field="data.tokenizer",
            )
        check_room(self.length)
        check_fractions(self.fractions)
        self.contents: dict[str, str] = {}
        """Split -> digest of all of its rows, known once they are read."""

    @cached_property
    def length(self) -> int:
        """T, the number of tokens in a row."""
        if self.max_length is not None:
            return self.max_length
        return min(self.usual_length, row_length_of_checkpoint(self.tokenizer) or self.usual_length)

    @property
    def in_memory(self) -> bool:
        return True  # rows are already tokenised

    @property
    def settings(self) -> dict[str, Any]:
        """The fields in `setting_names` and their values; a checkpoint keeps them."""
        return {name: getattr(self, name) for name in self.setting_names} | {"max_length": self.length}

    @cached_property
    def class_names(self) -> list[str]:
        """Names of the classes, in the order of the class numbers; empty if the task has no classes."""
        return []

    @property
    def facts(self) -> DataFacts:
        """Names of the classes, the tokenizer and its sizes; reads the rows, but does not tokenise them."""
        return replace(self.token_facts, class_names=self.class_names or None, max_length=self.length)

    def rows(self, source: NamedSource) -> Iterator[Row]:
        """The rows of a source; a subclass can read more formats."""
        return table_rows(source)

    @cached_property
    def splits(self) -> dict[str, list[Row]]:
        """Rows of each split; the number of a row alone decides its split.

        Raises:
            TrunklineError: if a source cannot be read, or if a split is empty.
        """
        shares = shares_of(self.fractions)
        splits: dict[str, list[Row]] = {split: [] for split in shares}
        sources = self.named_sources
        for row in self.rows(sources["train"]):
            splits[split_of(row.number, shares)].append(row)
        for split in ("val", "test"):
            if split in sources:
                splits[split] = list(self.rows(sources[split]))
        for split, rows in splits.items():
            if not rows:
                source_field = "val_source" if split == "train" else f"{split}_source"
                raise TrunklineError(
                    f"the {split} split of source={self.source} is empty; give more rows, or name a separate "
                    f"file with {source_field}",
                    field=f"data.{source_field}",
                )
        self.contents = {split: cells_digest(rows) for split, rows in splits.items()}
        return splits

    def data_key(self) -> dict[str, Any]:
        return self.contents

    @cached_property
    def vocabulary(self) -> Tokenizer:
        return load_tokenizer(self.tokenizer)

    def state_dict(self) -> dict[str, Any]:
        """All that `predict` needs: the tokenizer, the names of the classes, and how a text becomes a row."""
        return {**super().state_dict(), "class_names": self.class_names, "settings": self.settings}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Check that the checkpoint has the same tokenizer and classes.

        Raises:
            TrunklineError: if not, because then the ids mean other words or classes.
        """
        super().load_state_dict(state_dict)
        if state_dict["class_names"] != self.class_names:
            raise TrunklineError(
                f"the checkpoint knows the classes {', '.join(state_dict['class_names'])}, but the data has "
                f"{', '.join(self.class_names)}; give the data of that run",
                field="data.source",
            )
