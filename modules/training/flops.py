"""How much a network computes. Needs torch alone."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
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


@torch.no_grad()
def counted_flops(network: nn.Module, call: Callable[[], Any]) -> int:
    """Floating-point operations of a training step, counted while `call` computes a loss with `network`.

    It runs in evaluation mode, and leaves the network and the random numbers as they were.
    """
    modes = {module: module.training for module in network.modules()}
    devices = {p.device for p in network.parameters() if p.device.type == "cuda"}
    try:
        network.eval()
        # The counter does not know the fused attention of CPUs.
        attention = sdpa_kernel(SDPBackend.MATH)
        with torch.random.fork_rng(list(devices)), attention, FlopCounterMode(display=False) as counter:
            call()
    finally:
        for module, mode in modes.items():
            module.training = mode
    return 3 * counter.get_total_flops()
