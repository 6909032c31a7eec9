"""Checkpoints are whole or refused, and the newest valid one is found."""

import copy
import errno
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint

from trunkline import TrunklineError
from trunkline.datamodules import ImageData
from trunkline.files import digest_file, load_checkpoint
from trunkline.modules.networks import ViT
from trunkline.modules.objectives.image_classifier import ImageClassifier
from trunkline.modules.training.checkpoints import SafeCheckpointIO, follow_folder
from trunkline.modules.training.warm_start import network_from_checkpoint
from trunkline.pipelines.runs import choose_run
from trunkline.run_folders import newest_valid

IO = SafeCheckpointIO()


def content(number: int) -> dict[str, Any]:
    """A checkpoint of about a megabyte that shows if two were mixed."""
    needed = {"state_dict": {}, "epoch": 0, "global_step": number, "pytorch-lightning_version": "2.6", "loops": {}}
    return {**needed, "number": number, "weights": torch.full((256 * 1024,), float(number))}


def save(path: Path, number: int = 1) -> Path:
    IO.save_checkpoint(content(number), path)
    return path


def number_in(path: Path) -> int:
    loaded = load_checkpoint(path)
    assert torch.equal(loaded["weights"], content(loaded["number"])["weights"])
    return loaded["number"]


def names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "a [1].ckpt"
    save(path, 1)
    digest_file(path).write_text("0" * 64)  # of an older version's file
    save(path, 2)
    assert number_in(path) == 2
    assert names(path.parent) == {"a [1].ckpt"}
    assert IO.load_checkpoint(path)["number"] == 2
    digest_file(path).write_text("0" * 64)
    IO.remove_checkpoint(path)
    assert names(path.parent) == set()


