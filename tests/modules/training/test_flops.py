"""FLOP of a step that are counted on a real call."""

from typing import Any

import pytest
import torch
from tiny import batches, classifier, vit

from trunkline.modules.callbacks.throughput import flops_of
from trunkline.modules.objectives.base import TrunklineModule
from trunkline.modules.training.flops import counted_flops, training_flops


def test_the_default_counts_what_the_network_itself_tells() -> None:
    model = classifier(vit())
    (batch,) = batches(1)
    model.frozen = [model.network.patch_embed]
    model.train()
    modes, state = {name: m.training for name, m in model.named_modules()}, torch.get_rng_state()
    want = training_flops(model.network, batch["image"])
    assert TrunklineModule.flops_per_batch(model, batch) == want == model.flops_per_batch(batch) > 0
    assert {name: m.training for name, m in model.named_modules()} == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())


def test_a_failing_count_restores_the_modes() -> None:
    model = classifier(vit())
    with pytest.raises(ZeroDivisionError):
        counted_flops(model.network, lambda: 1 // 0)
    assert all(m.training for m in model.network.modules())


def test_a_failing_count_is_one_line(capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    class Own:
        def flops_per_batch(self, batch: Any) -> int:
            raise NotImplementedError("no such operation")

    assert flops_of(Own(), {}) == 0  # type: ignore[arg-type]
    said = caplog.text + capsys.readouterr().err
    assert "flops_per_sec is left out: counting failed with NotImplementedError: no such operation" in said
