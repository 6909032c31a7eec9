"""Scores of sounds with several labels."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics.classification import MultilabelAveragePrecision
from torchmetrics.utilities.data import dim_zero_cat


class MeanPrecision(MultilabelAveragePrecision):
    """Mean of the classes' average precisions (mAP), of the classes that some clip has.

    torchmetrics' own mean counts 0 for a class that no clip has.

    Args:
        classes: number of classes.
    """

    def __init__(self, classes: int) -> None:
        super().__init__(classes, average=None)

    def compute(self) -> Tensor:  # type: ignore[override]
        """The mean, from 0 to 1; 0 if no clip has a label."""
        occurs = (dim_zero_cat(self.target) > 0).any(dim=0)
        precisions: Any = super().compute()
        return precisions[occurs].mean() if occurs.any() else torch.zeros((), device=occurs.device)
