"""What is checked before the first step of several processes."""

import os
import shutil
import socket
import sys
import types
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins.environments import SLURMEnvironment
from recorded_run import Run

from trunkline import TrunklineError
from trunkline.datamodules import ImageData, TranslationData
from trunkline.pipelines import preflight, reachable
from trunkline.pipelines.cli import main
from trunkline.pipelines.launch import Peers
from trunkline.pipelines.preflight import Launch, PreFlight, Survey, find_launch, fitted_to_launch
from trunkline.pipelines.reachable import check_first_process

SRUN = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "6", "SLURM_NNODES": "2", "SLURM_PROCID": "3"}
TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "6", "LOCAL_WORLD_SIZE": "3", "RANK": "3"}


# --- the launch


@pytest.mark.parametrize(
    ("environ", "launch"),
    [
        ({}, None),
        (SRUN, Launch("srun", 2, 3)),
        (TORCHRUN, Launch("torchrun", 2, 3)),
        ({**SRUN, **TORCHRUN, "WORLD_SIZE": "3"}, Launch("torchrun", 1, 3)),  # torchrun in a job
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "6"}, None),  # the script of a job, without srun
    ],
)
def test_the_launch_is_found(environ: dict[str, str], launch: Launch | None) -> None:
    assert find_launch(environ) == launch


def test_nodes_with_different_numbers_of_processes_are_refused() -> None:
    with pytest.raises(TrunklineError, match="started 5 processes, which are not equally many on each node; set --nt"):
        find_launch({**SRUN, "SLURM_NTASKS": "5"})


@pytest.mark.parametrize(
    ("trainer", "taken"),
    [
        ({"devices": "auto"}, {"devices": 3, "num_nodes": 2}),
        ({"devices": -1, "num_nodes": 1}, {"devices": 3, "num_nodes": 2}),
        ({"devices": 3, "num_nodes": 2}, {"num_nodes": 2}),
        ({"devices": [0, 1, 2]}, {"num_nodes": 2}),
    ],
)
def test_devices_and_nodes_are_those_of_the_launch(trainer: dict[str, Any], taken: dict[str, int]) -> None:
    assert fitted_to_launch(trainer, Launch("srun", 2, 3)) == taken
    assert fitted_to_launch(trainer, None) == {}


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        ({"devices": 2}, r"srun started 3 process\(es\) on each node, but devices is 2: .* set --ntasks-per-node"),
        ({"devices": [0]}, r"but devices is \[0\]"),
        ({"devices": "auto", "num_nodes": 4}, r"on 2 node\(s\), but num_nodes is 4; leave num_nodes out"),
        (
            {"devices": "auto", "accelerator": "gpu"},
            r"3 processes run on this node, but this one sees 1 GPU.*--gpus",
        ),
    ],
)
def test_another_number_of_tasks_than_devices(
    trainer: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(TrunklineError, match=message):
        fitted_to_launch(trainer, Launch("srun", 2, 3))


def test_tasks_on_each_node_need_not_be_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning refuses `srun --ntasks 6` without the number on each node."""
    for name, value in SRUN.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("SLURM_NTASKS_PER_NODE", raising=False)
    with pytest.raises(RuntimeError, match="ntasks"):
        SLURMEnvironment()
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "x")  # so that it is removed after the test
    monkeypatch.delenv("SLURM_NTASKS_PER_NODE")
    preflight.allow_any_srun()
    assert os.environ["SLURM_NTASKS_PER_NODE"] == "3"
    assert SLURMEnvironment().world_size() == 6


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to run commands in, in no job."""
    for name in [name for name in os.environ if name.startswith(("SLURM_", "TORCHELASTIC_"))]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["trunkline"])
    return tmp_path


def refused(arguments: str, capsys: pytest.CaptureFixture[str]) -> str:
    """The message with which a command ends."""
    with pytest.raises(SystemExit) as end:
        main(arguments.split())
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.count("error: ") == 1
    return " ".join(error.split())


CPU = "--trainer.accelerator cpu --trainer.precision 32-true --compile false"


