"""Convert open_clip's models with Vision Transformers to a `CLIP`, and back."""

import math
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from trunkline import TrunklineError
from trunkline.modules.backbone import TransformerConfig
from trunkline.modules.networks.clip import CLIP, CLIPConfig
from trunkline.modules.networks.convert.family import ForeignFamily
from trunkline.modules.networks.convert.key_tables import KeyTable, refuse_options
from trunkline.modules.networks.convert.transformers_clip import OUR_CLIP, SCALES, refuse_another_clip
from trunkline.modules.networks.convert.vit_tables import VitNames, ratio_of, tiling
from trunkline.modules.networks.gpt import GPTConfig
from trunkline.modules.networks.vit import ViTConfig

OPEN_CLIP = "a CLIP of open_clip"
CLASS, POSITIONS = "visual.class_embedding", "visual.positional_embedding"


def open_clip_tower(ours: str, theirs: str) -> dict[str, tuple[str, ...]]:
    """Names of the blocks of a tower."""
    block, layer = f"{ours}.backbone.blocks.*", f"{theirs}.resblocks.*"
    names = {"attn.qkv": "attn.in_proj", "attn.proj": "attn.out_proj", "norm1": "ln_1", "norm2": "ln_2"}
    names |= {"mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj", "ls1": "ls_1", "ls2": "ls_2"}
    return {f"{block}.{part}": (f"{layer}.{name}",) for part, name in names.items()}


OPEN_CLIP_TABLE: KeyTable = {
    **open_clip_tower("image", "visual.transformer"),
    **open_clip_tower("text.body", "transformer"),
    "image.patch_embed.proj": ("visual.conv1",),
    "image.embed_norm": ("visual.ln_pre",),
    "image.backbone.norm": ("visual.ln_post",),
    "image.head": ("visual.proj",),
    "text.body.token_embed": ("token_embedding",),
    "text.body.pos_embed": ("positional_embedding",),
    "text.body.backbone.norm": ("ln_final",),
    "text.head": ("text_projection",),
}
OPEN_CLIP_NAMES = VitNames(
    family=OPEN_CLIP,
    table=OPEN_CLIP_TABLE,
    patches="visual.conv1",
    positions=POSITIONS,
    tokens={"image.cls_token": CLASS},
    place="image.",
    ours=OUR_CLIP,
)
MATRICES = ("visual.proj", "text_projection", "positional_embedding")
"""Parameters without `.weight` in their names; the first two are (in, out) matrices."""


def open_clip_from(weights: Mapping[str, Tensor], config: CLIPConfig) -> dict[str, Tensor]:
    """State dict of open_clip -> state dict of a `CLIP`.

    Raises:
        TrunklineError: for a weight that a `CLIP` does not have.
    """
    own = {}
    for name, value in weights.items():
        if name.endswith("attn_mask"):  # a buffer in older files
            continue
        name = name.removeprefix("text.").replace("in_proj_", "in_proj.")
        if name in MATRICES:
            value, name = value if name == "positional_embedding" else value.T, f"{name}.weight"
        own[name] = value
    scales = {ours: own.pop(theirs).reshape(1) for ours, theirs in SCALES.items() if theirs in own}
    return OPEN_CLIP_NAMES.weights_from(own, config.image) | scales


def open_clip_to(weights: Mapping[str, Tensor], config: CLIPConfig) -> dict[str, Tensor]:
    """State dict of a `CLIP` -> state dict of open_clip's `CLIP`, whose text tower has no prefix.

    Raises:
        TrunklineError: for a weight that theirs does not have.
    """
    own = {name: value for name, value in weights.items() if name not in SCALES}
    converted = OPEN_CLIP_NAMES.weights_to(own, config.image, {CLASS: 1, POSITIONS: 2})
    found = {}
    for name, value in converted.items():
        short = name.removesuffix(".weight")
        if short in MATRICES:
            value, name = value if short == "positional_embedding" else value.T, short
        found[name.replace("in_proj.", "in_proj_")] = value
    return found | {theirs: weights[ours].reshape(()).clone() for ours, theirs in SCALES.items() if ours in weights}


