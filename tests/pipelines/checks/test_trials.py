"""Trials: the small batches of each process, its environment, and what is left of it when it ends or is killed."""

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from trunkline.datamodules.samplers import ResumableBatchSampler, SampleKey
from trunkline.pipelines.checks.trial_process import SmallBatches, portable, row_numbers, short_epochs
from trunkline.pipelines.checks.trials import Workbench, environment, failure, kill, wait_for_jobs


def sampler(length: int = 30, size: int = 10, rank: int = 0, world: int = 1) -> ResumableBatchSampler:
    return ResumableBatchSampler(length, size, seed=3, shuffle=True, drop_last=True, rank=rank, world_size=world)


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize(("size", "rows"), [(12, 6), (12, 100)])
def test_parts_are_the_shares_of_as_many_processes(world: int, size: int, rows: int) -> None:
    """Part n of a batch is what process n has of it, also if the batch is cut to its first rows."""
    parts = list(SmallBatches(sampler(24, size), rows, world))
    shares = [list(SmallBatches(sampler(24, size, rank, world), rows // world, 1)) for rank in range(world)]
    assert parts == [shares[n % world][n // world] for n in range(len(parts))]
    assert len(parts) == len(SmallBatches(sampler(24, size), rows, world)) == 2 * world
    (whole,) = {tuple(batch[: min(rows, size)]) for batch in list(sampler(24, size))[:1]}
    assert sorted(key for part in parts[:world] for key in part) == sorted(whole)


def test_fillers_make_parts_equally_long() -> None:
    first, second = list(SmallBatches(sampler(10, 5), 5, 2))[:2]
    assert (len(first), len(second)) == (3, 3)
    assert [key.valid for key in second] == [True, True, False]
    small = SmallBatches(whole := sampler(), 4, 2)
    assert small.sampler is whole  # where Lightning sets the epoch
    assert isinstance(first[0], SampleKey)


def test_rows_of_a_batch() -> None:
    index, valid = torch.tensor([4, 2, 4]), torch.tensor([True, True, False])
    assert row_numbers({"x": torch.zeros(3), "index": index, "valid": valid}) == [4, 2]
    assert row_numbers({"x": torch.zeros(3), "index": index}) == [4, 2, 4]
    assert row_numbers([torch.tensor([[1.0, 2.0], [3.0, 4.0]]), 7]) == [3.0, 7.0]
    assert row_numbers("text") == []


def test_environment_of_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """That of torchrun for several, and nothing of the job in which the check runs."""
    for name in ("SLURM_PROCID", "SLURM_JOB_ID", "RANK", "WORLD_SIZE", "TRUNKLINE_RUN", "OMPI_COMM_WORLD_RANK"):
        monkeypatch.setenv(name, "5")
    monkeypatch.setenv("HF_HOME", "/hub")
    alone = environment(1, 0, 1234)
    assert alone["HF_HOME"] == "/hub"
    assert not {name for name in alone if name.startswith(("SLURM_", "OMPI_")) or "RANK" in name or "WORLD" in name}
    assert "TRUNKLINE_RUN" not in alone
    second = environment(2, 1, 1234)
    assert (second["RANK"], second["LOCAL_RANK"], second["WORLD_SIZE"]) == ("1", "1", "2")
    assert (second["MASTER_ADDR"], second["MASTER_PORT"]) == ("127.0.0.1", "1234")


@pytest.mark.parametrize(
    ("strategy", "expected"), [("ddp", True), ("ddp_find_unused_parameters_true", True), ("ddp_spawn", False)]
)
def test_strategies_that_start_processes_themselves(strategy: str, expected: bool) -> None:
    assert portable(strategy) is expected


EACH_EPOCH = {"val_check_interval": 1.0, "check_val_every_n_epoch": 1}


@pytest.mark.parametrize(
    ("trainer", "expected"),
    [
        ({}, {"limit_train_batches": 4}),
        ({"val_check_interval": 0.1}, {"limit_train_batches": 4, **EACH_EPOCH}),
        ({"limit_train_batches": 1.0}, {"limit_train_batches": 4}),
        ({"accumulate_grad_batches": 3, "limit_train_batches": None}, {"limit_train_batches": 12}),
        ({"limit_train_batches": 3}, {"limit_train_batches": 3}),
        ({"limit_train_batches": 30}, {"limit_train_batches": 4}),
        ({"val_check_interval": 190, "check_val_every_n_epoch": None}, {"limit_train_batches": 4, **EACH_EPOCH}),
        ({"check_val_every_n_epoch": 2}, {"limit_train_batches": 4}),
    ],
)
def test_the_options_of_short_epochs(trainer: dict[str, Any], expected: dict[str, Any]) -> None:
    assert short_epochs(trainer, 4) == expected


def test_the_error_of_a_trial(tmp_path: Path) -> None:
    """A message of ours before the traceback of a process that lost its peer; else how the process ended."""
    (tmp_path / "log1.txt").write_text("Traceback\n")
    torch.save({"message": "lost", "field": None, "own": False}, tmp_path / "error0.pt")
    torch.save({"message": "bad size", "field": "data.batch_size", "own": True}, tmp_path / "error1.pt")
    error = failure(tmp_path, [1, 2])
    assert (str(error), error.field, error.log) == ("bad size", "data.batch_size", "")
    (tmp_path / "error1.pt").unlink()
    (tmp_path / "error0.pt").unlink()
    error = failure(tmp_path, [0, -9])
    assert str(error) == "process 1 was killed by signal 9"
    assert error.log == "Traceback\n"
    assert str(failure(tmp_path, [7, 0])) == "process 0 ended with code 7"


def sleep_long(started: str) -> None:
    os.setsid()
    Path(started).touch()
    time.sleep(100)


def fail_at_once() -> None:
    os._exit(3)


def test_a_process_that_hangs_ends_with_the_one_that_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trunkline.pipelines.checks.trials.LAST_SECONDS", 0.1)
    context: Any = Workbench([], None, tmp_path).context
    started = tmp_path / "started"
    jobs = [context.Process(target=sleep_long, args=(str(started),)), context.Process(target=fail_at_once)]
    jobs[0].start()
    while not started.exists():
        time.sleep(0.01)
    jobs[1].start()
    wait_for_jobs(jobs)
    assert [job.exitcode for job in jobs] == [None, 3]
    kill(jobs)
    assert [job.exitcode for job in jobs] == [-9, 3]
