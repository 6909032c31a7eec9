"""How much a network computes. Needs torch alone."""

import copy
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from trunkline.modules.networks.base import Network


def training_flops(network: Network, *inputs: Any, **options: Any) -> int:
    """Floating-point operations of a training step on inputs of these shapes; nothing is computed.

    The backward pass is taken to cost twice as much as the forward pass.
    """

    def shape_only(x: Any) -> Any:
        return torch.empty_like(x, device="meta") if isinstance(x, Tensor) else x

    with torch.device("meta"):
        twin = type(network)(copy.deepcopy(network.config))
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            twin(*map(shape_only, inputs), **{name: shape_only(x) for name, x in options.items()})
    return 3 * counter.get_total_flops()
