"""Processes that divide the blocks train as one process does; only activations inside blocks get smaller."""

from pathlib import Path
from typing import Any

import pytest
import torch
from sharded_runs import MODULES, in_processes, train

from trunkline.files import load_checkpoint

FAST = ("gpt", "vit", "t5", "clip")


def divided(rank: int, folder: Path, kinds: tuple[str, ...], size: int = 2) -> None:
    logged = {kind: train(kind, "sharded", folder, rank, tensor_parallel=size)["logged"] for kind in kinds}
    torch.save(logged, folder / f"sharded-{rank}.pt")


def undivided(rank: int, folder: Path, kinds: tuple[str, ...], processes: int = 1) -> None:
    logged = {kind: train(kind, "ddp", folder, rank, devices=processes)["logged"] for kind in kinds}
    torch.save(logged, folder / f"ddp-{rank}.pt")


def divide_and_resume(rank: int, folder: Path) -> None:
    """Also train with dropout, and go on from the middle."""
    divided(rank, folder, FAST)
    middle = folder / "dropout-sharded/middle.ckpt"
    train("dropout", "sharded", folder, rank, tensor_parallel=2, save=True)
    train("dropout", "sharded", folder / "resumed", rank, tensor_parallel=2, resume=middle)
    middle = folder / "frozen-sharded/middle.ckpt"
    train("frozen", "sharded", folder, rank, tensor_parallel=2, save=True)


def states(path: Path) -> dict[str, Any]:
    content = load_checkpoint(path)
    keys = ("state_dict", "current_model_state", "averaging_state", "optimizer_states", "lr_schedulers")
    seen = next(state["seen"] for name, state in content["callbacks"].items() if name.startswith("Throughput"))
    return {"seen": seen, **{key: content[key] for key in keys if key in content}}


def assert_same_training(folder: Path, kind: str, processes: int = 2) -> None:
    found, expected = (states(folder / f"{kind}-{strategy}/last.ckpt") for strategy in ("sharded", "ddp"))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    losses = torch.load(folder / "ddp-0.pt")[kind]
    assert {"train/loss", "train/grad_norm"} <= losses.keys()
    for rank in range(processes):
        assert torch.load(folder / f"sharded-{rank}.pt")[kind] == pytest.approx(losses, rel=1e-4)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    in_processes(divide_and_resume, folder)
    in_processes(undivided, folder, FAST, processes=1)
    return folder


@pytest.mark.parametrize("kind", FAST)
def test_20_steps_are_those_of_one_process(kind: str, runs: Path) -> None:
    assert_same_training(runs, kind)
    start, end = MODULES[kind]().state_dict(), states(runs / f"{kind}-sharded/last.ckpt")["state_dict"]
    assert start.keys() == end.keys()
    assert max((start[name] - x).abs().max() for name, x in end.items() if x.numel() > 1) > 1e-2


def test_resume_is_exact_with_dropout(runs: Path) -> None:
    found, expected = (states(folder / "dropout-sharded/last.ckpt") for folder in (runs / "resumed", runs))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
