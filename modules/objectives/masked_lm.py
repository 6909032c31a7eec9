"""Masked language modelling: name hidden tokens, and optionally tell whether two texts follow each other."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import MeanMetric

from trunkline.modules.losses import IGNORE, linear_cross_entropy, token_losses
from trunkline.modules.networks import BERT, BERTConfig
from trunkline.modules.objectives.base import (
    TrunklineModule,
    as_config,
    check_loss_options,
    check_text_sizes,
    check_tokenizer,
)
from trunkline.modules.training.optim import OptimizerConfig


class MaskedLM(TrunklineModule):
    """Cross-entropy of hidden tokens; the last block and the head compute no more than these.

    Batches: `tokens` (B, T) ids, some hidden; `positions` (B, N) of those to name; `targets` (B, N) what they
    are, -100 where a row has fewer; optionally `segments` (B, T), `mask` (B, T), False for padding, and
    `follows` (B,), 1 if the second text of a pair follows the first, -100 if not to be counted.

    Logged in evaluation: `loss` in nats per hidden token, `ppl` (pseudo-perplexity), `acc`, beside them
    `unigram_entropy`, the loss of guessing by frequency alone: a run that stays near it is stuck; with
    pairs also `next_loss` and `next_acc`.

    Args:
        network: shape of the BERT; with `next_sentence` both losses are added.
        optimizer: how it learns.
        label_smoothing: share of the target spread evenly over the vocabulary (arXiv:1512.00567).
        init_from: see `TrunklineModule.prepare_network`.
        freeze_blocks: see there.
        seed: see `TrunklineModule`.
    """

    network: BERT
    unit = "tokens"

    def __init__(
        self,
        network: BERTConfig | None = None,
        optimizer: OptimizerConfig | None = None,
        label_smoothing: float = 0.0,
        init_from: str | None = None,
        freeze_blocks: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(optimizer, seed)
        config = as_config(BERTConfig, network)
        self.keep_hyperparameters(
            network=config,
            optimizer=self.optimizer_config,
            label_smoothing=label_smoothing,
            init_from=init_from,
            freeze_blocks=freeze_blocks,
            seed=seed,
        )
        check_loss_options(label_smoothing)
        self.network = BERT(config)
        self.prepare_network(init_from, freeze_blocks)
        self.label_smoothing = label_smoothing
        names = ["loss", "acc"] + (["next_loss", "next_acc"] if config.next_sentence else [])
        self.metrics = torch.nn.ModuleDict(
            {stage: torch.nn.ModuleDict({name: MeanMetric() for name in names}) for stage in ("val", "test")}
        )

    def setup(self, stage: str) -> None:
        """Compare the network with the data before the first step; see `check_text_sizes`, `check_tokenizer`."""
        check_text_sizes(self.trainer, self.network.config)
        check_tokenizer(self)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T) -> (B, T, V) logits."""
        return self.network(tokens)

    def states(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """What the output layer reads, (B N, D), and with pairs the (B, 2) logits of what follows."""
        keep = self.kept(batch)
        states = self.network(
            batch["tokens"], batch.get("segments"), mask=batch.get("mask"), keep=keep, return_logits=False
        )
        pairs = None
        if self.network.config.next_sentence:
            pairs, states = self.network.next_sentence(states[:, 0]), states[:, 1:]
        return self.network.masked_head(states).flatten(0, 1), pairs

    def kept(self, batch: dict[str, Tensor]) -> Tensor:
        """(B, N) positions that a head reads, or (B, 1 + N) with the first token's."""
        first = [torch.zeros_like(batch["positions"][:, :1])] if self.network.config.next_sentence else []
        return torch.cat([*first, batch["positions"]], dim=1)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Loss on one batch."""
        states, pairs = self.states(batch)
        targets, head = batch["targets"].flatten(), self.network.head
        total = linear_cross_entropy(states, head.weight, targets, head.bias, label_smoothing=self.label_smoothing)
        loss = self.mean_over_processes(total, (targets != IGNORE).sum())
        self.log("train/loss", loss, prog_bar=True)
        if pairs is not None:
            next_loss = F.cross_entropy(pairs.float(), batch["follows"])
            self.log("train/next_loss", next_loss)
            loss = loss + next_loss
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Count one batch towards the validation metrics."""
        self._evaluate(batch, "val")

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Count one batch towards the test metrics."""
        self._evaluate(batch, "test")

    def _evaluate(self, batch: dict[str, Tensor], stage: str) -> None:
        states, pairs = self.states(batch)
        metrics: Any = self.metrics[stage]
        targets, head = batch["targets"].flatten(), self.network.head
        counted = targets != IGNORE
        losses, best = token_losses(states[counted], head.weight, targets[counted], head.bias)
        found = {"loss": losses, "acc": (best == targets[counted]).float()}
        if pairs is not None:
            valid = batch["follows"] != IGNORE
            logits, follows = pairs[valid].float(), batch["follows"][valid]
            found["next_loss"] = F.cross_entropy(logits, follows, reduction="none")
            found["next_acc"] = (logits.argmax(dim=1) == follows).float()
        for name, values in found.items():
            metrics[name].update(values)
            self.log(f"{stage}/{name}", metrics[name], prog_bar=name == "loss")

    def on_validation_epoch_end(self) -> None:
        """Log what follows from the mean loss."""
        self._log_derived("val")

    def on_test_epoch_end(self) -> None:
        """See `on_validation_epoch_end`."""
        self._log_derived("test")

    def _log_derived(self, stage: str) -> None:
        metrics: Any = self.metrics[stage]
        self.log(f"{stage}/ppl", metrics["loss"].compute().exp())  # over all processes
        baseline = getattr(getattr(self.trainer, "datamodule", None), "unigram_entropy", None)
        if baseline is not None:
            self.log(f"{stage}/unigram_entropy", baseline)

    def batch_size(self, batch: dict[str, Tensor]) -> int:
        """Tokens in this process's batch."""
        return batch["tokens"].numel()

    def flops_per_batch(self, batch: dict[str, Tensor]) -> int:
        """Floating-point operations of a training step on this batch."""
        return self.network_flops(batch["tokens"], keep=self.kept(batch))
