"""A run killed at any moment resumes in the middle of its epoch to the same weights, bit for bit."""

import functools
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from recorded_run import Run, go_on, halt_at, kill_sessions
from resumed_run import (
    EPOCHS,
    arguments,
    assert_same_run,
    checkpoint,
    differences,
    kill_and_resume,
    lines,
    record,
    wait_for_halt,
    write_config,
)
from tasks import BATCHES, TASKS

BY_LENGTH = ("translate", "speech", "listen")
"""Tasks whose batches are limited by tokens or seconds, not by rows."""
LOADS = ((2, 1), (0, 3), (2, 3))
"""(workers, accumulated batches) of the long form: each task has all of them, with another number of processes each."""

SHARED_OUT = ("image", "classify", "translate")
"""Batches by rows and by tokens, and the objective that `test_reduction.py` does not divide."""


def batch_for(processes: int) -> int:
    """A batch size of which each process has the same even number of rows, as mixup needs."""
    return 20 if 20 % (2 * processes) == 0 else 24


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Folder of an uninterrupted run; each kind runs once."""

    @functools.cache
    def train(processes: int, accumulate: int = 1, task: str = "image", epochs: int = EPOCHS) -> Path:
        folder, size = tmp_path_factory.mktemp(f"uninterrupted{processes}"), batch_for(processes)
        config = write_config(folder, task, batch_size=size, accumulate_grad_batches=accumulate, max_epochs=epochs)
        run = Run(arguments(config, processes), folder, processes)
        assert run.wait() == [0] * processes, run.output()
        trained = [key for key in record(folder) if key[1] == "trained"]
        batches = BATCHES if size == 20 or task in BY_LENGTH else BATCHES * 20 // size + 1
        assert len(trained) == epochs * batches * processes
        return folder

    return train


def step_count(folder: Path) -> int:
    """Optimiser steps of a whole run."""
    return max(line.get("step", 0) for line in lines(folder))


@pytest.mark.parametrize(
    ("task", "processes", "workers", "accumulate"),
    [
        ("image", 1, 2, 1),
        pytest.param("image", 3, 0, 3, marks=pytest.mark.slow),
        pytest.param("documents", 2, 0, 1, marks=pytest.mark.slow),
        pytest.param("masked_pairs", 2, 0, 1, marks=pytest.mark.slow),
        pytest.param("pairs", 2, 0, 3, marks=pytest.mark.slow),
        pytest.param("translate", 1, 0, 1, marks=pytest.mark.slow),
        pytest.param("speech", 1, 2, 1, marks=pytest.mark.slow),
        pytest.param("own", 1, 0, 1, marks=pytest.mark.slow),
        pytest.param("classify", 1, 0, 1, marks=pytest.mark.slow),
        pytest.param("audio", 1, 2, 1, marks=pytest.mark.slow),
        pytest.param("image", 2, 0, 2, marks=pytest.mark.slow),
        pytest.param("image", 4, 0, 1, marks=pytest.mark.slow),
        pytest.param("pairs", 2, 0, 2, marks=pytest.mark.slow),
        pytest.param("block", 1, 0, 1, marks=pytest.mark.slow),
        pytest.param("masked", 1, 2, 1, marks=pytest.mark.slow),
        pytest.param("image", 1, 0, 2, marks=pytest.mark.slow),
        pytest.param("image", 2, 2, 1, marks=pytest.mark.slow),
        pytest.param("block", 2, 2, 1, marks=pytest.mark.slow),
        pytest.param("documents", 1, 2, 2, marks=pytest.mark.slow),
        pytest.param("classify", 2, 2, 2, marks=pytest.mark.slow),
        pytest.param("adapted", 1, 0, 1, marks=pytest.mark.slow),
        pytest.param("pairs", 1, 2, 1, marks=pytest.mark.slow),
        pytest.param("translate", 2, 2, 2, marks=pytest.mark.slow),
        pytest.param("speech", 1, 0, 2, marks=pytest.mark.slow),
        pytest.param("speech", 2, 2, 1, marks=pytest.mark.slow),
        pytest.param("listen", 2, 0, 2, marks=pytest.mark.slow),
        pytest.param("translate", 2, 0, 1, marks=pytest.mark.slow),
        pytest.param("speech", 2, 0, 1, marks=pytest.mark.slow),
        pytest.param("audio", 2, 0, 1, marks=pytest.mark.slow),
    ],
)
def test_kills(
    task: str, processes: int, workers: int, accumulate: int, uninterrupted: Callable[..., Path], tmp_path: Path
) -> None:
    """Three SIGKILLs; the number of workers changes nothing either: the reference has none."""
    reference = uninterrupted(processes, accumulate, task)
    config = write_config(tmp_path, task, batch_size=batch_for(processes), accumulate_grad_batches=accumulate)
    seed = f"{task} {processes} {workers} {accumulate}"  # of the steps and points
    kill_and_resume(config, processes, workers, step_count(reference), seed)
    assert_same_run(tmp_path, reference)


@pytest.mark.parametrize(
    ("task", "processes", "workers", "accumulate", "point"),
    [
        ("documents", 2, 0, 1, "saving"),
        ("masked_pairs", 1, 0, 1, "validation"),
        ("pairs", 2, 0, 3, "backward"),
        ("translate", 1, 0, 1, "batch end"),
        ("speech", 1, 2, 1, "batch start"),
        ("own", 1, 0, 1, "writing"),
    ],
)
def test_one_kill(
    task: str,
    processes: int,
    workers: int,
    accumulate: int,
    point: str,
    uninterrupted: Callable[..., Path],
    tmp_path: Path,
) -> None:
    """The short form, at each of the points where a run may be killed, and for each way in which batches are made."""
    reference = uninterrupted(processes, accumulate, task, epochs=2)
    options: dict[str, Any] = {"batch_size": batch_for(processes), "max_epochs": 2}
    config = write_config(tmp_path, task, accumulate_grad_batches=accumulate, **options)
    kill_and_resume(config, processes, workers, step_count(reference), task, kills=1, point=point)
    assert_same_run(tmp_path, reference)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("task", "processes", "workers", "accumulate"),
    [
        (task, processes, *LOADS[(number + processes) % 3])
        for number, task in enumerate(("image", "documents", "masked", "pairs"))
        for processes in (1, 2, 3)
    ],
)
def test_twenty_five_kills(
    task: str, processes: int, workers: int, accumulate: int, uninterrupted: Callable[..., Path], tmp_path: Path
) -> None:
    """The long form, for ViT, GPT, BERT and CLIP, each with dropout, weight averaging, and whatever else is random."""
    kills, epochs = 25, 45 if accumulate == 3 else 17  # 7 steps for each kill
    reference = uninterrupted(processes, accumulate, task, epochs)
    options: dict[str, Any] = {"batch_size": batch_for(processes), "max_epochs": epochs}
    config = write_config(tmp_path, task, accumulate_grad_batches=accumulate, **options)
    steps = step_count(reference)
    kill_and_resume(config, processes, workers, steps, f"{task} {processes}", kills)
    assert_same_run(tmp_path, reference)


def test_kill_with_plain_loader_is_noticed(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The negative control: with an ordinary shuffled DataLoader the comparison must fail."""
    killed, whole = tmp_path_factory.mktemp("killed"), tmp_path_factory.mktemp("whole")
    for folder in (killed, whole):
        write_config(folder, data="recorded_run.PlainData")
    kill_and_resume(killed / "tiny.yaml", 1, 0, steps=EPOCHS * BATCHES, kills=1)
    assert Run(arguments(whole / "tiny.yaml", 1), whole).wait() == [0]
    assert record(killed).keys() == record(whole).keys()
    with pytest.raises(AssertionError):
        assert_same_run(killed, whole)


