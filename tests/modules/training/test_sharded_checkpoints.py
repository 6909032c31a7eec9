"""A checkpoint in parts is whole or refused, whatever happens while it is written, and needs no unpickling of code."""

import errno
import itertools
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from trunkline import TrunklineError
from trunkline.files import find_fault, load_checkpoint
from trunkline.modules.training import sharded_checkpoints
from trunkline.modules.training.checkpoints import SafeCheckpointIO
from trunkline.modules.training.sharded_checkpoints import own_span, save_parts
from trunkline.parts import META_FILE, Pieces, is_parts, rows_name
from trunkline.pipelines.runs import choose_run
from trunkline.run_folders import find_checkpoint, newest_valid, step_in
from trunkline.seal import MANIFEST, seal_folder


class Alone:
    """A single process; `agreed` is what the others are said to answer."""

    global_rank, world_size, agreed = 0, 1, True

    def gather(self, value: Any) -> list[Any]:
        return [value] if self.agreed or isinstance(value, str) else [value, (False, None)]


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    """Of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.fixture
def content(mesh: DeviceMesh) -> Callable[[int], dict[str, Any]]:
    """A checkpoint of a step, which shows if two were mixed."""

    def make(step: int) -> dict[str, Any]:
        weight = DTensor.from_local(torch.full((5, 2), float(step)), mesh, [Shard(0)])
        state = {0: {"step": torch.tensor(float(step)), "exp_avg": weight * 2}}
        needed = {"epoch": 0, "global_step": step, "pytorch-lightning_version": "2.6", "loops": {}}
        rest = {"callbacks": {}, "optimizer_states": [{"state": state}], "lr_schedulers": []}
        return {**needed, **rest, "state_dict": {"weight": weight, "scale": torch.tensor([1.5])}}

    return make


def assert_holds(path: Path, step: int) -> None:
    assert find_fault(path, unchecked=False) is None
    loaded = load_checkpoint(path)
    assert loaded["global_step"] == step_in(path) == step
    assert torch.equal(loaded["state_dict"]["weight"], torch.full((5, 2), float(step)))
    assert torch.equal(loaded["optimizer_states"][0]["state"][0]["exp_avg"], torch.full((5, 2), 2.0 * step))
    assert loaded["optimizer_states"][0]["state"][0]["step"] == step
    assert loaded["state_dict"]["scale"] == 1.5


def names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


def test_round_trip(content: Callable[[int], Any], tmp_path: Path) -> None:
    path = tmp_path / "run/checkpoints/last.ckpt"
    save_parts(content(1), path, Alone())
    (path.parent / ".last.ckpt.0123.tmp").mkdir()  # of a save that was killed
    save_parts(content(2), path, Alone())
    assert_holds(path, 2)
    assert names(path) == {META_FILE, rows_name(0), MANIFEST}
    assert names(path.parent) == {"last.ckpt"}
    assert find_checkpoint(path) == find_checkpoint(tmp_path) == path
    assert choose_run(tmp_path, "run", str(path)) == (path.parent.parent, path, [])


@pytest.mark.parametrize("before", ["folder", "file"])
def test_a_kill_at_any_moment_leaves_a_valid_checkpoint(
    before: str, content: Callable[[int], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped before each of the calls that write, rename or remove; then the run goes on and saves again."""
    path = tmp_path / "last.ckpt"

    class Killed(BaseException):
        pass

    def killed_before(count: int) -> int:
        """Save step 2; killed before the call of that number. Returns how many calls there were."""
        calls = 0

        def counted(call: Callable[..., Any]) -> Callable[..., Any]:
            def run(*arguments: Any, **options: Any) -> Any:
                nonlocal calls
                calls += 1
                if calls == count:
                    raise Killed
                return call(*arguments, **options)

            return run

        with monkeypatch.context() as patch:
            for place, name in ((torch, "save"), (os, "replace"), (os, "fsync"), (os, "unlink"), (os, "mkdir")):
                patch.setattr(place, name, counted(getattr(place, name)))
            patch.setattr(sharded_checkpoints, "seal_folder", counted(seal_folder))
            patch.setattr(shutil, "rmtree", counted(shutil.rmtree))
            try:
                save_parts(content(2), path, Alone())
            except Killed:
                assert calls == count
        return calls

    for count in itertools.count(1):
        for left in (path, sharded_checkpoints.previous_of(path)):
            sharded_checkpoints.remove(left)
        save_parts(content(1), path, Alone())
        if before == "file":
            whole = load_checkpoint(path)
            sharded_checkpoints.remove(path)
            SafeCheckpointIO().save_checkpoint(whole, path)
        if killed_before(count) < count:
            break
        found, _ = newest_valid(tmp_path)
        assert found is not None, f"killed before call {count}: {names(tmp_path)}"
        assert_holds(found, step_in(found) or 0)
        save_parts(content(3), path, Alone())
        assert_holds(path, 3)
        assert names(tmp_path) == {"last.ckpt"}
    assert count > 8


