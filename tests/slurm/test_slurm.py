"""A job of `configs/slurm/train.sbatch` on a real SLURM ends finished and bit-exact, whatever happens to it.

Run by `make test-cluster`. The run itself says when: it halts at a step, and something then happens to it.
"""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster_runs import EVERY, assert_equals, environment, first_steps, uninterrupted, write_extra
from local_slurm import Slurm, local_slurm, missing, wait_for
from recorded_run import go_on, halt_at, halted_file

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "configs/slurm/train.sbatch"
PATIENCE = 200.0
"""Seconds for what takes SLURM and a starting Python about half a minute."""

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(missing() is not None, reason=f"no SLURM here: {missing()}"),
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    with local_slurm(tmp_path_factory.mktemp("slurm")) as running:
        yield running


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return uninterrupted(tmp_path_factory.mktemp("reference"))


class Job:
    """A job of the script that halts at a step of its run until `go_on`."""

    def __init__(self, cluster: Slurm, folder: Path, step: int, *options: str) -> None:
        self.cluster, self.folder = cluster, folder
        halt_at(folder, "batch end", step, [0, 1])
        cluster.environ |= environment()
        flags = ["vit/digits", "--config", str(write_extra(folder))]
        done = cluster.command(
            *("sbatch", "--parsable", "--nodes=2", "--ntasks-per-node=1", *options, str(SCRIPT), *flags), cwd=folder
        )
        self.number = int(done)
        wait_for(
            lambda: all(halted_file(folder, rank).exists() for rank in (0, 1)), PATIENCE, "halted tasks", self.output
        )

    def output(self) -> str:
        (file,) = self.folder.glob(f"trunkline-{self.number}.out")
        return file.read_text()

    def state(self) -> dict[str, str]:
        return self.cluster.job(self.number)

    def wait(self, restarts: int) -> str:
        """Wait for its end, and return what it has printed."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
        wait_for(lambda: self.state()["JobState"] in ended, PATIENCE, "the job's end", self.output)
        state = self.state()
        assert (state["JobState"], state["Restarts"]) == ("COMPLETED", str(restarts)), self.output()
        return self.output()


def test_a_killed_task(cluster: Slurm, reference: Path, tmp_path: Path) -> None:
    job = Job(cluster, tmp_path, step=10)
    os.kill(cluster.task(1), signal.SIGKILL)
    go_on(tmp_path)
    output = job.wait(restarts=1)
    assert "it is started again from its last checkpoint" in output
    assert first_steps(tmp_path) == [0, 10 - 10 % EVERY]
    assert_equals(tmp_path, reference)


def test_a_lost_node(cluster: Slurm, reference: Path, tmp_path: Path) -> None:
    job = Job(cluster, tmp_path, step=10)
    cluster.lose_node("n2")
    go_on(tmp_path)
    wait_for(lambda: cluster.states()["n2"].startswith("down"), 60, "a node that is down")
    cluster.start_node("n2")
    job.wait(restarts=1)
    assert first_steps(tmp_path) == [0, 10 - 10 % EVERY]
    assert_equals(tmp_path, reference)
