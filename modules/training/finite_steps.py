"""Steps whose loss or gradient is not finite: they never reach the weights, and end the run or are left out."""

import warnings
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from trunkline import FoundByAll, TrunklineError
from trunkline.modules.training.distributed import gather_lists, local_rows, norms_over_processes
from trunkline.modules.training.late import LateReduction

DIVERGED = (
    "Lower optimizer.lr, lengthen optimizer.warmup, set trainer.gradient_clip_val to 1, or with 16-mixed precision use "
    "bf16-mixed, or leave a few such steps out with optimizer.skip_nonfinite; then resume, or begin anew if there is "
    "no checkpoint"
)
LEAST_SCALE = 1.0
"""A gradient that overflows at this loss scale of 16-mixed would do so without one. DeepSpeed ends a run here, too;
fairseq does at 1e-4, but it scales a sum over thousands of tokens, where the loss here is a mean."""
MOST_ROWS = 100
"""Number of rows that a message names."""


class Step(NamedTuple):
    """A step whose loss and gradient are being looked at."""

    number: int
    """Optimiser steps before it."""
    epoch: int
    batches: list[int]
    """Numbers in the epoch of the batches that were accumulated."""
    rows: list[Tensor]
    """(B,) row numbers of each of these batches in this process."""
    loss: Tensor
    """Scalar, the sum of this process's losses."""


class FiniteSteps:
    """Looks at the loss and the gradient of every step, before the optimiser uses it.

    A loss that is not finite in any process becomes a gradient that is not finite in all (`spread_fault`), so that all
    processes see the same and act together without asking each other.

    On a CPU a bad step is found at once, and its gradients are dropped. On an accelerator the host would have to wait
    in every step: there the fused optimisers leave the step out themselves (`found_inf`, as for `GradScaler`), and the
    host learns of it at the next step. An optimiser that cannot is waited for, if steps may be left out; otherwise a
    bad step does reach the weights in memory, but no checkpoint, and the next step ends the run.

    With 16-mixed precision gradients overflow while the right scale is looked for. Such steps are left out, by the
    optimiser if it can, else by `GradScaler`, which waits for the device; and they are only counted (`overflows`). A
    step is bad if its loss is not finite, or if a gradient overflows although the scale has fallen to `LEAST_SCALE`.

    Args:
        allowed: bad steps of a run that are left out; the one after them ends it.
    """

    def __init__(self, allowed: int = 0) -> None:
        self.allowed, self.skipped = allowed, 0
        """Bad steps that may be left out; those that were."""
        self.overflows: Tensor | float | None = None
        """Scalar, steps that `GradScaler` has left out, on the device so that the host need not wait; None without."""
        self.late = LateReduction(None)
        self.sent: Step | None = None
        """The step of which the host does not know yet whether it was finite."""
        self.forget()

    @property
    def left_out(self) -> Tensor | float | None:
        """Scalar, how many of the run's steps have not reached the weights; None if none may be left out."""
        if self.overflows is None:
            return float(self.skipped) if self.allowed else None
        return self.overflows + self.skipped

    def save(self, checkpoint: dict[str, Any]) -> None:
        """Store the counts in a checkpoint."""
        overflows = None if self.overflows is None else float(self.overflows)
        checkpoint |= {"skipped_steps": self.skipped, "overflowed_steps": overflows}

    def restore(self, checkpoint: dict[str, Any]) -> None:
        """Go on counting from what `save` has stored."""
        self.skipped = checkpoint.get("skipped_steps", 0)
        self.overflows = checkpoint.get("overflowed_steps")

    def forget(self) -> None:
        """Begin a new step."""
        self.batches: list[int] = []
        self.rows: list[Tensor] = []
        self.loss: Tensor | None = None

    def begin(self, batch: Any, number: int, optimizers: Iterable[torch.optim.Optimizer] = ()) -> None:
        """Remember which rows a batch has, for the message, and let the gradients be clipped without their scale."""
        for optimizer in optimizers:
            self.leave_overflows_to(optimizer, itself=False)
        self.batches.append(number)
        rows = batch.get("index") if isinstance(batch, Mapping) else None
        if isinstance(rows, Tensor):
            self.rows.append(rows)

    def add(self, loss: Tensor) -> None:
        """Add the loss of a batch of this step."""
        self.loss = loss.detach() if self.loss is None else self.loss + loss.detach()

    def check(self, module: L.LightningModule, optimizer: torch.optim.Optimizer, norm: Tensor) -> None:
        """Keep a bad step away from the weights.

        Args:
            module: its trainer is at the end of the step's backward pass.
            optimizer: the one that is about to step.
            norm: scalar, of the gradients of all processes.

        Raises:
            TrunklineError: if this step is bad, or on an accelerator the one before, and no more may be left out.
        """
        trainer = module.trainer
        loss = norm if self.loss is None else self.loss
        step = Step(trainer.global_step, trainer.current_epoch, self.batches, self.rows, loss)
        self.forget()
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        scales = scaler is not None
        bad = norm.isfinite().logical_not().float()
        if scaler is not None:  # the norm is not finite if the scaler has found such a gradient in any process
            overflowed, scale = bad, scaler.scale(torch.ones_like(bad))  # unlike get_scale, without waiting for it
            bad = torch.maximum(loss.isfinite().logical_not().float(), overflowed * (scale <= LEAST_SCALE))
            if trainer.world_size > 1:  # not every process sees another one's loss in its gradients
                dist.all_reduce(bad, dist.ReduceOp.MAX)
            overflowed = (1 - bad) * overflowed
            self.overflows = overflowed if self.overflows is None else self.overflows + overflowed
        able = scales or skips_by_itself(optimizer)
        if self.host_may_wait(bad) or (self.allowed and not able):
            if bool(bad):
                self.reject(trainer, step)
                if not scales:
                    drop_gradients(optimizer)
            return
        if able and not scales:
            optimizer.found_inf = bad  # type: ignore[attr-defined]
        self.settle(trainer)
        self.late.send(bad.reshape(1).clone())
        self.sent = step

    def leave_overflows_to(self, optimizer: torch.optim.Optimizer, itself: bool) -> None:
        """Say whether the optimiser, not `GradScaler`, leaves out a step in which the scaler has found an overflow.

        The scaler has to read what it found, and the host waits. But of an optimiser that skips by itself Lightning
        takes it that it also divides the gradients by the scale: then they could not be clipped, and their norm would
        be logged with the scale. So this is said only after the clipping of a step, and taken back before the next.
        """
        optimizer._step_supports_amp_scaling = itself and skips_by_itself(optimizer)  # type: ignore[attr-defined]

    def host_may_wait(self, result: Tensor) -> bool:
        """Whether a result is there as soon as the host can ask for it."""
        return result.device.type == "cpu"

    def settle(self, trainer: L.Trainer) -> None:
        """Look at the step that was still on its way; before a checkpoint is saved, too.

        Raises:
            TrunklineError: if it was bad and no more may be left out.
        """
        found, step, self.sent = self.late.receive(), self.sent, None
        if found is not None and found[0] and step is not None:
            self.reject(trainer, step)

    def reject(self, trainer: L.Trainer, step: Step) -> None:
        """Count a bad step; all processes do so at the same time.

        Raises:
            TrunklineError: if no more may be left out, naming step and rows.
        """
        self.skipped += 1
        what = self.describe(trainer, step)
        if self.skipped > self.allowed:
            left = f" {self.allowed} such steps were left out before." if self.allowed else ""
            text = f"{what}; nothing was saved since.{left} {DIVERGED}"
            raise FoundByAll(text, "model.optimizer.skip_nonfinite", trainer.is_global_zero)
        if trainer.is_global_zero:
            warnings.warn(f"{what}; left out, as {self.skipped} of at most {self.allowed}", stacklevel=2)

    def describe(self, trainer: L.Trainer, step: Step) -> str:
        """What was not finite, in which step, and in which rows of which process."""
        rows = [int(row) for batch in step.rows for row in batch]
        own = (bool(step.loss.isfinite()), rows)
        found: list[tuple[bool, list[int]]] = gather_lists([own], trainer.world_size)
        guilty = [rank for rank, (finite, _) in enumerate(found) if not finite]
        named = [row for rank, (_, rows) in enumerate(found) if rank in guilty or not guilty for row in rows]
        named = list(dict.fromkeys(named))  # with tensor parallelism several processes have the same ones
        what = "the loss" if guilty else "a gradient"
        text = f"{what} is not finite by step {step.number} (epoch {step.epoch})"
        if not guilty and getattr(trainer.precision_plugin, "scaler", None) is not None:
            text += f" although the loss scale has fallen to {LEAST_SCALE:g}"
        numbers = ", ".join(map(str, step.batches))
        text += f", in batch {numbers} of the epoch"
        if guilty and trainer.world_size > 1:
            text += f", in process {', '.join(map(str, guilty))}"
        if named:
            more = f" and {len(named) - MOST_ROWS} more" if len(named) > MOST_ROWS else ""
            text += f", which has the rows {', '.join(map(str, named[:MOST_ROWS]))}{more}"
        return text


