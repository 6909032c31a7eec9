"""Small numbers that all processes learn one step later, so that no process waits for another or for its device."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class LateReduction:
    """Reduces a few numbers over all processes, and gives the result at the next call.

    A collective whose result is read at once makes the host wait in every step: for the device, and for the slowest
    process. Here the numbers of a step travel while the next step runs. Each process reads the result at the same
    call, so that all act on it at the same step. The numbers stay on the device of the process group: its own
    library reduces them in a tree, where gloo would need a ring and a connection between any two of 1,000 processes.

    Args:
        operation: how the numbers of the processes are combined; None keeps those of each process.
    """

    def __init__(self, operation: Any = dist.ReduceOp.MAX) -> None:
        self.operation = operation
        self.waiting: tuple[Tensor, Any, Any] | None = None

    def exchange(self, own: Tensor) -> list[float]:
        """Send numbers, and return the result of the call before; zeros at the first call.

        Args:
            own: (N,), this process's numbers, on the device of the process group; changed in place.
        """
        found = self.receive() or [0.0] * len(own)
        self.send(own)
        return found

    def send(self, own: Tensor) -> None:
        """Start to reduce (N,) numbers."""
        reduces = self.operation is not None and dist.is_available() and dist.is_initialized()
        work = dist.all_reduce(own, self.operation, async_op=True) if reduces else None
        self.waiting = (own, work, None)
        if own.device.type == "cuda":
            side = torch.cuda.Stream(own.device)
            side.wait_stream(torch.cuda.current_stream(own.device))
            with torch.cuda.stream(side):
                if work is not None:
                    work.wait()  # only this stream waits
                host = torch.empty(own.shape, dtype=own.dtype, pin_memory=True)
                host.copy_(own, non_blocking=True)
                done = torch.cuda.Event()
                done.record(side)
            own.record_stream(side)
            self.waiting = (host, None, done)

    def receive(self) -> list[float] | None:
        """The numbers that were sent last, reduced; None if they were received already."""
        if self.waiting is None:
            return None
        (numbers, work, done), self.waiting = self.waiting, None
        if done is not None:
            done.synchronize()  # the device has finished this long ago, unless it is a whole step behind
        elif work is not None:
            work.wait()
        found: list[float] = numbers.tolist()
        return found
