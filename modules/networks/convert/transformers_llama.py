"""Convert decoders of transformers that are built like LLaMA (arXiv:2302.13971) to a `GPT`, and back.

LLaMA, Mistral, Qwen2 (arXiv:2407.10671) and Qwen3 (arXiv:2505.09388) have one layout of names. They differ in where
they have biases, and in the norm of queries and keys. SmolLM and many others are of the type llama.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor

from trunkline import TrunklineError
from trunkline.modules.backbone import TransformerConfig
from trunkline.modules.networks.convert.family import ForeignFamily, with_model_type
from trunkline.modules.networks.convert.key_tables import (
    KeyTable,
    from_theirs,
    refuse_difference,
    refuse_options,
    to_theirs,
)
from trunkline.modules.networks.convert.transformers_gpt2 import without_tied_head
from trunkline.modules.networks.gpt import GPT, GPTConfig

OURS_OF_LLAMA = "a GPT"
LLAMA_BLOCK = "model.layers.*"
LLAMA_TABLE: KeyTable = {
    "token_embed": ("model.embed_tokens",),
    "backbone.blocks.*.norm1": (f"{LLAMA_BLOCK}.input_layernorm",),
    "backbone.blocks.*.attn.qkv": tuple(f"{LLAMA_BLOCK}.self_attn.{part}_proj" for part in "qkv"),
    "backbone.blocks.*.attn.q_norm": (f"{LLAMA_BLOCK}.self_attn.q_norm",),
    "backbone.blocks.*.attn.k_norm": (f"{LLAMA_BLOCK}.self_attn.k_norm",),
    "backbone.blocks.*.attn.proj": (f"{LLAMA_BLOCK}.self_attn.o_proj",),
    "backbone.blocks.*.norm2": (f"{LLAMA_BLOCK}.post_attention_layernorm",),
    "backbone.blocks.*.mlp.fc1": (f"{LLAMA_BLOCK}.mlp.gate_proj", f"{LLAMA_BLOCK}.mlp.up_proj"),
    "backbone.blocks.*.mlp.fc2": (f"{LLAMA_BLOCK}.mlp.down_proj",),
    "backbone.norm": ("model.norm",),
    "head": ("lm_head",),
}
"""Names of a `GPT` -> of LLaMA and its relatives."""
FAMILIES_OF_LLAMA = {"llama": "a LLaMA", "mistral": "a Mistral", "qwen2": "a Qwen2", "qwen3": "a Qwen3"}
"""`model_type` -> its name in messages."""
ARCHITECTURES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
THETA = 10_000.0


def llama_from_transformers(weights: Mapping[str, Tensor], family: str) -> dict[str, Tensor]:
    """State dict of a transformers `LlamaForCausalLM` or a relative -> state dict of a `GPT`.

    Raises:
        TrunklineError: for a weight that a `GPT` does not have.
    """
    bare = not any(name.startswith("model.") for name in weights)  # files of the model without its output layer
    own = {
        f"model.{name}" if bare else name: value
        for name, value in weights.items()
        if not name.endswith("rotary_emb.inv_freq")  # computed, in files of older versions
    }
    return from_theirs(own, LLAMA_TABLE, family, OURS_OF_LLAMA)


def llama_to_transformers(weights: Mapping[str, Tensor], config: GPTConfig, family: str) -> dict[str, Tensor]:
    """State dict of a `GPT` -> of a transformers `LlamaForCausalLM` or a relative, without a tied output layer.

    Raises:
        TrunklineError: for a weight that theirs does not have.
    """
    trunk = config.backbone
    keys = trunk.kv_heads * trunk.head_width
    sizes = {"backbone.blocks.*.attn.qkv": (trunk.num_heads * trunk.head_width, keys, keys)}
    return to_theirs(without_tied_head(weights, config), LLAMA_TABLE, family, OURS_OF_LLAMA, sizes=sizes)


def llama_config_from_transformers(config: Mapping[str, Any]) -> GPTConfig:
    """Content of the config.json of a LLaMA, Mistral, Qwen2 or Qwen3 -> configuration of the same `GPT`.

    Raises:
        TrunklineError: if it uses an option that the trunk does not have, such as scaled rotations or a window in
            some layers.
    """
    kind = config["model_type"]
    family = FAMILIES_OF_LLAMA[kind]
    usual = {"hidden_act": ("silu",), "pretraining_tp": (1,), "partial_rotary_factor": (1, None)}
    refuse_options(config, usual, family, OURS_OF_LLAMA)
    length = config.get("max_position_embeddings", 2048)
    attention, mlp = (config.get(name, False) for name in ("attention_bias", "mlp_bias"))
    if attention != mlp:  # its biases are those of all four layers of attention
        raise TrunklineError(
            f"{family} with attention_bias={attention} and mlp_bias={mlp} cannot be converted: {OURS_OF_LLAMA} has "
            "both or neither"
        )
    trunk = TransformerConfig(
        dim=config["hidden_size"],
        depth=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        num_kv_heads=config.get("num_key_value_heads"),
        mlp_dim=config["intermediate_size"],
        mlp="swiglu",
        norm="rmsnorm",
        norm_eps=config.get("rms_norm_eps", 1e-6),
        bias=attention,
        causal=True,
        rope_theta=rope_theta(config, family),
        head_dim=config.get("head_dim"),
        qkv_bias=True if kind == "qwen2" else None,
        qk_norm=kind == "qwen3",
        window=window_of(config, length, family),
        dropout=0.0,
    )
    return GPTConfig(
        vocab_size=config["vocab_size"],
        max_length=length,
        positions="none",
        tie_embeddings=config.get("tie_word_embeddings", False),
        backbone=trunk,
    )


def window_of(config: Mapping[str, Any], length: int, family: str) -> int | None:
    """The window of all layers; None if there is none, or if texts of `length` tokens fit into it.

    Raises:
        TrunklineError: if only some layers have it.
    """
    qwen, depth = config["model_type"].startswith("qwen"), config["num_hidden_layers"]
    window: int | None = None if config["model_type"] == "llama" else config.get("sliding_window")
    if window is None or window >= length or (qwen and not config.get("use_sliding_window")):
        return None
    first = config.get("max_window_layers", 28) if qwen else 0  # of these layers; newer files name the kind of each
    kinds = config.get("layer_types") or [f"{'full' if n < first else 'sliding'}_attention" for n in range(depth)]
    windowed = kinds.count("sliding_attention")
    if 0 < windowed < depth:
        raise TrunklineError(
            f"{family} with sliding_window={window} in {windowed} of its {depth} layers cannot be converted: the "
            f"layers of {OURS_OF_LLAMA} are alike"
        )
    return window if windowed else None


def rope_theta(config: Mapping[str, Any], family: str) -> float:
    """Base of the rotations; version 5 of transformers keeps it among `rope_parameters`.

    Raises:
        TrunklineError: if the rotations are scaled.
    """
    for name in ("rope_parameters", "rope_scaling"):
        options = config.get(name) or {}
        kind = options.get("rope_type", options.get("type", "default"))
        if kind != "default":
            raise TrunklineError(
                f"{family} with {name} of type {kind} cannot be converted: {OURS_OF_LLAMA} does not scale rotations"
            )
    return float((config.get("rope_parameters") or {}).get("rope_theta", config.get("rope_theta", THETA)))


def llama_config_to_transformers(config: GPTConfig, kind: str) -> dict[str, Any]:
    """Configuration of a `GPT` -> content of the config.json of the same LLaMA, Mistral, Qwen2 or Qwen3.

    Token ids, such as that at the end of a text, are not in it.

    Args:
        config: of our network.
        kind: the `model_type`.

    Raises:
        TrunklineError: if the network has an option that theirs does not have.
    """
    trunk = config.backbone
    theta = THETA if trunk.rope_theta is None else trunk.rope_theta
    content: dict[str, Any] = {
        "model_type": kind,
        "architectures": [f"{ARCHITECTURES[kind]}ForCausalLM"],
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_length,
        "hidden_size": trunk.dim,
        "num_hidden_layers": trunk.depth,
        "num_attention_heads": trunk.num_heads,
        "num_key_value_heads": trunk.kv_heads,
        "head_dim": trunk.head_width,
        "intermediate_size": trunk.hidden_dim,
        "hidden_act": "silu",
        "rms_norm_eps": trunk.norm_eps,
        "rope_theta": theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "tie_word_embeddings": config.tie_embeddings,
    }
    if kind != "llama":
        content["sliding_window"] = trunk.window
    if kind.startswith("qwen") and trunk.window is not None:
        content |= {"use_sliding_window": True, "max_window_layers": 0}
    if kind == "llama":
        content |= {"attention_bias": trunk.bias, "mlp_bias": trunk.bias}
    refuse_difference(config, llama_config_from_transformers(content), FAMILIES_OF_LLAMA[kind], OURS_OF_LLAMA)
    return content


def llama_family(kind: str) -> ForeignFamily:
    """The family of a `model_type`."""
    name = FAMILIES_OF_LLAMA[kind]
    return ForeignFamily(
        name=name,
        origin="transformers",
        network=GPT,
        recognises=with_model_type(kind),
        config_from=lambda content, weights: llama_config_from_transformers(content),
        config_to=partial(llama_config_to_transformers, kind=kind),
        weights_from=lambda weights, config: llama_from_transformers(weights, name),
        weights_to=lambda weights, config: llama_to_transformers(weights, config, name),
        layers=lambda config: (LLAMA_TABLE,),
    )


LLAMA, MISTRAL, QWEN2, QWEN3 = map(llama_family, FAMILIES_OF_LLAMA)
