"""The names that Lightning keeps to itself and exact_resume.py uses are there, mean what it takes them for, and are
used nowhere else.
"""

import ast
from collections.abc import Iterator
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import tiny
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import DoublePrecision, HalfPrecision, MixedPrecision, Precision
from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from trunkline.modules.training import exact_resume
from trunkline.modules.training.exact_resume import (
    accumulates,
    compute_dtype,
    correct_step_count,
    drop_half_done_validation,
    end_data_workers,
)

ROOT = Path(__file__).parents[3]
BATCHES = 5


class Watch(Callback):
    """Notes what the loops say of each batch, within its step and after it."""

    def __init__(self) -> None:
        self.seen: dict[str, list[Any]] = {"step": [], "after": [], "stepped": [], "validates": [], "last": []}
        self.saved: list[dict[str, Any]] = []

    def on_before_zero_grad(self, trainer: L.Trainer, *_: Any) -> None:
        """Within the step."""
        assert trainer.fit_loop._should_accumulate() == trainer.fit_loop.epoch_loop._should_accumulate()

    def on_before_backward(self, trainer: L.Trainer, *_: Any) -> None:
        self.seen["step"].append(accumulates(trainer))

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        loop = trainer.fit_loop.epoch_loop
        self.seen["after"].append(accumulates(trainer))
        self.seen["stepped"].append((loop._batches_that_stepped, trainer.global_step))
        fetcher: Any = trainer.fit_loop._data_fetcher
        self.seen["validates"].append(loop._should_check_val_fx(fetcher))
        self.seen["last"].append(loop._num_ready_batches_reached())
        self.saved.append(trainer.fit_loop.state_dict())


def fit(folder: Path, *callbacks: Callback, **options: Any) -> L.Trainer:
    """Five batches."""
    rows = [{**batch, "valid": torch.ones(4, dtype=torch.bool)} for batch in tiny.batches(BATCHES)]
    fitted = tiny.trainer(
        folder,
        callbacks=list(callbacks),
        **{"max_epochs": 1, "num_sanity_val_steps": 0, "log_every_n_steps": 1, **options},
    )
    loaders = [DataLoader(data, batch_size=None) for data in (rows, rows[:1])]  # type: ignore[arg-type]
    fitted.fit(tiny.classifier(), *loaders)
    return fitted


