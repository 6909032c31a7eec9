"""Attention of the trunk: self- and cross-attention, grouped queries, rotary positions, key/value cache.

Shape legend: B batch, T target (query) tokens, S source (key) tokens, D model width, H query heads,
K key/value heads, E width of one head (usually D / H).
"""

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trunkline import TrunklineError
from trunkline.modules.attention_kernels import block_attention, explicit_attention, fused_attention, learns_slowly
from trunkline.modules.backbone.config import TransformerConfig

if TYPE_CHECKING:  # imported where it is used: it takes half a second
    from torch.nn.attention.flex_attention import BlockMask

Rotation = tuple[Tensor, Tensor]
Keep = slice | Tensor
"""Some tokens of each row: a slice that is the same in all rows, or (B, N) positions."""


class KVCache:
    """Keys and values of the tokens seen so far, so that a new token costs one row of attention.

    Keys and values of self-attention are written in place into buffers of a fixed length. Keys and values of `context`
    are computed once, at the first call. For inference only.

    Args:
        config: the trunk's configuration.
        batch_size: number of sequences.
        max_length: number of tokens that fit.
        dtype: data type of the keys and values; should be the type in which the trunk computes.
        device: device of the buffers.
    """

    def __init__(
        self,
        config: TransformerConfig,
        batch_size: int,
        max_length: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        shape = (config.depth, batch_size, config.kv_heads, max_length, config.head_width)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.cross: dict[int, tuple[Tensor, Tensor]] = {}
        self.source = torch.arange(batch_size, device=device)
        """(B,) which row of `cross` a row reads; N beams of one source stand together and share a row."""
        self.length = 0
        """Number of tokens in the cache; the trunk increases it at the end of each call."""

    @property
    def max_length(self) -> int:
        """Number of tokens that fit."""
        return self.keys.shape[3]

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add keys and values (B, K, T, E) of one layer; return all that the layer has now, (B, K, S, E).

        Raises:
            TrunklineError: if they do not fit into the cache.
        """
        end = self.length + k.shape[2]
        if end > self.max_length:
            raise TrunklineError(
                f"the KV cache holds {self.max_length} tokens, but {end} were given; make it with max_length={end}"
            )
        self.keys[layer, :, :, self.length : end] = k
        self.values[layer, :, :, self.length : end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def seen(self, mask: Tensor | None, count: int = 1) -> Tensor | None:
        """The part of a mask (B, max_length) that is for the cached and the `count` new tokens."""
        return None if mask is None else mask[:, : self.length + count]

    def advance(self, count: int) -> None:
        """Count tokens that all layers have added."""
        self.length += count

    def reorder(self, index: Tensor) -> None:
        """Make row b continue the old row `index[b]`, for beam search; the number of rows may change."""
        if len(index) == self.keys.shape[1]:
            for buffer in (self.keys, self.values):
                held = buffer[:, :, :, : self.length]
                held.copy_(held.index_select(1, index))
        else:
            self.keys, self.values = self.keys[:, index], self.values[:, index]
        source = self.source[index]
        if not torch.equal(source, self.source):
            self._select_sources(source)

    def _select_sources(self, source: Tensor) -> None:
        """Make row b read the old row `source[b]` of `cross`, which keeps one copy for equally many rows in turn."""
        kept, place, count = source.unique_consecutive(return_inverse=True, return_counts=True)
        if (count != count[0]).any():
            kept, place = source, torch.arange(len(source), device=source.device)
        self.cross = {layer: (k[kept], v[kept]) for layer, (k, v) in self.cross.items()}
        self.source = place


def make_norm(config: TransformerConfig, dim: int) -> nn.Module:
    """The configured norm, over a last dimension of `dim`."""
    if config.norm == "rmsnorm":
        return nn.RMSNorm(dim, eps=config.norm_eps)
    return nn.LayerNorm(dim, eps=config.norm_eps, bias=config.bias)


def rotation_table(positions: Tensor, head_dim: int, theta: float) -> Rotation:
    """Cosines and signed sines (T, E) of the rotary embedding at `positions` (T,), for `rotate`.

    Always float32, and not a buffer: `module.to(bfloat16)` would convert a buffer, and far positions would lose their
    phase.
    """
    frequency = theta ** -(torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim)
    angle = torch.outer(positions.float(), frequency)  # (T, E / 2)
    sin = angle.sin()
    return angle.cos().repeat(1, 2), torch.cat((-sin, sin), dim=1)


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Turn each pair (x[i], x[i + E/2]) of the (B, H, T, E) heads by its position's angle."""
    cos, sin = (t.to(x.dtype) for t in rotation)
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


def take(x: Tensor, keep: Keep) -> Tensor:
    """Select tokens: (B, T, ...) -> (B, N, ...)."""
    if isinstance(keep, slice):
        return x[:, keep]
    return x[torch.arange(keep.shape[0], device=x.device)[:, None], keep]  # `len` would be a constant in an export


def take_queries(mask: Tensor | None, keep: Keep) -> Tensor | None:
    """Select the rows of some queries in a mask (B or 1, H or 1, T or 1, S)."""
    if mask is None or mask.shape[2] == 1:
        return mask
    if isinstance(keep, Tensor):
        mask = mask.expand(keep.shape[0], -1, -1, -1)
    return take(mask.transpose(1, 2), keep).transpose(1, 2)


def join_beams(q: Tensor, mask: Tensor | None, sources: int) -> tuple[Tensor, Tensor | None]:
    """Make the queries of all beams of a source queries of one row, so that their keys and values are read once.

    Args:
        q: (B, T, H * E) queries; the beams of a source stand together.
        mask: broadcastable to (B, H, T, S).
        sources: number of sources.

    Returns:
        (sources, N * T, H * E) queries for N beams of a source, and a mask broadcastable to (sources, H, N * T, S).
    """
    if mask is not None:
        mask = mask.expand(len(q), -1, q.shape[1], -1).unflatten(0, (sources, -1)).transpose(1, 2).flatten(2, 3)
    return q.reshape(sources, -1, q.shape[2]), mask


def _rotation_of(rotation: Rotation, keep: Keep) -> Rotation:
    """Select the cosines and sines of some tokens: (N, E) or (B, 1, N, E)."""
    cos, sin = (t[keep] if isinstance(keep, slice) else t[keep][:, None] for t in rotation)
    return cos, sin


class Attention(nn.Module):
    """Multi-head attention with H query heads and K key/value heads; self-attention or cross-attention."""

    def __init__(self, config: TransformerConfig, cross: bool = False) -> None:
        super().__init__()
        dim, inner, kv_dim = config.dim, config.num_heads * config.head_width, config.kv_heads * config.head_width
        self.head_width, self.kv_dim, self.dropout = config.head_width, kv_dim, config.dropout
        self.scale = 1 / math.sqrt(config.head_width) if config.attn_scale is None else config.attn_scale
        self.gqa = config.kv_heads != config.num_heads
        bias = config.attention_bias
        if cross:
            self.q = nn.Linear(dim, inner, bias=bias)
            self.kv = nn.Linear(dim, 2 * kv_dim, bias=bias)
        else:
            self.qkv = nn.Linear(dim, inner + 2 * kv_dim, bias=bias)
        self.q_norm = make_norm(config, config.head_width) if config.qk_norm else None
        self.k_norm = make_norm(config, config.head_width) if config.qk_norm else None
        self.proj = nn.Linear(inner, dim, bias=config.bias)

    def fused_projections(self) -> list[tuple[Tensor, int]]:
        """Weights that consist of several stacked matrices of equal shape, each with their number; Muon splits them."""
        if hasattr(self, "kv"):
            return [(self.kv.weight, 2)]
        return [(self.qkv.weight, 3)] if not self.gqa else []

    def project(self, x: Tensor, keep: Keep | None) -> list[Tensor]:
        """Project x to queries (B, T or N, H * E), keys and values (B, T, K * E), with heads not yet separated."""
        sizes = [self.qkv.out_features - 2 * self.kv_dim, self.kv_dim, self.kv_dim]
        if keep is None or type(self.qkv) is not nn.Linear:  # one that is more than its weight runs as a whole
            q, k, v = self.qkv(x).split(sizes, dim=-1)
            return [q if keep is None else take(q, keep), k, v]
        weights = self.qkv.weight.split([sizes[0], 2 * self.kv_dim])
        biases = (None, None) if self.qkv.bias is None else self.qkv.bias.split([sizes[0], 2 * self.kv_dim])
        queries = F.linear(take(x, keep), weights[0], biases[0])
        return [queries, *F.linear(x, weights[1], biases[1]).chunk(2, dim=-1)]

    def heads(self, x: Tensor) -> Tensor:
        """(B, T, heads * E) -> (B, heads, T, E)."""
        return x.unflatten(-1, (-1, self.head_width)).transpose(1, 2)

    def keys_values(self, k: Tensor, v: Tensor, rotation: Rotation | None) -> tuple[Tensor, Tensor]:
        """Projections (B, S, K * E) -> keys and values (B, K, S, E), with norm and rotation applied."""
        k, v = self.heads(k), self.heads(v)
        if self.k_norm is not None:
            k = self.k_norm(k).to(v.dtype)  # autocast runs norms in float32
        return (k if rotation is None else rotate(k, rotation)), v

    def forward(
        self,
        x: Tensor,
        *,
        context: Tensor | None = None,
        mask: Tensor | None = None,
        is_causal: bool = False,
        rotation: Rotation | None = None,
        cache: KVCache | None = None,
        layer: int = 0,
        keep: Keep | None = None,
        return_attention: bool = False,
        blocks: "BlockMask | None" = None,
    ) -> tuple[Tensor, Tensor | None]:
        """(B, T, D) -> (B, T, D), and the weights (B, H, T, S) with `return_attention`.

        A module made with `cross=True` attends to `context` (B, S, D). `mask` is broadcastable to (B, H, T, S); it is
        either boolean, True where a query may attend, or added to the scores. With `keep`, queries are computed only
        for those tokens; T is then their number, also in the mask. `blocks` says by itself who may attend, in place of
        `mask` and `is_causal`, and goes with none of `context`, `cache`, `keep` and `return_attention`.
        """
        if context is None:
            q, k, v = self.project(x, keep)
            k, v = self.keys_values(k, v, rotation)
            if cache is not None:
                k, v = cache.update(layer, k, v)
        else:
            q = self.q(x)
            if cache is not None and layer in cache.cross:
                k, v = cache.cross[layer]
            else:
                k, v = self.kv(context).chunk(2, dim=-1)
                k, v = self.keys_values(k, v, rotation=None)
                if cache is not None:
                    cache.cross[layer] = (k, v)
        shared = cache is not None and len(k) < len(q)  # by beams of one source
        if shared:
            q, mask = join_beams(q, mask, len(k))
        q = self.heads(q)
        if self.q_norm is not None:
            q = self.q_norm(q).to(v.dtype)
        if rotation is not None:
            q = rotate(q, rotation if keep is None else _rotation_of(rotation, keep))
        dropout_p = self.dropout if self.training else 0.0
        weights = None
        if blocks is not None:
            out = block_attention(q, k, v, blocks, self.scale)
        elif return_attention or learns_slowly(q, k):
            out, weights = explicit_attention(q, k, v, mask, is_causal, dropout_p, self.scale)
            weights = weights if return_attention else None
        else:
            out = fused_attention(q, k, v, mask, is_causal, dropout_p, self.scale)
        out = out.transpose(1, 2).flatten(2)  # (B, H, T, E) -> (B, T, H * E)
        if shared:
            out = out.reshape(*x.shape[:2], -1)
            if weights is not None:  # (sources, H, N * T, S) -> (B, H, T, S)
                weights = weights.unflatten(2, (-1, x.shape[1])).transpose(1, 2).flatten(0, 1)
        return self.proj(out), weights
