"""Checks of the machines before the first step: faults that would end the run late, or never.

The first functions look at what this process sees alone; whether it finds the others is the matter of `reachable.py`.
`PreFlight` compares the processes once they are connected. All of them then end together, and the first one says why.
"""

import os
import secrets
import shutil
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from platform import python_version
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, WeightAveraging
from lightning.pytorch.plugins.environments import SLURMEnvironment

from trunkline import FoundByAll, TrunklineError, __version__
from trunkline.datamodules.base import TrunklineDataModule
from trunkline.datamodules.content_digest import different_parts
from trunkline.datamodules.samplers import check_batch_size
from trunkline.files import megabytes
from trunkline.modules.callbacks.graceful_stop import LastCheckpoint
from trunkline.modules.objectives.base import TrunklineModule
from trunkline.modules.training.distributed import gather_lists

ALIKE = (
    *("torch", "lightning", "numpy", "torchvision", "torchaudio", "timm", "pillow", "tokenizers", "datasets"),
    *("pandas", "pyarrow", "soundfile", "torchmetrics"),
)
"""Packages of which all processes need the same version: they decide what is read, or what is computed."""
OPEN = ("auto", None, -1, "-1")
"""Values of `trainer.devices` that leave the number open."""
SHOWN_SECONDS = 60.0
"""After how many seconds at the latest a network file system shows on one host what another one has written."""


# --- before processes talk to each other


class Launch(NamedTuple):
    """Who started the processes of this run, and how many."""

    by: str
    nodes: int
    tasks: int
    """On each node."""

    @property
    def option(self) -> str:
        """How to ask for another number of processes on a node."""
        return "--ntasks-per-node" if self.by == "srun" else "--nproc-per-node"


def find_launch(environ: Mapping[str, str] = os.environ) -> Launch | None:
    """What srun or torchrun says about the processes of this run; None if neither started this one.

    Raises:
        TrunklineError: if the nodes have different numbers of processes.
    """
    if "TORCHELASTIC_RUN_ID" in environ and "WORLD_SIZE" in environ:
        by, processes, tasks = "torchrun", int(environ["WORLD_SIZE"]), int(environ.get("LOCAL_WORLD_SIZE", "1"))
        nodes = processes // tasks
    elif "SLURM_STEP_ID" in environ and "SLURM_NTASKS" in environ:
        by, processes, nodes = "srun", int(environ["SLURM_NTASKS"]), int(environ.get("SLURM_NNODES", "1"))
        tasks = processes // nodes
    else:
        return None
    launch = Launch(by, nodes, tasks)
    if nodes * tasks != processes:
        raise TrunklineError(
            f"{by} started {processes} processes, which are not equally many on each node; set {launch.option}"
        )
    return launch


def fitted_to_launch(trainer: Mapping[str, Any], launch: Launch | None) -> dict[str, int]:
    """`devices` and `num_nodes` as srun or torchrun started the processes, where a config leaves them open.

    Args:
        trainer: the options of the trainer; 1 node, the default, counts as open.
        launch: of this process.

    Raises:
        TrunklineError: if a config asks for another number than was started, or there are too few devices.
    """
    if launch is None:
        return {}
    devices, nodes = trainer.get("devices"), trainer.get("num_nodes") or 1
    asked = len(devices) if isinstance(devices, list) else devices
    if asked not in OPEN and str(asked) != str(launch.tasks):
        raise TrunklineError(
            f"{launch.by} started {launch.tasks} process(es) on each node, but devices is {devices}: each device needs "
            f"a process; set {launch.option}, or devices to auto",
            "trainer.devices",
        )
    if nodes not in (1, launch.nodes):
        raise TrunklineError(
            f"{launch.by} started processes on {launch.nodes} node(s), but num_nodes is {nodes}; leave num_nodes out",
            "trainer.num_nodes",
        )
    if trainer.get("accelerator") in ("gpu", "cuda") and 0 < (seen := torch.cuda.device_count()) < launch.tasks:
        raise TrunklineError(
            f"{launch.tasks} processes run on this node, but this one sees {seen} GPU(s); give the job as many GPUs as "
            "processes on each node (--gpus-per-node), all of them visible to each process (no --gpus-per-task)",
            "trainer.devices",
        )
    return {"num_nodes": launch.nodes} | ({"devices": launch.tasks} if asked in OPEN else {})


