"""F1 of entities in tagged sentences, such as names of persons and places."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric


class EntityF1(Metric):
    """F1 of entities over all sentences, as the script conlleval counts them (Tjong Kim Sang and Buchholz, 2000).

    An entity is right if its borders and its type are right. torchmetrics only scores single tags.
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
            predicted: predicted tag of each word, such as `B-PER`, `I-PER` or `O`.
            true: right tag of each word.
        """
        found, wanted = entities(predicted), entities(true)
        self.right += len(found & wanted)
        self.predicted += len(found)
        self.true += len(wanted)

    def compute(self) -> Tensor:
        """2 right / (predicted + true); 0 if no entity was predicted and none exists."""
        return 2 * self.right / (self.predicted + self.true).clamp(min=1)


def entities(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """The entities that a sentence's tags mark, each as (type, first word, word after the last).

    As in conlleval, an entity begins at `B-`, and at an `I-` that does not follow a tag of the same type. So both usual
    schemes, IOB1 and BIO (IOB2), are understood.
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
