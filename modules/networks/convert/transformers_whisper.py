"""Convert weights and configuration of the Whisper in transformers to those of a `Whisper`, and back."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from trunkline.modules.backbone import TransformerConfig
from trunkline.modules.networks.convert.family import ForeignFamily, with_model_type
from trunkline.modules.networks.convert.key_tables import (
    KeyTable,
    from_theirs,
    refuse_difference,
    refuse_options,
    to_theirs,
)
from trunkline.modules.networks.convert.transformers_bart import UNKNOWN_IDS, layers_table, with_prefix
from trunkline.modules.networks.positions import SinusoidalPositions
from trunkline.modules.networks.whisper import Whisper, WhisperConfig

OUR_WHISPER, THEIR_WHISPER = "our Whisper", "a Whisper of transformers"
ACTIVATIONS_OF_WHISPER = {"gelu": "gelu", "gelu_new": "gelu_tanh", "relu": "relu", "silu": "silu", "swish": "silu"}
"""`activation_function` of Whisper -> `mlp` of the trunk."""
FRAME_POSITIONS = "model.encoder.embed_positions.weight"


def whisper_table() -> KeyTable:
    """Names of our `Whisper` -> of theirs."""
    table = {
        "front.convs.0": ("model.encoder.conv1",),
        "front.convs.1": ("model.encoder.conv2",),
        "encoder.norm": ("model.encoder.layer_norm",),
        "pos_embed": (FRAME_POSITIONS.removesuffix(".weight"),),
        "target_embed": ("model.decoder.embed_tokens",),
        "target_pos_embed": ("model.decoder.embed_positions",),
        "decoder.norm": ("model.decoder.layer_norm",),
        "head": ("proj_out",),
    }
    return {**table, **layers_table()}


def whisper_from_transformers(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict of a transformers `WhisperForConditionalGeneration` or `WhisperModel` -> state dict of a `Whisper`.

    Their keys have no bias, ours gets zeros. The tied output layer may be absent.

    Raises:
        TrunklineError: for a weight that a `Whisper` does not have.
    """
    own = with_prefix(weights)
    for name, value in list(own.items()):
        if name.endswith(".k_proj.weight"):
            own.setdefault(name.removesuffix("weight") + "bias", value.new_zeros(len(value)))
    return from_theirs(own, whisper_table(), THEIR_WHISPER, OUR_WHISPER)


def whisper_to_transformers(weights: Mapping[str, Tensor], config: WhisperConfig) -> dict[str, Tensor]:
    """State dict of a `Whisper` -> state dict of a transformers `WhisperForConditionalGeneration`.

    In the names of its files, which lack the tied output layer. The bias of our keys is left out: it adds the same
    number to all scores of a query, which changes no attention.

    Raises:
        TrunklineError: for a weight that theirs does not have.
    """
    own = {name: value for name, value in weights.items() if name != "head.weight"}
    converted = to_theirs(own, whisper_table(), THEIR_WHISPER, OUR_WHISPER)
    if config.positions == "sinusoidal":
        like = weights["target_embed.weight"]
        computed = SinusoidalPositions(config.encoder.dim, with_end=True)(torch.arange(config.max_frames // 2))
        converted[FRAME_POSITIONS] = computed.to(like)
    return {name: value for name, value in converted.items() if not name.endswith(".k_proj.bias")}


def whisper_config_from_transformers(config: Mapping[str, Any]) -> WhisperConfig:
    """Content of the config.json of a transformers Whisper -> configuration of the same `Whisper`.

    Dropout takes place where the trunk has it, which is not everywhere where theirs can have it.

    Raises:
        TrunklineError: if it uses an option that a `Whisper` does not have.
    """
    usual = {
        "is_encoder_decoder": (True,),
        "tie_word_embeddings": (True,),
        "scale_embedding": (False,),
        "activation_function": ACTIVATIONS_OF_WHISPER,
    }
    refuse_options(config, usual, THEIR_WHISPER, OUR_WHISPER)
    encoder, decoder = (
        TransformerConfig(
            dim=config["d_model"],
            depth=config[f"{side}_layers"],
            num_heads=config[f"{side}_attention_heads"],
            mlp_dim=config[f"{side}_ffn_dim"],
            mlp=ACTIVATIONS_OF_WHISPER[config.get("activation_function", "gelu")],  # type: ignore[arg-type]
            norm_eps=1e-5,
            dropout=config.get("dropout", 0.0),
        )
        for side in ("encoder", "decoder")
    )
    return WhisperConfig(
        vocab_size=config["vocab_size"],
        num_mels=config.get("num_mel_bins", 80),
        max_frames=2 * config.get("max_source_positions", 1500),
        max_target_length=config.get("max_target_positions", 448),
        positions="fixed",
        encoder=encoder,
        decoder=decoder,
    )


def whisper_config_to_transformers(config: WhisperConfig) -> dict[str, Any]:
    """Configuration of a `Whisper` -> content of the config.json of the same Whisper in transformers.

    Token ids are unknown in it.

    Raises:
        TrunklineError: if the network has an option that theirs does not have.
    """
    names = {ours: theirs for theirs, ours in ACTIVATIONS_OF_WHISPER.items()}
    content: dict[str, Any] = {
        "model_type": "whisper",
        "architectures": ["WhisperForConditionalGeneration"],
        "vocab_size": config.vocab_size,
        "num_mel_bins": config.num_mels,
        "max_source_positions": config.max_frames // 2,
        "max_target_positions": config.max_target_length,
        "d_model": config.encoder.dim,
        "dropout": config.encoder.dropout,
        "activation_function": names.get(config.encoder.mlp, "gelu"),
        "tie_word_embeddings": True,
        **UNKNOWN_IDS,
        **dict.fromkeys(("suppress_tokens", "begin_suppress_tokens")),
    }
    for side, trunk in (("encoder", config.encoder), ("decoder", config.decoder)):
        content |= {
            f"{side}_layers": trunk.depth,
            f"{side}_attention_heads": trunk.num_heads,
            f"{side}_ffn_dim": trunk.hidden_dim,
        }
    own = replace(config, positions="fixed") if config.positions == "sinusoidal" else config  # written as a table
    refuse_difference(own, whisper_config_from_transformers(content), THEIR_WHISPER, OUR_WHISPER)
    return content


TRANSFORMERS_WHISPER = ForeignFamily(
    name=THEIR_WHISPER,
    origin="transformers",
    network=Whisper,
    recognises=with_model_type("whisper"),
    config_from=lambda content, weights: whisper_config_from_transformers(content),
    config_to=whisper_config_to_transformers,
    weights_from=lambda weights, config: whisper_from_transformers(weights),
    weights_to=whisper_to_transformers,
    layers=lambda config: (whisper_table(),),
)