def allow_any_srun() -> None:
    """Let processes be started by `srun --ntasks 2`: Lightning wants to be told the number on each node too."""
    launch = find_launch()
    if launch is not None and launch.by == "srun":
        os.environ.setdefault("SLURM_NTASKS_PER_NODE", str(launch.tasks))


def without_absent_slurm(plugins: list[Any], training: bool) -> list[Any]:
    """The plugins without that of SLURM where there is none: an evaluation of a cluster's run on another machine.

    Raises:
        TrunklineError: for a training, which is meant to run on a cluster.
    """
    absent = [plugin for plugin in plugins if isinstance(plugin, SLURMEnvironment) and "SLURM_PROCID" not in os.environ]
    if absent and training:
        raise TrunklineError(
            "trainer/slurm is for processes that srun starts, and none started this one; submit a job (make slurm, or "
            "sbatch with configs/slurm/train.sbatch), or choose another config of a machine",
            "trainer.plugins",
        )
    return [plugin for plugin in plugins if plugin not in absent]


def check_share(trainer: L.Trainer, data: L.LightningDataModule) -> None:
    """Check that the processes, or their groups for tensor parallelism, can share a batch, before data is prepared.

    Raises:
        TrunklineError: if not.
    """
    shares = (trainer.distributed_sampler_kwargs or {}).get("num_replicas", 1)
    if isinstance(data, TrunklineDataModule) and not data.limits_tokens:
        check_batch_size(data.batch_size, data.batch_size, True, shares)


# --- once they are connected


class Survey(NamedTuple):
    """What one process sees."""

    rank: int
    host: str
    versions: dict[str, str]
    data: str | None
    """Digest of the data."""
    folder: str | None
    """What is wrong with the run's folder."""
    parts: Mapping[str, Any] = {}
    """What that digest is made of."""
    fault: tuple[str, str | None] | None = None
    """Why the data has no digest, and the field at fault."""


class PreFlight(Callback):
    """Compares the processes of a run before its first step: packages, data, the run's folder; and the free disk."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Raise the same error in all processes, if there is one.

        Raises:
            FoundByAll: naming the process and its host, what differs, and what to do.
            TrunklineError: if a single process lacks space.
        """
        if stage != "fit":
            return
        folder, first = Path(trainer.default_root_dir), trainer.is_global_zero
        if trainer.world_size == 1:
            space = lacking_space(trainer, pl_module, folder)
            if space is not None:
                raise TrunklineError(space, "run_dir")
            return
        token, *_ = gather_lists([leave_token(folder)] if first else [], trainer.world_size)
        try:
            everyone: list[Survey] = gather_lists([survey(trainer, folder, token)], trainer.world_size)
            space = lacking_space(trainer, pl_module, folder)
            own: list[tuple[str | None, str | None]] = [(space, "run_dir")] if first else []
            found = [*disagreements(everyone), *gather_lists(own, trainer.world_size)]
        finally:
            if first:
                (folder / token).unlink(missing_ok=True)
        for fault, field in found:
            if fault is not None:
                raise FoundByAll(fault, field, first)


def survey(trainer: L.Trainer, folder: Path, token: str) -> Survey:
    """What this process sees.

    Args:
        trainer: the trainer.
        folder: of the run.
        token: name of a file there, which the first process has written.
    """
    versions = {"Python": python_version(), "trunkline": __version__}
    for name in ALIKE:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    data = getattr(trainer, "datamodule", None)
    digest, parts, fault = None, {}, None
    if isinstance(data, TrunklineDataModule):
        try:
            digest, parts = data.digest(), data.digest_parts()
        except TrunklineError as error:  # such as of a file that is damaged here: the others must not wait
            fault = str(error), error.field
    seen = versions, digest, folder_fault(folder, token), parts, fault
    return Survey(trainer.global_rank, socket.gethostname(), *seen)


