"""Convert weights and configuration of BART and Marian in transformers to those of an `EncoderDecoder`, and back."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from trunkline.modules.backbone import TransformerConfig
from trunkline.modules.networks.convert.family import ForeignFamily, with_model_type
from trunkline.modules.networks.convert.key_tables import (
    KeyTable,
    explicit,
    from_theirs,
    refuse_difference,
    refuse_options,
    shared_weight,
    to_theirs,
    without_prefix,
)
from trunkline.modules.networks.encoder_decoder import EncoderDecoder, EncoderDecoderConfig

ACTIVATIONS_OF_BART = {
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
"""`activation_function` of BART and Marian -> `mlp` of the trunk; of several names, the last is written."""


def bart_table(one_embedding: bool) -> KeyTable:
    """Names of an `EncoderDecoder` -> of BART and Marian, with one embedding for both sides or two."""
    table = {
        "token_embed": ("model.shared" if one_embedding else "model.encoder.embed_tokens",),
        "target_embed": ("model.decoder.embed_tokens",),
        "pos_embed": ("model.encoder.embed_positions",),
        "target_pos_embed": ("model.decoder.embed_positions",),
        "embed_norm": ("model.encoder.layernorm_embedding",),
        "target_embed_norm": ("model.decoder.layernorm_embedding",),
        "head": ("lm_head",),
    }
    return {**table, **layers_table()}


def layers_table() -> KeyTable:
    """Names of the layers of our two trunks -> of BART's, and of other models with the same layers."""
    table: dict[str, tuple[str, ...]] = {}
    for side in ("encoder", "decoder"):
        ours, theirs = f"{side}.blocks.*", f"model.{side}.layers.*"
        table |= {
            f"{ours}.attn.qkv": tuple(f"{theirs}.self_attn.{part}_proj" for part in "qkv"),
            f"{ours}.attn.proj": (f"{theirs}.self_attn.out_proj",),
            f"{ours}.norm1": (f"{theirs}.self_attn_layer_norm",),
            f"{ours}.mlp.fc1": (f"{theirs}.fc1",),
            f"{ours}.mlp.fc2": (f"{theirs}.fc2",),
            f"{ours}.norm2": (f"{theirs}.final_layer_norm",),
        }
    return table | {
        "decoder.blocks.*.cross_attn.q": ("model.decoder.layers.*.encoder_attn.q_proj",),
        "decoder.blocks.*.cross_attn.kv": tuple(f"model.decoder.layers.*.encoder_attn.{part}_proj" for part in "kv"),
        "decoder.blocks.*.cross_attn.proj": ("model.decoder.layers.*.encoder_attn.out_proj",),
        "decoder.blocks.*.norm_cross": ("model.decoder.layers.*.encoder_attn_layer_norm",),
    }


SHARED = ("model.shared.weight", "model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight")
"""Names of one embedding for both sides; files have the first."""
POSITIONS = ("model.encoder.embed_positions.weight", "model.decoder.embed_positions.weight")
LOGITS_BIAS = "final_logits_bias"
VERSION = "coder.version"
"""A number in old files."""
UNKNOWN_IDS = {
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "forced_eos_token_id")),
    "decoder_start_token_id": -1,  # some of their classes refuse null
}
"""Ids of tokens, which a network does not know; the usual ones could be other tokens of its vocabulary."""
USUAL = {
    "is_encoder_decoder": (True,),
    "tie_word_embeddings": (True,),
    "normalize_before": (False,),
    "add_final_layer_norm": (False,),
    "activation_function": ACTIVATIONS_OF_BART,
}
"""Values of options that can be converted; some of them are only in old files."""


