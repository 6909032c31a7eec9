"""The average of the weights over training, which is what a checkpoint holds and an evaluation uses."""

from collections import defaultdict
from collections.abc import Iterator
from itertools import chain
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from trunkline.modules.training.exact_resume import averages_of
from trunkline.ranges import check_ranges


class WeightAverage(WeightAveraging):
    """Exponential moving average of all weights (Polyak and Juditsky, 1992).

    It does what Lightning's `EMAWeightAveraging` does and reads its checkpoints, but in a few kernel calls for all
    weights together, and without making the host wait for the device in every step.

    Args:
        decay: share of the old average that stays in each update.
        update_every_n_steps: optimiser steps from one update to the next.
        update_starting_at_step: the first step that is averaged; until then the average is the first weights.

    Raises:
        TrunklineError: if an argument is out of its range.
    """

    def __init__(self, decay: float = 0.999, update_every_n_steps: int = 1, update_starting_at_step: int = 0) -> None:
        arguments = {"decay": decay, "update_every_n_steps": update_every_n_steps}
        check_ranges("trainer.callbacks", arguments, decay="[0, 1]", update_every_n_steps="[1, inf)")
        super().__init__(use_buffers=True, multi_avg_fn=get_ema_multi_avg_fn(decay))
        self.update_every_n_steps, self.update_starting_at_step = update_every_n_steps, update_starting_at_step

    @property
    def state_key(self) -> str:
        """That of Lightning's callback, so that a run that began with it can go on with this one."""
        return "EMAWeightAveraging"

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """Whether a step belongs to the average; the end of an epoch is none."""
        if step_idx is None or step_idx < self.update_starting_at_step:
            return False
        return step_idx % self.update_every_n_steps == 0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        for average in averages_of([self]):
            average.n_averaged = torch.zeros_like(average.n_averaged, device="cpu")  # each update asks for it
            average.__class__ = HostCounted


class HostCounted(AveragedModel):
    """An exponential average whose counter lies on the host and stays there.

    PyTorch's own update copies the counter to the device each time and waits for that, although such an average only
    needs to know whether the update is the first one.
    """

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Take the weights and buffers of a model into the average."""
        alike: dict[torch.dtype, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for pair in zip(weights_and_buffers(self.module), weights_and_buffers(model), strict=True):
            alike[pair[0].dtype].append(pair)
        update: Any = self.multi_avg_fn if self.n_averaged else take_over
        for pairs in alike.values():
            update(*map(list, zip(*pairs, strict=True)), self.n_averaged)
        self.n_averaged += 1


def take_over(averages: list[Tensor], currents: list[Tensor], _: Tensor) -> None:
    """The first update."""
    for average, current in zip(averages, currents, strict=True):
        average.copy_(current)


def weights_and_buffers(module: nn.Module) -> Iterator[Tensor]:
    """All tensors of a module."""
    return (tensor.detach() for tensor in chain(module.parameters(), module.buffers()))
