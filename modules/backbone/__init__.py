"""The trunk and its parts. Needs only torch."""

from trunkline.modules.backbone.attention import KVCache
from trunkline.modules.backbone.config import TransformerConfig
from trunkline.modules.backbone.embeddings import PatchEmbed, resize_positions, sincos_positions, sincos_positions_2d
from trunkline.modules.backbone.heads import AttentionPool
from trunkline.modules.backbone.relative import RelativeBias
from trunkline.modules.backbone.transformer import Transformer, TransformerOutput

__all__ = [
    "AttentionPool",
    "KVCache",
    "PatchEmbed",
    "RelativeBias",
    "Transformer",
    "TransformerConfig",
    "TransformerOutput",
    "resize_positions",
    "sincos_positions",
    "sincos_positions_2d",
]
