"""Which tokens may attend to which.

Shape legend: B batch, T target (query) tokens, S source (key) tokens, H query heads.
"""

import math

import torch
from torch import Tensor

from trunkline import TrunklineError


def same_document(document: Tensor) -> Tensor:
    """Numbers (B, T) of documents -> mask (B, 1, T, T), True within a document."""
    return document[:, None, :, None] == document[:, None, None, :]


def causal_mask(start: int, end: int, device: torch.device) -> Tensor:
    """Causal mask (1, 1, end - start, end) for queries start..end over keys 0..end, True where they may attend."""
    return torch.ones(1, 1, end - start, end, dtype=torch.bool, device=device).tril(start)


def restrict(mask: Tensor | None, allowed: Tensor) -> Tensor:
    """Also forbid what the boolean mask `allowed` forbids; `mask` may be boolean, additive or None."""
    if mask is None:
        return allowed
    return mask & allowed if mask.dtype == torch.bool else torch.where(allowed, mask, -math.inf)


def four_dimensional(mask: Tensor | None) -> Tensor | None:
    """Mask (B, S) -> (B, 1, 1, S), or (H or 1, T, S) -> (1, H or 1, T, S); four dimensions stay as they are.

    Raises:
        TrunklineError: if the mask is neither boolean nor floating point.
    """
    if mask is None:
        return None
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TrunklineError(
            "an attention mask is boolean, True where a token may attend, or floating point, added to the scores, "
            f"but got {mask.dtype}; make it boolean"
        )
    if mask.ndim == 2:
        return mask[:, None, None, :]
    return mask[None] if mask.ndim == 3 else mask


def self_attention_mask(
    mask: Tensor | None, causal: bool, start: int, end: int, device: torch.device
) -> tuple[Tensor | None, bool]:
    """Mask and `is_causal` flag for queries start..end over keys 0..end.

    If the flag alone is enough, no (T, S) mask is built.
    """
    if not causal:
        return mask, False
    if mask is None and start == 0:
        return None, True
    return restrict(mask, causal_mask(start, end, device)), False
