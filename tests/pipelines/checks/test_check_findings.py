"""What each check of `trunkline check` finds: on numbers made up here, and in trials of tasks with one fault each."""

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from faulty_tasks import own_config
from torch import Tensor, nn

from trunkline import TrunklineError
from trunkline.pipelines.checks.agreement import Agreement, compare_steps, explain_difference, step_trial
from trunkline.pipelines.checks.check import Finding, check_agreement, check_overfit
from trunkline.pipelines.checks.estimates import bytes_of, cost_trial, estimate_rows
from trunkline.pipelines.checks.overfit import explain_standstill, learnt, overfit_trial
from trunkline.pipelines.checks.parameters import parameter_faults, parameter_figures
from trunkline.pipelines.checks.resume import Resumed, comparable, explain_resume, state_differences
from trunkline.pipelines.checks.trial import Trial
from trunkline.pipelines.checks.trial_process import Still, TrialCLI


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["trunkline"])


def result_of(
    trial: Trial, folder: Path, model: str = "own_task.CloudClassifier", data: str = "own_task.CloudData"
) -> Any:
    """Of a trial in this process."""
    config = folder / "own.yaml"
    config.write_text("\n".join(own_config(model, data)))
    TrialCLI(trial, ["fit", "--config", str(config)], "own", folder)
    return trial.observer.result


# --- agreement


def step(**changed: Any) -> dict[str, Any]:
    gradients: dict[str, Tensor | None] = {"a": torch.full((4,), 2.0), "b": torch.full((2,), 1e-9), "c": None}
    return {"loss": 2.0, "rows": [3, 1, 2, 0], "gradients": gradients, "batch_norms": [], **changed}


def halves(**changed: Any) -> list[dict[str, Any]]:
    return [step(loss=1.5, rows=[0, 2], **changed), step(loss=2.5, rows=[1, 3], **changed)]


def test_steps_that_agree() -> None:
    """The mean of the processes' losses, all of their rows in any order, the gradient that they share."""
    assert compare_steps(step(), halves()) == Agreement(True, 0.0, 0.0, "")
    assert compare_steps(step(), halves()).passed
    rounding = {"a": torch.full((4,), 2.0) * (1 + 1e-6), "b": torch.full((2,), -1e-9), "c": None}
    found = compare_steps(step(), halves(gradients=rounding))
    assert found.passed  # the sign of `b` is rounding
    assert 1e-7 < found.gradient < 2e-6


@pytest.mark.parametrize(
    ("other", "worst", "message"),
    [
        ({"loss": 1.502}, "", "the loss differs by 5.0e-04"),
        ({"loss": math.nan}, "", "the loss differs by nan"),
        ({"gradients": {"a": torch.full((4,), 2.0), "b": torch.full((2,), 1e-4)}}, "b", "the gradient of b by 3.5e-04"),
        ({"gradients": {"a": torch.full((4,), 2.0), "b": torch.full((2,), math.nan)}}, "b", "the gradient of b by nan"),
        ({"gradients": {"a": None, "b": torch.full((2,), 1e-9)}}, "a", "the gradient of a by 9.1e-01"),
        ({"rows": [0, 1]}, "", "2 processes got other rows than one process"),
    ],
)
def test_steps_that_do_not(other: dict[str, Any], worst: str, message: str) -> None:
    alone, others = step(), halves()
    for result in (alone, *others):
        del result["gradients"]["c"]
    others[0] |= other
    found = compare_steps(alone, others)
    assert not found.passed
    assert found.worst == worst
    assert message in explain_difference(found, "2 processes", alone)


def test_a_parameter_without_gradient_explains_what_ddp_leaves_out() -> None:
    found = Agreement(True, 0.0, 1.0, "a")
    assert "c got no gradient at all, and DDP" in explain_difference(found, "2 processes", step())
    assert "DDP" not in explain_difference(found, "2 accumulated parts", step())


