"""Sequence to sequence: translation, summarisation, and whatever else turns one text into another."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor
from torchmetrics import MeanMetric, Metric

from trunkline import TrunklineError
from trunkline.contract import IGNORE, DataFacts, Loss, SequencePairBatch
from trunkline.modules.generation.decoding import GenerationConfig
from trunkline.modules.generation.sampling import generate
from trunkline.modules.losses import linear_cross_entropy, token_losses
from trunkline.modules.metrics.translation import USUAL_TOKENS, check_scores, signatures, translation_scores
from trunkline.modules.networks import EncoderDecoder, EncoderDecoderConfig
from trunkline.modules.networks.conditional import ConditionalNetwork
from trunkline.modules.objectives.arguments import as_config
from trunkline.modules.objectives.base import TrunklineModule
from trunkline.modules.objectives.checks import check_loss_options, facts_of
from trunkline.modules.training.distributed import gather_lists
from trunkline.modules.training.warm_start import FREE, SHOWN, TrainedWeights, check_same_sizes

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SIZES = {"vocab_size", "target_vocab_size", "max_length", "max_target_length", "num_mels", "max_frames"}
"""Fields of the network's configuration that show in the shapes of its weights."""


class Written(NamedTuple):
    """A text that the network wrote in an evaluation."""

    row: int
    """Number of the row in its split."""
    source: str
    """The text that was read, or the name of the clip that was heard."""
    prediction: str
    reference: str


class TextFacts(NamedTuple):
    """What writing texts needs to know about the data."""

    starts: Sequence[int]
    """Tokens that the decoder reads first."""
    end: int
    """Token that ends a text."""
    tokenizer: "Tokenizer"
    pair: Callable[[str, int], tuple[str, str]]
    """(split, row) -> source and reference."""

    @classmethod
    def read(cls, facts: DataFacts, usual_data: str) -> "TextFacts | None":
        """None for data without texts.

        Args:
            facts: what the data knows.
            usual_data: name of a datamodule that tells all that is needed, for the message.

        Raises:
            TrunklineError: if the data tells texts, but not all that is needed besides, which is named.
        """
        pair = facts.pair or named_transcripts(facts)
        if pair is None:
            return None
        end, tokenizer = facts.end_token, facts.target_tokenizer or facts.tokenizer
        starts = facts.start_tokens or (None if facts.start_token is None else [facts.start_token])
        if starts is None or end is None or tokenizer is None:
            needed = {"start_token": starts, "end_token": end, "tokenizer": tokenizer}
            missing = " and ".join(name for name, value in needed.items() if value is None)
            raise TrunklineError(
                f"scores of generated texts need the data's {missing}, which it does not tell; use {usual_data}, or "
                "set scores to []",
                field="model.scores",
            )
        return cls(starts, end, tokenizer, pair)


def named_transcripts(facts: DataFacts) -> Callable[[str, int], tuple[str, str]] | None:
    """(split, row) -> name of a clip and what is said in it; None if the data tells no transcripts."""
    transcript, name = facts.transcript, facts.row_name or (lambda split, row: f"row {row}")
    return None if transcript is None else lambda split, row: (name(split, row), transcript(split, row))