REFUSED_IN_BOTH: Mapping[str, tuple[Any, ...]] = {
    **dict.fromkeys(("qk_norm", "scaled_cosine_attn", "scale_heads", "scale_attn_inner", "scale_attn"), (False,)),
    **{"scale_fc": (False,), "block_type": (None, "default"), "output_tokens": (False,)},
    "act_kwargs": (None, {}, {"approximate": "none"}, {"approximate": "tanh"}),
}
REFUSED_IN_IMAGE: Mapping[str, tuple[Any, ...]] = {
    **REFUSED_IN_BOTH,
    **{"timm_model_name": (None,), "attentional_pool": (False,), "pool_type": ("tok",)},
    "pos_embed_type": ("learnable",),
}
REFUSED_IN_TEXT: Mapping[str, tuple[Any, ...]] = {
    **REFUSED_IN_BOTH,
    **{"hf_model_name": (None,), "embed_cls": (False,), "no_causal_mask": (False,), "proj_type": ("linear",)},
    **{"pool_type": ("argmax", "eos"), "proj_bias": (False,), "final_ln_after_pool": (False,)},
}
"""Values of options that a `CLIP` has."""
OPEN_CLIP_EXPRESSED = {"layers", "width", "mlp_ratio", "ls_init_value", "norm_kwargs"}
OPEN_CLIP_EXPRESSED_IN_IMAGE = {*OPEN_CLIP_EXPRESSED, "head_width", "patch_size", "image_size", "no_ln_pre"}
OPEN_CLIP_EXPRESSED_IN_TEXT = {*OPEN_CLIP_EXPRESSED, "heads", "vocab_size", "context_length", "eos_id"}
WITHOUT_EFFECT_IN_IMAGE = {
    "patch_dropout",  # of training alone
    "final_ln_after_pool",  # the class token is the same before and after pooling
    *("attn_pooler_queries", "attn_pooler_heads", "timm_model_pretrained", "timm_pool", "timm_proj", "timm_proj_bias"),
    *("timm_drop", "timm_drop_path"),
}
WITHOUT_EFFECT_IN_TEXT = {
    *("pad_id", "hf_tokenizer_name", "tokenizer_mode", "tokenizer_kwargs"),
    *("hf_model_pretrained", "hf_proj_type", "hf_pooler_type"),
}
OPEN_CLIP_KNOWN = {
    "embed_dim",
    "vision_cfg",
    "text_cfg",
    "quick_gelu",
    "custom_text",
    "init_logit_scale",
    "init_logit_bias",
}


def is_open_clip(config: Mapping[str, Any]) -> bool:
    """Whether a configuration file is of open_clip."""
    model = config.get("model_cfg", config)
    return isinstance(model, dict) and {"embed_dim", "vision_cfg", "text_cfg"} <= model.keys()


def refuse_unknown(part: Mapping[str, Any], known: Collection[str], where: str) -> None:
    """Refuse options that this code does not know, because they may change what the model computes.

    Raises:
        TrunklineError: with the first of them and its value.
    """
    name = next((name for name in part if name not in known), None)
    if name is not None:
        raise TrunklineError(
            f"{OPEN_CLIP} with {name}={part[name]} in {where} cannot be converted: {OUR_CLIP} has no such option"
        )


def open_clip_trunk(part: Mapping[str, Any], width: int, heads: int, quick_gelu: bool) -> TransformerConfig:
    """The trunk of a tower, from its part of the configuration file.

    Raises:
        TrunklineError: if options of the activation contradict each other.
    """
    norm = part.get("norm_kwargs") or {}
    refuse_unknown(norm, {"eps"}, "norm_kwargs")
    options = part.get("act_kwargs") or {}
    if quick_gelu and options:
        raise TrunklineError(f"{OPEN_CLIP} with act_kwargs={options} cannot have quick_gelu, which has no such options")
    activation = "gelu_tanh" if options.get("approximate") == "tanh" else "gelu"
    return TransformerConfig(
        dim=width,
        depth=part.get("layers", 12),
        num_heads=heads,
        mlp_dim=int(width * part.get("mlp_ratio", 4.0)),
        mlp="quick_gelu" if quick_gelu else activation,  # type: ignore[arg-type]
        norm_eps=norm.get("eps", 1e-5),
        layer_scale=part.get("ls_init_value"),
    )


