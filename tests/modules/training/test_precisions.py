"""Training in each precision: what is scaled for float16 is unscaled before it is clipped, logged and used."""

import math
import re
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import tiny
import torch
from half_on_cpu import HalfOnCPU
from lightning.pytorch.callbacks import Callback
from sharded_runs import in_processes
from torch import Tensor
from torch.utils.data import DataLoader

from trunkline import TrunklineError
from trunkline.contract import Loss
from trunkline.files import load_checkpoint
from trunkline.modules.objectives.image_classifier import ImageClassifier
from trunkline.modules.training.checkpoints import SafeCheckpointIO
from trunkline.modules.training.finite_steps import FiniteSteps
from trunkline.modules.training.optim import OptimizerConfig

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {"name": "adamw"},
    "rms_scaled": {"name": "adamw", "rms_scaled": True},
    "muon": {"name": "muon"},
    "sgd": {"name": "sgd"},
}


def fit(optimizer: str, folder: Path, **options: Any) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Weights after four clipped steps, and what was logged."""
    torch.manual_seed(0)
    config = OptimizerConfig(**OPTIMIZERS[optimizer], lr=0.01, eps=1e-3, schedule="constant", warmup=0)
    model = ImageClassifier(tiny.vit(), optimizer=config)
    torch.nn.init.normal_(model.network.head.weight)
    fitted = tiny.fit(model, folder, tiny.batches(4), gradient_clip_val=0.5, log_every_n_steps=1, **options)
    assert fitted.global_step == 4
    return tiny.weights(model), {name: float(value) for name, value in fitted.callback_metrics.items()}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_scale_of_16_mixed_changes_nothing(optimizer: str, tmp_path: Path) -> None:
    """Clipping sees true gradients, and their true norm is logged: as with a scale of 1."""
    weights, logged = fit(optimizer, tmp_path, plugins=[HalfOnCPU(2.0**10)])
    expected, unscaled = fit(optimizer, tmp_path, plugins=[HalfOnCPU(1.0)])
    torch.testing.assert_close(weights, expected, rtol=0, atol=2e-3)  # small gradients are rounded less with a scale
    assert logged["train/grad_norm"] == pytest.approx(unscaled["train/grad_norm"], rel=1e-2)
    assert logged["train/grad_norm"] > 0.5
    assert logged["train/skipped_steps"] == 0


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_step_that_overflows_is_left_out(optimizer: str, tmp_path: Path) -> None:
    """It does not count as divergence, the scale falls, and the count is logged."""
    torch.manual_seed(0)
    start = tiny.weights(ImageClassifier(tiny.vit()))
    plugin = HalfOnCPU(2.0**60)
    weights, logged = fit(optimizer, tmp_path, plugins=[plugin])
    assert plugin.scaler is not None
    assert plugin.scaler.get_scale() == 2.0**56
    assert logged["train/skipped_steps"] == 4
    assert all(torch.equal(weights[name], start[name]) for name in start if not name.startswith("head"))


def test_the_count_of_left_out_steps_is_resumed(tmp_path: Path) -> None:
    """Where the scaler has halved its scale, it has left out a step, whatever the accumulation."""
    torch.manual_seed(0)
    file, plugin = tmp_path / "a.ckpt", HalfOnCPU(2.0**22)
    options: dict[str, Any] = {"log_every_n_steps": 1, "gradient_clip_val": 0.5}
    first = tiny.fit(ImageClassifier(tiny.vit()), tmp_path, tiny.batches(8), plugins=[plugin], **options)
    assert plugin.scaler is not None
    halved = 22 - math.log2(plugin.scaler.get_scale())
    assert 0 < halved < 8
    assert first.callback_metrics["train/skipped_steps"] == halved
    first.save_checkpoint(file)
    overflowing = HalfOnCPU(2.0**60)
    more = tiny.trainer(tmp_path, max_epochs=2, plugins=[overflowing], enable_model_summary=False, **options)
    rows = DataLoader(tiny.batches(8), batch_size=None)  # type: ignore[arg-type]
    more.fit(ImageClassifier(tiny.vit()), rows, ckpt_path=file, weights_only=True)
    assert overflowing.scaler is not None
    more_halved = math.log2(plugin.scaler.get_scale()) - math.log2(overflowing.scaler.get_scale())
    assert more.callback_metrics["train/skipped_steps"] == halved + more_halved


class Overflowing(ImageClassifier):
    """Its gradients are infinite from the second step on, whatever the scale."""

    def loss(self, batch: Any) -> Any:
        found: Any = super().loss(batch)
        if int(batch["index"][0]) > 0:
            logits = self.network(batch["image"])
            logits.register_hook(lambda gradient: gradient * torch.inf)
            return Loss(found.total + logits.sum() * 1e-3, found.count)
        return found


def overflow(folder: Path, allowed: int = 0, count: int = 8, **options: Any) -> tuple[Overflowing, Any]:
    """Fit with a loss scale of 8; batch n has the rows 10 n to 10 n + 3."""
    torch.manual_seed(0)
    config = OptimizerConfig(lr=0.01, schedule="constant", warmup=0, skip_nonfinite=allowed)
    model, plugin = Overflowing(tiny.vit(), optimizer=config), HalfOnCPU(8.0)
    data = [{**batch, "index": torch.arange(4) + 10 * n} for n, batch in enumerate(tiny.batches(count))]
    save = SaveEach(folder)
    try:
        tiny.fit(model, folder, data, plugins=[plugin, SafeCheckpointIO()], callbacks=[save], **options)
    except TrunklineError as error:
        return model, error
    return model, plugin.scaler


class SaveEach(Callback):
    """Saves each step and the end of training."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")

    def on_train_end(self, trainer: L.Trainer, *_: Any) -> None:
        trainer.save_checkpoint(self.folder / "last.ckpt")


