"""Asking SLURM to start this job again."""

import os
import subprocess
from contextlib import suppress
from pathlib import Path

SECONDS = 30
"""How long the controller may take to answer."""
FAULT = "TRUNKLINE_FAULT"
"""Environment variable with the file by which a job's script counts this attempt as a fault."""


def slurm_job() -> str | None:
    """Id of the job that this process belongs to, for `scontrol`; None outside SLURM."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")


def requeue(job: str) -> str:
    """Put a job back into the queue, and return what is to be said about it.

    A job that was submitted so that it may not be requeued is refused by `scontrol`.
    """
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=SECONDS)
        fault = "" if done.returncode == 0 else (done.stderr or done.stdout).strip() or f"exit code {done.returncode}"
    except (OSError, subprocess.TimeoutExpired) as error:
        fault = str(error)
    return f"SLURM does not requeue job {job} ({fault}); submit it again" if fault else f"requeued job {job}"


def end_without_fault() -> None:
    """Let the job's script not count this attempt as a fault: the run was asked to end, and goes on from there."""
    if file := os.environ.get(FAULT):
        with suppress(OSError):
            Path(file).unlink(missing_ok=True)
