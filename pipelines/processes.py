"""No process of a run outlives the others by more than seconds."""

import atexit
import os
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.plugins.environments import LightningEnvironment

from trunkline.pipelines.preflight import Launch, find_launch

GRACE = 5.0
"""Seconds in which the other processes may say what was wrong and end by themselves."""
STOPPED = ("T", "t")
"""States of a process that does nothing, not even end, until it is told to go on or killed."""


def end_together(trainer: L.Trainer) -> None:
    """Let the processes of a run on this machine end when one of them ends, also those that hang.

    A cluster's own launcher (torchrun, `srun --kill-on-bad-exit`) ends the processes that it starts by itself, but one
    that is stopped only after half a minute.
    """
    atexit.register(end_stopped_siblings, find_launch())
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
    if os.getppid() == parent and status(parent)[0] in STOPPED:
        os.kill(parent, signal.SIGKILL)


def end_stopped_siblings(launch: Launch | None) -> None:
    """Kill those of the processes that torchrun or srun has started beside this one that are stopped."""
    rank = {"torchrun": "RANK", "srun": "SLURM_PROCID"}.get(launch.by if launch else "", "")
    if rank not in os.environ:
        return
    for folder in Path("/proc").glob("[0-9]*"):
        pid = int(folder.name)
        if status(pid) not in [(state, os.getppid()) for state in STOPPED]:
            continue
        # A shell in which srun was called has other children: with its own number, as all that it starts.
        with suppress(OSError):
            words = (folder / "environ").read_bytes().split(b"\0")
            ranks = [word.decode() for word in words if word.startswith(f"{rank}=".encode())]
            if ranks and ranks != [f"{rank}={os.environ[rank]}"]:
                os.kill(pid, signal.SIGKILL)


def status(pid: int) -> tuple[str, int]:
    """(state, id of the parent) of a process; nothing if it has ended, or if this is not Linux."""
    try:
        state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
    except OSError:
        return "", 0
    return state, int(parent)
