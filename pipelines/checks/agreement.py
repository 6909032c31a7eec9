"""Check that one process, accumulated gradients and several processes give the same loss and the same gradients."""

import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from trunkline.modules.training.distributed import gather_rows, local_rows
from trunkline.modules.training.sharding import group_size
from trunkline.pipelines.checks.trial import Trial
from trunkline.pipelines.checks.trial_process import NO_LOSS, TrialObserver, batch_norms, trained_loss
from trunkline.pipelines.checks.trials import Workbench

TOLERANCE = 1e-5
"""Largest relative difference of losses and gradients in float32."""
ROWS = 32
"""Most rows of the step that is compared."""
NOISE = 0.02
"""Standard deviation of what is added to all weights, so that new heads of zeros let gradients pass."""


class StepObserver(TrialObserver):
    """Keeps the loss, the rows and the gradients of a step, and which parameters the optimiser lacks."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for name, p in pl_module.named_parameters():
            if p.requires_grad:
                shake(name, p)
        grouped = {
            id(p) for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]
        }
        learning = [(name, p) for name, p in pl_module.named_parameters() if p.requires_grad]
        device = trainer.strategy.root_device.type
        count = trainer.accelerator.auto_device_count()
        self.result = {
            "ungrouped": [name for name, p in learning if id(p) not in grouped],
            "frozen": sum(not p.requires_grad for p in pl_module.parameters()),
            "device": device,
            "devices": count if device != "cpu" else 2,
            "batch_norms": list(batch_norms(pl_module)),
        }

    def after_step(self, trainer: L.Trainer, module: L.LightningModule, rows: list[Any]) -> None:
        again = trainer.global_rank % group_size(trainer) > 0  # another process has the same rows
        self.result |= {"rows": [] if again else rows, "loss": trained_loss(module), "gradients": {}}
        for name, p in module.named_parameters():
            if p.requires_grad:
                whole = None if p.grad is None else gather_rows(local_rows(p.grad), like=p.grad)
                self.result["gradients"][name] = None if whole is None else whole.float().cpu().clone()


def shake(name: str, p: Tensor) -> None:
    """Add noise that depends only on the parameter's name."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    noise = (NOISE * torch.randn(p.shape, generator=generator)).to(p.device, p.dtype)
    with torch.no_grad():
        p.add_(distribute_tensor(noise, p.device_mesh, p.placements) if isinstance(p, DTensor) else noise)


class Agreement(NamedTuple):
    """How far a step agrees with that of one process."""

    same_rows: bool
    loss: float | None
    """Relative difference; None if there was no loss to compare."""
    gradient: float
    """Largest relative difference of a parameter's gradient."""
    worst: str
    """The parameter with that difference."""

    @property
    def passed(self) -> bool:
        """Whether nothing differs by more than `TOLERANCE`; a difference that is no number does."""
        return self.same_rows and self.loss is not None and self.loss <= TOLERANCE and self.gradient <= TOLERANCE


def step_trial(processes: int = 1, parts: int = 1) -> Trial:
    """A step of one batch in float32, in several processes, or in parts that are accumulated."""
    kind = f"{processes} processes" if processes > 1 else f"{parts} accumulated parts" if parts > 1 else "one process"
    return Trial(
        f"a step in {kind}", StepObserver(), processes=processes, parts=parts, precision="32-true", rows=ROWS // 2 * 2
    )


def compare_steps(alone: Mapping[str, Any], others: list[Mapping[str, Any]]) -> Agreement:
    """Compare a step of one process with the same step of others.

    Args:
        alone: result of the single process.
        others: result of each of the others; their gradients are the same.
    """
    rows = sorted(row for other in others for row in other["rows"])
    losses = [other["loss"] for other in others]
    loss = None
    if alone["loss"] is not None and None not in losses:
        loss = abs(sum(losses) / len(losses) - alone["loss"]) / max(abs(alone["loss"]), 1e-8)
    gradients, found = alone["gradients"], others[0]["gradients"]
    zero = torch.zeros(())
    total = float(sum(g.double().square().sum() for g in gradients.values() if g is not None)) ** 0.5
    gradient, worst = 0.0, ""
    for name, mine in gradients.items():
        mine, other = zero if mine is None else mine.double(), found[name]
        other = zero if other is None else other.double()
        # A gradient that is zero but for rounding, such as that of a key's bias, is compared with the others' size.
        relative = float((mine - other).norm() / (mine.norm() + 0.1 * total + 1e-30))
        if not relative <= gradient:
            gradient, worst = relative, name
    return Agreement(rows == sorted(alone["rows"]), loss, gradient, worst)


def explain_difference(found: Agreement, kind: str, alone: Mapping[str, Any]) -> str:
    """What is wrong with a step that differs, and what to do."""
    if not found.same_rows:
        return (
            f"{kind} got other rows than one process in the first step: the order of samples must be a function of "
            "(seed, epoch) and be shared by the processes; use the loaders of TrunklineDataModule, or their "
            "ResumableBatchSampler"
        )
    if found.loss is None:
        return f"{kind}: {NO_LOSS}"
    unused = [name for name, gradient in alone["gradients"].items() if gradient is None]
    if unused and "processes" in kind:
        return (
            f"{kind} differ in the gradient of {found.worst}: {' and '.join(unused[:3])} got no gradient at all, and "
            "DDP then leaves others without their average; remove what the loss does not use, or freeze it"
        )
    apart = (
        f"{kind}: the loss differs by {found.loss:.1e}, the gradient of {found.worst or 'no parameter'} by "
        f"{found.gradient:.1e}"
    )
    if norms := alone["batch_norms"]:
        return (
            f"{apart}: {' and '.join(norms[:3])} normalise by the statistics of the rows that they see, which are only "
            "a part of the batch; use a norm of each row (LayerNorm, GroupNorm), or on several GPUs SyncBatchNorm "
            "(--trainer.sync_batchnorm true), whose accumulated parts still differ"
        )
    return (
        f"{apart}: `loss` must return the sum over the rows and their count (Loss(total, count)), not a "
        "mean; a loss that compares rows with each other is `joint` and gathers the rows of all processes; what is "
        "random in it must be off when `self.training` is false"
    )


def count_of_parts(processes: int) -> int:
    """Parts of an accumulation: as many as there are processes, so that they have the same rows."""
    return max(processes, 2)


def run_agreement(bench: Workbench, alone: Mapping[str, Any], processes: int) -> dict[str, Agreement]:
    """Compare accumulated gradients, and if there are to be several processes also those, with one process."""
    parts = count_of_parts(processes)
    found = {f"{parts} accumulated parts": compare_steps(alone, bench.run(step_trial(parts=parts)))}
    if processes > 1:
        found[f"{processes} processes"] = compare_steps(alone, bench.run(step_trial(processes)))
    return found