def test_a_checkpoint_has_the_usual_mode(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        assert save(tmp_path / "a.ckpt").stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(before)


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut_short(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def empty(path: Path) -> None:
    path.write_bytes(b"")


DAMAGES = [(flip_a_bit, "is damaged"), (cut_short, "is damaged"), (empty, "is empty")]


@pytest.mark.parametrize(("damage", "words"), DAMAGES)
def test_damaged_file_is_refused_and_skipped(damage: Callable[[Path], None], words: str, tmp_path: Path) -> None:
    new, old = save(tmp_path / "new.ckpt", 2), save(tmp_path / "old.ckpt")  # the newer one has an older time
    assert newest_valid(tmp_path) == (new, [])
    damage(new)
    for load in (load_checkpoint, IO.load_checkpoint, lambda path: network_from_checkpoint(ViT, path)):
        with pytest.raises(TrunklineError, match=f"{re.escape(str(new))} {words}.*resume=auto"):
            load(new)
    found, faults = newest_valid(tmp_path)
    assert found == old
    assert [f"{new} {words}" in fault for fault in faults] == [True]


def test_file_without_digest(tmp_path: Path) -> None:
    """From elsewhere it may be loaded by name, but automatic resume takes only what it can check."""
    path = tmp_path / "a.ckpt"
    torch.save(content(5), path)
    assert number_in(path) == 5
    assert newest_valid(tmp_path) == (None, [f"the checkpoint {path} cannot be checked: it holds no digest"])
    cut_short(path)
    with pytest.raises(TrunklineError, match=re.escape(str(path))):
        load_checkpoint(path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(TrunklineError, match=re.escape(f"there is no checkpoint {tmp_path / 'a.ckpt'}")):
        load_checkpoint(tmp_path / "a.ckpt")


def crash(path: Path, number: int, call: int) -> bool:
    """Save in a process that ends at the nth call that touches the disk; whether there were that many."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    calls = 0

    def count(function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == call:
                os._exit(9)
            return function(*arguments, **options)

        return counted

    os.replace, os.fsync, torch.save = count(os.replace), count(os.fsync), count(torch.save)  # type: ignore[assignment]
    try:
        save(path, number)
    finally:
        os._exit(0)


def test_crash_between_any_two_disk_calls(tmp_path: Path) -> None:
    """Even several times in a row at the same place, the old file or the new one is there and valid."""
    path, call = save(tmp_path / "a.ckpt", 0), 1
    while True:
        before = number_in(path)
        crashes = [crash(path, before + again, call) for again in (1, 2, 3)]
        assert before <= number_in(path) <= before + 3, f"call {call}"
        if not any(crashes):
            break
        call += 1
    assert call > 4  # it did crash: one write, one rename and two flushes
    assert number_in(path) == before + 3
    save(path, 1000)
    assert number_in(path) == 1000
    assert names(tmp_path) == {"a.ckpt"}


@pytest.mark.parametrize("function", ["torch.save", "os.fsync", "os.replace"])
def test_failing_write(function: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever call finds the disk full: one message, the old file as it was, nothing left behind."""
    path = save(tmp_path / "a.ckpt", 1)

    def fail(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(function, fail)
    with pytest.raises(TrunklineError, match=rf"{path} \(needs 1\.0 MB, [\d,.]+ MB free there\): .*No space left"):
        save(path, 2)
    monkeypatch.undo()
    assert number_in(path) == 1
    assert names(tmp_path) == {"a.ckpt"}


class Hostile:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("forced", ["0", "1"])
@pytest.mark.parametrize("write", [torch.save, lambda data, path: path.write_bytes(pickle.dumps(data))])
def test_hostile_pickle_does_not_run(
    write: Callable[[Any, Path], None], forced: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", forced)
    path, trace = tmp_path / "a.ckpt", tmp_path / "trace"
    write({"state_dict": {}, "x": Hostile(trace)}, path)
    for load in (load_checkpoint, lambda p: IO.load_checkpoint(p, weights_only=False)):
        with pytest.raises(TrunklineError, match=r"a.ckpt is not a checkpoint of plain data.*could run code") as caught:
            load(path)
        assert not re.search("weights_only|add_safe_globals|allowlist|trust", str(caught.value))  # torch's advice
    assert not trace.exists()
    torch.load(path, weights_only=False) if write is torch.save else pickle.loads(path.read_bytes())
    assert trace.exists()  # it does run elsewhere


def test_checkpoint_of_a_fit_is_plain_data(tmp_path: Path) -> None:
    backbone = {"dim": 16, "depth": 1, "num_heads": 2}
    network = {"image_size": 8, "patch_size": 4, "in_chans": 1, "num_classes": 10, "backbone": backbone}
    model = ImageClassifier(network)  # type: ignore[arg-type]
    data = ImageData(image_size=8, channels=1, batch_size=64)
    best = ModelCheckpoint(tmp_path, "best", monitor="val/acc", mode="max")
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        limit_train_batches=3,
        callbacks=[best, EMAWeightAveraging(decay=0.9)],
        plugins=[IO],
        logger=False,
        enable_progress_bar=False,
        use_distributed_sampler=False,
    )
    trainer.fit(model, data)
    loaded = torch.load(tmp_path / "best.ckpt", weights_only=True)
    assert loaded["global_step"] == 3
    assert loaded["objective"] == "ImageClassifier"
    assert loaded["hyper_parameters"]["network"]["backbone"]["dim"] == 16
    assert loaded["ImageData"]["class_names"] == [str(n) for n in range(10)]
    # Training ends with the average in the model; the checkpoint holds it as its weights.
    rebuilt = network_from_checkpoint(ViT, tmp_path / "best.ckpt")
    image = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(rebuilt.eval()(image), model.network.eval()(image), rtol=0, atol=0)
    assert rebuilt(image).abs().max() > 0


def test_follow_folder(tmp_path: Path) -> None:
    """In a moved folder a checkpoint callback finds its files again; in an unrelated one it starts anew."""
    old, new = "runs/a/checkpoints", str(tmp_path)
    paths = {"best_model_path": f"{old}/best.ckpt", "kth_best_model_path": f"{old}/best.ckpt", "last_model_path": ""}
    state: dict[str, Any] = {"dirpath": old, **paths, "best_k_models": {f"{old}/best.ckpt": 0.5}, "kth_value": 0.5}
    before = copy.deepcopy(state)
    follow_folder(state, new)
    assert state == before
    save(tmp_path / "best.ckpt")
    follow_folder(state, new)
    here = f"{new}/best.ckpt"
    paths = {"best_model_path": here, "kth_best_model_path": here, "last_model_path": ""}
    assert state == {"dirpath": new, **paths, "best_k_models": {here: 0.5}, "kth_value": 0.5}


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two runs of a recipe, with two checkpoints each, and a newer run of another recipe."""
    for variable in ("TRUNKLINE_RUN", "SLURM_NTASKS", "SLURM_JOB_ID", "WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(variable, raising=False)
    order = ["vit/digits/one/checkpoints/a", "vit/digits/one/checkpoints/b", "vit/digits/two/checkpoints/a"]
    for age, name in enumerate([*order, "vit/digits/two/checkpoints/b", "vit/other/three/checkpoints/a"]):
        path = save(tmp_path / f"{name}.ckpt", age)
        os.utime(path, (1000 - age, 1000 - age))  # as copying could leave them
    return tmp_path


def test_choose_new_run(runs: Path) -> None:
    folder, checkpoint, faults = choose_run(runs, "vit/digits", None)
    assert (checkpoint, faults) == (None, [])
    assert folder.parent == runs / "vit/digits"
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d", folder.name)
    # Processes that this one starts inherit the choice.
    assert choose_run(runs, "vit/digits", None)[0] == folder
    assert choose_run(runs, "vit/new", "auto") == (runs / "vit/new" / folder.name, None, [])


def test_two_runs_in_one_second_differ(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = set()
    for _ in range(3):
        monkeypatch.delenv("TRUNKLINE_RUN", raising=False)
        folder = choose_run(runs, "vit/digits", None)[0]
        (folder / "checkpoints").mkdir(parents=True)
        chosen.add(folder)
    assert len(chosen) == 3


def test_choose_newest_valid(runs: Path) -> None:
    one, two = runs / "vit/digits/one", runs / "vit/digits/two"
    assert choose_run(runs, "vit/digits", "auto") == (two, two / "checkpoints/b.ckpt", [])
    for name in "ab":
        flip_a_bit(two / f"checkpoints/{name}.ckpt")
    faults = [f"the checkpoint {two}/checkpoints/{name}.ckpt is damaged" for name in "ba"]
    folder, checkpoint, skipped = choose_run(runs, "vit/digits", "auto")
    assert (folder, checkpoint) == (one, one / "checkpoints/b.ckpt")
    assert [fault[: len(start)] for fault, start in zip(skipped, faults, strict=True)] == faults
    with pytest.raises(TrunklineError, match=f"--resume {two} holds no valid checkpoint: .*b.ckpt is damaged.*a.ckpt"):
        choose_run(runs, "vit/digits", str(two))


def test_choose_by_name(runs: Path) -> None:
    one = runs / "vit/digits/one"
    assert choose_run(runs, "vit/digits", str(one)) == (one, one / "checkpoints/b.ckpt", [])
    assert choose_run(runs, "vit/digits", str(one / "checkpoints")) == (one, one / "checkpoints/b.ckpt", [])
    three = runs / "vit/other/three"  # the newest below these
    for folder in (runs / "vit/other", runs / "vit", runs):
        assert choose_run(runs, "vit/digits", str(folder)) == (three, three / "checkpoints/a.ckpt", [])
    alone = save(runs / "alone/a.ckpt")
    assert choose_run(runs, "vit/digits", str(runs / "alone")) == (runs / "alone", alone, [])
    path = one / "checkpoints/a.ckpt"
    assert choose_run(runs, "vit/digits", str(path)) == (one, path, [])
    flip_a_bit(path)
    with pytest.raises(TrunklineError, match=f"--resume {path}: .*is damaged.*give 'auto'"):
        choose_run(runs, "vit/digits", str(path))
    with pytest.raises(TrunklineError, match=r"--resume none.ckpt: there is no checkpoint none.ckpt.*give 'auto'"):
        choose_run(runs, "vit/digits", "none.ckpt")
    (runs / "vit/empty").mkdir()
    with pytest.raises(TrunklineError, match="holds no valid checkpoint: none at all"):
        choose_run(runs, "vit/empty", str(runs / "vit/empty"))
