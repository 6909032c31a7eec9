"""Peak memory of a piece of work, measured in a process of its own."""

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
"""Makes what the work needs, and returns the work; a function of a module, or a `partial` of one."""


def peak_memory(prepare: Prepare) -> int:
    """Bytes of the CPU's memory that work takes at its peak, beyond what there was when it was prepared.

    A process of its own, begun anew: in this one, the allocator's free memory would hide a part, and `ru_maxrss` of a
    fork begins at its parent's peak.
    """
    # What is freed goes back to the system at once: else holes in glibc's heap would count, by chance.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**16)
    try:
        # One process for one task: nothing of another measurement is left in it.
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            return pool.submit(_measure, prepare, torch.get_num_threads()).result()
    finally:
        del os.environ["MALLOC_MMAP_THRESHOLD_"]


def _measure(prepare: Prepare, threads: int) -> int:
    torch.set_num_threads(threads)
    work = prepare()
    gc.collect()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew (Linux)
        before = _status("VmRSS")
    except OSError:  # elsewhere, or forbidden: what the preparation took for a while counts as there
        before = _peak()
    work()
    return _peak() - before


def _peak() -> int:
    """The largest resident memory so far."""
    if Path("/proc/self/status").exists():
        return _status("VmHWM")
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes if sys.platform == "darwin" else 1024 * kilobytes


def _status(field: str) -> int:
    """Bytes in a line of the process's status."""
    found = re.search(rf"^{field}:\s*(\d+) kB$", Path(f"/proc/{os.getpid()}/status").read_text(), re.MULTILINE)
    assert found is not None
    return 1024 * int(found[1])
