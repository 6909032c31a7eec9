"""Fixed positions are computed anew: they are in no checkpoint and in no average of weights."""

import math

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

from trunkline import TrunklineError
from trunkline.modules.networks.positions import RelativeBias, SinusoidalPositions


def test_values_are_those_of_the_paper() -> None:
    module = SinusoidalPositions(8)
    positions = torch.tensor([[0, 3], [49, 7]])
    expected = [
        [[wave(p / 10_000 ** (2 * i / 8)) for wave in (math.sin, math.cos) for i in range(4)] for p in row]
        for row in positions.tolist()
    ]
    torch.testing.assert_close(module(positions), torch.tensor(expected))


def test_values_with_end_are_those_of_whisper() -> None:
    module = SinusoidalPositions(8, with_end=True)
    frequencies = [10_000 ** (-i / 3) for i in range(4)]
    expected = [[wave(p * f) for wave in (math.sin, math.cos) for f in frequencies] for p in (0, 3, 49)]
    torch.testing.assert_close(module(torch.tensor([0, 3, 49])), torch.tensor(expected))


def test_an_average_of_weights_keeps_them_exactly() -> None:
    """Else a resumed run, whose positions are computed anew, would not validate as before."""
    module = torch.nn.Sequential(SinusoidalPositions(8), torch.nn.Linear(8, 8))
    average = AveragedModel(module, avg_fn=get_ema_avg_fn(0.9), use_buffers=True)
    for _ in range(5):
        average.update_parameters(module)
    positions = torch.arange(50)
    assert torch.equal(average.module[0](positions), module[0](positions))
    assert not module[0].state_dict()


@pytest.mark.parametrize("decay", [0.9, 0.999, 0.9999])
def test_an_average_of_weights_keeps_the_relative_bias(decay: float) -> None:
    module = torch.nn.Sequential(RelativeBias(4))
    average = AveragedModel(module, avg_fn=get_ema_avg_fn(decay), use_buffers=True)
    for _ in range(5):
        average.update_parameters(module)
    torch.testing.assert_close(average.module[0](60), module[0](60))


def test_on_the_device_of_the_positions() -> None:
    assert SinusoidalPositions(8)(torch.arange(2, device="meta")).device.type == "meta"


def test_odd_width() -> None:
    with pytest.raises(TrunklineError, match="even dim, not 7"):
        SinusoidalPositions(7)
