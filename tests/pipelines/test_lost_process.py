"""A process of a run that is killed or stopped: the others end, with an error and soon."""

import os
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from recorded_run import Run, go_on, halt_at, kill_sessions, members, wait_until_halted
from tiny import trainer

from trunkline.modules.training.exact_resume import LONGEST_WAIT, limit_waiting
from trunkline.pipelines import processes
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


def recipe(folder: Path, seconds: int | None = None) -> list[str]:
    """A run of two processes that wait for each other at most so long."""
    strategy: Any = "ddp"
    if seconds is not None:
        strategy = {"class_path": "lightning.pytorch.strategies.DDPStrategy"}
        strategy["init_args"] = {"timeout": f"0:00:{seconds:02}"}
    recorder = {"class_path": "recorded_run.Recorder", "init_args": {"folder": str(folder)}}
    trainer = {**RECIPE["trainer"], "strategy": strategy, "callbacks+": [recorder]}
    (folder / "tiny.yaml").write_text(yaml.safe_dump({**RECIPE, "trainer": trainer}))
    return ["fit", "--config", str(folder / "tiny.yaml")]


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_killed_process_ends_the_other(rank: int, tmp_path: Path) -> None:
    halt_at(tmp_path, "batch start", 3, [0, 1])
    run = Run(recipe(tmp_path), tmp_path, 2)
    try:
        assert wait_until_halted(tmp_path, [0, 1], run.alive), run.output()
        os.kill(run.processes[rank].pid or 0, signal.SIGKILL)
        go_on(tmp_path)
        other = run.processes[1 - rank]
        other.join(60)
        assert other.exitcode == TRY_AGAIN, run.output()
        assert "error: another process of this run has ended" in run.output()
    finally:
        run.kill()


@pytest.mark.slow
def test_a_killed_data_worker_ends_all_processes(tmp_path: Path) -> None:
    halt_at(tmp_path, "batch start", 3, [0, 1])
    run = Run([*recipe(tmp_path), "--data.num_workers", "1"], tmp_path, 2)
    try:
        assert wait_until_halted(tmp_path, [0, 1], run.alive), run.output()
        workers = set(members(run.processes[1].pid or 0)) - {run.processes[1].pid}
        assert workers
        for worker in workers:
            os.kill(worker, signal.SIGKILL)
        go_on(tmp_path)
        for process in run.processes:
            process.join(60)
        assert [process.exitcode for process in run.processes] == [TRY_AGAIN, 2], run.output()
        text = " ".join(run.output().split())
        assert "error: a process that loads data was killed" in text
        assert "error: another process of this run has ended" in text
        assert "Traceback" not in text
    finally:
        run.kill()


def started_by_lightning(folder: Path, seconds: int | None) -> tuple[subprocess.Popen[bytes], list[int]]:
    """A run whose second process Lightning starts, halted in a step; the ids of both."""
    halt_at(folder, "batch start", 3, [0, 1])
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [str(Path(sys.executable).with_name("trunkline")), *recipe(folder, seconds)]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=folder, env=environ, stdout=log, stderr=log, start_new_session=True)
    assert wait_until_halted(folder, [0, 1], lambda: process.poll() is None), (folder / "log").read_text()
    return process, sorted(members(process.pid), key=lambda pid: pid != process.pid)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_of_processes_that_lightning_starts_none_is_left(rank: int, number: int, tmp_path: Path) -> None:
    seconds = 40  # within which both must also have started
    process, pids = started_by_lightning(tmp_path, seconds if number == signal.SIGSTOP else None)
    try:
        assert len(pids) == 2
        os.kill(pids[rank], number)
        start = time.monotonic()
        go_on(tmp_path)
        limit = 10 + (seconds if number == signal.SIGSTOP else 0)
        while process.poll() is None or members(process.pid):
            assert time.monotonic() - start < limit, (tmp_path / "log").read_text()
            time.sleep(0.05)
        assert process.returncode != 0
    finally:
        kill_sessions([process.pid])
        process.wait()


def started_by_torchrun(folder: Path, seconds: int) -> tuple[subprocess.Popen[bytes], dict[int, int]]:
    """A run of two processes that torchrun starts, halted in a step, and the id of each rank."""
    halt_at(folder, "batch start", 3, [0, 1])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}"]
    command = [*launcher, "--no-python", str(Path(sys.executable).with_name("trunkline")), *recipe(folder, seconds)]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=folder, env=environ, stdout=log, stderr=log, start_new_session=True)
    assert wait_until_halted(folder, [0, 1], lambda: process.poll() is None), (folder / "log").read_text()
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    environs = {int(pid): Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") for pid in children}
    return process, {int(b"RANK=1" in environ): pid for pid, environ in environs.items()}


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_stopped_process_of_torchrun(rank: int, tmp_path: Path) -> None:
    """The launcher itself would wait for another half a minute."""
    seconds = 40  # within which both must also have started
    process, pids = started_by_torchrun(tmp_path, seconds)
    try:
        os.kill(pids[rank], signal.SIGSTOP)
        start = time.monotonic()
        go_on(tmp_path)
        assert process.wait(seconds + 10) != 0
        assert time.monotonic() - start > seconds / 2
        assert not any(map(members, pids.values()))
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
