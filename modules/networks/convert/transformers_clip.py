"""Convert CLIP and SigLIP (arXiv:2303.15343) of transformers to a `CLIP`, and back."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from trunkline import TrunklineError
from trunkline.modules.backbone import TransformerConfig
from trunkline.modules.networks.bert import BERTConfig
from trunkline.modules.networks.clip import CLIP, CLIPConfig
from trunkline.modules.networks.convert.family import ForeignFamily, with_model_type
from trunkline.modules.networks.convert.key_tables import KeyTable, refuse_difference, refuse_options
from trunkline.modules.networks.convert.vit_tables import VitNames, tiling
from trunkline.modules.networks.gpt import GPTConfig
from trunkline.modules.networks.vit import ViTConfig

OUR_CLIP, THEIR_CLIP, THEIR_SIGLIP = "a CLIP", "a CLIP of transformers", "a SigLIP of transformers"
ACTIVATIONS_OF_CLIP = {
    "quick_gelu": "quick_gelu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
}
"""`hidden_act` -> `mlp` of the trunk."""
SCALES = {"scale.logit_scale": "logit_scale", "scale.logit_bias": "logit_bias"}
POOL = "vision_model.head"
USUAL_SCALE = 2.6592
"""`logit_scale_init_value` of CLIP."""


def tower_table(ours: str, theirs: str) -> dict[str, tuple[str, ...]]:
    """Names of the blocks of a tower."""
    block, layer = f"{ours}.backbone.blocks.*", f"{theirs}.encoder.layers.*"
    return {
        f"{block}.attn.qkv": tuple(f"{layer}.self_attn.{part}_proj" for part in "qkv"),
        f"{block}.attn.proj": (f"{layer}.self_attn.out_proj",),
        f"{block}.norm1": (f"{layer}.layer_norm1",),
        f"{block}.norm2": (f"{layer}.layer_norm2",),
        f"{block}.mlp.fc1": (f"{layer}.mlp.fc1",),
        f"{block}.mlp.fc2": (f"{layer}.mlp.fc2",),
    }


TOWERS: KeyTable = {
    **tower_table("image", "vision_model"),
    **tower_table("text.body", "text_model"),
    "image.patch_embed.proj": ("vision_model.embeddings.patch_embedding",),
    "image.backbone.norm": ("vision_model.post_layernorm",),
    "text.body.token_embed": ("text_model.embeddings.token_embedding",),
    "text.body.pos_embed": ("text_model.embeddings.position_embedding",),
    "text.body.backbone.norm": ("text_model.final_layer_norm",),
}
OF_CLIP: KeyTable = {
    "image.embed_norm": ("vision_model.pre_layrnorm",),
    "image.head": ("visual_projection",),
    "text.head": ("text_projection",),
}
OF_SIGLIP: KeyTable = {
    "image.attn_pool.attn.q": (f"{POOL}.attention.q",),
    "image.attn_pool.attn.kv": (f"{POOL}.attention.kv",),
    "image.attn_pool.attn.proj": (f"{POOL}.attention.out_proj",),
    "image.attn_pool.norm": (f"{POOL}.layernorm",),
    "image.attn_pool.mlp.fc1": (f"{POOL}.mlp.fc1",),
    "image.attn_pool.mlp.fc2": (f"{POOL}.mlp.fc2",),
    "text.head": ("text_model.head",),
}
CLASS_EMBEDDING = "vision_model.embeddings.class_embedding"
POSITION_EMBEDDING = "vision_model.embeddings.position_embedding.weight"
CLIP_NAMES = VitNames(
    family=THEIR_CLIP,
    table={**TOWERS, **OF_CLIP},
    patches="vision_model.embeddings.patch_embedding",
    positions=POSITION_EMBEDDING,
    tokens={"image.cls_token": CLASS_EMBEDDING},
    place="image.",
    ours=OUR_CLIP,
)
SIGLIP_NAMES = CLIP_NAMES._replace(
    family=THEIR_SIGLIP, table={**TOWERS, **OF_SIGLIP}, tokens={"image.attn_pool.query": f"{POOL}.probe"}
)


def clip_from_transformers(weights: Mapping[str, Tensor], config: CLIPConfig, names: VitNames) -> dict[str, Tensor]:
    """State dict of a transformers `CLIPModel` or `SiglipModel` -> state dict of a `CLIP`.

    Raises:
        TrunklineError: for a weight that a `CLIP` does not have.
    """
    own = {
        name: value for name, value in weights.items() if not name.endswith("position_ids")
    }  # 0, 1, ... in old files
    scales = {ours: own.pop(theirs).reshape(1) for ours, theirs in SCALES.items() if theirs in own}
    for kind in ("weight", "bias"):
        stacked = own.pop(f"{POOL}.attention.in_proj_{kind}", None)
        if stacked is not None:
            query, keys_values = stacked.split([len(stacked) // 3, 2 * len(stacked) // 3])
            own |= {f"{POOL}.attention.q.{kind}": query, f"{POOL}.attention.kv.{kind}": keys_values}
    return names.weights_from(own, config.image) | scales


def clip_to_transformers(weights: Mapping[str, Tensor], config: CLIPConfig, names: VitNames) -> dict[str, Tensor]:
    """State dict of a `CLIP` -> state dict of a transformers `CLIPModel` or `SiglipModel`.

    Raises:
        TrunklineError: for a weight that theirs does not have.
    """
    own = {name: value for name, value in weights.items() if name not in SCALES}
    converted = names.weights_to(own, config.image, {CLASS_EMBEDDING: 1, POSITION_EMBEDDING: 2})
    for kind in ("weight", "bias"):
        parts = [converted.pop(f"{POOL}.attention.{part}.{kind}", None) for part in ("q", "kv")]
        if parts[0] is not None and parts[1] is not None:
            converted[f"{POOL}.attention.in_proj_{kind}"] = torch.cat([parts[0], parts[1]])
    shape = () if names is CLIP_NAMES else (1,)
    scales = {theirs: weights[ours].reshape(shape).clone() for ours, theirs in SCALES.items() if ours in weights}
    return converted | scales


def tower(config: Mapping[str, Any], eps: float, activation: str, family: str) -> TransformerConfig:
    """The trunk of a tower, from its part of the configuration file.

    Raises:
        TrunklineError: for an activation that the trunk does not have.
    """
    refuse_options(config, {"hidden_act": ACTIVATIONS_OF_CLIP}, family, OUR_CLIP)
    return TransformerConfig(
        dim=config["hidden_size"],
        depth=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        mlp_dim=config["intermediate_size"],
        mlp=ACTIVATIONS_OF_CLIP[config.get("hidden_act", activation)],  # type: ignore[arg-type]
        norm_eps=config.get("layer_norm_eps", eps),
    )


TEXT_OF_CLIP = {
    **{"hidden_size": 512, "num_hidden_layers": 12, "num_attention_heads": 8, "intermediate_size": 2048},
    **{"vocab_size": 49408, "max_position_embeddings": 77, "eos_token_id": 49407},
}
IMAGE_OF_CLIP = {
    **{"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
    **{"image_size": 224, "patch_size": 32},
}
TEXT_OF_SIGLIP = {
    **{"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
    **{"vocab_size": 32000, "max_position_embeddings": 64, "pad_token_id": 1},
}
IMAGE_OF_SIGLIP = {**IMAGE_OF_CLIP, "patch_size": 16}
"""Usual sizes, which files leave out."""


def part_of(config: Mapping[str, Any], name: str, usual: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of one tower. In a CLIP the older `text_config_dict`, where it is, goes before `text_config`."""
    older = config.get(f"{name}_dict") if config.get("model_type") == "clip" else None
    return {**usual, **(config.get(name) or {}), **(older or {})}


