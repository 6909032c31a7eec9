"""Convert weights and configuration of the T5 in transformers to those of an `EncoderDecoder`, and back."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from trunkline import TrunklineError
from trunkline.modules.backbone import TransformerConfig
from trunkline.modules.backbone.config import GATED
from trunkline.modules.networks.convert.family import ForeignFamily, with_model_type
from trunkline.modules.networks.convert.key_tables import (
    KeyTable,
    explicit,
    from_theirs,
    refuse_difference,
    refuse_options,
    shared_weight,
    to_theirs,
)
from trunkline.modules.networks.encoder_decoder import EncoderDecoder, EncoderDecoderConfig

ACTIVATIONS_OF_T5 = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "silu": "silu",
    "gated-gelu": "geglu",
    "gated-silu": "swiglu",
}
"""`feed_forward_proj` of T5 -> `mlp` of the trunk."""


def t5_table(gated: bool) -> KeyTable:
    """Names of an `EncoderDecoder` -> of T5, with or without a gated MLP."""
    first_layer = ("wi_0", "wi_1") if gated else ("wi",)
    table: dict[str, tuple[str, ...]] = {"token_embed": ("shared",), "head": ("lm_head",)}
    for side, bias, layers in (("encoder", "relative_bias", 2), ("decoder", "target_relative_bias", 3)):
        ours, theirs = f"{side}.blocks.*", f"{side}.block.*.layer"
        last = f"{theirs}.{layers - 1}"
        table |= {
            f"{bias}.table": (f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias",),
            f"{ours}.attn.qkv": tuple(f"{theirs}.0.SelfAttention.{part}" for part in "qkv"),
            f"{ours}.attn.proj": (f"{theirs}.0.SelfAttention.o",),
            f"{ours}.norm1": (f"{theirs}.0.layer_norm",),
            f"{ours}.mlp.fc1": tuple(f"{last}.DenseReluDense.{part}" for part in first_layer),
            f"{ours}.mlp.fc2": (f"{last}.DenseReluDense.wo",),
            f"{ours}.norm2": (f"{last}.layer_norm",),
            f"{side}.norm": (f"{side}.final_layer_norm",),
        }
    return table | {
        "decoder.blocks.*.cross_attn.q": ("decoder.block.*.layer.1.EncDecAttention.q",),
        "decoder.blocks.*.cross_attn.kv": tuple(f"decoder.block.*.layer.1.EncDecAttention.{part}" for part in "kv"),
        "decoder.blocks.*.cross_attn.proj": ("decoder.block.*.layer.1.EncDecAttention.o",),
        "decoder.blocks.*.norm_cross": ("decoder.block.*.layer.1.layer_norm",),
    }


SHARED_IN_T5 = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
"""Names of the embedding of both sides; files have the first."""
UNUSED = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"  # in files of T5 1.0


def t5_from_transformers(weights: Mapping[str, Tensor], config: EncoderDecoderConfig) -> dict[str, Tensor]:
    """State dict of a transformers `T5ForConditionalGeneration` -> state dict of an `EncoderDecoder`.

    Raises:
        TrunklineError: for a weight that an `EncoderDecoder` does not have.
    """
    gated = any(".wi_0." in name for name in weights)
    own = {name: value for name, value in weights.items() if name != UNUSED}
    own |= shared_weight(own, SHARED_IN_T5, "a T5")
    converted = from_theirs(own, t5_table(gated), "a T5")
    if not config.tie_embeddings and "head.weight" not in converted:  # version 5 of transformers ties every T5
        converted["head.weight"] = converted["token_embed.weight"].clone()
    return converted


def t5_to_transformers(weights: Mapping[str, Tensor], config: EncoderDecoderConfig) -> dict[str, Tensor]:
    """State dict of an `EncoderDecoder` -> state dict of a transformers `T5ForConditionalGeneration`.

    In the names of its files, which lack copies of shared weights.

    Raises:
        TrunklineError: for a weight that a T5 does not have.
    """
    left = {"target_embed.weight", *(["head.weight"] if config.tie_embeddings else [])}
    own = {name: value for name, value in weights.items() if name not in left}
    gated = config.encoder.mlp in GATED
    return to_theirs(own, t5_table(gated), "a T5", kinds=("weight",))


def t5_config_from_transformers(config: Mapping[str, Any]) -> EncoderDecoderConfig:
    """Content of the config.json of a transformers T5 or mT5 -> configuration of the same `EncoderDecoder`.

    A network of T5 1.1 keeps an output layer of its own. Dropout takes place where the trunk has it, which is not
    everywhere where T5 has it.

    Raises:
        TrunklineError: if the T5 uses an option that an `EncoderDecoder` does not have.
    """
    writer = next(iter(config.get("architectures") or ()), "")
    if writer.endswith("EncoderModel"):
        raise TrunklineError(
            f"a {writer} of transformers cannot be converted: an EncoderDecoder has an encoder and a decoder; give the "
            "folder of the T5ForConditionalGeneration that it is a part of"
        )
    usual = {"model_type": ("t5", "mt5"), "is_encoder_decoder": (True,), "feed_forward_proj": ACTIVATIONS_OF_T5}
    refuse_options(config, usual, "a T5")
    feed_forward = config.get("feed_forward_proj", "relu")
    named = "gelu_new" if feed_forward == "gated-gelu" else feed_forward.removeprefix("gated-")
    refuse_options(config, {"dense_act_fn": (named,)}, f"a T5 with feed_forward_proj={feed_forward}, but")
    encoder = TransformerConfig(
        dim=config["d_model"],
        depth=config["num_layers"],
        num_heads=config["num_heads"],
        mlp_dim=config["d_ff"],
        mlp=ACTIVATIONS_OF_T5[feed_forward],  # type: ignore[arg-type]
        norm="rmsnorm",
        norm_eps=config.get("layer_norm_epsilon", 1e-6),
        bias=False,
        dropout=config.get("dropout_rate", 0.1),
        head_dim=config["d_kv"],
        attn_scale=1.0,
    )
    # Version 5 of transformers keeps `scale_decoder_outputs`, and says of every T5 and mT5 that it is tied.
    scaled = config.get("model_type") != "mt5" and config.get(
        "scale_decoder_outputs", config.get("tie_word_embeddings", True)
    )
    length = config.get("n_positions") or 512
    return EncoderDecoderConfig(
        vocab_size=config["vocab_size"],
        max_length=length,
        max_target_length=length,
        positions="relative",
        relative_buckets=config.get("relative_attention_num_buckets", 32),
        relative_distance=config.get("relative_attention_max_distance", 128),
        tie_embeddings=scaled,
        scale_output=scaled,
        encoder=encoder,
        decoder=replace(encoder, depth=config.get("num_decoder_layers") or encoder.depth),
    )


def t5_config_to_transformers(config: EncoderDecoderConfig) -> dict[str, Any]:
    """Configuration of an `EncoderDecoder` -> content of the config.json of the same transformers T5.

    Token ids, such as that of padding, are not in it.

    Raises:
        TrunklineError: if the network has an option that T5 does not have.
    """
    encoder = config.encoder
    names = {ours: theirs for theirs, ours in ACTIVATIONS_OF_T5.items()}
    content = {
        "model_type": "t5",
        "architectures": ["T5ForConditionalGeneration"],
        "vocab_size": config.vocab_size,
        "n_positions": max(config.max_length, config.max_target_length),
        "d_model": encoder.dim,
        "d_kv": encoder.head_width,
        "d_ff": encoder.hidden_dim,
        "num_layers": encoder.depth,
        "num_decoder_layers": config.decoder.depth,
        "num_heads": encoder.num_heads,
        "relative_attention_num_buckets": config.relative_buckets,
        "relative_attention_max_distance": config.relative_distance,
        "dropout_rate": encoder.dropout,
        "layer_norm_epsilon": encoder.norm_eps,
        "feed_forward_proj": names.get(encoder.mlp, "relu"),
        "tie_word_embeddings": config.scale_output,
    }
    expressed = t5_config_from_transformers(content)
    refuse_difference(explicit(config), explicit(expressed), "a T5", free=("max_length", "max_target_length"))
    return content


T5 = ForeignFamily(
    name="a T5",
    origin="transformers",
    network=EncoderDecoder,
    recognises=with_model_type("t5", "mt5"),
    config_from=lambda content, weights: t5_config_from_transformers(content),
    config_to=t5_config_to_transformers,
    weights_from=t5_from_transformers,
    weights_to=t5_to_transformers,
    # Without the output layer: peft would tie one that has learned to the embeddings.
    layers=lambda config: ({n: t for n, t in t5_table(config.encoder.mlp in GATED).items() if n != "head"},),
)