def test_data_workers_are_ended_where_lightning_was_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by torch, which says in the midst of it that it has lost one of them."""
    shut_down, errors = _MultiProcessingDataLoaderIter._shutdown_workers, [RuntimeError("a worker is killed")]

    def interrupted(workers: Any) -> None:
        if errors:
            raise errors.pop()
        shut_down(workers)

    monkeypatch.setattr(_MultiProcessingDataLoaderIter, "_shutdown_workers", interrupted)
    fitted, before = tiny.trainer(tmp_path, max_epochs=2, num_sanity_val_steps=0), set(active_children())
    options: Any = {"batch_size": None, "num_workers": 1, "persistent_workers": True, "multiprocessing_context": "fork"}
    with pytest.raises(RuntimeError, match="is killed"):
        fitted.fit(tiny.classifier(), *(DataLoader(tiny.batches(2), **options) for _ in range(2)))
    assert len(set(active_children()) - before) == 2
    end_data_workers(fitted)
    assert set(active_children()) == before


# --- what the loops say


@pytest.mark.parametrize(
    ("steps", "want"),
    [(1, [False] * 5), (2, [True, False, True, False, False]), (3, [True, True, False, True, False])],
)
def test_accumulation_ends_with_its_last_batch_and_with_the_epoch(steps: int, want: list[bool], tmp_path: Path) -> None:
    watch = Watch()
    fit(tmp_path, watch, accumulate_grad_batches=steps)
    assert watch.seen["step"] == want
    assert watch.seen["after"] == want


def test_validation_is_due_and_the_epoch_ends(tmp_path: Path) -> None:
    watch = Watch()
    fit(tmp_path, watch, val_check_interval=2)
    assert watch.seen["validates"] == [False, True, False, True, False]
    assert watch.seen["last"] == [False, False, False, False, True]
    watch = Watch()
    fit(tmp_path, watch)
    assert watch.seen["validates"] == watch.seen["last"] == [False, False, False, False, True]


def test_saved_progress_has_the_counters_that_are_corrected(tmp_path: Path) -> None:
    watch = Watch()
    fit(tmp_path, watch, val_check_interval=2)
    batch = watch.saved[2]  # of the third batch, whose work is done
    assert batch["epoch_progress"]["current"].items() >= {"ready": 1, "processed": 0, "completed": 0}.items()
    assert batch["epoch_progress"]["total"].items() >= {"ready": 1, "processed": 0, "completed": 0}.items()
    for counts in ("current", "total"):
        assert batch["epoch_loop.batch_progress"][counts] == {"ready": 3, "started": 3, "processed": 3, "completed": 2}
    assert batch["epoch_loop.batch_progress"]["is_last_batch"] is False
    assert watch.saved[-1]["epoch_loop.batch_progress"]["is_last_batch"] is True
    validation = batch["epoch_loop.val_loop.batch_progress"]  # one was done, of one batch
    assert validation["total"] == validation["current"] == {"ready": 1, "started": 1, "processed": 1, "completed": 1}


# --- what is set


class Miscount(Callback):
    """Sets the count of steps at a hook, as some resumes do."""

    def __init__(self, hook: str) -> None:
        self.hook = hook

    def miscount(self, trainer: L.Trainer) -> None:
        trainer.fit_loop.epoch_loop._batches_that_stepped = 100

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Before the module's own hook, which corrects it."""
        if self.hook == "start":
            self.miscount(trainer)

    def on_before_backward(self, trainer: L.Trainer, *_: Any) -> None:
        """After it."""
        if self.hook == "backward":
            self.miscount(trainer)


@pytest.mark.parametrize(
    ("hook", "want"), [("none", [0, 1, 2, 3, 4]), ("start", [0, 1, 2, 3, 4]), ("backward", [100] * 5)]
)
def test_loggers_count_by_the_step_count_that_is_corrected(
    hook: str, want: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logger, steps = CSVLogger(tmp_path), []
    monkeypatch.setattr(logger, "log_metrics", lambda metrics, step=None: steps.append((step, metrics)))
    fit(tmp_path, Miscount(hook), logger=logger, limit_val_batches=0)
    assert [step for step, metrics in steps if "train/loss" in metrics] == want


def test_the_step_count_is_lightnings_own(tmp_path: Path) -> None:
    """Not a new attribute that only looks like it; in an undisturbed run there is nothing to correct."""
    loop = tiny.trainer(tmp_path).fit_loop.epoch_loop
    assert vars(loop)["_batches_that_stepped"] == 0
    watch = Watch()
    trainer = fit(tmp_path, watch, accumulate_grad_batches=2)
    assert watch.seen["stepped"] == [(0, 0), (0, 1), (1, 1), (1, 2), (2, 3)]  # counted up after the hook
    loop = trainer.fit_loop.epoch_loop
    assert loop._batches_that_stepped == trainer.global_step == 3
    loop._batches_that_stepped = 7
    correct_step_count(trainer)
    assert trainer.fit_loop.state_dict()["epoch_loop.state_dict"]["_batches_that_stepped"] == 3


def test_a_half_done_validation_is_taken_back(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path)
    progress = trainer.fit_loop.epoch_loop.val_loop.batch_progress
    for counts in (progress.total, progress.current):
        counts.ready, counts.started, counts.processed, counts.completed = 4, 4, 3, 3
    drop_half_done_validation(trainer)
    total, current = progress.total, progress.current
    assert (total.ready, total.started, total.processed, total.completed) == (3, 3, 3, 3)
    assert (current.ready, current.started, current.processed, current.completed) == (4, 4, 3, 3)  # reset elsewhere


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [
        (Precision(), torch.float32),
        (MixedPrecision("bf16-mixed", "cpu"), torch.bfloat16),
        (HalfPrecision("bf16-true"), torch.bfloat16),
        (HalfPrecision("16-true"), torch.float16),
        (DoublePrecision(), torch.float64),
    ],
)
def test_compute_dtype(precision: Precision, dtype: torch.dtype) -> None:
    assert compute_dtype(precision) is dtype


