"""Speech with transcripts, for a recogniser with CTC or for a decoder."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from trunkline import TrunklineError
from trunkline.contract import IGNORE, DataFacts
from trunkline.datamodules.audio.audio_input import AudioClips, Clip
from trunkline.datamodules.audio.audio_manifests import AudioColumns
from trunkline.datamodules.audio.audio_rows import AudioRows
from trunkline.datamodules.audio.recording_data import RecordingData
from trunkline.datamodules.audio.transcripts import (
    TranscriptNormalization,
    TranscriptTexts,
    refuse_characters,
    transcript_tokens,
    unknown_characters,
)
from trunkline.datamodules.text.preparation import Preparation
from trunkline.datamodules.text_tasks.task_text import Ragged
from trunkline.datamodules.token_batches import padded_length
from trunkline.datamodules.tokenizers import (
    TRAINED,
    Vocabulary,
    check_room,
    check_vocab_size,
    end_of_text_id,
    load_tokenizer,
)


@dataclass(frozen=True)
class DecoderTarget:
    """What a decoder reads and predicts beside the transcript."""

    start: list[int]
    """Tokens that it reads first. It predicts none of them."""
    end: int
    """Token that it predicts last."""
    longest: int
    """Maximum number of tokens that it reads."""

    @property
    def room(self) -> int:
        """Maximum number of tokens of a transcript."""
        return self.longest - len(self.start)


class SpeechClips(AudioClips):
    """Items of a `SpeechBatch`. A clip that is not counted has no targets.

    Args:
        rows: the recordings.
        tokens: token ids of each row's transcript.
        decoder: what a decoder needs; None for CTC.
        **options: as for `AudioClips`.
    """

    def __init__(self, rows: AudioRows, tokens: Ragged, decoder: DecoderTarget | None = None, **options: Any) -> None:
        super().__init__(rows, **options)
        self.tokens, self.decoder = tokens, decoder

    def is_cut(self, row: int) -> bool:
        too_many = self.decoder is not None and len(self.tokens[row]) > self.decoder.room
        return super().is_cut(row) or too_many

    def labels(self, clips: Sequence[Clip], valid: Sequence[bool]) -> dict[str, Tensor]:
        tokens = [self.tokens[clip.row] for clip in clips]
        if self.decoder is not None:
            return decoder_columns(tokens, valid, self.decoder)
        targets = np.full((len(clips), max(1, *map(len, tokens))), IGNORE, np.int64)
        for n, ids in enumerate(tokens):
            if valid[n]:
                targets[n, : len(ids)] = ids
        return {"targets": torch.from_numpy(targets)}


def decoder_columns(tokens: Sequence[np.ndarray], valid: Sequence[bool], decoder: DecoderTarget) -> dict[str, Tensor]:
    """`target_tokens` and `targets` (B, N), of a `SpeechBatch`; too long a transcript loses its end."""
    kept = [ids[: decoder.room] for ids in tokens]
    begin = len(decoder.start)
    longest = min(int(padded_length(begin + max(map(len, kept)))), decoder.longest)
    read = np.zeros((len(kept), longest), np.int64)
    predicted = np.full((len(kept), longest), IGNORE, np.int64)
    read[:, :begin] = decoder.start
    for n, ids in enumerate(kept):
        stop = begin + len(ids)
        read[n, begin:stop] = ids
        if valid[n]:
            predicted[n, begin - 1 : stop - 1] = ids
            predicted[n, stop - 1] = decoder.end
    return {"target_tokens": torch.from_numpy(read), "targets": torch.from_numpy(predicted)}


@dataclass(kw_only=True, eq=False, repr=False)
class SpeechData(Vocabulary, RecordingData):
    """Speech with transcripts, as `SpeechBatch`es, from a list of recordings, a hub name or the offline digits.

    The number of a row alone decides its split. For CTC the targets are the tokens of the transcript; a decoder reads
    start tokens, then the transcript, and predicts the transcript and its end.
    """

    source: str = field(kw_only=False)
    """`spoken_digits` (10,000 strings of digits by synthetic voices) or one of its sets; a .jsonl, .csv or .parquet
    table of recordings; a folder with Kaldi's wav.scp and text, or with *.trans.txt as in LibriSpeech; else a Hugging
    Face hub name (a split can follow after a colon)."""
    too_long: Literal["cut", "skip"] = "skip"
    """What happens to clips that are longer than `log_mel.max_seconds`: `skip` leaves them out of training, while
    evaluation cuts them, so that scores are of all clips; `cut` takes their ends off, though not those of their
    transcripts."""
    text_column: str = "text"
    """Column of a table that holds the transcripts."""
    normalization: TranscriptNormalization = field(default_factory=TranscriptNormalization)
    """How transcripts are written for the network."""
    form: Literal["ctc", "decoder"] = "ctc"
    """Whether batches are for CTC, or for a decoder as in Whisper."""
    tokenizer: str = "chars"
    max_length: int = 448
    """Maximum number of tokens that a decoder reads, start tokens included; of a longer transcript the end is cut off.
    CTC has no limit."""
    start_tokens: list[str] | None = None
    """Tokens that a decoder reads before a transcript, such as those of Whisper; None is the token that ends a text."""
    drop_unknown: bool = False
    """Leave characters that the tokenizer does not have out of the transcripts, and count them, instead of stopping
    with an error."""

    def __post_init__(self) -> None:
        super().__post_init__()
        special = len(self.start_tokens or ())
        if self.form == "ctc" and self.start_tokens is not None:
            raise TrunklineError(
                f"start_tokens={', '.join(self.start_tokens)} are for a decoder; leave them out, or set form=decoder",
                field="data.start_tokens",
            )
        if self.start_tokens == []:
            raise TrunklineError("start_tokens is an empty list; name tokens, or leave it out", "data.start_tokens")
        if self.form == "decoder":
            check_room(self.max_length, 1 + max(special, 1))
        check_vocab_size(self.tokenizer, self.vocab_size, special)

    # --- transcripts

    @property
    def columns(self) -> AudioColumns:
        return AudioColumns(audio=self.audio_column, text=self.text_column)

    @cached_property
    def normalised(self) -> dict[str, list[str]]:
        """The transcripts of all `opened` rows.

        Raises:
            TrunklineError: if a source has none.
        """
        texts = {}
        for split, rows in self.opened.items():
            if rows.texts is None:
                raise TrunklineError(
                    f"{rows.name(0)} has no transcript, nor do the others; give a source with transcripts",
                    field="data.source",
                )
            texts[split] = [self.normalization(text) for text in rows.texts]
        return texts

    @cached_property
    def unknown(self) -> set[str]:
        """The characters of all `normalised` transcripts that the tokenizer does not have."""
        return unknown_characters(self.vocabulary, [text for texts in self.normalised.values() for text in texts])

    @cached_property
    def written(self) -> dict[str, list[str]]:
        """The transcripts of all `opened` rows, normalised, and with `drop_unknown` without unknown characters."""
        if not (self.drop_unknown and self.unknown):
            return self.normalised
        table = dict.fromkeys(map(ord, self.unknown))
        return {
            split: [" ".join(text.translate(table).split()) for text in texts]
            for split, texts in self.normalised.items()
        }

    def unwanted(self, split: str, rows: AudioRows) -> dict[str, np.ndarray]:
        empty = np.array([not text for text in self.written[split]])
        if empty.any() and not self.skip_corrupt:
            row = int(empty.argmax())
            text = rows.texts[row] if rows.texts else ""
            why = "drop_unknown" if self.normalised[split][row] else "the normalization"
            written = f", because {why} leaves nothing of '{text}'" if text.strip() else ""
            raise TrunklineError(
                f"{rows.name(row)} ({split} split): the transcript is empty{written}; "
                f"{int(empty.sum())} of {len(rows)} transcripts are; write them, or set skip_corrupt=true to leave "
                "these clips out",
                field="data.skip_corrupt",
            )
        return {"without a transcript": empty, **super().unwanted(split, rows)}

    @cached_property
    def transcripts(self) -> dict[str, list[str]]:
        """The transcripts of each split, in characters that the tokenizer has.

        Raises:
            TrunklineError: if it lacks one, and `drop_unknown` is off.
        """
        texts = {split: [self.normalised[split][row] for row in rows] for split, rows in self.kept.items()}
        for split in texts:
            dropped = sum(character in self.unknown for text in texts[split] for character in text)
            if dropped and not self.drop_unknown:
                refuse_characters(self.unknown, texts, self.row_name, self.tokenizer)
            if dropped:
                self.left_out.setdefault(split, {})["unknown characters"] = dropped
        return {split: [self.written[split][row] for row in rows] for split, rows in self.kept.items()}

    def transcript(self, split: str, row: int) -> str:
        """What is said in a row, normalised."""
        return self.transcripts[split][row]

    # --- the tokenizer

    @cached_property
    def vocabulary(self) -> Tokenizer:
        """The tokenizer, loaded, or learnt at the first use and stored in `cache`; only one process learns it."""
        if self.tokenizer not in TRAINED:
            return load_tokenizer(self.tokenizer)
        # the rows are chosen without `kept`, which with `drop_unknown` needs the tokenizer
        left_out = super().unwanted("train", self.opened["train"]).values()
        rows = zip(self.normalised["train"], *left_out, strict=True)
        texts = TranscriptTexts([text for text, *reasons in rows if text and not any(reasons)])
        special = self.start_tokens or ()
        corpus = [(texts, {"train": 1.0})]
        return Preparation(corpus, self.tokenizer, self.vocab_size, self.cache, special=special).tokenizer  # type: ignore[arg-type]

    @cached_property
    def decoder(self) -> DecoderTarget | None:
        """What a decoder needs; None for CTC.

        Raises:
            TrunklineError: if the tokenizer has no token that ends a text, or none of these `start_tokens`.
        """
        if self.form == "ctc":
            return None
        end = end_of_text_id(self.vocabulary)
        start = [end]
        if self.start_tokens is not None:
            start = [self.start_id(token) for token in self.start_tokens]
        return DecoderTarget(start, end, self.max_length)

    def start_id(self, token: str) -> int:
        """Id of a start token."""
        number = self.vocabulary.token_to_id(token)
        if number is None:
            raise TrunklineError(
                f"the tokenizer {self.tokenizer} has no token start_tokens={token}; name one that it has",
                field="data.start_tokens",
            )
        return number

    def prepare_data(self) -> None:
        super().prepare_data()
        self.check_size()

    def clips(self, split: str, rows: AudioRows, **options: Any) -> SpeechClips:
        tokens = transcript_tokens(self.vocabulary, self.transcripts[split])
        return SpeechClips(rows, tokens, self.decoder, **options)

    # --- facts and checkpoints

    @property
    def facts(self) -> DataFacts:
        words = self.token_facts
        known = replace(
            super().facts, tokenizer=words.tokenizer, vocab_size=words.vocab_size, transcript=self.transcript
        )
        if self.decoder is None:
            return known
        return replace(
            known,
            max_target_length=self.max_length,
            start_token=self.decoder.start[0],
            start_tokens=self.decoder.start,
            end_token=self.decoder.end,
            pair=self.pair,
        )

    def pair(self, split: str, row: int) -> tuple[str, str]:
        """Name and transcript of a row."""
        return self.row_name(split, row), self.transcript(split, row)

    def tokenizer_origin(self) -> str:
        return f"{super().tokenizer_origin()} on source={self.source}"  # a tokenizer that is learnt depends on the text

    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            "normalization": asdict(self.normalization),
            "form": self.form,
            "settings": {"max_length": self.max_length, "start_tokens": self.start_tokens},
        }
