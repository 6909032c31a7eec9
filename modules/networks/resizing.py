"""Trained rows for other tokens and other lengths: embeddings, output layers and positions of texts."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class SharedWords:
    """Which tokens two vocabularies have in common."""

    there: Tensor
    """(N,) ids of the common tokens in the old vocabulary."""
    here: Tensor
    """(N,) their ids in the new one."""
    old: int
    """Largest id of the old vocabulary + 1; further rows of an embedding only fill it up."""
    new: int
    """Number of tokens of the new vocabulary."""
    taken: bool
    """Whether a token that only the new vocabulary has stands among the ids of the old one."""

    @classmethod
    def of(cls, old: Mapping[str, int], new: Mapping[str, int]) -> Self:
        """Compare vocabularies, token -> id, by the text of the tokens."""
        common = sorted((old[token], number) for token, number in new.items() if token in old)
        there, here = torch.tensor(common, dtype=torch.int64).reshape(-1, 2).unbind(1)
        size = max(old.values(), default=-1) + 1
        taken = any(token not in old and number < size for token, number in new.items())
        return cls(there, here, size, len(new), taken)

    @property
    def same_ids(self) -> bool:
        """Whether each id that both vocabularies use means the same token; new tokens may follow the old ones."""
        return not self.taken and torch.equal(self.there, self.here)

    def rows(self, weight: Tensor, count: int, extra: int = 0) -> Tensor:
        """The rows of a weight for the new vocabulary.

        A row that is not known begins as the mean of the old tokens' rows (Hewitt, 2021, "Initializing New Word
        Embeddings for Pretrained Language Models"): other rows can give a new token nearly all of the probability.

        Args:
            weight: (rows, ...) for the old vocabulary; those after its tokens are unused.
            count: rows wanted.
            extra: rows at the end that are for no token and stay at the end, such as that of CTC's blank.

        Returns:
            (count, ...).
        """
        kept, tokens = weight[len(weight) - extra :], weight[: len(weight) - extra]
        if self.same_ids and count == len(weight):
            return weight
        mean = tokens[: self.old].float().mean(dim=0).to(weight.dtype)
        found = mean.expand(count - extra, *mean.shape).clone()
        if self.same_ids:  # also what fills up both
            both = min(len(tokens), len(found))
            found[:both] = tokens[:both]
        else:
            here, there = self.here.to(weight.device), self.there.to(weight.device)
            found[here] = tokens[there]
        return torch.cat((found, kept))


def resize_positions_of_text(table: nn.Embedding, length: int, first: int = 0) -> None:
    """Change the number of learned positions, in place.

    A position keeps its row: for shorter texts the first rows stay. For longer ones they follow again and again, which
    Longformer found better than random rows (arXiv:2004.05150, section 5): each block of text begins as it was trained.

    Args:
        table: rows of positions.
        length: rows wanted, `first` included.
        first: rows at the beginning that stand for no position and stay.
    """
    if length == table.num_embeddings:
        return
    old = table.weight
    index = torch.arange(length - first, device=old.device) % (table.num_embeddings - first) + first
    index = torch.cat((torch.arange(first, device=old.device), index))
    table.weight = nn.Parameter(old.detach()[index], requires_grad=old.requires_grad)
    table.num_embeddings = length
