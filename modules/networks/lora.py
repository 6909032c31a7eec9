"""LoRA (Hu et al., 2021, arXiv:2106.09685): a trained network learns a low-rank change of each layer of its trunk.

A layer computes W x + (alpha / rank) B A x, where only A and B learn. B starts at zero, so that the first outputs are
those of the trained network. Queries, keys and values, which are one layer here, have an A and a B each, as if they
were three; so have the two halves of a gated MLP.

Shape legend: N outputs, K inputs, r rank.
"""

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trunkline import TrunklineError
from trunkline.modules.backbone import Transformer
from trunkline.modules.backbone.attention import Attention
from trunkline.modules.backbone.config import GATED
from trunkline.modules.backbone.transformer import MLP
from trunkline.ranges import check_ranges


class HasOutputModules(Protocol):
    """What `add_lora` asks of a network."""

    def output_modules(self) -> list[nn.Module]: ...

    def modules(self) -> Iterator[nn.Module]: ...

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...


AdaptedT = TypeVar("AdaptedT", bound=HasOutputModules)


@dataclass
class LoRAConfig:
    """Adapters of rank r in the linear layers of every trunk.

    Raises:
        TrunklineError: if a value is out of its range, or given without a rank.
    """

    rank: int | None = None
    """Rank r of the change of each layer; None or 0 trains the whole network instead."""
    alpha: float = 16.0
    """The change is multiplied by alpha / rank."""
    dropout: float = 0.0
    """Probability of dropout of an adapter's input."""
    targets: Literal["attention", "mlp", "all"] = "all"
    """Layers that get adapters: all four projections of attention, both layers of the MLP, or all of them."""

    def __post_init__(self) -> None:
        check_ranges("model.lora", self, rank="[0, inf)", alpha="(0, inf)", dropout="[0, 1)")
        if self.targets not in ("attention", "mlp", "all"):
            raise TrunklineError(
                f"targets is attention, mlp or all, not {self.targets!r}; choose one", "model.lora.targets"
            )
        if not self.rank and (self.alpha, self.dropout, self.targets) != (16.0, 0.0, "all"):
            raise TrunklineError(
                "options of LoRA have no effect without a rank; set rank, such as 8", "model.lora.rank"
            )


class Adapter(nn.Module):
    """The change of a layer, or of one of the layers that are stacked in it."""

    def __init__(self, weight: Tensor, rows: int, rank: int, scale: float, dropout: float = 0.0) -> None:
        super().__init__()
        like = {"device": weight.device, "dtype": weight.dtype}
        self.scale = scale
        """alpha / r."""
        self.dropout = nn.Dropout(dropout)
        self.lora_A = nn.Linear(weight.shape[1], rank, bias=False, **like)
        self.lora_B = nn.Linear(rank, rows, bias=False, **like)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))  # as in the authors' code
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N)."""
        return self.lora_B(self.lora_A(self.dropout(x)) * self.scale)

    def change(self) -> Tensor:
        """The change of the weight, (N, K), in float32 or wider."""
        a, b = (w.to(torch.promote_types(w.dtype, torch.float32)) for w in (self.lora_A.weight, self.lora_B.weight))
        return self.scale * (b @ a)


class LoRALinear(nn.Linear):
    """A linear layer with adapters; its own weight and bias keep their names and are not copied.

    Args:
        layer: the layer to adapt.
        rows: outputs of each layer that is stacked in it.
        adapters: number of such a layer -> its adapter; the others have none.
    """

    def __init__(self, layer: nn.Linear, rows: tuple[int, ...], adapters: dict[int, Adapter]) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.rows = layer.in_features, layer.out_features, rows
        self.weight, self.bias = layer.weight, layer.bias
        self.adapters = nn.ModuleDict({str(number): adapter for number, adapter in adapters.items()})

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N)."""
        changes = [
            self.adapters[str(number)](x) if str(number) in self.adapters else x.new_zeros(*x.shape[:-1], rows)
            for number, rows in enumerate(self.rows)
        ]
        return F.linear(x, self.weight, self.bias) + (changes[0] if len(changes) == 1 else torch.cat(changes, dim=-1))

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """A plain layer that computes the same; this one stays as it is."""
        plain = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        weight = self.weight.clone()
        for number, part in enumerate(weight.split(self.rows)):
            if str(number) in self.adapters:
                change = self.adapters[str(number)].change()  # type: ignore[operator]
                part.copy_(part.to(change.dtype) + change)  # rounded once
        plain.weight, plain.bias = nn.Parameter(weight), self.bias
        return plain


