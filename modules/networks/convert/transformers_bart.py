"""Convert weights and configuration of BART and Marian in transformers to those of an `EncoderDecoder`, and back."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trunkline.modules.backbone import TransformerConfig
from trunkline.modules.networks.convert.key_tables import (
    KeyTable,
    explicit,
    from_theirs,
    refuse_difference,
    refuse_options,
    to_theirs,
)
from trunkline.modules.networks.encoder_decoder import EncoderDecoderConfig

ACTIVATIONS_OF_BART = {
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
    "swish": "silu",
    "silu": "silu",
}
"""`activation_function` of BART and Marian -> `mlp` of the trunk."""
OFFSET = 2
"""BART's positions begin in the third row of its table."""


def bart_table() -> KeyTable:
    """Names of an `EncoderDecoder` -> of BART and Marian."""
    table = {
        "token_embed": ("model.encoder.embed_tokens",),
        "target_embed": ("model.decoder.embed_tokens",),
        "pos_embed": ("model.encoder.embed_positions",),
        "target_pos_embed": ("model.decoder.embed_positions",),
        "embed_norm": ("model.encoder.layernorm_embedding",),
        "target_embed_norm": ("model.decoder.layernorm_embedding",),
        "head": ("lm_head",),
    }
    return {**table, **layers_table()}


def layers_table() -> KeyTable:
    """Names of the layers of our two trunks -> of BART's, and of other models with the same layers."""
    table: dict[str, tuple[str, ...]] = {}
    for side in ("encoder", "decoder"):
        ours, theirs = f"{side}.blocks.*", f"model.{side}.layers.*"
        table |= {
            f"{ours}.attn.qkv": tuple(f"{theirs}.self_attn.{part}_proj" for part in "qkv"),
            f"{ours}.attn.proj": (f"{theirs}.self_attn.out_proj",),
            f"{ours}.norm1": (f"{theirs}.self_attn_layer_norm",),
            f"{ours}.mlp.fc1": (f"{theirs}.fc1",),
            f"{ours}.mlp.fc2": (f"{theirs}.fc2",),
            f"{ours}.norm2": (f"{theirs}.final_layer_norm",),
        }
    return table | {
        "decoder.blocks.*.cross_attn.q": ("model.decoder.layers.*.encoder_attn.q_proj",),
        "decoder.blocks.*.cross_attn.kv": tuple(f"model.decoder.layers.*.encoder_attn.{part}_proj" for part in "kv"),
        "decoder.blocks.*.cross_attn.proj": ("model.decoder.layers.*.encoder_attn.out_proj",),
        "decoder.blocks.*.norm_cross": ("model.decoder.layers.*.encoder_attn_layer_norm",),
    }


SHARED = "model.shared.weight"
TOKENS = ("model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight")
POSITIONS = ("model.encoder.embed_positions.weight", "model.decoder.embed_positions.weight")
LOGITS_BIAS = "final_logits_bias"