def test_the_config_of_slurm_needs_srun(elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(f"fit --config vit/digits --config trainer/slurm {CPU}", capsys)
    assert "trainer/slurm is for processes that srun starts, and none started this one; submit a job (make" in said
    assert not list(elsewhere.iterdir())


def test_a_run_of_a_cluster_is_evaluated_elsewhere() -> None:
    plugin, other = SLURMEnvironment(auto_requeue=False), object()
    assert preflight.without_absent_slurm([plugin, other], training=False) == [other]


def test_the_processes_cannot_share_a_batch(elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Said before any data is read, and before the second process is started."""
    said = refused("fit --config vit/digits --config trainer/ddp_cpu --data.batch_size 63", capsys)
    assert "batch_size=63 (over all processes) cannot be shared by 2 process(es); set batch_size and" in said
    assert said.endswith("(--data.batch_size)")


def test_batches_limited_by_tokens_need_not_divide() -> None:
    trainer: Any = types.SimpleNamespace(distributed_sampler_kwargs={"num_replicas": 2, "rank": 0})
    preflight.check_share(trainer, TranslationData(source="dates", batch_size=3, batch_tokens=100))
    with pytest.raises(TrunklineError, match="batch_size=3"):
        preflight.check_share(trainer, TranslationData(source="dates", batch_size=3))


# --- the first process's address


@pytest.fixture
def listener(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """A port of this machine at which a program listens."""
    for name in ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_USE_AGENT_STORE", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield server.getsockname()[1]


def peers(port: int, rank: int = 1) -> Peers:
    return Peers(rank, 2, "127.0.0.1", port, "launch")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_process_that_finds_the_first_one(listener: int, monkeypatch: pytest.MonkeyPatch) -> None:
    check_first_process(peers(listener))
    check_first_process(peers(free_port(), rank=0))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")  # it is torchrun that listens
    check_first_process(peers(listener, rank=0))


def test_a_port_that_is_taken(listener: int) -> None:
    with pytest.raises(TrunklineError, match=f"cannot listen at port {listener} of .*in use; set MASTER_PORT"):
        check_first_process(peers(listener, rank=0))


def test_a_first_process_that_comes_later(listener: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Connections are refused until it listens."""
    connect, refusals = socket.create_connection, [ConnectionRefusedError()] * 3

    def late(*arguments: Any, **options: Any) -> socket.socket:
        if refusals:
            raise refusals.pop()
        return connect(*arguments, **options)

    monkeypatch.setattr(socket, "create_connection", late)
    monkeypatch.setattr(reachable, "PAUSE_SECONDS", 0)
    check_first_process(peers(listener))
    assert not refusals


def test_a_first_process_that_does_not_come_soon(
    listener: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A word, and then the waiting of `launch.agree`, which ends with an error."""
    monkeypatch.setattr(reachable, "START_SECONDS", -1)
    port = free_port()
    check_first_process(peers(port))
    assert (
        f"waits for the first process at 127.0.0.1:{port}; if it does not start there, MASTER"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize("error", [TimeoutError("timed out"), OSError(113, "No route to host")])
def test_a_host_that_does_not_answer(error: OSError, listener: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(address: Any, timeout: float) -> None:
        assert timeout < 10
        raise error

    monkeypatch.setattr(socket, "create_connection", fail)
    reason = error.strerror or "timed out"
    with pytest.raises(TrunklineError, match=rf"cannot reach 127.*: {reason}; check the network and the firewall"):
        check_first_process(peers(listener))


def test_a_host_that_is_unknown(listener: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise socket.gaierror("Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    with pytest.raises(TrunklineError, match=r"knows no host '127\.0\.0\.1', .*; set MASTER_ADDR"):
        check_first_process(peers(listener))


def test_a_command_without_srun_in_a_job(
    elsewhere: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_PROCID": "0", "SLURM_JOB_ID": "7"}
    places = {"SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NNODES": "1", "SLURM_JOB_NAME": "train"}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    for name, value in {**tasks, **places, **address}.items():
        monkeypatch.setenv(name, value)
    said = refused(f"fit --config vit/digits --config trainer/slurm {CPU}", capsys)
    assert "this SLURM job has 2 tasks, but this is one process, which would wait for the others; write srun" in said


# --- what processes compare


def test_processes_that_see_the_same() -> None:
    everyone = [Survey(rank, f"host{rank}", {"torch": "2.9"}, "abc", None) for rank in range(3)]
    assert preflight.disagreements(everyone) == []
    assert preflight.disagreements([one._replace(data=None) for one in everyone]) == []  # own data may have no digest


@pytest.mark.parametrize(
    ("change", "text", "field"),
    [
        (
            {"versions": {"torch": "2.8"}},
            "torch is 2.8 for process 1 on b, but 2.9 for the first process on a;",
            None,
        ),
        ({"versions": {}}, "torch is not installed for process 1 on b", None),
        (
            {"data": "def"},
            "process 1 on b reads other data (digest def) than the first process on a (abc)",
            "data.source",
        ),
        (
            {"data": "def", "parts": {"train": "1", "settings": {"seed": 0}}},
            "process 1 on b reads other data (digest def) than the first process on a (abc): they differ in train;",
            "data.source",
        ),
        (
            {"data": "def", "parts": {"train": "0", "settings": {"seed": 1}}},
            "process 1 on b reads other data (digest def) than the first process on a (abc): they differ in data.seed; "
            "give all hosts the same values of these fields",
            "data.seed",
        ),
        (
            {"data": None, "fault": ("a.tar is damaged", "data.source")},
            "process 1 on b cannot read its data: a.tar is damaged",
            "data.source",
        ),
        ({"folder": "cannot write"}, "process 1 on b cannot write", "run_dir"),
    ],
)
def test_processes_that_differ(change: dict[str, Any], text: str, field: str | None) -> None:
    first = Survey(0, "a", {"torch": "2.9"}, "abc", None, {"train": "0", "settings": {"seed": 0}})
    ((message, place),) = preflight.disagreements([first, first._replace(rank=1, host="b", **change)])
    assert message is not None
    assert message.startswith(text)
    assert place == field


def test_versions_are_those_that_are_installed(tmp_path: Path) -> None:
    token = preflight.leave_token(tmp_path)
    trainer: Any = types.SimpleNamespace(global_rank=3, datamodule=None)
    found = preflight.survey(trainer, tmp_path, token)
    assert found.versions["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert {"Python", "trunkline", "lightning", "numpy", "tokenizers"} <= found.versions.keys()
    assert (found.rank, found.host, found.data, found.folder) == (3, socket.gethostname(), None, None)


def test_a_folder_that_is_not_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "SHOWN_SECONDS", 0)
    token = preflight.leave_token(tmp_path / "here")
    assert preflight.folder_fault(tmp_path / "here", token) is None
    for folder in (tmp_path, tmp_path / "there"):
        assert "choose a run_dir on a file system that all hosts share" in str(preflight.folder_fault(folder, token))
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    assert (
        preflight.folder_fault(tmp_path / "here", token)
        == f"cannot write into {tmp_path / 'here'}; mend its permissions"
    )


# --- together


class RankData(ImageData):
    """Each process says that it reads something else."""

    def digest(self) -> str:
        return f"{self.trainer.global_rank}"  # type: ignore[union-attr]


class DamagedData(ImageData):
    """The second process finds that a file is damaged as it reads some of it."""

    def digest(self) -> str | None:
        if self.trainer.global_rank == 1:  # type: ignore[union-attr]
            raise TrunklineError("a.tar is damaged; copy it again", "data.source")
        return super().digest()


class OlderPackage(ImageData):
    """The second process has another torch."""

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if self.trainer.global_rank == 1:  # type: ignore[union-attr]
            preflight.version = lambda name: "0.4.1" if name == "torch" else metadata.version(name)  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        ("RankData", "reads other data (digest 1) than the first process"),
        ("DamagedData", "cannot read its data: a.tar is damaged; copy it again"),
        ("OlderPackage", f"but {metadata.version('torch')} for the first process"),
    ],
)
def test_all_processes_end_together_and_one_says_why(data: str, fault: str, tmp_path: Path) -> None:
    command = f"fit --config vit/digits --data test_preflight.{data} --trainer.devices 2 --trainer.strategy ddp"
    run = Run(command.split(), tmp_path, processes=2)
    assert run.wait() == [2, 2], run.output()
    said = run.output()
    assert said.count("error: ") == 1
    assert "process 1 on" in said
    assert fault in " ".join(said.split())
    assert ("torch is 0.4.1 for process 1" in " ".join(said.split())) == (data == "OlderPackage")
    assert not list(tmp_path.rglob("*.yaml"))
    assert not list(tmp_path.rglob(".preflight*"))


class Small(L.LightningModule):
    """One layer that learns and one that is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.learns, self.frozen = torch.nn.Linear(50, 40), torch.nn.Linear(40, 30).requires_grad_(False)
        self.register_buffer("table", torch.zeros(100))


def test_one_process_compares_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "gather_lists", None)
    one = types.SimpleNamespace(
        world_size=1, default_root_dir=".", is_global_zero=True, callbacks=[], fast_dev_run=False
    )
    PreFlight().setup(one, Small(), "fit")  # type: ignore[arg-type]


@pytest.mark.parametrize("more", ["", "--trainer.enable_checkpointing false", "--trainer.fast_dev_run true"])
def test_a_single_process_looks_at_the_disk_too(
    more: str, elsewhere: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless it writes no checkpoints."""
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: types.SimpleNamespace(free=1_000_000))
    command = f"fit --config vit/digits {CPU} --trainer.max_steps 1 --trainer.limit_val_batches 1 --test_with none"
    if more:
        main(f"{command} {more}".split())
        return
    said = refused(command, capsys)
    assert "error: the run will write 5 checkpoints of about" in said
    assert "but 1.0 MB are free at runs/vit/digits/" in said
    assert said.endswith("(--run_dir)")
    assert not list(elsewhere.iterdir())
