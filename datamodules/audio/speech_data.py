"""Speech with transcripts, for a recogniser with CTC or a decoder."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from trunkline.contract import IGNORE, DataFacts
from trunkline.datamodules.audio.audio_input import AudioClips
from trunkline.datamodules.audio.audio_rows import AudioRows
from trunkline.datamodules.audio.recording_data import RecordingData
from trunkline.datamodules.audio.transcripts import TranscriptNormalization, TranscriptTexts, transcript_tokens
from trunkline.datamodules.text.preparation import Preparation
from trunkline.datamodules.text_tasks.task_text import Ragged
from trunkline.datamodules.tokenizers import TRAINED, TextEncoder, Vocabulary, load_tokenizer


class SpeechClips(AudioClips):
    """Items of a `SpeechBatch`.

    Args:
        rows: the recordings.
        tokens: token ids of each row's transcript.
        **options: as for `AudioClips`.
    """

    def __init__(self, rows: AudioRows, tokens: Ragged, **options: Any) -> None:
        super().__init__(rows, **options)
        self.tokens = tokens

    def labels(self, rows: Sequence[int], valid: Sequence[bool]) -> dict[str, Tensor]:
        tokens = [self.tokens[row] for row in rows]
        targets = np.full((len(rows), max(1, *map(len, tokens))), IGNORE, np.int64)
        for n, ids in enumerate(tokens):
            if valid[n]:
                targets[n, : len(ids)] = ids
        return {"targets": torch.from_numpy(targets)}


@dataclass(kw_only=True, eq=False, repr=False)
class SpeechData(Vocabulary, RecordingData):
    """Speech with transcripts, as `SpeechBatch`es."""

    tokenizer: str = "chars"
    normalization: TranscriptNormalization = field(default_factory=TranscriptNormalization)
    """How transcripts are written for the network."""
    form: Literal["ctc", "decoder"] = "ctc"
    """What the network learns from."""
    max_length: int = 448
    """Maximum number of tokens that a decoder reads, special tokens included; CTC has no limit."""

    @cached_property
    def transcripts(self) -> dict[str, list[str]]:
        """The normalised transcripts of each split."""
        return {split: [self.normalization(text) for text in rows.texts or []] for split, rows in self.splits.items()}

    @cached_property
    def vocabulary(self) -> Tokenizer:
        """The tokenizer, loaded, or learnt at the first use and stored in `cache`; only one process learns it."""
        if self.tokenizer not in TRAINED:
            return load_tokenizer(self.tokenizer)
        texts = TranscriptTexts(self.transcripts["train"])
        return Preparation([(texts, {"train": 1.0})], self.tokenizer, self.vocab_size, self.cache).tokenizer

    @property
    def facts(self) -> DataFacts:
        words = self.token_facts
        return replace(
            super().facts, tokenizer=words.tokenizer, vocab_size=words.vocab_size, transcript=self.transcript
        )

    def transcript(self, split: str, row: int) -> str:
        """What is said in a row, normalised."""
        return self.transcripts[split][row]

    def clips(self, split: str, rows: AudioRows, options: Mapping[str, Any]) -> SpeechClips:
        tokens = transcript_tokens(TextEncoder(self.vocabulary), self.transcripts[split])
        return SpeechClips(rows, tokens, **options)

    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            **RecordingData.state_dict(self),
            "normalization": asdict(self.normalization),
            "form": self.form,
        }
