"""Conversion of foreign weights: one key table per family, each with a parity test (test_parity_*.py)."""

from trunkline.modules.networks.convert.transformers_ast import (
    ast_config_from_transformers,
    ast_config_to_transformers,
    ast_from_transformers,
    ast_to_transformers,
)
from trunkline.modules.networks.convert.transformers_bart import (
    bart_config_from_transformers,
    bart_config_to_transformers,
    bart_from_transformers,
    bart_to_transformers,
    marian_config_from_transformers,
    marian_config_to_transformers,
    marian_from_transformers,
    marian_to_transformers,
)
from trunkline.modules.networks.convert.transformers_t5 import (
    t5_config_from_transformers,
    t5_config_to_transformers,
    t5_from_transformers,
    t5_to_transformers,
)
from trunkline.modules.networks.convert.transformers_whisper import (
    whisper_config_from_transformers,
    whisper_config_to_transformers,
    whisper_from_transformers,
    whisper_to_transformers,
)

__all__ = [
    "ast_config_from_transformers",
    "ast_config_to_transformers",
    "ast_from_transformers",
    "ast_to_transformers",
    "bart_config_from_transformers",
    "bart_config_to_transformers",
    "bart_from_transformers",
    "bart_to_transformers",
    "marian_config_from_transformers",
    "marian_config_to_transformers",
    "marian_from_transformers",
    "marian_to_transformers",
    "t5_config_from_transformers",
    "t5_config_to_transformers",
    "t5_from_transformers",
    "t5_to_transformers",
    "whisper_config_from_transformers",
    "whisper_config_to_transformers",
    "whisper_from_transformers",
    "whisper_to_transformers",
]