@pytest.mark.parametrize("late", [False, True], ids=["at once", "late"])
def test_overflows_that_no_scale_mends_end_the_run(late: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scales of 8, 4 and 2 are tried in steps 1 to 3; at 1 the step is bad, and saving after it is refused."""
    monkeypatch.setattr(FiniteSteps, "host_may_wait", lambda self, result: not late)
    model, error = overflow(tmp_path)
    assert isinstance(error, TrunklineError)
    assert re.match(
        r"a gradient is not finite by step 4 \(epoch 0\) although the loss scale has fallen to 1, in batch 4 of the "
        r"epoch, which has the rows 40, 41, 42, 43; nothing was saved since\. Lower optimizer\.lr",
        str(error),
    )
    assert error.field == "model.optimizer.skip_nonfinite"
    assert model.finite_steps.overflows == 3
    assert sorted(file.name for file in tmp_path.glob("*.ckpt")) == ["1.ckpt", "2.ckpt", "3.ckpt", "4.ckpt"]
    last = load_checkpoint(tmp_path / "4.ckpt")
    assert last["HalfOnCPU"]["scale"] == 1.0
    saved = {name.removeprefix("network."): value for name, value in last["state_dict"].items()}
    for weights in (load_checkpoint(tmp_path / "1.ckpt")["state_dict"], model.state_dict()):
        assert all(torch.equal(saved[name.removeprefix("network.")], value) for name, value in weights.items())


def test_a_run_that_ends_with_its_overflow_saves_nothing_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On an accelerator the host learns of the last step when it saves the end."""
    monkeypatch.setattr(FiniteSteps, "host_may_wait", lambda self, result: False)
    _, error = overflow(tmp_path, count=5)
    assert "by step 4 (epoch 0) although the loss scale" in str(error)
    assert not (tmp_path / "5.ckpt").exists()
    assert not (tmp_path / "last.ckpt").exists()


def test_such_steps_can_be_left_out(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="although the loss scale has fallen to 1, .*; left out, as 2 of at most 2"):
        model, scaler = overflow(tmp_path, allowed=2, count=6)
    assert (model.finite_steps.skipped, model.finite_steps.overflows) == (2, 3)
    assert scaler.get_scale() == 0.25


def overflow_in_one(rank: int, folder: Path) -> None:
    """Overflows that come from the second process alone."""
    if rank == 0:
        Overflowing.loss = ImageClassifier.loss  # type: ignore[method-assign]
    _, error = overflow(folder / str(rank), devices=2, strategy="ddp")
    (folder / f"{rank}.txt").write_text(str(error))


def test_all_processes_end_with_overflows_of_one(tmp_path: Path) -> None:
    in_processes(overflow_in_one, tmp_path)
    texts = [(tmp_path / f"{rank}.txt").read_text() for rank in range(2)]
    assert texts[0] == texts[1]
    assert "a gradient is not finite by step 4 (epoch 0) although the loss scale has fallen to 1" in texts[0]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_bfloat16(optimizer: str, tmp_path: Path) -> None:
    exact, expected = fit(optimizer, tmp_path)
    for precision, dtype in (("bf16-mixed", torch.float32), ("bf16-true", torch.bfloat16)):
        weights, logged = fit(optimizer, tmp_path, precision=precision)
        assert {weight.dtype for weight in weights.values()} == {dtype}
        assert logged["train/loss"] == pytest.approx(expected["train/loss"], rel=0.1)
        for name, weight in weights.items():
            torch.testing.assert_close(weight.float(), exact[name], rtol=0.02, atol=0.05)
