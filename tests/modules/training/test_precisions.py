"""Training in each precision: what is scaled for float16 is unscaled before it is clipped, logged and used."""

import math
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from sharded_runs import half
from torch import Tensor
from torch.utils.data import DataLoader

from trunkline.modules.objectives.image_classifier import ImageClassifier
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
    weights, logged = fit(optimizer, tmp_path, plugins=[half(2.0**10)])
    expected, unscaled = fit(optimizer, tmp_path, plugins=[half(1.0)])
    torch.testing.assert_close(weights, expected, rtol=0, atol=2e-3)  # small gradients are rounded less with a scale
    assert logged["train/grad_norm"] == pytest.approx(unscaled["train/grad_norm"], rel=1e-2)
    assert logged["train/grad_norm"] > 0.5
    assert logged["train/skipped_steps"] == 0


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_step_that_overflows_is_left_out(optimizer: str, tmp_path: Path) -> None:
    """It does not count as divergence, the scale falls, and the count is logged."""
    torch.manual_seed(0)
    start = tiny.weights(ImageClassifier(tiny.vit()))
    plugin = half(2.0**60)
    weights, logged = fit(optimizer, tmp_path, plugins=[plugin])
    assert plugin.scaler is not None
    assert plugin.scaler.get_scale() == 2.0**56
    assert logged["train/skipped_steps"] == 4
    assert all(torch.equal(weights[name], start[name]) for name in start if not name.startswith("head"))


def test_the_count_of_left_out_steps_is_resumed(tmp_path: Path) -> None:
    """Where the scaler has halved its scale, it has left out a step, whatever the accumulation."""
    torch.manual_seed(0)
    file, plugin = tmp_path / "a.ckpt", half(2.0**22)
    options: dict[str, Any] = {"log_every_n_steps": 1, "gradient_clip_val": 0.5}
    first = tiny.fit(ImageClassifier(tiny.vit()), tmp_path, tiny.batches(8), plugins=[plugin], **options)
    assert plugin.scaler is not None
    halved = 22 - math.log2(plugin.scaler.get_scale())
    assert 0 < halved < 8
    assert first.callback_metrics["train/skipped_steps"] == halved
    first.save_checkpoint(file)
    overflowing = half(2.0**60)
    more = tiny.trainer(tmp_path, max_epochs=2, plugins=[overflowing], enable_model_summary=False, **options)
    rows = DataLoader(tiny.batches(8), batch_size=None)  # type: ignore[arg-type]
    more.fit(ImageClassifier(tiny.vit()), rows, ckpt_path=file, weights_only=True)
    assert overflowing.scaler is not None
    more_halved = math.log2(plugin.scaler.get_scale()) - math.log2(overflowing.scaler.get_scale())
    assert more.callback_metrics["train/skipped_steps"] == halved + more_halved


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_bfloat16(optimizer: str, tmp_path: Path) -> None:
    exact, expected = fit(optimizer, tmp_path)
    for precision, dtype in (("bf16-mixed", torch.float32), ("bf16-true", torch.bfloat16)):
        weights, logged = fit(optimizer, tmp_path, precision=precision)
        assert {weight.dtype for weight in weights.values()} == {dtype}
        assert logged["train/loss"] == pytest.approx(expected["train/loss"], rel=0.1)
        for name, weight in weights.items():
            torch.testing.assert_close(weight.float(), exact[name], rtol=0.02, atol=0.05)
