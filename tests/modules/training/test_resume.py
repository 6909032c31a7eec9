"""A run killed at any moment resumes in the middle of its epoch to the same weights, bit for bit."""

import functools
import json
import os
import random
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
import yaml
from recorded_run import POINTS, Run, go_on, halt_at, kill_sessions, wait_until_halted
from tasks import BATCHES, TASKS

EPOCHS = 3


def write_config(
    folder: Path,
    task: str = "image",
    data: str | None = None,
    exact: bool = False,
    keep: str | None = None,
    **trainer: Any,
) -> Path:
    """A recipe of one of the `TASKS`.

    Args:
        folder: of the file and of the record.
        task: what is trained.
        data: another datamodule than the task's.
        exact: leave dropout and mixup out, which depend on the number of processes.
        keep: see `Recorder`.
        **trainer: more of its options.
    """
    checkpoint = "lightning.pytorch.callbacks.ModelCheckpoint"
    recorder = {"folder": str(folder), "keep": keep}
    model, source = TASKS[task](folder, exact)
    # With its usual eps, AdamW makes steps of full size out of rounding errors.
    optimizer = {"name": "adamw", "lr": 0.01, "eps": 1e-3} if exact else {"name": "muon", "lr": 0.01}
    model["init_args"]["optimizer"] = optimizer
    source["init_args"]["batch_size"] = 20
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
            **trainer,
            "callbacks+": [
                {"class_path": "lightning.pytorch.callbacks.EMAWeightAveraging", "init_args": {"decay": 0.9}},
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


def arguments(config: Path, processes: int, workers: int = 0, resume: bool = False) -> list[str]:
    distributed = ["--trainer.devices", str(processes), "--trainer.strategy", "ddp"] if processes > 1 else []
    tail = ["--resume", "auto"] if resume else []
    return ["fit", "--config", str(config), "--data.num_workers", str(workers), *distributed, *tail]


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
            for data in ("AudioData", "SpeechData", "TranslationData"):
                state.get(data, {}).pop("source", None)  # a path in the run's folder
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


def draw_halt(chance: random.Random, point: str, kill: int, steps: int, processes: int) -> tuple[int, list[int]]:
    """In the third of the run that belongs to this kill, a step and the processes that stand there."""
    first, end = 3 + kill * steps // 3, (kill + 1) * steps // 3  # at 2 a checkpoint is saved
    if point == "validation":  # comes a few steps later
        end = first + 3
    every = list(range(processes))
    ranks = [0] if point == "writing" else chance.choice([every, [chance.choice(every)]])
    return chance.randrange(first, end), ranks


def kill_three_times(config: Path, processes: int, workers: int, steps: int, seed: str = "") -> None:
    """Start, kill and resume at random steps, each time at another point of the step, then run to the end."""
    folder, chance = config.parent, random.Random(seed)
    for kill, point in enumerate(chance.sample(POINTS, 3)):
        step, ranks = draw_halt(chance, point, kill, steps, processes)
        halt_at(folder, point, step, ranks)
        run = Run(arguments(config, processes, workers, resume=kill > 0), folder, processes)
        wait_for_halt(run, folder, ranks)
        run.signal(signal.SIGKILL)
        assert run.wait() == [-signal.SIGKILL] * processes
    go_on(folder)
    run = Run(arguments(config, processes, workers, resume=True), folder, processes)
    assert run.wait() == [0] * processes, run.output()
    starts = [line["started_at"] for line in lines(folder) if "started_at" in line]
    assert starts[0] == 0
    assert 0 < starts[1] < starts[2] < starts[3] < steps


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Folder of an uninterrupted run; each kind runs once."""

    @functools.cache
    def train(processes: int, accumulate: int = 1, task: str = "image") -> Path:
        folder = tmp_path_factory.mktemp(f"uninterrupted{processes}")
        config = write_config(folder, task, accumulate_grad_batches=accumulate)
        run = Run(arguments(config, processes), folder, processes)
        assert run.wait() == [0] * processes, run.output()
        assert sum(what == "trained" for _, what, _ in record(folder)) == EPOCHS * BATCHES * processes
        return folder

    return train


@pytest.mark.parametrize(
    ("task", "processes", "workers", "accumulate"),
    [
        ("image", 1, 2, 1),
        ("image", 2, 0, 2),
        ("classify", 1, 0, 1),
        ("documents", 2, 0, 1),
        ("masked_pairs", 2, 0, 1),
        ("pairs", 2, 0, 2),
        ("translate", 1, 0, 1),
        ("translate", 2, 0, 1),
        ("speech", 1, 2, 1),
        ("speech", 2, 0, 1),
        ("audio", 2, 0, 1),
        ("own", 1, 0, 1),
        pytest.param("block", 1, 0, 1, marks=pytest.mark.slow),
        pytest.param("masked", 1, 2, 1, marks=pytest.mark.slow),
        pytest.param("image", 1, 0, 2, marks=pytest.mark.slow),
        pytest.param("image", 2, 2, 1, marks=pytest.mark.slow),
        pytest.param("block", 2, 2, 1, marks=pytest.mark.slow),
        pytest.param("documents", 1, 2, 2, marks=pytest.mark.slow),
        pytest.param("classify", 2, 2, 2, marks=pytest.mark.slow),
        pytest.param("pairs", 1, 2, 1, marks=pytest.mark.slow),
        pytest.param("translate", 2, 2, 2, marks=pytest.mark.slow),
        pytest.param("speech", 1, 0, 2, marks=pytest.mark.slow),
        pytest.param("speech", 2, 2, 1, marks=pytest.mark.slow),
        pytest.param("listen", 2, 0, 2, marks=pytest.mark.slow),
        pytest.param("audio", 1, 2, 1, marks=pytest.mark.slow),
    ],
)
def test_kills(
    task: str, processes: int, workers: int, accumulate: int, uninterrupted: Callable[..., Path], tmp_path: Path
) -> None:
    """Three SIGKILLs; the number of workers changes nothing either: the reference has none."""
    config = write_config(tmp_path, task, accumulate_grad_batches=accumulate)
    seed = f"{task} {processes} {workers} {accumulate}"  # of the steps and points
    kill_three_times(config, processes, workers, EPOCHS * -(-BATCHES // accumulate), seed)
    assert_same_run(tmp_path, uninterrupted(processes, accumulate, task))


def test_kill_with_plain_loader_is_noticed(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The negative control: with an ordinary shuffled DataLoader the comparison must fail."""
    killed, whole = tmp_path_factory.mktemp("killed"), tmp_path_factory.mktemp("whole")
    for folder in (killed, whole):
        write_config(folder, data="recorded_run.PlainData")
    kill_three_times(killed / "tiny.yaml", 1, 0, steps=EPOCHS * BATCHES)
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
        (ACCUMULATING, "validation5", 4, 4),  # the same
        (ACCUMULATING, "batch13", 13, 17),  # the end of an epoch, without validation
        (ACCUMULATING, "batch14", 13, 17),  # gradients are under way at the beginning of an epoch
        (ACCUMULATING, "batch23", 23, 22),  # a validation is due within an epoch
        (BY_STEPS, "batch12", 12, 12),  # nothing special
        (BY_STEPS, "batch13", 13, 12),  # a validation is due
        (BY_STEPS, "validation13", 13, 13),  # it is done
        (BY_STEPS, "epoch13", 13, 13),
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
        (1, signal.SIGINT, "batch end"),
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
    config = write_config(tmp_path)
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
    [*(pytest.param(t, 1, marks=[pytest.mark.slow] * (t == "masked")) for t in TASKS if t != "pairs"), ("pairs", 2)],
)
def test_equal_losses_on_one_and_two_processes(
    task: str, accumulate: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """`batch_size` is over all processes: the mean of two processes' losses is the loss of one."""
    losses, validated, indices = {}, {}, {}
    for processes in (1, 2):
        folder = tmp_path_factory.mktemp(f"equal{processes}")
        config = write_config(folder, task, exact=True, max_epochs=2, accumulate_grad_batches=accumulate)
        run = Run(arguments(config, processes), folder, processes)
        assert run.wait() == [0] * processes, run.output()
        validated[processes] = [line["loss"] for line in lines(folder) if "validated_at" in line]
        steps = [[line for line in lines(folder, rank) if "index" in line] for rank in range(processes)]
        losses[processes] = [sum(line["loss"] for line in step) / processes for step in zip(*steps, strict=True)]
        indices[processes] = [sorted(i for line in step for i in line["index"]) for step in zip(*steps, strict=True)]
    assert len(losses[1]) == 2 * BATCHES
    assert indices[1] == indices[2]
    assert max(losses[1]) - min(losses[1]) > 0.1  # equal losses are not those of a network that does not move
    torch.testing.assert_close(torch.tensor(losses[2]), torch.tensor(losses[1]), rtol=0, atol=1e-5)
    assert len(validated[1]) > 2
    torch.testing.assert_close(torch.tensor(validated[2]), torch.tensor(validated[1]), rtol=0, atol=1e-5)