def refuse_one_tower(config: Mapping[str, Any], whole: str) -> None:
    """Refuse a tower alone and a classifier of images, whose files have the same layout.

    Raises:
        TrunklineError: with the class of transformers that wrote the file.
    """
    kind, writer = config["model_type"], next(iter(config.get("architectures") or ()), whole)
    if writer != whole or "_" in kind:
        raise TrunklineError(
            f"a {writer} of transformers cannot be converted ({kind}): {OUR_CLIP} has an image tower and a text tower; "
            f"give the folder of a {whole}"
        )


def one_token(text: Mapping[str, Any], name: str, family: str, why: str) -> int:
    """The id of a special token.

    Raises:
        TrunklineError: if it is no token of the vocabulary; says what theirs does with it.
    """
    found, words = text[name], text["vocab_size"]
    if not isinstance(found, int) or not 0 <= found < words:
        raise TrunklineError(
            f"{family} with {name}={found} and vocab_size={words} cannot be converted: {why}, so it must be one token "
            "of the vocabulary; write the id that its tokenizer uses into text_config"
        )
    return found


def clip_config_from_transformers(config: Mapping[str, Any]) -> CLIPConfig:
    """Content of the config.json of a CLIP -> configuration of the same `CLIP`.

    Raises:
        TrunklineError: if it uses an option that a `CLIP` does not have.
    """
    refuse_one_tower(config, "CLIPModel")
    text = part_of(config, "text_config", TEXT_OF_CLIP)
    vision = part_of(config, "vision_config", IMAGE_OF_CLIP)
    end = one_token(text, "eos_token_id", THEIR_CLIP, "it reads a text at this token")
    trunk = tower(text, 1e-5, "quick_gelu", THEIR_CLIP)
    image = ViTConfig(
        **tiling(vision["image_size"], vision["patch_size"], THEIR_CLIP),
        in_chans=vision.get("num_channels", 3),
        embed_norm=True,
        prefix_positions=1,
        patch_bias=False,
        backbone=tower(vision, 1e-5, "quick_gelu", THEIR_CLIP),
    )
    return CLIPConfig(
        image=image,
        gpt=GPTConfig(text["vocab_size"], text["max_position_embeddings"], backbone=replace(trunk, causal=True)),
        # The id 2 of older files stands for the largest in a text, which is the last of their vocabulary.
        end_token=text["vocab_size"] - 1 if end == 2 else end,
        dim=config.get("projection_dim", 512),
        projection_bias=False,
        init_logit_scale=min(config.get("logit_scale_init_value", USUAL_SCALE), math.log(100)),
    )


