"""The types that `datamodules/`, `modules/` and `pipelines/` exchange: batches, facts about the data, and losses.

`datamodules/` and `modules/` both import these types, and never import each other.

Letters in shapes: B rows in a batch, T tokens or frames in a row, N hidden tokens in a row, C channels of an image,
M mel bins of a frame, K classes.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypedDict, runtime_checkable

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import Tensor

IGNORE = -100
"""A target that is not counted; PyTorch's losses use the same number."""
FRAME_MULTIPLE = 8
"""The data pads clips of different lengths to a multiple of this number of frames."""


# --- batches. A word has the same meaning in all of them:
# `document` is the number of a token's document in a packed row, from 1 on, 0 for padding;
# `segment` says whether a token belongs to the first (0) or the second text (1) of a pair;
# `mask` is True for real tokens and False for padding.


class Rows(TypedDict, total=False):
    """Fields that a batch of any kind can have."""

    index: "Tensor"
    """(B,) int64, number of each row in its split."""
    valid: "Tensor"
    """(B,) bool, False for a row that only fills up the batch of a process and is never counted."""


class ImageBatch(Rows, total=False):
    """Labelled images."""

    image: "Tensor"
    """(B, C, height, width) float32, normalised."""
    label: "Tensor"
    """(B,) int64, class number."""
    skipped: "Tensor"
    """(B,) int64, 1 if the image could not be read and was replaced by another one."""


class TokenBatch(Rows, total=False):
    """Text for a causal language model."""

    tokens: "Tensor"
    """(B, T) int64."""
    targets: "Tensor"
    """(B, T) int64, the next token, `IGNORE` where no token is predicted."""
    document: "Tensor"
    """(B, T) int64; only if several documents are packed into a row."""


class MaskedBatch(Rows, total=False):
    """Text with hidden tokens for a masked language model."""

    tokens: "Tensor"
    """(B, T) int64, some of them hidden."""
    positions: "Tensor"
    """(B, N) int64, positions of the hidden tokens in the row."""
    targets: "Tensor"
    """(B, N) int64, the original tokens at these positions, `IGNORE` where a row has fewer than N."""
    segment: "Tensor"
    """(B, T) int64."""
    mask: "Tensor"
    """(B, T) bool; absent if no row is padded."""
    follows: "Tensor"
    """(B,) int64, only for pairs: 1 if the second text follows the first, else 0; `IGNORE` if it is not counted."""


class TextBatch(Rows, total=False):
    """Labelled texts, or labelled pairs of texts; also the base of the batches of other text tasks."""

    tokens: "Tensor"
    """(B, T) int64."""
    segment: "Tensor"
    """(B, T) int64; absent if there are no pairs."""
    mask: "Tensor"
    """(B, T) bool."""
    label: "Tensor"
    """(B,) int64, class number."""


class TaggedBatch(TextBatch, total=False):
    """Sentences with a tag for each word."""

    targets: "Tensor"
    """(B, T) int64, the tag number of a word at its first token, `IGNORE` elsewhere."""


class WindowBatch(TextBatch, total=False):
    """Questions, each with one window of the text in which the answer is searched."""

    context: "Tensor"
    """(B, T) bool, True for tokens of the text, False for the question, special tokens and padding."""
    offsets: "Tensor"
    """(B, T, 2) int64, for each token of the text: its first character, and the character after its last one."""
    null: "Tensor"
    """(B,) int64, the position that means "no answer in this window"."""
    start: "Tensor"
    """(B,) int64, position of the answer's first token, or `null`."""
    end: "Tensor"
    """(B,) int64, position of the answer's last token, or `null`."""
    question: "Tensor"
    """(B,) int64, number of the question in `DataFacts.questions` of this split."""


class PairBatch(Rows, total=False):
    """Images with captions."""

    image: "Tensor"
    """(B, C, height, width) float32, normalised."""
    tokens: "Tensor"
    """(B, T) int64, tokens of the caption."""
    mask: "Tensor"
    """(B, T) bool."""
    caption_key: "Tensor"
    """(B,) int64, hash of the caption: equal captions have equal keys."""
    skipped: "Tensor"
    """(B,) int64, 1 if the pair could not be read and was replaced by another one."""
    truncated: "Tensor"
    """(B,) int64, 1 if the caption was too long and lost its end."""


