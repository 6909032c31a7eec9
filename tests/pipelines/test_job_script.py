"""`configs/slurm/train.sbatch` with programs in the place of SLURM's; `make test-cluster` runs it on a real one."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from trunkline.pipelines.errors import TRY_AGAIN

SCRIPT = Path(__file__).parents[2] / "configs/slurm/train.sbatch"

pytestmark = pytest.mark.skipif(not Path("/bin/bash").exists(), reason="no bash")


class Attempt:
    """Runs the script once.

    Args:
        folder: of the programs that stand for SLURM's; each notes how it was called.
        srun: what srun does.
        *arguments: of the script.
        **environ: more variables of the job.
    """

    def __init__(self, folder: Path, srun: str, *arguments: str, **environ: str) -> None:
        self.notes = folder / "notes"
        programs = {"srun": srun, "scontrol": 'if [ "$1" = show ]; then echo node1; echo node2; fi'}
        for name, body in programs.items():
            note = f'printf "%s|" {name} "$@" >> {self.notes}; echo "$MASTER_ADDR" >> {self.notes}\n'
            (folder / name).write_text(f"#!/bin/bash\n{note}{body}\n")
            (folder / name).chmod(0o755)
        job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[1-2]", "PATH": f"{folder}:{os.environ['PATH']}"}
        inherited = ("MASTER_ADDR", "TRUNKLINE", "MAX_RESTARTS", "SLURM_RESTART_COUNT", "SLURM_CPUS_PER_TASK")
        environ = {**{k: v for k, v in os.environ.items() if k not in inherited}, **job, **environ}
        command = ["/bin/bash", str(SCRIPT), *arguments]
        done = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, check=False)
        self.code, self.said = done.returncode, done.stdout + done.stderr

    def calls(self, program: str) -> list[list[str]]:
        """The arguments of each call of a program; the last is the address of the first process."""
        words = [line.split("|") for line in self.notes.read_text().splitlines()] if self.notes.exists() else []
        return [line[1:] for line in words if line[0] == program]

    @property
    def requeued(self) -> bool:
        return ["requeue", "7"] in [call[:-1] for call in self.calls("scontrol")]


def test_what_srun_starts(tmp_path: Path) -> None:
    """The recipe and all flags as they are, and the machine file before them, so that they override it."""
    attempt = Attempt(tmp_path, "exit 0", "vit/digits", "--trainer.max_epochs", "3", "--data.source", "a b*")
    (call,) = attempt.calls("srun")
    head = ["--kill-on-bad-exit=1", "trunkline", "fit", "--config", "vit/digits", "--config", "trainer/slurm"]
    assert call == [*head, "--resume", "auto", "--trainer.max_epochs", "3", "--data.source", "a b*", "node1"]
    assert (attempt.code, attempt.requeued) == (0, False)
    assert "attempt 1, on node[1-2]" in attempt.said


def test_settings_of_the_job(tmp_path: Path) -> None:
    given = {"TRUNKLINE": "/venv/trunkline", "MASTER_ADDR": "10.0.0.1", "SLURM_CPUS_PER_TASK": "12"}
    attempt = Attempt(tmp_path, 'echo "cores $SRUN_CPUS_PER_TASK"', "mine.yaml", **given)
    (call,) = attempt.calls("srun")
    assert (call[1], call[-1]) == ("/venv/trunkline", "10.0.0.1")
    assert "cores 12" in attempt.said


@pytest.mark.parametrize(
    ("srun", "environ", "code", "requeued", "said"),
    [
        ("exit 137", {}, 137, True, "started again from its last checkpoint"),
        ("exit 143", {"SLURM_RESTART_COUNT": "4"}, 143, True, "attempt 5"),
        ("exit 2", {}, 2, False, "refused its input"),  # also that of srun if there is no such program
        ('touch "$TRUNKLINE_REFUSED"; exit 143', {}, 2, False, "refused its input"),
        (f"exit {TRY_AGAIN}", {}, TRY_AGAIN, True, "started again"),
        ("exit 1", {"MAX_RESTARTS": "0"}, 1, False, "code 1, and MAX_RESTARTS=0 allows"),
        ("kill -TERM $PPID; exit 143", {}, 143, False, "attempt 1"),  # cancelled or preempted
    ],
)
def test_how_an_attempt_ends(
    srun: str, environ: dict[str, str], code: int, requeued: bool, said: str, tmp_path: Path
) -> None:
    attempt = Attempt(tmp_path, srun, "vit/digits", **environ)
    assert (attempt.code, attempt.requeued) == (code, requeued)
    assert said in attempt.said
    left = [file.name for file in tmp_path.glob(".trunkline*")]
    goes_on = requeued or "$PPID" in srun
    assert left == [f".trunkline-7.fault.{environ.get('SLURM_RESTART_COUNT', 0)}"] * goes_on


FAILS, LOST = "exit 137", "kill -KILL $PPID"  # LOST: as a node ends the script too, and SLURM starts it again
SAVED = 'rm "$TRUNKLINE_FAULT"; exit 138'  # what a run does at a time limit and a preemption


@pytest.mark.parametrize(
    ("attempts", "requeued"),
    [
        ([FAILS, FAILS], True),
        ([FAILS, FAILS, FAILS], False),
        ([SAVED, SAVED, SAVED, SAVED, SAVED], True),
        ([FAILS, SAVED, LOST, SAVED], True),
        ([FAILS, SAVED, LOST, SAVED, FAILS], False),
        ([FAILS, LOST, "kill -TERM $PPID; exit 143", FAILS], None),
        ([LOST, LOST, LOST, "exit 0"], None),
    ],
)
def test_only_faults_use_up_the_restarts(attempts: list[str], requeued: bool | None, tmp_path: Path) -> None:
    """Of which the job may have two; None: another attempt is not even begun."""
    (tmp_path / ".trunkline-7.fault.8").touch()  # of an old job with the same number
    for number, srun in enumerate(attempts):
        (tmp_path / "notes").unlink(missing_ok=True)
        attempt = Attempt(tmp_path, srun, "vit/digits", MAX_RESTARTS="2", SLURM_RESTART_COUNT=str(number))
        last = number == len(attempts) - 1
        assert len(attempt.calls("srun")) == (not last or requeued is not None)
        if not last:
            assert attempt.requeued == (srun in (FAILS, SAVED))
    assert attempt.requeued == bool(requeued)
    assert ("MAX_RESTARTS=2 allows no other attempt" in attempt.said) == (not requeued)
    assert bool(list(tmp_path.glob(".trunkline*"))) == (bool(requeued) and FAILS in attempts)


def test_a_recipe_is_needed(tmp_path: Path) -> None:
    attempt = Attempt(tmp_path, "exit 0")
    assert (attempt.code, attempt.calls("srun")) == (2, [])
    assert "name a recipe after it" in attempt.said


def test_what_the_script_asks_of_slurm() -> None:
    """Options that exact resume stands on."""
    options = re.findall(r"^#SBATCH (\S+)$", SCRIPT.read_text(), re.M)
    assert {"--requeue", "--open-mode=append", "--signal=USR1@300", "--ntasks-per-node=1"} <= set(options)
