"""The trunk: one `Transformer` that every model is built on.

It sees embeddings, never token ids, pixels or modality names. The original post-norm ReLU block
(Vaswani et al., 2017, arXiv:1706.03762) and the modern pre-norm rotary SwiGLU block are both just
configurations of it.

Shape legend: B batch, T target (query) tokens, S source (key) tokens, D model width, H query heads,
F hidden width of the MLP.
"""

from collections.abc import Collection
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trunkline import TrunklineError
from trunkline.modules.attention_kernels import attention_path, block_mask, mask_kind, narrow, product_dtype
from trunkline.modules.backbone.attention import (
    Attention,
    Keep,
    KVCache,
    Rotation,
    make_norm,
    rotation_table,
    take,
    take_queries,
)
from trunkline.modules.backbone.config import GATED, TransformerConfig
from trunkline.modules.backbone.masks import (
    causal_mask,
    four_dimensional,
    restrict,
    same_document,
    self_attention_mask,
)

if TYPE_CHECKING:  # imported where it is used: it takes half a second
    from torch.nn.attention.flex_attention import BlockMask


class TransformerOutput(NamedTuple):
    """What a trunk returns."""

    x: Tensor
    """(B, T, D) final states."""
    attention: list[Tensor] | None = None
    """With `return_attention=True`: the self-attention weights (B, H, T, S) of each block."""
    cross_attention: list[Tensor] | None = None
    """With `return_attention=True`: the weights (B, H, T, S) over `context` of each block."""
    states: list[Tensor] | None = None
    """With `layers`: the states (B, T, D) after each of these blocks."""


