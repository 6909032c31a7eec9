"""Tensors of all processes, with gradients to where they came from. Needs torch alone."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Gather:
    """Puts the rows of all processes together, in the order of the processes, the same on each.

    Each process may have another number of rows, or none. Making one waits for the device, because the numbers must
    be known: to take them for equal would hang or mix up rows where they are not.

    Args:
        rows: a tensor with this process's rows.
    """

    def __init__(self, rows: Tensor) -> None:
        self.counts, self.rank = [len(rows)], 0
        """Rows of each process; number of this process."""
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            counts = rows.new_empty(dist.get_world_size(), dtype=torch.long)
            dist.all_gather_into_tensor(counts, counts.new_tensor([len(rows)]))
            self.counts, self.rank = counts.tolist(), dist.get_rank()

    @property
    def total(self) -> int:
        """Rows of all processes."""
        return sum(self.counts)

    @property
    def start(self) -> int:
        """Number of the first row of this process among all."""
        return sum(self.counts[: self.rank])

    @property
    def own(self) -> slice:
        """The rows of this process among all."""
        return slice(self.start, self.start + self.counts[self.rank])

    def __call__(self, x: Tensor) -> Tensor:
        """(own rows, ...) -> (all rows, ...).

        Backward adds up what the losses of all processes say about the own rows.
        """
        return x if len(self.counts) == 1 else _GatherRows.apply(x, self)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gather: Gather) -> Tensor:
        ctx.own = gather.own
        longest = max(1, *gather.counts)  # the backends gather equal shapes only
        padded = x.new_zeros(longest, *x.shape[1:])
        padded[: len(x)] = x
        gathered = x.new_empty(len(gather.counts) * longest, *x.shape[1:])
        dist.all_gather_into_tensor(gathered, padded)
        parts = gathered.split(longest)
        return torch.cat([part[:count] for part, count in zip(parts, gather.counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        total = grad_outputs[0].contiguous().clone()
        dist.all_reduce(total)
        return total[ctx.own], None
