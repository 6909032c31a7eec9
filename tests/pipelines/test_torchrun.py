"""The real torchrun, whose runs have no name of their own, unlike those of `tests/slurm/`."""

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
KILLED = """
import os, signal
from lightning.pytorch.callbacks import Callback


class Killed(Callback):
    def on_train_batch_end(self, trainer, *_):
        first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
        if first and trainer.global_step == 2 and trainer.global_rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
"""


def torchrun(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """Two processes, the second of which is killed once, before anything is saved."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("TRUNKLINE_", "SLURM_"))}
    environ |= {"PYTHONPATH": f"{ROOT}{os.pathsep}{folder}", "OMP_NUM_THREADS": "1", "COLUMNS": "40"}
    command = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=1", f"--master-port={port}"]
    return subprocess.Popen(
        [sys.executable, *command, str(Path(sys.executable).with_name("trunkline")), *arguments],
        cwd=folder, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


@pytest.mark.slow
def test_two_runs_at_one_time_that_are_restarted(tmp_path: Path) -> None:
    """Each goes on in its own folder, although the same command runs twice and nothing was saved before the kill."""
    (tmp_path / "killed.py").write_text(KILLED)
    trainer = {
        "max_steps": 4,
        "max_epochs": -1,
        "limit_val_batches": 0,
        "num_sanity_val_steps": 0,
        "callbacks+": [{"class_path": "killed.Killed"}],
    }
    (tmp_path / "killed.yaml").write_text(yaml.safe_dump({"trainer": trainer, "test_with": "none"}))
    arguments = [
        "fit",
        "--config",
        "vit/digits",
        "--config",
        "trainer/ddp_cpu",
        "--config",
        "killed.yaml",
        "--resume",
        "auto",
    ]
    launches = [torchrun(tmp_path, *arguments) for _ in range(2)]
    try:
        printed = [launch.communicate(timeout=300)[0] for launch in launches]
    finally:
        for launch in launches:
            if launch.poll() is None:
                os.killpg(launch.pid, signal.SIGKILL)
    assert [launch.returncode for launch in launches] == [0, 0], "\n=====\n".join(printed)
    runs = sorted((tmp_path / "runs/vit/digits").iterdir())
    assert len(runs) == 2
    named = []
    for text in printed:
        started = re.findall(r"run +(runs/\S+)$", text, re.MULTILINE)
        assert len(started) == 2, text  # once for each attempt
        assert started[0] == started[1]
        named.append(tmp_path / started[0])
    assert sorted(named) == runs
    for run in runs:
        assert (run / "checkpoints/last.ckpt").exists()
        assert {file.name for file in run.glob("record*.json")} == {"record.json", "record_2.json"}
