"""The trunk and its parts. Needs only torch."""

from trunkline.modules.backbone.attention import KVCache
from trunkline.modules.backbone.config import TransformerConfig
from trunkline.modules.backbone.embeddings import PatchEmbed, resize_positions, sincos_positions, sincos_positions_2d
from trunkline.modules.backbone.transformer import Transformer, TransformerOutput

__all__ = [
    "KVCache",
    "PatchEmbed",
    "Transformer",
    "TransformerConfig",
    "TransformerOutput",
    "resize_positions",
    "sincos_positions",
    "sincos_positions_2d",
]
