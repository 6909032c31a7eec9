"""An encoder-decoder in TensorBoard: translations of fixed sentences, their alignment with the source, lengths."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from trunkline import TrunklineError
from trunkline.contract import DataFacts
from trunkline.modules.callbacks.drawing import new_figure, tensorboard
from trunkline.modules.callbacks.text import check_network
from trunkline.modules.generation.decoding import GenerationConfig, evaluating
from trunkline.modules.generation.sampling import generate
from trunkline.modules.networks import EncoderDecoder
from trunkline.modules.networks.conditional import ConditionalNetwork
from trunkline.modules.objectives.checks import facts_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LONGEST_CELL, LONGEST_SIDE = 400, 64
"""Characters of a text in the table, and tokens on a side of the picture; what is longer is cut off."""


class Translated(NamedTuple):
    """A sentence in TensorBoard."""

    source: str
    tokens: list[int]
    """The source as the network reads it."""
    target: str | None
    """The right translation; None if it is not known."""
    written: tuple[int, ...] = ()
    """Tokens that the network wrote, without the end token."""
    prediction: str = ""


class TargetSide(NamedTuple):
    """What writing a text needs to know about the data."""

    words: Any
    """The tokenizer of the targets."""
    start: int
    """Token that the decoder reads first."""
    end: int
    """Token that ends a text."""
    longest: int
    """Largest number of tokens of a text."""

    @classmethod
    def of(cls, facts: DataFacts, network: EncoderDecoder) -> "TargetSide":
        """From facts that have these tokens."""
        assert facts.start_token is not None
        assert facts.end_token is not None
        longest = facts.max_target_length or network.config.max_target_length
        return cls(facts.target_tokenizer or facts.tokenizer, facts.start_token, facts.end_token, longest)


@runtime_checkable
class WritesTexts(Protocol):
    """An objective that keeps the texts of its last evaluation (`prediction`, `reference`), such as `Seq2Seq`."""

    written: Sequence[Any]

    def signatures(self) -> dict[str, str]:
        """SacreBLEU's signatures, by score."""


