"""Convert Vision Transformers of timm (`vit_*`, `deit_*`, `deit3_*`) to a `ViT`, and back.

The shapes of the weights say almost all. The name of the architecture says the rest: the number of heads, the
activation, and the epsilon of the norms.
"""

import math
import re
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from trunkline import TrunklineError
from trunkline.modules.backbone import TransformerConfig
from trunkline.modules.networks.convert.family import ForeignFamily
from trunkline.modules.networks.convert.foreign_files import shapes_of
from trunkline.modules.networks.convert.key_tables import KeyTable, refuse_difference
from trunkline.modules.networks.convert.vit_tables import (
    OUR_VIT,
    VitNames,
    one_side,
    ratio_of,
    tiling,
    tokens_before,
    with_learned_positions,
)
from trunkline.modules.networks.vit import ViT, ViTConfig

TIMM_VIT = "a Vision Transformer of timm"
PARTS_OF_BLOCK = (
    "norm1",
    "attn.qkv",
    "attn.q_norm",
    "attn.k_norm",
    "attn.proj",
    "ls1",
    "norm2",
    "mlp.fc1",
    "mlp.fc2",
    "ls2",
)
PARTS_OF_POOL = ("attn.q", "attn.kv", "attn.proj", "norm", "mlp.fc1", "mlp.fc2")
TIMM_TABLE: KeyTable = {
    "patch_embed.proj": ("patch_embed.proj",),
    "embed_norm": ("norm_pre",),
    **{f"backbone.blocks.*.{part}": (f"blocks.*.{part}",) for part in PARTS_OF_BLOCK},
    "backbone.norm": ("norm",),
    **{f"attn_pool.{part}": (f"attn_pool.{part.removeprefix('attn.')}",) for part in PARTS_OF_POOL},
    "fc_norm": ("fc_norm",),
    "head": ("head",),
}
PATCHES_OF_TIMM = "patch_embed.proj.weight"
TIMM_NAMES = VitNames(
    family=TIMM_VIT,
    table=TIMM_TABLE,
    patches="patch_embed.proj",
    positions="pos_embed",
    tokens={"cls_token": "cls_token", "reg_token": "reg_token", "attn_pool.query": "attn_pool.latent"},
)
HEADS_OF_TIMM = {
    **{"tiny": 3, "xsmall": 4, "wee": 4, "little": 5, "small": 6, "medium": 8, "mediumd": 8, "betwixt": 10, "base": 12},
    **{"so150m2": 13, "so150m": 14, "large": 16, "huge": 16, "giant": 16, "giantopt": 16, "gigantic": 16, "so400m": 16},
    "intern300m": 16,
}
"""Size in the name of an architecture -> number of heads."""
OTHER_HEADS = {
    r"base_patch\d+_plus_": 14,
    "base_patch16_gap_": 16,
    r"giant_patch\d+_(reg\d_)?(dinov2|radio|tips)": 24,
}
"""Architectures with another number."""
TANH_OF_TIMM = re.compile(r"base_patch32_siglip|large_patch16_siglip(_gap)?_512|so400m_patch16_siglip|giantopt_")
"""Architectures with GELU's tanh approximation."""
OTHER_NETWORKS = re.compile(
    r"relpos|rope|dinov3|sapiens|lingbot|_pe_|_xp_|\dx\d|rpn|_r\d*_s|_r\d\d|resnet|mci|distilled|_d?pwee|_dwee|_dlittle|radio"
)
"""Architectures with another attention, patch embedding or block, although their names look alike."""
OF_SHAPES = """img_size patch_size in_chans num_classes embed_dim depth mlp_ratio qkv_bias qk_norm scale_attn_norm
    scale_mlp_norm proj_bias class_token pos_embed no_embed_class reg_tokens pre_norm final_norm fc_norm"""
"""Options of timm that the weights show."""
OF_TRAINING = """drop_rate pos_drop_rate patch_drop_rate proj_drop_rate attn_drop_rate weight_init fix_init
    dynamic_img_size dynamic_img_pad"""
"""Options of timm that change no result, for images of the network's own size."""
OPTIONS = {*OF_SHAPES.split(), *OF_TRAINING.split()} | {
    *("num_heads", "init_values", "global_pool", "act_layer", "drop_path_rate"),
}
"""All options that can be converted."""
ARCHITECTURE = re.compile(r"(vit|deit3?)_([a-z0-9]+)_")


