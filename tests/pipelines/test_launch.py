"""The processes of a launch share one run's folder, and no other launch enters it, whoever starts them."""

import json
import multiprocessing
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import HashStore, TCPStore

from trunkline import TrunklineError
from trunkline.modules.training.checkpoints import SafeCheckpointIO
from trunkline.pipelines import launch, reachable
from trunkline.pipelines.launch import RANKS, Peers, agree, command_mark, find_peers, is_first_process
from trunkline.pipelines.runs import CHOSEN, RUN, claim_run

CONTEXT = multiprocessing.get_context("fork")
SEEN = ("SLURM_", "TORCHELASTIC_", "MASTER_", "WORLD_SIZE", RUN, CHOSEN)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["trunkline", "fit"])
    left = [name for name in os.environ if name.startswith(SEEN)]
    for name in {*left, *RANKS, "MASTER_ADDR", "MASTER_PORT", RUN, CHOSEN}:
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def torchrun(count: int, name: str = "none", restarts: int = 0, **more: object) -> list[dict[str, object]]:
    """The environments that torchrun gives to its processes."""
    shared = {"WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "GROUP_RANK": 0}
    shared |= {"TORCHELASTIC_RUN_ID": name, "TORCHELASTIC_RESTART_COUNT": restarts}
    return [{**shared, "RANK": rank, "LOCAL_RANK": rank, **more} for rank in range(count)]


def srun(count: int, job: int, step: int = 0, restarts: int = 0, **more: object) -> list[dict[str, object]]:
    """The environments that srun gives to its processes."""
    shared = {"SLURM_NTASKS": count, "SLURM_NTASKS_PER_NODE": count, "SLURM_JOB_ID": job, "SLURM_STEP_ID": step}
    shared |= {"SLURM_RESTART_COUNT": restarts} if restarts else {}
    shared |= {"SLURM_JOB_NAME": "train", "SLURM_NODELIST": "127.0.0.1", "SLURM_NODEID": 0, **more}
    return [{**shared, "SLURM_PROCID": rank, "SLURM_LOCALID": rank} for rank in range(count)]


def by_hand(hosts: int) -> list[dict[str, object]]:
    """One process on each host, from which Lightning starts the others there."""
    port = free_port()
    return [{"NODE_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} for rank in range(hosts)]


def attempt(environ: dict[str, object], pipe: Any, resume: str | None, saves: bool, nodes: int) -> None:
    """Claim a run in a process of its own, as `trunkline fit` does, and say which."""
    os.environ.update({name: str(value) for name, value in environ.items()})
    with ExitStack() as stack:
        try:
            folder, checkpoint, _ = claim_run(stack, Path("runs"), "vit/mine", resume, nodes)
        except TrunklineError as error:
            pipe.send(["error", str(error), error.field])
            return
        if is_first_process():
            (folder / "config.yaml").touch()  # it began
        if saves and is_first_process():
            SafeCheckpointIO().save_checkpoint({"global_step": 1}, folder / "checkpoints/last.ckpt")
        pipe.send([str(folder), checkpoint and str(checkpoint)])
        pipe.recv()  # until all are there


def start(
    environs: list[dict[str, object]], resume: str | None = None, saves: bool = True, nodes: int = 1
) -> Callable[[], list[Any]]:
    """Start the processes of a launch; the function that comes back waits for what they say."""
    running = []
    for environ in environs:
        here, there = CONTEXT.Pipe()
        process = CONTEXT.Process(target=attempt, args=(environ, there, resume, saves, nodes), daemon=True)
        process.start()
        running.append((process, here))

    def results() -> list[Any]:
        assert all(pipe.poll(60) for _, pipe in running)
        said = [pipe.recv() for _, pipe in running]
        for process, pipe in running:
            with suppress(BrokenPipeError):  # it has failed
                pipe.send("end")
            process.join(60)
        return said

    return results


def only(said: list[Any]) -> Any:
    """What all processes of a launch have said, which must be the same."""
    assert all(answer == said[0] for answer in said), said
    return said[0]


@pytest.mark.parametrize("launcher", [torchrun, lambda count: srun(count, 77), by_hand])
def test_processes_of_a_launch_share_a_folder_of_their_own(launcher: Callable[[int], Any]) -> None:
    first, checkpoint = only(start(launcher(3), nodes=3)())
    assert checkpoint is None
    assert Path(first).parent == Path("runs/vit/mine")
    second, checkpoint = only(start(launcher(3), nodes=3)())
    assert checkpoint is None
    assert second != first
    assert only(start(launcher(3), "auto", nodes=3)())[1] is not None


def test_launches_at_one_time_have_folders_of_their_own() -> None:
    """Two runs of torchrun without a name, two steps of a job, and two runs that a job starts without srun."""
    alone = {"SLURM_JOB_ID": 77, "SLURM_NTASKS": 1, "SLURM_PROCID": 0, "SLURM_LOCALID": 0, "SLURM_JOB_NAME": "train"}
    launches = [torchrun(2), torchrun(2), srun(2, 77, step=0), srun(2, 77, step=1), [alone], [alone]]
    running = [start(environs) for environs in launches]
    folders = [only(results())[0] for results in running]
    assert len({*folders}) == len(launches)


@pytest.mark.parametrize(
    ("launcher", "restarted", "saves"),
    [
        (lambda: srun(2, 77), lambda: srun(2, 77, restarts=1), True),
        (lambda: srun(2, 77), lambda: srun(2, 77, restarts=1), False),
        (lambda: torchrun(2, "none"), lambda: torchrun(2, "none", restarts=1), False),
        (lambda: torchrun(2, "mine"), lambda: torchrun(2, "mine"), True),  # a host came back, which is not counted
        # torchrun in a job, whose attempts are known by the job
        (lambda: torchrun(2, SLURM_JOB_ID=77), lambda: torchrun(1, SLURM_JOB_ID=77, SLURM_RESTART_COUNT=1), True),
    ],
)
def test_a_restarted_job_goes_on_in_its_own_folder(
    launcher: Callable[[], Any], restarted: Callable[[], Any], saves: bool
) -> None:
    folder, _ = only(start(launcher(), "auto", saves)())
    other, _ = only(start(srun(1, 78), None)())  # a newer run of the recipe
    found, checkpoint = only(start(restarted(), "auto")())
    assert (found, checkpoint) == (folder, f"{folder}/checkpoints/last.ckpt" if saves else None)
    fresh, checkpoint = only(start(restarted(), None)())
    assert checkpoint is None
    assert fresh not in (folder, other)


def test_another_job_with_the_same_command_takes_the_newest_run() -> None:
    start(srun(1, 77))()
    newer, _ = only(start(srun(1, 78))())
    assert only(start(srun(1, 79), "auto")())[0] == newer
    assert only(start(torchrun(1), "auto")())[0] == newer


def test_jobs_with_other_commands_do_not_take_each_others_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = only(start(srun(1, 77), "auto")())
    command = sys.argv
    monkeypatch.setattr("sys.argv", ["trunkline", "fit", "--model.optimizer.lr", "0.5"])
    other, checkpoint = only(start(srun(1, 78), "auto")())
    assert checkpoint is None
    assert other != folder
    assert only(start(srun(1, 77, restarts=1), "auto")())[0] == other  # by its command, although the job is another
    monkeypatch.setattr("sys.argv", command)
    found, checkpoint = only(start(srun(1, 77, restarts=1), "auto")())
    assert (found, checkpoint) == (folder, f"{folder}/checkpoints/last.ckpt")


@pytest.mark.parametrize("environs", [[{}], torchrun(1)])
def test_without_a_job_the_newest_run_is_taken(environs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    start(srun(1, 77))()
    newer, _ = only(start(srun(1, 78))())
    monkeypatch.setattr("sys.argv", ["trunkline", "fit", "--model.optimizer.lr", "0.5"])
    assert only(start(environs, "auto")())[0] == newer


def test_what_is_resumed_is_no_other_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["trunkline", "fit", "--model.optimizer.lr", "0.5"])
    mark = command_mark()
    for flags in (["--resume", "auto"], ["--resume=a run"], ["--resume", "a run"]):
        monkeypatch.setattr("sys.argv", ["trunkline", "fit", *flags, "--model.optimizer.lr", "0.5"])
        assert command_mark() == mark
    monkeypatch.setattr("sys.argv", ["trunkline", "fit", "--model.optimizer.lr", "0.1"])
    assert command_mark() != mark


def test_an_own_attempt_whose_checkpoints_are_all_damaged_starts_again() -> None:
    folder, _ = only(start(srun(1, 77))())
    Path(folder, "checkpoints/last.ckpt").write_bytes(b"")
    fresh, checkpoint = only(start(srun(1, 77, restarts=1), "auto")())
    assert checkpoint is None
    assert fresh != folder


@pytest.mark.parametrize("launcher", [torchrun, lambda count: srun(count, 77)])
def test_all_processes_fail_with_the_first(launcher: Callable[[int], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with ExitStack() as stack:
        folder = claim_run(stack, Path("runs"), "vit/mine", None)[0]
        SafeCheckpointIO().save_checkpoint({"global_step": 1}, folder / "checkpoints/last.ckpt")
        monkeypatch.delenv(CHOSEN)
        kind, message, field = only(start(launcher(3), str(folder))())
        assert (kind, field) == ("error", "resume")
        assert message.startswith(f"{folder} is being trained by process {os.getpid()}")


@pytest.mark.parametrize(
    ("present", "says"),
    [
        (0, "the 2 processes of this run do not find each other at {} within 1 s: process 0 says: process 1 of 2 did"),
        (1, "the 2 processes of this run do not find each other at {} within 1 s: process 1 says: "),
    ],
)
def test_a_process_that_does_not_come(present: int, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "PATIENCE", timedelta(seconds=1))
    monkeypatch.setattr(reachable, "START_SECONDS", 1.0)
    environ = torchrun(2)[present]
    kind, message, _ = only(start([environ])())
    assert kind == "error"
    assert says.format(f"127.0.0.1:{environ['MASTER_PORT']}") in message
    assert not Path("runs").exists()


def test_a_first_process_that_ends_before_it_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others do not wait for it."""
    monkeypatch.setattr(launch, "PATIENCE", timedelta(seconds=1))
    port = free_port()
    server = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)  # of a process that says nothing
    with (
        ExitStack() as stack,
        pytest.raises(TrunklineError, match=r"do not find each other .* process 1 says") as error,
    ):
        agree(stack, Peers(1, 2, "127.0.0.1", port, "launch"), lambda: None)
    assert error.value.field == "trainer.num_nodes"
    del server


def connect(environ: dict[str, object], pipe: Any) -> None:
    """Claim a run, then add up the ranks over all processes, of which the first comes last."""
    os.environ.update({name: str(value) for name, value in environ.items()})
    with ExitStack() as stack:
        claim_run(stack, Path("runs"), "vit/mine", None)
        if environ["RANK"] == 0:
            time.sleep(0.5)
        dist.init_process_group("gloo", timeout=timedelta(seconds=20))
        total = torch.tensor([float(os.environ["RANK"])])
        dist.all_reduce(total)
        pipe.send(total.item())
        os._exit(0)  # as a kill, which removes nothing


def test_restarted_processes_do_not_look_for_those_before_them() -> None:
    """Two attempts with one store of torchrun, which keeps what the first attempt has left in it."""
    agent = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for restarts in range(2):
        shared = {"MASTER_PORT": agent.port, "TORCHELASTIC_USE_AGENT_STORE": True}
        running = []
        for environ in torchrun(2, restarts=restarts, **shared):
            here, there = CONTEXT.Pipe()
            process = CONTEXT.Process(target=connect, args=(environ, there), daemon=True)
            process.start()
            there.close()
            running.append((process, here))
        assert [pipe.recv() for _, pipe in running] == [1.0, 1.0]
        for process, _ in running:
            process.join(60)


def test_questions_of_earlier_processes_do_not_disturb() -> None:
    """The store of torchrun outlives the processes that it restarts."""
    store = HashStore()
    store.set("asks/1", "old")
    store.set("answer/old", json.dumps({"choice": "old", "by": "x"}))
    store.set("heard/x/1", b"")
    answers = []
    threads = [threading.Thread(target=lambda rank=rank: answers.append(launch._ask(store, rank))) for rank in (1, 2)]
    first = threading.Thread(target=launch._tell, args=(store, 3, {"choice": "new"}))
    first.start()
    while not store.check(["answer/old"]) or b"new" not in store.get("answer/old"):
        pass  # the old question is answered, and nobody hears it
    for thread in threads:
        thread.start()
    for thread in (*threads, first):
        thread.join(60)
    assert [answer["choice"] for answer in answers] == ["new", "new"]


def test_processes_that_lightning_starts_inherit(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the variable of their parent; a process that another run starts for a run of its own does not."""
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv(CHOSEN, json.dumps({"process": os.getppid(), "found": ["runs/a", "runs/a/checkpoints/b", []]}))
    with ExitStack() as stack:
        found = claim_run(stack, Path("runs"), "vit/mine", "auto")
        assert found == (Path("runs/a"), Path("runs/a/checkpoints/b"), [])
        monkeypatch.setenv(CHOSEN, json.dumps({"process": 1, "found": ["runs/a", None, []]}))
        with pytest.raises(TrunklineError, match="not the first process of the run, but not") as error:
            claim_run(stack, Path("runs"), "vit/mine", None)
        assert error.value.field == "trainer.num_nodes"
        monkeypatch.setenv("LOCAL_RANK", "0")
        assert claim_run(stack, Path("runs"), "vit/mine", None)[0] != Path("runs/a")


@pytest.mark.parametrize(
    ("environ", "first"),
    [
        ({"TORCHELASTIC_RUN_ID": "none", "RANK": "0", "SLURM_PROCID": "1"}, True),  # two orders of hosts
        ({"TORCHELASTIC_RUN_ID": "none", "RANK": "1", "SLURM_PROCID": "0"}, False),
        ({"SLURM_PROCID": "1"}, False),
        ({}, True),
    ],
)
def test_the_first_process(environ: dict[str, str], first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert is_first_process() == first


def test_each_step_of_a_job_has_an_address_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for step, hosts in enumerate(("node[03-04]", "node7,node8")):
        with monkeypatch.context() as patch:
            environ = srun(2, 987654, step, SLURM_STEP_NODELIST=hosts, SLURM_NODELIST="node[01-08]")[1]
            for name, value in environ.items():
                patch.setenv(name, str(value))
            found.append(find_peers())
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            del os.environ[name]
    assert [(peers.rank, peers.size, peers.address) for peers in found] == [(1, 2, "node03"), (1, 2, "node7")]
    assert found[0].port == 15000 + 7654
    assert found[1].port != found[0].port


@pytest.mark.parametrize(
    ("environ", "devices", "want"),
    [
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}, "auto", (3, 4)),
        ({"NODE_RANK": "1", "LOCAL_RANK": "1"}, 2, (3, 4)),
        ({"NODE_RANK": "1"}, 8, (1, 2)),
    ],
)
def test_numbers_that_are_set_by_hand(
    environ: dict[str, str], devices: Any, want: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**environ, "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    peers = find_peers(2, devices)
    assert peers is not None
    assert (peers.rank, peers.size, peers.address, peers.port) == (*want, "node1", 29500)


def test_numbers_that_do_not_suffice(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"LOCAL_RANK": "1", "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(TrunklineError, match="set RANK and WORLD_SIZE too") as error:
        find_peers(2, "auto")
    assert error.value.field == "trainer.devices"
    monkeypatch.delenv("LOCAL_RANK")
    assert find_peers(2, "auto") is None
