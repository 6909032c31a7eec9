"""Which tokens may attend to which.

Shape legend: B batch, T target (query) tokens, S source (key) tokens, H query heads.
"""

import math

import torch
from torch import Tensor

from trunkline import TrunklineError
from trunkline.modules.attention_kernels import causal_rule


def same_document(document: Tensor) -> Tensor:
    """Numbers (B, T) of documents -> mask (B, 1, T, T), True within a document."""
    return document[:, None, :, None] == document[:, None, None, :]


def causal_mask(start: int | Tensor, count: int, keys: int, device: torch.device, window: int | None = None) -> Tensor:
    """`causal_rule` of the queries start..start + T over the first S keys, (1, 1, T, S) for T = `count`, S = `keys`."""
    query = torch.arange(count, device=device)[:, None] + start
    return causal_rule(query, torch.arange(keys, device=device), window)[None, None]


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
    mask: Tensor | None,
    causal: bool,
    start: int | Tensor,
    count: int,
    device: torch.device,
    window: int | None = None,
) -> tuple[Tensor | None, bool]:
    """Mask and `is_causal` flag for the queries start..start + `count` over all keys up to theirs.

    If the flag alone is enough, no (T, S) mask is built. A `start` that is a tensor goes with a mask of all keys.
    """
    if not causal or (count == 1 and window is None):  # a single new token sees all tokens before it
        return mask, False
    if mask is None and window is None and start == 0:
        return None, True
    keys = start + count if not isinstance(start, Tensor) else count if mask is None else mask.shape[-1]
    return restrict(mask, causal_mask(start, count, keys, device, window)), False
