"""How attention is computed: by which path a batch goes through the self-attention of a trunk, and the kernels there.

| path | when | kernel on a GPU in float16 or bfloat16 | in float32 |
|---|---|---|---|
| `unmasked` | no mask, or causality alone | flash, or cuDNN's | memory-efficient |
| `flex` | documents, padding or a window, compiled | flex attention (arXiv:2412.05496) | |
| `masked` | all else | memory-efficient, which reads the mask | the same |

Flash attention takes no mask, and the memory-efficient kernel reads one in every layer and computes what it forbids.
It gets its heads in the form that it takes (`for_memory_efficient`).
Flex attention asks a rule, which the compiler puts into the kernel, and skips blocks of scores in which nobody may
attend: those of other documents, outside a window, and of padding at the end of a row. It has no dropout. No token of
a causal trunk sees padding on its right, so decoders, and `TextHead` on a GPT, pass no mask for it.

The last block is `masked` if it computes some tokens only (`keep`), and cross-attention if its context is padded. On a
CPU all paths but `flex` lead to PyTorch's flash kernel for CPUs, with dropout to plain products.

Shape legend: B batch, T target (query) tokens, S source (key) tokens, D model width, H query heads, K key/value heads,
E width of a head.
"""

import math
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:  # imported where it is used: it takes half a second
    from torch.nn.attention.flex_attention import BlockMask

SCORE_BLOCK = 128
"""Rows and columns of the blocks of scores that flex attention skips."""
AttentionPath = Literal["unmasked", "flex", "masked"]
MaskKind = Literal["none", "tokens", "scores"]
"""What forbids scores, beside causality: nothing; a property of tokens (their documents, their places, padding); or a
tensor over the scores themselves, such as a bias."""


