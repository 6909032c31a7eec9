"""A run goes on at the next sample also if its batches, accumulated steps or processes are others than before."""

import math
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import tiny
import torch
from lightning.pytorch.callbacks import Callback
from own_task import CloudClassifier, CloudConfig, CloudData

from trunkline import TrunklineError
from trunkline.contract import EpochCut
from trunkline.datamodules.token_batches import TokenBatches
from trunkline.modules.backbone import TransformerConfig
from trunkline.modules.callbacks.progress import ProgressBar
from trunkline.modules.training.optim import OptimizerConfig, lr_multiplier
from trunkline.modules.training.position import check_same_order

ROWS, SEED = 50, 3
COSINE = OptimizerConfig("sgd", lr=0.5, schedule="cosine", warmup=0, final_lr=0.0)


class Watch(Callback):
    """Notes each batch and validation; saves `FOLDER/<name>.ckpt` where it is told.

    Args:
        folder: of the checkpoints.
        save: (epoch, batch) -> name: after this batch; with batch -1 after the first validation of the epoch.
    """

    def __init__(self, folder: Path, save: dict[tuple[int, int], str] | None = None) -> None:
        self.folder, self.save = folder, save or {}
        self.batches: list[tuple[int, int, list[int]]] = []
        """Epoch, number of the batch in it, rows."""
        self.steps: list[tuple[int, float]] = []
        """Optimiser steps after each batch, and the learning rate of the next one."""
        self.validated: list[tuple[int, int]] = []
        """Epoch, and batches before."""

        self.trainer: Any = None

    def save_at(self, trainer: L.Trainer, batch: int) -> None:
        name = self.save.pop((trainer.current_epoch, batch), None)
        if name:
            trainer.save_checkpoint(self.folder / f"{name}.ckpt")

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.batches.append((trainer.current_epoch, batch_idx, batch["index"].tolist()))
        self.steps.append((trainer.global_step, trainer.optimizers[0].param_groups[0]["lr"]))
        self.save_at(trainer, batch_idx)

    def on_validation_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.validated.append((trainer.current_epoch, trainer.fit_loop.epoch_loop.batch_progress.current.ready))
        self.save_at(trainer, -1)

    def rows(self, epoch: int) -> list[int]:
        return [row for at, _, rows in self.batches if at == epoch for row in rows]


def order(epoch: int) -> list[int]:
    permutation: list[int] = np.random.default_rng((SEED, epoch)).permutation(ROWS).tolist()
    return permutation


def run(
    folder: Path,
    size: int,
    accumulate: int = 1,
    resume: str | None = None,
    save: dict[tuple[int, int], str] | None = None,
    rows: int = ROWS,
    seed: int = SEED,
    data: type[CloudData] = CloudData,
    **options: Any,
) -> Watch:
    """Train two epochs, or what is left of them."""
    torch.manual_seed(0)
    watch = Watch(folder, save)
    network = CloudConfig(num_classes=3, backbone=TransformerConfig(dim=8, depth=1, num_heads=2))
    module = CloudClassifier(network, optimizer=COSINE)
    source = data(rows=rows, batch_size=size, eval_batch_size=10, num_workers=0, seed=seed)
    settings = {"max_epochs": 2, "num_sanity_val_steps": 0, "limit_val_batches": 1, **options}
    trainer = tiny.trainer(folder, accumulate_grad_batches=accumulate, callbacks=[watch], **settings)
    checkpoint = folder / f"{resume}.ckpt" if resume else None
    watch.trainer = trainer
    trainer.fit(module, datamodule=source, ckpt_path=checkpoint, weights_only=True)
    return watch


def saved(folder: Path, name: str = "half") -> dict[str, Any]:
    content: dict[str, Any] = torch.load(folder / f"{name}.ckpt", weights_only=True)
    return content


