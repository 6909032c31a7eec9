"""Masked language modelling: predict hidden tokens, and optionally whether the second text follows the first."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torchmetrics import MeanMetric, Metric

from trunkline.contract import IGNORE, Loss, MaskedBatch
from trunkline.modules.losses import linear_cross_entropy, token_losses
from trunkline.modules.networks import BERT, BERTConfig
from trunkline.modules.objectives.base import TrunklineModule
from trunkline.modules.objectives.checks import check_loss_options, facts_of
from trunkline.modules.objectives.reduction import Terms


class MaskedLM(TrunklineModule):
    """Cross-entropy of hidden tokens; the last block and the head compute only these tokens.

    Logged in evaluation: `loss` in nats per hidden token, `ppl` (pseudo-perplexity), `acc`, and `unigram_entropy`, the
    loss of guessing by frequency alone: a run whose loss stays near it is stuck. With pairs of texts also `next_loss`
    and `next_acc`.

    Args:
        network: shape of the BERT; with `next_sentence` the loss of the pairs is added. If gradients are accumulated
            too, each batch is then computed twice, because hidden tokens and pairs have counts of their own.
        label_smoothing: share of the target spread evenly over the vocabulary (arXiv:1512.00567).
        **shared: see `TrunklineModule`.
    """

    network: BERT
    network_class = BERT
    unit = "tokens"

    def __init__(self, network: BERTConfig | None = None, *, label_smoothing: float = 0.0, **shared: Any) -> None:
        super().__init__(**shared)
        check_loss_options(label_smoothing)
        config = self.configured(BERTConfig, network)
        self.keep_hyperparameters(network=config, label_smoothing=label_smoothing)
        self.label_smoothing = label_smoothing
        self.joint = config.next_sentence  # hidden tokens and pairs have separate counts
        self.network = BERT(config)
        self.start()

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T) -> (B, T, V) logits."""
        return self.network(tokens)

    def states(self, batch: MaskedBatch) -> tuple[Tensor, Tensor | None]:
        """Inputs of the output layer (B N, D), and with pairs the logits (B, 2) of next-sentence prediction."""
        inputs: dict[str, Any] = {"mask": batch.get("mask"), "keep": batch["positions"], "return_logits": False}
        if not self.network.config.next_sentence:
            return self.network(batch["tokens"], batch.get("segment"), **inputs).flatten(0, 1), None
        states, pairs = self.network(batch["tokens"], batch.get("segment"), **inputs, return_next=True)
        return states.flatten(0, 1), pairs

    def loss(self, batch: MaskedBatch) -> Terms:
        """The loss over the hidden tokens, and with `next_sentence` the loss over the pairs."""
        states, pairs = self.states(batch)
        targets, head = batch["targets"].flatten(), self.network.head
        total = linear_cross_entropy(states, head.weight, targets, head.bias, label_smoothing=self.label_smoothing)
        terms = [Loss(total, (targets != IGNORE).sum())]
        if pairs is not None:
            follows = batch["follows"]
            next_total = F.cross_entropy(pairs.float(), follows, reduction="sum")
            terms.append(Loss(next_total, (follows != IGNORE).sum(), name="next_loss"))
        return terms

    def make_metrics(self) -> dict[str, Metric]:
        names = ["loss", "acc"] + (["next_loss", "next_acc"] if self.network.config.next_sentence else [])
        return {name: MeanMetric() for name in names}

    def evaluate(self, batch: MaskedBatch, metrics: Any) -> None:
        states, pairs = self.states(batch)
        targets, head = batch["targets"].flatten(), self.network.head
        counted = targets != IGNORE
        losses, best = token_losses(states[counted], head.weight, targets[counted], head.bias)
        metrics["loss"].update(losses)
        metrics["acc"].update((best == targets[counted]).float())
        if pairs is not None:
            valid = batch["follows"] != IGNORE
            logits, follows = pairs[valid].float(), batch["follows"][valid]
            metrics["next_loss"].update(F.cross_entropy(logits, follows, reduction="none"))
            metrics["next_acc"].update((logits.argmax(dim=1) == follows).float())

    def finish_evaluation(self, stage: str, metrics: Any) -> dict[str, Any]:
        found = {"ppl": metrics["loss"].compute().exp()}  # over all processes
        baseline = facts_of(self.trainer).unigram_entropy
        return found if baseline is None else {**found, "unigram_entropy": baseline}

    def batch_size(self, batch: MaskedBatch) -> int:  # type: ignore[override]
        """Number of tokens in this process's batch."""
        return batch["tokens"].numel()

    def flops_per_batch(self, batch: MaskedBatch) -> int:
        pairs = {"return_next": True} if self.network.config.next_sentence else {}
        return self.network_flops(batch["tokens"], keep=batch["positions"], **pairs)