ACCUMULATING: dict[str, Any] = {"max_epochs": 2, "accumulate_grad_batches": 2, "val_check_interval": 5}
BY_STEPS: dict[str, Any] = {"max_epochs": None, "max_steps": 20, "val_check_interval": 1.0}


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Callable[[dict[str, Any]], Path]:
    """Folder of a run that kept a checkpoint at every point where one may be saved."""

    @functools.cache
    def train(steps: bool) -> Path:
        folder = tmp_path_factory.mktemp("kept")
        config = write_config(folder, keep=str(folder), **(BY_STEPS if steps else ACCUMULATING))
        run = Run(arguments(config, 1), folder)
        assert run.wait() == [0], run.output()
        return folder

    return lambda trainer: train(trainer is BY_STEPS)


@pytest.mark.parametrize(
    ("trainer", "point", "trained", "validated"),
    [
        (ACCUMULATING, "batch3", 2, 4),  # the gradients of one batch of two are under way: they are computed again
        pytest.param(ACCUMULATING, "validation5", 4, 4, marks=pytest.mark.slow),  # the same
        (ACCUMULATING, "batch13", 13, 17),  # the end of an epoch, without validation
        (ACCUMULATING, "batch14", 13, 17),  # gradients are under way at the beginning of an epoch
        (ACCUMULATING, "batch23", 23, 22),  # a validation is due within an epoch
        pytest.param(BY_STEPS, "batch12", 12, 12, marks=pytest.mark.slow),  # nothing special
        (BY_STEPS, "batch13", 13, 12),  # a validation is due
        (BY_STEPS, "validation13", 13, 13),  # it is done
        pytest.param(BY_STEPS, "epoch13", 13, 13, marks=pytest.mark.slow),  # the same
    ],
)
def test_save_points(
    trainer: dict[str, Any],
    point: str,
    trained: int,
    validated: int,
    kept: Callable[[dict[str, Any]], Path],
    tmp_path: Path,
) -> None:
    """Wherever a checkpoint is saved, the same follows: training from one batch on, validations from one on."""
    reference = kept(trainer)
    shutil.copytree(reference / point, tmp_path / "run")
    run = Run(["fit", "--config", str(write_config(tmp_path, **trainer)), "--resume", "run"], tmp_path)
    assert run.wait() == [0], run.output()
    first = {"trained": trained, "validated": validated}
    assert record(tmp_path) == {key: line for key, line in record(reference).items() if key[2] >= first[key[1]]}
    states = [checkpoint(reference, "last"), torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)]
    for state in states:
        del state["callbacks"]
        counts = state["loops"]["fit_loop"]
        state["loops"] = [
            counts["epoch_progress"],
            counts["epoch_loop.batch_progress"],
            counts["epoch_loop.state_dict"],
        ]
        assert len(set(counts["epoch_loop.val_loop.batch_progress"]["total"].values())) == 1  # none looks half done
    assert differences(*states) == []