@pytest.mark.parametrize(
    ("before", "last", "after", "entered"),
    [
        ((10, 1), 1, (5, 1), 4),  # the samples seen are whole new batches
        ((10, 1), 1, (8, 1), 3),  # they are not: the new batches begin earlier than usual
        ((10, 1), 3, (3, 1), 13),  # later
        ((10, 1), 0, (12, 1), 1),
        ((8, 1), 4, (20, 1), 2),  # what is left fills no batch
        ((8, 1), 5, (5, 1), 10),  # as here, and the old epoch had come to its end
        ((20, 1), 1, (10, 1), 4),  # it had, but not to that of the new one
        ((10, 2), 3, (5, 4), 8),  # as many samples in a step
        ((10, 1), 2, (10, 2), 3),  # the first step has a batch less
        ((10, 1), 2, (5, 4), 6),
        ((5, 4), 3, (10, 1), 2),
    ],
)
def test_no_sample_comes_twice_and_none_is_left_out(
    before: tuple[int, int], last: int, after: tuple[int, int], entered: int, tmp_path: Path
) -> None:
    """Batches, steps, rates and validations are those of a run that always had such batches, from the sample on."""
    run(tmp_path, *before, save={(0, last): "half"}, max_epochs=1)
    state, (size, accumulate) = saved(tmp_path), after
    seen = (last + 1) * before[0]
    assert state["position"]["samples"] == seen
    resumed = run(tmp_path, *after, resume="half")

    batches = ROWS // size
    rest = [(0, entered + n, order(0)[seen + n * size :][:size]) for n in range(batches - entered)]
    assert resumed.batches == rest + [(1, n, order(1)[n * size :][:size]) for n in range(batches)]
    assert ROWS - seen - sum(len(rows) for _, _, rows in rest) < size

    per_epoch, taken = math.ceil(batches / accumulate), state["global_step"]
    want = []
    for epoch, batch, _ in resumed.batches:
        taken += (batch + 1) % accumulate == 0 or batch + 1 == batches
        done = (batch + 1) // accumulate if batch + 1 < batches else per_epoch
        want.append((taken, 0.5 * lr_multiplier(epoch * per_epoch + done, 2 * per_epoch, COSINE)))
    changed = next(n for n, (step, _) in enumerate(want) if step > state["global_step"])  # until then the saved rate
    assert [step for step, _ in resumed.steps] == [step for step, _ in want]
    assert [rate for _, rate in resumed.steps[changed:]] == pytest.approx([rate for _, rate in want[changed:]])
    assert resumed.steps[-1][1] == pytest.approx(0, abs=1e-9)
    assert ProgressBar().seconds_left(resumed.trainer) == 0
    assert resumed.validated == [(0, batches), (1, batches)]


@pytest.mark.parametrize("at", [(0, 3), (0, 5), (0, -1), (1, 1), (1, 5)])
def test_what_is_saved_after_such_a_resume_goes_on_exactly(at: tuple[int, int], tmp_path: Path) -> None:
    run(tmp_path, 10, save={(0, 1): "half"}, max_epochs=1)
    whole = run(tmp_path, 8, resume="half", save={at: "later", (1, -1): "end"})
    rest = run(tmp_path, 8, resume="later", save={(1, -1): "other"})
    begin = len(whole.batches) - len(rest.batches)
    assert begin > 0
    assert rest.batches == whole.batches[begin:]
    assert rest.steps == whole.steps[begin:]
    ends = [saved(tmp_path, name) for name in ("end", "other")]
    assert all(torch.equal(value, ends[1]["state_dict"][name]) for name, value in ends[0]["state_dict"].items())
    assert ends[0]["position"] == ends[1]["position"]


def test_another_size_twice_in_an_epoch(tmp_path: Path) -> None:
    first = run(tmp_path, 10, save={(0, 1): "half"}, max_epochs=1).batches[:2]
    second = run(tmp_path, 8, resume="half", save={(0, 3): "more"}, max_epochs=1).batches[:1]
    third = run(tmp_path, 5, resume="more", max_epochs=1).batches
    assert [row for _, _, rows in [*first, *second, *third] for row in rows] == order(0)[:48]


def test_a_step_that_was_entered_late_divides_by_its_own_samples(tmp_path: Path) -> None:
    """And a checkpoint in the middle of it says that it begins where it was entered."""
    run(tmp_path, 10, save={(0, 2): "half"}, max_epochs=1)
    run(tmp_path, 10, resume="half", save={(0, 3): "whole"}, max_epochs=1)
    run(tmp_path, 5, 4, resume="half", save={(0, 6): "middle", (0, 7): "parts"}, max_epochs=1)
    parts, whole = (saved(tmp_path, name)["state_dict"] for name in ("parts", "whole"))
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-6)
    middle = saved(tmp_path, "middle")["position"]
    assert (middle["batch"], middle["samples"]) == (6, 30)


@pytest.mark.parametrize(
    ("interval", "at", "validated"),
    [
        (0.5, (0, 1), [(0, 5), (0, 10), (1, 5), (1, 10)]),  # was due, is not any more
        (0.5, (0, -1), [(0, 5), (0, 10), (1, 5), (1, 10)]),  # was done
        (0.4, (0, 1), [(0, 4), (0, 8), (1, 4), (1, 8)]),  # is still due
        (0.4, (0, -1), [(0, 8), (1, 4), (1, 8)]),
        (4, (0, 1), [(0, 4), (0, 8), (1, 4), (1, 8)]),  # was not due, is now
        (3, (0, 1), [(0, 6), (0, 9), (1, 3), (1, 6), (1, 9)]),
    ],
)
def test_validations_are_due_by_the_new_batches(
    interval: float, at: tuple[int, int], validated: list[tuple[int, int]], tmp_path: Path
) -> None:
    run(tmp_path, 10, save={at: "half"}, max_epochs=1, val_check_interval=interval)
    assert saved(tmp_path)["position"]["samples"] == 20
    resumed = run(tmp_path, 5, resume="half", val_check_interval=interval)
    assert resumed.validated == validated
    assert resumed.rows(0) == order(0)[20:]


