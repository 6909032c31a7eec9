"""What trained networks hear in recordings: what `transcribe` and `evaluate` share."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from difflib import SequenceMatcher
from itertools import accumulate, pairwise
from typing import Any, NamedTuple, Protocol

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from trunkline import TrunklineError
from trunkline.contract import IGNORE
from trunkline.datamodules.audio.audio_rows import AudioRows
from trunkline.datamodules.audio.log_mel import LogMel
from trunkline.datamodules.tokenizers import end_of_text_id
from trunkline.modules.generation.ctc import ctc_align, token_spans
from trunkline.modules.generation.ctc_beams import CTCDecoding, LanguageModel, ctc_texts
from trunkline.modules.networks import SpeechEncoder, Whisper
from trunkline.pipelines.generating import NumberFormat, SourceWriter, prepared
from trunkline.pipelines.recordings import AudioWindow, AudioWindows, Windowing
from trunkline.pipelines.trained import Trained, read_language_model
from trunkline.pipelines.translating import generation_of

FUSION_BEAMS = 10
"""Beams if there is a language model, unless they are given."""
LONGEST_PIECE = 1500
"""Most states of a recording that are decoded at once, if they are of several windows."""


class SpeechOptions(NamedTuple):
    """How recordings become text; None means as in training."""

    window: float | None = None
    """Seconds that are heard at once."""
    num_beams: int | None = None
    """Above 1, use beam search."""
    language_model: str | None = None
    """For CTC: checkpoint of a causal language model over the same tokens."""
    lm_weight: float | None = None
    length_bonus: float | None = None
    timestamps: bool = False
    """For CTC: also find where the words are."""
    compile: bool = False
    """For a decoder: compile the step that makes a token."""


class TimedWord(NamedTuple):
    """A word, and when it was said."""

    word: str
    start: float
    """Seconds from the start of the recording."""
    end: float


class Transcript(NamedTuple):
    """What was said in a recording."""

    text: str
    words: list[TimedWord] | None = None
    """None if they were not asked for."""


class Transcriber(Protocol):
    """Turns the windows of recordings into text; one object for one list of recordings."""

    log_mel: LogMel
    windowing: Windowing

    def hear(self, batch: dict[str, Tensor], windows: Sequence[AudioWindow]) -> None:
        """Hear a batch of `AudioWindows`; the windows of each recording come in their order."""

    def transcript(self, recording: int) -> Transcript:
        """What was said in a recording, after its last window."""


def transcribe_recordings(
    transcriber: Transcriber,
    recordings: AudioRows,
    batch_size: int,
    num_workers: int = 0,
    skip_corrupt: bool = False,
) -> list[Transcript | None]:
    """Transcribe recordings, window by window.

    Args:
        transcriber: a new one.
        recordings: the recordings.
        batch_size: number of windows at a time.
        num_workers: number of processes that read recordings.
        skip_corrupt: name recordings that cannot be read in a warning, instead of stopping.

    Returns:
        The transcript of each recording; None for one that cannot be read.

    Raises:
        TrunklineError: for a recording that cannot be read.
    """
    data = AudioWindows(recordings, transcriber.log_mel, transcriber.windowing, skip_corrupt)
    broken: set[int] = set()
    for batch in data.batches(batch_size, num_workers, "transcribing"):
        windows = [data.windows[number] for number in batch["index"].tolist()]
        broken |= {window.recording for window, good in zip(windows, batch["valid"], strict=True) if not good}
        transcriber.hear(batch, windows)
    return [None if n in broken else transcriber.transcript(n) for n in range(len(recordings))]


def transcriber_of(
    trained: Trained, device: torch.device, dtype: NumberFormat = "float32", options: SpeechOptions | None = None
) -> Transcriber:
    """The transcriber in a checkpoint.

    Args:
        trained: the checkpoint.
        device: where it computes.
        dtype: number format of its weights.
        options: how recordings become text.

    Raises:
        TrunklineError: if the checkpoint is of another objective or is broken, or an option does not apply.
    """
    trained.require("transcribe")
    options = options or SpeechOptions()
    if isinstance(trained.network, SpeechEncoder):
        if options.compile:
            raise TrunklineError(
                f"compile is for recognisers whose decoder writes the text, but {trained.file} is of "
                f"{trained.objective}, with CTC; leave it out",
                "compile",
            )
        return CTCTranscriber(trained, device, dtype, options)
    for name in ("language_model", "lm_weight", "length_bonus", "timestamps"):
        if getattr(options, name):
            raise TrunklineError(
                f"{name} is for recognisers with CTC, but {trained.file} is of {trained.objective}, whose decoder "
                "writes the text; leave it out",
                name,
            )
    return DecoderTranscriber(trained, device, dtype, options)


# --- CTC


class CTCTranscriber:
    """A recogniser with CTC. Each state names a token or none, so that the states of windows can be joined.

    Args:
        trained: a checkpoint of a `SpeechEncoder`.
        device: where it computes.
        dtype: number format of its weights.
        options: how recordings become text.

    Raises:
        TrunklineError: if the checkpoint is broken, or an option does not apply.
    """

    def __init__(self, trained: Trained, device: torch.device, dtype: NumberFormat, options: SpeechOptions) -> None:
        self.log_mel, self.words, network = trained.log_mel, trained.tokenizer(), trained.network
        assert isinstance(network, SpeechEncoder)
        self.windowing = Windowing.of(self.log_mel, network.config.max_frames, network.subsampling, options.window)
        self.state_seconds = network.subsampling * self.log_mel.frame_seconds
        self.decoding, self.language_model = ctc_decoding(trained, options), None
        if options.language_model is not None:
            self.language_model = fused_model(options.language_model, self.words, dtype, device)
        self.network, self.device, self.timestamps = prepared(network, dtype, device), device, options.timestamps
        self.waiting: dict[int, Tensor] = {}
        """Log-probabilities (T, V + 1) of a recording that are not decoded yet."""
        self.decoded: dict[int, int] = defaultdict(int)
        """Number of states of a recording that are decoded."""
        self.tokens: dict[int, list[SpokenToken]] = defaultdict(list)

    def hear(self, batch: dict[str, Tensor], windows: Sequence[AudioWindow]) -> None:
        found, pieces = self.log_probs(batch), []
        for window, own in zip(windows, found, strict=True):
            recording, own = window.recording, own[self.windowing.kept(window)]
            whole = torch.cat((self.waiting.pop(recording, own[:0]), own))
            end = len(whole)
            if window.stop is not None:
                end = quiet_place(whole) if end > LONGEST_PIECE else 0
                self.waiting[recording] = whole[end:]
            if end:
                pieces.append((recording, whole[:end]))
        if pieces:
            self.decode(pieces)

    @torch.inference_mode()
    def log_probs(self, batch: dict[str, Tensor]) -> list[Tensor]:
        """Log-probabilities (T, V + 1) of the states of each row, in float32 on the CPU."""
        network, features, mask = self.network, batch["features"], batch.get("mask")
        frames = torch.full((len(features),), features.shape[1]) if mask is None else mask.sum(dim=1)
        features = features.to(self.device, next(network.parameters()).dtype)
        logits = network(features, None if mask is None else mask.to(self.device))
        found = logits.float().log_softmax(dim=2).cpu()
        return [own[:states] for own, states in zip(found, network.output_lengths(frames).tolist(), strict=True)]

    def decode(self, pieces: Sequence[tuple[int, Tensor]]) -> None:
        """Find the tokens in pieces of recordings: their numbers, and log-probabilities (T, V + 1)."""
        lengths = torch.tensor([len(own) for _, own in pieces])
        log_probs = pad_sequence([own for _, own in pieces], batch_first=True)
        found = ctc_texts(log_probs, lengths, self.decoding, self.language_model)
        rows = [torch.tensor(tokens, dtype=torch.int64) for tokens in found]
        spans = [[(0, 0)] * len(tokens) for tokens in found]
        if self.timestamps:
            paths = ctc_align(log_probs, lengths, pad_sequence(rows, batch_first=True, padding_value=IGNORE))
            spans = [
                [(span.start, span.end) for span in token_spans(path[: len(own)], own, tokens)]
                for path, (_, own), tokens in zip(paths, pieces, found, strict=True)
            ]
        for (recording, own), tokens, places in zip(pieces, found, spans, strict=True):
            begin = self.decoded[recording]
            self.tokens[recording] += [
                SpokenToken(token, begin + start, begin + end)
                for token, (start, end) in zip(tokens, places, strict=True)
            ]
            self.decoded[recording] += len(own)

    def transcript(self, recording: int) -> Transcript:
        tokens = self.tokens.pop(recording, [])
        text = self.words.decode([token.id for token in tokens], skip_special_tokens=True)
        return Transcript(text, timed_words(tokens, self.words, self.state_seconds) if self.timestamps else None)


def ctc_decoding(trained: Trained, options: SpeechOptions) -> CTCDecoding:
    """How tokens are chosen: as in the validation of the run, except for what is given.

    Raises:
        TrunklineError: for a value out of range, or an option that would have no effect.
    """
    names = ("num_beams", "lm_weight", "length_bonus")
    given = {name: value for name in names if (value := getattr(options, name)) is not None}
    fields: dict[str, Any] = trained.content["hyper_parameters"].get("decoding") or {}
    if options.language_model is not None:
        fields = {"num_beams": FUSION_BEAMS} | fields
    elif "lm_weight" in given:
        raise TrunklineError(
            "lm_weight is the weight of a language model; give its checkpoint as language_model", "lm_weight"
        )
    decoding = CTCDecoding(**{**fields, **given})
    if decoding.num_beams == 1 and (options.language_model is not None or "length_bonus" in given):
        name = "language_model" if options.language_model is not None else "length_bonus"
        raise TrunklineError(f"{name} helps to choose among beams; set num_beams above 1, such as {FUSION_BEAMS}", name)
    return decoding


def fused_model(file: str, words: Tokenizer, dtype: NumberFormat, device: torch.device) -> LanguageModel:
    """A language model that helps a recogniser.

    Args:
        file: its checkpoint.
        words: the tokenizer of the recogniser.
        dtype: number format of its weights.
        device: where it computes.

    Raises:
        TrunklineError: if it cannot be used, or its tokens are others than the recogniser's.
    """
    network, own = read_language_model(file, "generate")
    numbers = own.get_vocab()
    if any(numbers.get(token) != number for token, number in words.get_vocab().items()):
        raise TrunklineError(
            f"the language model {file} has other tokens than the recogniser; train it with the recogniser's "
            "checkpoint as tokenizer",
            "language_model",
        )
    end = end_of_text_id(own, "language_model")
    return LanguageModel(prepared(network, dtype, device), end, end)


class SpokenToken(NamedTuple):
    """A token, and the states that name it."""

    id: int
    start: int
    end: int


def quiet_place(log_probs: Tensor) -> int:
    """The state in the second half of (T, V + 1) log-probabilities that is the surest to name no token."""
    half = len(log_probs) // 2
    return half + int(log_probs[half:, -1].argmax())


def timed_words(tokens: Sequence[SpokenToken], tokenizer: Tokenizer, state_seconds: float) -> list[TimedWord]:
    """The words that tokens make: those of their text, cut at white space.

    Args:
        tokens: the tokens of a recording.
        tokenizer: their tokenizer.
        state_seconds: seconds from one state to the next.
    """
    ids = [token.id for token in tokens]
    alone = tokenizer.decode_batch([[number] for number in ids], skip_special_tokens=True)
    pairs = tokenizer.decode_batch([[*pair] for pair in pairwise(ids)], skip_special_tokens=True)
    # A token begins a word if there is white space between its text and that of the token before it.
    begins = [
        before[-1:].isspace() or pair[len(before) : len(before) + 1].isspace()
        for before, pair in zip(alone, pairs, strict=False)
    ]
    groups: dict[int, list[SpokenToken]] = defaultdict(list)
    for token, text, word in zip(tokens, alone, accumulate(begins, initial=0), strict=False):
        if text.strip():
            groups[word].append(token)
    texts = tokenizer.decode_batch([[token.id for token in own] for own in groups.values()], skip_special_tokens=True)
    return [
        TimedWord(text.strip(), round(own[0].start * state_seconds, 3), round(own[-1].end * state_seconds, 3))
        for text, own in zip(texts, groups.values(), strict=True)
    ]


# --- decoders


class DecoderTranscriber:
    """An encoder-decoder that hears, such as Whisper. It writes a text for each window; their words are merged.

    Arguments and errors as for `CTCTranscriber`.
    """

    def __init__(self, trained: Trained, device: torch.device, dtype: NumberFormat, options: SpeechOptions) -> None:
        self.log_mel, self.words, network = trained.log_mel, trained.tokenizer(), trained.network
        assert isinstance(network, Whisper)
        self.windowing = Windowing.of(self.log_mel, network.config.max_frames, network.subsampling, options.window)
        self.start, self.end = start_ids(trained, self.words), end_of_text_id(self.words)
        room = network.config.max_target_length + 1 - len(self.start)  # a text's last token is never read
        config = generation_of(trained, room, num_beams=options.num_beams)
        self.config = replace(config, max_new_tokens=min(config.max_new_tokens, room))
        self.network: Any = prepared(network, dtype, device)
        self.writer, self.device = SourceWriter(self.network, options.compile), device
        self.heard: dict[int, list[str]] = {}
        """The words of each recording so far."""

    @torch.inference_mode()
    def hear(self, batch: dict[str, Tensor], windows: Sequence[AudioWindow]) -> None:
        features, mask = batch["features"], batch.get("mask")
        features = features.to(self.device, next(self.network.parameters()).dtype)
        mask = None if mask is None else mask.to(self.device)
        prompts = torch.tensor([self.start] * len(features), device=self.device)
        numbers = batch["index"].tolist()
        found = self.writer.write(features, mask, prompts, self.config, [self.end], numbers)
        for window, text in zip(windows, self.words.decode_batch(found, skip_special_tokens=True), strict=True):
            before = self.heard.get(window.recording)
            share = 2 * self.windowing.margin / self.windowing.size
            self.heard[window.recording] = text.split() if before is None else joined_words(before, text.split(), share)

    def transcript(self, recording: int) -> Transcript:
        return Transcript(" ".join(self.heard.pop(recording)))


def start_ids(trained: Trained, words: Tokenizer) -> list[int]:
    """The tokens that a decoder reads before a text.

    Raises:
        TrunklineError: if the checkpoint does not say, or its tokenizer lacks one of them.
    """
    names = trained.data_state("settings").get("start_tokens")
    if names is None:
        return [end_of_text_id(words)]
    known = words.get_vocab()
    for name in names:
        if name not in known:
            raise TrunklineError(f"the tokenizer in {trained.file} has no token {name}; train again")
    return [known[name] for name in names]


def joined_words(before: list[str], after: list[str], share: float) -> list[str]:
    """The words of two windows that overlap; what both heard stands once.

    The windows are joined in the middle of the longest run of words that both have, if it is long enough to be the
    overlap; otherwise the words of the second follow those of the first.

    Args:
        before: words up to the end of the first window.
        after: words of the second window.
        share: of a window that the other one hears too.
    """
    # Twice the words that are expected in the overlap: people do not speak evenly.
    count = max(1, round(2 * share * len(after)))
    tail, head = before[-count:], after[:count]
    match = SequenceMatcher(None, [plain_word(w) for w in tail], [plain_word(w) for w in head], autojunk=False)
    run = match.find_longest_match()
    middle = run.size // 2
    first = len(before) - len(tail) + run.a + middle if run.size else len(before)
    return before[:first] + after[run.b + middle if run.size else 0 :]


def plain_word(word: str) -> str:
    """A word for comparison: in lower case, without punctuation at its ends."""
    return word.casefold().strip(".,;:!?\"'()-…")
