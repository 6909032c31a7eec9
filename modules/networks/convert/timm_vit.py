"""Convert the weights of timm's VisionTransformer to those of a `ViT`."""

from collections.abc import Mapping

from torch import Tensor

# timm's name of a part -> our name. Parts with equal names are not listed.
TIMM_VIT = {
    "blocks.": "backbone.blocks.",
    "norm.": "backbone.norm.",
    "attn_pool.latent": "attn_pool.query",
    "attn_pool.q.": "attn_pool.attn.q.",
    "attn_pool.kv.": "attn_pool.attn.kv.",
    "attn_pool.proj.": "attn_pool.attn.proj.",
}


def vit_from_timm(weights: Mapping[str, Tensor], num_patches: int) -> dict[str, Tensor]:
    """State dict of a timm `VisionTransformer` -> state dict of a `ViT` with learned positions.

    timm adds a position to the class token and the registers, and keeps the patch projection as a
    convolution; here those positions are part of the tokens, and the projection is a linear layer.

    Args:
        weights: timm's state dict.
        num_patches: rows * columns of the patch grid.
    """
    converted = {}
    for name, value in weights.items():
        for theirs, ours in TIMM_VIT.items():
            if name.startswith(theirs):
                name = ours + name.removeprefix(theirs)
                break
        converted[name] = value
    converted["patch_embed.proj.weight"] = weights["patch_embed.proj.weight"].flatten(1)
    positions = weights["pos_embed"]  # (1, prefix tokens, or none with `no_embed_class`, + patches, D)
    converted["pos_embed"] = positions[:, -num_patches:]
    start = 0
    for token in ("cls_token", "reg_token"):
        if token in weights and positions.shape[1] > num_patches:
            length = weights[token].shape[1]
            converted[token] = weights[token] + positions[:, start : start + length]
            start += length
    return converted
