"""Optimisers, parameter groups and learning-rate schedules. Needs only torch."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from trunkline import TrunklineError
from trunkline.modules.backbone import Transformer
from trunkline.modules.backbone.attention import Attention
from trunkline.modules.backbone.transformer import MLP
from trunkline.modules.networks.base import Network
from trunkline.modules.training.distributed import local_rows, norms_over_processes, rows_before
from trunkline.modules.training.muon import Muon
from trunkline.ranges import check_ranges

SMALLEST_SCALE = 1e-3
"""Lower limit of the factor of `ScaledAdamW`, so that weights that start at zero can learn."""


@dataclass
class OptimizerConfig:
    """Optimiser and learning-rate schedule. Every schedule counts optimiser steps, never epochs.

    Raises:
        TrunklineError: if a value is out of its range, or if two fields contradict each other; the message names them.
    """

    name: Literal["adamw", "muon", "sgd"] = "adamw"
    """`muon` is used for the matrices in the trunk's blocks; all other parameters then use AdamW."""
    lr: float = 1e-3
    """Peak learning rate."""
    weight_decay: float = 0.05
    """Decay of linear weights; norms, biases, embeddings and tokens never decay. Decoupled, except with `sgd`."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay rates of the first and second moment."""
    eps: float = 1e-8
    """Added to AdamW's denominator."""
    momentum: float = 0.95
    """Nesterov momentum of Muon and SGD."""
    layer_decay: float = 1.0
    """The rate of each block is the rate of the block above times this (arXiv:2106.08254); 1 means equal rates."""
    schedule: Literal["cosine", "wsd", "constant", "inverse_sqrt"] = "cosine"
    """After the warm-up: `cosine` falls to `final_lr`; `wsd` (warm-up-stable-decay) stays constant, then falls linearly
    to `final_lr`; `constant` stays constant; `inverse_sqrt` is lr * sqrt(warmup / step) (arXiv:1706.03762)."""
    warmup: float = 0.05
    """Linear warm-up: a fraction of all steps if below 1, else a number of steps."""
    decay_fraction: float = 0.2
    """Share of all steps in which `wsd` decays."""
    final_lr: float = 0.0
    """Learning rate at the end, as a fraction of the peak."""
    rms_scaled: bool = False
    """Only with `adamw`: multiply the step of each matrix by the root mean square of its entries (at least 0.001), as
    Adafactor does (arXiv:1804.04235). `lr` is then relative to the weights; nanoT5 uses 0.02 (arXiv:2309.02373)."""
    muon_shared: bool = True
    """Only with `muon` under DDP: each process computes the updates of its share of the matrices and receives those of
    the other processes, so that P processes need a P-th of the time; else each computes all. The results differ by
    rounding alone. Set it to false where the gradients of the processes differ, as in local SGD."""
    skip_nonfinite: int = 0
    """Steps of a run whose loss or gradient is not finite and that are left out; the one after them ends the run."""

    def __post_init__(self) -> None:
        check_ranges(
            "model.optimizer",
            self,
            lr="[0, inf)",
            weight_decay="[0, inf)",
            betas="[0, 1)",
            eps="[0, inf)",
            momentum="[0, 1)",
            layer_decay="(0, inf)",
            warmup="[0, inf)",
            decay_fraction="[0, 1]",
            final_lr="[0, inf)",
            skip_nonfinite="[0, inf)",
        )
        if self.rms_scaled and self.name != "adamw":
            raise TrunklineError(
                f"rms_scaled works only with adamw, not with {self.name}; set name to adamw, or rms_scaled to false",
                field="model.optimizer.rms_scaled",
            )
        if self.schedule == "inverse_sqrt" and self.warmup <= 0:
            raise TrunklineError(
                f"inverse_sqrt needs a warm-up, but warmup is {self.warmup:g}; give its steps, such as 4000",
                field="model.optimizer.warmup",
            )


