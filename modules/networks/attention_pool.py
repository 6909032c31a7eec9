"""Attention pooling, which turns the trunk's states into one vector."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from trunkline.modules.backbone.attention import Attention, make_norm
from trunkline.modules.backbone.config import TransformerConfig
from trunkline.modules.backbone.transformer import MLP, init_linear


class AttentionPool(nn.Module):
    """Multi-head attention pooling (MAP): one learned query attends to all states (arXiv:1810.00825).

    As in big_vision and timm: attention, then a residual MLP on the normalised result.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        # There is one query per sample, so options that are meant for long sequences are off.
        config = replace(config, dropout=0.0, qk_norm=False, num_kv_heads=None)
        self.query = nn.Parameter(torch.empty(1, 1, config.dim))
        nn.init.trunc_normal_(self.query, std=config.dim**-0.5)
        self.attn = Attention(config, cross=True)
        self.norm = make_norm(config, config.dim)
        self.mlp = MLP(config)
        self.apply(init_linear)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, T, D) states and an optional mask broadcastable to (B, H, 1, T) -> (B, D)."""
        pooled, _ = self.attn(self.query.expand(x.shape[0], 1, -1), context=x, mask=mask)
        return (pooled + self.mlp(self.norm(pooled)))[:, 0]
