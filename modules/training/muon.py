"""Muon: momentum made orthogonal, in batches of equal shapes, and in shares over the processes. Needs only torch."""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from heapq import heapify, heapreplace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from trunkline.modules.training.distributed import gather_rows, local_rows, rows_before


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al., 2024) for groups with `muon=True`, AdamW for the others.

    A matrix is updated with the semi-orthogonal matrix nearest to its momentum, scaled so that the entries are as large
    as in an AdamW update (arXiv:2502.16982): so both methods use the same learning rate and decay. All matrices of the
    same shape are orthogonalised together, in as many kernel calls as a single matrix needs. Of a sharded matrix (a
    DTensor) each process gathers the whole momentum, orthogonalises it, and updates its own rows.

    Group keys: `muon`, `splits` (number of equal matrices in a fused projection), `lr`, `weight_decay`, `momentum`,
    `betas`, `eps`. If its attribute `found_inf`, a scalar on the device, is 1, a step changes nothing.

    Args:
        params: parameters or groups.
        shared: all processes of the default group hold the same weights and gradients, and all step: then each
            orthogonalises only its share of the matrices, and receives the rest (`orthogonalize_shared`). Every process
            keeps the whole momentum, so that a checkpoint of one of them is complete.
        defaults: group keys for groups that do not state them.
    """

    shared = False  # of the class, because what a copy or a pickle of an optimiser holds is only its groups and state

    def __init__(self, params: Any, *, shared: bool = False, **defaults: Any) -> None:
        # `fused` makes load_state_dict move AdamW's step counts to the parameters' device.
        super().__init__(params, {"muon": True, "splits": 1, "fused": True, **defaults})
        self.shared = shared

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        owners: list[tuple[Tensor, dict[str, Any]]] = []
        matrices: list[Tensor] = []
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            if not group["muon"]:
                self._adamw(params, group)
                continue
            for p, nesterov in zip(params, self._momentum(params, group), strict=True):
                owners.append((p, group))
                matrices += gather_rows(nesterov, p).reshape(group["splits"], -1, p.shape[-1]).unbind()
        whole = not any(isinstance(p, DTensor) for p, _ in owners)
        updates = iter(orthogonalize_shared(matrices) if self.shared and whole else orthogonalize_each(matrices))
        alike: dict[tuple[int, torch.Size], list[tuple[Tensor, Tensor]]] = defaultdict(list)
        groups = {id(group): group for _, group in owners}
        for p, group in owners:
            parts = [next(updates) for _ in range(group["splits"])]
            update = parts[0] if len(parts) == 1 else torch.cat(parts)
            weight, first = local_rows(p), rows_before(p)
            own = update.reshape(p.shape)[first : first + len(weight)].to(p.dtype)
            alike[id(group), parts[0].shape].append((weight, own))
        for (key, shape), pairs in alike.items():
            weights, own_updates = ([pair[i] for pair in pairs] for i in range(2))
            self._update(groups[key], 0.2 * math.sqrt(max(shape)), weights, own_updates)
        return loss

    def _momentum(self, params: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        """Update the momenta of a group, and return those of Nesterov: of sharded ones, this process's rows."""
        for p in params:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        gradients = [local_rows(p.grad) for p in params if p.grad is not None]
        # Older checkpoints have a matrix each for the parts of a fused projection.
        momenta = [
            local_rows(self.state[p]["momentum_buffer"]).view_as(gradient)
            for p, gradient in zip(params, gradients, strict=True)
        ]
        skip: Tensor | None = getattr(self, "found_inf", None)
        if skip is not None:  # then the momentum stays as it is
            pairs = zip(momenta, gradients, strict=True)
            gradients = [torch.where(skip > 0, momentum, gradient) for momentum, gradient in pairs]
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        return list(torch._foreach_lerp(gradients, momenta, group["momentum"]))

    def _update(self, group: dict[str, Any], scale: float, weights: list[Tensor], updates: list[Tensor]) -> None:
        """Let weights of the same group and shape decay, and step by `scale` times the updates."""
        lr, decay = group["lr"], group["lr"] * group["weight_decay"]
        skip: Tensor | None = getattr(self, "found_inf", None)
        if skip is None:
            torch._foreach_mul_(weights, 1 - decay)
            torch._foreach_add_(weights, updates, alpha=-lr * scale)
        else:
            torch._foreach_mul_(weights, 1 - (1 - skip) * decay)
            torch._foreach_mul_(updates, (skip - 1) * lr * scale)
            torch._foreach_add_(weights, updates)

    def _adamw(self, params: list[Tensor], group: dict[str, Any]) -> None:
        for p in params:
            if not self.state[p]:
                self.state[p]["step"] = torch.zeros((), device=p.device)
                self.state[p]["exp_avg"] = torch.zeros_like(p)
                self.state[p]["exp_avg_sq"] = torch.zeros_like(p)
        held = [self.state[p] for p in params]
        adamw(
            [local_rows(p) for p in params],
            [local_rows(p.grad) for p in params if p.grad is not None],
            [local_rows(s["exp_avg"]) for s in held],
            [local_rows(s["exp_avg_sq"]) for s in held],
            [],
            [s["step"] for s in held],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
            found_inf=getattr(self, "found_inf", None),
        )


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the device has instructions for bfloat16 matrix products: NVIDIA's since Ampere, and AMD's."""
    if device.type == "cpu":  # PyTorch for macOS has no such operator
        return hasattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported") and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return device.type == "cuda" and (bool(torch.version.hip) or torch.cuda.get_device_capability(device) >= (8, 0))


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """Make matrices nearly semi-orthogonal, by a quintic Newton-Schulz iteration.

    Args:
        matrices: (N, rows, columns).
        steps: iterations; after 5 the singular values lie between about 0.7 and 1.2.
    """
    # bfloat16 is precise enough, and at least twice as fast where the device multiplies it natively.
    x = matrices.bfloat16() if multiplies_bfloat16(matrices.device) else matrices.float()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        poly = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, poly, x, beta=3.4445)
    return x.mT if tall else x


def orthogonalize_each(matrices: Sequence[Tensor]) -> list[Tensor]:
    """The matrices (rows, columns) made nearly semi-orthogonal, all of one shape in one `orthogonalize`."""
    alike: dict[tuple[torch.Size, torch.device], list[int]] = defaultdict(list)
    for number, matrix in enumerate(matrices):
        alike[matrix.shape, matrix.device].append(number)
    found: dict[int, Tensor] = {}
    for numbers in alike.values():
        results = orthogonalize(torch.stack([matrices[number] for number in numbers]))
        found.update(zip(numbers, results.unbind(), strict=True))
    return [found[number] for number in range(len(matrices))]


def orthogonalize_shared(matrices: Sequence[Tensor]) -> list[Tensor]:
    """The same as `orthogonalize_each`, but each process computes a share, and one collective exchanges the results.

    All processes must call this with the same matrices, on one device each. They receive the same bytes, so that their
    weights stay identical.
    """
    if not matrices:
        return []
    processes, own = dist.get_world_size(), dist.get_rank()
    owners = equal_shares([matrix.numel() * min(matrix.shape) for matrix in matrices], processes)
    lengths = [0] * processes
    for matrix, owner in zip(matrices, owners, strict=True):
        lengths[owner] += matrix.numel()
    device = matrices[0].device
    # Devices of several kinds may compute in different types; what they exchange must have one.
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    sent = torch.zeros(max(lengths), dtype=dtype, device=device)
    computed = orthogonalize_each([m for m, owner in zip(matrices, owners, strict=True) if owner == own])
    if computed:
        torch.cat([matrix.flatten().to(dtype) for matrix in computed], out=sent[: lengths[own]])
    received = sent.new_empty(processes * len(sent))
    dist.all_gather_into_tensor(received, sent)
    rests = list(received.view(processes, -1).unbind())
    found = []
    for matrix, owner in zip(matrices, owners, strict=True):
        found.append(rests[owner][: matrix.numel()].view(matrix.shape))
        rests[owner] = rests[owner][matrix.numel() :]
    return found


def equal_shares(costs: Sequence[int], processes: int) -> list[int]:
    """Which process does each piece of work, so that all have about as much: the dearest first, to who has least.

    At worst the busiest process has 4/3 of what it would have with the best assignment (Graham, 1969).
    """
    loads = [(0, process) for process in range(processes)]
    heapify(loads)
    owners = [0] * len(costs)
    for number in sorted(range(len(costs)), key=lambda number: -costs[number]):  # stable: the same in each process
        load, owners[number] = loads[0]
        heapreplace(loads, (load + costs[number], owners[number]))
    return owners
