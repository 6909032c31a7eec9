"""Small runs of `trunkline fit` in new processes, and a record of what they trained on."""

import contextlib
import hashlib
import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import machine_settings
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader, Dataset

from trunkline.datamodules import ImageData
from trunkline.datamodules.samplers import SampleKey
from trunkline.pipelines.objectives import KINDS

PRELOADED = [
    "matplotlib.backends.backend_agg",
    "pyarrow.parquet",
    "sklearn.datasets",
    "tensorboard.backend.event_processing.event_accumulator",
    "timm.data",
    "torch.distributed.algorithms.ddp_comm_hooks.default_hooks",
    "torch.utils.tensorboard",
    "torchvision.transforms.v2",
    "trunkline.pipelines.training",
    *(kind.objective.rpartition(".")[0] for kind in KINDS.values()),
]
"""What runs import. A fork of a server that has imported it starts at once; python itself takes many seconds.

Only installed modules: the server does not look in `tests/support`, and says nothing about what it does not find.
"""
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(PRELOADED)

HALT = "halt.json"
GONE_WITHIN = 10.0
"""Seconds to the end of all processes, from the loss of one, or from when the others have waited long enough for it."""
POINTS = ("batch start", "backward", "batch end", "validation", "saving", "writing")


def halt_at(folder: Path, point: str, step: int, ranks: list[int]) -> None:
    """Make the next run stop at one of the `POINTS`, the first time that it gets there after `step` optimiser steps.

    Args:
        folder: folder of the `Recorder`.
        point: `saving` means while the checkpoint's content is collected, `writing` while it is flushed to the disk
            (rank 0 only).
        step: optimiser steps of the run, including those before it was resumed.
        ranks: processes that stop; the others go on until they need a stopped one.
    """
    assert point in POINTS
    for rank in ranks:
        halted_file(folder, rank).unlink(missing_ok=True)
    (folder / HALT).write_text(json.dumps({"point": point, "step": step, "ranks": ranks}))


def wait_until_halted(folder: Path, ranks: list[int], alive: Callable[[], bool]) -> bool:
    """Wait until the processes have stopped; False if the run ended before."""
    while not all(halted_file(folder, rank).exists() for rank in ranks):
        if not alive():
            return False
        time.sleep(0.005)
    return True


def go_on(folder: Path) -> None:
    """Let a stopped run continue."""
    (folder / HALT).unlink()


def halted_file(folder: Path, rank: int) -> Path:
    return folder / f"halted{rank}"


