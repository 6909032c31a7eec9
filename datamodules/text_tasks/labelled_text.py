"""Texts, or pairs of texts, each with one label."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from torch.utils.data import Dataset

from trunkline import TrunklineError
from trunkline.datamodules.hub import NamedSource
from trunkline.datamodules.samplers import SampleKey
from trunkline.datamodules.text.text_sources import emoji
from trunkline.datamodules.text_encoder import TextEncoder
from trunkline.datamodules.text_tasks.task_text import (
    Frame,
    Ragged,
    Row,
    TaskTextData,
    class_name,
    in_order,
    padded,
    table_rows,
    text_cell,
)
from trunkline.datamodules.text_tasks.task_text import cell as cell_of

EMOJI = "emoji"


@dataclass(kw_only=True, eq=False, repr=False)
class LabelledTextData(TaskTextData):
    """Labelled texts or pairs of texts, as `TextBatch`es, from local tables, a hub name, or the offline source `emoji`.

    `emoji` has names of emoji in 14 languages; the label of a name is its language.

    A row is `[CLS] a [SEP]` or `[CLS] a [SEP] b [SEP]`, or with a GPT tokenizer `a <|endoftext|>`. Texts that are too
    long lose their end; in a pair the longer text is cut first.

    The number of a row (for `emoji` the number of its concept) alone decides its split, as in `TextData`: with the same
    fractions, no row of the test split was in the pre-training.
    """

    source: str = field(kw_only=False)
    """A .jsonl, .csv or .parquet file or a folder of them; `emoji`; else a Hugging Face hub name (a split can follow
    after a colon)."""
    text_column: str = "text"
    """Column that holds the text."""
    pair_column: str | None = None
    """Column that holds the second text of a pair; None if there are no pairs."""
    label_column: str = "label"
    """Column that holds the label, a name or a whole number."""
    train_rows: int | None = None
    """Number of rows for training, drawn at random with `seed`, with equal numbers of each class where possible; None
    uses all rows."""

    setting_names: ClassVar[tuple[str, ...]] = ("max_length", "text_column", "pair_column")

    def rows(self, source: NamedSource) -> Iterator[Row]:
        if source.name != EMOJI:
            yield from table_rows(source)
            return
        source.refuse_split()
        for concept, language, text in emoji().names():
            place = f"emoji, concept {concept} in {language}"
            yield Row(concept, place, {self.text_column: text, self.label_column: language})

    def texts(self, row: Row) -> Iterator[str]:
        """The text of a row, or both texts of a pair."""
        yield text_cell(row, self.text_column, "text_column")
        if self.pair_column is not None:
            yield text_cell(row, self.pair_column, "pair_column")

    @cached_property
    def labels(self) -> dict[str, list[str]]:
        """Label of each row, by split."""
        return {split: [self._label(row) for row in rows] for split, rows in self.splits.items()}

    @cached_property
    def class_names(self) -> list[str]:
        """The different labels of the training rows, in the order of the class numbers.

        Raises:
            TrunklineError: if there is only one.
        """
        names = in_order(set(self.labels["train"]))
        if len(names) < 2:
            raise TrunklineError(
                f"the training rows have one class only, {names[0]}; set label_column, or give rows of others",
                field="data.label_column",
            )
        return names

    def read(self) -> dict[str, tuple[list[Row], np.ndarray]]:
        """Rows and their (N,) class numbers, by split.

        Raises:
            TrunklineError: for an invalid label, for a label that no training row has, or if there are too few rows.
        """
        numbers = {name: number for number, name in enumerate(self.class_names)}
        result = {}
        for split, rows in self.splits.items():
            for row, label in zip(rows, self.labels[split], strict=True):
                if label not in numbers:
                    raise TrunklineError(
                        f"{row.place} ({split} split): no training row has the label '{label}', but "
                        f"{', '.join(self.class_names[:5])}{', …' if len(numbers) > 5 else ''}; fix the row, or give "
                        "training rows with this label",
                        field="data.label_column",
                    )
            result[split] = rows, np.array([numbers[label] for label in self.labels[split]])
        if self.train_rows is not None:
            rows, classes = result["train"]
            if not 1 <= self.train_rows <= len(rows):
                raise TrunklineError(
                    f"train_rows={self.train_rows} must be 1 to {len(rows)}, all there are", field="data.train_rows"
                )
            chosen = evenly(classes, self.train_rows, self.seed)
            result["train"] = [rows[i] for i in chosen], classes[chosen]
        return result

    def _label(self, row: Row) -> str:
        return class_name(cell_of(row, self.label_column, "label_column"), row.place, self.label_column, "label_column")

    def setup(self, stage: str) -> None:
        """Read and tokenise all rows.

        Raises:
            TrunklineError: the errors of `read`.
        """
        if self.datasets:
            return
        for split, (rows, classes) in self.read().items():
            self.datasets[split] = self.dataset(rows, classes)
        del self.splits, self.labels  # texts take more room than tokens
        self.compare_tokenizers()

    def dataset(self, rows: Sequence[Row], classes: np.ndarray) -> "LabelledRows":
        """Tokenise rows; `classes` are their (N,) class numbers."""
        frame, encoder = Frame.of(self.vocabulary), TextEncoder(self.vocabulary)
        texts = [list(self.texts(row)) for row in rows]
        columns = [Ragged(encode_each(encoder, list(column)), np.uint32) for column in zip(*texts, strict=True)]
        return LabelledRows(columns, classes, frame, self.length)


def encode_each(encoder: TextEncoder, texts: list[str]) -> list[np.ndarray]:
    """Ids of each text."""
    ids, counts = encoder.encode(texts)
    return np.split(ids, counts.cumsum()[:-1])


def evenly(classes: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Draw `count` of N rows at random, with equal numbers of each class as long as a class has rows left.

    Args:
        classes: (N,) class numbers of the rows.
        count: number of rows to draw.
        seed: seed of the choice.

    Returns:
        (count,) row numbers, ascending.
    """
    order = np.random.default_rng(seed).permutation(len(classes))
    shuffled = classes[order]
    rank = np.zeros(len(classes), np.int64)  # number of earlier rows of the same class
    for number in np.unique(classes):
        same = shuffled == number
        rank[same] = np.arange(same.sum())
    return np.sort(order[np.argsort(rank, kind="stable")[:count]])