class MLP(nn.Module):
    """Two linear layers with an activation between them; a gated first layer computes both gate and value."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.kind = config.mlp
        width = config.hidden_dim * (2 if config.mlp in GATED else 1)
        self.fc1 = nn.Linear(config.dim, width, bias=config.bias)
        self.fc2 = nn.Linear(config.hidden_dim, config.dim, bias=config.bias)

    def fused_projections(self) -> list[tuple[Tensor, int]]:
        """As for `Attention`."""
        return [(self.fc1.weight, 2)] if self.kind in GATED else []

    def activate(self, x: Tensor) -> Tensor:
        """(..., F or 2 F) -> (..., F)."""
        if self.kind == "gelu":
            return F.gelu(x)
        if self.kind == "gelu_tanh":
            return F.gelu(x, approximate="tanh")
        if self.kind == "quick_gelu":
            return x * torch.sigmoid(1.702 * x)
        if self.kind == "silu":
            return F.silu(x)
        if self.kind in GATED:
            gate, value = x.chunk(2, dim=-1)
            return (F.silu(gate) if self.kind == "swiglu" else F.gelu(gate, approximate="tanh")) * value
        x = F.relu(x)
        return x.square() if self.kind == "relu2" else x

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        return self.fc2(self.activate(self.fc1(x)))


class DropPath(nn.Module):
    """Stochastic depth: drops a residual branch for some samples, and scales it up for the others."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """(B, ...) -> (B, ...)."""
        if self.rate == 0.0 or not self.training:
            return x
        keep = 1.0 - self.rate
        return x * x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep).div_(keep)


class LayerScale(nn.Module):
    """A learned factor for each of D channels (arXiv:2103.17239)."""

    def __init__(self, dim: int, value: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), value))

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return x * self.gamma


class Block(nn.Module):
    """Self-attention, cross-attention if configured, and an MLP, each on a residual branch."""

    def __init__(self, config: TransformerConfig, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm_first = config.norm_first
        self.norm1 = make_norm(config, config.dim)
        self.attn = Attention(config)
        self.ls1 = make_scale(config)
        if config.cross_attention:
            self.norm_cross = make_norm(config, config.dim)
            self.cross_attn = Attention(config, cross=True)
            self.ls_cross = make_scale(config)
        self.norm2 = make_norm(config, config.dim)
        self.mlp = MLP(config)
        self.ls2 = make_scale(config)
        self.dropout = nn.Dropout(config.dropout)
        self.drop_path = DropPath(drop_path)

    def residual(self, x: Tensor, branch: Tensor, norm: nn.Module) -> Tensor:
        """Add a sub-layer's output to its input; post-norm normalises the sum."""
        x = x + self.drop_path(self.dropout(branch))
        return x if self.norm_first else norm(x)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None,
        mask: Tensor | None,
        context_mask: Tensor | None,
        is_causal: bool,
        rotation: Rotation | None,
        cache: KVCache | None,
        layer: int,
        return_attention: bool,
        keep: Keep | None = None,
        blocks: "BlockMask | None" = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(B, T, D) -> (B, T, D), or (B, N, D) with `keep`; then self-attention and cross-attention weights."""
        if keep is not None:
            if is_causal:  # the flag would misplace the selected queries
                mask, is_causal = causal_mask(0, x.shape[1], x.shape[1], x.device), False
            mask, context_mask = take_queries(mask, keep), take_queries(context_mask, keep)
        branch, weights = self.attn(
            self.norm1(x) if self.norm_first else x,
            mask=mask,
            is_causal=is_causal,
            rotation=rotation,
            cache=cache,
            layer=layer,
            keep=keep,
            return_attention=return_attention,
            blocks=blocks,
        )
        x = self.residual(x if keep is None else take(x, keep), self.ls1(branch), self.norm1)
        cross_weights = None
        if context is not None:
            branch, cross_weights = self.cross_attn(
                self.norm_cross(x) if self.norm_first else x,
                context=context,
                mask=context_mask,
                cache=cache,
                layer=layer,
                return_attention=return_attention,
            )
            x = self.residual(x, self.ls_cross(branch), self.norm_cross)
        branch = self.mlp(self.norm2(x) if self.norm_first else x)
        return self.residual(x, self.ls2(branch), self.norm2), weights, cross_weights


def make_scale(config: TransformerConfig) -> nn.Module:
    """The configured LayerScale, or nothing."""
    return nn.Identity() if config.layer_scale is None else LayerScale(config.dim, config.layer_scale)


class Transformer(nn.Module):
    """A stack of blocks over embeddings; its `TransformerConfig` makes it an encoder or a decoder."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        rates = [config.drop_path * i / max(config.depth - 1, 1) for i in range(config.depth)]
        self.blocks = nn.ModuleList(Block(config, rate) for rate in rates)
        self.norm = make_norm(config, config.dim) if config.final_norm else nn.Identity()
        self.apply(init_linear)

    def _rules(
        self,
        x: Tensor,
        mask: Tensor | None,
        document: Tensor | None,
        causal: bool,
        start: int,
        whole: bool,
        every: bool,
    ) -> tuple["BlockMask | None", Tensor | None, bool]:
        """Which scores count in the self-attention of the tokens x (B, T, D), of which `start` came before.

        `whole` is as for `attention_path`; `every` says that the last block computes all tokens too.

        Returns:
            what flex attention reads, if this batch takes that path; mask and `is_causal` for a block without it.
        """
        window = narrow(self.config.window, start + x.shape[1]) if causal else None
        path = attention_path(
            mask_kind(mask, document, window),
            x.device,
            product_dtype(x),
            length=x.shape[1],
            head_width=self.config.head_width,
            dropout=self.config.dropout if self.training else 0.0,
            compiled=torch.compiler.is_compiling() and not torch.compiler.is_exporting(),
            whole=whole,
        )
        blocks = block_mask(x, mask, document, causal, window) if path == "flex" else None
        if blocks is not None and every:
            return blocks, None, False
        mask = four_dimensional(mask)
        mask = mask if document is None else restrict(mask, same_document(document))
        return blocks, *self_attention_mask(mask, causal, start, x.shape[1], x.device, window)

    def forward(
        self,
        x: Tensor,
        *,
        context: Tensor | None = None,
        mask: Tensor | None = None,
        document: Tensor | None = None,
        causal: bool | None = None,
        context_mask: Tensor | None = None,
        cache: KVCache | None = None,
        keep: Keep | None = None,
        return_attention: bool = False,
        layers: Collection[int] = (),
    ) -> TransformerOutput:
        """Run the trunk.

        Args:
            x: (B, T, D) embeddings; with `cache`, only those of the new tokens.
            context: (B, S, D) encoder states; required if `config.cross_attention`, else not allowed.
            mask: boolean, True where a token may attend; or floating point, added to the scores before the softmax
                (such as a bias by relative position, which may be learned), where minus infinity forbids. Either (B, S)
                for padding, or anything broadcastable to (B, H, T, S); with `cache`, S counts old and new tokens.
                Causality is applied in addition.
            document: (B, T) number of each token's document, if several are packed into a row: a token sees only its
                own document. Not with `cache`.
            causal: whether a token sees only itself and the tokens before it in this call; None means
                `config.causal`.
            context_mask: like `mask`, over `context`.
            cache: keys and values of earlier tokens; those of the new tokens are added to it.
            keep: the tokens whose final states are returned, as a slice or as (B, N) positions. The last block computes
                only these, which saves most of its work when a model reads one token (the class token, the end of a
                text) or a few (masked tokens).
            return_attention: also return each block's attention weights (slower, same result).
            layers: numbers of blocks after which the states are also returned, without the final norm; after the last
                block only those of the tokens in `keep`.

        Returns:
            `TransformerOutput(x=(B, T, D), attention, cross_attention, states)`; x is (B, N, D) with `keep`.

        Raises:
            TrunklineError: if `context` is given without `config.cross_attention` or missing with it, if a mask is
                neither boolean nor floating point, or if a trunk with a window is not causal.
        """
        if (context is not None) != self.config.cross_attention:
            raise TrunklineError(
                f"this trunk was made with cross_attention={self.config.cross_attention}, "
                f"but context is {'given' if context is not None else 'missing'}"
            )
        count, start = x.shape[1], 0 if cache is None else cache.length
        causal = self.config.causal if causal is None else causal
        if self.config.window is not None and not causal:
            raise TrunklineError(
                f"window={self.config.window} is for a causal trunk, but this one sees all tokens; leave it out",
                "model.network.*.window",
            )
        whole = cache is None and not return_attention
        blocks, mask, is_causal = self._rules(x, mask, document, causal, start, whole, keep is None)
        rotation = None
        if self.config.rope_theta is not None:
            positions = torch.arange(count, device=x.device) + start
            rotation = rotation_table(positions, self.config.head_width, self.config.rope_theta)
        shared = (context, mask, four_dimensional(context_mask), is_causal, rotation, cache)
        attention: list[Tensor] = []
        cross_attention: list[Tensor] = []
        states: list[Tensor] = []
        recompute = self.config.activation_checkpointing and self.training and torch.is_grad_enabled()
        for layer, block in enumerate(self.blocks):
            run = partial(checkpoint, block, use_reentrant=False) if recompute else block
            kept = keep if layer == self.config.depth - 1 else None
            flex = blocks if kept is None else None
            x, weights, cross_weights = run(x, *shared, layer, return_attention, kept, flex)
            attention += [] if weights is None else [weights]
            cross_attention += [] if cross_weights is None else [cross_weights]
            states += [x] if layer in layers else []
        if cache is not None:
            cache.advance(count)
        return TransformerOutput(self.norm(x), attention or None, cross_attention or None, states or None)


def init_linear(module: nn.Module) -> None:
    """Initialise a linear layer as in BERT, GPT-2 and ViT: truncated normal weights (std 0.02), zero biases."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