class SequencePairBatch(Rows, total=False):
    """Sources and targets for an encoder-decoder; S tokens in a source, T in a target."""

    tokens: "Tensor"
    """(B, S) int64, tokens of the source."""
    mask: "Tensor"
    """(B, S) bool; absent if no source is padded."""
    target_tokens: "Tensor"
    """(B, T) int64, what the decoder reads: the start token, then the target without its last token."""
    targets: "Tensor"
    """(B, T) int64, what it predicts: the next token of the target, `IGNORE` after its end."""
    truncated: "Tensor"
    """(B,) int64, 1 if source or target were too long and lost their ends."""


class AudioBatch(Rows, total=False):
    """Labelled sounds; also the base of speech."""

    features: "Tensor"
    """(B, T, M) float32, normalised log-mel frames, 0 after the end of a clip."""
    mask: "Tensor"
    """(B, T) bool, False after the end of a clip; absent if the network is to see the padding."""
    label: "Tensor"
    """(B,) int64, class number; absent if a clip can have several labels."""
    target: "Tensor"
    """(B, K) float32, share of each class: for clips with several labels, or mixed with another clip."""
    skipped: "Tensor"
    """(B,) int64, 1 if the clip could not be read and was replaced by another one."""
    truncated: "Tensor"
    """(B,) int64, 1 if the clip or its transcript was too long and lost its end."""


class SpeechBatch(AudioBatch, total=False):
    """Speech with transcripts, for CTC or for a decoder."""

    targets: "Tensor"
    """(B, N) int64, tokens of the transcript, `IGNORE` after its end. For a decoder: what it predicts, with the token
    that ends a text, and `IGNORE` where it only reads."""
    target_tokens: "Tensor"
    """(B, N) int64, what a decoder reads: the start tokens, then the transcript; absent for CTC."""


# --- facts about the data


class Question(NamedTuple):
    """A question about a text, with its answers."""

    id: str
    text: str
    context: str
    answers: list[str]
    """All correct answers; empty if the question cannot be answered."""
    starts: list[int]
    """Position of each answer's first character in the context."""


@dataclass(kw_only=True)
class DataFacts:
    """What a datamodule knows and a network, an objective or a callback needs. None means unknown.

    A recipe states a fact once, in its data, and the network reads it from here.
    """

    class_names: list[str] | None = None
    """Names of the classes, in the order of the class numbers."""
    tokenizer: "Tokenizer | None" = None
    """Of the source, if the data has sources and targets."""
    target_tokenizer: "Tokenizer | None" = None
    """Of the target, if it is another one."""
    vocab_size: int | None = None
    """Rows of the token embedding: the size that the recipe sets, else the tokenizer's own size."""
    target_vocab_size: int | None = None
    """The same for `target_tokenizer`."""
    max_length: int | None = None
    """Tokens in a row; in a source, if the data has sources and targets."""
    max_target_length: int | None = None
    """Tokens in a target."""
    start_token: int | None = None
    """Token id that the decoder reads before a target."""
    start_tokens: Sequence[int] | None = None
    """All token ids that the decoder reads before a target, if there are several."""
    end_token: int | None = None
    """Token id that ends a target."""
    image_size: int | tuple[int, int] | None = None
    """Pixels: one side of a square, or (height, width)."""
    channels: int | None = None
    """Channels of an image."""
    mean: tuple[float, ...] | None = None
    """Mean of each channel, subtracted from pixels between 0 and 1."""
    std: tuple[float, ...] | None = None
    """Standard deviation of each channel; pixels are divided by it after the mean is subtracted."""
    sample_rate: int | None = None
    """Audio samples per second."""
    num_mels: int | None = None
    """Mel bins M of a frame."""
    max_frames: int | None = None
    """Frames of the longest clip."""
    frame_seconds: float | None = None
    """Seconds from one frame to the next."""
    multi_label: bool | None = None
    """Whether a clip can have several labels."""
    bytes_per_token: Mapping[str, float] = field(default_factory=dict)
    """UTF-8 bytes of text per token in each split (train, val, test): converts nats per token to bits per byte."""
    unigram_entropy: float | None = None
    """Entropy of the token frequencies, in nats per token: the loss of a model that knows only the frequencies."""
    questions: Mapping[str, Sequence[Question]] = field(default_factory=dict)
    """Questions of each split; an evaluation compares the predictions with their answers."""
    pair: Callable[[str, int], tuple[str, str]] | None = None
    """(split, row) -> source and target as text."""
    source_tokens: Callable[[str, int], list[int]] | None = None
    """(split, row) -> token ids of the source, as the network reads them."""
    encode_source: Callable[[Sequence[str], str | None], list[list[int]]] | None = None
    """(texts, target language or None) -> token ids of the sources, as in training."""
    equal_shares: bool | None = None
    """Whether all processes get equally many rows of every training batch, so that they need not ask each other."""
    ragged: bool = False
    """Whether batches of training differ in length (the second dimension of their tensors), and so maybe in rows."""
    row_name: Callable[[str, int], str] | None = None
    """(split, row) -> the file or row, for messages."""
    transcript: Callable[[str, int], str] | None = None
    """(split, row) -> what is said in a clip, normalised."""
    waveform: Callable[[str, int], "Tensor"] | None = None
    """(split, row) -> samples (S,) float32 of a clip, at `sample_rate`."""
    caption: Callable[[str, int], str] | None = None
    """(split, row) -> the main caption of an image."""
    encode_masked: Callable[[str, int, str], tuple[list[int], int]] | None = None
    """(sentence with a mask, maximum number of tokens, name for messages) -> (token ids, id of the mask token)."""
    max_skipped: float | None = None
    """Rows of an epoch that training may replace because they cannot be read: below 1 a share, else a number. None if
    the data stops at the first one."""
    stated: Collection[str] = ()
    """Fields of the network that the recipe states (`model.network.patch_size`): neither data nor weights change them.
    Elsewhere a field counts as stated if it has not its default."""
    network_instead: Mapping[str, Any] | None = None
    """Configuration of the network in a checkpoint that will replace all weights, as plain data. The weights to start
    from are not read then; they may be gone."""


