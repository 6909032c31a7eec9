"""Positions outside the trunk: learned, fixed (arXiv:1706.03762), and T5's relative bias (arXiv:1910.10683)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trunkline import TrunklineError
from trunkline.modules.backbone.masks import restrict


def sincos_positions(length: int, dim: int, theta: float = 10_000.0) -> Tensor:
    """Sinusoidal positions (length, dim): sines in the first half, cosines in the second (arXiv:1706.03762).

    Raises:
        TrunklineError: if `dim` is odd.
    """
    return sincos(torch.arange(length, dtype=torch.float32), sincos_frequencies(dim, theta))


def sincos_frequencies(dim: int, theta: float = 10_000.0, device: torch.device | None = None) -> Tensor:
    """Frequencies (dim / 2,) of `sincos_positions`, which says what is raised."""
    if dim % 2:
        raise TrunklineError(f"sin-cos positions need an even dim, not {dim}")
    return theta ** -(torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim)


def sincos(position: Tensor, frequency: Tensor) -> Tensor:
    """Positions (...) at frequencies (E,) -> (..., 2 E)."""
    angle = position[..., None] * frequency
    return torch.cat((angle.sin(), angle.cos()), dim=-1)


class SinusoidalPositions(nn.Module):
    """The fixed positions of `sincos_positions`, called like an embedding.

    They are computed at each call. A buffer would be part of an average of weights, with rounding errors that a resume
    does not repeat.

    Args:
        dim: width D.
        with_end: the lowest frequency is 1 / 10,000 itself, as in Whisper (arXiv:2212.04356).

    Raises:
        TrunklineError: if `dim` is odd.
    """

    def __init__(self, dim: int, with_end: bool = False) -> None:
        super().__init__()
        self.dim, self.with_end = dim, with_end
        self.frequencies()  # refuses an odd width at once

    def frequencies(self, device: torch.device | None = None) -> Tensor:
        """(D / 2,), float32."""
        usual = sincos_frequencies(self.dim, device=device)
        if not self.with_end:
            return usual
        # As Whisper computes them: with another rounding, the far positions of its weights would differ by 1e-4.
        step = math.log(10_000) / max(len(usual) - 1, 1)
        return torch.exp(-step * torch.arange(len(usual), dtype=torch.float32, device=device))

    def forward(self, positions: Tensor) -> Tensor:
        """Positions of any shape (...) -> (..., D), float32."""
        return sincos(positions.float(), self.frequencies(positions.device))


class FixedPositions(nn.Module):
    """A table of positions (length, D) that is kept with the weights and not trained, called like an embedding.

    Models of other libraries have such tables in their files, with their own rounding of sines. Positions after the
    last get the last: only padding stands there.

    Args:
        table: the positions at first.
    """

    weight: Tensor

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", table)

    def forward(self, positions: Tensor) -> Tensor:
        """Positions of any shape (...) -> (..., D)."""
        return F.embedding(positions.clamp(max=len(self.weight) - 1), self.weight)


class LearnedPositions(nn.Embedding):
    """A trained table of positions, called like an embedding.

    Args:
        length: number of positions.
        dim: width D.
        first: row of the first position; nothing reads those before it.
    """

    def __init__(self, length: int, dim: int, first: int = 0) -> None:
        super().__init__(first + length, dim)
        self.first = first
        nn.init.trunc_normal_(self.weight, std=0.02)

    def forward(self, positions: Tensor) -> Tensor:
        """Positions of any shape (...) -> (..., D)."""
        return super().forward(positions + self.first)


def absolute_positions(kind: str, length: int, dim: int, with_end: bool = False, first: int = 0) -> nn.Module | None:
    """Something that is called like an embedding (length, dim) of absolute positions; None for other kinds.

    Args:
        kind: "learned"; "sinusoidal", which are computed; or "fixed", which are the same in a table that is kept.
        length: number of positions.
        dim: width D.
        with_end: as for `SinusoidalPositions`.
        first: as for `LearnedPositions`.
    """
    if kind == "learned":
        return LearnedPositions(length, dim, first)
    if kind not in ("sinusoidal", "fixed"):
        return None
    computed = SinusoidalPositions(dim, with_end)
    return computed if kind == "sinusoidal" else FixedPositions(computed(torch.arange(length)))


def real_positions(mask: Tensor | None, start: int, count: int, device: torch.device) -> Tensor:
    """Positions (T,) of T = `count` tokens after `start` others; with a mask (B, S), (B, T) that do not count padding.

    `start` may be a (1,) tensor, and the mask may have more columns than there are tokens.
    """
    positions = torch.arange(count, device=device) + start
    return positions if mask is None else (mask.cumsum(dim=1) - 1).clamp(min=0).index_select(1, positions)


class RelativeBias(nn.Module):
    """A learned number for each head and distance, which a trunk adds to the scores of self-attention.

    Half of the buckets (of each direction) are for one distance each, the other half for ranges that grow with the
    logarithm of the distance; all distances of `max_distance` tokens and more share the last bucket. One table serves
    all blocks of a trunk.

    Args:
        num_heads: query heads H of the trunk.
        buckets: number of distances that are told apart; without `causal` one half is for each direction.
        max_distance: distance in tokens from which on all distances are the same.
        causal: a token sees only tokens before it, so all buckets are for that direction.

    Raises:
        TrunklineError: if there are too few buckets, or too many for `max_distance`.
    """

    def __init__(self, num_heads: int, buckets: int = 32, max_distance: int = 128, causal: bool = False) -> None:
        super().__init__()
        self.buckets, self.causal, self.max_distance = buckets, causal, max_distance
        exact = buckets // (2 if causal else 4)
        if buckets < 4 or buckets % 2:
            raise TrunklineError(f"relative_buckets={buckets} must be an even number of at least 4")
        if max_distance <= exact:
            raise TrunklineError(
                f"relative_distance={max_distance} must be above {exact}, the number of distances that "
                f"relative_buckets={buckets} tells apart one by one"
            )
        self.table = nn.Embedding(buckets, num_heads)
        nn.init.trunc_normal_(self.table.weight, std=0.02)

    def bucket(self, offset: Tensor) -> Tensor:
        """Bucket of each offset, the position of a key minus that of the query; any shape, int64.

        Computed at each call: a table of them would be a buffer, which an average of weights truncates.
        """
        distance = (-offset).clamp(min=0) if self.causal else offset.abs()
        one_way = self.buckets if self.causal else self.buckets // 2
        exact = one_way // 2
        far = (distance.clamp(min=1).float() / exact).log() / math.log(self.max_distance / exact)
        far = (exact + (far * (one_way - exact)).long()).clamp(max=one_way - 1)
        bucket = torch.where(distance < exact, distance, far)
        return bucket if self.causal else bucket + one_way * (offset > 0)

    def forward(self, queries: int, start: int = 0, mask: Tensor | None = None) -> Tensor:
        """Bias of the queries start..start + T over the keys 0..start + T, as a mask for `Transformer.forward`.

        Args:
            queries: number T of query tokens.
            start: number of tokens in the cache before them; may be a (1,) tensor if there is a mask.
            mask: (B, S) bool, False for padding, or (B, slots of a `FixedCache`).

        Returns:
            (1, H, T, S), or (B, H, T, S) with a mask; S = start + T.
        """
        device = self.table.weight.device
        keys = torch.arange(start + queries if mask is None else mask.shape[1], device=device)
        offset = keys - (torch.arange(queries, device=device) + start)[:, None]  # (T, S)
        bias = self.table(self.bucket(offset)).permute(2, 0, 1)[None]
        return bias if mask is None else restrict(bias, mask[:, None, None, :])
