"""Check that a run which is killed and resumed ends with the same checkpoint, bit for bit."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch

from trunkline.files import load_checkpoint
from trunkline.modules.training.background_saves import save_and_wait
from trunkline.pipelines.checks.trial import Trial
from trunkline.pipelines.checks.trial_process import TrialObserver
from trunkline.pipelines.checks.trials import Workbench

SAVED, KILLED, EPOCH, END = 2, 3, 4, 5
"""Optimiser steps after which a checkpoint is saved, the run is killed, its first epoch ends at the latest, and it ends
itself: what is kept or drawn anew from epoch to epoch is compared too.
"""


class ResumeObserver(TrialObserver):
    """Saves a checkpoint after some step and after the last one, and holds the run at another.

    Args:
        held: whether the run waits after step `KILLED` to be killed there.
    """

    def __init__(self, held: bool = False) -> None:
        super().__init__()
        self.held = held
        self.result = {"rows": {}}

    def after_step(self, trainer: L.Trainer, module: L.LightningModule, rows: list[Any]) -> None:
        step = trainer.global_step
        self.result["rows"][step] = rows
        if step in (SAVED, END):
            file = Path(trainer.default_root_dir, "checkpoints", f"check{step}.ckpt")
            save_and_wait(trainer, file)
            self.result[f"file{step}"] = str(file)
        if self.held and step == KILLED:
            self.hold(trainer)


class Resumed(NamedTuple):
    """How the run that was resumed differs from the one that went on."""

    differences: list[tuple[str, float]]
    """Name of each part of the checkpoint that differs, and its largest relative difference (nan: no numbers)."""
    other_rows: int | None
    """The first step with other samples; None if there is none."""
    device: str


def run_resume(bench: Workbench, processes: int, device: str) -> Resumed:
    """Run the recipe to its end, run it again with a SIGKILL in between, and compare.

    Raises:
        TrialFailed: if one of the runs fails.
    """
    places = "" if processes == 1 else f" in {processes} processes"
    common: dict[str, Any] = {"steps": END, "processes": processes, "callbacks": "all", "still": False, "epoch": EPOCH}
    title = f"{END} steps{places}, over the end of an epoch, not interrupted"
    went_on = bench.run(Trial(title, ResumeObserver(), **common))
    killed = Trial(f"the same, SIGKILL after step {KILLED}", ResumeObserver(held=True), held=True, **common)
    bench.run(killed)
    (file,) = (bench.folder / f"trial{bench.count}").rglob(f"check{SAVED}.ckpt")
    again = bench.run(Trial(f"the same, resumed from step {SAVED}", ResumeObserver(), resume=str(file), **common))
    other = None
    for step in range(SAVED + 1, END + 1):
        if any(a["rows"].get(step) != b["rows"].get(step) for a, b in zip(went_on, again, strict=True)):
            other = step
            break
    a, b = (comparable(run[0][f"file{END}"]) for run in (went_on, again))
    return Resumed(list(state_differences(a, b)), other, device)


def comparable(file: str) -> dict[str, Any]:
    """The content of a checkpoint without what an exact resume may change.

    That is the loops' counters, which count calls of a step that was begun twice, and the paths of checkpoint
    callbacks.
    """
    content = load_checkpoint(Path(file))
    content.pop("loops", None)
    states = content.get("callbacks") or {}
    content["callbacks"] = {
        key: value for key, value in states.items() if not (isinstance(value, dict) and "dirpath" in value)
    }
    return content


def state_differences(a: Any, b: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """Where two nested states differ, at tolerance 0, and by how much."""
    if isinstance(a, Mapping) and isinstance(b, Mapping) and a.keys() == b.keys():
        for key in a:
            yield from state_differences(a[key], b[key], f"{path}/{key}" if path else str(key))
    elif isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        for number, (first, second) in enumerate(zip(a, b, strict=True)):
            yield from state_differences(first, second, f"{path}/{number}")
    elif isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and a.shape == b.shape and a.dtype == b.dtype:
        if not torch.equal(a, b):
            first, second = a.double(), b.double()
            yield path, float((first - second).abs().max() / first.abs().max().clamp(min=1e-30))
    elif isinstance(a, torch.Tensor) or type(a) is not type(b) or a != b:
        yield path, float("nan")


def explain_resume(found: Resumed) -> str:
    """What is wrong if the checkpoints differ, and what to do."""
    names = [name for name, _ in found.differences]
    largest = max((size for _, size in found.differences if size == size), default=float("nan"))
    text = f"{len(names)} parts of the checkpoint differ, by up to {largest:.1e}: {', '.join(names[:3])}"
    text += " …" if len(names) > 3 else ""
    if found.other_rows is not None:
        return (
            f"after the resume, step {found.other_rows} trained on other samples than without the kill ({text}); the "
            "order must be a function of (seed, epoch) that can start in the middle: use the loaders of "
            "TrunklineDataModule"
        )
    if found.device != "cpu" and largest < 1e-4:
        return f"{text}; kernels of this device may add in another order: try deterministic: true for the trainer"
    return (
        f"{text}; the samples were the same. What is random may depend only on (seed, epoch, index), and a callback or "
        "module that remembers something must save it (state_dict, on_save_checkpoint)"
    )
