"""Measure the peak memory of a function, in a process of its own."""

import gc
import multiprocessing
import os
import re
import resource
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

Prepare = Callable[[], Callable[[], Any]]
"""Prepares the work and returns it as a function. It must be a module's function, or a `partial` of one."""


def peak_memory(prepare: Prepare) -> int:
    """Bytes of CPU memory that the work needs at its peak, in addition to the memory after its preparation.

    It runs in a new process: in this one, free memory of the allocator would hide a part, and in a fork `ru_maxrss`
    would begin at the parent's peak.
    """
    # Return freed memory to the system at once: otherwise gaps in glibc's heap would count, depending on chance.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**16)
    try:
        # A new process for each measurement, so that an earlier one cannot affect it.
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            return pool.submit(_measure, prepare, torch.get_num_threads()).result()
    finally:
        del os.environ["MALLOC_MMAP_THRESHOLD_"]


def _measure(prepare: Prepare, threads: int) -> int:
    torch.set_num_threads(threads)
    work = prepare()
    gc.collect()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak (Linux)
        before = _status("VmRSS")
    except OSError:  # another system, or not permitted: then the peak of the preparation is the baseline
        before = _peak()
    work()
    return _peak() - before


def _peak() -> int:
    """The largest resident memory so far, in bytes."""
    if Path("/proc/self/status").exists():
        return _status("VmHWM")
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes if sys.platform == "darwin" else 1024 * kilobytes


def _status(field: str) -> int:
    """A size in the process's status (Linux), in bytes."""
    found = re.search(rf"^{field}:\s*(\d+) kB$", Path(f"/proc/{os.getpid()}/status").read_text(), re.MULTILINE)
    assert found is not None
    return 1024 * int(found[1])
