"""A warning at a training loss that is far above what it was before."""

import statistics
import warnings
from collections import deque
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from trunkline.modules.training.exact_resume import accumulates
from trunkline.modules.training.late import LateReduction

NORMAL = 1.4826
"""Standard deviation of a normal distribution, in units of its median absolute deviation."""


class LossSpikes(Callback):
    """Warns of a step whose loss is far above the losses before it; training goes on.

    The loss of the first process is compared with the median of its last `window` steps. It is a spike if it lies above
    that by more than all of:

    - `deviations` times their standard deviation, estimated from the median absolute deviation, which a few large
      losses do not change;
    - three times what the largest of them does, because the losses of some tasks often jump;
    - a fifth of the median.

    After a warning there is no other for `pause` steps. On an accelerator a loss is read at the next step, so that
    nobody waits for it. A resumed run begins with no earlier losses.

    Args:
        window: number of losses to compare with; nothing is said until half of them are there.
        deviations: see above.
        pause: number of steps.
    """

    def __init__(self, window: int = 128, deviations: float = 8.0, pause: int = 1000) -> None:
        self.window, self.deviations, self.pause = window, deviations, pause
        self.losses: deque[float] = deque(maxlen=window)
        self.quiet_until = 0
        self.news, self.step = LateReduction(None), 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.losses.clear()
        self.news, self.quiet_until = LateReduction(None), 0

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *_: Any) -> None:
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if not trainer.is_global_zero or accumulates(trainer) or not isinstance(loss, Tensor):
            return
        self._read()
        self.news.send(loss.detach().float().reshape(1).clone())
        self.step = trainer.global_step
        if loss.device.type == "cpu":
            self._read()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._read()

    def _read(self) -> None:
        found = self.news.receive()
        if found is not None:
            self.look(self.step, found[0])

    def look(self, step: int, loss: float) -> None:
        """Compare the loss of a step with those before, and remember it."""
        if len(self.losses) >= max(self.window // 2, 2) and step >= self.quiet_until:
            usual = statistics.median(self.losses)
            spread = NORMAL * statistics.median(abs(value - usual) for value in self.losses)
            bar = usual + max(self.deviations * spread, 3 * (max(self.losses) - usual), abs(usual) / 5)
            if loss > bar:
                self.quiet_until = step + self.pause
                warnings.warn(
                    f"the loss jumps to {loss:.4g} at step {step}; over the last {len(self.losses)} steps its median "
                    f"is {usual:.4g} and its largest value {max(self.losses):.4g}. If it does not come down again, "
                    "resume from an earlier checkpoint with a lower optimizer.lr or trainer.gradient_clip_val",
                    stacklevel=2,
                )
        self.losses.append(loss)