class ScaledAdamW(torch.optim.Optimizer):
    """AdamW whose step for each matrix is multiplied by the root mean square of its entries (at least 0.001).

    This is the relative step size of Adafactor (arXiv:1804.04235) with the moments of AdamW, as in nanoT5
    (arXiv:2309.02373). Each matrix of a fused projection has its own factor, as if it were stored alone. The decay is
    that of AdamW, without the factor.

    Group keys: `splits` (number of equal matrices in a fused projection), `lr`, `weight_decay`, `betas`, `eps`. If its
    attribute `found_inf`, a scalar on the device, is 1, a step changes nothing.
    """

    def __init__(self, params: Any, **defaults: Any) -> None:
        # `fused` makes load_state_dict move the step counts to the parameters' device.
        super().__init__(params, {"splits": 1, "fused": True, **defaults})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        skip: Tensor | None = getattr(self, "found_inf", None)
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            matrices = [matrix for p in params for matrix in self._matrices(p, group)]
            sizes = [p.numel() / group["splits"] for p in params for _ in range(group["splits"])]
            weights = [matrix[0] for matrix in matrices]
            # The kernel reads a float32 rate on the device, so that no step waits for the accelerator.
            rates = norms_over_processes(torch._foreach_norm(weights, dtype=torch.float32), params[0])
            torch._foreach_div_(rates, [math.sqrt(size) for size in sizes])
            torch._foreach_clamp_min_(rates, SMALLEST_SCALE)
            torch._foreach_mul_(rates, group["lr"])
            if group["weight_decay"]:
                decay = group["lr"] * group["weight_decay"]
                torch._foreach_mul_(weights, 1 - decay if skip is None else 1 - (1 - skip) * decay)
            # A fused kernel for each matrix, because it has one rate for all that it is given. A chain of foreach
            # operations takes five times as long on a CPU, and would multiply by the rates one by one on a GPU too.
            for rate, (weight, gradient, exp_avg, exp_avg_sq, step) in zip(rates, matrices, strict=True):
                adamw(
                    [weight],
                    [gradient],
                    [exp_avg],
                    [exp_avg_sq],
                    [],
                    [step],
                    fused=True,
                    amsgrad=False,
                    beta1=group["betas"][0],
                    beta2=group["betas"][1],
                    lr=rate,
                    weight_decay=0.0,
                    eps=group["eps"],
                    maximize=False,
                    found_inf=skip,
                )
        return loss

    def _matrices(self, p: Tensor, group: dict[str, Any]) -> list[tuple[Tensor, ...]]:
        """(weight, gradient, first moment, second moment, step count) of each matrix in a parameter, as views.

        Of a sharded matrix they have only this process's rows, which may be none.
        """
        splits, state = group["splits"], self.state[p]
        if not state:
            state["step"] = torch.zeros(splits, device=p.device)
            state["exp_avg"] = torch.zeros_like(p)
            state["exp_avg_sq"] = torch.zeros_like(p)
        assert p.grad is not None
        held = [local_rows(tensor) for tensor in (p, p.grad, state["exp_avg"], state["exp_avg_sq"])]
        if splits > 1:
            first, rows = rows_before(p), len(held[0])
            ends = [min(max(p.shape[0] * n // splits - first, 0), rows) for n in range(splits + 1)]
            parts = [[tensor[a:b] for a, b in pairwise(ends)] for tensor in held]
        else:
            parts = [[tensor] for tensor in held]
        return list(zip(*parts, state["step"].unbind(), strict=True))


class RowwiseAdamW(torch.optim.AdamW):
    """torch's AdamW, but of sharded tensors the kernel is given this process's rows: it avoids the cost of DTensors."""

    def _init_group(self, group: dict[str, Any], *lists: list[Tensor]) -> Any:
        found = super()._init_group(group, *lists)
        for tensors in lists:
            tensors[:] = [local_rows(tensor) for tensor in tensors]
        return found


def parameter_groups(network: Network, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Sort the trainable parameters into groups with the same learning rate, decay and method.

    A parameter's kind follows from the module that owns it, not from its name: only weights of linear layers decay, and
    Muon updates only those inside a trunk's blocks. A weight that is shared with an embedding counts as an embedding.
    Muon and `rms_scaled` treat each matrix of a fused projection alone (`splits`).
    With `layer_decay`, block i of a trunk of depth n has the rate lr * layer_decay**(n - i), embeddings
    lr * layer_decay**(n + 1), heads and final norms lr.

    Raises:
        TrunklineError: if every parameter is frozen.
    """
    embeddings = {p for m in network.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    decays = {m.weight for m in network.modules() if isinstance(m, nn.Linear)} - embeddings
    outputs = {p for m in network.output_modules() for p in m.parameters()}
    below_top: dict[nn.Parameter, int] = dict.fromkeys(outputs - embeddings, 0)
    splits: dict[Tensor, int] = {}
    depth = 0
    for trunk in (m for m in network.modules() if isinstance(m, Transformer)):
        depth = max(depth, len(trunk.blocks))
        below_top.update(dict.fromkeys(trunk.norm.parameters(), 0))
        for i, block in enumerate(trunk.blocks):
            below_top.update(dict.fromkeys(block.parameters(), len(trunk.blocks) - i))
            splits |= {m.weight: 1 for m in block.modules() if isinstance(m, nn.Linear)}
            splits |= {
                w: n for m in block.modules() if isinstance(m, Attention | MLP) for w, n in m.fused_projections()
            }
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for p in network.parameters():
        if not p.requires_grad:
            continue
        lr = config.lr * config.layer_decay ** below_top.get(p, depth + 1)
        decay = config.weight_decay if p in decays else 0.0
        muon = config.name == "muon" and p in splits
        split = splits.get(p, 1) if config.name == "muon" or config.rms_scaled else 1
        group = groups.setdefault((lr, decay, muon, split), {"params": [], "lr": lr, "weight_decay": decay})
        group["params"].append(p)
        if config.name == "muon":
            group.update(muon=muon, splits=split)
        elif config.rms_scaled:
            group.update(splits=split)
    if not groups:
        raise TrunklineError("every parameter is frozen; lower freeze_blocks, or give the network a head (num_classes)")
    return list(groups.values())


def decay_groups(
    network: Network, lr: float, weight_decay: float = 0.05, layer_decay: float = 1.0, no_decay: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Parameter groups for any optimiser of torch: the decay and the rates per layer of `parameter_groups`.

    They are those of timm's `param_groups_layer_decay`, but for final norms, which timm counts to the last block.

    `torch.optim.AdamW(decay_groups(network, lr=1e-4, layer_decay=0.75))`

    Args:
        network: the network; its frozen parameters are left out.
        lr: the rate of heads and final norms; the blocks below have smaller ones.
        weight_decay: decay of the weights of linear layers.
        layer_decay: the rate of each block is the rate of the block above times this (arXiv:2106.08254).
        no_decay: names of more parameters that do not decay, with `*` for any text.

    Returns:
        Groups with the keys `params`, `lr` and `weight_decay`.

    Raises:
        TrunklineError: if every parameter is frozen, for a value out of its range, or if a name in `no_decay` fits no
            parameter.
    """
    names = {p: name for name, p in network.named_parameters()}
    unknown = [pattern for pattern in no_decay if not any(fnmatchcase(name, pattern) for name in names.values())]
    if unknown:
        raise TrunklineError(f"no_decay names {', '.join(unknown)}, but the network has no such parameter")
    found = []
    for group in parameter_groups(
        network, OptimizerConfig(lr=lr, weight_decay=weight_decay, layer_decay=layer_decay, schedule="constant")
    ):
        spared = [p for p in group["params"] if any(fnmatchcase(names[p], pattern) for pattern in no_decay)]
        held = set(spared)
        kept = [p for p in group["params"] if p not in held]
        found += [{**group, "params": kept}] if kept else []
        found += [{**group, "params": spared, "weight_decay": 0.0}] if spared else []
    return found


def build_optimizer(network: Network, config: OptimizerConfig, replicated: bool = False) -> torch.optim.Optimizer:
    """Make the configured optimiser for the network's parameter groups.

    Args:
        network: the network.
        config: the optimiser; its schedule is not used.
        replicated: whether all processes of `torch.distributed` hold the same weights and gradients.
    """
    groups = parameter_groups(network, config)
    if config.name == "muon":
        settings = {"lr": config.lr, "momentum": config.momentum, "betas": config.betas, "eps": config.eps}
        return Muon(groups, shared=replicated and config.muon_shared, weight_decay=0.0, **settings)
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=config.momentum > 0)
    if config.rms_scaled:
        return ScaledAdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=0.0)
    return RowwiseAdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def lr_multiplier(step: int, total_steps: float, config: OptimizerConfig) -> float:
    """Learning rate of optimiser step `step` (from 0), as a fraction of the peak.

    Raises:
        TrunklineError: if the schedule needs to know the last step, but the training has no end.
    """
    endless = math.isinf(total_steps)
    if endless and (config.schedule in ("cosine", "wsd") or 0 < config.warmup < 1):
        raise TrunklineError(
            "this schedule needs to know where training ends; set trainer.max_epochs or trainer.max_steps, "
            "or schedule: constant or inverse_sqrt with warmup in steps"
        )
    warmup = config.warmup * total_steps if 0 < config.warmup < 1 else config.warmup
    if config.schedule == "inverse_sqrt":
        count, warmup = step + 1, max(warmup, 1.0)  # the paper counts from 1, and reaches the peak at step `warmup`
        return min(count / warmup, math.sqrt(warmup / count))
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if config.schedule == "constant":
        return 1.0
    if config.schedule == "cosine":
        progress = min((step - warmup) / max(total_steps - warmup, 1), 1.0)
        return config.final_lr + (1 - config.final_lr) * 0.5 * (1 + math.cos(math.pi * progress))
    decay_steps = config.decay_fraction * total_steps
    remaining = min(max(total_steps - step, 0) / max(decay_steps, 1), 1.0)
    return config.final_lr + (1 - config.final_lr) * remaining