def disagreements(everyone: list[Survey]) -> list[tuple[str | None, str | None]]:
    """What is wrong with one process or differs between two, each with the field that it belongs to."""
    first = everyone[0]
    found: list[tuple[str | None, str | None]] = []
    for other in everyone:
        who = f"process {other.rank} on {other.host}"
        if other.folder is not None:
            found.append((f"{who} {other.folder}", "run_dir"))
        for name in sorted(first.versions.keys() | other.versions.keys()):
            here, there = (one.versions.get(name, "not installed") for one in (first, other))
            if here != there:
                text = f"{name} is {there} for {who}, but {here} for the first process on {first.host}"
                found.append((f"{text}; install the same packages on all hosts, or one environment for all", None))
        if other.fault is not None:
            found.append((f"{who} cannot read its data: {other.fault[0]}", other.fault[1]))
        elif other.data != first.data and first.fault is None:
            text = f"{who} reads other data (digest {other.data}) than the first process on {first.host} ({first.data})"
            names = different_parts(first.parts, other.parts)
            text += f": they differ in {', '.join(names)}" if names else ""
            fields_only = names and all(name.startswith("data.") for name in names)
            mend = "the same values of these fields" if fields_only else "the same files, cached ones too (cache_dir)"
            found.append((f"{text}; give all hosts {mend}", names[0] if fields_only else "data.source"))
    return found


def leave_token(folder: Path) -> str:
    """Write a small file into the run's folder, by which other processes recognise it, and return its name.

    Nothing is written where that is impossible: the processes find it out themselves.
    """
    name = f".preflight-{secrets.token_hex(8)}"
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return name


def folder_fault(folder: Path, token: str) -> str | None:
    """Why this process cannot use the run's folder; None if it can. A network file system may show a file later."""
    end = time.monotonic() + SHOWN_SECONDS
    while True:
        with suppress(OSError):
            if token in os.listdir(folder):
                break
        if time.monotonic() > end:
            return (
                f"does not find in {folder} what the first process has written there, so that it could not resume the "
                "run; choose a run_dir on a file system that all hosts share"
            )
        time.sleep(0.1)
    return None if os.access(folder, os.W_OK) else f"cannot write into {folder}; mend its permissions"


class WrittenSizes(NamedTuple):
    """About how many bytes a run writes."""

    checkpoint: int
    """Weights, two values of the optimiser for each that learns, and averages."""
    frozen: int
    """What LoRA leaves out of the checkpoints, and writes beside them once."""


def checkpoint_sizes(trainer: L.Trainer, module: L.LightningModule) -> WrittenSizes:
    """The sizes of what a run writes."""
    parameters = list(module.parameters())
    weights = sum(tensor.nbytes for tensor in [*parameters, *module.buffers()])
    learnt = sum(2 * p.nbytes for p in parameters if p.requires_grad)
    beside = isinstance(module, TrunklineModule) and bool(module.lora.rank)
    frozen = sum(p.nbytes for p in parameters if not p.requires_grad) if beside else 0
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    copies = 1 + any(isinstance(callback, WeightAveraging) for callback in callbacks)
    return WrittenSizes(copies * (weights - frozen) + learnt, frozen)


def files_to_come(trainer: L.Trainer, folder: Path) -> int:
    """How many more checkpoints the run will keep at a time, with the one that is being written."""
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        return 0
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    kept = sum(isinstance(callback, LastCheckpoint) for callback in callbacks)
    for callback in callbacks:
        if isinstance(callback, ModelCheckpoint):
            kept += max(callback.save_top_k, 1) + bool(callback.save_last)
    return max(kept - len(list(folder.glob("checkpoints/*.ckpt"))), 0) + 1 if kept else 0


def lacking_space(trainer: L.Trainer, module: L.LightningModule, folder: Path) -> str | None:
    """Why the run's checkpoints will not fit on the disk; None if they will."""
    files, sizes = files_to_come(trainer, folder), checkpoint_sizes(trainer, module)
    present = next(place for place in [folder, *folder.absolute().parents] if place.is_dir())
    free = shutil.disk_usage(present).free
    if not files or free >= files * sizes.checkpoint + sizes.frozen:
        return None
    beside = f" and the frozen weights of {megabytes(sizes.frozen)}" if sizes.frozen else ""
    return (
        f"the run will write {files} checkpoints of about {megabytes(sizes.checkpoint)}{beside}, but {megabytes(free)} "
        f"are free at {folder}; free some space, choose another run_dir, or let ModelCheckpoint keep fewer (save_top_k)"
    )
