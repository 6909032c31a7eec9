"""Sentences that have a tag for each word."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from tokenizers import Tokenizer
from torch.utils.data import Dataset

from trunkline import TrunklineError
from trunkline.contract import IGNORE
from trunkline.datamodules.hub import NamedSource
from trunkline.datamodules.samplers import SampleKey
from trunkline.datamodules.tables import TABLES, broken_text, kind, opened, read_table
from trunkline.datamodules.text_encoder import TextEncoder
from trunkline.datamodules.text_tasks.task_text import (
    Frame,
    Ragged,
    Row,
    TaskTextData,
    cell,
    class_name,
    in_order,
    padded,
    table_files,
    table_rows,
)

CONLL = (".conll", ".txt", ".bio", ".iob", ".iob2")


@dataclass(kw_only=True, eq=False, repr=False)
class TaggedTextData(TaskTextData):
    """Tagging data from tables (a list of words and a list of tags), CoNLL files or a hub name, as `TaggedBatch`es.

    A row is `[CLS]`, the sub-words of a sentence, `[SEP]`; with a GPT tokenizer the sub-words and `<|endoftext|>`. A
    sentence that is longer than `max_length` is an error: if it were cut, some of its words would not be counted.
    """

    source: str = field(kw_only=False)
    """A .jsonl or .parquet file, a CoNLL file (.conll, .txt, .bio, .iob; one word per line, its tag in the last column,
    an empty line after each sentence), or a folder of them; else a hub name (a split can follow after a colon)."""
    tokens_column: str = "tokens"
    """Column of a table that holds the list of words."""
    tags_column: str = "tags"
    """Column of a table that holds the list of tags, names or whole numbers."""

    setting_names: ClassVar[tuple[str, ...]] = ("max_length", "tokens_column")
    usual_length: ClassVar[int] = 256

    def rows(self, source: NamedSource) -> Iterator[Row]:
        """The sentences of a source."""
        files = table_files(source, (*TABLES, *CONLL))
        if not files:
            yield from table_rows(source)
            return
        columns = self.tokens_column, self.tags_column
        pairs = chain.from_iterable(read_conll(f, *columns) if f.suffix in CONLL else read_table(f) for f in files)
        for number, (place, cells) in enumerate(pairs):
            yield Row(number, place, cells)

    def _words(self, row: Row) -> list[str]:
        return list_cell(row, self.tokens_column, "tokens_column", str)

    def _tags(self, row: Row) -> list[str]:
        column = self.tags_column
        values = list_cell(row, column, "tags_column", str | int)
        return [class_name(value, row.place, column, "tags_column") for value in values]

    @cached_property
    def tags(self) -> dict[str, list[list[str]]]:
        """Tags of each row, by split."""
        return {split: [self._tags(row) for row in rows] for split, rows in self.splits.items()}

    @cached_property
    def class_names(self) -> list[str]:
        """The different tags of the training rows, in the order of the class numbers.

        Raises:
            TrunklineError: if there is only one.
        """
        names = in_order(set(chain.from_iterable(self.tags["train"])))
        if len(names) < 2:
            raise TrunklineError(
                f"the training rows have fewer than two different tags ({names}); set tags_column",
                field="data.tags_column",
            )
        return names

    def setup(self, stage: str) -> None:
        """Read and tokenise all rows.

        Raises:
            TrunklineError: if a sentence is too long or has another number of tags than words, or if no training row
                has one of its tags.
        """
        if self.datasets:
            return
        numbers = {name: number for number, name in enumerate(self.class_names)}
        for split, rows in self.splits.items():
            for row, row_tags in zip(rows, self.tags[split], strict=True):
                unknown = next((tag for tag in row_tags if tag not in numbers), None)
                if unknown is not None:
                    raise TrunklineError(
                        f"{row.place} ({split} split): no training row has the tag '{unknown}', but "
                        f"{', '.join(self.class_names[:5])}{', …' if len(numbers) > 5 else ''}; fix the row, or give "
                        "training rows with this tag",
                        field="data.tags_column",
                    )
            self.datasets[split] = self.dataset(rows, [[numbers[tag] for tag in tags] for tags in self.tags[split]])
        del self.splits, self.tags
        self.compare_tokenizers()

    def dataset(self, rows: Sequence[Row], tags: Sequence[Sequence[int]]) -> "TaggedRows":
        """Tokenise rows; `tags` has a tag number for each word of each row.

        Raises:
            TrunklineError: if a sentence is too long or has another number of tags than words.
        """
        words, frame = WordEncoder(self.vocabulary), Frame.of(self.vocabulary)
        room = self.length - len(frame.first) - 1
        ids, targets = [], []
        for row, row_tags in zip(rows, tags, strict=True):
            tokens, first = words.encode(self._words(row), row.place)
            if len(first) != len(row_tags):
                raise TrunklineError(f"{row.place} has {len(first)} words, but {len(row_tags)} tags; fix the row")
            if len(tokens) > room:
                raise TrunklineError(
                    f"{row.place} has {len(tokens)} sub-words, but there is room for {room}; set max_length to at "
                    f"least {len(tokens) + self.length - room}, or cut this sentence in two",
                    field="data.max_length",
                )
            target = np.full(len(tokens), IGNORE)
            target[first] = row_tags
            ids.append(tokens)
            targets.append(target)
        return TaggedRows(ids, targets, frame, self.length)


class WordEncoder:
    """Encodes sentences that are already split into words: each word alone, as the library does with `is_pretokenized`.

    Byte-level tokenizers recognise the beginning of a word by the space before it, so words after the first get one.

    Args:
        tokenizer: the tokenizer; it is not changed.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.encoder = TextEncoder(tokenizer)
        before = json.dumps(json.loads(tokenizer.to_str())["pre_tokenizer"])
        self.space = " " if '"ByteLevel"' in before and '"add_prefix_space": true' not in before else ""
        self.unknown = next((n for t in ("[UNK]", "<unk>") if (n := tokenizer.token_to_id(t)) is not None), None)

    def encode(self, words: list[str], place: str) -> tuple[np.ndarray, np.ndarray]:
        """(N,) ids of a sentence, and (words,) the position of the first id of each word.

        Raises:
            TrunklineError: if the tokenizer makes no token of a word, and has no `[UNK]` to use instead.
        """
        spaced = [word if i == 0 else self.space + word for i, word in enumerate(words)]
        ids, counts = self.encoder.encode(spaced)
        empty = (counts == 0).nonzero()[0]
        if len(empty):
            if self.unknown is None:
                raise TrunklineError(f"{place}: the tokenizer makes no token of word {empty[0]}, {words[empty[0]]!r}; "
                                     "fix the row")  # fmt: skip
            ids = np.insert(ids, counts.cumsum()[empty], self.unknown)
            counts[empty] = 1
        return ids, counts.cumsum() - counts


