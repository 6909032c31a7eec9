"""What processes tell each other: rows with their gradients, lists of objects, sums. Needs only torch."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel


def gather_lists(own: list[Any], processes: int) -> list[Any]:
    """The lists of all processes, one after the other; the same in each process. Their lengths may differ."""
    if processes == 1:
        return own
    parts: list[Any] = [None] * processes
    dist.all_gather_object(parts, own)
    return [entry for part in parts for entry in part]


def local_rows(tensor: Tensor) -> Tensor:
    """The rows of a sharded tensor that this process holds, as a view; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gather_rows(rows: Tensor, like: Tensor) -> Tensor:
    """The rows of all processes, if `like` is sharded; all must call this. Otherwise `rows` as they are.

    Args:
        rows: as many as this process holds of `like`.
        like: a tensor with the shape of the result.
    """
    if not isinstance(like, DTensor):
        return rows
    sharded = DTensor.from_local(
        rows, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
    return sharded.full_tensor()


def norms_over_processes(norms: Sequence[Tensor], like: Tensor) -> list[Tensor]:
    """Euclidean norms of whole tensors from those of this process's rows of them.

    Args:
        norms: scalars; if `like` is sharded, all processes must call this with as many.
        like: one of the tensors.
    """
    if not isinstance(like, DTensor):
        return list(norms)
    squares = torch.stack(list(norms)).square()
    dist.all_reduce(squares, group=like.device_mesh.get_group())
    return list(squares.sqrt().unbind())


def rows_before(tensor: Tensor) -> int:
    """Number of rows of a sharded tensor that processes before this one hold; 0 for any other tensor."""
    if not isinstance(tensor, DTensor):
        return 0
    mesh = tensor.device_mesh
    return min(mesh.get_local_rank() * -(-tensor.shape[0] // mesh.size()), tensor.shape[0])


def sum_over_processes(own: Tensor | int, processes: int) -> Tensor | int:
    """Sum of a number over all processes; an int is the same in all of them, so nothing is communicated.

    The host does not wait for the device.
    """
    if isinstance(own, int):
        return own * processes
    if processes > 1:
        dist.all_reduce(own := own.clone())
    return own


def settle_buckets(model: DistributedDataParallel) -> bool:
    """Give DDP its final buckets before the first step, by a backward pass of zeros that is thrown away.

    DDP begins with one bucket for all gradients, and after the first backward pass sorts them into new ones. The place
    in a bucket decides in which order the processes' gradients are added: from three processes on, the first step of a
    resumed run would be rounded otherwise than in a run that went on. The zeros reach the parameters in the opposite
    order of their definition, which is about that of a real backward pass, so that communication overlaps with it as
    usual. No code of the network runs, and no random number is drawn.

    Returns:
        whether each step from now on adds in the same order. Not so for a `static_graph`: DDP learns its graph from the
        first step, so that step must be a real one.
    """
    if model.static_graph:
        return False
    if model.find_unused_parameters:
        return True  # such buckets stay as they are
    module, own = model.module, vars(model.module).get("forward")
    learning = [p for p in module.parameters() if p.requires_grad]
    without = [p for p in learning if p.grad is None]
    # The later an operation was recorded, the earlier it goes backward.
    module.forward = lambda: torch.stack([p.flatten()[:0].abs().sum().float() for p in learning]).sum()
    try:
        with torch.enable_grad():
            model().backward()
    finally:
        del module.forward  # the method of the class is back
        if own is not None:
            module.forward = own
    for p in without:
        p.grad = None
    return True


class _Sharing:
    """The processes that share the samples of a step."""

    group: dist.ProcessGroup | None = None  # all; not a context variable, because CUDA's backward pass has own threads


@contextmanager
def sharing_in(group: dist.ProcessGroup | None) -> Iterator[None]:
    """Let a `Gather` that is made inside concatenate the rows of these processes: others have the same rows again."""
    before, _Sharing.group = _Sharing.group, group
    try:
        yield
    finally:
        _Sharing.group = before


class Gather:
    """Concatenates the rows of all processes, in the order of the processes; the result is the same in each.

    With tensor parallelism a training step has each row in several processes; it counts once.

    The processes may have different numbers of rows, or none. The constructor exchanges these numbers, for which it
    waits for the device, unless they are known to be equal: if they were assumed equal and were not, the run would
    hang or mix up rows.

    Args:
        rows: a tensor with this process's rows; only its length is used.
        equal: whether all processes have equally many rows.
    """

    def __init__(self, rows: Tensor, equal: bool = False) -> None:
        self.counts, self.rank = [len(rows)], 0
        """Number of rows of each process; rank of this process."""
        self.group = _Sharing.group
        if dist.is_available() and dist.is_initialized() and dist.get_world_size(self.group) > 1:
            processes, self.rank = dist.get_world_size(self.group), dist.get_rank(self.group)
            self.counts = self.counts * processes
            if not equal:
                counts = rows.new_empty(processes, dtype=torch.long)
                dist.all_gather_into_tensor(counts, counts.new_tensor([len(rows)]), group=self.group)
                self.counts = counts.tolist()

    @property
    def total(self) -> int:
        """Number of rows of all processes together."""
        return sum(self.counts)

    @property
    def start(self) -> int:
        """Index of this process's first row among the rows of all processes."""
        return sum(self.counts[: self.rank])

    @property
    def own(self) -> slice:
        """Slice of this process's rows among the rows of all processes."""
        return slice(self.start, self.start + self.counts[self.rank])

    def __call__(self, x: Tensor) -> Tensor:
        """(rows of this process, ...) -> (rows of all processes, ...).

        The backward pass adds up the gradients from the losses of all processes.
        """
        return x if len(self.counts) == 1 else _GatherRows.apply(x, self)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gather: Gather) -> Tensor:
        ctx.own, ctx.group = gather.own, gather.group
        longest = max(1, *gather.counts)  # the backends gather equal shapes only
        padded = x.new_zeros(longest, *x.shape[1:])
        padded[: len(x)] = x
        gathered = x.new_empty(len(gather.counts) * longest, *x.shape[1:])
        dist.all_gather_into_tensor(gathered, padded, group=gather.group)
        parts = gathered.split(longest)
        return torch.cat([part[:count] for part, count in zip(parts, gather.counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        total = grad_outputs[0].contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total[ctx.own], None
