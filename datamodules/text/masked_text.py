"""Text for masked language models: rows with hidden tokens, and pairs of texts."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from trunkline.contract import IGNORE, DataFacts
from trunkline.datamodules.samplers import SampleKey
from trunkline.datamodules.text.masking import Masker, MaskingConfig, masked_sentence
from trunkline.datamodules.text.packing import Blocks, cut_documents
from trunkline.datamodules.text.text_data import TokenisedText
from trunkline.datamodules.text.token_shards import TokenStream
from trunkline.datamodules.tokenizers import check_room

COUNTED_TOKENS = 100_000_000
"""Maximum number of tokens of the training split that are counted for the frequencies."""


@dataclass(kw_only=True, eq=False, repr=False)
class MaskedTextData(TokenisedText):
    """Text for masked language models, as `MaskedBatch`es. Each row begins with `[CLS]` and ends with `[SEP]`.

    Masks and pairs depend only on (seed, epoch, index); in evaluation they are the same each time. The tokenizer needs
    the tokens `[CLS]`, `[SEP]`, `[MASK]` and `[PAD]`.
    """

    tokenizer: str = "wordpiece"
    max_length: int = 128
    masking: MaskingConfig | None = None
    """Which tokens are hidden, and how."""
    next_sentence: bool = False
    """Make each row of two texts: a chunk of a document is cut in two, and in half of the rows the second part is
    replaced by text from another document."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_room(self.max_length)
        self.unigram_entropy = 0.0
        """Entropy of the token frequencies in the training split, in nats per token; known after `setup`."""

    @property
    def masker(self) -> Masker:
        """The `Masker` for the settings in `masking`."""
        return Masker(self.masking or MaskingConfig(), self.vocabulary)

    @property
    def facts(self) -> DataFacts:
        """Adds how to encode a sentence with a mask and, after `setup`, the entropy of the tokens."""
        return replace(
            super().facts,
            unigram_entropy=self.unigram_entropy or None,
            encode_masked=partial(masked_sentence, self.vocabulary),
        )

    @property
    def most_workers(self) -> int:
        return 1  # masking takes longer than sending a batch

    def setup(self, stage: str) -> None:
        """Open the prepared splits, and count how frequent each token is."""
        masker = self.masker
        super().setup(stage)
        if self.unigram_entropy == 0.0:
            self.unigram_entropy = entropy(self.preparation.stream("train"), masker)

    def make_rows(self, stream: TokenStream, train: bool) -> Dataset[Any]:
        masker = self.masker
        texts: Blocks | Pairs
        if self.next_sentence:
            texts = Pairs(stream, self.max_length - 3)
        else:
            texts = Blocks(stream, self.max_length - 2, self.seed if train else None, overlap=0)
        return MaskedRows(texts, masker, self.max_length, self.seed, fixed=not train)


class Pairs:
    """Chunks of documents, each cut in two at a random position.

    Args:
        stream: the tokens.
        length: maximum number of tokens in a chunk.
    """

    def __init__(self, stream: TokenStream, length: int) -> None:
        self.stream, self.length = stream, length
        ends = stream.document_ends() - 1  # without the end-of-text token
        begins = np.concatenate([[0], ends[:-1] + 1])
        starts, sizes = cut_documents(ends + 1, length)
        document = np.searchsorted(begins, starts, side="right") - 1
        sizes = np.minimum(starts + sizes, ends[document]) - starts
        can_be_cut = sizes >= 2
        self.starts, self.sizes, self.document = starts[can_be_cut], sizes[can_be_cut], document[can_be_cut]

    def __len__(self) -> int:
        return len(self.starts)

    def read(self, index: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray, bool]:
        """The first text, the second text, and whether the second follows the first in its document."""
        tokens = self._chunk(index)
        cut = int(generator.integers(1, len(tokens)))
        several_documents = len(self) > 1 and self.document[0] != self.document[-1]
        if not several_documents or generator.random() < 0.5:
            return tokens[:cut], tokens[cut:], True
        other = index
        while self.document[other] == self.document[index]:
            other = int(generator.integers(len(self)))
        return tokens[:cut], self._chunk(other)[: self.length - cut], False

    def _chunk(self, index: int) -> np.ndarray:
        start = int(self.starts[index])
        return self.stream.read(start, start + int(self.sizes[index]))


