"""Which tokens may attend to which, and by which path a batch goes through self-attention.

| path | when | kernel on a GPU in float16 or bfloat16 | in float32 |
|---|---|---|---|
| `unmasked` | no mask, or causality alone | flash, or cuDNN's | memory-efficient |
| `flex` | documents or padding, compiled | flex attention (arXiv:2412.05496) | |
| `masked` | all else | memory-efficient, which reads the mask | the same |

Flash attention takes no mask, and the memory-efficient kernel reads one in every layer and computes what it forbids.
Flex attention asks a rule, which the compiler puts into the kernel, and skips blocks of scores in which nobody may
attend: those of other documents, and of padding at the end of a row. It has no dropout. No token of a causal trunk sees
padding on its right, so decoders, and `TextHead` on a GPT, pass no mask for it.

The last block is `masked` if it computes some tokens only (`keep`), and cross-attention if its context is padded. On a
CPU all paths but `flex` lead to PyTorch's flash kernel for CPUs, with dropout to plain products.

Shape legend: B batch, T target (query) tokens, S source (key) tokens, H query heads, D model width, E width of a head.
"""

import math
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from trunkline import TrunklineError

if TYPE_CHECKING:  # imported where it is used: it takes half a second
    from torch.nn.attention.flex_attention import BlockMask

SCORE_BLOCK = 128
"""Rows and columns of the blocks of scores that flex attention skips."""
AttentionPath = Literal["unmasked", "flex", "masked"]
MaskKind = Literal["none", "tokens", "scores"]
"""What forbids scores, beside causality: nothing; a property of tokens (their documents, padding); or a tensor over the
scores themselves, such as a bias."""


def mask_kind(mask: Tensor | None, document: Tensor | None) -> MaskKind:
    """The kind of a `mask` and a `document` as for `Transformer.forward`."""
    if mask is None:
        return "none" if document is None else "tokens"
    return "tokens" if mask.ndim == 2 and mask.dtype == torch.bool else "scores"


def attention_path(
    kind: MaskKind,
    device: torch.device,
    dtype: torch.dtype,
    *,
    length: int,
    head_width: int,
    dropout: float,
    compiled: bool,
    whole: bool,
) -> AttentionPath:
    """The path of a batch through the self-attention of all blocks; this is the only place that decides it.

    Args:
        kind: what forbids scores, beside causality.
        device: where the batch is.
        dtype: the type in which queries and keys are multiplied.
        length: number T of tokens in a row. Flex attention skips blocks of scores, so it needs more than one.
        head_width: width E of a head; flex attention starts at 16.
        dropout: of the attention weights in this call: 0 in evaluation.
        compiled: whether `torch.compile` is at work. Without it, flex attention would hold all scores in memory.
        whole: all keys belong to this call, and the attention weights are not asked for.
    """
    if kind == "none":
        return "unmasked"
    fast = device.type == "cuda" and dtype in (torch.float16, torch.bfloat16)
    able = compiled and whole and dropout == 0.0 and head_width >= 16
    if (
        fast and able and kind == "tokens" and length > SCORE_BLOCK
    ):  # last: a compiled network asks it of a variable length
        return "flex"
    return "masked"


def product_dtype(x: Tensor) -> torch.dtype:
    """The type in which linear layers, and so queries and keys, multiply."""
    device = x.device.type
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)  # not for `meta`
    return torch.get_autocast_dtype(device) if autocast else x.dtype


def block_mask(x: Tensor, mask: Tensor | None, document: Tensor | None, causal: bool) -> "BlockMask":
    """The rule by which tokens of x (B, T, D) attend to each other, for flex attention.

    Args:
        x: (B, T, D), for its size and device.
        mask: (B, T) bool, False for padding.
        document: (B, T) number of each token's document.
        causal: whether a token sees only itself and the tokens before it.
    """
    from torch.nn.attention.flex_attention import and_masks, create_block_mask

    rows, length = x.shape[:2]
    rules = []
    if causal:
        rules.append(lambda row, head, query, key: query >= key)
    if document is not None:
        document = document.expand(rows, length)
        rules.append(lambda row, head, query, key: document[row, query] == document[row, key])
    if mask is not None:
        mask = mask.expand(rows, length)
        rules.append(lambda row, head, query, key: mask[row, key])
    return create_block_mask(and_masks(*rules), rows, None, length, length, device=x.device, BLOCK_SIZE=SCORE_BLOCK)


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
    if not causal or end - start == 1:  # a single new token sees all tokens before it
        return mask, False
    if mask is None and start == 0:
        return None, True
    return restrict(mask, causal_mask(start, end, device)), False