class Translations(Callback):
    """Shows at each validation how the network translates fixed sentences, and to what it attends.

    - `val/translations`: a table with source, prediction and target. Predictions are greedy.
    - `val/alignment`: the cross-attention of one sentence (arXiv:1409.0473, figure 3), mean over the heads of a block.
      A row shows what the decoder attends to while it writes this token.
    - `val/length_ratio`: characters of all texts that the validation wrote, divided by those of their references; their
      lengths are in `val/lengths/predicted` and `val/lengths/reference`. With the objective's `scores` only.
    - `val/signatures`: how sacreBLEU computed the scores, once.

    At the end of training the last translations are printed. The network must be an `EncoderDecoder`, and the data must
    know its sources, as `TranslationData` does. All processes translate, because sharded weights need all of them.

    Args:
        sentences: sources to translate; None takes the first rows of the validation split.
        rows: number of these rows.
        languages: the target language of each sentence, or one for all; for a model with several.
        aligned: number of the sentence whose alignment is drawn, from 0.
        block: the decoder's block whose attention is drawn, from 0, or from the last one backwards with -1; None draws
            all blocks.
    """

    def __init__(
        self,
        sentences: Sequence[str] | None = None,
        rows: int = 8,
        languages: Sequence[str] | str | None = None,
        aligned: int = 0,
        block: int | None = None,
    ) -> None:
        self.sentences = None if sentences is None else list(sentences)
        self.count = rows if self.sentences is None else len(self.sentences)
        if self.count < 1:
            raise TrunklineError("Translations: there is nothing to translate; give sentences, or rows above 0")
        if not 0 <= aligned < self.count:
            raise TrunklineError(
                f"Translations: aligned={aligned} must be from 0 to {self.count - 1}, the number of a sentence"
            )
        if languages is not None and self.sentences is None:
            raise TrunklineError(
                "Translations: languages are of sentences; give sentences too, or leave languages out: the rows of the "
                "validation split have their own"
            )
        single = languages is None or isinstance(languages, str)
        self.languages: list[Any] = [languages] * self.count if single else list(languages or ())
        if len(self.languages) != self.count:
            raise TrunklineError(
                f"Translations: {len(self.languages)} languages for {self.count} sentences; give one for each, or one "
                "for all"
            )
        self.aligned, self.block = aligned, block
        self.shown: list[Translated] = []
        self.signed = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse another network, other data, or a sentence that cannot be encoded, before training starts."""
        network: Any = check_network(self, pl_module.network, EncoderDecoder)
        facts, depth = facts_of(trainer), network.config.decoder.depth
        needed = (facts.encode_source, facts.pair, facts.source_tokens)
        if None in needed or None in (facts.tokenizer, facts.start_token, facts.end_token):
            raise TrunklineError(
                "Translations needs data with sources and targets, such as TranslationData; leave the callback out"
            )
        if self.block is not None and not -depth <= self.block < depth:
            raise TrunklineError(
                f"Translations: block={self.block}, but the decoder has {depth} blocks; choose from 0 to {depth - 1}, "
                "or leave it out for all"
            )
        if self.sentences is not None:
            self.shown = self._own(facts)

    def _own(self, facts: DataFacts) -> list[Translated]:
        """The sentences that were given."""
        assert facts.encode_source is not None
        assert self.sentences is not None
        shown = []
        for sentence, language in zip(self.sentences, self.languages, strict=True):
            try:
                (tokens,) = facts.encode_source([sentence], language)
            except TrunklineError as error:
                raise TrunklineError(f"Translations: the sentence {sentence!r}: {error}") from error
            shown.append(Translated(sentence, tokens, None))
        return shown

    def _first_rows(self, facts: DataFacts) -> list[Translated]:
        """The first rows of the validation split, as many as there are."""
        assert facts.pair is not None
        assert facts.source_tokens is not None
        shown = []
        for row in range(self.count):
            try:
                source, target = facts.pair("val", row)
            except IndexError:
                break
            shown.append(Translated(source, facts.source_tokens("val", row), target))
        return shown

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        # Why not at the end of the epoch: by then, averaged weights may have been replaced by the trained ones.
        if batch_idx or dataloader_idx or trainer.sanity_checking:
            return
        facts, network = facts_of(trainer), pl_module.network
        assert isinstance(network, EncoderDecoder)
        targets = TargetSide.of(facts, network)
        self.shown = translated(network, self.shown or self._first_rows(facts), targets, pl_module.device)
        drawn = self.shown[min(self.aligned, len(self.shown) - 1)]
        maps = alignment(network, drawn, targets, pl_module.device)
        writer = tensorboard(trainer)
        if writer is None:
            return
        writer.add_text("val/translations", table_of(self.shown), trainer.global_step)
        blocks = range(len(maps)) if self.block is None else [self.block % len(maps)]
        sides = labels(facts.tokenizer, drawn.tokens), labels(targets.words, [*drawn.written, targets.end])
        figure = draw_alignment({n: maps[n] for n in blocks}, *sides)
        writer.add_figure("val/alignment", figure, trainer.global_step)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        writer = tensorboard(trainer)
        if writer is None or trainer.sanity_checking or not isinstance(pl_module, WritesTexts):
            return
        lengths = torch.tensor([[len(text.prediction), len(text.reference)] for text in pl_module.written])
        if not len(lengths) or not lengths[:, 1].any():
            return
        for side, name in enumerate(("predicted", "reference")):
            writer.add_histogram(f"val/lengths/{name}", lengths[:, side], trainer.global_step)
        total = lengths.sum(dim=0)
        writer.add_scalar("val/length_ratio", float(total[0] / total[1]), trainer.global_step)
        signatures = pl_module.signatures()
        if signatures and not self.signed:
            self.signed = True
            lines = [f"{name}: `{signature}`" for name, signature in signatures.items()]
            writer.add_text("val/signatures", "\n\n".join(lines), trainer.global_step)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            for text in self.shown:
                right = "" if text.target is None else f"\n  right: {text.target}"
                print(f"\n{text.source}\n  → {text.prediction}{right}")


def translated(
    network: EncoderDecoder, shown: Sequence[Translated], targets: TargetSide, device: torch.device
) -> list[Translated]:
    """The same sentences with the network's greedy translations."""
    width = max(len(text.tokens) for text in shown)
    tokens = torch.tensor([[*text.tokens, *[0] * (width - len(text.tokens))] for text in shown], device=device)
    lengths = torch.tensor([len(text.tokens) for text in shown], device=device)
    mask = torch.arange(width, device=device) < lengths[:, None]
    prompts = torch.full((len(shown), 1), targets.start, device=device)
    config = GenerationConfig(targets.longest, temperature=0)
    found = generate(network.decoder_of(tokens, mask), prompts, config=config, end_ids=[targets.end])
    texts = targets.words.decode_batch(found, skip_special_tokens=True)
    return [
        text._replace(written=tuple(ids), prediction=prediction)
        for text, ids, prediction in zip(shown, found, texts, strict=True)
    ]


