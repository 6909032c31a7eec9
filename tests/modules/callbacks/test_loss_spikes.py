"""Warnings at losses that jump: when there is one, and above all when there is none."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import batches, classifier, trainer
from torch.utils.data import DataLoader

from trunkline.modules.callbacks import LossSpikes


def warned(losses: Any, **options: Any) -> list[str]:
    spikes = LossSpikes(**options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step, loss in enumerate(losses):
            spikes.look(step, float(loss))
    return [str(warning.message) for warning in caught]


def noise(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=count)


def test_a_jump_is_named() -> None:
    losses = 3 + 0.05 * noise(300)
    losses[200] = 4.5
    (message,) = warned(losses)
    assert message.startswith("the loss jumps to 4.5 at step 200; over the last 128 steps its median is 2.999")
    assert "lower optimizer.lr" in message


@pytest.mark.parametrize("kind", ["falling", "warm-up", "heavy tails", "small", "constant", "a step up", "rare"])
def test_what_is_no_spike(kind: str) -> None:
    steps = np.arange(3000)
    losses = {
        "falling": 2 + 8 * np.exp(-steps / 100) + 0.1 * noise(3000),
        "warm-up": np.where(steps < 50, 3 + steps / 50, 4) + 0.1 * noise(3000),  # there is no history yet
        "heavy tails": np.exp(0.5 * noise(3000)),
        "small": 1e-4 * np.exp(0.5 * noise(3000)),
        "constant": np.ones(3000) + 0.19 * (steps == 2000),
        "a step up": 2 + 0.2 * (steps > 1000) + 0.05 * noise(3000),
        "rare": 0.01 + 0.5 * (steps % 40 == 0),  # a few batches are always hard
    }[kind]
    assert warned(losses) == []


def test_nothing_is_said_before_there_is_something_to_compare_with() -> None:
    losses = np.ones(65)
    losses[63] = 100  # after 63 of 128 / 2
    assert warned(losses) == []
    losses[63], losses[64] = 1, 100
    assert len(warned(losses)) == 1


def test_a_pause_follows() -> None:
    losses = np.ones(400)
    losses[[100, 150, 250]] = 50, 500, 5000
    assert len(warned(losses)) == 1
    assert [message.split(";")[0][-3:] for message in warned(losses, pause=100)] == ["100", "250"]


def test_a_run_is_watched(tmp_path: Path) -> None:
    spikes, model = LossSpikes(window=8), classifier()
    fitted = trainer(tmp_path, max_epochs=1, callbacks=[spikes])
    seen: list[float] = []
    loss = type(model).loss

    def louder(batch: Any) -> Any:
        found: Any = loss(model, batch)
        seen.append(1.0)
        return type(found)(found.total * (50 if len(seen) == 10 else 1), found.count)

    model.loss = louder  # type: ignore[method-assign]
    with pytest.warns(UserWarning, match="the loss jumps to .* at step 10; over the last 8 steps"):
        fitted.fit(model, DataLoader(batches(12), batch_size=None))  # type: ignore[arg-type]
    assert len(spikes.losses) == 8
