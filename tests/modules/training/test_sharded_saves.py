"""Two processes write the parts of a checkpoint in the background: kills, full disks, and training meanwhile."""

import os
import random
import resource
import signal
import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from recorded_run import CONTEXT
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from trunkline import TrunklineError
from trunkline.files import load_checkpoint
from trunkline.modules.training.background_saves import BackgroundCheckpointIO, snapshot
from trunkline.modules.training.sharded_checkpoints import Writers, previous_of, split, write_parts
from trunkline.run_folders import newest_valid

ROWS, PROCESSES = 20_001, 2
ENDED, OTHER_ENDED = 3, 4
"""Exit codes: of a process that could not write, and of one whose partner was killed."""


class Group:
    """One of the processes, with what it saves; `weight` changes in place, as in training."""

    def __init__(self, rank: int, folder: Path) -> None:
        dist.init_process_group(
            "gloo", store=dist.FileStore(str(folder / "store"), PROCESSES), rank=rank, world_size=PROCESSES
        )
        mesh = init_device_mesh("cpu", (PROCESSES,))
        self.rank, self.path = rank, folder / "checkpoints/last.ckpt"
        self.local = torch.zeros(-(-ROWS // 2) - rank, 4)
        self.weight = DTensor.from_local(self.local, mesh, [Shard(0)], run_check=False, shape=(ROWS, 4), stride=(4, 1))
        self.scale = torch.zeros(30_000)
        self.writers, self.io = Writers(timedelta(seconds=60)), BackgroundCheckpointIO()

    def start(self, step: int) -> None:
        """As `ShardedStrategy` saves."""
        self.local.fill_(step)
        self.scale.fill_(step)
        content = {"epoch": 0, "global_step": step, "pytorch-lightning_version": "2.6", "loops": {}}
        content |= {"callbacks": {}, "optimizer_states": [], "lr_schedulers": []}
        content["state_dict"] = {"weight": self.weight, "scale": self.scale}
        self.io.wait()
        shared, held = split(content, self.rank, PROCESSES)
        self.io.start(write_parts, snapshot(shared), held, self.path, self.writers)


def run(folder: Path, work: Any, *arguments: Any) -> list[int | None]:
    """Exit codes of `work(rank, folder, *arguments)` in two processes."""
    (folder / "store").unlink(missing_ok=True)
    started = [CONTEXT.Process(target=work, args=(rank, folder, *arguments)) for rank in range(PROCESSES)]
    try:
        for process in started:
            process.start()
        for process in started:
            process.join(100)
        return [process.exitcode for process in started]
    finally:
        for process in started:
            process.kill()


def assert_holds(path: Path, step: int) -> None:
    found = load_checkpoint(path)
    assert found["global_step"] == step
    assert torch.equal(found["state_dict"]["weight"], torch.full((ROWS, 4), float(step)))
    assert torch.equal(found["state_dict"]["scale"], torch.full((30_000,), float(step)))


def names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


# --- training goes on


def save_while_training(rank: int, folder: Path) -> None:
    """The writers wait for a gate, while this process changes its weights and reduces gradients in the main group."""
    group, gate, save = Group(rank, folder), threading.Event(), torch.save

    def gated(content: Any, path: Path) -> None:
        assert gate.wait(60)
        save(content, path)

    torch.save = gated  # type: ignore[assignment]
    group.start(1)
    for step in range(2, 12):
        group.local.fill_(step)
        group.scale.fill_(step)
        total = torch.ones(1)
        dist.all_reduce(total)
        assert total == PROCESSES
        assert not group.io.check()
        assert not group.path.exists()
    gate.set()
    group.io.wait()
    assert_holds(group.path, 1)
    group.io.start(write_parts, *split({"global_step": 2, "weight": group.weight}, rank, 2), group.path, group.writers)
    group.io.wait()
    assert load_checkpoint(group.path)["weight"].unique().tolist() == [11]


def test_training_goes_on_during_a_save(tmp_path: Path) -> None:
    """The folder holds what was true when it was asked for, and is there for every process that has waited."""
    assert run(tmp_path, save_while_training) == [0, 0]
    assert names(tmp_path / "checkpoints") == {"last.ckpt"}


# --- kills and full disks


def save_until_limit(rank: int, folder: Path, step: int, victim: int, size: int, deadly: bool) -> None:
    """Save two steps; in the second one, no file of the victim may grow beyond `size`."""
    group = Group(rank, folder)
    group.start(step)
    group.io.wait()
    dist.barrier()
    if rank == victim:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL if deadly else signal.SIG_IGN)
    group.start(step + 1)
    try:
        group.io.wait()
    except TrunklineError as error:
        own = f"cannot write {group.path} (" if rank == victim else "another process cannot write its part of"
        os._exit(ENDED if own in str(error) and error.field == "run_dir" else 1)
    except RuntimeError:
        os._exit(OTHER_ENDED)
    os._exit(0)


def kill_while_saving(folder: Path, kills: int) -> None:
    """Kill one of the processes at any byte of its part: the checkpoint before is whole, and found."""
    chance, path = random.Random(0), folder / "checkpoints/last.ckpt"
    for kill in range(kills):
        victim, step = kill % 2, 10 * (kill + 1)
        codes = run(folder, save_until_limit, step, victim, chance.randrange(1, 150_000), True)
        assert (codes[victim], codes[1 - victim]) == (-signal.SIGXFSZ, OTHER_ENDED)
        assert newest_valid(path.parent) == (path, [])
        assert_holds(path, step)
        assert not previous_of(path).exists()
        assert len(names(path.parent)) == 2  # what the kill left; the next save removes it


def test_kill_while_saving(tmp_path: Path) -> None:
    kill_while_saving(tmp_path, 2)


@pytest.mark.slow
def test_100_kills_while_saving(tmp_path: Path) -> None:
    kill_while_saving(tmp_path, 100)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_disk_that_is_full_for_one_process(victim: int, tmp_path: Path) -> None:
    """Both processes raise, the victim says why; the checkpoint before is whole, and nothing is left behind."""
    assert run(tmp_path, save_until_limit, 1, victim, 50_000, False) == [ENDED, ENDED]
    assert_holds(tmp_path / "checkpoints/last.ckpt", 1)
    assert names(tmp_path / "checkpoints") == {"last.ckpt"}
