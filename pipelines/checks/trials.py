"""Runs trials, each in processes of its own, which can be killed."""

import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch

from trunkline import TrunklineError
from trunkline.pipelines.checks.trial import Trial
from trunkline.pipelines.checks.trial_process import run_rank

OTHERS = ("SLURM_", "PMI_", "PMIX_", "OMPI_", "JSM_", "TORCHELASTIC_")
"""Environment variables of a cluster's job, in which the check runs; a trial has processes of its own."""
RANKED = ("RANK", "LOCAL_RANK", "GROUP_RANK", "NODE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "TRUNKLINE_RUN")
LAST_SECONDS = 5.0
"""Seconds in which the other processes of a trial may end by themselves after one has failed."""
POLL = 0.05


class TrialFailed(TrunklineError):
    """A trial ended before its last step.

    Args:
        message: the error.
        field: as in `TrunklineError`.
        log: what the process printed, if the error is no `TrunklineError`; else empty.
    """

    def __init__(self, message: str, field: str | None = None, log: str = "") -> None:
        super().__init__(message, field)
        self.log = log


class Workbench:
    """Runs trials.

    Args:
        arguments: `fit` and its flags, with the paths of configs.
        recipe: name of the recipe.
        folder: a temporary folder for all that the trials write.
    """

    def __init__(self, arguments: Sequence[str], recipe: str | None, folder: Path) -> None:
        self.arguments, self.recipe, self.folder = list(arguments), recipe, folder
        self.count = 0
        methods = multiprocessing.get_all_start_methods()
        # A fork of a server that has imported everything starts at once, and has no threads that it would lose.
        self.context: Any = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
        if "forkserver" in methods:
            self.context.set_forkserver_preload(["trunkline.pipelines.checks.trial_process"])

    def run(self, trial: Trial) -> list[Any]:
        """Run a trial, and return the observer's `result` of each process; None from processes that were killed.

        Raises:
            TrialFailed: if a process ends otherwise than the trial says.
        """
        print(f"  {trial.title}", file=sys.stderr, flush=True)
        self.count += 1
        folder = self.folder / f"trial{self.count}"
        folder.mkdir(parents=True)
        port = free_port()
        jobs = [
            self.context.Process(
                target=run_rank,
                args=(trial, self.arguments, self.recipe, folder, rank),
                kwargs={"environ": environment(trial.processes, rank, port), "cwd": str(Path.cwd())},
            )
            for rank in range(trial.processes)
        ]
        try:
            for job in jobs:
                job.start()
            if trial.held:
                self._wait_until_held(jobs, folder)
                kill(jobs)
                return [None] * len(jobs)
            wait_for_jobs(jobs)
        finally:
            kill(jobs)
        codes = [job.exitcode for job in jobs]
        if any(codes):
            raise failure(folder, codes)
        return [torch.load(folder / f"result{rank}.pt", weights_only=True) for rank in range(len(jobs))]

    def _wait_until_held(self, jobs: list[Any], folder: Path) -> None:
        while not all((folder / f"held{rank}").exists() for rank in range(len(jobs))):
            if not all(job.is_alive() for job in jobs):
                wait_for_jobs(jobs)
                raise failure(folder, [job.exitcode for job in jobs])
            time.sleep(POLL)


def environment(processes: int, rank: int, port: int) -> dict[str, str]:
    """Environment of a process, as `torchrun` would start it if there are several."""
    environ = {name: text for name, text in os.environ.items() if not name.startswith(OTHERS) and name not in RANKED}
    if processes > 1:
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": processes, "GROUP_WORLD_SIZE": 1}
        ranks |= {"LOCAL_WORLD_SIZE": processes, "MASTER_PORT": port, "TORCHELASTIC_RESTART_COUNT": 0}
        environ |= {name: str(value) for name, value in ranks.items()}
        environ |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": f"check-{os.getpid()}-{port}"}
    return environ


def free_port() -> int:
    """A port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def wait_for_jobs(jobs: list[Any]) -> None:
    """Wait until all processes have ended, or some seconds longer than the first that failed."""
    end = None
    while living := [job for job in jobs if job.is_alive()]:
        if end is None and any(job.exitcode for job in jobs):
            end = time.monotonic() + LAST_SECONDS
        if end is not None and time.monotonic() > end:
            return
        wait([job.sentinel for job in living], None if end is None else POLL)


def kill(jobs: list[Any]) -> None:
    """SIGKILL for processes that still run, and for those that load their data."""
    for job in jobs:
        if job.pid is None:
            continue
        try:
            os.killpg(job.pid, signal.SIGKILL)  # each leads a session of its own
        except (ProcessLookupError, PermissionError, AttributeError):  # it has ended, or was never its leader
            job.kill()
        job.join()


def failure(folder: Path, codes: list[int | None]) -> TrialFailed:
    """The error with which a trial ended: the first process's own, else that of another."""
    for rank in sorted(range(len(codes)), key=lambda rank: (codes[rank] != 2, codes[rank] is None, rank)):
        file = folder / f"error{rank}.pt"
        if file.exists():
            found = torch.load(file, weights_only=True)
            log = "" if found["own"] else printed_by(folder, rank)
            return TrialFailed(found["message"], found["field"], log)
    rank, code = next((rank, code) for rank, code in enumerate(codes) if code)
    how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
    return TrialFailed(f"process {rank} {how}", None, printed_by(folder, rank))


def printed_by(folder: Path, rank: int) -> str:
    """What a process of a trial has printed."""
    file = folder / f"log{rank}.txt"
    return file.read_text(errors="replace") if file.exists() else ""