@pytest.mark.parametrize(
    ("steps", "interval", "validated"),
    [
        (5, 5, [5, 10, 18]),  # within an epoch, with its validation
        pytest.param(13, 1.0, [13], marks=pytest.mark.slow),  # at its end
    ],
)
def test_a_run_that_max_steps_ended_goes_on_with_more(
    steps: int,
    interval: float,
    validated: list[int],
    kept: Callable[[dict[str, Any]], Path],
    tmp_path: Path,
) -> None:
    """No sample of the epoch is left out, none comes twice, and neither does a validation."""
    options = {**BY_STEPS, "val_check_interval": interval}
    for most, tail in ((steps, []), (20, ["--resume", "auto"])):
        config = write_config(tmp_path, **{**options, "max_steps": most})
        run = Run(["fit", "--config", str(config), *tail], tmp_path)
        assert run.wait() == [0], run.output()
    trained = [line for line in lines(tmp_path) if "index" in line]
    whole = [line for line in lines(kept(BY_STEPS)) if "index" in line]
    names = ("epoch", "batch", "step", "index", "content")
    assert [[line[name] for name in names] for line in trained] == [[line[name] for name in names] for line in whole]
    assert [line["validated_at"] + 1 for line in lines(tmp_path) if "validated_at" in line] == validated


