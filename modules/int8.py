"""Networks with int8 weights: a quarter of the memory, and on a CPU that much faster to generate with."""

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trunkline.modules.networks import GPT

REDUCE_RANGE = not getattr(torch.cpu, "_is_vnni_supported", lambda: False)()
"""Without VNNI instructions, sums of 8-bit products would overflow: activations get 7 bits."""


def quantise(network: GPT) -> GPT:
    """Replace the linear layers and the token embedding by int8 ones, in place; for inference only.

    Each row of a matrix is rounded to 255 steps (a few per cent of error in the logits). On an x86 CPU
    activations are rounded as well, to 8 bits over the whole batch (FBGEMM, arXiv:2101.05615), so that there
    a row's logits depend a little on the other rows. Elsewhere matrices are restored at each use, which
    saves memory alone.

    Args:
        network: on its device; weights of any floating type become float32 where they stay.

    Returns:
        The same network.
    """
    network.float().eval().requires_grad_(False)
    embedding = Int8Embedding(network.token_embed.weight)
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, Int8Linear(child.weight, child.bias))
    network.token_embed = embedding  # type: ignore[assignment]
    return network


def round_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(N, K) matrix -> (N, K) int8 values and (N, 1) scales, whose product is nearest to it."""
    scale = weight.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / 127
    return (weight / scale).round().to(torch.int8), scale


def pack(values: Tensor, scale: Tensor, bias: Tensor | None) -> Any:
    """What FBGEMM multiplies with, or None where there is no FBGEMM."""
    quantized: Any = torch.backends.quantized
    if values.device.type != "cpu" or "fbgemm" not in quantized.supported_engines:
        return None
    engine = quantized.engine
    try:
        quantized.engine = "fbgemm"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch means to move quantised tensors to another package
            zero = torch.zeros(len(values), dtype=torch.long)
            matrix = torch._make_per_channel_quantized_tensor(values, scale[:, 0].double(), zero, 0)
        return torch.ops.quantized.linear_prepack(matrix, bias)
    except (AttributeError, RuntimeError, NotImplementedError):  # a torch without them
        return None
    finally:
        quantized.engine = engine


class Int8Linear(nn.Module):
    """A linear layer whose (N, K) weight is int8; takes and gives float32."""

    values: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.bias = bias
        values, scale = round_rows(weight)
        self.packed = pack(values, scale, bias)
        if self.packed is None:
            self.register_buffer("values", values)
            self.register_buffer("scale", scale)

    @property
    def weight(self) -> Tensor:
        """The (N, K) matrix in float32, restored at each use."""
        if self.packed is not None:
            return torch.ops.quantized.linear_unpack(self.packed)[0].dequantize()
        return self.values * self.scale

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N)."""
        if self.packed is not None:
            return torch.ops.quantized.linear_dynamic(x, self.packed, REDUCE_RANGE)
        return F.linear(x, self.weight, self.bias)


class Int8Embedding(nn.Module):
    """An embedding whose (V, D) table is int8."""

    values: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        values, scale = round_rows(weight)
        self.register_buffer("values", values)
        self.register_buffer("scale", scale)

    @property
    def weight(self) -> Tensor:
        """The (V, D) table in float32, restored at each use."""
        return self.values * self.scale

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T) -> (B, T, D)."""
        return self.values[tokens] * self.scale[tokens]