def with_prefix(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict in the names of a model with an output layer: those of a body alone lack `model.`."""
    body = not any(name.startswith("model.") for name in weights)
    return {f"model.{name}" if body else name: weights[name] for name in weights}


@dataclass(frozen=True)
class BartLike:
    """What BART and Marian differ in."""

    name: str
    """With its article, for messages."""
    model_type: str
    classes: tuple[str, str]
    """Their models: a body, and with a bias of the output layer."""
    embed_norm: bool
    first_position: int
    """Row of the first position in a learned table; 0 for positions that are not learned."""

    def modules(self, config: EncoderDecoderConfig) -> tuple[KeyTable, ...]:
        """Names of all layers as modules, but of the output layer: it is tied, and its bias belongs to no module."""
        table = {ours: theirs for ours, theirs in bart_table(config.one_embedding).items() if ours != "head"}
        return (table if config.output_bias else without_prefix(table, "model."),)

    def weights_from(self, weights: Mapping[str, Tensor], config: EncoderDecoderConfig) -> dict[str, Tensor]:
        """Their state dict -> ours. Copies of a shared embedding may be absent, and so may the tied output layer.

        Raises:
            TrunklineError: for a weight that an `EncoderDecoder` does not have.
        """
        own = {name: value for name, value in with_prefix(weights).items() if not name.endswith(VERSION)}
        bias = own.pop(LOGITS_BIAS, None)
        if config.one_embedding:
            own |= shared_weight(own, SHARED, self.name)
        converted = from_theirs(own, bart_table(config.one_embedding), self.name)
        return converted if bias is None else converted | {"head.bias": bias[0]}

    def weights_to(self, weights: Mapping[str, Tensor], config: EncoderDecoderConfig) -> dict[str, Tensor]:
        """Our state dict -> theirs, in the names of their files, which lack copies of shared weights.

        Raises:
            TrunklineError: for a weight that theirs does not have.
        """
        left = {"head.weight", "head.bias", *(["target_embed.weight"] if config.one_embedding else [])}
        own = {name: value for name, value in weights.items() if name not in left}
        converted = to_theirs(own, bart_table(config.one_embedding), self.name)
        if config.positions == "learned":  # nothing reads the rows before the first position
            rows = self.first_position - config.first_position
            converted |= {name: F.pad(converted[name], (0, 0, rows, 0)) for name in POSITIONS}
        if config.output_bias:
            return converted | {LOGITS_BIAS: weights["head.bias"][None].clone()}
        return {name.removeprefix("model."): value for name, value in converted.items()}

    def config_from(self, config: Mapping[str, Any], weights: Collection[str]) -> EncoderDecoderConfig:
        """Content of their config.json -> our configuration; the weights tell whether there is a bias of the output.

        Dropout takes place where the trunk has it, which is not everywhere where theirs can have it.

        Raises:
            TrunklineError: if theirs uses an option that an `EncoderDecoder` does not have.
        """
        refuse_options(config, {"normalize_embedding": (self.embed_norm,), **USUAL}, self.name)
        encoder, decoder = (
            TransformerConfig(
                dim=config["d_model"],
                depth=config[f"{side}_layers"],
                num_heads=config[f"{side}_attention_heads"],
                mlp_dim=config[f"{side}_ffn_dim"],
                mlp=ACTIVATIONS_OF_BART[config.get("activation_function", "gelu")],  # type: ignore[arg-type]
                norm_eps=1e-5,
                norm_first=False,
                final_norm=False,
                dropout=config.get("dropout", 0.1),
            )
            for side in ("encoder", "decoder")
        )
        kept = any(name.endswith(POSITIONS[0].removeprefix("model.")) for name in weights)
        shared = config.get("share_encoder_decoder_embeddings", True)
        return EncoderDecoderConfig(
            vocab_size=config["vocab_size"],
            target_vocab_size=None if shared else config.get("decoder_vocab_size"),
            max_length=config.get("max_position_embeddings", 1024),
            max_target_length=config.get("max_position_embeddings", 1024),
            positions="learned" if self.first_position else "fixed" if kept else "sinusoidal",
            first_position=self.first_position,
            share_embeddings=shared,
            scale_embeddings=config.get("scale_embedding", False),
            embed_norm=self.embed_norm,
            output_bias=LOGITS_BIAS in weights,
            encoder=encoder,
            decoder=decoder,
        )

    def config_to(self, config: EncoderDecoderConfig) -> dict[str, Any]:
        """Our configuration -> content of their config.json, in which token ids are unknown.

        Raises:
            TrunklineError: if ours has an option that theirs does not have.
        """
        names = {ours: theirs for theirs, ours in ACTIVATIONS_OF_BART.items()}
        content: dict[str, Any] = {
            "model_type": self.model_type,
            "architectures": [self.classes[1 if config.output_bias else 0]],
            "vocab_size": config.vocab_size,
            "max_position_embeddings": max(config.max_length, config.max_target_length),
            "d_model": config.encoder.dim,
            "dropout": config.encoder.dropout,
            "activation_function": names.get(config.encoder.mlp, "gelu"),
            "scale_embedding": config.scale_embeddings,
            "tie_word_embeddings": True,
            **UNKNOWN_IDS,
        }
        for side, trunk in (("encoder", config.encoder), ("decoder", config.decoder)):
            content |= {
                f"{side}_layers": trunk.depth,
                f"{side}_attention_heads": trunk.num_heads,
                f"{side}_ffn_dim": trunk.hidden_dim,
            }
        if not self.first_position:
            content["decoder_vocab_size"] = config.target_vocabulary
            content["share_encoder_decoder_embeddings"] = config.one_embedding
        present = [LOGITS_BIAS] if config.output_bias else []
        present += POSITIONS if config.positions == "fixed" else []
        own = explicit(config)
        if self.first_position and not own.first_position:
            own = replace(own, first_position=self.first_position)
        free = ("max_length", "max_target_length") if config.positions == "sinusoidal" else ()
        refuse_difference(own, explicit(self.config_from(content, present)), self.name, free=free)
        return content

    def family(self) -> ForeignFamily:
        """Its entry among the families."""
        return ForeignFamily(
            name=self.name,
            origin="transformers",
            network=EncoderDecoder,
            recognises=with_model_type(self.model_type),
            config_from=self.config_from,
            config_to=self.config_to,
            weights_from=self.weights_from,
            weights_to=self.weights_to,
            layers=self.modules,
        )


BART = BartLike(
    name="a BART",
    model_type="bart",
    classes=("BartModel", "BartForConditionalGeneration"),
    embed_norm=True,
    first_position=2,
).family()
MARIAN = BartLike(
    name="a Marian",
    model_type="marian",
    classes=("MarianModel", "MarianMTModel"),
    embed_norm=False,
    first_position=0,
).family()
