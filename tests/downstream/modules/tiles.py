"""Pictures of tiles in four patterns, under noise."""

import torch
from torch import Tensor

PATTERNS = ("rows", "columns", "checks", "plain")


def make_tiles(count: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Pictures (count, 3, size, size) and the numbers of their patterns (count,)."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % len(PATTERNS)
    stripes = (torch.arange(size) // 2 % 2 * 2.0 - 1.0)[:, None].expand(size, size)  # two pixels wide
    patterns = torch.stack((stripes, stripes.T, stripes * stripes.T, torch.zeros(size, size)))
    noise = torch.randn(count, 1, size, size, generator=generator)
    return (patterns[labels][:, None] + noise).expand(-1, 3, -1, -1).contiguous(), labels
