"""Processes that load data, and when they end."""

import ctypes
import functools
import os
import signal
from collections.abc import Callable
from multiprocessing import sharedctypes, util
from types import FrameType
from typing import Any

LOOKS_EVERY = 1.0
"""Seconds from one look of a worker at whether the process that it loads for is ending to the next, after a SIGTERM."""


def worker_start() -> Callable[[int], None]:
    """What each worker of a loader calls as it starts: `worker_init_fn` of a DataLoader."""
    return functools.partial(outlive_signals, ending=_ending(os.getpid()))


@functools.cache
def _ending(process: int) -> Any:
    """A flag in shared memory, which this process sets as it ends, before it ends its children and waits for them."""
    flag = sharedctypes.RawValue(ctypes.c_bool, False)
    util.Finalize(None, setattr, (flag, "value", True), exitpriority=0)
    return flag


def outlive_signals(worker: int, ending: Any) -> None:
    """Keep a worker running after a Ctrl-C, SIGTERM or SIGUSR1 that was sent to all processes of the run.

    The training process decides when to stop, and needs its workers until its step is finished and saved. It may also
    end without ending them: Python then sends a SIGTERM to each, and waits.

    Args:
        worker: its number.
        ending: its `value` says whether the training process is ending.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGUSR1"):  # not on Windows
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        for number in (signal.SIGTERM, signal.SIGALRM):
            signal.signal(number, functools.partial(_end_with, ending))


def _end_with(ending: Any, number: int, frame: FrameType | None) -> None:
    if ending.value:
        os._exit(0)
    signal.setitimer(signal.ITIMER_REAL, LOOKS_EVERY)