def siglip_config_from_transformers(config: Mapping[str, Any]) -> CLIPConfig:
    """Content of the config.json of a SigLIP -> configuration of the same `CLIP`.

    Raises:
        TrunklineError: if it uses an option that a `CLIP` does not have.
    """
    refuse_one_tower(config, "SiglipModel")
    text = part_of(config, "text_config", TEXT_OF_SIGLIP)
    vision = part_of(config, "vision_config", IMAGE_OF_SIGLIP)
    refuse_options(vision, {"vision_use_head": (True,)}, THEIR_SIGLIP, OUR_CLIP)
    width = text.get("projection_size") or text["hidden_size"]
    if width != vision["hidden_size"]:
        raise TrunklineError(f"{THEIR_SIGLIP} gives texts {width} numbers, but images {vision['hidden_size']}")
    image = ViTConfig(
        **tiling(vision["image_size"], vision["patch_size"], THEIR_SIGLIP),
        in_chans=vision.get("num_channels", 3),
        pool="map",
        backbone=tower(vision, 1e-6, "gelu_pytorch_tanh", THEIR_SIGLIP),
    )
    body = BERTConfig(
        text["vocab_size"],
        text["max_position_embeddings"],
        num_segments=0,
        backbone=tower(text, 1e-6, "gelu_pytorch_tanh", THEIR_SIGLIP),
    )
    return CLIPConfig(
        image=image,
        bert=body,
        text_padding=one_token(text, "pad_token_id", THEIR_SIGLIP, "it fills texts up with it and reads the last"),
        dim=width,
        image_projection=False,
        init_logit_scale=math.log(10),
        init_logit_bias=-10.0,
    )


def tower_to(trunk: TransformerConfig) -> dict[str, Any]:
    """A tower's part of the configuration file."""
    names = {ours: theirs for theirs, ours in reversed(ACTIVATIONS_OF_CLIP.items())}
    return {
        "hidden_size": trunk.dim,
        "num_hidden_layers": trunk.depth,
        "num_attention_heads": trunk.num_heads,
        "intermediate_size": trunk.hidden_dim,
        "hidden_act": names.get(trunk.mlp, "gelu"),
        "layer_norm_eps": trunk.norm_eps,
    }


