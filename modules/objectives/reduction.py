"""Turns sums of losses into the mean over all processes and all steps of an accumulation."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recompute

from trunkline.contract import Loss
from trunkline.modules.training.distributed import local_rows

Terms = Sequence[Loss]
"""The parts of an objective's loss: each sum is divided by its own count, then the means are added."""


def as_terms(loss: Loss | Terms) -> Terms:
    """The terms of a loss; a single term becomes a list with one entry."""
    return [loss] if isinstance(loss, Loss) else loss


def scalar_on(device: torch.device, value: Tensor | float) -> Tensor:
    """A plain number as a scalar that the device itself writes: for a copy the host would wait. Tensors stay."""
    return value if isinstance(value, Tensor) else torch.full((), value, device=device)


def mean_count(trainer: L.Trainer, count: Tensor | int) -> Tensor | int:
    """The mean of a count over processes; an int is the same in all processes, so nothing is communicated."""
    if isinstance(count, int):
        return max(count, 1)
    count = count.to(torch.float32, copy=True)  # the sum is written into it
    if trainer.world_size > 1:
        dist.all_reduce(count)  # Lightning's `reduce` would first hold all hosts at a barrier
        count = count / trainer.world_size
    return count.clamp(min=1e-8)


def recomputed_sums(loss: Callable[[Any], Loss | Terms], batches: Sequence[Any]) -> Terms:
    """The terms of several batches, added up term by term.

    Each batch is recomputed in the backward pass, so that memory holds the activations of only one batch. What a term
    logs besides is that of the last batch.
    """
    seen: list[Loss] = []

    def sums(batch: Any) -> tuple[Tensor, ...]:
        seen[:] = as_terms(loss(batch))
        return tuple(scalar_on(term.total.device, x) for term in seen for x in (term.total, term.count))

    parts = [torch.stack([x.float() for x in recompute(sums, batch, use_reentrant=False)]) for batch in batches]
    totals = torch.stack(parts).sum(dim=0)  # (2 * terms,)
    return [
        replace(term, total=totals[2 * n], count=totals[2 * n + 1].detach(), logs=detached(term.logs))
        for n, term in enumerate(list(seen))
    ]


def detached(logs: Mapping[str, Any]) -> dict[str, Any]:
    """What is logged, without its graph."""
    return {name: value.detach() if isinstance(value, Tensor) else value for name, value in logs.items()}


class Accumulation:
    """The gradient of the mean over all steps of an accumulation.

    The total count is known only after the last step, but each step's loss must go backward immediately. So each loss
    is divided by the count of the first step, and before the optimiser's step the gradients are multiplied by
    `correction`.
    """

    def __init__(self) -> None:
        self.begun = False
        self.reference: Tensor | int = 1
        self.total: Tensor | float = 0.0
        self.count: Tensor | int = 0

    def add(self, trainer: L.Trainer, loss: Loss, first: bool) -> Tensor:
        """The loss that goes backward in this step; the trainer divides it by the number of steps.

        Args:
            trainer: communicates with the other processes.
            loss: the loss of this process's batch.
            first: whether this step begins an accumulation.
        """
        if first or not self.begun:  # a resume with other batches may begin amid an accumulation
            self.begun = True
            reference = mean_count(trainer, loss.count)
            # Not below 1: a first batch without any count would make the gradients of the others overflow.
            self.reference = reference if isinstance(reference, int) else reference.clamp(min=1)
            self.total, self.count = 0.0, 0
        self.total = self.total + loss.total.detach()
        self.count = self.count + loss.count
        return loss.total / self.reference

    def mean(self, trainer: L.Trainer) -> Tensor | float:
        """The loss of all steps so far, scaled so that its average over processes is the global mean."""
        return self.total / mean_count(trainer, self.count)

    def correction(self, trainer: L.Trainer, steps: int) -> Tensor | float:
        """The factor that turns the accumulated gradients into those of the global mean."""
        return self.reference * steps / mean_count(trainer, self.count)

    def correct(self, module: torch.nn.Module, trainer: L.Trainer, steps: int) -> None:
        """Multiply all gradients of a module by the correction, in one kernel call."""
        factor = self.correction(trainer, steps)
        if isinstance(factor, Tensor) or factor != 1.0:
            torch._foreach_mul_([local_rows(p.grad) for p in module.parameters() if p.grad is not None], factor)