@pytest.mark.parametrize(
    ("processes", "number", "point"),
    [
        pytest.param(1, signal.SIGINT, "batch end", marks=pytest.mark.slow),
        (1, signal.SIGTERM, "validation"),
        (2, signal.SIGINT, "backward"),
        pytest.param(2, signal.SIGUSR1, "validation", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_signal(
    processes: int, number: signal.Signals, point: str, uninterrupted: Callable[..., Path], tmp_path: Path
) -> None:
    """A signal to all processes ends the run with 128 + its number, a checkpoint, and the command to go on."""
    config, ranks = write_config(tmp_path), list(range(processes))
    halt_at(tmp_path, point, 10, ranks)  # at which a validation is due too
    run = Run(arguments(config, processes, workers=2), tmp_path, processes)
    wait_for_halt(run, tmp_path, ranks)
    run.signal(number)
    go_on(tmp_path)
    assert run.wait() == [128 + number] * processes, run.output()
    assert_stopped_and_resume(run.output(), tmp_path, processes)
    assert_same_run(tmp_path, uninterrupted(processes))


def test_sigterm_to_the_first_of_two(uninterrupted: Callable[..., Path], tmp_path: Path) -> None:
    """The installed command, whose second process Lightning starts and no signal reaches."""
    command = Path(sys.executable).with_name("trunkline")
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    config = write_config(tmp_path, logger=True)
    halt_at(tmp_path, "batch start", 17, [0, 1])
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [command, *arguments(config, 2)],
            cwd=tmp_path, env=environ, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
        try:
            wait_for_halt(process, tmp_path, [0, 1])
            process.send_signal(signal.SIGTERM)
            go_on(tmp_path)
            assert process.wait(60) == 128 + signal.SIGTERM
        finally:
            kill_sessions([process.pid])
            process.wait()
    assert_stopped_and_resume((tmp_path / "log").read_text(), tmp_path, 2)
    assert_same_run(tmp_path, uninterrupted(2))


def assert_stopped_and_resume(output: str, folder: Path, processes: int) -> None:
    """The message names the checkpoint of the step that was last, and a command that goes on from there."""
    stopped = re.search(r"stopped after step (\d+); saved (\S+last\.ckpt)\nresume with: trunkline (.*)", output)
    assert stopped, output
    step = max(line.get("step", 0) for line in lines(folder))
    assert int(stopped[1]) == step < EPOCHS * BATCHES
    assert torch.load(folder / stopped[2], weights_only=True)["global_step"] == step
    run = Run(shlex.split(stopped[3]), folder, processes)
    assert run.wait() == [0] * processes, run.output()
    assert [line["started_at"] for line in lines(folder) if "started_at" in line] == [0, step]


@pytest.mark.parametrize(
    ("task", "accumulate"),
    [
        *(pytest.param(t, 1, marks=[pytest.mark.slow] * (t not in SHARED_OUT)) for t in TASKS if t != "pairs"),
        ("pairs", 2),
    ],
)
def test_equal_losses_on_one_and_two_processes(
    task: str, accumulate: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    assert_equal_losses(task, accumulate, False, tmp_path_factory)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["masked_pairs", "classify", "translate", "speech", "listen", "audio"])
def test_equal_losses_with_sharded_weights(task: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """With the machine file trainer/fsdp. GPT, ViT and CLIP are compared in test_sharding.py; LoRA is refused."""
    assert_equal_losses(task, 1, True, tmp_path_factory)


def assert_equal_losses(task: str, accumulate: int, sharded: bool, factory: pytest.TempPathFactory) -> None:
    """`batch_size` is over all processes: the mean of two processes' losses is the loss of one."""
    losses, validated, indices = {}, {}, {}
    for processes in (1, 2):
        folder = factory.mktemp(f"equal{processes}")
        config = write_config(folder, task, exact=True, max_epochs=2, accumulate_grad_batches=accumulate)
        run = Run(arguments(config, processes, sharded=sharded), folder, processes)
        assert run.wait() == [0] * processes, run.output()
        validated[processes] = [line["loss"] for line in lines(folder) if "validated_at" in line]
        steps = [[line for line in lines(folder, rank) if "index" in line] for rank in range(processes)]
        losses[processes] = [sum(line["loss"] for line in step) / processes for step in zip(*steps, strict=True)]
        indices[processes] = [sorted(i for line in step for i in line["index"]) for step in zip(*steps, strict=True)]
    (last,) = folder.glob("runs/tiny/*/checkpoints/last.ckpt")
    assert last.is_dir() == sharded
    assert len(losses[1]) == 2 * BATCHES
    assert indices[1] == indices[2]
    assert max(losses[1]) - min(losses[1]) > 0.1  # equal losses are not those of a network that does not move
    torch.testing.assert_close(torch.tensor(losses[2]), torch.tensor(losses[1]), rtol=0, atol=1e-5)
    assert len(validated[1]) > 2
    torch.testing.assert_close(torch.tensor(validated[2]), torch.tensor(validated[1]), rtol=0, atol=1e-5)
