"""A recogniser of speech in TensorBoard: spectrograms with what was said and heard, alignments, sounds, worst clips."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from PIL import Image, ImageOps
from torch import Tensor

from trunkline import TrunklineError
from trunkline.contract import IGNORE, DataFacts
from trunkline.modules.callbacks.drawing import GREEN, RED, captioned, play, tensorboard
from trunkline.modules.callbacks.spectrograms import (
    COLUMN,
    Mark,
    attended,
    compared,
    heard_frames,
    lane,
    spectrogram,
    stacked,
    time_axis,
    with_starts,
)
from trunkline.modules.callbacks.text import check_network
from trunkline.modules.callbacks.translation import cross_attention, labels, table_cell
from trunkline.modules.generation.ctc import ctc_align, ctc_greedy, states_needed, token_spans
from trunkline.modules.metrics.error_rates import UNITS, edit_distance, edit_pairs
from trunkline.modules.networks import SpeechEncoder, Whisper
from trunkline.modules.objectives.audio_task import USUAL_FRAME_SECONDS, frames_of
from trunkline.modules.objectives.checks import facts_of

WIDEST, NARROWEST, LARGEST = 1600, 300, 4
"""Pixels: of a spectrogram, longer ones are cut off; of the texts below a short one; of a frame of a short one."""
NAME_LETTERS = 12
"""Letters of a token's name that are shown."""
COMPARED = 500
"""Number of clips among which the worst are searched, so that many long texts take no time."""


@runtime_checkable
class Transcribes(Protocol):
    """An objective that keeps what it heard in its last evaluation, such as `SpeechRecognizer`."""

    scores: Sequence[str]
    """Without any, nothing is kept."""
    written: Sequence[Any]
    """With `row`, `prediction` and `reference`."""


@dataclass
class DrawnClip:
    """A clip that is drawn."""

    row: int
    features: Tensor
    """(t, M) without padding, on the CPU."""
    said: list[Mark] = field(default_factory=list)
    """Tokens of the transcript at their frames; empty if they are not known."""
    heard: list[Mark] = field(default_factory=list)
    """The same for the tokens that the network heard."""


