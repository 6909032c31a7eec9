"""T5's pre-training data: spans of a text are hidden in the source, and the target says what they were."""

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import count, takewhile
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch.utils.data import Dataset

from trunkline import TrunklineError
from trunkline.contract import IGNORE, DataFacts
from trunkline.datamodules.samplers import SampleKey
from trunkline.datamodules.text.masked_text import without_full_masks
from trunkline.datamodules.text.packing import Blocks
from trunkline.datamodules.text.text_data import TokenisedText
from trunkline.datamodules.text.token_shards import TokenStream
from trunkline.datamodules.tokenizers import PADDING, check_room, end_of_text_id, sentinel


@dataclass(frozen=True)
class SpanCorruption:
    """How much of a text is hidden, and in how many spans (arXiv:1910.10683).

    Args:
        noise_density: share of the tokens that is hidden.
        mean_span: mean number of tokens in a span.

    Raises:
        TrunklineError: if one of them is out of range, or if there would be fewer visible tokens than spans.
    """

    noise_density: float = 0.15
    mean_span: float = 3.0

    def __post_init__(self) -> None:
        if not 0 < self.noise_density < 1:
            raise TrunklineError(
                f"noise_density={self.noise_density} must lie between 0 and 1", field="data.noise_density"
            )
        if self.mean_span < 1:
            raise TrunklineError(f"mean_span={self.mean_span} must be at least 1", field="data.mean_span")
        if self.noise_density / self.mean_span > 1 - self.noise_density:
            raise TrunklineError(
                f"noise_density={self.noise_density} with mean_span={self.mean_span} leaves too few tokens to keep the "
                "spans apart; lower noise_density, or raise mean_span",
                field="data.noise_density",
            )

    def counts(self, length: int) -> tuple[int, int]:
        """How many of `length` tokens are hidden, and in how many spans."""
        hidden = min(max(round(length * self.noise_density), 1), max(length - 1, 1))
        spans = max(round(hidden / self.mean_span), 1)
        return hidden, min(spans, length - hidden + 1)  # between two spans there is at least one token

    def lengths(self, length: int) -> tuple[int, int]:
        """Tokens in source and target of a text of `length` tokens: sentinels and end token included."""
        hidden, spans = self.counts(length)
        return length - hidden + spans + 1, hidden + spans + 1

    def text_length(self, source_length: int) -> int:
        """Tokens in the longest text whose source has `source_length` tokens, which must be at least 2."""
        # One more token of text makes the source longer by one or leaves it as it is, so that no length is left out.
        return next(n for n in count(1) if self.lengths(n + 1)[0] > source_length)

    def choose(self, length: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Choose the spans of a text of `length` tokens; all choices with these counts are equally likely.

        So a span can be at the beginning or end of a row. (T5's own code begins each row with a visible token and ends
        it with a hidden one.)

        Returns:
            (spans,) int64, where each begins, in order, and (spans,) int64, its size.
        """
        hidden, spans = self.counts(length)
        sizes = random_parts(hidden, spans, generator)
        gaps = random_parts(length - hidden + 2, spans + 1, generator)  # the first and the last one have one too many
        starts = (gaps[:-1] + sizes).cumsum() - sizes - 1
        return starts, sizes


def random_parts(total: int, parts: int, generator: np.random.Generator) -> np.ndarray:
    """Split a number into `parts` positive integers, (parts,) int64; all ways to do so are equally likely."""
    cuts = generator.choice(total - 1, parts - 1, replace=False, shuffle=False) + 1
    return np.diff(np.sort(cuts), prepend=0, append=total)


def corrupt(
    tokens: np.ndarray, starts: np.ndarray, sizes: np.ndarray, sentinels: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Hide spans of a text.

    Args:
        tokens: (N,) int64.
        starts: (spans,) where each span begins.
        sizes: (spans,) number of tokens in each.
        sentinels: ids of the sentinels, at least as many as spans.

    Returns:
        the source, int64: the text with a sentinel in place of each span; and the target, int64: each sentinel, and
        after it the tokens that it stands for.
    """
    sentinels = sentinels[: len(starts)]
    before = sizes.cumsum() - sizes  # hidden tokens before each span
    hidden = np.zeros(len(tokens), bool)
    hidden[np.repeat(starts - before, sizes) + np.arange(sizes.sum())] = True
    target = np.insert(tokens[hidden], before, sentinels)
    source = tokens.copy()
    source[starts] = sentinels
    hidden[starts] = False
    return source[~hidden], target


@dataclass(kw_only=True, eq=False, repr=False)
class SpanCorruptionData(TokenisedText):
    """Running text with hidden spans, as `SequencePairBatch`es: what T5 learns first (arXiv:1910.10683).

    A row is a block of text, as long as makes the source `max_length` tokens; documents follow each other, with the
    end-of-text token between them. Source and target end with that token too. All rows have the same size; the last one
    in evaluation is padded. The spans depend only on (seed, epoch, index); in evaluation they are the
    same each time. The tokenizer needs the tokens `<extra_id_0>`, `<extra_id_1>` and so on.
    """

    tokenizer: str = "span_bpe"
    max_length: int = 512
    noise_density: float = 0.15
    """Share of the tokens that is hidden."""
    mean_span: float = 3.0
    """Mean number of tokens in a hidden span."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_room(self.max_length)
        SpanCorruption(self.noise_density, self.mean_span)  # it checks its fields

    @property
    def most_workers(self) -> int:
        return 1  # cutting spans out takes longer than sending a batch

    @property
    def corruption(self) -> SpanCorruption:
        """How the text is hidden."""
        return SpanCorruption(self.noise_density, self.mean_span)

    @property
    def text_length(self) -> int:
        """Tokens of text in a row."""
        return self.corruption.text_length(self.max_length)

    @property
    def max_target_length(self) -> int:
        """T, the number of tokens in a target, which follows from `max_length`."""
        return self.corruption.lengths(self.text_length)[1]

    @cached_property
    def span_tokens(self) -> "SpanTokens":
        """Ids of the special tokens.

        Raises:
            TrunklineError: if the tokenizer has no sentinels, or no end-of-text token.
        """
        return SpanTokens.of(self.vocabulary, self.tokenizer)

    def check_size(self) -> None:
        """Check also that there is a sentinel for each span of a row."""
        super().check_size()
        spans, found = self.corruption.counts(self.text_length)[1], len(self.span_tokens.sentinels)
        if found < spans:
            raise TrunklineError(
                f"a row of max_length={self.max_length} has {spans} hidden spans, but the tokenizer {self.tokenizer} "
                f"has only {found} tokens {sentinel(0)}, {sentinel(1)}, …; lower max_length, or raise mean_span",
                field="data.max_length",
            )

    @property
    def facts(self) -> DataFacts:
        """Adds the length of a target, and the tokens that begin and end it."""
        return replace(
            super().facts,
            max_target_length=self.max_target_length,
            start_token=self.span_tokens.start,
            end_token=self.span_tokens.end,
        )

    def shortest_stream(self, train: bool) -> int:
        return self.text_length if train else 1

    def make_rows(self, stream: TokenStream, train: bool) -> Dataset[Any]:
        blocks = Blocks(stream, self.text_length, self.seed if train else None, overlap=0)
        sizes = self.max_length, self.max_target_length
        return CorruptedRows(blocks, self.corruption, self.span_tokens, sizes, self.seed, fixed=not train)


@dataclass(frozen=True, eq=False)
class SpanTokens:
    """Ids of the special tokens in sources and targets."""

    start: int
    """What the decoder reads first: `<pad>`, as in T5, or the end-of-text token if there is no `<pad>`."""
    end: int
    """The end-of-text token."""
    sentinels: np.ndarray
    """(N,) int64, ids of `<extra_id_0>`, `<extra_id_1>` and so on."""

    @classmethod
    def of(cls, tokenizer: Tokenizer, name: str) -> "SpanTokens":
        """The ids in a tokenizer.

        Args:
            tokenizer: the tokenizer.
            name: its name, for messages.

        Raises:
            TrunklineError: if it has no sentinels or no end-of-text token.
        """
        found = (tokenizer.token_to_id(sentinel(n)) for n in count())
        sentinels = np.array(list(takewhile(lambda number: number is not None, found)), np.int64)
        if not len(sentinels):
            raise TrunklineError(
                f"the tokenizer {name} has no token {sentinel(0)}, which stands for hidden text; set "
                "tokenizer=span_bpe, or take one of T5's, such as google-t5/t5-small",
                field="data.tokenizer",
            )
        end, start = end_of_text_id(tokenizer), tokenizer.token_to_id(PADDING)
        return cls(end if start is None else start, end, sentinels)


class CorruptedRows(Dataset[dict[str, Any]]):
    """Items of `SpanCorruptionData`.

    Args:
        blocks: the text.
        corruption: how it is hidden.
        special: ids of the special tokens.
        sizes: S and T.
        seed: seed of the spans.
        fixed: use the same spans in each epoch.
    """

    def __init__(
        self,
        blocks: Blocks,
        corruption: SpanCorruption,
        special: SpanTokens,
        sizes: tuple[int, int],
        seed: int,
        fixed: bool,
    ) -> None:
        self.blocks, self.corruption, self.special = blocks, corruption, special
        self.sizes, self.seed, self.fixed = sizes, seed, fixed

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, key: SampleKey) -> dict[str, Any]:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: list[SampleKey]) -> list[dict[str, Any]]:
        """The items of a batch, as a DataLoader asks for them. `mask` is left out if no row of the batch is padded."""
        return without_full_masks([self._row(key) for key in keys])

    def _row(self, key: SampleKey) -> dict[str, Any]:
        generator = np.random.default_rng((self.seed, 0 if self.fixed else key.epoch, key.index))
        text = self.blocks.read(key).astype(np.int64)
        starts, sizes = self.corruption.choose(len(text), generator)
        source, target = corrupt(text, starts, sizes, self.special.sentinels)
        end = self.special.end
        tokens, target_tokens = np.full(self.sizes[0], end), np.full(self.sizes[1], end)
        targets = np.full(self.sizes[1], IGNORE)
        tokens[: len(source)] = source
        target_tokens[0], target_tokens[1 : len(target) + 1] = self.special.start, target
        if key.valid:
            targets[: len(target)], targets[len(target)] = target, end
        row = {"tokens": tokens, "mask": np.arange(len(tokens)) <= len(source)}
        row |= {"target_tokens": target_tokens, "targets": targets}
        tensors = {name: torch.from_numpy(value) for name, value in row.items()}
        return {**tensors, "truncated": 0, "index": key.index, "valid": key.valid}