# --- and nowhere else


def private_names(folder: Path) -> set[str]:
    """What a trainer, its loops and helpers, and modules for it keep to themselves."""
    trainer = tiny.trainer(folder)
    fit_loop = trainer.fit_loop
    owners: list[Any] = [trainer, trainer.strategy, trainer.precision_plugin, fit_loop, fit_loop.epoch_loop]
    owners += [
        fit_loop.epoch_loop.val_loop,
        fit_loop.epoch_loop.automatic_optimization,
        fit_loop.epoch_loop.batch_progress,
    ]
    owners += [value for name, value in vars(trainer).items() if name.endswith("_connector")]
    owners += [L.LightningModule(), L.LightningDataModule()]
    return {name for owner in owners for name in dir(owner) if name.startswith("_") and not name.endswith("__")}


def uses(code: str, private: set[str]) -> Iterator[str]:
    """Uses of private names of Lightning, as they stand there; a method of the file's own is none."""
    nodes = [*ast.walk(ast.parse(code))]
    own = {f"self.{node.name}" for node in nodes if isinstance(node, ast.FunctionDef)}
    for node in nodes:
        if isinstance(node, ast.Attribute) and node.attr in private:
            yield from {ast.unparse(node)} - own
        elif isinstance(node, ast.Constant) and node.value in private:  # getattr
            yield repr(node.value)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lightning"):
            yield from (alias.name for alias in node.names if alias.name.startswith("_"))
            yield from (part for part in str(node.module).split(".") if part.startswith("_"))


def test_such_uses_are_found(tmp_path: Path) -> None:
    private = private_names(tmp_path)
    names = {"_should_accumulate", "_batches_that_stepped", "_should_check_val_fx", "_num_ready_batches_reached"}
    assert names | {"_data_fetcher", "_trainer", "_current_fx_name", "_results", "_logger_connector"} <= private
    code = (
        "from lightning.fabric.utilities.throughput import _plugin_to_compute_dtype\n"
        "from lightning.pytorch.core._x import a\n"
        "self._trainer = 1\nx = trainer.fit_loop._data_fetcher\nself._own = a.b\ngetattr(self, '_results')\n"
        "def _run(self):\n    self._run(), x._run()\n"
    )
    want = {"_plugin_to_compute_dtype", "_x", "self._trainer", "trainer.fit_loop._data_fetcher", "'_results'", "x._run"}
    assert set(uses(code, private)) == want


def test_one_file_alone_uses_what_lightning_keeps_to_itself(tmp_path: Path) -> None:
    private, own = private_names(tmp_path), Path(exact_resume.__file__)
    files = [file for room in ("modules", "datamodules", "pipelines") for file in sorted((ROOT / room).rglob("*.py"))]
    assert len(files) > 50
    found = {str(file.relative_to(ROOT)): set(uses(file.read_text(encoding="utf-8"), private)) for file in files}
    users = {file: names for file, names in found.items() if names}
    assert users.pop(f"modules/training/{own.name}") == {
        "trainer.fit_loop._should_accumulate",
        "trainer.fit_loop.epoch_loop._batches_that_stepped",
        "trainer.fit_loop._data_fetcher",
        "trainer.fit_loop._combined_loader",
        "trainer.fit_loop.epoch_loop.val_loop._combined_loader",
        "trainer._val_check_time_interval",
        "loop._should_accumulate",
        "loop._should_check_val_fx",
        "loop._num_ready_batches_reached",
        "_plugin_to_compute_dtype",
        "_CheckpointConnector",
        "trainer._signal_connector",
        "trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor",
        "trainer._checkpoint_connector",
    }
    assert users == {}
