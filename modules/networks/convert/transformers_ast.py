"""Convert weights and configuration of the AST in transformers to those of an `AST`, and back."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trunkline.modules.backbone import TransformerConfig
from trunkline.modules.networks.ast import AST, ASTConfig
from trunkline.modules.networks.convert.family import ForeignFamily, with_model_type
from trunkline.modules.networks.convert.key_tables import (
    KeyTable,
    from_theirs,
    refuse_difference,
    refuse_options,
    to_theirs,
    without_prefix,
)

OUR_AST, THEIR_AST = "our AST", "an AST of transformers"
ACTIVATIONS_OF_AST = {"gelu": "gelu", "gelu_new": "gelu_tanh", "relu": "relu", "silu": "silu", "swish": "silu"}
"""`hidden_act` of AST -> `mlp` of the trunk."""
BODY = "audio_spectrogram_transformer."
"""What the names of the body begin with in a classifier."""
EMBEDDINGS = f"{BODY}embeddings"
AST_TOKENS = {"cls_token": f"{EMBEDDINGS}.cls_token", "dist_token": f"{EMBEDDINGS}.distillation_token"}
"""Our tokens before the patches -> theirs, in the order of their positions."""
AST_POSITIONS = f"{EMBEDDINGS}.position_embeddings"
PROJECTION = f"{EMBEDDINGS}.patch_embeddings.projection"


def ast_table(files: bool = True) -> KeyTable:
    """Names of our `AST` -> of theirs, in files and before version 5; else those in the memory of version 5."""
    ours = "backbone.blocks.*"
    table = {
        "patch_embed.proj": (PROJECTION,),
        "backbone.norm": (f"{BODY}layernorm",),
        "head_norm": ("classifier.layernorm",),
        "head": ("classifier.dense",),
    }
    if files:
        theirs = f"{BODY}encoder.layer.*"
        qkv = tuple(f"{theirs}.attention.attention.{part}" for part in ("query", "key", "value"))
        others = ("attention.output.dense", "intermediate.dense", "output.dense")
    else:
        theirs = f"{BODY}layers.*"
        qkv = tuple(f"{theirs}.attention.{part}_proj" for part in "qkv")
        others = ("attention.o_proj", "mlp.fc1", "mlp.fc2")
    own = ("attn.proj", "mlp.fc1", "mlp.fc2", "norm1", "norm2")
    names = (*others, "layernorm_before", "layernorm_after")
    layers = {f"{ours}.{mine}": (f"{theirs}.{name}",) for mine, name in zip(own, names, strict=True)}
    return {**table, f"{ours}.attn.qkv": qkv, **layers}


def ast_modules(config: ASTConfig) -> tuple[KeyTable, ...]:
    """Names of the layers as modules: in version 5 of transformers, and before it, as files still have them."""
    tables = (ast_table(files=False), ast_table())
    return tables if config.num_classes else tuple(without_prefix(table, BODY) for table in tables)


def ast_from_transformers(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict of a transformers `ASTForAudioClassification` or `ASTModel` -> state dict of an `AST`.

    Raises:
        TrunklineError: for a weight that an `AST` does not have.
    """
    body = not any(name.startswith(BODY) for name in weights)
    own = {f"{BODY}{name}" if body else name: weights[name] for name in weights}
    single = {ours: own.pop(theirs) for ours, theirs in AST_TOKENS.items() if theirs in own}
    positions = own.pop(AST_POSITIONS, None)  # (1, 2 + rows * columns, D)
    if positions is not None:
        single |= {"prefix_pos": positions[:, : len(AST_TOKENS)], "pos_embed": positions[:, len(AST_TOKENS) :]}
    if f"{PROJECTION}.weight" in own:
        own[f"{PROJECTION}.weight"] = own[f"{PROJECTION}.weight"].flatten(1)  # it is a convolution there
    table = ast_table(files=not any(name.startswith(f"{BODY}layers.") for name in own))
    return from_theirs(own, table, THEIR_AST, OUR_AST) | single