def test_a_sound_task_agrees(tmp_path: Path) -> None:
    """Dropout is off, and 24 rows in 2 parts are the rows of one batch of 24."""
    alone = result_of(step_trial(), tmp_path)
    parts = result_of(step_trial(parts=2), tmp_path)
    found = compare_steps(alone, [parts])
    assert found.passed, found
    assert len(alone["rows"]) == 24
    assert parts["rows"] == alone["rows"][::2] + alone["rows"][1::2]
    assert all(gradient.any() for gradient in alone["gradients"].values())  # also behind the new head of zeros
    assert parameter_faults(alone) == []
    assert (alone["device"], alone["devices"]) == ("cpu", 2)


def test_a_loss_without_its_count_is_found(tmp_path: Path) -> None:
    alone, parts = (result_of(step_trial(parts=n), tmp_path, "faulty_tasks.SumOfSums") for n in (1, 2))
    found = compare_steps(alone, [parts])
    assert found.same_rows
    assert found.loss == pytest.approx(0.5, abs=1e-3)
    assert not found.passed
    assert "must return the sum over the rows and their count" in explain_difference(
        found, "2 accumulated parts", alone
    )


def agreement_of(model: str, folder: Path) -> Finding:
    """The row of one process and two accumulated parts."""
    (row,) = check_agreement(InProcess(folder, model), result_of(step_trial(), folder, model), 1)
    return row


class InProcess:
    """Stands for a `Workbench`: runs trials of one process in this one."""

    def __init__(self, folder: Path, model: str, **changed: Any) -> None:
        self.folder, self.model, self.changed = folder, model, changed

    def run(self, trial: Trial) -> list[Any]:
        return [result_of(replace(trial, **self.changed), self.folder, self.model)]


@pytest.mark.parametrize("model", ["Shifted", "ShiftedTerm"])
def test_a_loss_is_compared_whatever_its_name(model: str, tmp_path: Path) -> None:
    """Its gradients are right."""
    row = agreement_of(f"faulty_tasks.{model}", tmp_path)
    assert row.passed is False
    apart = re.fullmatch(r"loss (\S+), gradients (\S+) apart \(at most 1e-05\)", row.figures)
    assert apart is not None
    assert float(apart[1]) > 1e-3
    assert float(apart[2]) < 1e-5
    assert f"2 accumulated parts: the loss differs by {apart[1]}" in row.advice


def test_statistics_of_the_batch_are_those_of_training(tmp_path: Path) -> None:
    """In evaluation mode they would be constants, and everything would agree."""
    row = agreement_of("faulty_tasks.Normed", tmp_path)
    assert row.passed is False
    apart = re.fullmatch(r"loss (\S+), gradients (\S+) apart \(at most 1e-05\)", row.figures)
    assert apart is not None
    assert float(apart[2]) > 1e-3
    assert "network.norm normalise by the statistics" in row.advice
    assert "SyncBatchNorm (--trainer.sync_batchnorm true)" in row.advice


def test_a_frozen_batch_norm_stays_frozen() -> None:
    """A task may keep the statistics of its pretrained layers."""
    module = nn.ModuleDict({"frozen": nn.BatchNorm1d(2).eval(), "learns": nn.BatchNorm1d(2), "drop": nn.Dropout()})
    Still().on_train_start(None, module)  # type: ignore[arg-type]
    assert {name: part.training for name, part in module.items()} == {"frozen": False, "learns": True, "drop": False}


def test_the_loss_is_the_sum_of_all_terms(tmp_path: Path) -> None:
    alone, terms = (result_of(step_trial(), tmp_path, m) for m in ("own_task.CloudClassifier", "faulty_tasks.Terms"))
    assert terms["loss"] > alone["loss"] + 1e-2
    assert agreement_of("faulty_tasks.Terms", tmp_path).passed


def test_a_loss_that_nobody_tells_is_not_compared(tmp_path: Path) -> None:
    row = agreement_of("faulty_tasks.Untold", tmp_path)
    assert row.passed is False
    assert row.figures.startswith("loss not compared, gradients ")
    assert "leave `training_step` to TrunklineModule" in row.advice
    (row,) = check_overfit(InProcess(tmp_path, "faulty_tasks.Untold", steps=2), {}, 1)
    assert (row.passed, row.figures) == (False, "loss not compared in 2 steps")
    assert "leave `training_step` to TrunklineModule" in row.advice


# --- parameters


