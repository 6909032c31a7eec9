"""One process at a time writes into a run's folder, and what cannot be written is said before anything is trained."""

import errno
import json
import multiprocessing
import os
import re
import signal
import socket
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from trunkline import TrunklineError
from trunkline.files import read_json
from trunkline.modules.training.checkpoints import SafeCheckpointIO
from trunkline.pipelines import run_lock, runs
from trunkline.pipelines.launch import RANKS, command_mark
from trunkline.pipelines.runs import CHOSEN, RUN, claim_run

LAUNCHERS = ("SLURM_NTASKS", "SLURM_JOB_ID", "SLURM_STEP_ID", "WORLD_SIZE", "TORCHELASTIC_RUN_ID", "MASTER_ADDR")
CONTEXT = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for variable in (RUN, CHOSEN, *RANKS, *LAUNCHERS):
        monkeypatch.setenv(variable, "")  # so that it is restored
        monkeypatch.delenv(variable)


def claim(stack: ExitStack, resume: str | None = None) -> Path:
    return claim_run(stack, Path("runs"), "vit/mine", resume)[0]


def save(run: Path) -> None:
    SafeCheckpointIO().save_checkpoint({"global_step": 1}, run / "checkpoints/last.ckpt")


def in_process(work: Callable[..., None], *arguments: Any) -> Any:
    """Start a process that works until it is killed, and wait until it says that it holds its folder."""
    ready, child = CONTEXT.Pipe()
    process = CONTEXT.Process(target=work, args=(child, *arguments), daemon=True)
    process.start()
    assert ready.poll(60)
    return process, ready.recv()


def hold(pipe: Any, resume: str | None) -> None:
    os.environ.pop(RUN, None)
    with ExitStack() as stack:
        folder = claim(stack, resume)
        save(folder)
        pipe.send(str(folder))
        signal.pause()


def test_a_run_that_is_being_trained(tmp_path: Path) -> None:
    """The message names process, host, folder and mend; when that process is killed, its run can be resumed."""
    process, folder = in_process(hold, None)
    for resume in ("auto", folder, f"{folder}/checkpoints/last.ckpt", "runs/vit/mine"):
        with ExitStack() as stack, pytest.raises(TrunklineError) as caught:
            claim(stack, resume)
        holder = f"process {process.pid} on {socket.gethostname()}, since 2"
        assert str(caught.value).startswith(f"{folder} is being trained by {holder}")
        assert re.search("wait for its end or stop it, or start a new run", str(caught.value))
        assert caught.value.field == "resume"
    process.kill()
    process.join()
    for _ in range(2):
        with ExitStack() as stack:
            assert str(claim(stack, "auto")) == folder
            assert json.loads(Path(folder, ".running.json").read_text())["process"] == os.getpid()
        assert not Path(folder, ".running.json").exists()


def test_other_processes_of_a_run_hold_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with ExitStack() as first:
        folder = claim(first)
        save(folder)
        for rank in RANKS:
            with monkeypatch.context() as patch, ExitStack() as other:
                patch.setenv(rank, "1")
                assert claim(other) == folder  # which the variable of the first one names
                patch.delenv(RUN)
                assert claim(other) == folder
                patch.delenv(CHOSEN)
                assert claim(other, "auto") == folder
        assert (folder / ".running.json").exists()