class Seq2Seq(TrunklineModule):
    """Cross-entropy of each next token of the target, given the source and the right tokens before it.

    Logged in evaluation: `loss` in nats per token of the target (without label smoothing), `ppl` and `acc` (share of
    tokens that the network predicts as the likeliest), and the `scores` of texts that the network writes from the
    sources alone, over the whole split: `exact` and `rouge1`, `rouge2`, `rougeL` from 0 to 1, `bleu` and `chrf` from 0
    to 100. Data that tells no texts (`DataFacts.pair`), such as spans to fill in, has no such scores.

    Args:
        network: shape of the encoder-decoder.
        label_smoothing: share of the target spread evenly over the vocabulary (arXiv:1512.00567).
        z_loss: factor of the squared log-partition (arXiv:2204.02311, which uses 1e-4); 0 is off.
        generation: how evaluation writes texts; None is greedy, up to the length of the data's targets.
        scores: `exact`, `bleu`, `chrf`, `rouge`, `wer`, `cer`; none of them writes no texts.
        tokenize: how sacreBLEU cuts texts into words for BLEU: `13a`, `zh`, `ja-mecab`, `ko-mecab`, `char`, …
        generated_rows: number of rows, the first of the split, for which validation writes texts; None is all. A test
            always takes all.
        **shared: see `TrunklineModule`; its `freeze_blocks` applies to encoder and decoder.
    """

    network: ConditionalNetwork
    network_class: ClassVar[type[ConditionalNetwork]] = EncoderDecoder
    source_field = "tokens"
    """Field of a batch that the encoder reads."""
    usual_data = "TranslationData"
    """Name of the datamodule that is made for this objective."""
    unit = "tokens"
    counted: ClassVar[dict[str, str]] = {"truncated": "truncated_pairs"}
    shown: ClassVar[tuple[str, ...]] = ("loss", "exact", "bleu")

    def __init__(
        self,
        network: EncoderDecoderConfig | None = None,
        *,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        generation: GenerationConfig | None = None,
        scores: Sequence[str] = ("exact", "bleu", "chrf"),
        tokenize: str = USUAL_TOKENS,
        generated_rows: int | None = None,
        **shared: Any,
    ) -> None:
        super().__init__(**shared)
        check_loss_options(label_smoothing, z_loss)
        check_scores(scores, tokenize)
        if generated_rows is not None and generated_rows < 0:
            raise TrunklineError(
                f"generated_rows must be 0 or more, not {generated_rows}; leave it out for all rows",
                field="model.generated_rows",
            )
        config = self.configured(self.network_class.config_class, network)
        self.generation = None if generation is None else as_config(GenerationConfig, generation)
        self.keep_hyperparameters(
            network=config,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            generation=self.generation,
            scores=list(scores),
            tokenize=tokenize,
            generated_rows=generated_rows,
        )
        self.label_smoothing, self.z_loss, self.generated_rows = label_smoothing, z_loss, generated_rows
        self.scores, self.tokenize = list(scores), tokenize
        self.written: list[Written] = []
        """The texts of the last evaluation, in the order of the rows: of all processes once it has ended."""
        self.network = self.network_class(config)
        if self.generation is not None:
            check_generation(self.generation, self.network)
        self.start()

    def copy_weights(self, weights: TrainedWeights) -> None:
        if weights.network_class is self.network_class:
            free = (FREE - {"tie_embeddings"}) | SHOWN | SIZES
            named = f"{weights.argument} {weights.name}"
            check_same_sizes(weights.config, self.network.config, named, "model.network", free)
        super().copy_weights(weights)

    def setup(self, stage: str) -> None:
        """Also check that texts can be written, before the first step.

        Raises:
            TrunklineError: for data that does not tell what the decoder needs, or weights that are sharded.
        """
        super().setup(stage)
        if self.scores and TextFacts.read(facts_of(self.trainer), self.usual_data) is not None:
            strategy = self.trainer.strategy
            if isinstance(strategy, FSDPStrategy):
                raise TrunklineError(
                    f"scores of generated texts need all weights in each process, but {type(strategy).__name__} shards "
                    "them; set scores to []",
                    field="model.scores",
                )

    def forward(self, source: Tensor, target_tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Sources (B, S, ...), targets (B, T) from the start token on, mask (B, S) of sources -> (B, T, V) logits."""
        return self.network(source, target_tokens, mask)

    def states(self, batch: Any) -> Tensor:
        """Inputs of the output layer, (B, T, D)."""
        source = batch[self.source_field]
        return self.network(source, batch["target_tokens"], batch.get("mask"), return_logits=False)

    def loss(self, batch: Any) -> Loss:
        """The loss over the tokens of the targets."""
        targets, head = batch["targets"].flatten(), self.network.head
        total = linear_cross_entropy(
            self.states(batch).flatten(0, 1),
            head.weight,
            targets,
            head.bias,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
        )
        return Loss(total, (targets != IGNORE).sum())

    # --- evaluation

    def make_metrics(self) -> dict[str, Metric]:
        return {"loss": MeanMetric(), "acc": MeanMetric()}

    def start_evaluation(self) -> None:
        self.written = []

    def evaluate(self, batch: Any, metrics: Any) -> None:
        counted = batch["targets"] != IGNORE
        target, head = batch["targets"][counted], self.network.head
        losses, best = token_losses(self.states(batch)[counted], head.weight, target, head.bias)
        metrics["loss"].update(losses)
        metrics["acc"].update((best == target).float())
        if self.scores and not self.trainer.sanity_checking:
            self.written += self.write(batch, facts_of(self.trainer))

    def write(self, batch: Any, facts: DataFacts) -> list[Written]:
        """Write a text for each valid row, in validation only for the first `generated_rows` of the split."""
        texts, kept = TextFacts.read(facts, self.usual_data), batch["valid"]
        if self.generated_rows is not None and not self.trainer.testing:
            kept = kept & (batch["index"] < self.generated_rows)
        if texts is None or not kept.any():
            return []
        source, mask = batch[self.source_field][kept], batch.get("mask")
        decoder = self.network.decoder_of(source, None if mask is None else mask[kept])
        prompts = torch.tensor([texts.starts] * len(source), device=source.device)
        limit = self.network.config.max_target_length
        config = self.generation or GenerationConfig(facts.max_target_length or limit, temperature=0)
        room = limit + 1 - prompts.shape[1]  # a target's last token is never read
        config = replace(config, max_new_tokens=min(config.max_new_tokens, room))
        rows, stage = batch["index"][kept].tolist(), "test" if self.trainer.testing else "val"
        ids = generate(decoder, prompts, config=config, end_ids=[texts.end], numbers=rows)
        predictions = texts.tokenizer.decode_batch(ids, skip_special_tokens=True)
        pairs = [texts.pair(stage, row) for row in rows]
        return [
            Written(row, source, ours, right)
            for row, (source, right), ours in zip(rows, pairs, predictions, strict=True)
        ]

    def finish_evaluation(self, stage: str, metrics: Any) -> dict[str, Any]:
        everywhere = gather_lists(self.written, self.trainer.world_size)
        self.written = sorted({text.row: text for text in everywhere}.values())
        predictions, references = [text.prediction for text in self.written], [text.reference for text in self.written]
        scores = translation_scores(predictions, references, self.scores, self.tokenize)
        return {"ppl": metrics["loss"].compute().exp(), **scores}  # the loss is that of all processes

    def signatures(self) -> dict[str, str]:
        """How sacreBLEU computes `bleu` and `chrf`; a published score is to name it."""
        return signatures(self.scores, self.tokenize)

    # --- counting

    def batch_size(self, batch: SequencePairBatch) -> Tensor:  # type: ignore[override]
        """Number of tokens in this process's batch, of sources and targets, without padding; stays on the device."""
        mask = batch["mask"] if "mask" in batch else torch.ones_like(batch["tokens"], dtype=torch.bool)
        if "valid" in batch:
            mask = mask & batch["valid"][:, None]
        return mask.sum() + (batch["targets"] != IGNORE).sum()

    def flops_per_batch(self, batch: Any) -> int:
        return self.network_flops(batch[self.source_field], batch["target_tokens"], batch.get("mask"))


def check_generation(generation: GenerationConfig, network: ConditionalNetwork) -> None:
    """Compare the options of generation with the network.

    Raises:
        TrunklineError: if the texts can be longer than a target, or begin with an unknown token.
    """
    longest, vocabulary, place = network.config.max_target_length, network.head.out_features, "model.generation."
    if generation.max_new_tokens > longest:
        raise TrunklineError(
            f"generation.max_new_tokens is {generation.max_new_tokens}, but a target has at most {longest} tokens "
            f"(max_target_length); set it to at most {longest}",
            field=f"{place}max_new_tokens",
        )
    if generation.first_token is not None and generation.first_token >= vocabulary:
        raise TrunklineError(
            f"generation.first_token is {generation.first_token}, but the target's vocabulary has {vocabulary} tokens; "
            "take the id from its tokenizer",
            field=f"{place}first_token",
        )
