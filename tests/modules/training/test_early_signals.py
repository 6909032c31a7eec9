"""Signals before the first step: however early they come, and again in a resumed run, the run ends as one without."""

import signal
from pathlib import Path

import pytest
import yaml
from early_signal import PLAN, plan_signal
from recorded_run import Run
from resumed_run import arguments, assert_same_run, lines, run_to_the_end, write_config

CODES = {signal.SIGTERM: 143, signal.SIGUSR1: 138}
ATTEMPTS = [
    ("__init__", "all"),  # before anything of ours listens
    ("setup", "all"),
    ("on_sanity_check_start", "first"),
    ("on_train_start", "last"),
    ("on_train_batch_start", "last"),  # in the first step, which is saved
    ("setup", "first"),  # of the resumed run
    ("on_train_batch_start", "all"),
]
"""Where in each attempt the signal comes, and to which processes."""


def write(folder: Path) -> Path:
    """A recipe with a validation before its first step, in which a signal comes when it is planned."""
    config = write_config(folder, max_epochs=1, num_sanity_val_steps=1, logger=True)
    content = yaml.safe_load(config.read_text())
    callback = {"class_path": "early_signal.EarlySignal", "init_args": {"folder": str(folder)}}
    content["trainer"]["callbacks+"].insert(0, callback)
    config.write_text(yaml.safe_dump(content))
    return config


@pytest.fixture(scope="module")
def reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run without signals, on one or two processes."""
    return run_to_the_end(write(tmp_path_factory.mktemp("reference")), request.param)


def job_of_slurm(folder: Path) -> dict[str, str]:
    """Variables of a job, whose `scontrol` notes in `FOLDER/calls` what it was called with."""
    script = folder / "bin/scontrol"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\necho "$@" >> {folder}/calls\n')
    script.chmod(0o755)
    return {"SLURM_JOB_ID": "17", "PATH": f"{script.parent}:/usr/bin:/bin"}


@pytest.mark.parametrize(
    ("reference", "number"),
    [
        (2, signal.SIGUSR1),
        pytest.param(1, signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param(2, signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param(1, signal.SIGUSR1, marks=pytest.mark.slow),
    ],
    indirect=["reference"],
)
def test_signals_before_the_first_step(number: signal.Signals, reference: Path, tmp_path: Path) -> None:
    """SIGUSR1 comes in a job of SLURM, which the first process puts back into the queue."""
    processes, config, requeued = len(list(reference.glob("rank*.jsonl"))), write(tmp_path), 0
    job = job_of_slurm(tmp_path) if number == signal.SIGUSR1 else {}
    for hook, who in ATTEMPTS:
        ranks = {"all": list(range(processes)), "first": [0], "last": [processes - 1]}[who]
        plan_signal(tmp_path, hook, number, ranks)
        run = Run(arguments(config, processes, resume=True), tmp_path, processes, **job)
        codes = run.wait()
        if hook == "on_train_batch_start":
            ranks = list(range(processes))  # all end alike; before it, the others see that one is gone
        code = -number if hook == "__init__" else CODES[number]
        assert {codes[rank] for rank in ranks} == {code}, run.output()
        assert not {None, 0} & set(codes), run.output()
        requeued += bool(job) and hook != "__init__" and 0 in ranks
    (tmp_path / PLAN).unlink()
    run = Run(arguments(config, processes, resume=True), tmp_path, processes, **job)
    assert run.wait() == [0] * processes, run.output()
    calls = (tmp_path / "calls").read_text().splitlines() if job else []
    assert calls == ["requeue 17"] * requeued
    *_, second, last = [line["started_at"] for line in lines(tmp_path) if "started_at" in line]
    assert 1 <= second <= 2  # a step, and one more until two processes agree
    assert second + 1 <= last <= second + 2
    assert_same_run(tmp_path, reference)
