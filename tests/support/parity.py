"""Helpers of the parity tests."""

from typing import Any

import torch
from torch import Tensor, nn


def randomise(module: nn.Module, scale: float = 0.2) -> Any:
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn_like(p), alpha=scale)
    return module


def assert_near(got: Tensor, want: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
