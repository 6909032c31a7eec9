"""A limit of rows that training replaces because they cannot be read."""

import math
from typing import Any

import lightning as L
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from trunkline import TrunklineError
from trunkline.modules.callbacks.graceful_stop import GracefulStop
from trunkline.modules.objectives.checks import facts_of
from trunkline.modules.training.distributed import gather_lists
from trunkline.modules.training.late import LateReduction
from trunkline.modules.training.sharding import group_size

LAST_ROWS = 20
"""Number of rows that a message names."""


class SkippedRows(Callback):
    """Ends a run if more rows of an epoch cannot be read than the data's `max_skipped` allows, such as of a lost disk.

    The rows are counted over all processes; all learn the sum of a batch at the end of the next one, without waiting,
    and end at the same step, which is saved. The count of an epoch that was interrupted goes on after a resume.
    """

    def __init__(self) -> None:
        self.limit: int | None = None
        """Rows of an epoch; None if the data never skips any."""
        self.epoch, self.count = 0, 0
        self.news = LateReduction(dist.ReduceOp.SUM)
        self.last: list[tuple[Tensor, Tensor | None]] = []
        """Which rows of the last two batches were skipped, and the row numbers."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.limit, self.last = None, []
        self.news = LateReduction(dist.ReduceOp.SUM)
        share = facts_of(trainer).max_skipped
        if share is not None:
            rows = len(trainer.train_dataloader.dataset)  # type: ignore[union-attr]
            self.limit = math.floor(share * rows) if share < 1 else int(share)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._settle()
        if self.epoch != trainer.current_epoch:
            self.epoch, self.count = trainer.current_epoch, 0

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        if self.limit is None or "skipped" not in batch:
            return
        self._settle()
        if self.count > self.limit:
            error = self._error(trainer)
            self.count = 0  # a run that goes on after the source was mended begins to count anew
            GracefulStop.end_all(trainer, error)
            return
        self.last = [*self.last[-1:], (batch["skipped"], batch.get("index"))]
        again = trainer.global_rank % group_size(trainer) > 0  # another process counts the same rows
        self.news.send(batch["skipped"].sum().float().reshape(1) * (not again))

    def _settle(self) -> None:
        """Add what was still on its way."""
        self.count += int((self.news.receive() or [0.0])[0])

    def _error(self, trainer: L.Trainer) -> TrunklineError:
        own = [int(row) for skipped, rows in self.last if rows is not None for row in rows[skipped > 0]]
        rows = list(dict.fromkeys(gather_lists(own, trainer.world_size)))  # several processes may have the same ones
        named = ", ".join(map(str, rows[:LAST_ROWS])) + (" …" if len(rows) > LAST_ROWS else "")
        return TrunklineError(
            f"{self.count} rows of epoch {self.epoch} cannot be read and were replaced by others, of which "
            f"max_skipped allows {self.limit}; the last ones: {named}. See the warnings above, mend the source or "
            "raise max_skipped, then resume",
            "data.max_skipped",
        )

    def state_dict(self) -> dict[str, Any]:
        self._settle()
        return {"epoch": self.epoch, "count": self.count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.epoch, self.count = state_dict["epoch"], state_dict["count"]