class TaggedRows(Dataset[dict[str, Any]]):
    """Items of `TaggedTextData`.

    Args:
        ids: ids of each sentence.
        targets: target of each id: the tag number at the first id of a word, `IGNORE` elsewhere.
        frame: special tokens around a sentence.
        length: T.
    """

    def __init__(self, ids: list[np.ndarray], targets: list[np.ndarray], frame: Frame, length: int) -> None:
        self.ids, self.targets = Ragged(ids, np.uint32), Ragged(targets, np.int32)
        self.frame, self.length = frame, length

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, key: SampleKey) -> dict[str, Any]:
        frame = self.frame
        row = np.concatenate([frame.first, self.ids[key.index], [frame.end]])
        targets = np.concatenate([[IGNORE] * len(frame.first), self.targets[key.index]])
        return {
            "tokens": torch.from_numpy(padded(row, self.length, frame.pad)),
            "mask": torch.arange(self.length) < len(row),
            "targets": torch.from_numpy(padded(targets, self.length, IGNORE)),
            "index": key.index,
            "valid": key.valid,
        }


def list_cell(row: Row, column: str, field: str, kinds: Any) -> list[Any]:
    """The value of a row in a column, which must be a list of values of the types `kinds`, and not empty.

    Raises:
        TrunklineError: if it is not.
    """
    value = cell(row, column, field)
    if not isinstance(value, list) or not value:
        what = "an empty list" if value == [] else f"not a list but {kind(value)}"
        raise TrunklineError(f"{row.place}: '{column}' is {what}; fix the row or set {field}", f"data.{field}")
    wrong = next((v for v in value if not isinstance(v, kinds)), None)
    if wrong is not None or None in value:
        raise TrunklineError(
            f"{row.place}: '{column}' holds a {kind(wrong)} where each must be a name or a number; fix the row or set "
            f"{field}",
            f"data.{field}",
        )
    return value


def read_conll(file: Path, tokens: str, tags: str | None) -> Iterator[tuple[str, dict[str, list[str]]]]:
    """Sentences of a CoNLL file: (file and line of the first word, cells with the words and tags).

    Args:
        file: has one word per line, with its tag in the last column, and an empty line after each sentence.
        tokens: column name for the words.
        tags: column name for the tags; None reads only the words.

    Raises:
        TrunklineError: for a line that has no tag.
    """
    words: list[tuple[str, str]] = []
    begin = 0
    with opened(file) as stream:
        for number, line in enumerate(chain(stream, [b""]), start=1):
            try:
                cells = line.decode("utf-8-sig").split()
            except UnicodeDecodeError as error:
                raise broken_text(file) from error
            if not cells or cells[0] == "-DOCSTART-":
                if words:
                    sentence = {tokens: [w for w, _ in words]}
                    yield f"{file}:{begin}", sentence if tags is None else {**sentence, tags: [t for _, t in words]}
                    words = []
                continue
            if len(cells) < 2 and tags is not None:
                raise TrunklineError(
                    f"{file}:{number} has one column; each line must be a word and its tag, with a space or tab between"
                )
            begin = begin if words else number
            words.append((cells[0], cells[-1]))