class Transcripts(Callback):
    """Shows after each validation what a recogniser hears in some clips, and the clips in which it errs most.

    - `val/transcripts`: spectrograms, with reference and hypothesis below. What differs is red, and so is the frame
      of a clip with an error. For CTC, the tokens stand at their frames: those of the reference, by the likeliest
      alignment, above the spectrogram with a line at each start, and those of the network's likeliest path below it.
    - `val/alignment`: for a decoder, its cross-attention over the first clip while it reads the transcript, mean over
      the heads. A line shows to which frames it attends before it writes this token.
    - `val/worst`: a table of the clips with the highest character error rate, among the first 500.
    - `val/audio/<row>`: the clips' sound, once.

    The clips are the first that the first process validates (with `batch_seconds` the longest ones). The objective must
    have `scores`. All processes compute the alignment, because sharded weights need all of them.

    Args:
        clips: number of clips that are drawn.
        rows: number of rows of the table.
        block: the decoder's block whose attention is drawn, from 0, or from the last one backwards with -1; None draws
            the mean over all blocks.
    """

    def __init__(self, clips: int = 6, rows: int = 10, block: int | None = None) -> None:
        if clips < 1 or rows < 0:
            raise TrunklineError(f"Transcripts: clips={clips} must be at least 1, and rows={rows} at least 0")
        self.clips, self.rows, self.block = clips, rows, block
        self.shown: list[DrawnClip] = []
        self.attention: tuple[Tensor, list[str]] | None = None
        """Weights (N, t) of the first clip's tokens, and the tokens' names."""
        self.played = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse another network, another objective or other data before training starts."""
        network, facts = check_network(self, pl_module.network, SpeechEncoder, Whisper), facts_of(trainer)
        if not isinstance(pl_module, Transcribes) or not pl_module.scores:
            raise TrunklineError(
                "Transcripts shows the texts that an evaluation writes, but the objective writes none; set its scores, "
                "such as [cer, wer], or leave the callback out",
                field="model.scores",
            )
        if facts.transcript is None or facts.tokenizer is None:
            raise TrunklineError("Transcripts needs data with transcripts, such as SpeechData; leave the callback out")
        if self.block is None:
            return
        if isinstance(network, SpeechEncoder):
            raise TrunklineError("Transcripts: block is of a decoder, but the network has none; leave block out")
        depth = network.config.decoder.depth
        if not -depth <= self.block < depth:
            raise TrunklineError(
                f"Transcripts: block={self.block}, but the decoder has {depth} blocks; choose from 0 to {depth - 1}, "
                "or leave it out for the mean of all"
            )

    @torch.no_grad()
    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int, *rest: Any
    ) -> None:
        # Why not at the end of the epoch: by then, averaged weights may have been replaced by the trained ones.
        if batch_idx or trainer.sanity_checking:
            return
        network, words = pl_module.network, facts_of(trainer).tokenizer
        first = {name: value[: self.clips] for name, value in batch.items()}
        if isinstance(network, SpeechEncoder):
            marks = ctc_marks(network, first, words)
        else:
            assert isinstance(network, Whisper)
            marks = [([], [])] * len(first["index"])
            self.attention = spoken_attention(network, first, words, self.block)
        masks = first.get("mask", [None] * len(marks))
        columns = (first["index"].tolist(), first["features"], masks, marks, first["valid"].tolist())
        self.shown = [
            DrawnClip(row, heard_frames(features, mask).float().cpu(), *tokens)
            for row, features, mask, tokens, valid in zip(*columns, strict=True)
            if valid
        ]

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        writer = tensorboard(trainer)
        if writer is None or trainer.sanity_checking or not self.shown:
            return
        assert isinstance(pl_module, Transcribes)
        facts, written = facts_of(trainer), {text.row: text for text in pl_module.written}
        drawn = [(clip, written[clip.row]) for clip in self.shown if clip.row in written]
        scale = max(1, min(LARGEST, WIDEST // (2 * max(len(clip.features) for clip in self.shown))))
        if drawn:
            picture = stacked([draw_clip(*pair, facts, scale) for pair in drawn])
            writer.add_image("val/transcripts", np.asarray(picture), trainer.global_step, dataformats="HWC")
        if self.attention is not None:
            picture = draw_attention(self.shown[0].features, *self.attention, facts, scale)
            writer.add_image("val/alignment", np.asarray(picture), trainer.global_step, dataformats="HWC")
        if self.rows and written:
            table = worst_clips(list(written.values())[:COMPARED], self.rows, facts)
            writer.add_text("val/worst", table, trainer.global_step)
        if not self.played:
            self.played = True
            play(writer, [clip.row for clip in self.shown], facts, trainer.global_step)


# --- what the network hears, and when


def ctc_marks(network: SpeechEncoder, batch: Any, words: Any) -> list[tuple[list[Mark], list[Mark]]]:
    """For each clip of a batch, the tokens of its transcript and those that the network hears, at their frames.

    The first are aligned by `ctc_align`, and left out if they do not fit; the others are the network's likeliest path.
    """
    log_probs = network(batch["features"], batch.get("mask")).float().log_softmax(dim=2).cpu()
    lengths, targets = network.output_lengths(frames_of(batch)).cpu(), batch["targets"].cpu()
    said = [row[row != IGNORE].tolist() for row in targets]
    heard = ctc_greedy(log_probs, lengths)
    fitting = targets.masked_fill((states_needed(targets) > lengths)[:, None], IGNORE)
    greedy = torch.full((len(heard), max(1, *map(len, heard))), IGNORE)
    for row, tokens in zip(greedy, heard, strict=True):
        row[: len(tokens)] = torch.tensor(tokens)
    places = [ctc_align(log_probs, lengths, tokens) for tokens in (fitting, greedy)]
    found = []
    for row, texts in enumerate(zip(said, heard, strict=True)):
        pairs = edit_pairs(*texts)
        sides = []
        for side, tokens in enumerate(texts):
            names = labels(words, tokens)
            wrong = [pair[0] != pair[1] for pair in pairs if pair[side] is not None]
            spans = token_spans(places[side][row], log_probs[row], tokens)
            frames = [(span.start * network.subsampling, span.end * network.subsampling) for span in spans]
            sides.append([Mark(names[n], *frames[n], wrong[n]) for n in range(len(spans))])
        found.append((sides[0], sides[1]))
    return found


def spoken_attention(network: Whisper, batch: Any, words: Any, block: int | None) -> tuple[Tensor, list[str]]:
    """Cross-attention (N, T) to the frames of a batch's first clip while the decoder reads its transcript.

    Mean over the heads, and over the blocks if `block` is None. Also the names of the N tokens that are predicted.
    """
    targets = batch["targets"][0].cpu()
    places = (targets != IGNORE).nonzero()[:, 0].tolist()
    length = 1 + max(places, default=0)  # a row that fills up a batch has no transcript
    mask = batch["mask"][:1] if "mask" in batch else None
    maps = torch.stack(cross_attention(network, batch["features"][:1], batch["target_tokens"][:1, :length], mask))
    weights = (maps.mean(dim=0) if block is None else maps[block])[0, places]  # (N, states)
    return weights.repeat_interleave(network.subsampling, dim=1), labels(words, targets[places].tolist())


# --- pictures and tables


def draw_clip(clip: DrawnClip, text: Any, facts: DataFacts, scale: int) -> Image.Image:
    """A spectrogram with its tokens, reference and hypothesis; `text` has `prediction` and `reference`."""
    frames = clip.features[: WIDEST // scale]
    width, parts = len(frames) * scale, [with_starts(spectrogram(frames, scale), clip.said, scale)]
    if clip.said or clip.heard:
        parts = [lane(clip.said, width, scale), *parts, lane(clip.heard, width, scale)]
    parts.append(time_axis(len(frames), facts.frame_seconds or USUAL_FRAME_SECONDS, scale))
    ours, right = UNITS["cer"](text.prediction), UNITS["cer"](text.reference)
    pairs = edit_pairs(ours, right)
    parts.append(compared(pairs, max(width, NARROWEST)))
    errors = sum(ours != right for ours, right in pairs)
    caption = f"{name_of(clip.row, facts)}: " + (f"{errors} of {len(right)} characters wrong" if errors else "right")
    return captioned(stacked(parts), caption, RED if errors else GREEN)


def draw_attention(
    features: Tensor, weights: Tensor, names: Sequence[str], facts: DataFacts, scale: int
) -> Image.Image:
    """A spectrogram of frames (t, M), and below it the weights of each token over the frames."""
    frames = features[: WIDEST // scale]
    margin = COLUMN * (1 + min(NAME_LETTERS, max(map(len, names), default=0)))
    axis = time_axis(len(frames), facts.frame_seconds or USUAL_FRAME_SECONDS, scale)
    above = [ImageOps.expand(part, (margin, 0, 0, 0), "white") for part in (spectrogram(frames, scale), axis)]
    return stacked([*above, attended(weights[:, : len(frames)], names, axis.width, margin)])


def worst_clips(written: Sequence[Any], rows: int, facts: DataFacts) -> str:
    """A table in Markdown of the wrong texts with the highest character error rates."""
    counted = []
    for text in written:
        sides = {name: (units(text.prediction), units(text.reference)) for name, units in UNITS.items()}
        edits = {name: (edit_distance(*pair), len(pair[1])) for name, pair in sides.items()}
        counted.append((edits["cer"][0] / max(1, edits["cer"][1]), text, edits))
    wrong = sorted((entry for entry in counted if entry[0]), key=lambda entry: -entry[0])
    if not wrong:
        return f"no errors in {len(counted)} clips"
    lines = ["| clip | reference | hypothesis | words wrong | characters wrong |", "| --- | --- | --- | --- | --- |"]
    for _, text, edits in wrong[:rows]:
        cells = [name_of(text.row, facts), text.reference, text.prediction]
        errors = [f"{count} of {total}" for count, total in (edits["wer"], edits["cer"])]
        lines.append(f"| {' | '.join([*map(table_cell, cells), *errors])} |")
    return "\n".join(lines)


def name_of(row: int, facts: DataFacts) -> str:
    """What a row of the validation split is called."""
    return f"row {row}" if facts.row_name is None else facts.row_name("val", row)