class MaskedRows(Dataset[dict[str, Any]]):
    """Items of `MaskedTextData`.

    Args:
        texts: single texts or pairs.
        masker: chooses and hides tokens.
        length: T.
        seed: seed of masks and pairs.
        fixed: use the same masks and pairs in each epoch.
    """

    def __init__(self, texts: Blocks | Pairs, masker: Masker, length: int, seed: int, fixed: bool) -> None:
        self.texts, self.masker, self.length, self.seed, self.fixed = texts, masker, length, seed, fixed

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, key: SampleKey) -> dict[str, Any]:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: list[SampleKey]) -> list[dict[str, Any]]:
        """The items of a batch, as a DataLoader asks for them.

        `mask` is left out if no row of the batch is padded. Pairs always have one: some of their batches need it, and a
        compiled network is compiled again where it comes or goes.
        """
        special, pair, shape = self.masker.special, isinstance(self.texts, Pairs), (len(keys), self.length)
        slots = self.masker.most(self.length - 3 if pair else self.length - 2)
        batch: dict[str, np.ndarray] = {
            "tokens": np.full(shape, special["pad"], np.int64),
            "positions": np.zeros((len(keys), slots), np.int64),
            "targets": np.full((len(keys), slots), IGNORE, np.int64),
            "segment": np.zeros(shape, np.int64),
        }
        if pair:
            batch["follows"] = np.full(len(keys), IGNORE, np.int64)
        sizes = [self._fill(batch, n, key) for n, key in enumerate(keys)]
        if pair or min(sizes) < self.length:
            batch["mask"] = np.arange(self.length) < np.array(sizes)[:, None]
        columns = {name: torch.from_numpy(values).unbind() for name, values in batch.items()}
        return [
            {**{name: values[n] for name, values in columns.items()}, "index": key.index, "valid": key.valid}
            for n, key in enumerate(keys)
        ]

    def _fill(self, batch: dict[str, np.ndarray], n: int, key: SampleKey) -> int:
        """Write row n of a batch, and return its number of tokens without padding."""
        generator = np.random.default_rng((self.seed, 0 if self.fixed else key.epoch, key.index))
        special, second, follows = self.masker.special, None, True
        if isinstance(self.texts, Pairs):
            first, second, follows = self.texts.read(key.index, generator)
        else:
            first = self.texts.read(key)
        tokens, middle = batch["tokens"][n], len(first) + 2
        tokens[0], tokens[1 : middle - 1], tokens[middle - 1] = special["cls"], first, special["sep"]
        size = middle
        if second is not None:
            size += len(second) + 1
            tokens[middle : size - 1], tokens[size - 1] = second, special["sep"]
            batch["segment"][n, middle:size] = 1
        whole = tokens[:size]
        chosen = self.masker.choose(whole, generator)
        if key.valid:
            batch["targets"][n, : len(chosen)] = whole[chosen]
            if second is not None:
                batch["follows"][n] = follows
        batch["positions"][n, : len(chosen)] = chosen
        whole[:] = self.masker.hide(whole, chosen, generator)
        return size


def without_full_masks(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of a batch; `mask` is left out if no row is padded."""
    if all(row["mask"].all() for row in rows):
        for row in rows:
            del row["mask"]
    return rows


def entropy(stream: TokenStream, masker: Masker) -> float:
    """Entropy of the frequencies of the ordinary (not special) tokens in a stream, in nats per token."""
    counts = np.zeros(len(masker.may_hide), np.int64)
    for start in range(0, min(len(stream), COUNTED_TOKENS), 1 << 22):
        tokens = stream.read(start, min(start + (1 << 22), len(stream)))
        counts += np.bincount(tokens, minlength=len(counts))[: len(counts)]
    frequency = counts[masker.may_hide].astype(float)
    frequency = frequency[frequency > 0] / frequency.sum()
    return float(-(frequency * np.log(frequency)).sum())
