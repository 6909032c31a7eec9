"""A small recipe for tests on clusters, on two processes; a run must equal an uninterrupted one."""

import json
import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import yaml
from recorded_run import Run

ROOT = Path(__file__).parents[2]
STEPS, EVERY = 24, 4
"""Steps of a run, more than an epoch; steps between two checkpoints."""
WAIT = 60
"""Seconds that processes wait for a stopped one, within which all must also have started."""


def write_extra(folder: Path) -> Path:
    """What makes `vit/digits` short, recorded in `folder` (see `Recorder`), and quick to notice a lost process."""
    checkpoint = {"filename": "{step}", "monitor": "step", "mode": "max", "every_n_train_steps": EVERY}
    config = {
        "trainer": {
            "accelerator": "cpu",
            "precision": "32-true",
            "max_epochs": -1,
            "max_steps": STEPS,
            "check_val_every_n_epoch": 1,
            "strategy": {
                "class_path": "lightning.pytorch.strategies.DDPStrategy",
                "init_args": {"process_group_backend": "gloo", "timeout": str(timedelta(seconds=WAIT))},
            },
            "callbacks": [
                {"class_path": f"trunkline.modules.callbacks.{name}"} for name in ("GracefulStop", "LastCheckpoint")
            ]
            + [
                {"class_path": "trunkline.modules.callbacks.WeightAverage", "init_args": {"decay": 0.9}},
                {"class_path": "recorded_run.Recorder", "init_args": {"folder": str(folder)}},
                {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": checkpoint},
            ],
        },
        "compile": False,
    }
    path = folder / "extra.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def environment() -> dict[str, str]:
    """Variables with which a test's command finds this checkout, and processes find each other on this machine."""
    return {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests/support")]),
        "TRUNKLINE": str(Path(sys.executable).with_name("trunkline")),
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "GLOO_SOCKET_IFNAME": "lo",
    }


def uninterrupted(folder: Path) -> Path:
    """The folder, in which the recipe was trained on two processes."""
    run = Run(
        ["fit", "--config", "vit/digits", "--config", str(write_extra(folder)), "--trainer.devices", "2"], folder, 2
    )
    assert run.wait() == [0, 0], run.output()
    return folder


def recorded(folder: Path, rank: int) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"rank{rank}.jsonl").read_text().splitlines()]


def first_steps(folder: Path) -> list[int]:
    """At how many steps each attempt of the run began."""
    return [line["started_at"] for line in recorded(folder, 0) if "started_at" in line]


def trained(folder: Path) -> dict[tuple[int, int], Any]:
    """(rank, step) -> samples, pixels and loss, when the step was last trained."""
    return {(rank, line["step"]): line for rank in (0, 1) for line in recorded(folder, rank) if "index" in line}


def assert_equals(folder: Path, reference: Path) -> None:
    """One run folder, the same samples and losses at every step, and the same last checkpoint, bit for bit."""
    assert trained(folder) == trained(reference)
    assert len(trained(folder)) == 2 * STEPS
    parts = []
    for place in (folder, reference):
        (file,) = place.glob("runs/vit/digits/*/checkpoints/last.ckpt")
        content = torch.load(file, weights_only=True)
        names = "state_dict", "optimizer_states", "lr_schedulers", "averaging_state", "epoch", "global_step"
        parts.append([content[name] for name in names])
    leaves = [torch.utils._pytree.tree_leaves(part) for part in parts]
    assert len(leaves[0]) == len(leaves[1]) > 100
    assert all(
        torch.equal(one, two) if isinstance(one, torch.Tensor) else one == two for one, two in zip(*leaves, strict=True)
    )
