"""Saves in the background: what they hold, in which order files come and go, and what happens when one fails."""

import errno
import os
import pickle
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from tiny import batches, classifier, fit

from trunkline import TrunklineError
from trunkline.files import load_checkpoint
from trunkline.modules.callbacks import LastCheckpoint
from trunkline.modules.training.background_saves import BackgroundCheckpointIO, FailedSaves, snapshot

FULL = OSError(errno.ENOSPC, "No space left on device")


class Gate:
    """Stands in for `torch.save`: each write waits until it is opened, and those to names in `full` fail."""

    def __init__(self) -> None:
        self.opened, self.begun = threading.Event(), threading.Event()
        self.save, self.full, self.written = torch.save, set[str](), list[str]()
        self.busy = threading.Lock()

    def __call__(self, content: Any, path: Path) -> None:
        assert self.busy.acquire(blocking=False), "two files are being written"
        self.begun.set()
        assert self.opened.wait(60)
        name = path.name.removeprefix(".").rsplit(".", 2)[0]
        self.busy.release()
        if name in self.full:
            raise FULL
        self.save(content, path)
        self.written.append(name)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate()
    monkeypatch.setattr(torch, "save", gate)
    yield gate
    gate.opened.set()


@pytest.fixture
def writer() -> Iterator[BackgroundCheckpointIO]:
    writer = BackgroundCheckpointIO()
    yield writer
    writer.teardown()


def names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


def test_training_goes_on_during_a_save(gate: Gate, writer: BackgroundCheckpointIO, tmp_path: Path) -> None:
    """The file holds what was true when it was asked for, however training changes tensors and counters in place."""
    weight, state = torch.zeros(4), {"step": 1, "scores": [1.0]}
    writer.save_checkpoint({"state_dict": {"weight": weight, "first": weight[:2]}, "loop": state}, tmp_path / "a.ckpt")
    assert gate.begun.wait(60)
    assert not (tmp_path / "a.ckpt").exists()
    weight += 1
    state["step"] = 2
    state["scores"].append(2.0)  # type: ignore[attr-defined]
    gate.opened.set()
    writer.wait()
    saved = load_checkpoint(tmp_path / "a.ckpt")
    assert saved["loop"] == {"step": 1, "scores": [1.0]}
    assert saved["state_dict"]["weight"].tolist() == [0, 0, 0, 0]


def test_one_save_at_a_time(gate: Gate, writer: BackgroundCheckpointIO, tmp_path: Path) -> None:
    """The next one waits before it copies anything, so that there is never more than one copy."""
    counter = {"number": 1}
    writer.save_checkpoint(counter, tmp_path / "a.ckpt")
    next_save = threading.Thread(target=writer.save_checkpoint, args=(counter, tmp_path / "b.ckpt"))
    next_save.start()
    assert gate.begun.wait(60)
    counter["number"] = 2
    gate.opened.set()
    next_save.join()
    writer.wait()
    assert gate.written == ["a.ckpt", "b.ckpt"]
    assert [load_checkpoint(tmp_path / name)["number"] for name in gate.written] == [1, 2]


def test_an_old_file_stays_until_the_new_one_is_whole(
    gate: Gate, writer: BackgroundCheckpointIO, tmp_path: Path
) -> None:
    (tmp_path / "old.ckpt").touch()
    writer.save_checkpoint({}, tmp_path / "new.ckpt")
    writer.remove_checkpoint(tmp_path / "old.ckpt")
    assert gate.begun.wait(60)
    assert (tmp_path / "old.ckpt").exists()
    gate.opened.set()
    writer.wait()
    assert names(tmp_path) == {"new.ckpt"}
    writer.remove_checkpoint(tmp_path / "new.ckpt")  # nothing is being written: at once
    assert names(tmp_path) == set()


