"""How an objective is evaluated: metrics of a split, and counts of flagged rows."""

from collections.abc import Mapping
from typing import Any, ClassVar

import lightning as L
import torch
from torchmetrics import MeanMetric, Metric, SumMetric

from trunkline import TrunklineError
from trunkline.contract import Loss
from trunkline.modules.objectives.reduction import Terms, as_terms, scalar_on
from trunkline.modules.training.exact_resume import drop_half_done_validation
from trunkline.modules.training.sharding import group_size

STAGES = ("val", "test")


class EvaluatedModule(L.LightningModule):
    """A module with a `loss` that is validated and tested by metrics. `TrunklineModule` trains it."""

    counted: ClassVar[dict[str, str]] = {}
    """Field of a batch that flags rows -> name of the metric that counts the flagged rows of an epoch."""
    shown: ClassVar[tuple[str, ...]] = ("loss",)
    """Evaluation metrics that the progress bar shows."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = torch.nn.ModuleDict(
            {f"{stage}_{name}": SumMetric("disable") for stage in ("train", *STAGES) for name in self.counted}
        )

    def make_all_metrics(self) -> None:
        """Make the metrics of all splits; their sizes may depend on the network."""
        self.metrics = torch.nn.ModuleDict({stage: torch.nn.ModuleDict(self.make_metrics()) for stage in STAGES})

    def loss(self, batch: Any) -> Loss | Terms:
        """The sum of a batch's losses and the count to divide it by.

        If there are several such sums, each is divided by its own count and the means are added. This method uses no
        trainer, logs nothing and does not communicate between processes: `training_step` does.
        """
        raise NotImplementedError(f"{type(self).__name__} has no loss")

    def make_metrics(self) -> dict[str, Metric]:
        """New metrics for one split, by name."""
        return {"loss": MeanMetric()}

    def evaluate(self, batch: Any, metrics: Any) -> Any:
        """Update the metrics of a split with a batch; what is returned is meant for callbacks.

        By default the metric is the mean of `loss`. It also counts rows that only fill up a batch (`valid` False).
        """
        for term in as_terms(self.loss(batch)):
            if term.name not in metrics:
                raise TrunklineError(f"{type(self).__name__}.make_metrics has no metric for '{term.name}'; add one")
            metrics[term.name].update(term.total / term.count, weight=term.count)

    def logged(self, metrics: Any) -> dict[str, Metric]:
        """The metrics of a split that are logged."""
        return dict(metrics.items())

    def start_evaluation(self) -> None:
        """Discard what an earlier evaluation has left; it may have been interrupted."""

    def finish_evaluation(self, stage: str, metrics: Any) -> dict[str, Any]:
        """Further figures of a whole split, by name; they must be the same in all processes."""
        return {}

    def _evaluate(self, batch: Any, stage: str) -> Any:
        metrics: Any = self.metrics[stage]
        found = self.evaluate(batch, metrics)
        for name, metric in self.logged(metrics).items():
            self.log(f"{stage}/{name}", metric, prog_bar=name in self.shown)
        self.count(batch, stage)
        return found

    def _finish(self, stage: str) -> None:
        for name, value in self.finish_evaluation(stage, self.metrics[stage]).items():
            self.log(f"{stage}/{name}", value, prog_bar=name in self.shown, sync_dist=True)

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        return self._evaluate(batch, "val")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate(batch, "test")

    # A compiled network runs uncompiled in evaluations, whose batches have other sizes: the first one would come before
    # training, and training would then be compiled for sizes that vary.

    def on_validation_start(self) -> None:
        torch.compiler.set_stance("force_eager")
        drop_half_done_validation(self.trainer)

    def on_validation_end(self) -> None:
        torch.compiler.set_stance("default")

    def on_test_start(self) -> None:
        torch.compiler.set_stance("force_eager")

    def on_test_end(self) -> None:
        torch.compiler.set_stance("default")

    def on_validation_epoch_start(self) -> None:
        self.start_evaluation()

    def on_test_epoch_start(self) -> None:
        self.start_evaluation()

    def on_validation_epoch_end(self) -> None:
        self._finish("val")

    def on_test_epoch_end(self) -> None:
        self._finish("test")

    def count(self, batch: Mapping[str, Any], stage: str) -> None:
        """Log how many rows of this epoch are flagged (see `counted`), over all processes.

        Args:
            batch: a flag that it does not hold counts as 0.
            stage: train, val or test.
        """
        for name, title in self.counted.items():
            metric: Any = self.counts[f"{stage}_{name}"]
            again = stage == "train" and self.global_rank % group_size(self.trainer)  # another process counts the row
            metric.update(scalar_on(self.device, 0 if again else batch.get(name, 0)))
            self.log(f"{stage}/{title}", metric, on_step=False, on_epoch=True)