class Recorder(Callback):
    """Appends a line for each start of training, each batch and each validation; one file per process.

    A run stops where `FOLDER/halt.json` says (see `halt_at`), and waits there until it is killed or the file is gone.

    Args:
        folder: folder of the files `rank0.jsonl`, `rank1.jsonl`, …
        keep: a folder; saves a checkpoint at each point where this is possible, as
            `KEEP/<hook><batch>/checkpoints/kept.ckpt`.
    """

    def __init__(self, folder: str, keep: str | None = None) -> None:
        self.folder, self.keep = Path(folder), keep
        self.halt: dict[str, Any] | None = None
        self.fsync = os.fsync

    def write(self, trainer: L.Trainer, hook: str, line: dict[str, Any]) -> None:
        with (self.folder / f"rank{trainer.global_rank}.jsonl").open("ab", buffering=0) as file:
            file.write(json.dumps(line).encode() + b"\n")  # one system call, so that a kill cannot leave half a line
        if self.keep and hook != "start":
            batch = trainer.fit_loop.total_batch_idx + 1
            trainer.save_checkpoint(Path(self.keep) / f"{hook}{batch}" / "checkpoints" / "kept.ckpt")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.write(trainer, "start", {"started_at": trainer.global_step})
        file = self.folder / HALT
        self.halt = json.loads(file.read_text()) if file.exists() else None
        if self.halt and self.halt["point"] == "writing":
            os.fsync = lambda descriptor: (self.wait_at("writing", trainer), self.fsync(descriptor))[1]

    def wait_at(self, point: str, trainer: L.Trainer) -> None:
        """Wait if the run must stop here; it does so only once, see `halt_at`."""
        halt = self.halt
        if not halt or (halt["point"], trainer.global_step >= halt["step"]) != (point, True):
            return
        if trainer.global_rank not in halt["ranks"]:
            return
        self.halt = None
        halted_file(self.folder, trainer.global_rank).touch()
        while (self.folder / HALT).exists():
            time.sleep(0.005)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.wait_at("batch start", trainer)

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.wait_at("backward", trainer)

    def on_validation_batch_end(self, trainer: L.Trainer, *_: Any, **__: Any) -> None:
        self.wait_at("validation", trainer)

    def on_save_checkpoint(self, trainer: L.Trainer, *_: Any) -> None:
        self.wait_at("saving", trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        os.fsync = self.fsync

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        line = {
            "epoch": trainer.current_epoch,
            "batch": batch_idx,
            "step": trainer.global_step,
            "index": batch["index"][batch["valid"]].tolist() if "valid" in batch else batch["index"].tolist(),
            "content": hashlib.sha256(next(iter(batch.values())).cpu().numpy()).hexdigest()[:16],
            "loss": outputs["loss"].item(),
        }
        self.write(trainer, "batch", line)
        self.wait_at("batch end", trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        line = {"validated_at": trainer.fit_loop.total_batch_idx, "loss": trainer.callback_metrics["val/loss"].item()}
        self.write(trainer, "validation", line)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.write(trainer, "epoch", {"ended": trainer.current_epoch})


class BriefWait(Callback):
    """Gives up on another process after some seconds once training has begun; processes may still start slowly.

    Args:
        seconds: instead of the `timeout` of the strategy.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=self.seconds))  # `set_timeout` from torch 2.14 on


class Poison(Callback):
    """Makes the images of a batch infinite.

    Args:
        step: number of optimiser steps before this batch.
    """

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self.step:
            batch["image"].fill_(float("inf"))


class PlainData(ImageData):
    """The same images from an ordinary shuffled DataLoader, which cannot resume exactly (a negative control)."""

    def train_dataloader(self) -> Any:
        return DataLoader(Keyed(self.datasets["train"]), self.batch_size, shuffle=True, drop_last=True)


class Keyed(Dataset[Any]):
    """A dataset whose rows are read by number, as an ordinary sampler does."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.rows[SampleKey(0, index)]


class Run:
    """`trunkline ARGUMENTS` in a folder, as one or several processes, each with its own session.

    Several processes are started as on a cluster, with their ranks in the environment, beside what `more` has.
    """

    def __init__(self, arguments: list[str], folder: Path, processes: int = 1, **more: str) -> None:
        self.log = folder / f"{time.monotonic_ns()}.log"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.processes = []
        for rank in range(processes):
            ranks: dict[str, object] = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "GROUP_RANK": 0,
                "TORCHELASTIC_RUN_ID": "test",
            }
            ranks |= {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
            ranks |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            environ = more | ({name: str(value) for name, value in ranks.items()} if processes > 1 else {})
            self.processes.append(CONTEXT.Process(target=run_command, args=(arguments, folder, self.log, environ)))
        for process in self.processes:
            process.start()

    def wait(self) -> list[int | None]:
        """Wait for all processes and return their exit codes; one that runs for two minutes is killed (None)."""
        for process in self.processes:
            process.join(120)
        codes = [process.exitcode for process in self.processes]
        self.kill()
        return codes

    @property
    def sessions(self) -> list[int]:
        """One for each process, with its number; also what the process starts is in it."""
        return [process.pid for process in self.processes if process.pid is not None]

    def signal(self, number: int) -> None:
        """Send a signal to all processes, as a terminal does, including those that load data."""
        for session in self.sessions:
            os.killpg(session, number)

    def kill(self) -> None:
        """Kill all processes that are still running, and wait until they are gone."""
        kill_sessions(self.sessions)
        for process in self.processes:
            process.join()

    def alive(self) -> bool:
        """Whether no process has ended."""
        return all(process.is_alive() for process in self.processes)

    def output(self) -> str:
        """Everything that the run has printed."""
        return self.log.read_text()


def run_command(arguments: list[str], folder: Path, log: Path, environ: dict[str, str]) -> None:
    """Do what the `trunkline` script does, in a new process."""
    os.setsid()
    os.chdir(folder)
    os.environ.update(environ)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    multiprocessing.set_start_method(
        "fork", force=True
    )  # how processes that load data are started, as in an ordinary process
    machine_settings.apply()
    sys.argv = ["trunkline", *arguments]
    from trunkline.pipelines.cli import main

    main()


def wait_until_gone(sessions: list[int], until: float) -> bool:
    """Wait for the end of every process of these sessions, no longer than `until` (of `time.monotonic`); True if so."""
    while any(map(members, sessions)):
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True


def kill_sessions(sessions: list[int]) -> None:
    """Kill every process of these sessions, and wait until all are gone."""
    while living := [pid for session in sessions for pid in members(session)]:
        for pid in living:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)


def members(session: int) -> list[int]:
    """Living processes of a session."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # the process has ended meanwhile
            state, _, _, number = stat.read_text().rpartition(")")[2].split()[:4]
            if int(number) == session and state not in "ZX":
                found.append(int(stat.parent.name))
    return found
