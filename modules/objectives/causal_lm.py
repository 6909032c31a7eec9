"""Causal language modelling: predict each next token."""

import math
from typing import Any

from torch import Tensor
from torchmetrics import MeanMetric, Metric

from trunkline.contract import IGNORE, Loss, TokenBatch
from trunkline.modules.losses import linear_cross_entropy, token_losses
from trunkline.modules.networks import GPT, GPTConfig
from trunkline.modules.objectives.base import TrunklineModule
from trunkline.modules.objectives.checks import check_loss_options, facts_of


class CausalLM(TrunklineModule):
    """Cross-entropy of each next token.

    Logged in evaluation: `loss` in nats per token, `ppl` (perplexity), `acc` (share of tokens that the network
    predicts as the likeliest) and `bpb` (bits per byte of text). Only `bpb` can be compared across tokenizers.

    Args:
        network: shape of the GPT.
        label_smoothing: share of the target spread evenly over the vocabulary (arXiv:1512.00567).
        z_loss: factor of the squared log-partition (arXiv:2204.02311, which uses 1e-4); 0 is off.
        **shared: see `TrunklineModule`.
    """

    network: GPT
    network_class = GPT
    unit = "tokens"

    def __init__(
        self, network: GPTConfig | None = None, *, label_smoothing: float = 0.0, z_loss: float = 0.0, **shared: Any
    ) -> None:
        super().__init__(**shared)
        check_loss_options(label_smoothing, z_loss)
        config = self.configured(GPTConfig, network)
        self.keep_hyperparameters(network=config, label_smoothing=label_smoothing, z_loss=z_loss)
        self.label_smoothing, self.z_loss = label_smoothing, z_loss
        self.network = GPT(config)
        self.start()

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T) -> (B, T, V) logits."""
        return self.network(tokens)

    def loss(self, batch: TokenBatch) -> Loss:
        """The loss over the tokens that have a target."""
        states = self.network(batch["tokens"], batch.get("document"), return_logits=False)
        targets = batch["targets"].flatten()
        total = linear_cross_entropy(
            states.flatten(0, 1),
            self.network.head.weight,
            targets,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
        )
        return Loss(total, (targets != IGNORE).sum())

    def make_metrics(self) -> dict[str, Metric]:
        return {"loss": MeanMetric(), "acc": MeanMetric()}

    def evaluate(self, batch: TokenBatch, metrics: Any) -> None:
        states = self.network(batch["tokens"], batch.get("document"), return_logits=False)
        counted = batch["targets"] != IGNORE
        target = batch["targets"][counted]
        losses, best = token_losses(states[counted], self.network.head.weight, target)
        metrics["loss"].update(losses)
        metrics["acc"].update((best == target).float())

    def finish_evaluation(self, stage: str, metrics: Any) -> dict[str, Any]:
        loss = metrics["loss"].compute()  # over all processes
        found = {"ppl": loss.exp()}
        bytes_per_token = facts_of(self.trainer).bytes_per_token
        if stage in bytes_per_token:
            found["bpb"] = loss / math.log(2) / bytes_per_token[stage]
        return found

    def batch_size(self, batch: TokenBatch) -> int:  # type: ignore[override]
        """Number of tokens in this process's batch."""
        return batch["tokens"].numel()

    def flops_per_batch(self, batch: TokenBatch) -> int:
        return self.network_flops(batch["tokens"])
