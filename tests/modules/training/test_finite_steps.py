"""Steps whose loss or gradient is not finite: what they leave behind, what is said, and how many are left out."""

import math
import re
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from half_on_cpu import HalfOnCPU
from lightning.pytorch.callbacks import Callback
from recorded_run import Run
from tiny import batches, classifier, trainer, weights
from torch import Tensor
from torch.utils.data import DataLoader

from trunkline import TrunklineError
from trunkline.contract import Loss
from trunkline.modules.objectives.image_classifier import ImageClassifier
from trunkline.modules.training.checkpoints import SafeCheckpointIO
from trunkline.modules.training.finite_steps import FiniteSteps, gradient_norm, spread_fault
from trunkline.modules.training.optim import OptimizerConfig

NAN, INF = float("nan"), float("inf")
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "scaled": {"rms_scaled": True},
    "muon": {"name": "muon"},
    "sgd": {"name": "sgd"},
}


class Faulty(ImageClassifier):
    """Has bad losses at steps: {step: factor of the loss}.

    If `quiet`, the factor is that of the gradient alone; if `still`, it is added to the loss and changes no gradient.
    """

    faults: dict[int, float]
    quiet = still = False

    def loss(self, batch: Any) -> Any:
        found: Any = super().loss(batch)
        factor = self.faults.get(int(batch["index"][0]) // 10, 1.0)
        if factor != 1.0 and self.still:
            return Loss(found.total + factor, found.count)
        if factor != 1.0 and self.quiet:
            return Loss(found.total + _NanGradient.apply(found.total), found.count)
        return Loss(found.total * factor, found.count)


class _NanGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 0

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * INF


class Steps(Callback):
    """The weights and the optimiser's state after each step."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []
        self.states: list[list[Tensor]] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        self.weights.append(weights(pl_module))
        state = trainer.optimizers[0].state
        self.states.append([v.clone() for p in pl_module.parameters() if p in state for v in state[p].values()])


def faulty(faults: dict[int, float], allowed: int = 0, quiet: bool = False, **optimizer: Any) -> Faulty:
    plain = classifier()
    options = {"schedule": "constant", "warmup": 0, "lr": 0.01, "skip_nonfinite": allowed, **optimizer}
    model = Faulty(plain.network.config, optimizer=OptimizerConfig(**options))
    model.network.load_state_dict(plain.network.state_dict())
    model.faults, model.quiet = faults, quiet
    return model


def train(model: Faulty, folder: Path, *callbacks: Callback, count: int = 4, **options: Any) -> L.Trainer:
    """A batch for each step; the rows of batch n are 10 n to 10 n + 3."""
    rows = [{**batch, "index": torch.arange(4) + 10 * n} for n, batch in enumerate(batches(count))]
    settings = {"max_epochs": 1, "plugins": [SafeCheckpointIO()], **options}
    fitted = trainer(folder, callbacks=list(callbacks), **settings)
    fitted.fit(model, DataLoader(rows, batch_size=None))  # type: ignore[arg-type]
    return fitted


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on an accelerator: the host learns of a step at the next one."""
    monkeypatch.setattr(FiniteSteps, "host_may_wait", lambda self, result: False)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("fault", [NAN, INF, "quiet", "still"])
def test_a_bad_step_changes_nothing_and_ends_the_run(fault: Any, optimizer: str, tmp_path: Path) -> None:
    steps = Steps()
    model = faulty({2: fault if isinstance(fault, float) else INF}, **OPTIMIZERS[optimizer])
    model.quiet, model.still = fault == "quiet", fault == "still"
    what = "a gradient" if fault == "quiet" else "the loss"
    message = (
        rf"{what} is not finite by step 2 \(epoch 0\), in batch 2 of the epoch, which has the rows 20, 21, 22, 23;"
    )
    with pytest.raises(TrunklineError, match=message) as error:
        train(model, tmp_path, steps)
    assert error.value.field == "model.optimizer.skip_nonfinite"
    assert len(steps.weights) == 2
    assert all(torch.equal(steps.weights[1][name], value) for name, value in weights(model).items())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("at", ["at once", "late"])
def test_a_step_that_is_left_out_leaves_weights_and_moments(
    at: str, optimizer: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if at == "late":
        request.getfixturevalue("late")
    steps, model = Steps(), faulty({0: NAN, 2: INF}, allowed=2, weight_decay=0.1, **OPTIMIZERS[optimizer])
    start = weights(model)
    with pytest.warns(UserWarning, match="by step 2 .*; left out, as 2 of at most 2"):
        fitted = train(model, tmp_path, steps)
    assert fitted.global_step == 4
    for before, after in ((start, steps.weights[0]), (steps.weights[1], steps.weights[2])):
        assert all(torch.equal(before[name], value) for name, value in after.items())
    assert len(steps.states[1]) == len(steps.states[2]) > 0
    assert all(torch.equal(a, b) for a, b in zip(steps.states[1], steps.states[2], strict=True))
    for a, b in ((0, 1), (2, 3)):  # the others do step
        assert not all(torch.equal(steps.weights[a][name], value) for name, value in steps.weights[b].items())


def test_on_an_accelerator_the_next_step_ends_the_run(late: None, tmp_path: Path) -> None:
    steps, model = Steps(), faulty({1: NAN})
    with pytest.raises(TrunklineError, match=r"the loss is not finite by step 1 .* rows 10, 11, 12, 13;"):
        train(model, tmp_path, steps)
    assert len(steps.weights) == 2  # the third batch was under way
    assert all(torch.equal(steps.weights[0][name], value) for name, value in weights(model).items())


@pytest.mark.parametrize("fault", [NAN, INF])
def test_an_unseen_bad_step_is_not_saved(fault: float, late: None, tmp_path: Path) -> None:
    """Not even by an optimiser that has taken it."""
    model = faulty({3: fault}, name="sgd")
    fitted = train(model, tmp_path)
    assert not all(value.isfinite().all() for value in weights(model).values())
    with pytest.raises(TrunklineError, match="loss is not finite by step 3"):
        fitted.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(TrunklineError, match=r"the weight \S+ is not finite; nothing was saved"):
        fitted.save_checkpoint(tmp_path / "a.ckpt")
    assert not (tmp_path / "a.ckpt").exists()


def test_the_optimiser_is_waited_for_if_it_cannot_leave_a_step_out(late: None, tmp_path: Path) -> None:
    model = faulty({1: NAN}, allowed=1, name="sgd")
    with pytest.warns(UserWarning, match="left out, as 1 of at most 1"):
        train(model, tmp_path)
    assert all(value.isfinite().all() for value in weights(model).values())


def test_one_more_than_allowed_ends_the_run(tmp_path: Path) -> None:
    model = faulty({0: NAN, 1: NAN, 3: NAN}, allowed=2)
    message = r"by step 3 .* 2 such steps were left out before\. Lower optimizer\.lr"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(TrunklineError, match=message):
            train(model, tmp_path)


def test_an_accumulation_names_all_its_batches(tmp_path: Path) -> None:
    message = "by step 1 .* in batch 2, 3 of the epoch, which has the rows 20, 21, 22, 23, 30, 31, 32, 33;"
    with pytest.raises(TrunklineError, match=message):
        train(faulty({2: INF}), tmp_path, accumulate_grad_batches=2)


def test_a_finite_run_is_not_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for watched in (True, False):
        if not watched:
            monkeypatch.setattr(FiniteSteps, "check", lambda *_: None)
            monkeypatch.setattr("trunkline.modules.objectives.base.spread_fault", lambda loss: loss)
        model = faulty({})
        train(model, tmp_path)
        found.append(weights(model))
    assert all(torch.equal(found[0][name], value) for name, value in found[1].items())


def test_with_a_scaler_gradients_may_overflow(tmp_path: Path) -> None:
    """It leaves such steps out by itself and lowers its scale; they are not counted."""
    steps, model = Steps(), faulty({1: NAN}, quiet=True, name="sgd")
    plugin = HalfOnCPU(8.0)
    train(model, tmp_path, steps, precision=None, plugins=[SafeCheckpointIO(), plugin])
    assert model.finite_steps.skipped == 0
    assert plugin.scaler is not None
    assert plugin.scaler.get_scale() == 4.0
    assert all(torch.equal(steps.weights[0][name], value) for name, value in steps.weights[1].items())


@pytest.mark.parametrize("fault", [NAN, INF])
def test_with_a_scaler_a_bad_loss_ends_the_run(fault: float, tmp_path: Path) -> None:
    steps, model = Steps(), faulty({1: fault}, name="sgd")
    with pytest.raises(TrunklineError, match="the loss is not finite by step 1"):
        train(model, tmp_path, steps, precision=None, plugins=[SafeCheckpointIO(), HalfOnCPU(8.0)])
    assert all(torch.equal(steps.weights[0][name], value) for name, value in weights(model).items())


@pytest.mark.parametrize("value", [0.5, -3.0, INF, NAN])
def test_spread_fault(value: float) -> None:
    x = torch.tensor(value, requires_grad=True)
    loss = spread_fault(x * 2)
    loss.backward()
    assert x.grad is not None
    if math.isfinite(value):
        assert (loss.item(), x.grad.item()) == (2 * value, 2.0)
    else:
        assert x.grad.isnan()


def test_gradient_norm() -> None:
    layer = torch.nn.Linear(3, 2)
    layer(torch.ones(4, 3)).sum().backward()
    layer.bias.grad = None
    assert gradient_norm(layer).item() == pytest.approx(math.sqrt(6 * 16))


# --- the number is part of the checkpoint


def test_the_number_left_out_is_resumed(tmp_path: Path) -> None:
    model = faulty({0: NAN, 2: NAN}, allowed=3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(model, tmp_path).save_checkpoint(tmp_path / "a.ckpt")
    assert torch.load(tmp_path / "a.ckpt", weights_only=True)["skipped_steps"] == 2
    again = faulty({}, allowed=3)
    rows = [{**batch, "index": torch.arange(4)} for batch in batches(4)]
    fitted = trainer(tmp_path, max_epochs=1, plugins=[SafeCheckpointIO()])
    fitted.fit(again, DataLoader(rows, batch_size=None), ckpt_path=tmp_path / "a.ckpt", weights_only=True)  # type: ignore[arg-type]
    assert again.finite_steps.skipped == 2


# --- several processes


RECIPE = """
model:
  class_path: ImageClassifier
  init_args:
    network: {patch_size: 4, backbone: {dim: 16, depth: 1, num_heads: 2}}
    optimizer: {skip_nonfinite: SKIP}
data:
  class_path: ImageData
  init_args: {source: digits, image_size: 8, channels: 1, batch_size: 20, num_workers: 0}
trainer:
  accelerator: cpu
  devices: 2
  strategy: ddp
  max_steps: 8
  enable_progress_bar: false
  callbacks+:
    - class_path: test_finite_steps.PoisonOne
test_with: none
"""


class PoisonOne(Callback):
    """Makes the images of a batch infinite in the second of two processes; ends a process of which weights differ."""

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 3 and trainer.global_rank == 1:
            batch["image"].fill_(float("inf"))

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        total = sum(p.detach().double().sum() for p in pl_module.parameters())
        Path(f"weights{trainer.global_rank}").write_text(f"{float(total)!r} {pl_module.finite_steps.skipped}")


@pytest.mark.parametrize("allowed", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_all_processes_act_together(allowed: int, tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(RECIPE.replace("SKIP", str(allowed)))
    run = Run(["fit", "--config", "tiny.yaml"], tmp_path, 2)
    codes, text = run.wait(), " ".join(run.output().split())
    what = (
        r"the loss is not finite by step 3 \(epoch 0\), in batch 3 of the epoch, in process 1, which has the rows \d+"
    )
    if allowed:
        assert codes == [0, 0], text
        totals = [(tmp_path / f"weights{rank}").read_text() for rank in range(2)]
        assert totals[0] == totals[1]
        assert totals[0].endswith(" 1")
        assert len([line for line in text.split("warning: ") if "left out, as 1 of at most 1" in line]) == 1
    else:
        assert codes == [2, 2], text
        assert text.count("error:") == 1
        assert "Traceback" not in text
        assert not list(tmp_path.glob("runs/*/*/checkpoints/*.ckpt"))
        what = f"error: {what}"
    assert re.search(what, text), text