def clip_config_to_transformers(config: CLIPConfig, siglip: bool) -> dict[str, Any]:
    """Configuration of a `CLIP` -> content of the config.json of the same CLIP or SigLIP.

    A CLIP whose network does not know the end-of-text token has None for its id.

    Raises:
        TrunklineError: if the network has an option that theirs does not have.
    """
    family, body, image = (THEIR_SIGLIP if siglip else THEIR_CLIP), config.text.body, config.image
    if image.size[0] != image.size[1]:
        raise TrunklineError(f"{OUR_CLIP} with image_size={image.size} cannot become {family}, whose images are square")
    if siglip and config.text_padding is None:
        raise TrunklineError(
            f"{OUR_CLIP} with text_padding=None cannot become {family}, which sees the padding of texts"
        )
    if not siglip and config.end_token == 2 and body.vocab_size > 3:
        raise TrunklineError(f"{OUR_CLIP} with end_token=2 cannot become {family}, where 2 stands for the largest id")
    text = {
        **tower_to(body.backbone),
        "vocab_size": body.vocab_size,
        "max_position_embeddings": body.max_length,
        "projection_size" if siglip else "projection_dim": config.dim,
        "pad_token_id" if siglip else "eos_token_id": config.text_padding if siglip else config.end_token,
    }
    vision = {
        **tower_to(image.backbone),
        "image_size": image.size[0],
        "patch_size": image.patch_size,
        "num_channels": image.in_chans,
        **({"vision_use_head": True} if siglip else {"projection_dim": config.dim}),
    }
    content: dict[str, Any] = {
        "model_type": "siglip" if siglip else "clip",
        "architectures": ["SiglipModel" if siglip else "CLIPModel"],
        "text_config": text | {"model_type": "siglip_text_model" if siglip else "clip_text_model"},
        "vision_config": vision | {"model_type": "siglip_vision_model" if siglip else "clip_vision_model"},
    }
    if not siglip:
        content |= {"projection_dim": config.dim, "logit_scale_init_value": config.init_logit_scale}
    if siglip:
        expressed = siglip_config_from_transformers(content)
    elif config.end_token is not None:
        expressed = clip_config_from_transformers(content)
    else:  # `save_foreign` asks for it
        some = content["text_config"] | {"eos_token_id": 0}
        expressed = replace(clip_config_from_transformers(content | {"text_config": some}), end_token=None)
    refuse_another_clip(config, expressed, family)
    return content


def refuse_another_clip(config: CLIPConfig, expressed: CLIPConfig, family: str) -> None:
    """Refuse a `CLIP` that is not the one which another library's configuration expresses.

    Raises:
        TrunklineError: with the first field that differs.
    """
    body, other = config.text.body, expressed.text.body
    if type(body) is not type(other):
        raise TrunklineError(
            f"{OUR_CLIP} whose text tower is a {type(body).__name__.removesuffix('Config')} cannot become {family}, "
            f"whose is a {type(other).__name__.removesuffix('Config')}"
        )
    refuse_difference(config.vision, expressed.vision, family, f"the image tower of {OUR_CLIP}")
    texts = [replace(tower.text, bert=None, gpt=GPTConfig()) for tower in (config, expressed)]
    refuse_difference(texts[0], texts[1], family, OUR_CLIP)
    # The towers have no output layers over the vocabulary, so that it means nothing whether they are tied.
    free = ("tie_embeddings", "predicts_tokens")
    refuse_difference(body, other, family, f"the text tower of {OUR_CLIP}", free)
    if config.text_padding != expressed.text_padding:
        raise TrunklineError(
            f"{OUR_CLIP} with text_padding={config.text_padding} cannot become {family}, which never sees padding"
        )
    start = (config.init_logit_bias is None, expressed.init_logit_bias is None)
    if start[0] != start[1] or config.share_trunk:
        what = "share_trunk" if config.share_trunk else f"init_logit_bias={config.init_logit_bias}"
        raise TrunklineError(f"{OUR_CLIP} with {what} cannot become {family}")


def clip_family(name: str, kind: str, names: VitNames) -> ForeignFamily:
    """The family of a `model_type`."""
    siglip = kind == "siglip"
    read = siglip_config_from_transformers if siglip else clip_config_from_transformers
    stacked = ("image.attn_pool.attn.q", "image.attn_pool.attn.kv")  # one parameter there, of no module
    modules = {ours: theirs for ours, theirs in names.table.items() if ours not in stacked}
    return ForeignFamily(
        name=name,
        origin="transformers",
        network=CLIP,
        recognises=with_model_type(kind, f"{kind}_text_model", f"{kind}_vision_model"),
        config_from=lambda content, weights: read(content),
        config_to=lambda config: clip_config_to_transformers(config, siglip),
        weights_from=lambda weights, config: clip_from_transformers(weights, config, names),
        weights_to=lambda weights, config: clip_to_transformers(weights, config, names),
        layers=lambda config: (modules,),
    )


TRANSFORMERS_CLIP = clip_family(THEIR_CLIP, "clip", CLIP_NAMES)
SIGLIP = clip_family(THEIR_SIGLIP, "siglip", SIGLIP_NAMES)
