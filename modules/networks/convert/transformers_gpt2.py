"""Convert weights and configuration of the GPT-2 in transformers to those of a `GPT`, and back."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from trunkline.modules.backbone import TransformerConfig
from trunkline.modules.networks.convert.family import ForeignFamily, with_model_type
from trunkline.modules.networks.convert.foreign_files import transposed
from trunkline.modules.networks.convert.key_tables import (
    KeyTable,
    from_theirs,
    refuse_difference,
    refuse_options,
    to_theirs,
)
from trunkline.modules.networks.gpt import GPT, GPTConfig

OUR_GPT, THEIR_GPT2 = "a GPT", "a GPT-2"
ACTIVATIONS_OF_GPT2 = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu"}
"""`activation_function` of GPT-2 -> `mlp` of the trunk."""
GPT2_TABLE: KeyTable = {
    "token_embed": ("wte",),
    "pos_embed": ("wpe",),
    "backbone.blocks.*.norm1": ("h.*.ln_1",),
    "backbone.blocks.*.attn.qkv": ("h.*.attn.c_attn",),
    "backbone.blocks.*.attn.proj": ("h.*.attn.c_proj",),
    "backbone.blocks.*.norm2": ("h.*.ln_2",),
    "backbone.blocks.*.mlp.fc1": ("h.*.mlp.c_fc",),
    "backbone.blocks.*.mlp.fc2": ("h.*.mlp.c_proj",),
    "backbone.norm": ("ln_f",),
    "head": ("lm_head",),
}
"""Names of a `GPT` -> of GPT-2, without the prefix that models with an output layer have."""
PREFIX_OF_GPT2 = "transformer."
MODULES_OF_GPT2: KeyTable = {
    ours: names if ours == "head" else tuple(PREFIX_OF_GPT2 + name for name in names)
    for ours, names in GPT2_TABLE.items()
}
"""The same with the prefix."""
CONV1D = re.compile(r"\.c_(attn|proj|fc)\.weight$")
"""Linear layers that GPT-2 stores as (in, out) matrices, which it calls Conv1D; here they are (out, in)."""
MASKS_OF_GPT2 = (".attn.bias", ".attn.masked_bias")
"""Causal masks, in files of older versions."""


def gpt2_from_transformers(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict of a transformers `GPT2LMHeadModel` or `GPT2Model` -> state dict of a `GPT`.

    Raises:
        TrunklineError: for a weight that a `GPT` does not have.
    """
    own = {
        name.removeprefix(PREFIX_OF_GPT2): transposed(weights, name) if CONV1D.search(name) else weights[name]
        for name in weights
        if not name.endswith(MASKS_OF_GPT2)
    }
    return from_theirs(own, GPT2_TABLE, THEIR_GPT2, OUR_GPT)


def gpt2_to_transformers(weights: Mapping[str, Tensor], config: GPTConfig) -> dict[str, Tensor]:
    """State dict of a `GPT` -> state dict of a transformers `GPT2LMHeadModel`, without an output layer that is tied.

    Raises:
        TrunklineError: for a weight that a GPT-2 does not have.
    """
    converted = to_theirs(without_tied_head(weights, config), GPT2_TABLE, THEIR_GPT2, OUR_GPT)
    return {
        name if name.startswith("lm_head.") else PREFIX_OF_GPT2 + name: value.T if CONV1D.search(name) else value
        for name, value in converted.items()
    }


def without_tied_head(weights: Mapping[str, Tensor], config: GPTConfig) -> dict[str, Tensor]:
    """The weights of a `GPT`, each once."""
    return {name: value for name, value in weights.items() if not (config.tie_embeddings and name == "head.weight")}


def gpt2_config_from_transformers(config: Mapping[str, Any]) -> GPTConfig:
    """Content of the config.json of a transformers GPT-2 -> configuration of the same `GPT`.

    Raises:
        TrunklineError: if the GPT-2 uses an option that the trunk does not have.
    """
    usual = {
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
        "activation_function": ACTIVATIONS_OF_GPT2,
    }
    refuse_options(config, usual, THEIR_GPT2, OUR_GPT)
    trunk = TransformerConfig(
        dim=config.get("n_embd", 768),
        depth=config.get("n_layer", 12),
        num_heads=config.get("n_head", 12),
        mlp_dim=config.get("n_inner"),
        mlp=ACTIVATIONS_OF_GPT2[config.get("activation_function", "gelu_new")],  # type: ignore[arg-type]
        norm_eps=config.get("layer_norm_epsilon", 1e-5),
        causal=True,
        dropout=config.get("resid_pdrop", 0.0),
    )
    return GPTConfig(
        vocab_size=config.get("vocab_size", 50257),
        max_length=config.get("n_positions", 1024),
        tie_embeddings=config.get("tie_word_embeddings", True),
        backbone=trunk,
    )


def gpt2_config_to_transformers(config: GPTConfig) -> dict[str, Any]:
    """Configuration of a `GPT` -> content of the config.json of the same transformers GPT-2.

    Token ids, such as that at the end of a text, are not in it.

    Raises:
        TrunklineError: if the network has an option that GPT-2 does not have.
    """
    trunk = config.backbone
    names = {ours: theirs for theirs, ours in reversed(ACTIVATIONS_OF_GPT2.items())}
    content = {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": config.vocab_size,
        "n_positions": config.max_length,
        "n_embd": trunk.dim,
        "n_layer": trunk.depth,
        "n_head": trunk.num_heads,
        "n_inner": trunk.mlp_dim,
        "activation_function": names.get(trunk.mlp, "gelu_new"),
        "layer_norm_epsilon": trunk.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), trunk.dropout),
    }
    refuse_difference(config, gpt2_config_from_transformers(content), THEIR_GPT2, OUR_GPT)
    return content


GPT2 = ForeignFamily(
    name=THEIR_GPT2,
    origin="transformers",
    network=GPT,
    recognises=with_model_type("gpt2"),
    config_from=lambda content, weights: gpt2_config_from_transformers(content),
    config_to=gpt2_config_to_transformers,
    weights_from=lambda weights, config: gpt2_from_transformers(weights),
    weights_to=gpt2_to_transformers,
    layers=lambda config: (MODULES_OF_GPT2,),
)
