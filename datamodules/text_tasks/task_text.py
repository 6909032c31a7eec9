"""What the datamodules of tasks on text share: rows with their places, splits, tokenizer, padding."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from trunkline import TrunklineError
from trunkline.datamodules.base import TrunklineDataModule
from trunkline.datamodules.splits import check_fractions, shares_of, split_of
from trunkline.datamodules.tables import TABLES, kind, read_table
from trunkline.datamodules.text.masking import NAMES
from trunkline.datamodules.text.text_sources import HUB_NAME, hub_rows
from trunkline.datamodules.tokenizers import TRAINED, TokenizerState, end_of_text_id, load_tokenizer


class Row(NamedTuple):
    """A row and where it stands."""

    number: int
    """Decides the split."""
    place: str
    """For messages: file and line, or row."""
    cells: Mapping[str, Any]


@dataclass
class Source:
    """Names a source of rows: a path or hub name, the flag that gave it, and what a hub needs."""

    name: str
    flag: str
    hub_config: str | None
    hub_split: str
    revision: str | None

    def files(self, suffixes: Sequence[str]) -> list[Path]:
        """The local files of this name, all those in a folder; none for a hub name.

        Raises:
            TrunklineError: if there is no such file, or one of another kind.
        """
        path = Path(self.name)
        if not path.exists():
            if path.suffix in suffixes or not HUB_NAME.fullmatch(self.name.partition(":")[0]):
                raise TrunklineError(f"--data.{self.flag} {self.name}: there is no such file or folder; mend the path")
            return []
        files = [path]
        if path.is_dir():
            files = sorted(f for f in path.rglob("*") if f.is_file() and not f.name.startswith("."))
        wrong = [file for file in files if file.suffix not in suffixes]
        if wrong or not files:
            found = f"{wrong[0]} is none" if wrong else f"the folder {path} is empty"
            raise TrunklineError(f"--data.{self.flag} needs {', '.join(suffixes)} files, but {found}; mend the path")
        return files

    def rows(self) -> Iterator[Row]:
        """All rows of a table.

        Raises:
            TrunklineError: naming the file and row that is broken.
        """
        files = self.files(tuple(TABLES))
        name, _, split = self.name.partition(":")  # `owner/name:validation` means another split than `hub_split`
        pairs: Iterable[tuple[str, Mapping[str, Any]]] = chain.from_iterable(map(read_table, files))
        if not files:
            pairs = hub_rows(name, self.hub_config, split or self.hub_split, self.revision, self.flag)
        for number, (place, cells) in enumerate(pairs):
            yield Row(number, place, cells)


def cell(row: Row, column: str, flag: str) -> Any:
    """One value of a row.

    Raises:
        TrunklineError: if there is no such column.
    """
    if column not in row.cells:
        names = ", ".join(map(str, row.cells))
        raise TrunklineError(f"{row.place} has no '{column}'; it has {names}; set --data.{flag}")
    return row.cells[column]


def text_cell(row: Row, column: str, flag: str) -> str:
    """One value of a row that must be a text."""
    value = cell(row, column, flag)
    if not isinstance(value, str):
        raise TrunklineError(f"{row.place}: '{column}' is no text but {kind(value)}; mend the row or set --data.{flag}")
    return value


def class_name(value: Any, place: str, column: str, flag: str) -> str:
    """The name of a class that is given by name or by number.

    Raises:
        TrunklineError: for anything else.
    """
    if not isinstance(value, str | int) or value == "":
        what = "empty" if value == "" else f"no name or whole number but {kind(value)}"
        raise TrunklineError(f"{place}: '{column}' is {what}; mend the row or set --data.{flag}")
    return str(value)


def in_order(names: set[str]) -> list[str]:
    """Numbers by size, else names by alphabet."""
    numbers = all(name.removeprefix("-").isdecimal() for name in names)
    return sorted(names, key=int) if numbers else sorted(names)


@dataclass
class Frame:
    """The special tokens around texts: `[CLS] a [SEP] b [SEP]`, or without [CLS] `a <|endoftext|> b <|endoftext|>`."""

    first: list[int]
    """`[CLS]`, or nothing."""
    end: int
    pad: int

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "Frame":
        """As a tokenizer has them.

        Raises:
            TrunklineError: if it has none that ends a text.
        """
        found = {}
        for role, names in NAMES.items():
            ids = [tokenizer.token_to_id(name) for name in names if tokenizer.token_to_id(name) is not None]
            found[role] = ids[0] if ids else None
        first, end = found["cls"], found["sep"]
        if first is None or end is None:
            first, end = None, end_of_text_id(tokenizer)
        return cls([] if first is None else [first], end, end if found["pad"] is None else found["pad"])


class Ragged:
    """Arrays of different lengths in one."""

    def __init__(self, parts: Sequence[Any], dtype: Any) -> None:
        self.values = np.concatenate([np.zeros(0, dtype), *(np.asarray(part, dtype) for part in parts)])
        self.ends = np.cumsum([0, *map(len, parts)])

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        return self.values[self.ends[index] : self.ends[index + 1]]


def padded(values: Any, length: int, fill: int) -> np.ndarray:
    """(n,) -> (length,) int64."""
    result = np.full(length, fill, np.int64)
    result[: len(values)] = values
    return result


class TaskTextData(TokenizerState, TrunklineDataModule):
    """Base of the labelled text datamodules: splits, tokenizer, what a checkpoint keeps.

    A subclass fills `datasets` and `class_names` in `setup` from `splits`, has a `dataset` that `predict` uses too, and
    adds to `settings`.

    Args:
        paths: where the rows are, by `path`, `val_path` and `test_path`; None is absent.
        hub: configuration, split and revision of a hub dataset.
        fractions: val and test -> share of `path`'s rows.
        tokenizer: see `load_tokenizer`; none is trained here, because a network is fine-tuned with the one that it
            was pre-trained with.
        vocab_size: what the network gets; None takes the tokenizer's own.
        max_length: T, tokens of a row.
        loading: arguments of `TrunklineDataModule`.
    """

    in_memory = True

    def __init__(
        self,
        paths: dict[str, str | None],
        hub: tuple[str | None, str, str | None],
        fractions: dict[str, float],
        tokenizer: str,
        vocab_size: int | None,
        max_length: int,
        loading: tuple[int, int | None, int | None, int],
    ) -> None:
        super().__init__(*loading)
        if tokenizer in TRAINED:
            raise TrunklineError(
                f"--data.tokenizer {tokenizer}: labelled data trains none; give the checkpoint (.ckpt) that the "
                "network starts from, a tokenizer.json or a hub name"
            )
        if max_length < 5:
            raise TrunklineError(f"--data.max_length {max_length} leaves no room for text beside the special tokens")
        self.sources = {flag: Source(name, flag, *hub) for flag, name in paths.items() if name}
        self.fractions = {s: 0.0 if f"{s}_path" in self.sources else fraction for s, fraction in fractions.items()}
        check_fractions(self.fractions)
        self.tokenizer_name, self.declared_size, self.max_length = tokenizer, vocab_size, max_length
        self.settings: dict[str, Any] = {"max_length": max_length}
        """Arguments that decide how a text becomes a row."""
        self.class_names: list[str] = []
        """After `setup`."""

    def rows(self, source: Source) -> Iterator[Row]:
        """Rows of a source; a subclass adds formats."""
        return source.rows()

    @cached_property
    def splits(self) -> dict[str, list[Row]]:
        """Rows of each split; by their number alone.

        Raises:
            TrunklineError: if a source cannot be read, or a split comes out empty.
        """
        shares = shares_of(self.fractions)
        splits: dict[str, list[Row]] = {split: [] for split in shares}
        for row in self.rows(self.sources["path"]):
            splits[split_of(row.number, shares)].append(row)
        for split in ("val", "test"):
            if f"{split}_path" in self.sources:
                splits[split] = list(self.rows(self.sources[f"{split}_path"]))
        for split, rows in splits.items():
            if not rows:
                own = "val_path" if split == "train" else f"{split}_path"
                raise TrunklineError(
                    f"the {split} split of --data.path {self.sources['path'].name} comes out empty; give more rows, or "
                    f"name a file of its own with --data.{own}"
                )
        return splits

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Read at the first use."""
        return load_tokenizer(self.tokenizer_name)

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding that a network needs: as declared, else the tokenizer's size.

        Raises:
            TrunklineError: if that is declared too small.
        """
        self.check_size()
        return super().vocab_size

    def state_dict(self) -> dict[str, Any]:
        """All that `predict` needs: tokenizer, names of the classes, and how a text becomes a row."""
        return {**super().state_dict(), "class_names": self.class_names, "settings": self.settings}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Compare a checkpoint's tokenizer and classes with these.

        Raises:
            TrunklineError: if they differ, for then the ids mean other words or classes.
        """
        super().load_state_dict(state_dict)
        if state_dict["class_names"] != self.class_names:
            raise TrunklineError(
                f"the checkpoint knows the classes {', '.join(state_dict['class_names'])}, but the data has "
                f"{', '.join(self.class_names)}; give the data of that run"
            )
