"""Speech recognition with CTC: every state of the encoder names a token, or none."""

import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import MeanMetric, Metric

from trunkline import TrunklineError
from trunkline.contract import IGNORE, DataFacts, Loss, SpeechBatch
from trunkline.modules.generation.ctc import states_needed
from trunkline.modules.generation.ctc_beams import CTCDecoding, LanguageModel, ctc_texts
from trunkline.modules.metrics.translation import check_scores, translation_scores
from trunkline.modules.networks.speech_encoder import SpeechEncoder, SpeechEncoderConfig
from trunkline.modules.objectives.arguments import as_config
from trunkline.modules.objectives.audio_task import AudioTask, frames_of
from trunkline.modules.objectives.checks import facts_of
from trunkline.modules.training.distributed import gather_lists

if TYPE_CHECKING:
    from tokenizers import Tokenizer

NAMED = 5
"""Largest number of clips that a warning names."""


class Heard(NamedTuple):
    """What the network heard in a clip of an evaluation."""

    row: int
    """Number of the row in its split."""
    prediction: str
    reference: str


class SpeechRecognizer(AudioTask):
    """Connectionist temporal classification (Graves et al., 2006) of speech.

    The loss is -log p(transcript), summed over all paths through the states, in nats per token of the transcripts; an
    empty transcript counts as one token. A transcript that has more tokens than its clip has states (a token that
    follows itself needs one more, for the blank between them) has no path: such a clip adds nothing to the loss, is
    counted as `unfit_clips`, and the first ones are named in a warning.

    Logged in evaluation: `loss`, and the `scores` of the texts over the whole split: `cer` and `wer`, edits of
    characters and words divided by their number in the transcripts, and `exact`, the share of clips without an error.
    Data that tells no transcripts has no such scores.

    Args:
        network: shape of the encoder.
        decoding: how evaluation writes texts; None is greedy. A `language_model` can be set later.
        scores: `cer`, `wer`, `exact`; none of them writes no texts.
        **shared: see `TrunklineModule`.
    """

    network: SpeechEncoder
    network_class = SpeechEncoder
    counted: ClassVar[dict[str, str]] = {**AudioTask.counted, "unfit": "unfit_clips"}
    shown: ClassVar[tuple[str, ...]] = ("loss", "cer", "wer")

    def __init__(
        self,
        network: SpeechEncoderConfig | None = None,
        *,
        decoding: CTCDecoding | None = None,
        scores: Sequence[str] = ("cer", "wer", "exact"),
        **shared: Any,
    ) -> None:
        super().__init__(**shared)
        check_scores(scores)
        config = self.configured(SpeechEncoderConfig, network)
        self.decoding: CTCDecoding = as_config(CTCDecoding, decoding)
        self.keep_hyperparameters(network=config, decoding=self.decoding, scores=list(scores))
        self.language_model: LanguageModel | None = None
        """Scores the texts too, if `decoding` has several beams; no checkpoint holds it."""
        self.scores = list(scores)
        self.written: list[Heard] = []
        """The texts of the last evaluation, in the order of the rows: of all processes once it has ended."""
        self.warned: set[str] = set()
        """Splits of which a warning has named clips that do not fit."""
        self.network = SpeechEncoder(config)
        self.start()

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """Frames (B, T, M), mask (B, T) -> (B, T', V + 1) logits; the blank is the last output."""
        return self.network(features, mask)

    def log_probs(self, batch: SpeechBatch) -> tuple[Tensor, Tensor]:
        """Log-probabilities (B, T', V + 1) in float32 or wider, and the number of states (B,) of each clip."""
        logits = self.network(batch["features"], batch.get("mask"))
        precise = torch.promote_types(logits.dtype, torch.float32)
        return logits.log_softmax(dim=2, dtype=precise), self.network.output_lengths(frames_of(batch))

    # --- the loss

    def loss(self, batch: SpeechBatch) -> Loss:
        """The loss over the tokens of all transcripts that fit."""
        losses, tokens = self.clip_losses(*self.log_probs(batch), batch)
        return Loss(losses.sum(), tokens.sum())

    def clip_losses(self, log_probs: Tensor, lengths: Tensor, batch: SpeechBatch) -> tuple[Tensor, Tensor]:
        """Loss of each clip (B,), and the number of tokens (B,) that it counts as; both 0 for what is not counted."""
        targets = batch["targets"]
        real = targets != IGNORE
        tokens = real.sum(dim=1)
        losses = F.ctc_loss(
            log_probs.transpose(0, 1),
            targets.masked_fill(~real, 0),
            lengths,
            tokens,
            blank=self.network.blank,
            reduction="none",
            zero_infinity=True,
        )
        counted = states_needed(targets) <= lengths
        if "valid" in batch:
            counted = counted & batch["valid"]
        return losses.masked_fill(~counted, 0.0), tokens.clamp(min=1) * counted

    def count(self, batch: Any, stage: str) -> None:
        """Also count the clips whose transcripts do not fit, and name the first."""
        unfit = states_needed(batch["targets"]) > self.network.output_lengths(frames_of(batch))
        if "valid" in batch:
            unfit = unfit & batch["valid"]
        if stage not in self.warned and bool(unfit.any()):  # PyTorch's CTC loss waits for the device anyway
            self.warned.add(stage)
            warnings.warn(self.what_is_unfit(batch, unfit, stage), stacklevel=2)
        super().count({**batch, "unfit": unfit}, stage)

    def what_is_unfit(self, batch: SpeechBatch, unfit: Tensor, stage: str) -> str:
        """The warning about the clips of a batch that do not fit."""
        name, rows = facts_of(self.trainer).row_name, batch["index"][unfit][:NAMED].tolist()
        needed = states_needed(batch["targets"])[unfit].tolist()
        has = self.network.output_lengths(frames_of(batch))[unfit].tolist()
        clips = [
            f"{name(stage, row) if name else f'row {row}'} (needs {needs} states, has {states})"
            for row, needs, states in zip(rows, needed, has, strict=False)
        ]
        return (
            f"transcripts too long for their clips in {stage}: {', '.join(clips)}, and maybe others, which are counted "
            f"as {stage}/unfit_clips and add nothing to the loss; correct or remove them, or lower the network's "
            f"strides (one state for {self.network.subsampling} frames now)"
        )

    # --- evaluation

    def make_metrics(self) -> dict[str, Metric]:
        return {"loss": MeanMetric()}

    def start_evaluation(self) -> None:
        self.written = []

    def evaluate(self, batch: SpeechBatch, metrics: Any) -> None:
        log_probs, lengths = self.log_probs(batch)
        losses, tokens = self.clip_losses(log_probs, lengths, batch)
        counted = tokens > 0
        metrics["loss"].update(losses[counted] / tokens[counted], weight=tokens[counted])
        if self.scores and not self.trainer.sanity_checking:
            valid = batch["valid"]
            self.written += self.write(log_probs[valid], lengths[valid], batch["index"][valid].tolist())

    def write(self, log_probs: Tensor, lengths: Tensor, rows: list[int]) -> list[Heard]:
        """What is heard in each of these rows; nothing if the data tells no transcripts."""
        facts = SpokenFacts.read(facts_of(self.trainer))
        if facts is None:
            return []
        stage = "test" if self.trainer.testing else "val"
        texts = facts.tokenizer.decode_batch(self.tokens(log_probs, lengths), skip_special_tokens=True)
        return [Heard(row, text, facts.transcript(stage, row)) for row, text in zip(rows, texts, strict=True)]

    def tokens(self, log_probs: Tensor, lengths: Tensor) -> list[list[int]]:
        """The tokens heard in each clip."""
        return ctc_texts(log_probs, lengths, self.decoding, self.language_model)

    def finish_evaluation(self, stage: str, metrics: Any) -> dict[str, Any]:
        everywhere = gather_lists(self.written, self.trainer.world_size)
        self.written = sorted({text.row: text for text in everywhere}.values())
        predictions, references = [text.prediction for text in self.written], [text.reference for text in self.written]
        return translation_scores(predictions, references, self.scores)

    def predict_step(self, batch: SpeechBatch, batch_idx: int) -> dict[str, Any]:
        """`index` (B,) and `tokens`, a list for each of the valid clips."""
        log_probs, lengths = self.log_probs(batch)
        valid = batch["valid"]
        return {"index": batch["index"][valid], "tokens": self.tokens(log_probs[valid], lengths[valid])}

    def flops_per_batch(self, batch: SpeechBatch) -> int:
        return self.network_flops(batch["features"], batch.get("mask"))


class SpokenFacts(NamedTuple):
    """What scores of transcripts need to know about the data."""

    tokenizer: "Tokenizer"
    transcript: Callable[[str, int], str]
    """(split, row) -> what is said in a clip."""

    @classmethod
    def read(cls, facts: DataFacts) -> "SpokenFacts | None":
        """None for data without transcripts.

        Raises:
            TrunklineError: if the data tells transcripts, but has no tokenizer.
        """
        if facts.transcript is None:
            return None
        if facts.tokenizer is None:
            raise TrunklineError(
                "scores of transcripts need the data's tokenizer, which it does not tell; use SpeechData, or set "
                "scores to []",
                field="model.scores",
            )
        return cls(facts.tokenizer, facts.transcript)
