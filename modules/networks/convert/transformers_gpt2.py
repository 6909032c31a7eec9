"""Convert weights and configuration of the GPT-2 in transformers to those of a `GPT`."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from trunkline import TrunklineError
from trunkline.modules.backbone import TransformerConfig
from trunkline.modules.networks.gpt import GPTConfig

# transformers' name of a part of GPT-2 -> our name.
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

    GPT-2 stores linear layers as (in, out) matrices, which it calls Conv1D; here they are (out, in).
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
    converted.setdefault("head.weight", converted["token_embed.weight"])  # absent in files if it is tied
    return converted


def gpt_config_from_transformers(config: Mapping[str, Any]) -> GPTConfig:
    """Content of the config.json of a transformers GPT-2 -> configuration of the same `GPT`.

    Raises:
        TrunklineError: if the GPT-2 uses an option that the trunk does not have.
    """
    activations = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu"}
    usual = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}
    other = [name for name, value in usual.items() if config.get(name, value) != value]
    activation = config.get("activation_function", "gelu_new")
    other += [] if activation in activations else ["activation_function"]
    if other:
        raise TrunklineError(
            f"a GPT-2 with {other[0]}={config[other[0]]} cannot be converted: the trunk has no such option"
        )
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
