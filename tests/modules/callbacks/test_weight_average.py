"""The average of the weights: its numbers, and where its counter lies."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, LambdaCallback
from tiny import batches, classifier, fit, trainer, weights
from torch import Tensor
from torch.utils.data import DataLoader

from trunkline import TrunklineError
from trunkline.modules.callbacks import WeightAverage
from trunkline.modules.training.exact_resume import averages_of


class Trace(Callback):
    """The weights after each step."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        self.weights.append(weights(pl_module))


@pytest.mark.parametrize(("every", "start"), [(1, 0), (2, 0), (1, 2)])
def test_against_a_loop_in_float64(every: int, start: int, tmp_path: Path) -> None:
    model, trace = classifier(), Trace()
    fit(model, tmp_path, batches(6), callbacks=[trace, WeightAverage(0.8, every, start)])
    averaged = [step for n, step in enumerate(trace.weights) if n >= start and n % every == 0]
    for name, found in weights(model).items():
        want = averaged[0][name].double()
        for step in averaged[1:]:
            want = 0.8 * want + 0.2 * step[name].double()
        torch.testing.assert_close(found.double(), want, rtol=1e-5, atol=1e-7)


def test_goes_on_from_lightning_s_callback(tmp_path: Path) -> None:
    """A run that began with Lightning's own average and goes on with ours is one average."""
    data: Any = DataLoader(batches(3), batch_size=None)  # type: ignore[arg-type]
    whole, model = classifier(), classifier()
    trainer(tmp_path, callbacks=[EMAWeightAveraging(decay=0.8)], max_epochs=2).fit(whole, data)
    save = LambdaCallback(on_train_epoch_end=lambda trainer, module: trainer.save_checkpoint(tmp_path / "half.ckpt"))
    trainer(tmp_path, callbacks=[EMAWeightAveraging(decay=0.8), save], max_epochs=1).fit(classifier(), data)
    later = trainer(tmp_path, callbacks=[WeightAverage(0.8)], max_epochs=2)
    later.fit(model, data, ckpt_path=tmp_path / "half.ckpt", weights_only=False)
    for name, found in weights(model).items():
        torch.testing.assert_close(found, weights(whole)[name], rtol=1e-5, atol=1e-6)


def test_the_host_counts() -> None:
    """PyTorch reads the number of averaged steps in every step, so it must not lie on the device."""
    callback, model = WeightAverage(), classifier().to("meta")
    callback.setup(L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False), model, "fit")
    (average,) = averages_of([callback])
    assert average.n_averaged.device.type == "cpu"
    assert {p.device.type for p in average.module.parameters()} == {"meta"}


@pytest.mark.parametrize(
    ("arguments", "field"), [({"decay": 1.5}, "decay"), ({"update_every_n_steps": 0}, "update_every_n_steps")]
)
def test_arguments_out_of_range(arguments: dict[str, Any], field: str) -> None:
    with pytest.raises(TrunklineError, match=field):
        WeightAverage(**arguments)
