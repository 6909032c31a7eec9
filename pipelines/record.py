"""A run's record: what is needed to say later what was run, as `record.json` beside `config.yaml`."""

import os
import platform
import shlex
import socket
import subprocess
from collections.abc import Mapping, Sequence
from datetime import datetime
from importlib.metadata import distributions
from itertools import takewhile
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn

from trunkline import __version__
from trunkline.datamodules.base import TrunklineDataModule
from trunkline.datamodules.content_digest import DIGEST_FORMAT, SETTINGS, different_parts
from trunkline.files import read_json, write_json
from trunkline.modules.training.distributed import gather_lists
from trunkline.modules.training.warm_start import class_path
from trunkline.pipelines.runs import configs, record_beside
from trunkline.run_folders import step_in

GIT_SECONDS = 10
"""How long git may take to compare a working tree; in a home folder it might take for ever."""


class RunRecord(Callback):
    """Writes the record as training starts, in the first process: no environment variables, but the command line.

    If the run is resumed with other data than the record of its last start names, there is a warning.

    Args:
        file: where to.
        arguments: of `trunkline`, as they were typed.
        checkpoint: that the run is resumed from; None for a new run.
    """

    def __init__(self, file: Path, arguments: Sequence[str], checkpoint: Path | None = None) -> None:
        self.file, self.arguments, self.checkpoint = file, arguments, checkpoint
        self.started = now()

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]  # which keeps nothing
            return
        devices = gather_lists([[socket.gethostname(), device_name(trainer.strategy.root_device)]], trainer.world_size)
        if not trainer.is_global_zero:
            return
        data = data_entry(getattr(trainer, "datamodule", None))
        changed = None if self.checkpoint is None else data_change(self.file, data)
        if changed is not None:
            rank_zero_warn(changed)
        record = {
            "started": self.started,
            "training_started": now(),
            "command": shlex.join(["trunkline", *self.arguments]),
            "folder": os.getcwd(),
            "git": git_state(Path.cwd()),
            "resumed": None
            if self.checkpoint is None
            else {"checkpoint": str(self.checkpoint), "step": step_in(self.checkpoint)},
            "processes": trainer.world_size,
            "hosts": list(dict.fromkeys(host for host, _ in devices)),
            "devices": [device for _, device in devices],
            "strategy": class_path(type(trainer.strategy)),
            "precision": trainer.precision,
            "objective": class_path(type(pl_module)),
            "data": data,
            "versions": {
                "trunkline": __version__,
                "python": platform.python_version(),
                "system": platform.platform(),
                "cuda": torch.version.cuda,
            },
            "packages": packages(),
        }
        write_json(self.file, record, "run_dir")


def data_entry(data: Any) -> dict[str, Any]:
    """What a record says about the data: its class, its digest, and what that is made of."""
    ours = isinstance(data, TrunklineDataModule)
    parts = {"format": DIGEST_FORMAT, "parts": data.digest_parts()} if ours else {}
    return {"class": class_path(type(data)), "digest": data.digest() if ours else None, **parts}


def data_change(file: Path, now: Mapping[str, Any]) -> str | None:
    """What to say if a run goes on with other data than before; None if it has the same, or if nothing tells.

    Args:
        file: the record of this start; those of earlier ones stand beside it.
        now: the `data_entry` of this start.
    """
    older = [record_beside(config) for config in takewhile(Path.is_file, configs(file.parent))]
    known = {record: read_json(record) for record in older if record != file}
    entries = {record: content.get("data") or {} for record, content in known.items() if isinstance(content, dict)}
    alike = [record for record, data in entries.items() if data.get("format") == now.get("format") == DIGEST_FORMAT]
    before: Mapping[str, Any] = entries[alike[-1]] if alike else {}
    if not before.get("digest") or not now["digest"] or before["digest"] == now["digest"]:
        return None
    names = different_parts(before["parts"], now["parts"])
    if not names and before["parts"].get(SETTINGS, {}).keys() != now["parts"].get(SETTINGS, {}).keys():
        return None  # another version of the program, with other fields
    where = f" in {', '.join(names)}" if names else ""
    return (
        f"the data is not what it was when this run last started: it differs{where} (digest {before['digest'][:8]} in "
        f"{alike[-1]}, now {str(now['digest'])[:8]}). The samples from here on are not those that the run would have "
        "seen, so that this resume is not exact; if that is not what you want, stop it before it saves, restore the "
        "data, and resume again"
    )


class LastScores(Callback):
    """Keeps the scores of the last validation in the checkpoints, for a model card."""

    def __init__(self) -> None:
        self.kept: dict[str, float] = {}

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            scores = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
            self.kept = {"step": trainer.global_step, **scores}

    def state_dict(self) -> dict[str, float]:
        return self.kept

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        self.kept = state_dict


def now() -> str:
    """The local time with its distance from UTC, to the second."""
    return datetime.now().astimezone().isoformat(" ", "seconds")


def device_name(device: torch.device) -> str:
    """What a device is called by its maker; for a CPU its model, where Linux tells it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return str(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


def packages() -> dict[str, str]:
    """All installed packages, also those that only code of the user's own needs: name -> version."""
    read = (distribution.metadata for distribution in distributions())  # each access reads the file again
    found = {metadata["Name"]: metadata["Version"] for metadata in read if "Name" in metadata}
    return {name: found[name] for name in sorted(found, key=str.lower)}


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit of the repository around a folder, and whether files that it tracks have changed; None outside of one.

    The value of `dirty` is None where git takes too long to compare them.
    """
    commit = _git(folder, "rev-parse", "--verify", "HEAD")
    if not commit:
        return None
    changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "dirty": None if changes is None else changes != ""}


def _git(folder: Path, *arguments: str) -> str | None:
    """What a git command prints; None if it fails or there is no git. It locks nothing."""
    command = ["git", "--no-optional-locks", *arguments]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=GIT_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
