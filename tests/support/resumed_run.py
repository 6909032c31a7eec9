"""Small runs that are killed and resumed: their recipes, their kills, and what makes two of them the same."""

import json
import random
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from recorded_run import POINTS, Run, go_on, halt_at, wait_until_halted
from tasks import BATCHES, TASKS

EPOCHS = 3


def write_config(
    folder: Path,
    task: str = "image",
    data: str | None = None,
    exact: bool = False,
    keep: str | None = None,
    batch_size: int = 20,
    **trainer: Any,
) -> Path:
    """A recipe of one of the `TASKS`.

    Args:
        folder: of the file and of the record.
        task: what is trained.
        data: another datamodule than the task's.
        exact: leave dropout and mixup out, which depend on the number of processes.
        keep: see `Recorder`.
        batch_size: samples of a step, over all processes; an epoch has 13 batches of 20.
        **trainer: more of its options.
    """
    checkpoint = "lightning.pytorch.callbacks.ModelCheckpoint"
    recorder = {"folder": str(folder), "keep": keep}
    model, source = TASKS[task](folder, exact)
    # With its usual eps, AdamW makes steps of full size out of rounding errors.
    optimizer = {"name": "adamw", "lr": 0.01, "eps": 1e-3} if exact else {"name": "muon", "lr": 0.01}
    model["init_args"]["optimizer"] = optimizer
    source["init_args"]["batch_size"] = batch_size
    source["class_path"] = data or source["class_path"]
    config = {
        "model": model,
        "data": source,
        "trainer": {
            "accelerator": "cpu",
            "max_epochs": EPOCHS,
            "val_check_interval": 5,
            "limit_val_batches": 1,
            "num_sanity_val_steps": 0,
            "enable_model_summary": False,
            "logger": False,  # whose curves take longer to draw than an epoch to train
            **trainer,
            "callbacks+": [
                {"class_path": "trunkline.modules.callbacks.WeightAverage", "init_args": {"decay": 0.9}},
                {"class_path": "recorded_run.Recorder", "init_args": recorder},
                {"class_path": checkpoint, "init_args": {"filename": "best", "monitor": "val/loss", "mode": "min"}},
                {
                    "class_path": checkpoint,
                    "init_args": {"filename": "{step}", "monitor": "step", "mode": "max", "every_n_train_steps": 2},
                },
            ],
        },
        "name": "tiny",
        "test_with": "none",
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


SHARDED = ["--config", "trainer/fsdp", "--trainer.accelerator", "cpu", "--trainer.precision", "32-true"]
"""What lets processes train with sharded weights here."""


def arguments(config: Path, processes: int, workers: int = 0, resume: bool = False, sharded: bool = False) -> list[str]:
    strategy = SHARDED if sharded else ["--trainer.strategy", "ddp"]
    distributed = [*strategy, "--trainer.devices", str(processes)] if processes > 1 else []
    tail = ["--resume", "auto"] if resume else []
    return ["fit", "--config", str(config), "--data.num_workers", str(workers), *distributed, *tail]


def run_to_the_end(config: Path, processes: int) -> Path:
    """Train without a fault; returns the folder of the config and of the run."""
    run = Run(arguments(config, processes), config.parent, processes)
    assert run.wait() == [0] * processes, run.output()
    return config.parent


def lines(folder: Path, rank: int = 0) -> list[dict[str, Any]]:
    file = folder / f"rank{rank}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def record(folder: Path) -> dict[tuple[int, str, int], dict[str, Any]]:
    """(rank, what, batch) -> what was trained on, or the validation's result, when it last ran there."""
    found = {}
    for rank in range(len(list(folder.glob("rank*.jsonl")))):
        for line in lines(folder, rank):
            if "index" in line:
                found[rank, "trained", line["epoch"] * BATCHES + line["batch"]] = line
            elif "validated_at" in line:
                found[rank, "validated", line["validated_at"]] = line
    return found


def checkpoint(folder: Path, name: str) -> dict[str, Any]:
    (path,) = (folder / "runs/tiny").glob(f"*/checkpoints/{name}.ckpt")
    return torch.load(path, weights_only=True)


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    """Where two nested states differ, at tolerance 0."""
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [d for key in a for d in differences(a[key], b[key], f"{path}/{key}")]
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        return [d for i in range(len(a)) for d in differences(a[i], b[i], f"{path}/{i}")]
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return [] if a.dtype == b.dtype and torch.equal(a, b) else [path]
    return [] if type(a) is type(b) and a == b else [path]


def assert_same_run(folder: Path, reference: Path) -> None:
    """The same samples and pixels at every step on every rank, and the same last and best checkpoint."""
    assert record(folder) == record(reference)
    for name in ("last", "best"):
        states = []
        for state in (checkpoint(folder, name), checkpoint(reference, name)):
            del state["loops"]  # counts calls of zero_grad too, of steps that were begun twice
            for part in state.values():
                if isinstance(part, dict) and {"source", "rows"} <= part.keys():  # of the data
                    del part["source"]  # a path in the run's folder
            callbacks = state.pop("callbacks")  # of checkpoint callbacks only the score: they hold the folder's name
            state["kept"] = [v if "latest_update_step" in v else v.get("best_model_score") for v in callbacks.values()]
            states.append(state)
        assert {"state_dict", "current_model_state", "averaging_state", "optimizer_states", "lr_schedulers"} <= states[
            0
        ].keys()
        assert differences(*states) == [], name


def wait_for_halt(run: Run | subprocess.Popen[bytes], folder: Path, ranks: list[int]) -> None:
    """Until these processes of the run stand where `halt_at` told them to."""
    alive: Callable[[], bool] = run.alive if isinstance(run, Run) else lambda: run.poll() is None
    halted = wait_until_halted(folder, ranks, alive)
    assert halted, run.output() if isinstance(run, Run) else run.returncode


def draw_halt(
    chance: random.Random, point: str, kill: int, kills: int, steps: int, processes: int
) -> tuple[int, list[int]]:
    """In the part of the run that belongs to this kill, a step and the processes that stand there."""
    first, end = 3 + kill * steps // kills, (kill + 1) * steps // kills  # at 2 a checkpoint is saved
    if point == "validation":  # comes a few steps later
        end = first + min(3, max(steps // kills - 4, 1))
    every = list(range(processes))
    ranks = [0] if point == "writing" else chance.choice([every, [chance.choice(every)]])
    return chance.randrange(first, end), ranks


def random_points(chance: random.Random, kills: int) -> list[str]:
    """So many of the `POINTS`, no two of the same three alike."""
    return [point for _ in range(-(-kills // 3)) for point in chance.sample(POINTS, 3)][:kills]


def kill_and_resume(
    config: Path, processes: int, workers: int, steps: int, seed: str = "", kills: int = 3, point: str | None = None
) -> None:
    """Start, kill and resume at random steps, at random points of the step, then run to the end.

    Args:
        config: see `write_config`.
        processes: number of processes.
        workers: that load data, for each process.
        steps: optimiser steps of the whole run, at least 5 for each kill.
        seed: of the steps and points.
        kills: their number.
        point: that of all kills, instead of random ones.
    """
    folder, chance = config.parent, random.Random(seed)
    points = random_points(chance, kills) if point is None else [point] * kills
    for kill, where in enumerate(points):
        step, ranks = draw_halt(chance, where, kill, kills, steps, processes)
        halt_at(folder, where, step, ranks)
        run = Run(arguments(config, processes, workers, resume=kill > 0), folder, processes)
        wait_for_halt(run, folder, ranks)
        run.signal(signal.SIGKILL)
        assert run.wait() == [-signal.SIGKILL] * processes
    go_on(folder)
    run = Run(arguments(config, processes, workers, resume=True), folder, processes)
    assert run.wait() == [0] * processes, run.output()
    starts = [line["started_at"] for line in lines(folder) if "started_at" in line]
    assert starts[0] == 0 < starts[1]
    assert all(one < other for one, other in zip(starts[1:], [*starts[2:], steps], strict=True))
    assert len(starts) == kills + 1
