"""Entities in tagged sentences: names of persons, places and the like, and how many were found."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric


class EntityF1(Metric):
    """F1 of entities over all sentences, as the script conlleval counts them (Tjong Kim Sang and Buchholz, 2000).

    An entity counts as right if its borders and its type are. torchmetrics has scores of single tags only.
    """

    full_state_update = False
    right: Tensor
    predicted: Tensor
    true: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("right", "predicted", "true"):
            self.add_state(name, torch.tensor(0), dist_reduce_fx="sum")

    def update(self, predicted: Sequence[str], true: Sequence[str]) -> None:
        """Count the entities of one sentence.

        Args:
            predicted: tag of each word, such as `B-PER`, `I-PER` or `O`.
            true: the right ones.
        """
        found, wanted = entities(predicted), entities(true)
        self.right += len(found & wanted)
        self.predicted += len(found)
        self.true += len(wanted)

    def compute(self) -> Tensor:
        """2 right / (predicted + true); 0 where there is neither."""
        return 2 * self.right / (self.predicted + self.true).clamp(min=1)


def entities(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """(type, first word, word after the last) of the entities that a sentence's tags mark.

    Read as conlleval reads them: `B-` begins an entity, and so does an `I-` that follows no tag of its type. So both
    usual schemes, IOB1 and BIO (IOB2), are understood.
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
