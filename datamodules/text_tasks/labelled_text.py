"""Texts, or pairs of texts, with one label each."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from trunkline import TrunklineError
from trunkline.datamodules.samplers import SampleKey
from trunkline.datamodules.text.text_sources import emoji
from trunkline.datamodules.text_tasks.task_text import (
    Frame,
    Ragged,
    Row,
    Source,
    TaskTextData,
    class_name,
    in_order,
    padded,
    text_cell,
)
from trunkline.datamodules.text_tasks.task_text import cell as cell_of
from trunkline.datamodules.tokenizers import TextEncoder

EMOJI = "emoji"


class LabelledTextData(TaskTextData):
    """Classification data from local tables, a hub name, or the offline source `emoji` (names in 14 languages).

    Batches: `tokens` (B, T) int64, `[CLS] a [SEP]` or `[CLS] a [SEP] b [SEP]`, or with a tokenizer of a GPT `a
    <|endoftext|>`; `segment` (B, T) int64, 1 for the second text; `mask` (B, T) bool, False for padding; `label` (B,)
    int64, a number in `class_names`; `index` (B,) row numbers in the split; `valid` (B,) bool. Texts that are too
    long lose their end, the longer one of a pair first.

    Rows go to a split by their number alone, those of `emoji` by concept, as in `TextData`: what a network was
    pre-trained on with the same fractions is never tested.

    Args:
        path: a .jsonl, .csv or .parquet file or a folder of such; `emoji`; else a Hugging Face hub name, with a split
            after a colon or without.
        tokenizer: a training checkpoint (.ckpt), whose tokenizer is taken; a tokenizer.json or a hub name.
        text_column: of the text.
        pair_column: of the second text of a pair.
        label_column: of the label, a name or a whole number.
        train_rows: use no more rows than these for training, as evenly by class as may be, drawn with `seed`.
        vocab_size: what the network gets; None takes the tokenizer's own.
        max_length: T, tokens of a row with the special ones.
        val_fraction: share of the rows set aside for validation.
        test_fraction: the same for testing.
        val_path: a source of its own instead of `val_fraction`.
        test_path: the same for testing.
        hub_config: configuration of a hub dataset.
        hub_split: its split that is read.
        revision: its commit.
        batch_size: see `TrunklineDataModule`, as the next three.
        eval_batch_size: see there.
        num_workers: see there.
        seed: see there.
    """

    def __init__(
        self,
        path: str,
        tokenizer: str,
        text_column: str = "text",
        pair_column: str | None = None,
        label_column: str = "label",
        train_rows: int | None = None,
        vocab_size: int | None = None,
        max_length: int = 128,
        val_fraction: float = 0.1,
        test_fraction: float = 0.0,
        val_path: str | None = None,
        test_path: str | None = None,
        hub_config: str | None = None,
        hub_split: str = "train",
        revision: str | None = None,
        batch_size: int = 32,
        eval_batch_size: int | None = None,
        num_workers: int | None = None,
        seed: int = 0,
    ) -> None:
        paths = {"path": path, "val_path": val_path, "test_path": test_path}
        hub = (hub_config, hub_split, revision)
        fractions = {"val": val_fraction, "test": test_fraction}
        loading = (batch_size, eval_batch_size, num_workers, seed)
        super().__init__(paths, hub, fractions, tokenizer, vocab_size, max_length, loading)
        self.text_column, self.pair_column, self.label_column = text_column, pair_column, label_column
        self.train_rows = train_rows
        self.settings |= {"text_column": text_column, "pair_column": pair_column}

    def rows(self, source: Source) -> Iterator[Row]:
        """Rows of a source."""
        if source.name != EMOJI:
            yield from source.rows()
            return
        for concept, language, text in emoji().names():
            place = f"emoji, concept {concept} in {language}"
            yield Row(concept, place, {self.text_column: text, self.label_column: language})

    def texts(self, row: Row) -> Iterator[str]:
        """One or two."""
        yield text_cell(row, self.text_column, "text_column")
        if self.pair_column is not None:
            yield text_cell(row, self.pair_column, "pair_column")

    def read(self) -> dict[str, tuple[list[Row], np.ndarray]]:
        """Rows and (N,) numbers of their classes, by split; makes `class_names`.

        Raises:
            TrunklineError: for a label that is none, one that training does not have, or too few rows.
        """
        labels = {split: [self._label(row) for row in rows] for split, rows in self.splits.items()}
        self.class_names = in_order(set(labels["train"]))
        if len(self.class_names) < 2:
            raise TrunklineError(
                f"the training rows have one class only, {self.class_names[0]}; set --data.label_column, or give rows "
                "of others"
            )
        numbers = {name: number for number, name in enumerate(self.class_names)}
        result = {}
        for split, rows in self.splits.items():
            for row, label in zip(rows, labels[split], strict=True):
                if label not in numbers:
                    raise TrunklineError(
                        f"{row.place} ({split} split): no training row has the label '{label}', but "
                        f"{', '.join(self.class_names[:5])}{', …' if len(numbers) > 5 else ''}; mend the row, or give "
                        "training rows with this label"
                    )
            result[split] = rows, np.array([numbers[label] for label in labels[split]])
        if self.train_rows is not None:
            rows, classes = result["train"]
            if not 1 <= self.train_rows <= len(rows):
                raise TrunklineError(f"--data.train_rows {self.train_rows} must be 1 to {len(rows)}, all there are")
            chosen = evenly(classes, self.train_rows, self.seed)
            result["train"] = [rows[i] for i in chosen], classes[chosen]
        return result

    def _label(self, row: Row) -> str:
        return class_name(cell_of(row, self.label_column, "label_column"), row.place, self.label_column, "label_column")

    def setup(self, stage: str) -> None:
        """Read and tokenise all rows.

        Raises:
            TrunklineError: as `read` has it.
        """
        if self.datasets:
            return
        for split, (rows, classes) in self.read().items():
            self.datasets[split] = self.dataset(rows, classes)
        del self.splits  # texts take more room than tokens

    def dataset(self, rows: Sequence[Row], classes: np.ndarray) -> "LabelledRows":
        """Tokenise rows; `classes` are (N,) numbers."""
        frame, encoder = Frame.of(self.tokenizer), TextEncoder(self.tokenizer)
        texts = [list(self.texts(row)) for row in rows]
        columns = [Ragged(encode_each(encoder, list(column)), np.uint32) for column in zip(*texts, strict=True)]
        return LabelledRows(columns, classes, frame, self.max_length)


def encode_each(encoder: TextEncoder, texts: list[str]) -> list[np.ndarray]:
    """Ids of each text."""
    ids, counts = encoder.encode(texts)
    return np.split(ids, counts.cumsum()[:-1])


def evenly(classes: np.ndarray, count: int, seed: int) -> np.ndarray:
    """(count,) ascending places in (N,) classes, as many of each class as of the others as long as there are any."""
    order = np.random.default_rng(seed).permutation(len(classes))
    shuffled = classes[order]
    rank = np.zeros(len(classes), np.int64)  # how many of its class come before
    for number in np.unique(classes):
        own = shuffled == number
        rank[own] = np.arange(own.sum())
    return np.sort(order[np.argsort(rank, kind="stable")[:count]])


def truncated(first: np.ndarray, second: np.ndarray | None, room: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Texts without their ends, so that both have room; the longer one loses first."""
    if second is None:
        return first[:room], None
    short = min(len(second), room // 2)
    first = first[: max(room - len(second), room - short)] if len(first) + len(second) > room else first
    return first, second[: room - len(first)]


class LabelledRows(Dataset[dict[str, Any]]):
    """Items of `LabelledTextData`.

    Args:
        columns: ids of the first and, with pairs, of the second texts.
        classes: (N,) numbers.
        frame: special tokens.
        length: T.
    """

    def __init__(self, columns: list[Ragged], classes: np.ndarray, frame: Frame, length: int) -> None:
        self.columns, self.classes, self.frame, self.length = columns, classes, frame, length
        self.room = length - len(frame.first) - len(columns)
        self.cut = int((np.sum([np.diff(column.ends) for column in columns], axis=0) > self.room).sum())
        """Rows that lose an end."""

    def __len__(self) -> int:
        return len(self.classes)

    def __getitem__(self, key: SampleKey) -> dict[str, Any]:
        """The item of a key."""
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
