"""Small runs of `trunkline fit` in processes of their own, and a record of what they trained on."""

import hashlib
import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader, Dataset

from trunkline.datamodules import ImageData
from trunkline.datamodules.samplers import SampleKey

# A fork of a server that has imported everything starts at once; python itself takes many seconds.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["recorded_run", "trunkline.pipelines.training", "sklearn.datasets", "timm.data"])


class Recorder(Callback):
    """Append one line for each start of training and for each batch trained on, one file a process.

    Args:
        folder: where `rank0.jsonl`, `rank1.jsonl`, … go.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def write(self, trainer: L.Trainer, line: dict[str, Any]) -> None:
        with (self.folder / f"rank{trainer.global_rank}.jsonl").open("ab", buffering=0) as file:
            file.write(json.dumps(line).encode() + b"\n")  # one system call: no kill tears a line

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.write(trainer, {"started_at": trainer.global_step})

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        line = {
            "epoch": trainer.current_epoch,
            "batch": batch_idx,
            "step": trainer.global_step,
            "index": batch["index"].tolist(),
            "pixels": hashlib.sha256(batch["image"].numpy()).hexdigest()[:16],
            "loss": outputs["loss"].item(),
        }
        self.write(trainer, line)


class PlainData(ImageData):
    """The negative control: the same images from an ordinary shuffled DataLoader."""

    def train_dataloader(self) -> Any:
        return DataLoader(Keyed(self.datasets["train"]), self.batch_size, shuffle=True, drop_last=True)


class Keyed(Dataset[Any]):
    """Rows by number, as an ordinary sampler asks for them."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.rows[SampleKey(0, index)]


class Run:
    """`trunkline ARGUMENTS` as one or several processes, all in one session.

    Several processes are started as a cluster does it, with ranks in the environment.
    """

    def __init__(self, arguments: list[str], folder: Path, processes: int = 1) -> None:
        self.log = folder / f"run{time.monotonic_ns()}.log"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.processes = []
        for rank in range(processes):
            ranks = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": processes}
            ranks |= {"LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            environ = {k: str(v) for k, v in ranks.items()} | {"TORCHELASTIC_RUN_ID": "test"}
            arguments_ = (arguments, folder, self.log, environ if processes > 1 else {})
            self.processes.append(CONTEXT.Process(target=run_command, args=arguments_))
        for process in self.processes:
            process.start()

    def wait(self, timeout: float = 120) -> list[int | None]:
        """Exit codes of all processes, none of which is left behind."""
        try:
            for process in self.processes:
                process.join(timeout)
            return [process.exitcode for process in self.processes]
        finally:
            self.kill()

    def signal(self, number: int, rank: int | None = None) -> None:
        """Send a signal to all processes (workers too), or to one rank alone."""
        for process in self.processes if rank is None else [self.processes[rank]]:
            assert process.pid is not None
            (os.kill if rank is not None else os.killpg)(process.pid, number)

    def kill(self) -> None:
        """SIGKILL every process of the run and wait until all are gone."""
        for process in self.processes:
            assert process.pid is not None
            for pid in session_members(process.pid):
                os.kill(pid, signal.SIGKILL)
            process.join()
        while any(session_members(process.pid) for process in self.processes):
            time.sleep(0.01)


def run_command(arguments: list[str], folder: Path, log: Path, environ: dict[str, str]) -> None:
    """In a fresh process: what the `trunkline` script does."""
    os.setsid()
    os.chdir(folder)
    os.environ.update(environ)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    sys.argv = ["trunkline", *arguments]
    from trunkline.pipelines.cli import main

    main()


def session_members(session: int) -> list[int]:
    """Living processes of a session."""
    members = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # ended meanwhile
            continue
        if int(fields[3]) == session and fields[0] not in "ZX":
            members.append(int(stat.parent.name))
    return members
