"""The limit of rows that training replaces: counted over processes, the same after a resume, and all end together."""

import re
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from holey_data import HoleyData, holey
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging
from recorded_run import Run
from tiny import classifier, trainer, vit, weights

from trunkline import TrunklineError
from trunkline.datamodules.samplers import SampleKey
from trunkline.modules.callbacks import GracefulStop, SkippedRows
from trunkline.modules.training.checkpoints import SafeCheckpointIO


class Rows(Callback):
    """Rows and pixels of each step."""

    def __init__(self) -> None:
        self.seen: dict[int, tuple[list[int], float]] = {}

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        self.seen[trainer.global_step] = (batch["index"].tolist(), float(batch["image"].double().sum()))


def train(folder: Path, data: HoleyData, *callbacks: Callback, checkpoint: Path | None = None, **options: Any) -> Any:
    settings = {"max_epochs": 2, "plugins": [SafeCheckpointIO()], "num_sanity_val_steps": 0, **options}
    model = classifier(vit())
    fitted = trainer(folder, callbacks=[GracefulStop(), *callbacks], limit_val_batches=0, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fitted.fit(model, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    return model


def skipped_in(data: HoleyData, rows: Rows, steps: range) -> int:
    return sum(index in data.holes for step in steps for index in rows.seen[step][0])


def test_an_epoch_may_have_as_many(tmp_path: Path) -> None:
    """The limit is not reached by the sum of two epochs."""
    data, count, rows = holey(), SkippedRows(), Rows()
    total = len(holey_rows(data))
    data.max_skipped = total
    train(tmp_path, data, count, rows)
    per_epoch = len(rows.seen) // 2
    assert count.limit == total
    assert count.state_dict() == {"epoch": 1, "count": skipped_in(data, rows, range(per_epoch + 1, 2 * per_epoch + 1))}
    assert count.count > total / 2


def holey_rows(data: HoleyData) -> list[int]:
    """Of the training rows."""
    data.setup("fit")
    return [row for row in range(len(data.datasets["train"])) if row in data.holes]  # type: ignore[arg-type]


@pytest.mark.parametrize(("limit", "rows"), [(12, 12), (0.01, 10), (0.0, 0)])
def test_one_more_ends_the_run_after_the_step_is_saved(limit: float, rows: int, tmp_path: Path) -> None:
    data, seen, count = holey(max_skipped=limit), Rows(), SkippedRows()
    callbacks = (count, seen, EMAWeightAveraging(decay=0.5))
    with pytest.raises(TrunklineError, match=rf"of which max_skipped allows {rows}; the last ones: \d+") as error:
        train(tmp_path, data, *callbacks)
    assert error.value.field == "data.max_skipped"
    last = max(seen.seen)
    found = skipped_in(data, seen, range(1, last))
    assert str(error.value).startswith(f"{found} rows of epoch 0 cannot be read")
    assert skipped_in(data, seen, range(1, last - 1)) <= rows < found  # the host learns of it one step later
    named = [int(row) for row in re.findall(r"\d+", re.findall(r"the last ones: ([\d, ]+)", str(error.value))[0])]
    assert set(named) == {
        row for step in (last - 2, last - 1) if step in seen.seen for row in seen.seen[step][0] if row in data.holes
    }
    state = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)
    assert state["global_step"] == last


def test_rows_and_count_are_the_same_after_a_resume(tmp_path: Path) -> None:
    """A replaced row is replaced by the same one, and the run goes on to the same weights."""
    whole, count, half = Rows(), SkippedRows(), 22  # within the second epoch
    model = train(tmp_path, holey(max_skipped=0.5), count, whole, Saver(half))
    resumed, again = Rows(), SkippedRows()
    other = train(tmp_path, holey(max_skipped=0.5), again, resumed, checkpoint=tmp_path / "half.ckpt")
    assert len(whole.seen) / 2 < half < len(whole.seen)
    assert resumed.seen == {step: seen for step, seen in whole.seen.items() if step > half}
    assert count.count > 0
    assert again.state_dict() == count.state_dict()
    assert all(torch.equal(weights(model)[name], value) for name, value in weights(other).items())


class Saver(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(Path(trainer.default_root_dir, "half.ckpt"))


def test_without_skip_corrupt_the_first_one_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(TrunklineError, match="cannot read row"):
        train(tmp_path, holey(skip_corrupt=False), SkippedRows())


def test_data_without_such_rows_is_not_counted(tmp_path: Path) -> None:
    count = SkippedRows()
    data = holey(skip_corrupt=False)
    data.holes = frozenset()
    train(tmp_path, data, count, max_epochs=1)
    assert count.limit is None
    assert count.state_dict() == {"epoch": 0, "count": 0}


def test_the_limit_is_in_range() -> None:
    with pytest.raises(TrunklineError, match="max_skipped") as error:
        holey(max_skipped=-1)
    assert error.value.field == "data.max_skipped"


def test_a_row_is_a_function_of_its_key() -> None:
    items = []
    for _ in range(2):
        data = holey()
        data.setup("fit")
        dataset: Any = data.datasets["train"]
        dataset[SampleKey(0, 4)]  # whatever was read before
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            items.append([dataset[SampleKey(epoch, 15)] for epoch in (0, 1)])
    assert all(item["skipped"] == 1 for pair in items for item in pair)
    for epoch in (0, 1):
        np.testing.assert_array_equal(items[0][epoch]["image"], items[1][epoch]["image"])
    assert not np.array_equal(items[0][0]["image"], items[0][1]["image"])


RECIPE = """
model:
  class_path: ImageClassifier
  init_args: {network: {patch_size: 4, backbone: {dim: 16, depth: 1, num_heads: 2}}}
data:
  class_path: test_skipped_rows.HoleyData
  init_args:
    {source: digits, image_size: 8, channels: 1, batch_size: 20, num_workers: 0, skip_corrupt: true, max_skipped: 7}
trainer:
  {accelerator: cpu, devices: 2, strategy: ddp, max_epochs: 2, enable_progress_bar: false, limit_val_batches: 0}
name: holey
test_with: none
"""


def test_two_processes_end_together(tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    run = Run(["fit", "--config", "tiny.yaml"], tmp_path, 2)
    codes, text = run.wait(), " ".join(run.output().split())
    assert codes == [2, 2], text
    assert "Traceback" not in text
    found = re.findall(r"error: (\d+) rows of epoch 0 cannot be read .*? allows 7; the last ones: ([\d, ]+)\.", text)
    assert len(found) == 2
    assert found[0] == found[1]
    assert int(found[0][0]) > 7
    stopped = re.search(r"stopped after step (\d+); saved (\S+)", text)
    assert stopped
    assert torch.load(tmp_path / stopped[2], weights_only=True)["global_step"] == int(stopped[1])
