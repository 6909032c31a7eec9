"""Kills, full disks and flipped bits: no checkpoint is torn, and none that is damaged is loaded."""

import os
import random
import resource
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from full_disk import mount_small, umount
from recorded_run import CONTEXT
from tiny import batches, classifier, fit

from trunkline import TrunklineError
from trunkline.files import load_checkpoint
from trunkline.modules.training.background_saves import BackgroundCheckpointIO
from trunkline.modules.training.checkpoints import SafeCheckpointIO
from trunkline.run_folders import newest_valid
from trunkline.seal import proves_itself

MEMORY = Path("/dev/shm")
"""A file system in memory, on which no temporary folder lies."""


def content(number: int) -> dict[str, Any]:
    """A checkpoint of about a megabyte that shows if two were mixed."""
    needed = {"state_dict": {}, "epoch": 0, "global_step": number, "pytorch-lightning_version": "2.6", "loops": {}}
    return {**needed, "number": number, "weights": torch.full((256 * 1024,), float(number))}


def save_as(kind: type[SafeCheckpointIO], path: Path, number: int) -> Path:
    writer = kind()
    writer.save_checkpoint(content(number), path)
    writer.teardown()
    return path


def whole_number(path: Path) -> int:
    assert proves_itself(path)
    loaded = load_checkpoint(path)
    assert torch.equal(loaded["weights"], content(loaded["number"])["weights"])
    return loaded["number"]


def names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


@pytest.fixture(params=["temporary folder", "another file system"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    if request.param == "temporary folder":
        yield tmp_path
        return
    if not os.access(MEMORY, os.W_OK) or MEMORY.stat().st_dev == Path(tempfile.gettempdir()).stat().st_dev:
        pytest.skip("there is no second file system")
    path = Path(tempfile.mkdtemp(dir=MEMORY))
    yield path
    shutil.rmtree(path)


# --- kills


def save_until_killed(kind: type[SafeCheckpointIO], path: Path, numbers: list[int], size: int) -> None:
    """Save these; the kernel kills the process when the last one's file grows beyond `size`."""
    for number in numbers[:-1]:
        save_as(kind, path, number)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it
    save_as(kind, path, numbers[-1])


def kill_while_saving(kind: type[SafeCheckpointIO], folder: Path, kills: int) -> None:
    """Kill saves at any byte of the file that is being written; after each kill the file before is whole."""
    chance, path, last = random.Random(0), folder / "last.ckpt", 0
    size = save_as(kind, path, 0).stat().st_size
    for _ in range(kills):
        numbers = list(range(last + 1, last + 2 + chance.randrange(3)))
        process = CONTEXT.Process(target=save_until_killed, args=(kind, path, numbers, chance.randrange(1, size)))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGXFSZ
        last = numbers[-1] - 1
        assert whole_number(path) == last
        assert len(names(folder) - {"last.ckpt"}) == 1  # what the kill left
    save_as(kind, folder / "other.ckpt", 1)
    assert names(folder) == {"last.ckpt", "other.ckpt"}


@pytest.mark.parametrize("kind", [SafeCheckpointIO, BackgroundCheckpointIO])
def test_kill_while_saving(kind: type[SafeCheckpointIO], folder: Path) -> None:
    kill_while_saving(kind, folder, 4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [SafeCheckpointIO, BackgroundCheckpointIO])
def test_50_kills_while_saving(kind: type[SafeCheckpointIO], folder: Path) -> None:
    kill_while_saving(kind, folder, 50)


# --- full disks


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for one checkpoint."""
    disk = tmp_path / "disk"
    mount_small(disk, "1536k")
    yield disk
    umount(disk)


@pytest.mark.parametrize("kind", [SafeCheckpointIO, BackgroundCheckpointIO])
def test_full_disk(kind: type[SafeCheckpointIO], small_disk: Path) -> None:
    path = save_as(kind, small_disk / "a.ckpt", 1)
    for _ in range(2):
        with pytest.raises(
            TrunklineError,
            match=rf"cannot write .*{path} \(needs 1\.0 MB, \d\.\d MB free there\): No space left on device; free some",
        ) as caught:
            save_as(kind, path, 2)
        assert caught.value.field == "run_dir"
        assert whole_number(path) == 1
        assert names(small_disk) == {"a.ckpt"}


def save_with_limits(kind: type[SafeCheckpointIO], path: Path, sizes: list[int], answers: Any) -> None:
    """Save once for each size beyond which no file may grow; the number to save is that of the attempt."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    said = []
    for number, size in enumerate(sizes, 2):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            save_as(kind, path, number)
        except TrunklineError as error:
            said.append((str(error), error.field))
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    answers.put(said)


@pytest.mark.parametrize("kind", [SafeCheckpointIO, BackgroundCheckpointIO])
def test_a_disk_that_refuses_any_byte(kind: type[SafeCheckpointIO], folder: Path) -> None:
    """One message each time, the older file whole, and nothing left behind; also where no disk may be mounted."""
    chance, path = random.Random(1), folder / "a.ckpt"
    size = save_as(kind, path, 1).stat().st_size
    sizes = [0, *(chance.randrange(1, size) for _ in range(10)), size - 64, size - 1]
    answers = CONTEXT.Queue()
    process = CONTEXT.Process(target=save_with_limits, args=(kind, path, sizes, answers))
    process.start()
    said = answers.get(timeout=60)
    process.join()
    assert len(said) == len(sizes)
    for text, field in said:
        assert f"cannot write {path} (" in text
        assert text.endswith("): File too large; choose another run_dir, then resume the run")
        assert field == "run_dir"
    assert whole_number(path) == 1
    assert names(folder) == {"a.ckpt"}


# --- flipped bits


def flip_bits(folder: Path, flips: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flip single bits anywhere in a run's checkpoint: each is refused before it is loaded, and no resume takes it."""
    path = folder / "a.ckpt"
    fitted = fit(classifier(), folder, batches(2), plugins=[SafeCheckpointIO()])
    fitted.save_checkpoint(path, weights_only=False)
    whole, chance = path.read_bytes(), random.Random(2)
    refused, load = 0, torch.load
    for bit in [chance.randrange(8 * len(whole)) for _ in range(flips)]:
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("it was loaded"))
        for read in (load_checkpoint, fitted.strategy.checkpoint_io.load_checkpoint):
            with pytest.raises(TrunklineError, match="is damaged: it is not as it was saved"):
                read(path)
        monkeypatch.setattr(torch, "load", load)
        found, faults = newest_valid(folder)
        assert found is None
        assert len(faults) == 1
        refused += 1
    assert refused == flips
    path.write_bytes(whole)
    assert newest_valid(folder) == (path, [])


def test_flipped_bits_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flip_bits(tmp_path, 30, monkeypatch)


@pytest.mark.slow
def test_1000_flipped_bits_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flip_bits(tmp_path, 1000, monkeypatch)
