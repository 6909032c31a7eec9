"""Convert weights and configuration of the AST in transformers to those of an `AST`, and back."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from trunkline import TrunklineError
from trunkline.modules.backbone import TransformerConfig
from trunkline.modules.networks.ast import ASTConfig
from trunkline.modules.networks.convert.key_tables import (
    KeyTable,
    from_theirs,
    refuse_difference,
    refuse_options,
    to_theirs,
)

OUR_AST, THEIR_AST = "our AST", "an AST of transformers"
ACTIVATIONS_OF_AST = {"gelu": "gelu", "gelu_new": "gelu_tanh", "relu": "relu", "silu": "silu", "swish": "silu"}
"""`hidden_act` of AST -> `mlp` of the trunk."""
BODY = "audio_spectrogram_transformer"
EMBEDDINGS = f"{BODY}.embeddings"
AST_TOKENS = {"cls_token": f"{EMBEDDINGS}.cls_token", "dist_token": f"{EMBEDDINGS}.distillation_token"}
"""Our tokens before the patches -> theirs, in the order of their positions."""
AST_POSITIONS = f"{EMBEDDINGS}.position_embeddings"
PROJECTION = f"{EMBEDDINGS}.patch_embeddings.projection"


def ast_table(files: bool = True) -> KeyTable:
    """Names of our `AST` -> of theirs, in files and before version 5; else those in the memory of version 5."""
    ours = "backbone.blocks.*"
    table = {
        "patch_embed.proj": (PROJECTION,),
        "backbone.norm": (f"{BODY}.layernorm",),
        "head_norm": ("classifier.layernorm",),
        "head": ("classifier.dense",),
    }
    if files:
        theirs = f"{BODY}.encoder.layer.*"
        qkv = tuple(f"{theirs}.attention.attention.{part}" for part in ("query", "key", "value"))
        others = ("attention.output.dense", "intermediate.dense", "output.dense")
    else:
        theirs = f"{BODY}.layers.*"
        qkv = tuple(f"{theirs}.attention.{part}_proj" for part in "qkv")
        others = ("attention.o_proj", "mlp.fc1", "mlp.fc2")
    own = ("attn.proj", "mlp.fc1", "mlp.fc2", "norm1", "norm2")
    names = (*others, "layernorm_before", "layernorm_after")
    layers = {f"{ours}.{mine}": (f"{theirs}.{name}",) for mine, name in zip(own, names, strict=True)}
    return {**table, f"{ours}.attn.qkv": qkv, **layers}


def ast_from_transformers(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict of a transformers `ASTForAudioClassification` -> state dict of an `AST`.

    Theirs adds a position to each token before the patches; here it is part of the token.

    Raises:
        TrunklineError: for a weight that an `AST` does not have.
    """
    positions = weights[AST_POSITIONS]  # (1, 2 + rows * columns, D)
    special = (*AST_TOKENS.values(), AST_POSITIONS)
    table = ast_table(files=not any(name.startswith(f"{BODY}.layers.") for name in weights))
    own = {name: value for name, value in weights.items() if name not in special}
    own[f"{PROJECTION}.weight"] = weights[f"{PROJECTION}.weight"].flatten(1)  # it is a convolution there
    converted = from_theirs(own, table, THEIR_AST, OUR_AST)
    for place, (ours, theirs) in enumerate(AST_TOKENS.items()):
        converted[ours] = weights[theirs] + positions[:, place : place + 1]
    return converted | {"pos_embed": positions[:, len(AST_TOKENS) :]}


def ast_to_transformers(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict of an `AST` -> state dict of a transformers `ASTForAudioClassification`, with the names of its files.

    Raises:
        TrunklineError: for a weight that theirs does not have, and for a token that ours lacks.
    """
    missing = [token for token in AST_TOKENS if token not in weights]
    if missing:
        raise TrunklineError(f"{OUR_AST} without '{missing[0]}' cannot become {THEIR_AST}, which pools both tokens")
    special = (*AST_TOKENS, "pos_embed")
    own = {name: value for name, value in weights.items() if name not in special}
    converted = to_theirs(own, ast_table(), THEIR_AST, OUR_AST)
    projection = converted[f"{PROJECTION}.weight"]
    side = int(projection.shape[1] ** 0.5 + 0.5)
    converted[f"{PROJECTION}.weight"] = projection.unflatten(1, (1, side, side))
    for ours, theirs in AST_TOKENS.items():
        converted[theirs] = weights[ours].clone()
    converted[AST_POSITIONS] = F.pad(weights["pos_embed"], (0, 0, len(AST_TOKENS), 0))
    return converted


def ast_config_from_transformers(config: Mapping[str, Any]) -> ASTConfig:
    """Content of the config.json of a transformers AST -> configuration of the same `AST`.

    Dropout takes place where the trunk has it, which is not everywhere where theirs can have it.

    Raises:
        TrunklineError: if it uses an option that an `AST` does not have.
    """
    usual = {
        "model_type": ("audio-spectrogram-transformer",),
        "qkv_bias": (True,),
        "hidden_act": ACTIVATIONS_OF_AST,
    }
    refuse_options(config, usual, THEIR_AST, OUR_AST)
    time, mel = config.get("time_stride", 10), config.get("frequency_stride", 10)
    return ASTConfig(
        num_mels=config.get("num_mel_bins", 128),
        max_frames=config.get("max_length", 1024),
        patch_size=config.get("patch_size", 16),
        stride=time if time == mel else (time, mel),
        num_classes=len(config.get("id2label", range(2))),  # files leave out what is usual
        backbone=TransformerConfig(
            dim=config.get("hidden_size", 768),
            depth=config.get("num_hidden_layers", 12),
            num_heads=config.get("num_attention_heads", 12),
            mlp_dim=config.get("intermediate_size", 3072),
            mlp=ACTIVATIONS_OF_AST[config.get("hidden_act", "gelu")],  # type: ignore[arg-type]
            norm_eps=config.get("layer_norm_eps", 1e-12),
            dropout=config.get("hidden_dropout_prob", 0.0),
        ),
    )


def ast_config_to_transformers(config: ASTConfig, class_names: Sequence[str] | None = None) -> dict[str, Any]:
    """Configuration of an `AST` -> content of the config.json of the same AST in transformers.

    Args:
        config: of our network.
        class_names: of the outputs; None numbers them.

    Raises:
        TrunklineError: if the network has an option that theirs does not have.
    """
    names = {ours: theirs for theirs, ours in ACTIVATIONS_OF_AST.items()}
    trunk, (time, mel) = config.backbone, config.steps
    labels = class_names or [f"LABEL_{number}" for number in range(config.num_classes)]
    content: dict[str, Any] = {
        "model_type": "audio-spectrogram-transformer",
        "num_mel_bins": config.num_mels,
        "max_length": config.max_frames,
        "patch_size": config.patch_size,
        "time_stride": time,
        "frequency_stride": mel,
        "id2label": dict(enumerate(labels)),
        "label2id": {label: number for number, label in enumerate(labels)},
        "hidden_size": trunk.dim,
        "num_hidden_layers": trunk.depth,
        "num_attention_heads": trunk.num_heads,
        "intermediate_size": trunk.hidden_dim,
        "hidden_act": names.get(trunk.mlp, "gelu"),
        "layer_norm_eps": trunk.norm_eps,
        "hidden_dropout_prob": trunk.dropout,
    }
    own = replace(config, stride=time if time == mel else (time, mel))
    refuse_difference(own, ast_config_from_transformers(content), THEIR_AST, OUR_AST)
    return content
