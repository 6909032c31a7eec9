"""Tensors of all processes, with gradients to where they came from. Needs torch alone."""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class Share(NamedTuple):
    """Which rows of all processes' together are this process's own."""

    counts: list[int]
    """Rows of each process."""
    rank: int

    @property
    def start(self) -> int:
        """Number of the first own row among all."""
        return sum(self.counts[: self.rank])

    @property
    def own(self) -> slice:
        """The own rows among all."""
        return slice(self.start, self.start + self.counts[self.rank])


def share_of(x: Tensor) -> Share:
    """Ask all processes for the number of their rows; each may have another, or none.

    An accelerator is waited for; to assume equal numbers instead would hang or mix up rows where they are not.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return Share([len(x)], 0)
    counts = x.new_empty(dist.get_world_size(), dtype=torch.long)
    dist.all_gather_into_tensor(counts, counts.new_tensor([len(x)]))
    return Share(counts.tolist(), dist.get_rank())


def gather_rows(x: Tensor, share: Share) -> Tensor:
    """(own rows, ...) -> (all rows, ...), in the order of the processes, the same on each.

    Backward adds up what all processes' losses say of the own rows.
    """
    return x if len(share.counts) == 1 else _GatherRows.apply(x, share)


class _GatherRows(torch.autograd.Function):
    """See `gather_rows`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, share: Share) -> Tensor:
        ctx.share = share
        longest = max(1, *share.counts)  # the backends gather equal shapes only
        padded = x.new_zeros(longest, *x.shape[1:])
        padded[: len(x)] = x
        gathered = x.new_empty(len(share.counts) * longest, *x.shape[1:])
        dist.all_gather_into_tensor(gathered, padded)
        parts = gathered.split(longest)
        return torch.cat([part[:count] for part, count in zip(parts, share.counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        total = grad_outputs[0].contiguous().clone()
        dist.all_reduce(total)
        return total[ctx.share.own], None
