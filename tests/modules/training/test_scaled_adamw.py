"""AdamW with the relative step size of Adafactor, against a loop in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trunkline.modules.networks import ViT, ViTConfig
from trunkline.modules.training.optim import OptimizerConfig, ScaledAdamW, build_optimizer

SETTINGS: dict[str, Any] = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1}


class SlowScaledAdamW:
    """One float64 matrix; Adam's arithmetic is that of its paper (arXiv:1412.6980)."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight.detach().double().clone()
        self.mean, self.square, self.count = torch.zeros_like(self.weight), torch.zeros_like(self.weight), 0

    def step(self, gradient: Tensor, lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
        self.count += 1
        gradient = gradient.double()
        size = sum(float(x) ** 2 for x in self.weight.flatten()) / self.weight.numel()
        scale = max(1e-3, size**0.5)
        self.mean = betas[0] * self.mean + (1 - betas[0]) * gradient
        self.square = betas[1] * self.square + (1 - betas[1]) * gradient**2
        mean, square = self.mean / (1 - betas[0] ** self.count), self.square / (1 - betas[1] ** self.count)
        self.weight = self.weight - lr * weight_decay * self.weight - lr * scale * mean / (square.sqrt() + eps)


def train(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], plan: list[Tensor], step: int) -> None:
    for p, gradients in zip(parameters, plan, strict=True):
        p.grad = gradients[step].clone()
    optimizer.step()


def test_against_slow_reference() -> None:
    """Matrices of several sizes, a vector, a scalar, zeros, fused projections, and groups of different rates."""
    shapes = [((6, 10), 1, 0), ((10,), 1, 1), ((), 1, 0), ((4, 3), 1, 1), ((18, 10), 3, 0), ((12, 4), 2, 1)]
    parameters = [nn.Parameter(torch.randn(shape) * 10.0 ** (i - 2)) for i, (shape, _, _) in enumerate(shapes)]
    with torch.no_grad():
        parameters[3].zero_()
        parameters[4][:6] *= 100  # the matrices of a fused projection may differ in size
    choices = [{}, {"lr": 0.1, "weight_decay": 0.0}]
    groups = [
        {"params": [p], "splits": splits, **choices[at]} for p, (_, splits, at) in zip(parameters, shapes, strict=True)
    ]
    optimizer = ScaledAdamW(groups, **SETTINGS)
    parts = [list(p.chunk(n)) if n > 1 else [p] for p, (_, n, _) in zip(parameters, shapes, strict=True)]
    slow = [[SlowScaledAdamW(matrix) for matrix in matrices] for matrices in parts]
    plan = [torch.randn(6, *p.shape) for p in parameters]
    for step in range(6):
        train(optimizer, parameters, plan, step)
        for matrices, gradients, (_, splits, at) in zip(slow, plan, shapes, strict=True):
            pieces = gradients[step].chunk(splits) if splits > 1 else [gradients[step]]
            for matrix, gradient in zip(matrices, pieces, strict=True):
                matrix.step(gradient, **{**SETTINGS, **choices[at]})
        for p, matrices in zip(parameters, slow, strict=True):
            want = torch.cat([m.weight for m in matrices]) if len(matrices) > 1 else matrices[0].weight
            torch.testing.assert_close(p.detach().double(), want, rtol=1e-5, atol=1e-7)


def test_weights_of_size_one_make_it_adamw() -> None:
    """The factor is then 1."""
    ours, theirs = nn.Parameter(torch.ones(8, 4)), nn.Parameter(torch.ones(8, 4))
    optimizers = ScaledAdamW([ours], **SETTINGS), torch.optim.AdamW([theirs], **SETTINGS)
    for p, optimizer in zip((ours, theirs), optimizers, strict=True):
        train(optimizer, [p], [torch.full((1, 8, 4), 0.3)], 0)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("factor", [1e-2, 1e2])
def test_a_larger_weight_takes_a_larger_step(factor: float) -> None:
    """Rescaling weights and gradients alike rescales the path; AdamW's would not change."""
    start, plan = torch.randn(5, 3), torch.randn(4, 5, 3)
    paths = []
    for scale in (1.0, factor):
        p = nn.Parameter(start * scale)
        optimizer = ScaledAdamW([p], **{**SETTINGS, "eps": 0.0})
        for step in range(4):
            train(optimizer, [p], [plan * scale], step)
        paths.append(p.detach() / scale)
    torch.testing.assert_close(paths[0], paths[1], rtol=1e-4, atol=1e-5)


def test_parameters_without_gradients_stay_and_the_loss_is_returned() -> None:
    p, idle = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    optimizer = ScaledAdamW([{"params": [p]}, {"params": [idle]}], **SETTINGS)

    def closure() -> Tensor:
        loss = p.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 4.0
    assert (p < 1).all()
    assert (idle == 1).all()
    assert idle not in optimizer.state


def test_late_parameters_count_their_own_steps() -> None:
    """A parameter that first gets a gradient at the second step has Adam's correction of a first step then."""
    late, early = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = ScaledAdamW([late, early], **{**SETTINGS, "weight_decay": 0.0})
    train(optimizer, [early], [torch.ones(1, 3)], 0)
    first = 1 - early.detach().clone()
    train(optimizer, [late, early], [torch.ones(1, 3)] * 2, 0)
    torch.testing.assert_close(1 - late.detach(), first)


def test_build_optimizer() -> None:
    network = ViT(ViTConfig(image_size=8, patch_size=4, num_classes=3))
    config = OptimizerConfig(lr=0.3, betas=(0.7, 0.8), eps=1e-5, rms_scaled=True, weight_decay=0.2)
    optimizer = build_optimizer(network, config)
    assert type(optimizer) is ScaledAdamW
    assert {(group["lr"], group["betas"], group["eps"]) for group in optimizer.param_groups} == {
        (0.3, (0.7, 0.8), 1e-5)
    }
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.2}
    splits = {p: group["splits"] for group in optimizer.param_groups for p in group["params"]}
    fused = {name for name, p in network.named_parameters() if splits[p] == 3}
    assert fused == {f"backbone.blocks.{i}.attn.qkv.weight" for i in range(12)}
    assert set(splits.values()) == {1, 3}