def bart_from_transformers(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict of a transformers `BartForConditionalGeneration` -> state dict of an `EncoderDecoder`.

    Raises:
        TrunklineError: for a weight that an `EncoderDecoder` does not have.
    """
    return _from(weights, "a BART", {name: weights[name][OFFSET:] for name in POSITIONS if name in weights})


def marian_from_transformers(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict of a transformers `MarianMTModel` -> state dict of an `EncoderDecoder`.

    Raises:
        TrunklineError: for a weight that an `EncoderDecoder` does not have.
    """
    return _from(weights, "a Marian", {})


def _from(weights: Mapping[str, Tensor], family: str, positions: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert a state dict, with these positions. In files, copies of a shared embedding are absent."""
    special = (SHARED, LOGITS_BIAS, *POSITIONS)
    own = {name: value for name, value in weights.items() if name not in special} | positions
    for name in TOKENS:
        if SHARED in weights:
            own.setdefault(name, weights[SHARED])
    own.setdefault("lm_head.weight", own[TOKENS[1]])
    converted = from_theirs(own, bart_table(), family)
    return converted | {"head.bias": weights[LOGITS_BIAS][0]}


def bart_to_transformers(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict of an `EncoderDecoder` -> state dict of a transformers `BartForConditionalGeneration`.

    Raises:
        TrunklineError: for a weight that a BART does not have.
    """
    converted = _to(weights, "a BART")
    return converted | {name: F.pad(converted[name], (0, 0, OFFSET, 0)) for name in POSITIONS}


def marian_to_transformers(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict of an `EncoderDecoder` -> state dict of a transformers `MarianMTModel`, which makes positions itself.

    Raises:
        TrunklineError: for a weight that a Marian does not have.
    """
    return _to(weights, "a Marian")


def _to(weights: Mapping[str, Tensor], family: str) -> dict[str, Tensor]:
    own = {name: value for name, value in weights.items() if name != "head.bias"}
    converted = to_theirs(own, bart_table(), family)
    converted[LOGITS_BIAS] = weights["head.bias"][None].clone()
    if torch.equal(*(weights[f"{side}_embed.weight"] for side in ("token", "target"))):
        converted[SHARED] = weights["token_embed.weight"].clone()
    return converted


def _trunks(config: Mapping[str, Any]) -> dict[str, Any]:
    """The two trunks of a BART or Marian."""
    encoder, decoder = (
        TransformerConfig(
            dim=config["d_model"],
            depth=config[f"{side}_layers"],
            num_heads=config[f"{side}_attention_heads"],
            mlp_dim=config[f"{side}_ffn_dim"],
            mlp=ACTIVATIONS_OF_BART[config.get("activation_function", "gelu")],  # type: ignore[arg-type]
            norm_eps=1e-5,
            norm_first=False,
            final_norm=False,
            dropout=config.get("dropout", 0.1),
        )
        for side in ("encoder", "decoder")
    )
    return {"encoder": encoder, "decoder": decoder}


USUAL = {
    "is_encoder_decoder": (True,),
    "tie_word_embeddings": (True,),
    "normalize_before": (False,),
    "add_final_layer_norm": (False,),
    "activation_function": ACTIVATIONS_OF_BART,
}
"""Values of options that can be converted; some of them are only in old files."""


def bart_config_from_transformers(config: Mapping[str, Any]) -> EncoderDecoderConfig:
    """Content of the config.json of a transformers BART -> configuration of the same `EncoderDecoder`.

    Dropout takes place where the trunk has it, which is not everywhere where BART can have it.

    Raises:
        TrunklineError: if the BART uses an option that an `EncoderDecoder` does not have.
    """
    refuse_options(config, {"model_type": ("bart",), "normalize_embedding": (True,), **USUAL}, "a BART")
    return EncoderDecoderConfig(
        vocab_size=config["vocab_size"],
        max_length=config.get("max_position_embeddings", 1024),
        max_target_length=config.get("max_position_embeddings", 1024),
        positions="learned",
        scale_embeddings=config.get("scale_embedding", False),
        embed_norm=True,
        output_bias=True,
        **_trunks(config),
    )


def marian_config_from_transformers(config: Mapping[str, Any]) -> EncoderDecoderConfig:
    """Content of the config.json of a transformers Marian -> configuration of the same `EncoderDecoder`.

    Dropout takes place where the trunk has it, which is not everywhere where Marian can have it.

    Raises:
        TrunklineError: if the Marian uses an option that an `EncoderDecoder` does not have.
    """
    refuse_options(config, {"model_type": ("marian",), "normalize_embedding": (False,), **USUAL}, "a Marian")
    shared = config.get("share_encoder_decoder_embeddings", True)
    return EncoderDecoderConfig(
        vocab_size=config["vocab_size"],
        target_vocab_size=None if shared else config.get("decoder_vocab_size"),
        max_length=config.get("max_position_embeddings", 1024),
        max_target_length=config.get("max_position_embeddings", 1024),
        share_embeddings=shared,
        scale_embeddings=config.get("scale_embedding", False),
        output_bias=True,
        **_trunks(config),
    )


def _content(config: EncoderDecoderConfig) -> dict[str, Any]:
    """What the config.json files of BART and Marian have in common."""
    content: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "max_position_embeddings": max(config.max_length, config.max_target_length),
        "d_model": config.encoder.dim,
        "dropout": config.encoder.dropout,
        "activation_function": {"gelu_tanh": "gelu_new", "relu": "relu", "silu": "swish"}.get(
            config.encoder.mlp, "gelu"
        ),
        "scale_embedding": config.scale_embeddings,
    }
    for side, trunk in (("encoder", config.encoder), ("decoder", config.decoder)):
        content |= {
            f"{side}_layers": trunk.depth,
            f"{side}_attention_heads": trunk.num_heads,
            f"{side}_ffn_dim": trunk.hidden_dim,
        }
    return content


def bart_config_to_transformers(config: EncoderDecoderConfig) -> dict[str, Any]:
    """Configuration of an `EncoderDecoder` -> content of the config.json of the same transformers BART.

    Token ids, such as that of padding, are not in it.

    Raises:
        TrunklineError: if the network has an option that BART does not have.
    """
    content = {"model_type": "bart", **_content(config)}
    refuse_difference(explicit(config), explicit(bart_config_from_transformers(content)), "a BART")
    return content


def marian_config_to_transformers(config: EncoderDecoderConfig) -> dict[str, Any]:
    """Configuration of an `EncoderDecoder` -> content of the config.json of the same transformers Marian.

    Token ids, such as that of padding, are not in it.

    Raises:
        TrunklineError: if the network has an option that Marian does not have.
    """
    content = {
        "model_type": "marian",
        **_content(config),
        "decoder_vocab_size": config.target_vocabulary,
        "share_encoder_decoder_embeddings": config.one_embedding,
    }
    expressed = marian_config_from_transformers(content)
    refuse_difference(explicit(config), explicit(expressed), "a Marian", free=("max_length", "max_target_length"))
    return content
