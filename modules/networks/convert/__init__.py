"""Conversion of foreign weights: one key table per family, each with a parity test (test_parity_*.py)."""

from trunkline.modules.networks.convert.timm_vit import vit_from_timm
from trunkline.modules.networks.convert.transformers_bert import bert_from_transformers
from trunkline.modules.networks.convert.transformers_clip import clip_from_transformers
from trunkline.modules.networks.convert.transformers_gpt2 import gpt_config_from_transformers, gpt_from_transformers

__all__ = [
    "bert_from_transformers",
    "clip_from_transformers",
    "gpt_config_from_transformers",
    "gpt_from_transformers",
    "vit_from_timm",
]
