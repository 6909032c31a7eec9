"""Convert the weights of the CLIP in transformers to those of a `CLIP`."""

from collections.abc import Mapping

import torch
from torch import Tensor

# transformers' name of a part of CLIP -> our name.
TRANSFORMERS_CLIP = {
    "visual_projection.": "image.head.",
    "text_projection.": "text.head.",
    "vision_model.pre_layrnorm.": "image.embed_norm.",
    "vision_model.encoder.layers.": "image.backbone.blocks.",
    "vision_model.post_layernorm.": "image.backbone.norm.",
    "text_model.embeddings.token_embedding.": "text.body.token_embed.",
    "text_model.embeddings.position_embedding.": "text.body.pos_embed.",
    "text_model.encoder.layers.": "text.body.backbone.blocks.",
    "text_model.final_layer_norm.": "text.body.backbone.norm.",
}
TRANSFORMERS_CLIP_BLOCK = {
    ".self_attn.q_proj.": ".attn.qkv.",
    ".self_attn.out_proj.": ".attn.proj.",
    ".layer_norm1.": ".norm1.",
    ".layer_norm2.": ".norm2.",
}


def clip_from_transformers(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict of a transformers `CLIPModel` -> state dict of a `CLIP` with a GPT and a ViT with `embed_norm`.

    The patches and projections of transformers' CLIP have no biases: here they are zero. The position of the class
    token is added to the token here.
    """
    converted: dict[str, Tensor] = {}
    for name, value in weights.items():
        start = next((theirs for theirs in TRANSFORMERS_CLIP if name.startswith(theirs)), None)
        if start is None or ".self_attn.k_proj." in name or ".self_attn.v_proj." in name:
            continue
        ours = TRANSFORMERS_CLIP[start] + name.removeprefix(start)
        if ".self_attn.q_proj." in name:
            value = torch.cat([weights[name.replace("q_proj", kind)] for kind in ("q_proj", "k_proj", "v_proj")])
        for theirs, part in TRANSFORMERS_CLIP_BLOCK.items():
            ours = ours.replace(theirs, part)
        converted[ours] = value
    converted["scale.logit_scale"] = weights["logit_scale"].reshape(1)
    positions = weights["vision_model.embeddings.position_embedding.weight"]  # (1 + patches, D)
    converted["image.pos_embed"] = positions[None, 1:]
    converted["image.cls_token"] = (weights["vision_model.embeddings.class_embedding"] + positions[0])[None, None]
    converted["image.patch_embed.proj.weight"] = weights["vision_model.embeddings.patch_embedding.weight"].flatten(1)
    for layer in ("image.patch_embed.proj", "image.head", "text.head"):
        converted[f"{layer}.bias"] = torch.zeros(len(converted[f"{layer}.weight"]))
    return converted
