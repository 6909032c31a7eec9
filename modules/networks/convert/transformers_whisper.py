"""Convert weights and configuration of the Whisper in transformers to those of a `Whisper`, and back."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from trunkline import TrunklineError
from trunkline.modules.backbone import TransformerConfig
from trunkline.modules.networks.convert.key_tables import (
    KeyTable,
    from_theirs,
    refuse_difference,
    refuse_options,
    to_theirs,
)
from trunkline.modules.networks.convert.transformers_bart import layers_table
from trunkline.modules.networks.positions import SinusoidalPositions
from trunkline.modules.networks.whisper import WhisperConfig

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
        "target_embed": ("model.decoder.embed_tokens",),
        "target_pos_embed": ("model.decoder.embed_positions",),
        "decoder.norm": ("model.decoder.layer_norm",),
        "head": ("proj_out",),
    }
    return {**table, **layers_table()}


def whisper_from_transformers(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict of a transformers `WhisperForConditionalGeneration` -> state dict of a `Whisper`.

    Their keys have no bias, ours gets zeros. The encoder's positions are computed here, and no weights.

    Raises:
        TrunklineError: for a weight that a `Whisper` does not have, and for positions of frames that were trained.
    """
    own = {name: value for name, value in weights.items() if name != FRAME_POSITIONS}
    if FRAME_POSITIONS in weights:
        check_frame_positions(weights[FRAME_POSITIONS])
    for name, value in weights.items():
        if name.endswith(".k_proj.weight"):
            own.setdefault(name.removesuffix("weight") + "bias", value.new_zeros(len(value)))
    own.setdefault("proj_out.weight", own["model.decoder.embed_tokens.weight"])  # absent in files, since it is tied
    return from_theirs(own, whisper_table(), THEIR_WHISPER, OUR_WHISPER)


def whisper_to_transformers(weights: Mapping[str, Tensor], max_frames: int = 3000) -> dict[str, Tensor]:
    """State dict of a `Whisper` -> state dict of a transformers `WhisperForConditionalGeneration`.

    The bias of our keys is left out: it adds the same number to all scores of a query, which changes no attention.

    Args:
        weights: of our network.
        max_frames: frames of the longest clip, as in its configuration.

    Raises:
        TrunklineError: for a weight that theirs does not have.
    """
    converted = to_theirs(weights, whisper_table(), THEIR_WHISPER, OUR_WHISPER)
    table = frame_positions(max_frames // 2, weights["target_embed.weight"])
    return {name: value for name, value in converted.items() if not name.endswith(".k_proj.bias")} | {
        FRAME_POSITIONS: table
    }


def frame_positions(states: int, like: Tensor) -> Tensor:
    """Their table (states, D) of the encoder's positions."""
    return SinusoidalPositions(like.shape[1], with_end=True)(torch.arange(states, device=like.device)).to(like.dtype)


def check_frame_positions(table: Tensor) -> None:
    """Refuse positions that our network would not compute."""
    difference = (table.float() - frame_positions(len(table), table.float())).abs().max().item()
    if difference > 0.01:  # files in half precision are 5e-4 off
        raise TrunklineError(
            f"'{FRAME_POSITIONS}' differs by {difference:.2g} from the sines and cosines that {OUR_WHISPER} computes: "
            "these positions were trained, so the weights cannot be converted"
        )


def whisper_config_from_transformers(config: Mapping[str, Any]) -> WhisperConfig:
    """Content of the config.json of a transformers Whisper -> configuration of the same `Whisper`.

    Dropout takes place where the trunk has it, which is not everywhere where theirs can have it.

    Raises:
        TrunklineError: if it uses an option that a `Whisper` does not have.
    """
    usual = {
        "model_type": ("whisper",),
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
        encoder=encoder,
        decoder=decoder,
    )


def whisper_config_to_transformers(config: WhisperConfig) -> dict[str, Any]:
    """Configuration of a `Whisper` -> content of the config.json of the same Whisper in transformers.

    Token ids, such as those at the start, are not in it.

    Raises:
        TrunklineError: if the network has an option that theirs does not have.
    """
    names = {ours: theirs for theirs, ours in ACTIVATIONS_OF_WHISPER.items()}
    content: dict[str, Any] = {
        "model_type": "whisper",
        "vocab_size": config.vocab_size,
        "num_mel_bins": config.num_mels,
        "max_source_positions": config.max_frames // 2,
        "max_target_positions": config.max_target_length,
        "d_model": config.encoder.dim,
        "dropout": config.encoder.dropout,
        "activation_function": names.get(config.encoder.mlp, "gelu"),
    }
    for side, trunk in (("encoder", config.encoder), ("decoder", config.decoder)):
        content |= {
            f"{side}_layers": trunk.depth,
            f"{side}_attention_heads": trunk.num_heads,
            f"{side}_ffn_dim": trunk.hidden_dim,
        }
    refuse_difference(config, whisper_config_from_transformers(content), THEIR_WHISPER, OUR_WHISPER)
    return content
