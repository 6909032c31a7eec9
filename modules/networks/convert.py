"""Foreign weights enter here, each through a key table with a parity test (tests/test_parity_*.py)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from trunkline import TrunklineError
from trunkline.modules.backbone import TransformerConfig
from trunkline.modules.networks.gpt import GPTConfig

# timm's name of a part -> ours. Parts of the same name are not listed.
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


# transformers' name of a part of GPT-2 -> ours.
TRANSFORMERS_GPT = {
    "wte.": "token_embed.",
    "wpe.": "pos_embed.",
    "h.": "backbone.blocks.",
    "ln_f.": "backbone.norm.",
    "lm_head.": "head.",
}
TRANSFORMERS_GPT_BLOCK = {
    "ln_1.": "norm1.",
    "ln_2.": "norm2.",
    "attn.c_attn.": "attn.qkv.",
    "attn.c_proj.": "attn.proj.",
    "mlp.c_fc.": "mlp.fc1.",
    "mlp.c_proj.": "mlp.fc2.",
}


def gpt_from_transformers(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict of a transformers `GPT2LMHeadModel` or `GPT2Model` -> state dict of a `GPT`.

    GPT-2 keeps its linear layers as (in, out) matrices, which it calls Conv1D; here they are (out, in).
    """
    converted = {}
    for name, value in weights.items():
        name = name.removeprefix("transformer.")
        if name.endswith((".attn.bias", ".attn.masked_bias")):  # causal masks, in files of older versions
            continue
        part = next((theirs for theirs in TRANSFORMERS_GPT if name.startswith(theirs)), "")
        name = TRANSFORMERS_GPT.get(part, "") + name.removeprefix(part)
        for theirs, ours in TRANSFORMERS_GPT_BLOCK.items():
            if f".{theirs}" in name:
                name = name.replace(theirs, ours)
                value = value.T if value.ndim == 2 else value
                break
        converted[name] = value
    converted.setdefault("head.weight", converted["token_embed.weight"])  # absent in files, where it is tied
    return converted


def gpt_config_from_transformers(config: Mapping[str, Any]) -> GPTConfig:
    """Content of the config.json of a transformers GPT-2 -> configuration of the same `GPT`.

    Raises:
        TrunklineError: if it has an option that the trunk has not.
    """
    activations = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu"}
    usual = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}
    other = [name for name, value in usual.items() if config.get(name, value) != value]
    activation = config.get("activation_function", "gelu_new")
    other += [] if activation in activations else ["activation_function"]
    if other:
        raise TrunklineError(f"a GPT-2 with {other[0]}={config[other[0]]} cannot be converted: the trunk is without it")
    trunk = TransformerConfig(
        dim=config["n_embd"],
        depth=config["n_layer"],
        num_heads=config["n_head"],
        mlp_dim=config.get("n_inner"),
        mlp=activations[activation],  # type: ignore[arg-type]
        norm_eps=config.get("layer_norm_epsilon", 1e-5),
        causal=True,
    )
    tied = config.get("tie_word_embeddings", True)
    return GPTConfig(config["vocab_size"], config["n_positions"], tie_embeddings=tied, backbone=trunk)


# transformers' name of a part of BERT -> ours.
TRANSFORMERS_BERT = {
    "bert.embeddings.word_embeddings.": "token_embed.",
    "bert.embeddings.position_embeddings.": "pos_embed.",
    "bert.embeddings.token_type_embeddings.": "segment_embed.",
    "bert.embeddings.LayerNorm.": "embed_norm.",
    "bert.encoder.layer.": "backbone.blocks.",
    "bert.pooler.dense.": "pooler.dense.",
    "cls.predictions.transform.dense.": "masked_head.dense.",
    "cls.predictions.transform.LayerNorm.": "masked_head.norm.",
    "cls.predictions.decoder.": "head.",
    "cls.predictions.bias": "head.bias",
    "cls.seq_relationship.": "next_head.",
}
TRANSFORMERS_BERT_BLOCK = {
    ".attention.output.dense.": ".attn.proj.",
    ".attention.output.LayerNorm.": ".norm1.",
    ".intermediate.dense.": ".mlp.fc1.",
    ".output.dense.": ".mlp.fc2.",
    ".output.LayerNorm.": ".norm2.",
}


def bert_from_transformers(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict of a transformers `BertForPreTraining` or `BertForMaskedLM` -> state dict of a `BERT`.

    Queries, keys and values are one matrix here. Of the next-sentence classes, 0 says there that the second text
    follows, here 1.
    """
    converted: dict[str, Tensor] = {}
    for name, value in weights.items():
        start = next((theirs for theirs in TRANSFORMERS_BERT if name.startswith(theirs)), None)
        if start is None or name.endswith("position_ids"):
            continue
        ours = TRANSFORMERS_BERT[start] + name.removeprefix(start)
        for theirs, part in TRANSFORMERS_BERT_BLOCK.items():
            if theirs in ours:
                ours = ours.replace(theirs, part)
                break
        if ".attention.self.query." in ours:
            parts = [weights[name.replace("query", kind)] for kind in ("query", "key", "value")]
            converted[ours.replace(".attention.self.query.", ".attn.qkv.")] = torch.cat(parts)
        elif ".attention.self." not in ours:
            converted[ours] = value.flip(0) if ours.startswith("next_head.") else value
    return converted


# transformers' name of a part of CLIP -> ours.
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
    """State dict of a transformers `CLIPModel` -> state dict of a `CLIP` of a ViT with `embed_norm` and a GPT.

    CLIP has no biases at its patches and projections: here they are zero. The position of the class token is part of
    the token here.
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
