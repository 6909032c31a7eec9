"""What passes between the rooms of the house: batches, facts about the data, and losses.

Both wings, `datamodules/` and `modules/`, import these types and never each other.

Shape legend: B rows of a batch, T tokens of a row, N chosen tokens of a row, C channels of an image.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypedDict, runtime_checkable

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import Tensor

IGNORE = -100
"""A target that is not counted, as everywhere in PyTorch."""


# --- batches. One word has one meaning in all of them:
# `document` is the number of a token's document in a packed row, from 1 on, 0 for padding;
# `segment` says whether a token belongs to the first (0) or the second text (1) of a pair;
# `mask` is True for real tokens and False for padding.


class Rows(TypedDict, total=False):
    """What a batch of any kind may hold."""

    index: "Tensor"
    """(B,) int64, number of each row in its split."""
    valid: "Tensor"
    """(B,) bool, False for a row that only fills the batch of a process, and is never counted."""


class ImageBatch(Rows, total=False):
    """Labelled images."""

    image: "Tensor"
    """(B, C, height, width) float32, normalised."""
    label: "Tensor"
    """(B,) int64, number of the class."""
    skipped: "Tensor"
    """(B,) int64, 1 if the image could not be read and another stands in."""


class TokenBatch(Rows, total=False):
    """Text for a causal language model."""

    tokens: "Tensor"
    """(B, T) int64."""
    targets: "Tensor"
    """(B, T) int64, the token that follows, `IGNORE` where none is to be predicted."""
    document: "Tensor"
    """(B, T) int64; only where several documents are packed into a row."""


class MaskedBatch(Rows, total=False):
    """Text with hidden tokens for a masked language model."""

    tokens: "Tensor"
    """(B, T) int64, some of them hidden."""
    positions: "Tensor"
    """(B, N) int64, places of the hidden tokens."""
    targets: "Tensor"
    """(B, N) int64, what stood there, `IGNORE` where a row has fewer than N."""
    segment: "Tensor"
    """(B, T) int64."""
    mask: "Tensor"
    """(B, T) bool; absent where no row is padded."""
    follows: "Tensor"
    """(B,) int64, only of pairs: 1 if the second text follows the first, else 0, `IGNORE` if not to be counted."""


class TextBatch(Rows, total=False):
    """Labelled texts, or pairs of texts; also the base of the other tasks on text."""

    tokens: "Tensor"
    """(B, T) int64."""
    segment: "Tensor"
    """(B, T) int64; absent where there are no pairs."""
    mask: "Tensor"
    """(B, T) bool."""
    label: "Tensor"
    """(B,) int64, number of the class."""


class TaggedBatch(TextBatch, total=False):
    """Sentences with a tag for each word."""

    targets: "Tensor"
    """(B, T) int64, the tag of a word at its first token, `IGNORE` elsewhere."""


class WindowBatch(TextBatch, total=False):
    """Questions, each with a window of the text that holds its answer."""

    context: "Tensor"
    """(B, T) bool, True for tokens of the text."""
    offsets: "Tensor"
    """(B, T, 2) int64, first character of a token in the text and the one after its last."""
    null: "Tensor"
    """(B,) int64, place that stands for "no answer in this window"."""
    start: "Tensor"
    """(B,) int64, first token of the answer, or `null`."""
    end: "Tensor"
    """(B,) int64, last token of the answer, or `null`."""
    question: "Tensor"
    """(B,) int64, number of the question in `DataFacts.questions` of the split."""


class PairBatch(Rows, total=False):
    """Images with captions."""

    image: "Tensor"
    """(B, C, height, width) float32, normalised."""
    tokens: "Tensor"
    """(B, T) int64, of the caption."""
    mask: "Tensor"
    """(B, T) bool."""
    caption_key: "Tensor"
    """(B,) int64, the same for the same caption."""
    skipped: "Tensor"
    """(B,) int64, 1 if the pair could not be read and another stands in."""
    truncated: "Tensor"
    """(B,) int64, 1 if the caption lost its end."""


# --- facts about the data


class Question(NamedTuple):
    """A question, its text and its answers."""

    id: str
    text: str
    context: str
    answers: list[str]
    """All right ones; none if it cannot be answered."""
    starts: list[int]
    """Their first characters in the context."""


@dataclass(kw_only=True)
class DataFacts:
    """What a datamodule knows and a network, an objective or a callback needs; None where it knows nothing.

    A recipe states such a fact once, in its data, and the network takes it from here.
    """

    class_names: list[str] | None = None
    """Names of the classes, in the order of their numbers."""
    tokenizer: "Tokenizer | None" = None
    vocab_size: int | None = None
    """Rows of an embedding that holds every token: as the recipe declares it, else the tokenizer's own size."""
    max_length: int | None = None
    """Tokens of a row."""
    image_size: int | tuple[int, int] | None = None
    """Pixels: one side, or (height, width)."""
    channels: int | None = None
    """Channels of an image."""
    mean: tuple[float, ...] | None = None
    """Of each channel, subtracted from pixels between 0 and 1."""
    std: tuple[float, ...] | None = None
    """Of each channel, divided by after that."""
    sample_rate: int | None = None
    """Samples of sound a second."""
    bytes_per_token: Mapping[str, float] = field(default_factory=dict)
    """UTF-8 bytes of text per token in each split (train, val, test): turns nats per token into bits per byte."""
    unigram_entropy: float | None = None
    """Nats a token that its frequency alone leaves open: the loss of guessing without reading."""
    questions: Mapping[str, Sequence[Question]] = field(default_factory=dict)
    """Questions of each split, which the answers of an evaluation are compared with."""
    caption: Callable[[str, int], str] | None = None
    """(split, row) -> the main caption of an image."""
    encode_masked: Callable[[str, int, str], tuple[list[int], int]] | None = None
    """(sentence with a mask, tokens that fit, name for messages) -> its ids, and the id of the mask."""


@runtime_checkable
class HasFacts(Protocol):
    """A datamodule that tells what it knows."""

    @property
    def facts(self) -> DataFacts:
        """All that is known now: sizes and names at once, statistics of the text after `setup`."""


# --- losses


@dataclass(frozen=True)
class Loss:
    """What an objective makes of a batch: a sum, and how many it is a sum of.

    The mean is taken by the base class of the objectives, over all processes and all steps of an accumulation.
    """

    total: "Tensor"
    """Scalar, the sum of this batch's losses; gradients come from it."""
    count: "Tensor | int"
    """What is divided by: an int that is the same in all processes (rows of a full batch), or a scalar tensor that
    depends on the data (hidden tokens)."""
    logs: Mapping[str, Any] = field(default_factory=dict)
    """Further scalars to be logged, by name."""
    name: str = "loss"
    """Of the mean, where it is logged."""
