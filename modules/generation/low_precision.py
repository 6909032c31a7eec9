"""Low-precision weights for generation: at batch size 1 it spends most of its time on reading weights.

Int8 needs no library. The int8 weights of torchao 0.18 (`Int8WeightOnlyConfig`, one scale a row) have the same scales
and make the same products: the int8 matrix, in the type of x and not yet scaled, with x; then the scales. It has no
kernel of its own for them, on GPUs neither. There int8 saves time only in a compiled step of a single row, where the
compiler joins the conversion with the product (`compiled.step_options`; not yet run on a GPU): otherwise the matrix is
converted in memory first. On a CPU PyTorch's int8 kernel takes a sixth of the time of torchao's layer on one row.
"""

from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TextNetwork = TypeVar("TextNetwork", bound=nn.Module)
"""A `GPT`, an `EncoderDecoder` or a `Whisper`."""
TOKEN_TABLES = ("token_embed", "target_embed")
"""Names of the embeddings of tokens in these networks."""
FEW_ROWS = 8
"""With fewer rows than this, PyTorch's int8 kernel is faster than converting the matrix."""
KERNEL_WIDTH = 32
"""The kernel needs rows whose width is a multiple of this: otherwise it reads past their end."""


def to_bfloat16(network: TextNetwork) -> TextNetwork:
    """Convert a network's weights to bfloat16, in place; for inference only. Returns the network."""
    network.bfloat16().eval().requires_grad_(False)
    _replace_linears(network, RowLinear)
    return network


def to_int8(network: TextNetwork) -> TextNetwork:
    """Convert linear layers and the embeddings of tokens to int8 weights, in place; for inference only.

    Only weights are rounded, each row of a matrix to 255 levels, which changes logits by a few per cent. Everything
    else becomes bfloat16.

    Args:
        network: must already be on its device.

    Returns:
        The same network.
    """
    network.float().eval().requires_grad_(False)
    tables = {name: table for name in TOKEN_TABLES if isinstance(table := getattr(network, name, None), nn.Embedding)}
    rounded = {table: Int8Embedding(table.weight) for table in tables.values()}  # one table may have both names
    _replace_linears(network, Int8Linear)
    for name, table in tables.items():
        setattr(network, name, rounded[table])
    return network.bfloat16()


def _replace_linears(network: nn.Module, kind: "type[RowLinear] | type[Int8Linear]") -> None:
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, kind(child.weight, child.bias))


class RowLinear(nn.Module):
    """A linear layer that treats a single row as a vector: bfloat16 matrix-vector products are faster on a CPU."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight, self.bias, self.out_features = weight, bias, len(weight)

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N)."""
        if x.device.type != "cpu" or x.numel() > x.shape[-1]:
            return F.linear(x, self.weight, self.bias)
        out = torch.mv(self.weight, x.flatten())
        return (out if self.bias is None else out.add_(self.bias)).view(*x.shape[:-1], -1)


def round_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(N, K) matrix -> (N, K) int8 values and (N,) scales; their product is close to the matrix."""
    scale = weight.abs().amax(dim=1).clamp(min=1e-12) / 127
    return (weight / scale[:, None]).round().to(torch.int8), scale


class Int8Linear(nn.Module):
    """A linear layer whose (N, K) weight is int8."""

    values: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        values, scale = round_rows(weight)
        self.register_buffer("values", values)
        self.register_buffer("scale", scale)
        self.bias, self.out_features = bias, len(weight)

    @property
    def weight(self) -> Tensor:
        """The (N, K) matrix in floating point."""
        return self.values * self.scale[:, None]

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N)."""
        rows = x.reshape(-1, x.shape[-1])
        if x.device.type == "cpu" and len(rows) < FEW_ROWS and rows.shape[1] % KERNEL_WIDTH == 0:
            out = torch._weight_int8pack_mm(rows, self.values, self.scale)
        else:
            out = F.linear(rows, self.values.to(x.dtype)) * self.scale
        return (out if self.bias is None else out + self.bias).view(*x.shape[:-1], -1)


class Int8Embedding(nn.Module):
    """An embedding whose (V, D) table is int8."""

    values: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        values, scale = round_rows(weight)
        self.register_buffer("values", values)
        self.register_buffer("scale", scale)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T) -> (B, T, D)."""
        return self.values[tokens] * self.scale[tokens][..., None]