def test_a_failed_save_is_raised_once_and_keeps_the_old_file(
    gate: Gate, writer: BackgroundCheckpointIO, tmp_path: Path
) -> None:
    (tmp_path / "old.ckpt").touch()
    gate.full.add("new.ckpt")
    writer.save_checkpoint({}, tmp_path / "new.ckpt")
    writer.remove_checkpoint(tmp_path / "old.ckpt")
    assert not writer.check()  # it is still being written
    gate.opened.set()
    with pytest.raises(TrunklineError, match=r"cannot write .*new.ckpt \(.*No space left.*resume the run") as caught:
        writer.wait()
    assert caught.value.field == "run_dir"
    assert writer.check()
    writer.save_checkpoint({"number": 3}, tmp_path / "last.ckpt")  # as a run does that ends because of the error
    writer.teardown()
    assert load_checkpoint(tmp_path / "last.ckpt")["number"] == 3
    assert names(tmp_path) == {"old.ckpt", "last.ckpt"}


@pytest.mark.parametrize("call", ["save_checkpoint", "load_checkpoint", "check", "teardown"])
def test_every_call_raises_a_failed_save(call: str, gate: Gate, writer: BackgroundCheckpointIO, tmp_path: Path) -> None:
    gate.full.add("a.ckpt")
    gate.opened.set()
    writer.save_checkpoint({}, tmp_path / "a.ckpt")
    calls: dict[str, Any] = {
        "save_checkpoint": lambda: writer.save_checkpoint({}, tmp_path / "b.ckpt"),
        "load_checkpoint": lambda: writer.load_checkpoint(tmp_path / "b.ckpt"),
        "teardown": writer.teardown,
    }

    def check() -> None:
        while not writer.check():
            pass

    with pytest.raises(TrunklineError, match=r"cannot write .*a.ckpt"):
        calls.get(call, check)()


def test_a_failed_save_hides_no_other_error(gate: Gate, writer: BackgroundCheckpointIO, tmp_path: Path) -> None:
    gate.full.add("a.ckpt")
    gate.opened.set()
    writer.save_checkpoint({}, tmp_path / "a.ckpt")
    try:
        raise ValueError("first")
    except ValueError:  # where Lightning ends the plugins after an error
        with pytest.warns(UserWarning, match=r"cannot write .*a.ckpt"):
            writer.teardown()


def test_reading_waits_for_the_file(gate: Gate, writer: BackgroundCheckpointIO, tmp_path: Path) -> None:
    content = {"state_dict": {}, "epoch": 0, "global_step": 7, "pytorch-lightning_version": "2.6", "loops": {}}
    writer.save_checkpoint(content, tmp_path / "a.ckpt")
    threading.Timer(0.05, gate.opened.set).start()
    assert writer.load_checkpoint(tmp_path / "a.ckpt")["global_step"] == 7


def test_snapshot() -> None:
    """Equal to the original, apart from it, and no larger: shared memory stays shared."""
    base = torch.arange(12.0)
    grad = torch.ones(2, requires_grad=True)
    content = {
        "views": (base.view(3, 4).t(), base[2:5]),
        "again": [base],
        "of a graph": grad * 2,
        "parameter": torch.nn.Parameter(torch.ones(3)),
        "empty": torch.empty(0, 3),
        "half": torch.ones(2, dtype=torch.bfloat16),
        "scalar": torch.tensor(5),
        "sparse": torch.eye(2).to_sparse(),
        "plain": {"x": {1, 2}, "y": None},
    }
    copied = snapshot(content)
    assert list(copied) == list(content)
    for before, after in (
        *zip(content["views"], copied["views"], strict=True),  # type: ignore[call-overload]
        (content["again"][0], copied["again"][0]),  # type: ignore[index]
        *((content[name], copied[name]) for name in ("of a graph", "parameter", "empty", "half", "scalar")),
    ):
        assert torch.equal(before, after)
        assert (before.dtype, before.stride(), type(before)) == (after.dtype, after.stride(), type(after))
        assert before.requires_grad == after.requires_grad
        assert after.numel() == 0 or after.data_ptr() != before.data_ptr()
    assert copied["plain"] == content["plain"]
    assert copied["plain"] is not content["plain"]
    assert torch.equal(copied["sparse"].to_dense(), torch.eye(2))
    assert copied["views"][1].untyped_storage().data_ptr() == copied["again"][0].untyped_storage().data_ptr()
    base += 1
    assert copied["again"][0].tolist() == list(range(12))


def test_a_writer_travels_to_processes_that_are_spawned() -> None:
    assert isinstance(pickle.loads(pickle.dumps(BackgroundCheckpointIO())), BackgroundCheckpointIO)


# --- in a run