@runtime_checkable
class HasFacts(Protocol):
    """A datamodule that has `facts`."""

    @property
    def facts(self) -> DataFacts:
        """All that is known so far: sizes and names from the start, statistics of the text after `setup`."""


# --- positions in an epoch


@dataclass(frozen=True)
class EpochCut:
    """What decides which samples of an epoch are in which batch. Runs of equal cuts have the same batches."""

    samples: int
    """Number of samples in the training data."""
    seed: int
    """Seed of their order."""
    batches: int
    """Number of batches in an epoch."""
    batch_size: int | None
    """Samples in a batch, over all processes; None if something else limits it."""
    batch_tokens: int | None
    """Tokens or frames that a batch can hold, or None."""


@runtime_checkable
class CutsEpochs(Protocol):
    """A datamodule whose training goes on at any sample of an epoch."""

    cut: EpochCut | None
    """As `train_cut`, once its loader exists; None if training does not use its loader."""
    moved: dict[int, int]
    """What `move_batches` was told."""

    def train_cut(self) -> EpochCut:
        """How an epoch is cut into batches."""

    def move_batches(self, epoch: int, samples: int) -> None:
        """Let batch n of an epoch begin `samples` after sample n * batch_size: a run that was resumed with another
        batch size goes on at the first sample that it has not seen, which need not be where a batch begins.
        """


@runtime_checkable
class CountsWaiting(Protocol):
    """A loader that knows for how long its batches were waited for."""

    waited: float
    """Seconds since it was made, in this process."""
    num_workers: int
    """Processes that make the batches; 0 if this process does."""


# --- losses


@dataclass(frozen=True)
class Loss:
    """What an objective returns for a batch: a sum of losses, and the number of losses in it.

    The base class of the objectives divides the sum by the number, over all processes and all accumulated steps.
    """

    total: "Tensor"
    """Scalar, the sum of this batch's losses; the gradients come from it."""
    count: "Tensor | int"
    """The number to divide by: an int if it is the same in all processes (rows of a full batch), a scalar tensor if it
    depends on the data (hidden tokens)."""
    logs: Mapping[str, Any] = field(default_factory=dict)
    """More scalars to log, by name."""
    name: str = "loss"
    """Name under which the mean is logged."""
