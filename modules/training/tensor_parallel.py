"""Tensor parallelism: neighbouring processes train on the same samples, each with its share of heads and hidden units.

The share is taken in every block of every trunk, with two sums over the processes in a pass (Megatron-LM,
arXiv:1909.08053).

Only the computation is divided. Weights, gradients and optimiser states stay where `ShardedStrategy` keeps them, in
rows over all processes, and a block's weights are gathered whole when it is computed. So checkpoints are the same with
any size of the groups. What is saved is what attention and MLP keep for the backward pass, and the time to compute it;
and a step can have fewer samples than there are processes. Each process of a group loads the samples itself.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from trunkline import TrunklineError
from trunkline.modules.backbone import Transformer
from trunkline.modules.backbone.attention import Attention
from trunkline.modules.backbone.transformer import MLP

FIELD = "trainer.strategy.tensor_parallel_size"


class TensorGroup:
    """The processes that compute the same samples.

    Args:
        size: number of them.
        rank: number of this process among them.
        group: their process group.
    """

    def __init__(self, size: int, rank: int, group: dist.ProcessGroup | None = None) -> None:
        self.size, self.rank, self.group = size, rank, group
        self.active = False
        """Whether blocks are divided now. All processes of a group must then call them alike."""

    @contextmanager
    def dividing(self) -> Iterator[None]:
        """Divide the blocks that are called inside."""
        before, self.active = self.active, True
        try:
            yield
        finally:
            self.active = before

    def own(self, start: int, stop: int) -> tuple[int, int]:
        """The share of this process in a span."""
        each = (stop - start) // self.size
        return start + self.rank * each, start + (self.rank + 1) * each


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, team: TensorGroup) -> Tensor:
        ctx.team = team
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return _sum(grad_outputs[0], ctx.team).div_(ctx.team.size), None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, team: TensorGroup) -> Tensor:
        ctx.team = team
        return _sum(x, team)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return grad_outputs[0] * ctx.team.size, None


def _sum(x: Tensor, team: TensorGroup) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=team.group)
    return total


# FSDP averages gradients over all processes. For what is outside of the divided parts, which all processes of a group
# compute alike, that is right. Inside, a process has only its share of a gradient, of which the mean would be too small
# by the size of the group. So gradients are multiplied by that size where the backward pass comes in, which makes those
# of all parameters right at once, shared ones too (norms of queries, output biases), and divided where it goes out.


@torch.compiler.disable
def enter(x: Tensor, team: TensorGroup) -> Tensor:
    """Give a tensor that all processes have to a divided part; backward, the mean of their gradients."""
    entered: Tensor = _Enter.apply(x, team)
    return entered


@torch.compiler.disable
def leave(x: Tensor, team: TensorGroup) -> Tensor:
    """The sum of what the processes have computed; backward, their common gradient times their number."""
    left: Tensor = _Leave.apply(x, team)
    return left


class RowsOfLinear(nn.Module):
    """Some outputs of a linear layer.

    Args:
        whole: the layer; its weight is looked up in each call, because FSDP replaces it.
        spans: (first, last + 1) of the outputs, in order.
    """

    def __init__(self, whole: nn.Linear, spans: Sequence[tuple[int, int]]) -> None:
        super().__init__()
        self.whole = whole
        self.out_features = sum(stop - start for start, stop in spans)
        edges = [0, *(edge for span in spans for edge in span), whole.out_features]
        self.sizes = [stop - start for start, stop in pairwise(edges)]
        """Outputs that are left out and taken, by turns."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) -> (..., some outputs)."""
        # Views: a copy of the weights would be kept for the backward pass, where FSDP gathers them again.
        weights = self.whole.weight.split(self.sizes)[1::2]
        bias = self.whole.bias
        biases = [None] * len(weights) if bias is None else bias.split(self.sizes)[1::2]
        parts = [F.linear(x, weight, b) for weight, b in zip(weights, biases, strict=True)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


class ColumnsOfLinear(nn.Module):
    """A linear layer on some of its inputs, with the bias in as many parts as there are processes in a group."""

    def __init__(self, whole: nn.Linear, span: tuple[int, int], parts: int) -> None:
        super().__init__()
        self.whole, self.span, self.parts = whole, span, parts

    def forward(self, x: Tensor) -> Tensor:
        """(..., some inputs) -> (..., outputs)."""
        bias = self.whole.bias
        return F.linear(x, self.whole.weight[:, slice(*self.span)], None if bias is None else bias / self.parts)


def narrowed(whole: nn.Module, layers: dict[str, nn.Module]) -> Any:
    """A module of the same class that has other layers, and shares the rest; `whole` stays as it is."""
    part = copy.deepcopy(whole, {id(child): child for child in whole.children()})  # the children are not copied
    for name, layer in layers.items():
        setattr(part, name, layer)
    return part


def narrow_attention(whole: Attention, team: TensorGroup) -> Attention:
    """The same attention with this process's heads."""
    inner, kv_dim = whole.proj.in_features, whole.kv_dim
    keys_values = [(kv_dim * n, kv_dim * (n + 1)) for n in range(2)]
    layers: dict[str, nn.Module] = {"proj": ColumnsOfLinear(whole.proj, team.own(0, inner), team.size)}
    if hasattr(whole, "kv"):
        layers["q"] = RowsOfLinear(whole.q, [team.own(0, inner)])
        layers["kv"] = RowsOfLinear(whole.kv, [team.own(*span) for span in keys_values])
    else:
        spans = [(0, inner), *((inner + start, inner + stop) for start, stop in keys_values)]
        layers["qkv"] = RowsOfLinear(whole.qkv, [team.own(*span) for span in spans])
    part: Attention = narrowed(whole, layers)
    part.kv_dim = kv_dim // team.size
    return part


def narrow_mlp(whole: MLP, team: TensorGroup) -> MLP:
    """The same MLP with this process's hidden units."""
    hidden, stacked = whole.fc2.in_features, whole.fc1.out_features // whole.fc2.in_features
    spans = [team.own(hidden * n, hidden * (n + 1)) for n in range(stacked)]
    layers = {
        "fc1": RowsOfLinear(whole.fc1, spans),
        "fc2": ColumnsOfLinear(whole.fc2, team.own(0, hidden), team.size),
    }
    part: MLP = narrowed(whole, layers)
    return part


def divide_attention(whole: Attention, team: TensorGroup) -> None:
    """Let an attention compute this process's heads, while the group is active.

    The processes draw the same dropout of attention weights, each for its own heads. Attention weights are returned of
    all heads, so that a call for them is not divided.
    """
    part, plain = narrow_attention(whole, team), whole.forward

    def forward(
        x: Tensor, *, mask: Tensor | None = None, cache: Any = None, return_attention: bool = False, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        if not team.active or cache is not None or return_attention:
            return plain(x, mask=mask, cache=cache, return_attention=return_attention, **options)
        part.training = whole.training
        if mask is not None and mask.shape[1] > 1:
            start, stop = team.own(0, mask.shape[1])
            mask = mask[:, start:stop]
        out, _ = part(enter(x, team), mask=mask, **options)
        return leave(out, team), None

    whole.forward = forward  # type: ignore[method-assign]


def divide_mlp(whole: MLP, team: TensorGroup) -> None:
    """Let an MLP compute this process's hidden units, while the group is active."""
    part, plain = narrow_mlp(whole, team), whole.forward

    def forward(x: Tensor) -> Tensor:
        return leave(part(enter(x, team)), team) if team.active else plain(x)

    whole.forward = forward  # type: ignore[method-assign]


class DividedTrunks:
    """Trunks whose blocks are divided in a group of processes while it is active; names of weights stay as they are.

    Args:
        trunks: changed in place, until `restore`.
        team: the group.
    """

    def __init__(self, trunks: Sequence[Transformer], team: TensorGroup) -> None:
        self.team = team
        self.parts: list[nn.Module] = []
        self.hooks: list[RemovableHandle] = []
        for trunk in trunks:
            self.hooks.append(trunk.register_forward_pre_hook(self._share, with_kwargs=True))
            for block in trunk.blocks:
                for part in block.children():
                    if isinstance(part, Attention):
                        divide_attention(part, team)
                    elif isinstance(part, MLP):
                        divide_mlp(part, team)
                    else:
                        continue
                    self.parts.append(part)

    def _share(self, trunk: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, Any] | None:
        """Add up gradients of what all blocks of a trunk read once, instead of in each block."""
        if not self.team.active:
            return None
        for name in ("context", "mask", "context_mask"):
            given = options.get(name)
            if given is not None and given.requires_grad:
                options = {**options, name: enter(given, self.team)}
        return inputs, options

    def restore(self) -> None:
        """Leave the trunks as they were."""
        for part in self.parts:
            del part.forward
        for hook in self.hooks:
            hook.remove()


def check_divisible(trunks: Sequence[Transformer], size: int, processes: int) -> None:
    """Check that processes divide into groups, and the blocks of all trunks among the processes of a group.

    Args:
        trunks: the trunks.
        size: processes in a group.
        processes: in all.

    Raises:
        TrunklineError: naming what cannot be divided, and the sizes that can be chosen.
    """
    layers = [layer for trunk in trunks for layer in _linear_layers(trunk)]
    if any(type(layer) is not nn.Linear for layer in layers):
        raise TrunklineError(
            "the network has layers that cannot be divided among processes (adapters of LoRA); set "
            "tensor_parallel_size to 1",
            FIELD,
        )
    figures = [
        (name, figure)
        for config in (trunk.config for trunk in trunks)
        for name, figure in (
            ("num_heads", config.num_heads),
            ("num_kv_heads", config.kv_heads),
            ("mlp_dim", config.hidden_dim),
        )
    ]
    figures.insert(0, ("processes", processes))
    for name, figure in figures:
        if figure % size:
            fits = [str(n) for n in range(1, processes + 1) if all(figure % n == 0 for _, figure in figures)]
            what = f"the number of processes ({figure})" if name == "processes" else f"{name}={figure} of the network"
            raise TrunklineError(
                f"tensor_parallel_size={size} does not divide {what}; set it to {' or '.join(fits)}", FIELD
            )


def _linear_layers(trunk: Transformer) -> Iterator[nn.Module]:
    names = {"q", "kv", "qkv", "proj", "fc1", "fc2"}
    for part in trunk.modules():
        if isinstance(part, Attention | MLP):
            yield from (layer for name, layer in part.named_children() if name in names)