def open_clip_config_from(config: Mapping[str, Any]) -> CLIPConfig:
    """Content of open_clip_config.json, or of a model configuration of open_clip -> configuration of the same `CLIP`.

    Raises:
        TrunklineError: if it uses an option that a `CLIP` does not have, such as a tower of another library.
    """
    model = config.get("model_cfg", config)
    vision, text = model["vision_cfg"], model["text_cfg"]
    if "multimodal_cfg" in model or isinstance(vision.get("layers"), list | tuple):
        kind = "a text decoder (multimodal_cfg)" if "multimodal_cfg" in model else "a ResNet (a list of layers)"
        raise TrunklineError(f"{OPEN_CLIP} with {kind} cannot be converted: {OUR_CLIP} has no such part")
    refuse_options(vision, REFUSED_IN_IMAGE, OPEN_CLIP, OUR_CLIP)
    refuse_options(text, REFUSED_IN_TEXT, OPEN_CLIP, OUR_CLIP)
    refuse_unknown(model, OPEN_CLIP_KNOWN, "model_cfg")
    refuse_unknown(vision, {*REFUSED_IN_IMAGE, *OPEN_CLIP_EXPRESSED_IN_IMAGE, *WITHOUT_EFFECT_IN_IMAGE}, "vision_cfg")
    refuse_unknown(text, {*REFUSED_IN_TEXT, *OPEN_CLIP_EXPRESSED_IN_TEXT, *WITHOUT_EFFECT_IN_TEXT}, "text_cfg")
    quick_gelu = bool(model.get("quick_gelu"))
    width, text_width = vision.get("width", 768), text.get("width", 512)
    image = ViTConfig(
        **tiling(vision.get("image_size", 224), vision.get("patch_size", 16), OPEN_CLIP),
        embed_norm=not vision.get("no_ln_pre", False),
        prefix_positions=1,
        patch_bias=False,
        backbone=open_clip_trunk(vision, width, width // vision.get("head_width", 64), quick_gelu),
    )
    body = GPTConfig(
        text.get("vocab_size", 49408),
        text.get("context_length", 77),
        backbone=open_clip_trunk(text, text_width, text.get("heads", 8), quick_gelu),
    )
    by_id = text.get("pool_type", "argmax") == "eos"
    return CLIPConfig(
        image=image,
        gpt=body,
        # The token with the largest id ends a text; for their tokenizers this is the last of the vocabulary.
        end_token=text.get("eos_id", 2) if by_id else body.vocab_size - 1,
        dim=model["embed_dim"],
        projection_bias=False,
        init_logit_scale=min(model.get("init_logit_scale", math.log(1 / 0.07)), math.log(100)),
        init_logit_bias=model.get("init_logit_bias"),
    )


def open_clip_part(trunk: TransformerConfig) -> dict[str, Any]:
    """A tower's part of the configuration file."""
    ratio = ratio_of(trunk.hidden_dim, trunk.dim)
    part: dict[str, Any] = {"width": trunk.dim, "layers": trunk.depth, "mlp_ratio": ratio}
    if trunk.mlp == "gelu_tanh":
        part["act_kwargs"] = {"approximate": "tanh"}
    if trunk.norm_eps != 1e-5:
        part["norm_kwargs"] = {"eps": trunk.norm_eps}
    return part | ({} if trunk.layer_scale is None else {"ls_init_value": trunk.layer_scale})


def open_clip_config_to(config: CLIPConfig) -> dict[str, Any]:
    """Configuration of a `CLIP` -> content of open_clip_config.json of the same model.

    Raises:
        TrunklineError: if the network has an option that theirs does not have.
    """
    image, body = config.image, config.text.body
    if config.end_token is None:
        raise TrunklineError(
            f"{OUR_CLIP} with end_token=None cannot become {OPEN_CLIP}, which reads a text at that token; set "
            "end_token in its configuration to the id with which its tokenizer ends a text"
        )
    vision = {
        **open_clip_part(image.backbone),
        "image_size": image.image_size if isinstance(image.image_size, int) else list(image.image_size),
        "patch_size": image.patch_size,
        "head_width": image.backbone.head_width,
        "no_ln_pre": not image.embed_norm,
    }
    text = {
        **open_clip_part(body.backbone),
        "context_length": body.max_length,
        "vocab_size": body.vocab_size,
        "heads": body.backbone.num_heads,
    }
    if config.end_token != body.vocab_size - 1:
        text |= {"pool_type": "eos", "eos_id": config.end_token}
    model = {
        "embed_dim": config.dim,
        "quick_gelu": image.backbone.mlp == "quick_gelu",
        "init_logit_scale": config.init_logit_scale,
        "vision_cfg": vision,
        "text_cfg": text,
    }
    if config.init_logit_bias is not None:
        model["init_logit_bias"] = config.init_logit_bias
    content = {"model_cfg": model}
    refuse_another_clip(config, open_clip_config_from(content), OPEN_CLIP)
    return content


OPEN_CLIP_VIT = ForeignFamily(
    name=OPEN_CLIP,
    origin="open_clip",
    network=CLIP,
    recognises=is_open_clip,
    config_from=lambda content, weights: open_clip_config_from(content),
    config_to=open_clip_config_to,
    weights_from=open_clip_from,
    weights_to=open_clip_to,
)
