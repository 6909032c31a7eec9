"""The trunk and its parts. Needs only torch."""

from trunkline.modules.backbone.attention import KVCache
from trunkline.modules.backbone.config import TransformerConfig
from trunkline.modules.backbone.transformer import Transformer, TransformerOutput

__all__ = ["KVCache", "Transformer", "TransformerConfig", "TransformerOutput"]
