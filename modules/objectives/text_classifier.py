"""Classification of texts and of pairs of texts; and what all tasks on text share."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from trunkline import TrunklineError
from trunkline.modules.networks.text_head import TextHead, TextHeadConfig
from trunkline.modules.objectives.base import (
    TrunklineModule,
    as_config,
    check_loss_options,
    check_text_sizes,
    check_tokenizer,
)
from trunkline.modules.training.optim import OptimizerConfig
from trunkline.modules.training.warm_start import start_from


class TextTask(TrunklineModule):
    """Base of the tasks on a `TextHead`; starts from a pre-trained BERT or GPT, or from another task.

    A subclass makes `network` and calls `prepare_network`; batches hold `tokens` (B, T), `mask` (B, T), False
    for padding, and with pairs `segments` (B, T).
    """

    network: TextHead
    unit = "texts"

    def prepare_network(self, init_from: str | None, freeze_blocks: int) -> None:
        """As usual, but `init_from` may also hold the body alone: what `MaskedLM` or `CausalLM` trained.

        Raises:
            TrunklineError: as `start_from` has it.
        """
        if init_from is not None:
            start_from(self.network, init_from)
        super().prepare_network(None, freeze_blocks)

    def setup(self, stage: str) -> None:
        """Compare the network with the data before the first step.

        Raises:
            TrunklineError: if the data has longer rows, more tokens or another number of classes.
        """
        config = self.network.config
        check_tokenizer(self)
        check_text_sizes(self.trainer, config.body, config.body_flag)
        names = self.class_names()
        if names and len(names) != config.num_outputs:
            raise TrunklineError(
                f"the data has {len(names)} classes ({', '.join(names[:3])}{', …' if len(names) > 3 else ''}), but the "
                f"network has {config.num_outputs} outputs; set --model.network.num_outputs {len(names)}"
            )

    def class_names(self) -> list[str]:
        """Names of the classes, if the data knows them."""
        return getattr(getattr(self._trainer, "datamodule", None), "class_names", None) or []

    @property
    def num_classes(self) -> int:
        """K."""
        return self.network.config.num_outputs

    def features(self, batch: dict[str, Tensor]) -> Tensor:
        """(B, D) or (B, T, D): what the output layer reads of a batch."""
        return self.network.states(batch["tokens"], batch.get("segments"), batch.get("mask"))

    def outputs(self, batch: dict[str, Tensor]) -> Tensor:
        """(B, K) or (B, T, K) outputs on a batch, in float32 or wider."""
        return self.network(batch["tokens"], batch.get("segments"), mask=batch.get("mask")).float()

    def forward(self, tokens: Tensor, segments: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """See `TextHead.forward`."""
        return self.network(tokens, segments, mask=mask)

    def flops_per_batch(self, batch: dict[str, Tensor]) -> int:
        """Floating-point operations of a training step on this batch."""
        return self.network_flops(batch["tokens"], mask=batch["mask"])


class TextClassifier(TextTask):
    """Cross-entropy on texts, or pairs of texts, with one label each.

    Batches: those of `TextTask` with `label` (B,) class numbers; in evaluation also `valid` (B,), False where a
    sample is not to be counted.

    Logged in evaluation: `loss`, `acc`, and `f1`, the mean of the classes' F1 scores.

    Args:
        network: shape of body and output.
        optimizer: how it learns.
        label_smoothing: share of the target spread evenly over all classes (arXiv:1512.00567).
        init_from: a checkpoint of `MaskedLM`, `CausalLM` or a task on text; or a folder that `save_pretrained` wrote.
        freeze_blocks: see `TrunklineModule.prepare_network`.
        seed: see `TrunklineModule`.
    """

    def __init__(
        self,
        network: TextHeadConfig,
        optimizer: OptimizerConfig | None = None,
        label_smoothing: float = 0.0,
        init_from: str | None = None,
        freeze_blocks: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(optimizer, seed)
        config = as_config(TextHeadConfig, network)
        self.keep_hyperparameters(
            network=config,
            optimizer=self.optimizer_config,
            label_smoothing=label_smoothing,
            init_from=init_from,
            freeze_blocks=freeze_blocks,
            seed=seed,
        )
        check_loss_options(label_smoothing)
        if config.num_outputs < 2 or config.pool == "none":
            raise TrunklineError(
                f"classification of texts needs --model.network.num_outputs of 2 or more, not {config.num_outputs}, "
                f"and a --model.network.pool of cls, mean or last, not {config.pool}"
            )
        self.network = TextHead(config)
        self.prepare_network(init_from, freeze_blocks)
        self.label_smoothing = label_smoothing
        self.metrics = torch.nn.ModuleDict({stage: self._make_metrics() for stage in ("val", "test")})

    def _make_metrics(self) -> torch.nn.ModuleDict:
        classes = self.network.config.num_outputs
        return torch.nn.ModuleDict(
            {
                "loss": MeanMetric(),
                "acc": MulticlassAccuracy(classes, average="micro"),
                "f1": MulticlassF1Score(classes, average="macro"),
            }
        )

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Loss on one batch."""
        loss = F.cross_entropy(self.outputs(batch), batch["label"], label_smoothing=self.label_smoothing)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Count one batch towards the validation metrics; returns it with `prediction` (B,) for callbacks."""
        return self._evaluate(batch, "val")

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Count one batch towards the test metrics."""
        self._evaluate(batch, "test")

    def _evaluate(self, batch: dict[str, Tensor], stage: str) -> dict[str, Tensor]:
        valid = batch["valid"]
        logits, label = self.outputs(batch)[valid], batch["label"][valid]
        metrics: Any = self.metrics[stage]
        metrics["loss"].update(F.cross_entropy(logits, label, reduction="none"))
        for name in ("acc", "f1"):
            metrics[name].update(logits, label)
        for name, metric in metrics.items():
            self.log(f"{stage}/{name}", metric, prog_bar=name == "acc")
        inputs = {name: value[valid] for name, value in batch.items() if name in ("tokens", "segments", "mask")}
        return {**inputs, "label": label, "prediction": logits.argmax(dim=-1)}

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """`index` (B,) and `probability` (B, K) of the valid samples."""
        valid = batch["valid"]
        return {"index": batch["index"][valid], "probability": self.outputs(batch)[valid].softmax(dim=-1)}
