"""Causal language modelling: predict each next token."""

import math
from typing import Any

import torch
from torch import Tensor
from torchmetrics import MeanMetric

from trunkline.modules.losses import IGNORE, linear_cross_entropy, token_losses
from trunkline.modules.networks import GPT, GPTConfig
from trunkline.modules.objectives.base import (
    TrunklineModule,
    as_config,
    check_loss_options,
    check_text_sizes,
    check_tokenizer,
)
from trunkline.modules.training.optim import OptimizerConfig


class CausalLM(TrunklineModule):
    """Cross-entropy of each next token.

    Batches: `tokens` (B, T) ids, `targets` (B, T) the ids that follow, -100 where nothing is to be
    predicted, and with packed documents `segments` (B, T), the number of each token's document.

    Logged in evaluation: `loss` in nats per token, `ppl` (perplexity), `acc` (share of tokens that were the
    likeliest) and `bpb`, bits per byte of text, which unlike the others compares across tokenizers.

    Args:
        network: shape of the GPT.
        optimizer: how it learns.
        label_smoothing: share of the target spread evenly over the vocabulary (arXiv:1512.00567).
        z_loss: factor of the squared log-partition (arXiv:2204.02311; 1e-4 there); 0 is off.
        init_from: see `TrunklineModule.prepare_network`.
        freeze_blocks: see there.
        seed: see `TrunklineModule`.
    """

    network: GPT
    unit = "tokens"

    def __init__(
        self,
        network: GPTConfig | None = None,
        optimizer: OptimizerConfig | None = None,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        init_from: str | None = None,
        freeze_blocks: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(optimizer, seed)
        config = as_config(GPTConfig, network)
        self.keep_hyperparameters(
            network=config,
            optimizer=self.optimizer_config,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            init_from=init_from,
            freeze_blocks=freeze_blocks,
            seed=seed,
        )
        check_loss_options(label_smoothing, z_loss)
        self.network = GPT(config)
        self.prepare_network(init_from, freeze_blocks)
        self.label_smoothing, self.z_loss = label_smoothing, z_loss
        self.metrics = torch.nn.ModuleDict(
            {stage: torch.nn.ModuleDict({name: MeanMetric() for name in ("loss", "acc")}) for stage in ("val", "test")}
        )

    def setup(self, stage: str) -> None:
        """Compare the network with the data before the first step; see `check_text_sizes`, `check_tokenizer`."""
        check_text_sizes(self.trainer, self.network.config)
        check_tokenizer(self)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T) -> (B, T, V) logits."""
        return self.network(tokens)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Loss on one batch."""
        states = self.network(batch["tokens"], batch.get("segments"), return_logits=False)
        targets = batch["targets"].flatten()
        total = linear_cross_entropy(
            states.flatten(0, 1),
            self.network.head.weight,
            targets,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
        )
        loss = self.mean_over_processes(total, (targets != IGNORE).sum())
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Count one batch towards the validation metrics."""
        self._evaluate(batch, "val")

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Count one batch towards the test metrics."""
        self._evaluate(batch, "test")

    def _evaluate(self, batch: dict[str, Tensor], stage: str) -> None:
        states = self.network(batch["tokens"], batch.get("segments"), return_logits=False)
        counted = batch["targets"] != IGNORE
        target = batch["targets"][counted]
        losses, best = token_losses(states[counted], self.network.head.weight, target)
        metrics: Any = self.metrics[stage]
        metrics["loss"].update(losses)
        metrics["acc"].update((best == target).float())
        for name, metric in metrics.items():
            self.log(f"{stage}/{name}", metric, prog_bar=name == "loss")

    def on_validation_epoch_end(self) -> None:
        """Log what follows from the mean loss."""
        self._log_derived("val")

    def on_test_epoch_end(self) -> None:
        """See `on_validation_epoch_end`."""
        self._log_derived("test")

    def _log_derived(self, stage: str) -> None:
        metrics: Any = self.metrics[stage]
        loss = metrics["loss"].compute()  # over all processes
        self.log(f"{stage}/ppl", loss.exp())
        bytes_per_token = getattr(getattr(self.trainer, "datamodule", None), "bytes_per_token", {})
        if stage in bytes_per_token:
            self.log(f"{stage}/bpb", loss / math.log(2) / bytes_per_token[stage])

    def batch_size(self, batch: dict[str, Tensor]) -> int:
        """Tokens in this process's batch."""
        return batch["tokens"].numel()

    def flops_per_batch(self, batch: dict[str, Tensor]) -> int:
        """Floating-point operations of a training step on this batch."""
        return self.network_flops(batch["tokens"])