def is_timm(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is of a Vision Transformer of timm."""
    return "model_type" not in config and ARCHITECTURE.match(str(config.get("architecture", ""))) is not None


def timm_config_from(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> ViTConfig:
    """Content of timm's config.json, and its weights -> configuration of the same `ViT`; see `timm_tower`."""
    return timm_tower(config, shapes_of(weights))


def timm_tower(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> ViTConfig:
    """Content of timm's config.json, and the shapes of its weights -> configuration of the same `ViT`.

    `architecture` is needed; `model_args`, `global_pool` and `pretrained_cfg` are read if they are there.

    Raises:
        TrunklineError: if it is another network than its name suggests, or has an option that a `ViT` does not have.
    """
    name = str(config["architecture"]).partition(".")[0]
    options = dict(config.get("model_args") or {})
    for option, value in options.items():
        if option not in OPTIONS and value not in (None, False):
            raise TrunklineError(
                f"timm's {name} with {option}={value} cannot be converted: {OUR_VIT} has no such option"
            )
    heads = heads_of(name, options)
    pool = options.get("global_pool", config.get("global_pool", default_pool(shapes)))
    kinds = {"token": "cls", "avg": "mean", "map": "map"}
    if pool not in kinds:
        raise TrunklineError(f"timm's {name} with global_pool={pool!r} cannot be converted: {OUR_VIT} cannot pool so")
    if "cls_token" in shapes and pool != "token":
        raise TrunklineError(
            f"timm's {name} with a class token and global_pool={pool!r} cannot be converted: {OUR_VIT} with a class "
            "token reads that"
        )
    first, second = (f"blocks.0.mlp.{layer}.weight" for layer in ("fc1", "fc2"))
    missing = [key for key in (PATCHES_OF_TIMM, first, second) if key not in shapes]
    if missing:
        raise TrunklineError(f"the weights of timm's {name} lack '{missing[0]}'")
    dim, channels, *patch = shapes[PATCHES_OF_TIMM]
    side = one_side(patch, "patch_size", TIMM_VIT)
    registers = shapes.get("reg_token", (1, 0))[1]
    prefix, positions = ("cls_token" in shapes) + registers, shapes.get("pos_embed", (1, 0))[1]
    size = size_of_images(config, positions, side)
    hidden = shapes[second][1]
    trunk = TransformerConfig(
        dim=dim,
        depth=1 + max(int(key.split(".")[1]) for key in shapes if key.startswith("blocks.")),
        num_heads=heads,
        mlp_dim=hidden,
        mlp="swiglu" if shapes[first][0] == 2 * hidden else activation_of(name, options),
        norm_eps=1e-5 if "_clip_" in name else 1e-6,
        final_norm="norm.weight" in shapes,
        qk_norm="blocks.0.attn.q_norm.weight" in shapes,
        qkv_bias=None if "blocks.0.attn.qkv.bias" in shapes else False,
        layer_scale=options.get("init_values", 1e-5) if "blocks.0.ls1.gamma" in shapes else None,
        drop_path=options.get("drop_path_rate", 0.0),
    )
    return ViTConfig(
        **tiling(size, side, TIMM_VIT),
        in_chans=channels,
        num_classes=shapes.get("head.weight", (0,))[0],
        pool=kinds[pool],  # type: ignore[arg-type]
        positions="learned" if positions else "none",
        num_registers=registers,
        embed_norm="norm_pre.weight" in shapes,
        prefix_positions=prefix if positions == math.prod(pixels // side for pixels in size) + prefix else 0,
        patch_bias="patch_embed.proj.bias" in shapes,
        fc_norm="fc_norm.weight" in shapes,
        backbone=trunk,
    )


def heads_of(name: str, options: Mapping[str, Any]) -> int:
    """Number of heads of an architecture with options.

    Raises:
        TrunklineError: if it is another network than its name suggests, or not known.
    """
    found = ARCHITECTURE.match(name)
    usual = next((count for pattern, count in OTHER_HEADS.items() if re.search(pattern, name)), None)
    heads = options.get("num_heads", usual or HEADS_OF_TIMM.get(found[2] if found else ""))
    if OTHER_NETWORKS.search(name) or heads is None:
        raise TrunklineError(f"timm's {name} cannot be converted: {OUR_VIT} has no such attention, patches or blocks")
    return heads


def size_of_images(config: Mapping[str, Any], positions: int, patch: int) -> tuple[int, int]:
    """(height, width) in pixels; where no file says it, of as many square patches as there are positions."""
    given = (config.get("model_args") or {}).get("img_size")
    given = given or (config.get("pretrained_cfg") or {}).get("input_size", [None])[1:]
    if not given:  # the few positions of tokens before the patches do not change the whole root
        given = math.isqrt(positions) * patch
    height, width = (given, given) if isinstance(given, int) else given
    return height, width


def default_pool(weights: Collection[str]) -> str:
    """Timm's `global_pool` where no file says it."""
    return "map" if "attn_pool.latent" in weights else "token" if "cls_token" in weights else "avg"


def activation_of(name: str, options: Mapping[str, Any]) -> Any:
    """`mlp` of the trunk for an architecture and its options.

    Raises:
        TrunklineError: for an activation that the trunk does not have.
    """
    kinds = {"gelu": "gelu", "gelu_tanh": "gelu_tanh", "quick_gelu": "quick_gelu", "relu": "relu", "silu": "silu"}
    usual = "quick_gelu" if "quickgelu" in name else "gelu_tanh" if TANH_OF_TIMM.search(name) else "gelu"
    wanted = options.get("act_layer", usual)
    if wanted not in kinds:
        raise TrunklineError(
            f"timm's {name} with act_layer={wanted} cannot be converted: {OUR_VIT} has no such activation"
        )
    return kinds[wanted]


def timm_config_to(config: ViTConfig) -> dict[str, Any]:
    """Configuration of a `ViT` -> content of timm's config.json of the same network.

    Raises:
        TrunklineError: if the network has an option that timm's does not have.
    """
    trunk = config.backbone
    pool = {"cls": "token", "mean": "avg", "map": "map"}.get(config.pool, "token")
    # The architecture stands for what cannot be an option in a file: the epsilon of the norms.
    name = "vit_base_patch16_clip_224" if trunk.norm_eps == 1e-5 else "vit_base_patch16_224"
    if trunk.norm_eps not in (1e-5, 1e-6):
        raise TrunklineError(
            f"{OUR_VIT} with norm_eps={trunk.norm_eps} cannot become {TIMM_VIT}, which has 1e-6 or 1e-5"
        )
    if trunk.mlp in ("swiglu", "geglu", "relu2"):
        raise TrunklineError(f"{OUR_VIT} with mlp={trunk.mlp} cannot become {TIMM_VIT}")
    if config.pool == "map" and not trunk.attention_bias:
        raise TrunklineError(
            f"{OUR_VIT} with pool=map and qkv_bias=False cannot become {TIMM_VIT}, whose pooling has these biases"
        )
    options = {
        "img_size": list(config.size),
        "patch_size": config.patch_size,
        "in_chans": config.in_chans,
        "num_classes": config.num_classes,
        "embed_dim": trunk.dim,
        "depth": trunk.depth,
        "num_heads": trunk.num_heads,
        "mlp_ratio": ratio_of(trunk.hidden_dim, trunk.dim),
        "qkv_bias": trunk.attention_bias,
        "qk_norm": trunk.qk_norm,
        "init_values": trunk.layer_scale,
        "class_token": config.pool == "cls",
        "no_embed_class": config.prefix_positions == 0 and tokens_before(config) > 0,
        "reg_tokens": config.num_registers,
        "pre_norm": config.embed_norm,
        "final_norm": trunk.final_norm or config.fc_norm,
        "fc_norm": config.fc_norm,
        "global_pool": pool,
        "act_layer": trunk.mlp,
        "drop_path_rate": trunk.drop_path,
    }
    content = {
        "architecture": name,
        "num_classes": config.num_classes,
        "num_features": trunk.dim,
        "global_pool": pool,
        "model_args": options,
        "pretrained_cfg": {"input_size": [config.in_chans, *config.size], "num_classes": config.num_classes},
    }
    expressed = ViTConfig(
        image_size=config.image_size,
        patch_size=config.patch_size,
        drop_remainder=config.drop_remainder,
        in_chans=config.in_chans,
        num_classes=config.num_classes,
        pool=config.pool if config.pool != "cls_mean" else "cls",
        num_registers=config.num_registers,
        embed_norm=config.embed_norm,
        prefix_positions=positions_before(config),
        patch_bias=not config.embed_norm,
        fc_norm=config.fc_norm,
        backbone=TransformerConfig(
            dim=trunk.dim,
            depth=trunk.depth,
            num_heads=trunk.num_heads,
            mlp_dim=trunk.hidden_dim,
            mlp=trunk.mlp,
            norm_eps=trunk.norm_eps,
            final_norm=trunk.final_norm and not config.fc_norm,
            qk_norm=trunk.qk_norm,
            qkv_bias=trunk.qkv_bias,
            layer_scale=trunk.layer_scale,
        ),
    )
    refuse_difference(with_learned_positions(config, positions_before(config)), expressed, TIMM_VIT, OUR_VIT)
    return content


def positions_before(config: ViTConfig) -> int:
    """Number of tokens before the patches that have a position in timm: all or none."""
    return tokens_before(config) if config.prefix_positions else 0


def timm_weights_to(weights: Mapping[str, Tensor], config: ViTConfig) -> dict[str, Tensor]:
    """Our state dict -> timm's; errors as in `VitNames.weights_to`."""
    return TIMM_NAMES.weights_to(weights, config, prefix=positions_before(config))


TIMM = ForeignFamily(
    name=TIMM_VIT,
    origin="timm",
    network=ViT,
    recognises=is_timm,
    config_from=timm_config_from,
    config_to=timm_config_to,
    weights_from=lambda weights, config: TIMM_NAMES.weights_from(dict(weights), config),
    weights_to=timm_weights_to,
)
