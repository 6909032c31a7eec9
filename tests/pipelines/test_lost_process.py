"""A process of a run that is killed or stopped: the others end, with an error and soon."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from recorded_run import GONE_WITHIN, Run, go_on, halt_at, kill_sessions, members, wait_until_gone, wait_until_halted
from tiny import trainer

from trunkline.modules.training.exact_resume import LONGEST_WAIT, limit_waiting
from trunkline.pipelines import processes
from trunkline.pipelines.configs import config_names, find_config
from trunkline.pipelines.errors import TRY_AGAIN
from trunkline.pipelines.preflight import Launch
from trunkline.pipelines.processes import end_children, end_stopped, end_stopped_siblings

RECIPE: dict[str, Any] = {
    "model": {
        "class_path": "ImageClassifier",
        "init_args": {"network": {"patch_size": 4, "backbone": {"dim": 16, "depth": 1, "num_heads": 2}}},
    },
    "data": {
        "class_path": "ImageData",
        "init_args": {"source": "digits", "image_size": 8, "channels": 1, "batch_size": 20, "num_workers": 0},
    },
    "trainer": {"accelerator": "cpu", "devices": 2, "max_epochs": 9, "enable_progress_bar": False},
    "test_with": "none",
}


def recipe(folder: Path, seconds: int | None = None, brief: float | None = None) -> list[str]:
    """A run of two processes that wait for each other so many seconds at most, `brief` only once training has begun."""
    strategy: Any = "ddp"
    if seconds is not None:
        strategy = {"class_path": "lightning.pytorch.strategies.DDPStrategy"}
        strategy["init_args"] = {"timeout": f"0:00:{seconds:02}"}
    callbacks = [{"class_path": "recorded_run.Recorder", "init_args": {"folder": str(folder)}}]
    if brief is not None:
        callbacks.append({"class_path": "recorded_run.BriefWait", "init_args": {"seconds": brief}})
    trainer = {**RECIPE["trainer"], "strategy": strategy, "callbacks+": callbacks}
    (folder / "tiny.yaml").write_text(yaml.safe_dump({**RECIPE, "trainer": trainer}))
    return ["fit", "--config", str(folder / "tiny.yaml")]


@contextmanager
def halted(arguments: list[str], folder: Path, processes: int = 2, point: str = "batch start") -> Iterator[Run]:
    """A run that has halted in a step, until `go_on`."""
    ranks = list(range(processes))
    halt_at(folder, point, 3, ranks)
    run = Run(arguments, folder, processes)
    try:
        assert wait_until_halted(folder, ranks, run.alive), run.output()
        yield run
    finally:
        run.kill()


def time_of_end(pids: list[int], number: int, folder: Path, sessions: list[int], seconds: float = 0.0) -> float:
    """Send a signal to some processes of a halted run, and let it go on: seconds until nothing is left of the sessions.

    The others may wait `seconds` for those that got the signal.
    """
    start = time.monotonic()
    for pid in pids:
        os.kill(pid, number)
    go_on(folder)
    gone = wait_until_gone(sessions, start + seconds + GONE_WITHIN)
    assert gone, "\n".join(file.read_text() for file in folder.glob("*log"))
    return time.monotonic() - start


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_ends_the_other(rank: int, tmp_path: Path) -> None:
    with halted(recipe(tmp_path), tmp_path) as run:
        time_of_end([run.sessions[rank]], signal.SIGKILL, tmp_path, run.sessions)
        assert run.wait()[1 - rank] == TRY_AGAIN, run.output()
        assert "error: another process of this run has ended" in run.output()


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
@pytest.mark.parametrize("point", [pytest.param("batch start", marks=pytest.mark.slow), "backward"])
def test_a_stopped_process_ends_the_other(rank: int, point: str, tmp_path: Path) -> None:
    """Which then ends the stopped one or leaves that to the launcher, as the tests below have it."""
    seconds = 3.0
    with halted(recipe(tmp_path, brief=seconds), tmp_path, point=point) as run:
        other = run.sessions[1 - rank]
        assert time_of_end([run.sessions[rank]], signal.SIGSTOP, tmp_path, [other], seconds) > seconds / 2
        run.processes[1 - rank].join()
        assert run.processes[1 - rank].exitcode == TRY_AGAIN, run.output()
        assert "error: another process of this run has ended" in run.output()


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_killed_data_worker_ends_all_processes(processes: int, tmp_path: Path) -> None:
    strategy = "ddp" if processes > 1 else "auto"
    flags = f"--data.num_workers 1 --trainer.devices {processes} --trainer.strategy {strategy}"
    with halted([*recipe(tmp_path), *flags.split()], tmp_path, processes) as run:
        last = run.sessions[-1]
        workers = set(members(last)) - {last}
        assert workers
        time_of_end(list(workers), signal.SIGKILL, tmp_path, run.sessions)
        assert run.wait() == [TRY_AGAIN] * processes, run.output()
        text = " ".join(run.output().split())
        assert "error: a process that loads data was killed" in text
        assert ("error: another process of this run has ended" in text) == (processes > 1)
        assert "Traceback" not in text


def launch(command: list[str], folder: Path) -> subprocess.Popen[bytes]:
    """A command that starts two processes of a run, which have halted in a step."""
    halt_at(folder, "batch start", 3, [0, 1])
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=folder, env=environ, stdout=log, stderr=log, start_new_session=True)
    assert wait_until_halted(folder, [0, 1], lambda: process.poll() is None), (folder / "log").read_text()
    return process


TRUNKLINE = str(Path(sys.executable).with_name("trunkline"))
WAIT = 40
"""Seconds that processes wait for a stopped one, within which both must also have started."""


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_of_processes_that_lightning_starts_none_is_left(rank: int, number: int, tmp_path: Path) -> None:
    seconds = WAIT if number == signal.SIGSTOP else None
    process = launch([TRUNKLINE, *recipe(tmp_path, seconds)], tmp_path)
    try:
        pids = sorted(members(process.pid), key=lambda pid: pid != process.pid)
        assert len(pids) == 2
        time_of_end([pids[rank]], number, tmp_path, [process.pid], seconds or 0)
        assert process.wait() != 0
    finally:
        kill_sessions([process.pid])
        process.wait()


def started_by_torchrun(folder: Path, seconds: int | None) -> tuple[subprocess.Popen[bytes], dict[int, int]]:
    """A run of two processes that torchrun starts, halted in a step, and the id of each rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}"]
    process = launch([*launcher, "--no-python", TRUNKLINE, *recipe(folder, seconds)], folder)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    environs = {int(pid): Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") for pid in children}
    return process, {int(b"RANK=1" in environ): pid for pid, environ in environs.items()}


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_of_processes_that_torchrun_starts_none_is_left(rank: int, number: int, tmp_path: Path) -> None:
    """The launcher itself would wait for another half a minute for a stopped one."""
    seconds = WAIT if number == signal.SIGSTOP else None
    process, pids = started_by_torchrun(tmp_path, seconds)
    try:
        took = time_of_end([pids[rank]], number, tmp_path, [process.pid, *pids.values()], seconds or 0)
        assert process.wait() != 0
        assert took > (seconds or 0) / 2
        if seconds:  # otherwise torchrun may end it before it has said so
            assert "error: another process of this run has ended" in (tmp_path / "log").read_text()
    finally:
        kill_sessions([process.pid, *pids.values()])
        process.wait()


@pytest.mark.parametrize(("by", "name"), [("torchrun", "RANK"), ("srun", "SLURM_PROCID")])
def test_only_stopped_processes_of_the_run_are_killed(by: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside a process with another number: one that runs, and those of a shell in which srun was called."""
    monkeypatch.setattr(os, "getppid", os.getpid)
    monkeypatch.setenv(name, "1")
    other, running, own, foreign = (sleeper(600, **environ) for environ in ({name: "0"}, {name: "2"}, {name: "1"}, {}))
    try:
        for process in (other, own, foreign):
            os.kill(process.pid, signal.SIGSTOP)
            os.waitpid(process.pid, os.WUNTRACED)
        end_stopped_siblings(None)
        assert other.poll() is None
        end_stopped_siblings(Launch(by, 1, 3))
        assert other.wait(60) == -signal.SIGKILL
        assert [process.poll() for process in (running, own, foreign)] == [None] * 3
    finally:
        for process in (other, running, own, foreign):
            process.kill()
            process.wait()


def sleeper(seconds: float, **environ: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(["sleep", str(seconds)], env={"PATH": os.environ["PATH"], **environ})


def test_children_that_hang_are_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "GRACE", 0.5)
    quick, hanging, stopped = sleeper(0), sleeper(600), sleeper(600)
    os.kill(stopped.pid, signal.SIGSTOP)
    end_children([quick, hanging, stopped, "not a process"])
    assert [quick.wait(), hanging.wait(), stopped.wait()] == [0, -signal.SIGKILL, -signal.SIGKILL]


def test_a_parent_is_killed_only_if_it_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    parent = sleeper(600)
    try:
        monkeypatch.setattr(os, "getppid", lambda: parent.pid)
        end_stopped(parent.pid)
        assert parent.poll() is None
        os.kill(parent.pid, signal.SIGSTOP)
        os.waitpid(parent.pid, os.WUNTRACED)
        monkeypatch.setattr(os, "getppid", lambda: 1)  # another one has adopted this process
        end_stopped(parent.pid)
        assert "T" in Path(f"/proc/{parent.pid}/stat").read_text()
        monkeypatch.setattr(os, "getppid", lambda: parent.pid)
        end_stopped(parent.pid)
        assert parent.wait() == -signal.SIGKILL
        end_stopped(parent.pid)  # it is gone
    finally:
        parent.kill()


def test_nobody_waits_half_an_hour(tmp_path: Path) -> None:
    alone, plain = trainer(tmp_path), trainer(tmp_path, strategy="ddp", devices=2)
    for fitted in (alone, plain):
        limit_waiting(fitted)
    assert not hasattr(alone.strategy, "_timeout")
    assert plain.strategy._timeout == LONGEST_WAIT == timedelta(seconds=300)
    for kind in (DDPStrategy, ModelParallelStrategy):
        sharded = trainer(tmp_path, strategy=kind(), devices=2)
        limit_waiting(sharded)
        assert sharded.strategy._timeout == LONGEST_WAIT
        own = trainer(tmp_path, strategy=kind(timeout=timedelta(seconds=20)), devices=2)
        limit_waiting(own)
        assert own.strategy._timeout == timedelta(seconds=20)


@pytest.mark.parametrize("machine", sorted(name for name in config_names() if name.startswith("trainer/")))
def test_machine_files_of_several_processes_limit_the_wait(machine: str) -> None:
    """As their text says, and not only because the command would set it."""
    options = yaml.safe_load(find_config(machine).read_text())["trainer"]
    several = machine not in ("trainer/cpu", "trainer/gpu")
    assert several == (options["devices"] != 1)
    assert several == ("strategy" in options)
    if several:
        assert options["strategy"]["init_args"]["timeout"] == str(LONGEST_WAIT)


def test_lightning_does_not_see_what_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would kill this process too, and hide its exit code."""
    monkeypatch.setattr(processes, "GRACE", 0)
    child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
    looked_at, left = [child], []
    kill = child.kill
    monkeypatch.setattr(child, "kill", lambda: left.append(len(looked_at)) or kill())
    processes.end_children(looked_at)
    assert left == [0]
    assert child.wait(60) == -signal.SIGKILL
