"""From sums of losses to the mean over all processes and all steps of an accumulation."""

from collections.abc import Sequence

import lightning as L
import torch
from torch import Tensor

from trunkline.contract import Loss

Terms = Sequence[Loss]
"""What an objective's loss consists of: one sum, or several that are divided by counts of their own and then added."""


def mean_count(trainer: L.Trainer, count: Tensor | int) -> Tensor | int:
    """The mean over processes of a count; a whole number is the same in all of them, and needs no collective."""
    if isinstance(count, int):
        return max(count, 1)
    count = count.float()
    if trainer.world_size > 1:
        count = trainer.strategy.reduce(count, reduce_op="mean")
    return count.clamp(min=1e-8)


class Accumulation:
    """The gradient of a sum over several steps, divided at the end by all that was counted in them.

    How much the steps count together is known only after the last one, but each must go backward at once. So each is
    divided by what the first one counts, and `correction` makes the mean of it before the optimiser steps.
    """

    def __init__(self) -> None:
        self.reference: Tensor | int = 1
        self.total: Tensor | float = 0.0
        self.count: Tensor | int = 0

    def add(self, trainer: L.Trainer, loss: Loss, first: bool) -> Tensor:
        """What goes backward for a step; the trainer divides it by the number of steps.

        Args:
            trainer: knows the other processes.
            loss: of this process's batch.
            first: whether an accumulation begins with this step.
        """
        if first:
            reference = mean_count(trainer, loss.count)
            # Not below 1, or a first batch that counts nothing would make the others' gradients overflow.
            self.reference = reference if isinstance(reference, int) else reference.clamp(min=1)
            self.total, self.count = 0.0, 0
        self.total = self.total + loss.total.detach()
        self.count = self.count + loss.count
        return loss.total / self.reference

    def mean(self, trainer: L.Trainer) -> Tensor | float:
        """The loss of all steps so far; summed over processes and divided by their number it is the global mean."""
        return self.total / mean_count(trainer, self.count)

    def correction(self, trainer: L.Trainer, steps: int) -> Tensor | float:
        """The factor that makes the mean over all that was counted of the gradients."""
        return self.reference * steps / mean_count(trainer, self.count)


def scale_gradients(module: torch.nn.Module, factor: Tensor | float) -> None:
    """Multiply all gradients, in one kernel call for all of them."""
    grads = [p.grad for p in module.parameters() if p.grad is not None]
    if not isinstance(factor, Tensor) and factor == 1.0:
        return
    torch._foreach_mul_(grads, factor)