def alignment(network: EncoderDecoder, text: Translated, targets: TargetSide, device: torch.device) -> list[Tensor]:
    """Cross-attention of each block while the network wrote a text, mean over the heads.

    Returns:
        (T, S) for each block, on the CPU. Row t is of the step that wrote token t; the last one wrote the end.
    """
    source = torch.tensor([text.tokens], device=device)
    read = torch.tensor([[targets.start, *text.written][: targets.longest]], device=device)
    return [weights[0] for weights in cross_attention(network, source, read)]


@torch.no_grad()
def cross_attention(
    network: ConditionalNetwork, source: Tensor, read: Tensor, mask: Tensor | None = None
) -> list[Tensor]:
    """Cross-attention of each block while the decoder reads texts, mean over the heads.

    Args:
        network: an encoder-decoder.
        source: (B, S, ...) sources, as `encode` takes them.
        read: (B, T) what the decoder reads, from the start token on.
        mask: (B, S) bool, False for padding of the sources.

    Returns:
        (B, T, S) for each block, float32 on the CPU; S is the number of states.
    """
    with evaluating(network):  # type: ignore[arg-type]
        context = network.encode(source, mask).x
        found = network.decode(read, context, network.context_mask(mask), return_attention=True).cross_attention
    assert found is not None
    return [weights.float().mean(dim=1).cpu() for weights in found]


def labels(words: Any, tokens: Sequence[int]) -> list[str]:
    """The text of each token; ␣ stands for a token of spaces."""
    texts = [words.decode([token], skip_special_tokens=False) for token in tokens]
    return [text if text.strip() else "␣" for text in texts]


def table_of(shown: Sequence[Translated]) -> str:
    """A table in Markdown."""
    targets = any(text.target is not None for text in shown)
    columns = ["source", "prediction", "target"][: 2 + targets]
    lines = [columns, ["---"] * len(columns)]
    lines += [
        [table_cell(text.source), table_cell(text.prediction), table_cell(text.target or "")][: len(columns)]
        for text in shown
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def table_cell(text: str) -> str:
    """A text in one line of a table in Markdown."""
    text = " ".join(text.split())
    text = text if len(text) <= LONGEST_CELL else text[: LONGEST_CELL - 1] + "…"
    return text.replace("|", "\\|")


def draw_alignment(maps: dict[int, Tensor], source: Sequence[str], target: Sequence[str]) -> "Figure":
    """Draw the weights (T, S) of each block, tokens of the target down, those of the source across."""
    source, target = source[:LONGEST_SIDE], target[:LONGEST_SIDE]
    width, height = max(2.0, 0.16 * len(source)) + 0.5, max(2.0, 0.16 * len(target)) + 0.7
    rows, columns = (len(maps), 1) if width > height else (1, len(maps))
    figure = new_figure(width * columns, height * rows)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for place, (block, weights) in zip(axes, maps.items(), strict=True):
        shown = weights[: len(target), : len(source)]
        place.imshow(shown, cmap="gray", vmin=0, aspect="equal")
        place.set_title(f"block {block}", fontsize=7)
        place.set_xticks(range(shown.shape[1]), source, fontsize=6, rotation=90)
        place.set_yticks(range(shown.shape[0]), target[: len(shown)], fontsize=6)
    return figure
