"""A job of `configs/slurm/train.sbatch` on a real SLURM ends finished and bit-exact, whatever happens to it.

Run by `make test-cluster`. The run itself says when: it halts at a step, and something then happens to it.
"""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster_runs import EVERY, WAIT, assert_equals, first_steps, uninterrupted, write_extra
from local_slurm import Slurm, local_slurm, missing
from recorded_run import GONE_WITHIN, go_on, halt_at, halted_file
from slurm_job import Job

from trunkline.pipelines.errors import TRY_AGAIN

HALT = 10
"""The step at which something happens to a job."""
ONCE = (1, 2)
"""How often a job is started again after one fault, which may be two faults for SLURM: when srun ends its tasks, the
controller signals step 0 of the job again and again until a node answers, and step 0 may then be that of the next
attempt. Here an attempt follows in seconds, elsewhere after the two minutes in which a credential is valid."""

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.slow,
    pytest.mark.timeout(1200),
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    if reason := missing():
        pytest.skip(reason)
    with local_slurm(tmp_path_factory.mktemp("slurm")) as running:
        yield running


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return uninterrupted(tmp_path_factory.mktemp("reference"))


@pytest.fixture
def halted(cluster: Slurm, tmp_path: Path, request: pytest.FixtureRequest) -> Job:
    """A job whose run has halted at the end of step `HALT` of its first attempt, until `go_on`.

    The parameter is how many faults it may have, those of `ONCE` without one.
    """
    halt_at(tmp_path, "batch end", HALT, [0, 1])
    environ = {"MAX_RESTARTS": str(getattr(request, "param", max(ONCE)))}
    job = Job(cluster, tmp_path, "vit/digits", "--config", str(write_extra(tmp_path)), environ=environ)
    files = [halted_file(tmp_path, rank) for rank in (0, 1)]
    job.wait_for(lambda: all(file.exists() for file in files), "halted tasks")
    return job


def test_a_killed_task(halted: Job, reference: Path) -> None:
    first = halted.cluster.of_tasks()
    assert halted.cluster.task(0) in first
    os.kill(halted.cluster.task(1), signal.SIGKILL)
    go_on(halted.folder)
    halted.wait_for(lambda: not first & halted.cluster.of_tasks(), "the end of the other task", GONE_WITHIN)
    assert "it is started again from its last checkpoint" in halted.wait("COMPLETED", *ONCE)
    assert first_steps(halted.folder)[:2] == [0, HALT - HALT % EVERY]
    assert_equals(halted.folder, reference)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_stopped_task(rank: int, halted: Job, reference: Path) -> None:
    """The other one waits for it as long as the strategy says, then SLURM ends both."""
    first = halted.cluster.of_tasks()
    os.kill(halted.cluster.task(rank), signal.SIGSTOP)
    go_on(halted.folder)
    halted.wait_for(lambda: not first & halted.cluster.of_tasks(), "the end of both tasks", WAIT + GONE_WITHIN)
    output = halted.wait("COMPLETED", *ONCE)
    assert "error: another process of this run has ended or does not answer" in output
    assert f"the run ended with code {TRY_AGAIN}; it is started again" in output
    assert first_steps(halted.folder)[:2] == [0, HALT - HALT % EVERY]
    assert_equals(halted.folder, reference)


@pytest.mark.parametrize("node", ["n1", "n2"])
def test_a_lost_node(node: str, halted: Job, reference: Path) -> None:
    """n1 runs the script too, and the process that saves."""
    cluster = halted.cluster
    cluster.lose_node(node)
    go_on(halted.folder)
    halted.wait_for(lambda: cluster.states()[node].startswith("down"), "a node that is down")
    cluster.start_node(node)
    halted.wait("COMPLETED", *ONCE)
    assert first_steps(halted.folder)[:2] == [0, HALT - HALT % EVERY]
    assert_equals(halted.folder, reference)


@pytest.mark.parametrize("halted", [0], indirect=True)
def test_a_time_limit(halted: Job, reference: Path) -> None:
    """The limit comes nearer than the script's five minutes: SLURM says so, and the run saves the step it is at."""
    halted.update("TimeLimit=3")
    halted.wait_for_output("SIGUSR1: saving after this step", count=2)
    halted.update("TimeLimit=60")  # also of the next attempt
    go_on(halted.folder)
    assert "requeued job" in halted.wait("COMPLETED", 1)
    first, second = first_steps(halted.folder)
    assert (first, HALT <= second <= HALT + 2) == (0, True)
    assert_equals(halted.folder, reference)


@pytest.mark.parametrize("halted", [0], indirect=True)
def test_a_preemption(halted: Job, reference: Path) -> None:
    """Another job takes the nodes; this one saves in the time that it is given, and goes on afterwards."""
    halted.cluster.command("sbatch", "--partition=high", "--nodes=2", "--output=/dev/null", "--wrap", "true")
    halted.wait_for_output("SIGTERM: saving after this step", count=2)
    go_on(halted.folder)
    halted.wait("COMPLETED", 1)
    first, second = first_steps(halted.folder)
    assert (first, HALT <= second <= HALT + 2) == (0, True)
    assert_equals(halted.folder, reference)


def test_a_job_that_is_cancelled_stays_so(halted: Job) -> None:
    halted.cluster.command("scancel", str(halted.number))
    go_on(halted.folder)
    assert "started again" not in halted.wait("CANCELLED", 0)
    halted.wait_for(lambda: set(halted.cluster.states().values()) == {"idle"}, "free nodes")
    assert halted.cluster.job(halted.number)["JobState"] == "CANCELLED"


def test_bad_input_is_not_tried_again(cluster: Slurm, tmp_path: Path) -> None:
    output = Job(cluster, tmp_path, "vit/dogits").wait("FAILED", 0)
    assert "there is no config 'vit/dogits'; did you mean 'vit/digits'?" in " ".join(output.split())
    assert "trunkline refused its input" in output
    assert not list(tmp_path.glob(".trunkline*"))


def test_a_fault_that_comes_back(cluster: Slurm, tmp_path: Path) -> None:
    job = Job(cluster, tmp_path, "vit/digits", environ={"TRUNKLINE": "false", "MAX_RESTARTS": "1"})
    output = job.wait("FAILED", 1)
    assert [f"attempt {number}," in output for number in (1, 2, 3)] == [True, True, False]
    assert "ended with code 1, and MAX_RESTARTS=1 allows no other attempt" in output