def ast_to_transformers(weights: Mapping[str, Tensor], config: ASTConfig) -> dict[str, Tensor]:
    """State dict of an `AST` -> state dict of a transformers `ASTForAudioClassification`, or `ASTModel` without a head.

    In the names of its files. Theirs adds a position to each token before the patches; where ours has none, it is zero.

    Raises:
        TrunklineError: for a weight that theirs does not have.
    """
    special = (*AST_TOKENS, "prefix_pos", "pos_embed")
    own = {name: value for name, value in weights.items() if name not in special}
    converted = to_theirs(own, ast_table(), THEIR_AST, OUR_AST)
    side = config.patch_size
    converted[f"{PROJECTION}.weight"] = converted[f"{PROJECTION}.weight"].unflatten(1, (1, side, side))
    converted |= {theirs: weights[ours].clone() for ours, theirs in AST_TOKENS.items()}
    patches = weights["pos_embed"]
    tokens = weights.get("prefix_pos", patches[:, :0])
    tokens = F.pad(tokens, (0, 0, 0, len(AST_TOKENS) - tokens.shape[1]))
    converted[AST_POSITIONS] = torch.cat((tokens, patches), dim=1)
    return converted if config.num_classes else {name.removeprefix(BODY): value for name, value in converted.items()}


def ast_config_from_transformers(config: Mapping[str, Any], weights: Collection[str]) -> ASTConfig:
    """Content of the config.json of a transformers AST -> configuration of the same `AST`.

    The weights tell whether there is a head.

    Dropout takes place where the trunk has it, which is not everywhere where theirs can have it.

    Raises:
        TrunklineError: if it uses an option that an `AST` does not have.
    """
    refuse_options(config, {"hidden_act": ACTIVATIONS_OF_AST}, THEIR_AST, OUR_AST)
    head = "classifier.dense.weight" in weights
    time, mel = config.get("time_stride", 10), config.get("frequency_stride", 10)
    return ASTConfig(
        num_mels=config.get("num_mel_bins", 128),
        max_frames=config.get("max_length", 1024),
        patch_size=config.get("patch_size", 16),
        stride=time if time == mel else (time, mel),
        num_classes=len(config.get("id2label", range(2))) if head else 0,  # files leave out what is usual
        prefix_positions=len(AST_TOKENS),
        head_norm=head,
        backbone=TransformerConfig(
            dim=config.get("hidden_size", 768),
            depth=config.get("num_hidden_layers", 12),
            num_heads=config.get("num_attention_heads", 12),
            mlp_dim=config.get("intermediate_size", 3072),
            mlp=ACTIVATIONS_OF_AST[config.get("hidden_act", "gelu")],  # type: ignore[arg-type]
            norm_eps=config.get("layer_norm_eps", 1e-12),
            qkv_bias=None if config.get("qkv_bias", True) else False,
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
    content: dict[str, Any] = {
        "model_type": "audio-spectrogram-transformer",
        "architectures": ["ASTForAudioClassification" if config.num_classes else "ASTModel"],
        "num_mel_bins": config.num_mels,
        "max_length": config.max_frames,
        "patch_size": config.patch_size,
        "time_stride": time,
        "frequency_stride": mel,
        "hidden_size": trunk.dim,
        "num_hidden_layers": trunk.depth,
        "num_attention_heads": trunk.num_heads,
        "intermediate_size": trunk.hidden_dim,
        "hidden_act": names.get(trunk.mlp, "gelu"),
        "layer_norm_eps": trunk.norm_eps,
        "qkv_bias": trunk.attention_bias,
        "hidden_dropout_prob": trunk.dropout,
    }
    if config.num_classes:
        labels = class_names or [f"LABEL_{number}" for number in range(config.num_classes)]
        content["id2label"] = {str(number): label for number, label in enumerate(labels)}
        content["label2id"] = {label: number for number, label in enumerate(labels)}
    expressed = ast_config_from_transformers(content, ["classifier.dense.weight"] if config.num_classes else [])
    free = ("prefix_positions",)  # theirs are zero where ours has none
    refuse_difference(replace(config, stride=expressed.stride), expressed, THEIR_AST, OUR_AST, free)
    return content


TRANSFORMERS_AST = ForeignFamily(
    name=THEIR_AST,
    origin="transformers",
    network=AST,
    recognises=with_model_type("audio-spectrogram-transformer"),
    config_from=ast_config_from_transformers,
    config_to=ast_config_to_transformers,
    weights_from=lambda weights, config: ast_from_transformers(weights),
    weights_to=ast_to_transformers,
    layers=ast_modules,
)
