"""A job of `configs/slurm/train.sbatch` on the cluster of `local_slurm`."""

from collections.abc import Callable
from pathlib import Path

from cluster_runs import environment
from local_slurm import Slurm, wait_for

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "configs/slurm/train.sbatch"
PATIENCE = 200.0
"""Seconds for what takes SLURM and a starting Python about half a minute."""
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")


class Job:
    """A job of the script, on two nodes.

    Args:
        cluster: that runs it.
        folder: of the run; it is recorded there.
        *flags: the recipe and flags of `fit`.
        environ: variables of the job.
    """

    def __init__(self, cluster: Slurm, folder: Path, *flags: str, environ: dict[str, str] | None = None) -> None:
        self.cluster, self.folder = cluster, folder
        cluster.environ |= {**environment(), **(environ or {})}
        options = ("--parsable", "--nodes=2", "--ntasks-per-node=1", "--time=60")
        self.number = int(cluster.command("sbatch", *options, str(SCRIPT), *flags, cwd=folder))

    def output(self) -> str:
        """What it has printed so far, in all attempts."""
        file = self.folder / f"trunkline-{self.number}.out"
        return file.read_text() if file.exists() else ""

    def report(self) -> str:
        """All that may explain a failure: its output, its state, that of the nodes, and the daemons' last lines."""
        state = self.cluster.command("scontrol", "show", "job", str(self.number), check=False)
        return "\n".join([self.output(), state, str(self.cluster.states()), self.cluster.logs()])

    def wait_for(self, condition: Callable[[], bool], what: str, seconds: float | None = None) -> None:
        """Look again and again until the condition holds, for `PATIENCE` if no time is given.

        Raises:
            TimeoutError: with the report, if it does not.
        """
        wait_for(condition, PATIENCE if seconds is None else seconds, what, self.report)

    def wait_for_output(self, text: str, count: int = 1) -> None:
        self.wait_for(lambda: self.output().count(text) >= count, f"'{text}'")

    def update(self, setting: str) -> None:
        self.cluster.command("scontrol", "update", f"JobId={self.number}", setting)

    def wait(self, state: str, *restarts: int) -> str:
        """Wait for its end in this state after one of these numbers of restarts, and return what it has printed."""
        self.wait_for(lambda: self.cluster.job(self.number)["JobState"] in ENDED, "the job's end")
        found = self.cluster.job(self.number)
        assert (found["JobState"], int(found["Restarts"]) in restarts) == (state, True), self.report()
        return self.output()