def truncated(first: np.ndarray, second: np.ndarray | None, room: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Cut two texts at their ends, so that together they have at most `room` tokens; the longer one is cut first."""
    if second is None:
        return first[:room], None
    short = min(len(second), room // 2)
    first = first[: max(room - len(second), room - short)] if len(first) + len(second) > room else first
    return first, second[: room - len(first)]


class LabelledRows(Dataset[dict[str, Any]]):
    """Items of `LabelledTextData`.

    Args:
        columns: ids of the texts; of pairs the first texts, then the second texts.
        classes: (N,) class numbers.
        frame: special tokens around the texts.
        length: T.
    """

    def __init__(self, columns: list[Ragged], classes: np.ndarray, frame: Frame, length: int) -> None:
        self.columns, self.classes, self.frame, self.length = columns, classes, frame, length
        self.room = length - len(frame.first) - len(columns)
        self.cut = int((np.sum([np.diff(column.ends) for column in columns], axis=0) > self.room).sum())
        """Number of rows in which a text loses its end."""

    def __len__(self) -> int:
        return len(self.classes)

    def __getitem__(self, key: SampleKey) -> dict[str, Any]:
        frame, texts = self.frame, [column[key.index] for column in self.columns]
        first, second = truncated(texts[0], texts[1] if len(texts) > 1 else None, self.room)
        row = np.concatenate([frame.first, first, [frame.end], *([] if second is None else [second, [frame.end]])])
        begin = len(frame.first) + len(first) + 1
        places = np.arange(self.length)
        return {
            "tokens": torch.from_numpy(padded(row, self.length, frame.pad)),
            "segment": torch.from_numpy(((places >= begin) & (places < len(row))).astype(np.int64)),
            "mask": torch.from_numpy(places < len(row)),
            "label": int(self.classes[key.index]),
            "index": key.index,
            "valid": key.valid,
        }