class Look(Callback):
    """Opens the gate when a step begins, and notes which files there were."""

    def __init__(self, gate: Gate, folder: Path, step: int) -> None:
        self.gate, self.folder, self.step = gate, folder, step
        self.seen: list[set[str]] = []

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self.seen.append({name for name in names(self.folder) if not name.startswith(".")})
        if trainer.global_step == self.step:
            self.gate.opened.set()
            futures: Any = trainer.strategy.checkpoint_io._jobs  # type: ignore[attr-defined]
            while not all(job.done() for job in futures):
                pass


def test_a_run_saves_while_it_trains(gate: Gate, tmp_path: Path) -> None:
    """Steps go on while a file is written, and when the run ends, all its files are whole and the old ones gone."""
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    saves = ModelCheckpoint(folder, "{step}", monitor="step", mode="max", save_top_k=2, every_n_train_steps=3)
    look = Look(gate, folder, 5)
    model = classifier()
    trainer = fit(
        model,
        tmp_path,
        batches(13),
        callbacks=[look, FailedSaves(), LastCheckpoint(), saves],
        enable_checkpointing=True,
        plugins=[BackgroundCheckpointIO()],
    )
    assert look.seen[:6] == [set()] * 6  # the save after step 3 was waiting when the fifth step ended
    assert names(folder) == {"step=9.ckpt", "step=12.ckpt", "last.ckpt"}
    for step in (9, 12):
        saved = load_checkpoint(folder / f"step={step}.ckpt")
        assert saved["global_step"] == step
        optimiser = saved["optimizer_states"][0]["state"]
        assert {int(state["step"]) for state in optimiser.values()} == {step}
    last = load_checkpoint(folder / "last.ckpt")["state_dict"]
    assert all(torch.equal(value, last[name]) for name, value in model.state_dict().items())
    assert trainer.strategy.checkpoint_io._thread is None  # type: ignore[attr-defined]


def test_a_save_that_fails_ends_the_run(gate: Gate, tmp_path: Path) -> None:
    """After the step in which it failed, and with the older file kept."""
    folder = tmp_path / "checkpoints"
    gate.full.add("step=4.ckpt")
    saves = ModelCheckpoint(folder, "{step}", monitor="step", mode="max", save_top_k=1, every_n_train_steps=2)
    folder.mkdir()
    gate.opened.set()
    look = Look(gate, folder, 4)
    with pytest.raises(TrunklineError, match=r"cannot write .*step=4.ckpt .*No space left on device; free some space"):
        fit(
            classifier(),
            tmp_path,
            batches(9),
            callbacks=[look, FailedSaves(), saves],
            enable_checkpointing=True,
            plugins=[BackgroundCheckpointIO()],
        )
    assert len(look.seen) == 5  # the step after the save was done, and no other
    assert names(folder) == {"step=2.ckpt"}


def test_a_save_that_fails_at_the_end(gate: Gate, tmp_path: Path) -> None:
    gate.full.add("step=3.ckpt")
    gate.opened.set()
    saves = ModelCheckpoint(tmp_path, "{step}", monitor="step", mode="max", every_n_train_steps=3)
    with pytest.raises(TrunklineError, match=r"cannot write .*step=3.ckpt"):
        fit(
            classifier(),
            tmp_path,
            batches(3),
            callbacks=[FailedSaves(), saves],
            enable_checkpointing=True,
            plugins=[BackgroundCheckpointIO()],
        )


def test_a_killed_process_leaves_what_was_there(tmp_path: Path) -> None:
    """The thread dies with its process, between two calls that touch the disk; the old file is whole."""
    writer = BackgroundCheckpointIO()
    writer.save_checkpoint({"number": 1}, tmp_path / "a.ckpt")
    writer.wait()
    child = os.fork()
    if not child:
        os.replace = lambda *_: os._exit(9)  # type: ignore[assignment]
        writer.save_checkpoint({"number": 2}, tmp_path / "a.ckpt")
        writer.wait()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert load_checkpoint(tmp_path / "a.ckpt")["number"] == 1
    assert len(names(tmp_path)) == 2
    writer.save_checkpoint({"number": 3}, tmp_path / "b.ckpt")
    writer.wait()
    assert names(tmp_path) == {"a.ckpt", "b.ckpt"}
