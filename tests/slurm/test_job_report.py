"""What a failed test on the real SLURM says, tried without one."""

from pathlib import Path

import pytest
import slurm_job
from local_slurm import Slurm
from slurm_job import Job


class Stuck(Slurm):
    """A cluster whose jobs stay in one state."""

    state = "PENDING"

    def command(self, *arguments: str, cwd: Path | None = None, check: bool = True) -> str:
        """What a command of SLURM prints."""
        answers = {"sbatch": "7", "sinfo": "n1 idle\nn2 down", "scontrol": f"JobId=7 JobState={self.state} Restarts=0"}
        return answers[arguments[0]]


@pytest.mark.parametrize(("state", "error"), [("PENDING", TimeoutError), ("FAILED", AssertionError)])
def test_a_failure_explains_itself(
    state: str, error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job that does not end, and one that ends otherwise: its output, its state, the nodes, the daemons' logs."""
    monkeypatch.setattr(slurm_job, "PATIENCE", 0.0)
    cluster = Stuck(tmp_path)
    cluster.state = state
    job = Job(cluster, tmp_path, "vit/digits")
    (tmp_path / "trunkline-7.out").write_text("train.sbatch: attempt 1")
    (tmp_path / "slurmctld.log").write_text("a credential has expired")
    (tmp_path / "n2.out").write_text("slurmd: no address")
    with pytest.raises(error) as caught:
        job.wait("COMPLETED", 0)
    for part in ("attempt 1", f"JobState={state}", "'n2': 'down'", "a credential has expired", "slurmd: no address"):
        assert part in str(caught.value)