def test_a_full_disk(content: Callable[[int], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "last.ckpt"
    save_parts(content(1), path, Alone())

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(TrunklineError, match=r"cannot write .*last\.ckpt .*free some"):
        save_parts(content(2), path, Alone())
    assert_holds(path, 1)
    assert names(tmp_path) == {"last.ckpt"}


def test_a_file_takes_the_place_of_a_folder(content: Callable[[int], Any], tmp_path: Path) -> None:
    """A run that was sharded before goes on without."""
    path = tmp_path / "last.ckpt"
    save_parts(content(1), path, Alone())
    whole = {**load_checkpoint(path), "global_step": 2}
    (tmp_path / ".last.ckpt.0123.tmp").mkdir()  # of a save that was killed
    SafeCheckpointIO().save_checkpoint(whole, path)
    assert path.is_file()
    assert SafeCheckpointIO().load_checkpoint(path)["global_step"] == 2
    assert "last.ckpt" in names(tmp_path)
    assert "last-previous.ckpt" not in names(tmp_path)


def test_a_disk_that_is_full_for_another_process(content: Callable[[int], Any], tmp_path: Path) -> None:
    path, processes = tmp_path / "last.ckpt", Alone()
    save_parts(content(1), path, processes)
    processes.agreed = False
    with pytest.raises(TrunklineError, match=r"another process cannot write its part of .*last\.ckpt"):
        save_parts(content(2), path, processes)
    assert_holds(path, 1)
    assert names(tmp_path) == {"last.ckpt"}


def test_damage_is_found(content: Callable[[int], Any], tmp_path: Path) -> None:
    older, newer = tmp_path / "step=1.ckpt", tmp_path / "step=2.ckpt"
    save_parts(content(1), older, Alone())
    for name in (META_FILE, rows_name(0), MANIFEST):
        save_parts(content(2), newer, Alone())
        data = bytearray((newer / name).read_bytes())
        data[len(data) // 2] ^= 1
        (newer / name).write_bytes(data)
        found, faults = newest_valid(tmp_path)
        assert found == older
        assert len(faults) == 1
        assert "step=2.ckpt is damaged" in faults[0]
        with pytest.raises(TrunklineError, match="damaged"):
            load_checkpoint(newer)
    (newer / MANIFEST).unlink()
    assert newest_valid(tmp_path)[0] == older


class Hostile:
    def __reduce__(self) -> Any:
        return (os.mkdir, ("executed",))


@pytest.mark.parametrize("name", [META_FILE, rows_name(0)])
def test_code_in_a_part_does_not_run(
    name: str, content: Callable[[int], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "last.ckpt"
    save_parts(content(1), path, Alone())
    torch.save({"a": Hostile()}, path / name)
    seal_folder(path)
    with pytest.raises(TrunklineError, match=r"not a checkpoint of plain data: Unsupported global \w+\.mkdir"):
        load_checkpoint(path)
    (path / name).write_bytes(pickle.dumps(Hostile()))
    seal_folder(path)
    with pytest.raises(TrunklineError, match="not a checkpoint of plain data"):
        load_checkpoint(path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(("rows", "processes"), [(8, 2), (7, 3), (1, 2), (9, 4), (3, 8)])
def test_rows_are_split_as_torch_does_and_put_together_again(rows: int, processes: int) -> None:
    whole = torch.randn(rows, 2)
    chunks = [*torch.chunk(whole, processes), *[whole[:0]] * processes][:processes]
    spans = [own_span(rows, rank, processes) for rank in range(processes)]
    assert [last - first for first, last in spans] == [len(chunk) for chunk in chunks]
    pieces = Pieces(whole.to("meta"), [(first, chunk) for (first, _), chunk in zip(spans, chunks, strict=True)])
    assert torch.equal(pieces.whole(), whole)
    for first in range(rows + 1):
        for last in range(first, rows + 1):
            assert torch.equal(pieces.rows(first, last), whole[first:last])
    if processes > 1 and rows > 1:
        missing = Pieces(whole.to("meta"), [(spans[0][0], chunks[0])])
        with pytest.raises(ValueError, match="not all there"):
            missing.whole()


def test_what_is_not_sharded_by_rows_is_refused(mesh: DeviceMesh, tmp_path: Path) -> None:
    for placement in (Replicate(), Shard(1)):
        weight = DTensor.from_local(torch.ones(2, 2), mesh, [placement])
        with pytest.raises(TrunklineError, match="/weight is not sharded by rows"):
            save_parts({"weight": weight}, tmp_path / "last.ckpt", Alone())
    assert not is_parts(tmp_path / "last.ckpt")