def test_two_new_runs_that_choose_one_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both see that it is free; the one that makes the folder has it, and the other takes the next."""
    free = runs._unused

    def late(folder: Path, name: str) -> str:
        monkeypatch.setattr(runs, "_unused", free)
        (folder / "taken").mkdir(parents=True)
        return "taken"

    monkeypatch.setattr(runs, "_unused", late)
    with ExitStack() as stack:
        folder = claim(stack)
        assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d", folder.name)
        assert list(Path("runs/vit/mine/taken").iterdir()) == []


def test_a_named_folder_with_checkpoints_is_entered_only_by_a_resume(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(RUN, "mine")
    with ExitStack() as stack:
        save(claim(stack))
    with ExitStack() as stack, pytest.raises(TrunklineError, match=r"mine holds checkpoints.*go on.*resume=") as caught:
        claim(stack)
    assert caught.value.field == "resume"
    with ExitStack() as stack:
        assert claim(stack, "auto") == Path("runs/vit/mine/mine")


def elsewhere_held(folder: Path, **changed: Any) -> Path:
    """As a process on another machine leaves a folder that it holds, when it is cut off."""
    save(folder)
    holder = {"process": 1, "host": "node7", "machine": "another", "since": "2026-01-01 00:00:00", **changed}
    (folder / ".running.json").write_text(json.dumps(holder))
    return folder


@pytest.mark.parametrize("alive", [True, False])
@pytest.mark.parametrize("locks", [True, False])
def test_a_holder_on_another_machine(
    alive: bool, locks: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where the file system does not share locks, it counts whether the holder still writes."""
    monkeypatch.setattr(run_lock, "BEAT", 0.2)
    folder = elsewhere_held(Path("runs/vit/mine/one"), **({} if locks else {"machine": run_lock.machine()}))
    if not locks:

        def flock(*_: int) -> None:
            raise OSError(errno.ENOSYS, "Function not implemented")

        monkeypatch.setattr("fcntl.flock", flock)
        (folder / ".lock").touch()  # as a killed process leaves it there
    with ExitStack() as stack:
        if alive:
            stopping = run_lock.threading.Event()
            holder = json.loads((folder / ".running.json").read_text())
            beating = run_lock.threading.Thread(
                target=run_lock._beat, args=(folder / ".running.json", holder, stopping)
            )
            beating.start()
            try:
                with pytest.raises(TrunklineError, match="trained by process 1 on node7, since 2026-01-01"):
                    claim(stack, "auto")
            finally:
                stopping.set()
                beating.join()
        else:
            assert claim(stack, "auto") == folder
            assert json.loads((folder / ".running.json").read_text())["process"] == os.getpid()
    assert "waiting 1 s to see that node7 no longer trains runs/vit/mine/one" in capsys.readouterr().err
    assert (folder / ".running.json").exists() == alive


def test_a_holder_gives_signs_of_life(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "BEAT", 0.02)
    with ExitStack() as stack:
        file = claim(stack) / ".running.json"
        seen = set()
        while len(seen) < 3:  # a test that hangs here fails
            seen.add((read_json(file) or {}).get("beat"))
    assert not file.exists()


def test_two_resumes_in_one_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    """On machines that do not share locks, the one that makes the file has the folder."""
    folder = Path("runs/vit/mine/one")
    save(folder)
    touch = Path.touch

    def late(path: Path, *arguments: Any, **options: Any) -> None:
        if path.name == ".running.json":
            elsewhere_held(folder)
        touch(path, *arguments, **options)

    monkeypatch.setattr(Path, "touch", late)
    with ExitStack() as stack, pytest.raises(TrunklineError, match="trained by process 1 on node7"):
        claim(stack, "auto")


def test_an_attempt_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with ExitStack() as stack:
        assert claim(stack).is_dir()
    assert list(tmp_path.iterdir()) == []
    Path("runs").mkdir()
    with ExitStack() as stack:
        folder = claim(stack)
        os.environ.pop(RUN)
        Path("runs/vit/other").mkdir()
    assert [path.name for path in tmp_path.rglob("*")] == ["runs", "vit", "other"]
    with ExitStack() as stack:
        folder = claim(stack)
        save(folder)
    assert {path.name for path in folder.iterdir()} == {".lock", f".attempt-{command_mark()}", "checkpoints"}


@pytest.mark.parametrize("below", ["", "x/y"])
def test_a_file_in_the_place_of_the_folder(below: str) -> None:
    Path("file").touch()
    with ExitStack() as stack, pytest.raises(TrunklineError, match="file is a file, so that no run") as caught:
        claim_run(stack, Path("file", below), "vit/mine", None)
    assert caught.value.field == "run_dir"


@pytest.mark.parametrize("number", ["EROFS", "ENOSPC", "EACCES"])
@pytest.mark.parametrize("function", ["pathlib.Path.mkdir", "pathlib.Path.write_text"])
def test_a_folder_that_cannot_be_written(
    number: str, function: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = getattr(errno, number)

    def fail(*arguments: Any, **options: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(function, fail)
    words = (
        rf"cannot write runs/vit/mine/.* \([\d,]+\.\d MB free there\): {os.strerror(code)}; .*choose another run_dir"
    )
    with ExitStack() as stack, pytest.raises(TrunklineError, match=words) as caught:
        claim(stack)
    assert caught.value.field == "run_dir"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["../../escape", "/tmp/escape", "a/../../b", "..", ""])
def test_names_that_leave_the_folder(name: str, tmp_path: Path) -> None:
    with ExitStack() as stack, pytest.raises(TrunklineError, match=f"the name {name} leaves the folder") as caught:
        claim_run(stack, Path("runs"), name, None)
    assert caught.value.field == "name"
    assert list(tmp_path.iterdir()) == []
