"""No process of a run outlives the others by more than seconds."""

import atexit
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.plugins.environments import LightningEnvironment

GRACE = 5.0
"""Seconds in which the other processes may say what was wrong and end by themselves."""


def end_together(trainer: L.Trainer) -> None:
    """Let the processes that Lightning starts on this machine end when one of them ends, also those that hang.

    A cluster's own launcher (torchrun, `srun --kill-on-bad-exit`) does this for the processes that it starts.
    """
    launcher: Any = trainer.strategy.launcher
    if hasattr(launcher, "procs"):
        atexit.register(lambda: end_children(launcher.procs))
    if trainer.local_rank > 0 and isinstance(
        getattr(trainer.strategy, "cluster_environment", None), LightningEnvironment
    ):
        atexit.register(end_stopped, os.getppid())


def end_children(processes: list[Any]) -> None:
    """Wait a little for the processes that this one has started, then kill those that still run.

    The list is emptied: Lightning looks at it, and would answer a kill by killing this process too.
    """
    end = time.monotonic() + GRACE
    children = processes.copy()
    processes.clear()
    for process in children:
        if not isinstance(process, subprocess.Popen):
            continue
        try:
            process.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()  # a stopped process notices no other signal


def end_stopped(parent: int) -> None:
    """Kill the process that has started this one if it is stopped: it would wait for ever, and never end the run."""
    try:
        state = Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:  # it has ended; or this is not Linux
        return
    if os.getppid() == parent and state in "Tt":
        os.kill(parent, signal.SIGKILL)
