"""Convert open_clip's SigLIPs (arXiv:2303.15343), whose image tower is a model of timm, to a `CLIP`, and back.

Their configuration names the image tower's architecture in timm, and nothing else of it: the name says the number of
heads, the activation and the epsilon, the weights say the rest. So only towers that have a name can go back.
"""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from trunkline import TrunklineError
from trunkline.modules.backbone import TransformerConfig
from trunkline.modules.networks.bert import BERTConfig
from trunkline.modules.networks.clip import CLIP, CLIPConfig
from trunkline.modules.networks.convert.family import ForeignFamily
from trunkline.modules.networks.convert.foreign_files import shapes_of
from trunkline.modules.networks.convert.key_tables import KeyTable, refuse_options
from trunkline.modules.networks.convert.open_clip_vit import (
    OPEN_CLIP_EXPRESSED_IN_TEXT,
    OPEN_CLIP_KNOWN,
    REFUSED_IN_TEXT,
    WITHOUT_EFFECT_IN_TEXT,
    is_open_clip,
    open_clip_part,
    open_clip_tower,
    open_clip_trunk,
    refuse_unknown,
)
from trunkline.modules.networks.convert.timm_vit import TIMM_TABLE, activation_of, heads_of, timm_tower
from trunkline.modules.networks.convert.transformers_clip import OUR_CLIP, SCALES, refuse_another_clip
from trunkline.modules.networks.convert.vit_tables import VitNames, tiling
from trunkline.modules.networks.vit import ViTConfig

OPEN_SIGLIP = "a SigLIP of open_clip"
TRUNK = "visual.trunk."
OPEN_SIGLIP_TABLE: KeyTable = {
    **{f"image.{ours}": tuple(TRUNK + name for name in theirs) for ours, theirs in TIMM_TABLE.items()},
    **open_clip_tower("text.body", "text.transformer"),
    "text.body.token_embed": ("text.token_embedding",),
    "text.body.pos_embed": ("text.positional_embedding",),
    "text.body.backbone.norm": ("text.ln_final",),
    "text.head": ("text.text_projection",),
}
OPEN_SIGLIP_NAMES = VitNames(
    family=OPEN_SIGLIP,
    table=OPEN_SIGLIP_TABLE,
    patches=f"{TRUNK}patch_embed.proj",
    positions=f"{TRUNK}pos_embed",
    tokens={"image.attn_pool.query": f"{TRUNK}attn_pool.latent"},
    place="image.",
    ours=OUR_CLIP,
)
SIGLIP_SIZES = {
    **{"base": (768, 12, 3072), "large": (1024, 24, 4096)},
    **{"so400m": (1152, 27, 4304), "giantopt": (1536, 40, 6144)},
}
"""Size in the name of an architecture -> width, number of blocks, hidden width of the MLP."""
SIGLIP_IMAGES = {
    **{("base", 16): (224, 256, 384, 512), ("base", 32): (256,), ("large", 16): (256, 384, 512)},
    **{("so400m", 14): (224, 378, 384), ("so400m", 16): (256, 384, 512), ("giantopt", 16): (256, 384)},
}
"""Size and patch in the name of an architecture -> sizes of images, of which timm has one."""


def is_open_siglip(config: Mapping[str, Any]) -> bool:
    """Whether a configuration file is of open_clip, with an image tower of timm that pools by attention."""
    vision = config.get("model_cfg", config).get("vision_cfg") if is_open_clip(config) else {}
    named = isinstance(vision, Mapping) and vision.get("timm_model_name") is not None
    return named and vision.get("timm_pool") == "map"


def open_siglip_from(weights: Mapping[str, Tensor], config: CLIPConfig) -> dict[str, Tensor]:
    """State dict of open_clip -> state dict of a `CLIP`.

    Raises:
        TrunklineError: for a weight that a `CLIP` does not have.
    """
    own = {}
    for name, value in weights.items():
        name = name.replace("in_proj_", "in_proj.")
        own[f"{name}.weight" if name.endswith("positional_embedding") else name] = value
    scales = {ours: own.pop(theirs).reshape(1) for ours, theirs in SCALES.items() if theirs in own}
    return OPEN_SIGLIP_NAMES.weights_from(own, config.image) | scales


def open_siglip_to(weights: Mapping[str, Tensor], config: CLIPConfig) -> dict[str, Tensor]:
    """State dict of a `CLIP` -> state dict of open_clip's `CustomTextCLIP`.

    Raises:
        TrunklineError: for a weight that theirs does not have.
    """
    own = {name: value for name, value in weights.items() if name not in SCALES}
    found = {}
    for name, value in OPEN_SIGLIP_NAMES.weights_to(own, config.image).items():
        name = name.replace("in_proj.", "in_proj_").replace("positional_embedding.weight", "positional_embedding")
        found[name] = value
    return found | {theirs: weights[ours].reshape(()).clone() for ours, theirs in SCALES.items() if ours in weights}


def padding_of(text: Mapping[str, Any]) -> int:
    """Id of the token that fills texts up: what our own files state, or that of open_clip's tokenizers.

    Those of SigLIP have 1, those of SigLIP 2 (arXiv:2502.14786) and its other ones 0.
    """
    name = str(text.get("hf_tokenizer_name") or "").lower()
    return text.get("pad_id", 1 if "siglip" in name and "siglip2" not in name else 0)


