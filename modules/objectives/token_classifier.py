"""Classification of tokens: names of persons and places, parts of speech."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from trunkline import TrunklineError
from trunkline.modules.losses import IGNORE
from trunkline.modules.networks.text_head import TextHead, TextHeadConfig
from trunkline.modules.objectives.base import as_config, check_loss_options
from trunkline.modules.objectives.text_classifier import TextTask
from trunkline.modules.training.optim import OptimizerConfig


class TokenClassifier(TextTask):
    """Cross-entropy of a tag for each word.

    Batches: those of `TextTask` with `targets` (B, T), the tag of a word at its first token and -100 elsewhere; in
    evaluation also `valid` (B,), False where a sample is not to be counted.

    Logged in evaluation: `loss` and `acc` over words, and `f1`: of whole entities as CoNLL counts them (borders and
    type must be right) if the data's tags begin with `B-` and `I-`, else the mean of the tags' F1 scores.

    Args:
        network: shape of body and output; `pool` must be `none`.
        optimizer: how it learns.
        label_smoothing: share of the target spread evenly over all tags (arXiv:1512.00567).
        init_from: see `TextClassifier`.
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
        if config.num_outputs < 2 or config.pool != "none":
            raise TrunklineError(
                f"tagging needs --model.network.num_outputs of 2 or more, not {config.num_outputs}, and "
                f"--model.network.pool none, not {config.pool}"
            )
        self.network = TextHead(config)
        self.prepare_network(init_from, freeze_blocks)
        self.label_smoothing = label_smoothing
        self.metrics = torch.nn.ModuleDict({stage: self._make_metrics() for stage in ("val", "test")})

    def _make_metrics(self) -> torch.nn.ModuleDict:
        tags = self.network.config.num_outputs
        return torch.nn.ModuleDict(
            {
                "loss": MeanMetric(),
                "acc": MulticlassAccuracy(tags, average="micro"),
                "f1": MulticlassF1Score(tags, average="macro"),
                "entity_f1": EntityF1(),
            }
        )

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Loss on one batch."""
        targets = batch["targets"].flatten()
        logits = self.outputs(batch).flatten(0, 1)  # (B T, K)
        total = F.cross_entropy(logits, targets, reduction="sum", label_smoothing=self.label_smoothing)
        loss = self.mean_over_processes(total, (targets != IGNORE).sum())
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Count one batch towards the validation metrics; returns `label` and `prediction` (N,) of its words."""
        return self._evaluate(batch, "val")

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Count one batch towards the test metrics."""
        self._evaluate(batch, "test")

    def _evaluate(self, batch: dict[str, Tensor], stage: str) -> dict[str, Tensor]:
        valid = batch["valid"]
        logits, targets = self.outputs(batch)[valid], batch["targets"][valid]
        counted, best = targets != IGNORE, logits.argmax(dim=-1)
        words, labels = logits[counted], targets[counted]  # (N, K), (N,)
        metrics: Any = self.metrics[stage]
        metrics["loss"].update(F.cross_entropy(words, labels, reduction="none"))
        metrics["acc"].update(words, labels)
        names = self.class_names()
        f1 = metrics["entity_f1" if any(name.startswith(("B-", "I-")) for name in names) else "f1"]
        if f1 is metrics["f1"]:
            f1.update(words, labels)
        else:
            for row, own, tag in zip(counted, best, targets, strict=True):
                f1.update([names[i] for i in own[row].tolist()], [names[i] for i in tag[row].tolist()])
        for name, metric in {"loss": metrics["loss"], "acc": metrics["acc"], "f1": f1}.items():
            self.log(f"{stage}/{name}", metric, prog_bar=name == "f1")
        return {"label": labels, "prediction": words.argmax(dim=-1)}

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """`index` of its sample, `prediction`, the likeliest tag, and `probability`, each (N,), of the valid words."""
        words = (batch["targets"] != IGNORE) & batch["valid"][:, None]
        probability, prediction = self.outputs(batch)[words].softmax(dim=-1).max(dim=-1)
        index = batch["index"][:, None].expand_as(words)[words]
        return {"index": index, "prediction": prediction, "probability": probability}


class EntityF1(Metric):
    """F1 of entities over all sentences, as the script conlleval counts them (Tjong Kim Sang and Buchholz, 2000)."""

    full_state_update = False
    right: Tensor
    predicted: Tensor
    true: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("right", "predicted", "true"):
            self.add_state(name, torch.tensor(0), dist_reduce_fx="sum")

    def update(self, predicted: Sequence[str], true: Sequence[str]) -> None:
        """Count one sentence's tags."""
        found, wanted = entities(predicted), entities(true)
        self.right += len(found & wanted)
        self.predicted += len(found)
        self.true += len(wanted)

    def compute(self) -> Tensor:
        """2 right / (predicted + true); 0 where there is neither."""
        return 2 * self.right / (self.predicted + self.true).clamp(min=1)


def entities(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """(type, first word, word after the last) of the entities in a sentence's BIO tags.

    As in conlleval, an `I-` that follows no tag of its type begins an entity, so that IOB1 is read as well.
    """
    found = set()
    kind, start = "", 0
    for place, tag in enumerate([*tags, "O"]):
        mark, _, own = tag.partition("-")
        goes_on = mark == "I" and own == kind
        if kind and not goes_on:
            found.add((kind, start, place))
            kind = ""
        if mark in ("B", "I") and not goes_on:
            kind, start = own, place
    return found
