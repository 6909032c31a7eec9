"""A linear probe: what the states between the blocks say, without any training of the network."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@torch.no_grad()
def features(network: nn.Module, pictures: Tensor, blocks: list[int]) -> Tensor:
    """(B, C, height, width) -> (B, blocks * D): the mean state of the patches after each of the blocks."""
    maps = network.forward_intermediates(pictures, indices=blocks, norm=True, intermediates_only=True)
    return torch.cat([states.mean(dim=(2, 3)) for states in maps], dim=1)


def fit_probe(inputs: Tensor, labels: Tensor, penalty: float = 1e-3) -> Tensor:
    """Weights (D + 1, classes) of a ridge regression on the labels."""
    x, y = F.pad(inputs.double(), (0, 1), value=1.0), F.one_hot(labels).double()
    return torch.linalg.solve(x.T @ x + penalty * torch.eye(x.shape[1], dtype=x.dtype), x.T @ y)


def probe_accuracy(weights: Tensor, inputs: Tensor, labels: Tensor) -> float:
    """Part of the rows whose label the probe names."""
    found = (F.pad(inputs.double(), (0, 1), value=1.0) @ weights).argmax(dim=1)
    return (found == labels).double().mean().item()