def siglip_of(image: ViTConfig, model: Mapping[str, Any]) -> CLIPConfig:
    """The `CLIP` with this image tower, and with all else from `model_cfg`.

    Raises:
        TrunklineError: if it uses an option that a `CLIP` does not have.
    """
    text = {"no_causal_mask": False, "pool_type": "argmax", "proj_bias": False, **model["text_cfg"]}
    wanted = {"no_causal_mask": (True,), "pool_type": ("last",), "proj_bias": (True,)}
    refuse_options(text, {**REFUSED_IN_TEXT, **wanted}, OPEN_SIGLIP, OUR_CLIP)
    refuse_unknown(model, OPEN_CLIP_KNOWN, "model_cfg")
    refuse_unknown(text, {*REFUSED_IN_TEXT, *OPEN_CLIP_EXPRESSED_IN_TEXT, *WITHOUT_EFFECT_IN_TEXT}, "text_cfg")
    width = text.get("width", 512)
    trunk = open_clip_trunk(text, width, text.get("heads", 8), bool(model.get("quick_gelu")))
    body = BERTConfig(
        text.get("vocab_size", 49408),
        text.get("context_length", 77),
        num_segments=0,
        predicts_tokens=False,
        backbone=trunk,
    )
    return CLIPConfig(
        image=image,
        bert=body,
        text_padding=padding_of(text),
        dim=model["embed_dim"],
        image_projection=False,
        init_logit_scale=min(model.get("init_logit_scale", math.log(1 / 0.07)), math.log(100)),
        init_logit_bias=model.get("init_logit_bias"),
    )


def siglip_config_from(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> CLIPConfig:
    """Content of open_clip_config.json, and the weights -> configuration of the same `CLIP`.

    Raises:
        TrunklineError: if it uses an option that a `CLIP` does not have.
    """
    model = config.get("model_cfg", config)
    vision = {"timm_proj": "linear", **model["vision_cfg"]}
    refuse_options(vision, {"timm_proj": ("none",)}, OPEN_SIGLIP, OUR_CLIP)
    size = vision.get("image_size", 224)
    tower = {"architecture": vision["timm_model_name"], "global_pool": "map", "model_args": {"img_size": size}}
    return siglip_of(timm_tower(tower, shapes_of(weights, TRUNK)), model)


def named_towers() -> dict[str, ViTConfig]:
    """Architecture of timm -> the same `ViT`, for all image towers that can go back."""
    found = {}
    for (word, patch), images in SIGLIP_IMAGES.items():
        dim, depth, hidden = SIGLIP_SIZES[word]
        for size in images:
            name = f"vit_{word}_patch{patch}_siglip_{size}"
            trunk = TransformerConfig(
                dim, depth, heads_of(name, {}), mlp_dim=hidden, mlp=activation_of(name, {}), norm_eps=1e-6
            )
            found[name] = ViTConfig(**tiling(size, patch, OPEN_SIGLIP), num_classes=0, pool="map", backbone=trunk)
    return found


def siglip_config_to(config: CLIPConfig) -> dict[str, Any]:
    """Configuration of a `CLIP` -> content of open_clip_config.json of the same SigLIP.

    Raises:
        TrunklineError: if the network has an option that theirs does not have.
    """
    image, text = config.image, config.text.body
    if config.text_padding is None or config.image_projection:
        reason = "text_padding=None" if config.text_padding is None else "image_projection=True"
        raise TrunklineError(f"{OUR_CLIP} with {reason} cannot become {OPEN_SIGLIP}")

    def sizes(tower: ViTConfig) -> tuple[Any, ...]:
        return tower.size, tower.patch_size, tower.backbone.dim, tower.backbone.depth, tower.backbone.hidden_dim

    towers = named_towers()
    name = next((name for name, tower in towers.items() if sizes(tower) == sizes(image)), None)
    if name is None:
        raise TrunklineError(
            f"{OUR_CLIP} whose image tower has image_size={image.image_size}, patch_size={image.patch_size}, "
            f"dim={image.backbone.dim}, depth={image.backbone.depth} cannot become {OPEN_SIGLIP}, which has only the "
            f"image towers that timm has by name: {', '.join(towers)}"
        )
    vision = {"timm_model_name": name, "timm_model_pretrained": False, "timm_pool": "map", "timm_proj": "none"}
    model = {
        "embed_dim": config.dim,
        "custom_text": True,
        "init_logit_scale": config.init_logit_scale,
        "vision_cfg": vision | {"image_size": image.size[0]},
        "text_cfg": {
            **open_clip_part(text.backbone),
            "context_length": text.max_length,
            "vocab_size": text.vocab_size,
            "heads": text.backbone.num_heads,
            "pad_id": config.text_padding,
            **{"no_causal_mask": True, "proj_bias": True, "pool_type": "last"},
        },
    }
    if config.init_logit_bias is not None:
        model["init_logit_bias"] = config.init_logit_bias
    refuse_another_clip(config, siglip_of(towers[name], model), OPEN_SIGLIP)
    return {"model_cfg": model}


OPEN_CLIP_SIGLIP = ForeignFamily(
    name=OPEN_SIGLIP,
    origin="open_clip",
    network=CLIP,
    recognises=is_open_siglip,
    config_from=siglip_config_from,
    config_to=siglip_config_to,
    weights_from=open_siglip_from,
    weights_to=open_siglip_to,
)