def test_parameters_that_cannot_learn_are_named(tmp_path: Path) -> None:
    unused, dead = parameter_faults(found := result_of(step_trial(), tmp_path, "faulty_tasks.Unused"))
    assert unused.startswith("network.spare.weight, network.spare.bias got no gradient")
    assert dead.startswith("the gradient of network.idle.weight is zero")
    assert parameter_figures(found) == f"{len(found['gradients'])} parameters that learn"
    (ungrouped,) = parameter_faults(result_of(step_trial(), tmp_path, "faulty_tasks.Ungrouped"))
    assert ungrouped.startswith("temperature is in no group of the optimiser")


def test_a_task_without_a_step_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would read epoch after epoch, and wait for its first step."""
    monkeypatch.setattr("trunkline.pipelines.checks.trial_process.IDLE_BATCHES", 7)
    with pytest.raises(TrunklineError, match=r"no optimiser step in 7 batches: where `automatic_optimization`"):
        result_of(step_trial(), tmp_path, "faulty_tasks.Motionless")


def test_many_parameters_are_counted() -> None:
    many = {"gradients": {str(n): None for n in range(9)}, "ungrouped": [], "frozen": 3}
    assert parameter_faults(many)[0].startswith("0, 1, 2, 3, 4 and 4 more got no gradient")
    assert parameter_figures(many) == "9 parameters that learn, 3 frozen"


# --- overfit


@pytest.mark.parametrize(
    ("first", "last", "expected"),
    [(2.0, 0.5, True), (2.0, 0.51, False), (2.0, math.nan, False), (math.nan, 1.0, False), (0.04, 0.04, True)],
)
def test_most_of_the_loss_must_go(first: float, last: float, expected: bool) -> None:
    assert learnt(first, last) is expected


def test_losses_below_zero_must_fall_too() -> None:
    assert learnt(-2.0, -3.5) is True
    assert learnt(0.5, -0.1) is True


def test_a_sound_task_is_learnt_by_heart(tmp_path: Path) -> None:
    found = result_of(replace(overfit_trial(), steps=250), tmp_path)
    assert found["rows"] == 16
    assert found["last"] <= found["first"] / 4
    assert found["steps"] < 250  # it ends as soon as it is learnt


def test_a_network_that_sees_nothing_is_found(tmp_path: Path) -> None:
    found = result_of(replace(overfit_trial(), steps=40), tmp_path, "faulty_tasks.Blind")
    assert found["steps"] == 40
    assert not learnt(found["first"], found["last"])
    assert "the loss of one batch of 16 rows went from 1.1" in explain_standstill(found)
    assert "optimizer.lr" in explain_standstill(found)


class Told:
    """Stands for a `Workbench` whose trial found this."""

    def __init__(self, **result: Any) -> None:
        self.result = {"rows": 16, "steps": 41, **result}

    def run(self, trial: Trial) -> list[Any]:
        return [self.result]


@pytest.mark.parametrize(
    ("first", "last", "figures"),
    [
        (7.66, 1.848, "by 76% (at least 75% expected), 7.66 to 1.848 in 41 steps"),
        (2.0, 3.0, "by -50% (at least 75% expected), 2 to 3 in 41 steps"),
        (-2.0, -3.5, "by 75% (at least 75% expected), -2 to -3.5 in 41 steps"),
        (0.2, 0.0499, "by 75% (at least 75% expected), 0.2 to 0.0499 in 41 steps"),
        (0.04, 0.03, "by 25% to below 0.05, 0.04 to 0.03 in 41 steps"),
        (0.0, 0.0, "by 0% to below 0.05, 0 to 0 in 41 steps"),
    ],
)
def test_the_table_says_what_was_measured(first: float, last: float, figures: str) -> None:
    """Not that the rows are known by heart, which a fall of the loss by 75% does not show."""
    (row,) = check_overfit(Told(first=first, last=last), {}, 1)
    assert (row.what, row.figures) == ("the loss of 16 rows falls", figures)
    assert row.passed == (last != 3.0)
    assert ("should fall by 75%" in row.advice) == (not row.passed)


def test_a_loss_of_another_name_is_learnt(tmp_path: Path) -> None:
    found = result_of(replace(overfit_trial(), steps=30), tmp_path, "faulty_tasks.Shifted")
    assert found["last"] < found["first"]


# --- resume


def test_differences_of_states() -> None:
    a = {"w": torch.tensor([1.0, 2.0]), "n": [1, {"x": torch.ones(2, dtype=torch.int32)}], "s": "same"}
    assert list(state_differences(a, a)) == []
    b = {"w": torch.tensor([1.0, 2.5]), "n": [2, {"x": torch.ones(2)}], "s": "same"}
    found = dict(state_differences(a, b))
    assert found["w"] == 0.25
    assert math.isnan(found["n/0"])
    assert math.isnan(found["n/1/x"])  # of another type
    assert len(found) == 3
    assert [path for path, _ in state_differences({"a": 1}, {"b": 1})] == [""]
    assert [path for path, _ in state_differences([1], [1, 2], "list")] == ["list"]


def test_what_a_resume_may_change_is_left_out(tmp_path: Path) -> None:
    kept = {"ema": {"decay": 0.9}}
    content = {"loops": {"n": 1}, "callbacks": {"ModelCheckpoint": {"dirpath": "/x"}, **kept}, "state_dict": {}}
    torch.save(content, tmp_path / "a.ckpt")
    assert comparable(str(tmp_path / "a.ckpt")) == {"callbacks": kept, "state_dict": {}}


def test_why_checkpoints_differ() -> None:
    parts = [("state_dict/w", 1e-7), ("hparams", math.nan)]
    assert "step 4 trained on other samples" in explain_resume(Resumed(parts, 4, "cpu"))
    assert "deterministic: true" in explain_resume(Resumed(parts, None, "cuda"))
    assert "must save it" in explain_resume(Resumed(parts, None, "cpu"))
    assert "by up to 1.0e-07: state_dict/w, hparams" in explain_resume(Resumed(parts, None, "cpu"))


# --- estimates


def test_bytes_of_shared_memory_count_once() -> None:
    x = torch.zeros(100)
    assert bytes_of([x, x[:10], torch.zeros(3, dtype=torch.float64)]) == 400 + 24


def test_estimates_of_a_run(tmp_path: Path) -> None:
    found = result_of(cost_trial(1), tmp_path)
    weights = found["parts"]["weights"]
    from own_task import CloudConfig, CloudNet

    from trunkline.modules.backbone import TransformerConfig

    network = CloudNet(CloudConfig(3, TransformerConfig(16, 1, 2)))
    assert weights >= 4 * sum(p.numel() for p in network.parameters())
    assert found["parts"]["gradients"] == 4 * sum(p.numel() for p in network.parameters())
    assert found["parts"]["optimiser"] >= 2 * found["parts"]["gradients"]  # two moments, and counts of steps
    assert found["parts"]["average"] == 0
    assert found["parts"]["activations"] > 24 * 24 * 16 * 4  # of a batch of 24 clouds, at least once
    assert found["steps"] == 5  # 120 rows, 24 in a batch
    assert found["checkpoint"] > 3 * found["parts"]["gradients"]
    assert found["step"] > 0
    assert not list(tmp_path.rglob("runs/*/*/checkpoints/*"))


def test_estimates_in_words() -> None:
    parts = {"weights": 2**20, "gradients": 2**20, "average": 0, "activations": 20 * 2**30}
    result = {"parts": parts, "resident": 2**30, "step": 0.5, "steps": 7200.0, "checkpoint": 3 * 2**20}
    rows = estimate_rows(result)
    assert rows["memory of a process"] == (
        "20.0 GiB: weights 1.0 MiB, gradients 1.0 MiB, activations 20.0 GiB; the whole process 1,024.0 MiB at its peak"
    )
    assert rows["a checkpoint"] == "3.0 MiB"
    assert rows["an epoch"] == "60 min: 7,200 steps of 0.5 s, without validation"
    assert estimate_rows({**result, "steps": 72000.0, "step": 1.0})["an epoch"].startswith(
        "20.0 h: 72,000 steps of 1 s"
    )
    assert estimate_rows({**result, "steps": 72.0})["an epoch"].startswith("36 s: ")