def test_validations_that_count_batches_of_all_epochs(tmp_path: Path) -> None:
    options: dict[str, Any] = {"val_check_interval": 7, "check_val_every_n_epoch": None}
    run(tmp_path, 10, save={(1, 1): "half"}, max_epochs=2, **options)
    resumed = run(tmp_path, 5, resume="half", max_epochs=3, **options)
    assert resumed.validated == [(1, 4), (2, 1), (2, 8)]  # after batches 14, where it was entered, 21 and 28
    resumed = run(tmp_path, 5, resume="half", max_epochs=3, **{**options, "val_check_interval": 8})
    assert resumed.validated == [(1, 6), (2, 4)]


def test_limited_epochs(tmp_path: Path) -> None:
    run(tmp_path, 10, save={(0, 0): "half"}, max_epochs=1, limit_train_batches=3)
    resumed = run(tmp_path, 5, resume="half", limit_train_batches=6)
    assert resumed.rows(0) == order(0)[10:30]
    assert resumed.rows(1) == order(1)[:30]
    assert resumed.batches[0][1] == 2


def test_a_schedule_that_ends_with_a_step_counts_steps(tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_epochs": None, "max_steps": 8}
    run(tmp_path, 10, save={(0, 1): "half"}, **options)
    resumed = run(tmp_path, 5, resume="half", **options)
    assert [step for step, _ in resumed.steps] == [3, 4, 5, 6, 7, 8]
    rates = [0.5 * lr_multiplier(step, 8, COSINE) for step in range(3, 9)]
    assert [rate for _, rate in resumed.steps] == pytest.approx(rates)


def test_an_older_checkpoint_is_resumed_by_batches(tmp_path: Path) -> None:
    whole = run(tmp_path, 10, save={(0, 1): "half"})
    state = saved(tmp_path)
    del state["position"]
    torch.save(state, tmp_path / "old.ckpt")
    assert run(tmp_path, 10, resume="old").batches == whole.batches[2:]


@pytest.mark.parametrize(
    ("changes", "field", "parts"),
    [
        ({"rows": 60}, "data.source", ["has 60 samples, but had 50", "resume with the same data"]),
        ({"seed": 4}, "seed_everything", ["seed is 4, but was 3", "seed_everything 3"]),
    ],
)
def test_another_order_is_refused_in_the_middle_of_an_epoch(
    changes: dict[str, Any], field: str, parts: list[str], tmp_path: Path
) -> None:
    run(tmp_path, 10, save={(0, 1): "half", (0, -1): "end"}, max_epochs=1)
    with pytest.raises(TrunklineError) as caught:
        run(tmp_path, 10, resume="half", **changes)
    assert caught.value.field == field
    assert all(part in str(caught.value) for part in parts)
    resumed = run(tmp_path, 5, resume="end", **changes)  # after its last batch nothing of it is left
    assert {epoch for epoch, _, _ in resumed.batches} == {1}
    assert len(resumed.batches) == changes.get("rows", ROWS) // 5


class ByTokens(CloudData):
    """Batches of rows of like length, limited by tokens: by as many as `batch_size` says."""

    def token_batches(self, split: str) -> TokenBatches | None:
        lengths = np.arange(ROWS) % 24 + 1
        return TokenBatches(lengths, self.batch_size) if split == "train" else None


def test_batches_limited_by_tokens_are_never_cut_otherwise_in_the_middle(tmp_path: Path) -> None:
    whole = run(tmp_path, 96, save={(0, 1): "half", (0, -1): "end"}, data=ByTokens)
    assert saved(tmp_path)["position"]["samples"] is None
    rest = run(tmp_path, 96, 2, resume="half", data=ByTokens)
    assert rest.batches == whole.batches[2:]
    with pytest.raises(TrunklineError, match="limited to 48 tokens or frames and an epoch has 17"):
        run(tmp_path, 48, resume="half", data=ByTokens)
    rest = run(tmp_path, 48, resume="end", data=ByTokens)
    assert [(epoch, batch) for epoch, batch, _ in rest.batches] == [(1, n) for n in range(17)]
    rest = run(tmp_path, 10, resume="end")
    assert rest.rows(1) == order(1)
    assert rest.rows(0) == []


CUT = EpochCut(samples=100, seed=0, batches=12, batch_size=None, batch_tokens=64)


@pytest.mark.parametrize(
    ("now", "message"),
    [
        (EpochCut(100, 0, 9, None, 80), "limited to 80 tokens or frames and an epoch has 9"),
        (
            EpochCut(100, 0, 13, None, 64),
            "limited to 64 tokens or frames and an epoch has 13",
        ),  # rows are cut elsewhere
        (EpochCut(100, 0, 10, 10, None), "limited to samples and an epoch has 10"),
    ],
)
def test_other_borders_are_refused_where_tokens_limit_batches(now: EpochCut, message: str) -> None:
    with pytest.raises(TrunklineError, match=message) as caught:
        check_same_order(CUT, now)
    assert caught.value.field == "data.batch_*s"
    check_same_order(CUT, CUT)