class LinearLayer(NamedTuple):
    """A linear layer of a trunk."""

    name: str
    """Its name in the network."""
    parent: nn.Module
    """The module that holds it."""
    module: nn.Linear
    """The layer itself."""
    rows: tuple[int, ...]
    """Outputs of each layer that is stacked in it."""

    def replace(self, module: nn.Linear) -> None:
        """Put another layer in its place."""
        setattr(self.parent, self.name.rpartition(".")[2], module.train(self.module.training))


def linear_layers(network: HasOutputModules, targets: str = "all") -> list[LinearLayer]:
    """The linear layers of all trunks that are among the targets of LoRA."""
    inside = [
        (f"{place}.blocks.{name}".removeprefix("."), module)
        for place, trunk in network.named_modules()
        if isinstance(trunk, Transformer)
        for name, module in trunk.blocks.named_modules()
    ]
    found = []
    for place, module in inside:
        stacked: dict[str, tuple[int, ...]] = {}
        if isinstance(module, Attention) and targets != "mlp":
            queries, keys, dim = module.proj.in_features, module.kv_dim, module.proj.out_features
            stacked = {"qkv": (queries, keys, keys), "q": (queries,), "kv": (keys, keys), "proj": (dim,)}
        elif isinstance(module, MLP) and targets != "attention":
            hidden, dim = module.fc2.in_features, module.fc2.out_features
            stacked = {"fc1": (hidden,) * (2 if module.kind in GATED else 1), "fc2": (dim,)}
        layers = dict(module.named_children())
        found += [
            LinearLayer(f"{place}.{name}", module, layer, rows)
            for name, rows in stacked.items()
            if isinstance(layer := layers.get(name), nn.Linear)
        ]
    return found


def is_adapted(network: HasOutputModules) -> bool:
    """Whether a network has adapters."""
    return any(isinstance(module, LoRALinear) for module in network.modules())


def add_lora(network: AdaptedT, config: LoRAConfig) -> AdaptedT:
    """Give a trained network adapters, in place, and freeze all else but its output modules.

    A table that an output module shares with the embeddings is frozen too.

    Args:
        network: the network, before an optimiser gets its parameters.
        config: with a rank.

    Returns:
        The same network.

    Raises:
        TrunklineError: if there is no rank, or if there are adapters already.
    """
    if not config.rank:
        raise TrunklineError("LoRA needs a rank; set rank, such as 8", "model.lora.rank")
    refuse_adapted(network)
    freeze_base(network)
    for layer in linear_layers(network, config.targets):
        parts = {
            number: Adapter(layer.module.weight, rows, config.rank, config.alpha / config.rank, config.dropout)
            for number, rows in enumerate(layer.rows)
        }
        layer.replace(LoRALinear(layer.module, layer.rows, parts))
    return network


def refuse_adapted(network: HasOutputModules) -> None:
    """Refuse a network that has adapters.

    Raises:
        TrunklineError: if it has.
    """
    if is_adapted(network):
        raise TrunklineError("the network has adapters already; merge them first with merge_lora")


def freeze_base(network: HasOutputModules) -> None:
    """Freeze all parameters but those of the output modules, and what these share with embeddings."""
    embeddings = {p for module in network.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    learning = {p for module in network.output_modules() for p in module.parameters()} - embeddings
    for p in network.parameters():
        p.requires_grad_(p in learning)


def merge_lora(network: AdaptedT) -> AdaptedT:
    """Add the changes to the weights, in place: the network is plain again and computes the same, to rounding.

    All its parameters learn again. Without adapters nothing happens.

    Returns:
        The same network.
    """
    if not is_adapted(network):
        return network
    for layer in linear_layers(network):
        if isinstance(layer.module, LoRALinear):
            layer.replace(layer.module.merged())
    for p in network.parameters():
        p.requires_grad_(True)
    return network


def merged_copy(network: AdaptedT) -> AdaptedT:
    """The network itself if it has no adapters, or a merged copy."""
    return merge_lora(copy.deepcopy(network)) if is_adapted(network) else network