def spread_fault(loss: Tensor) -> Tensor:
    """A loss with the same value and gradient, but all gradients are NaN if it is not finite.

    An infinite loss may have a finite gradient, with which it would go unnoticed in the other processes.
    """
    return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)


def gradient_norm(module: torch.nn.Module) -> Tensor:
    """Scalar, the norm of all gradients; of sharded parameters, over all processes."""
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    own = torch.nn.utils.get_total_norm([local_rows(gradient) for gradient in gradients])
    return norms_over_processes([own], gradients[0])[0]


def skips_by_itself(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a step changes nothing if the attribute `found_inf`, a scalar on the device, is 1."""
    return bool(optimizer.defaults.get("fused"))


def drop_gradients(optimizer: torch.optim.Optimizer) -> None:
    """Take the gradients away: a parameter without one, its moments and its step count stay as they are."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = None


def refuse_diverged(module: torch.nn.Module) -> None:
    """Refuse weights that are not finite, of sharded ones in all processes alike.

    Raises:
        TrunklineError: naming the first of them.
    """
    parameters = dict(module.named_parameters())
    finite = torch.stack([local_rows(p.detach()).isfinite().all().float() for p in parameters.values()])
    first = next(iter(parameters.values()))
    if isinstance(first, DTensor):
        dist.all_reduce(finite, dist.ReduceOp.MIN, group=first.device_mesh.get_group())
    for name, good in zip(parameters, finite.tolist(), strict=True):
        if not good:
            raise TrunklineError(f"the weight {name} is not finite; nothing was saved. {DIVERGED}")