def mask_kind(mask: Tensor | None, document: Tensor | None, window: int | None = None) -> MaskKind:
    """The kind of a `mask` and a `document` as for `Transformer.forward`, and of a window that leaves tokens out."""
    if mask is None:
        return "none" if document is None and window is None else "tokens"
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
        length: number T of tokens in a row. Flex attention skips blocks of scores, so it needs more than one. A
            graph for lengths that vary is thereby bound to one side of a block, unless its network refuses longer rows;
            Inductor (2.14) binds flex attention to T < 128 or not in any case.
        head_width: width E of a head; flex attention starts at 16.
        dropout: of the attention weights in this call: 0 in evaluation.
        compiled: whether `torch.compile` is at work. Without it, flex attention would hold all scores in memory.
        whole: all keys belong to this call, and the attention weights are not asked for.
    """
    if kind == "none":
        return "unmasked"
    fast = device.type == "cuda" and dtype in (torch.float16, torch.bfloat16) and compiled
    able = kind == "tokens" and whole and dropout == 0.0 and head_width >= 16
    return "flex" if fast and able and length > SCORE_BLOCK else "masked"


def product_dtype(x: Tensor) -> torch.dtype:
    """The type in which linear layers, and so queries and keys, multiply."""
    device = x.device.type
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)  # not for `meta`
    return torch.get_autocast_dtype(device) if autocast else x.dtype


def causal_rule(query: Tensor, key: Tensor, window: int | None = None) -> Tensor:
    """Whether a token at the place `query` sees the one at `key`: itself and those before it.

    With a window it sees only the last `window` of these. Places are integers of any shapes that broadcast.
    """
    return query >= key if window is None else (query >= key) & (query - key < window)


def surely_within(length: int, limit: int) -> bool:
    """Whether length <= limit; of a symbolic length, whether that is certain: asking would bind a graph to one side."""
    if torch.compiler.is_compiling():
        from torch.fx.experimental.symbolic_shapes import statically_known_true

        return statically_known_true(length <= limit)
    return length <= limit


def narrow(window: int | None, length: int | Tensor) -> int | None:
    """The window, if it may leave out some of `length` tokens; a length that is a tensor may be any."""
    if window is None or isinstance(length, Tensor):
        return window
    return None if surely_within(length, window) else window


def block_mask(
    x: Tensor, mask: Tensor | None, document: Tensor | None, causal: bool, window: int | None = None
) -> "BlockMask":
    """The rule by which tokens of x (B, T, D) attend to each other, for flex attention.

    Args:
        x: (B, T, D), for its size and device.
        mask: (B, T) bool, False for padding.
        document: (B, T) number of each token's document.
        causal: whether a token sees only itself and the tokens before it.
        window: how many of these it sees; None is all.
    """
    from torch.nn.attention.flex_attention import and_masks, create_block_mask

    rows, length = x.shape[:2]
    rules = []
    if causal:
        rules.append(lambda row, head, query, key: causal_rule(query, key, window))
    if document is not None:
        document = document.expand(rows, length)
        rules.append(lambda row, head, query, key: document[row, query] == document[row, key])
    if mask is not None:
        mask = mask.expand(rows, length)
        rules.append(lambda row, head, query, key: mask[row, key])
    return create_block_mask(and_masks(*rules), rows, None, length, length, device=x.device, BLOCK_SIZE=SCORE_BLOCK)


def explicit_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, dropout_p: float, scale: float
) -> tuple[Tensor, Tensor]:
    """Computes the same as `F.scaled_dot_product_attention`, and also returns the weights (B, H, T, S).

    A query that may attend to nothing gets zeros, as in PyTorch's function.
    """
    may = mask if mask is None or mask.dtype == torch.bool else mask > -math.inf  # (B, H, T, S)
    groups = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(groups, dim=1) if groups > 1 else t for t in (k, v))  # (B, H, S, E)
    scores = (q * scale) @ k.mT  # (B, H, T, S)
    if is_causal:  # each query sees itself at least
        scores = scores + scores.new_full(scores.shape[-2:], -math.inf).triu(1)
    elif mask is not None and may is not None:
        scores = scores if mask is may else scores + mask
        scores = scores.masked_fill(~may, torch.finfo(scores.dtype).min)
    weights = scores.softmax(dim=-1).to(v.dtype)
    if may is not None:
        weights = weights * may
    return F.dropout(weights, dropout_p) @ v, weights


EXPLICIT_SCORES = 512 * 512
"""Scores (T * S) per head up to which a CPU trains faster in bfloat16 with explicit attention weights."""


def learns_slowly(q: Tensor, k: Tensor) -> bool:
    """Whether explicit attention trains faster than PyTorch's fused kernel.

    On a CPU in bfloat16 the fused backward pass takes 1.5 times as long on rows of 256 tokens, and more than 5 times
    as long on rows of 36. Explicit weights need more memory, so rows of more than 512 tokens stay fused.
    """
    if q.device.type != "cpu" or q.dtype != torch.bfloat16 or not torch.is_grad_enabled():
        return False
    return q.shape[-2] * k.shape[-2] <= EXPLICIT_SCORES


KERNEL_BYTES = 16
"""Heads of the memory-efficient kernel are a multiple of this wide: 8 numbers in 16 bits, 4 in float32."""


def only_memory_efficient(q: Tensor, mask: Tensor | None) -> bool:
    """Whether the memory-efficient kernel is the one fast kernel for these queries.

    On a GPU flash attention takes neither masks nor float32. What this kernel does not take either, keys that several
    query heads share and some widths of heads, would fall to the slowest kernel, which holds all scores in memory.
    """
    return q.device.type == "cuda" and (mask is not None or q.dtype not in (torch.float16, torch.bfloat16))


def for_memory_efficient(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Queries, keys, values and mask that the memory-efficient kernel takes, with the same products.

    Zeros widen the heads; those at the end of the result are cut off. In a step of generation, the only query of each
    head becomes one of several of a key head, so that no key of the cache is copied; else each head gets its own keys.
    """
    groups = q.shape[1] // k.shape[1]
    if groups > 1 and q.shape[2] == 1 and not is_causal:
        q = q.reshape(q.shape[0], -1, groups, q.shape[3])  # (B, H, 1, E) -> (B, K, H / K, E)
        mask = (
            mask.reshape(mask.shape[0], -1, groups, mask.shape[3]) if mask is not None and mask.shape[1] > 1 else mask
        )
    elif groups > 1:
        k, v = (t.repeat_interleave(groups, dim=1) for t in (k, v))
    missing = -q.shape[3] % (KERNEL_BYTES // q.element_size())
    q, k, v = (F.pad(t, (0, missing)) if missing else t for t in (q, k, v))
    return q, k, v, mask


def fused_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, dropout_p: float, scale: float
) -> Tensor:
    """`F.scaled_dot_product_attention`, for masks of any type, heads of any width and keys that serve several heads."""
    if mask is not None and mask.is_floating_point():
        mask = mask.to(q.dtype)  # the fused kernels need equal types
    elif mask is not None and torch.compiler.is_compiling() and not torch.compiler.is_exporting():
        # PyTorch does the same inside, but its compiler (2.14) then fixes the strides that the backward pass expects to
        # those of the first batch, and raises in the first batch of another length.
        mask = q.new_zeros(mask.shape).masked_fill(~mask, -math.inf)
    shape, adapted = q.shape, only_memory_efficient(q, mask)
    if adapted:
        q, k, v, mask = for_memory_efficient(q, k, v, mask, is_causal)
    gqa = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=is_causal, dropout_p=dropout_p, scale=scale, enable_gqa=gqa
    )
    return out[..., : shape[3]].reshape(shape) if adapted else out


def block_attention(q: Tensor, k: Tensor, v: Tensor, blocks: "BlockMask", scale: float) -> Tensor:
    """Flex attention, whose kernels share keys among query heads; fast only in a compiled network."""
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention(q, k, v, block_mask=blocks, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
