"""Learning-rate schedules against hand-made values and the papers' formulas; settings that contradict each other."""

import math
from typing import Any

import pytest

from trunkline import TrunklineError
from trunkline.modules.training.optim import OptimizerConfig, lr_multiplier

COSINE = {0: 1 / 3, 1: 2 / 3, 2: 1.0, 4: 0.5 + math.sqrt(2) / 4, 6: 0.5, 8: 0.5 - math.sqrt(2) / 4, 10: 0.0, 12: 0.0}
WSD = {0: 1 / 3, 1: 2 / 3, 2: 1.0, 5: 1.0, 6: 1.0, 7: 0.75, 8: 0.5, 9: 0.25, 10: 0.0, 11: 0.0}
CONSTANT = {0: 1 / 3, 1: 2 / 3, 2: 1.0, 9: 1.0, 10: 1.0, 1000: 1.0}


@pytest.mark.parametrize("warmup", [2, 2.0, 0.2])
@pytest.mark.parametrize("final", [0.0, 0.1])
@pytest.mark.parametrize(("schedule", "values"), [("cosine", COSINE), ("wsd", WSD), ("constant", CONSTANT)])
def test_schedules(schedule: Any, values: dict[int, float], final: float, warmup: float) -> None:
    config = OptimizerConfig(schedule=schedule, warmup=warmup, decay_fraction=0.4, final_lr=final)
    for step, value in values.items():
        want = value if step < 2 else final + (1 - final) * value  # the warm-up starts from 0 all the same
        assert lr_multiplier(step, 10, config) == pytest.approx(want, abs=1e-12), step


def test_warmup() -> None:
    def first(warmup: float, total: int = 1000) -> list[float]:
        config = OptimizerConfig(schedule="constant", warmup=warmup)
        return [lr_multiplier(step, total, config) for step in range(5)]

    assert first(0) == [1.0] * 5
    assert first(1) == [0.5, 1.0, 1.0, 1.0, 1.0]  # 1 is one step, not all of them
    assert first(4) == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert first(0.004) == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


@pytest.mark.parametrize(
    ("schedule", "warmup"), [("cosine", 5), ("wsd", 0), ("constant", 0.1), ("cosine", 0.1), ("inverse_sqrt", 0.1)]
)
def test_endless_training_needs_a_schedule_without_end(schedule: Any, warmup: float) -> None:
    with pytest.raises(TrunklineError, match=r"set trainer\.max_epochs or trainer\.max_steps"):
        lr_multiplier(0, math.inf, OptimizerConfig(schedule=schedule, warmup=warmup))


def test_endless_training_at_a_constant_rate() -> None:
    config = OptimizerConfig(schedule="constant", warmup=3)
    assert [lr_multiplier(step, math.inf, config) for step in (0, 2, 3, 10**9)] == [0.25, 0.75, 1.0, 1.0]


def paper_rate(step: int, warmup: int, dim: int = 512) -> float:
    """Equation 3 of arXiv:1706.03762; steps count from 1."""
    return dim**-0.5 * min(step**-0.5, step * warmup**-1.5)


@pytest.mark.parametrize(("warmup", "total"), [(4000, math.inf), (4000, 100_000), (0.04, 100_000), (1, 100)])
def test_inverse_square_root_is_the_paper_s(warmup: float, total: float) -> None:
    steps = int(warmup * total) if warmup < 1 else int(warmup)
    config = OptimizerConfig(schedule="inverse_sqrt", warmup=warmup, lr=paper_rate(steps, steps))
    for step in (1, 2, 1000, 3999, 4000, 4001, 16_000, 99_999):
        assert config.lr * lr_multiplier(step - 1, total, config) == pytest.approx(paper_rate(step, steps), rel=1e-12)
    assert lr_multiplier(steps - 1, total, config) == 1.0
    assert lr_multiplier(4 * steps - 1, total, config) == pytest.approx(0.5)


def test_inverse_square_root_with_less_than_one_step_of_warmup() -> None:
    config = OptimizerConfig(schedule="inverse_sqrt", warmup=0.05)
    assert [lr_multiplier(step, 10, config) for step in (0, 3)] == pytest.approx([1.0, 0.5])


@pytest.mark.parametrize(
    ("options", "field", "message"),
    [
        ({"schedule": "inverse_sqrt", "warmup": 0}, "warmup", r"inverse_sqrt needs a warm-up, but warmup is 0; give"),
        ({"name": "muon", "rms_scaled": True}, "rms_scaled", r"only with adamw, not with muon; set name to adamw, or"),
        ({"name": "sgd", "rms_scaled": True}, "rms_scaled", r"only with adamw, not with sgd"),
    ],
)
def test_fields_that_contradict_each_other(options: dict[str, Any], field: str, message: str) -> None:
    with pytest.raises(TrunklineError, match=message) as caught:
        OptimizerConfig(**options)
    assert caught.value.field == f"model.optimizer.{field}"
