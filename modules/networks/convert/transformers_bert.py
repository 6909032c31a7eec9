"""Convert weights and configuration of BERT, RoBERTa and DistilBERT in transformers to those of a `BERT`, and back."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from trunkline import TrunklineError
from trunkline.modules.backbone import TransformerConfig
from trunkline.modules.networks.bert import BERT, BERTConfig
from trunkline.modules.networks.convert.family import ForeignFamily, with_model_type
from trunkline.modules.networks.convert.key_tables import (
    KeyTable,
    from_theirs,
    refuse_difference,
    refuse_options,
    to_theirs,
)

OUR_BERT = "a BERT"
ACTIVATIONS_OF_BERT = {"gelu": "gelu", "gelu_new": "gelu_tanh", "relu": "relu", "silu": "silu", "swish": "silu"}
"""`hidden_act` of BERT -> `mlp` of the trunk."""
LAYER = "encoder.layer.*"
TRUNK_OF_BERT: KeyTable = {
    "token_embed": ("embeddings.word_embeddings",),
    "pos_embed": ("embeddings.position_embeddings",),
    "segment_embed": ("embeddings.token_type_embeddings",),
    "embed_norm": ("embeddings.LayerNorm",),
    "backbone.blocks.*.attn.qkv": tuple(f"{LAYER}.attention.self.{part}" for part in ("query", "key", "value")),
    "backbone.blocks.*.attn.proj": (f"{LAYER}.attention.output.dense",),
    "backbone.blocks.*.norm1": (f"{LAYER}.attention.output.LayerNorm",),
    "backbone.blocks.*.mlp.fc1": (f"{LAYER}.intermediate.dense",),
    "backbone.blocks.*.mlp.fc2": (f"{LAYER}.output.dense",),
    "backbone.blocks.*.norm2": (f"{LAYER}.output.LayerNorm",),
    "pooler.dense": ("pooler.dense",),
}
TRUNK_OF_DISTILBERT: KeyTable = {
    "token_embed": ("embeddings.word_embeddings",),
    "pos_embed": ("embeddings.position_embeddings",),
    "embed_norm": ("embeddings.LayerNorm",),
    "backbone.blocks.*.attn.qkv": tuple(f"transformer.layer.*.attention.{part}_lin" for part in "qkv"),
    "backbone.blocks.*.attn.proj": ("transformer.layer.*.attention.out_lin",),
    "backbone.blocks.*.norm1": ("transformer.layer.*.sa_layer_norm",),
    "backbone.blocks.*.mlp.fc1": ("transformer.layer.*.ffn.lin1",),
    "backbone.blocks.*.mlp.fc2": ("transformer.layer.*.ffn.lin2",),
    "backbone.blocks.*.norm2": ("transformer.layer.*.output_layer_norm",),
}


@dataclass(frozen=True)
class BertLike:
    """What BERT, RoBERTa and DistilBERT differ in."""

    name: str
    """With its article, for messages."""
    model_type: str
    """In config.json; also the prefix of the trunk in models with an output layer."""
    classes: tuple[str, str, str]
    """Their models: a body, with an output layer over the vocabulary, and with one for pairs too, if there is."""
    trunk: KeyTable
    """Names of a `BERT` -> of the body."""
    heads: KeyTable
    """Names of a `BERT` -> of the output layers; that over the vocabulary is listed first."""
    copies: Mapping[str, str]
    """Names that files have in the place of others, which they share."""
    after_padding: bool = False
    """The table of positions has a row for padding, whose number is that of the padding's token, and those of tokens
    follow it."""

    def table(self, body: bool) -> KeyTable:
        """Names of all layers, of a model with or without an output layer."""
        if body:
            return self.trunk
        return {ours: tuple(f"{self.model_type}.{n}" for n in names) for ours, names in self.trunk.items()} | {
            **self.heads
        }

    def modules(self, config: BERTConfig) -> tuple[KeyTable, ...]:
        """Names of all layers as modules: the bias of the output layer is in files under another name."""
        table = self.table(not config.predicts_tokens)
        computing = {first.rstrip("."): copy.rstrip(".") for copy, first in self.copies.items()}
        return ({ours: tuple(computing.get(name, name) for name in names) for ours, names in table.items()},)

    def weights_from(self, weights: Mapping[str, Tensor], config: BERTConfig) -> dict[str, Tensor]:
        """Their state dict -> ours. In theirs, class 0 means that the second text follows; here it is class 1.

        Raises:
            TrunklineError: for a weight that a `BERT` does not have.
        """
        own = {}
        for name, value in names_of_today(weights).items():
            copied = next((first for first in self.copies if name.startswith(first)), None)
            own[name if copied is None else self.copies[copied] + name.removeprefix(copied)] = value
        body = not any(name.startswith(f"{self.model_type}.") for name in own)
        return flip_classes(from_theirs(own, self.table(body), self.name, OUR_BERT))

    def weights_to(self, weights: Mapping[str, Tensor], config: BERTConfig) -> dict[str, Tensor]:
        """Our state dict -> theirs, without the matrix of the output layer, which is tied.

        Raises:
            TrunklineError: for a weight that theirs does not have.
        """
        own = {name: value for name, value in weights.items() if name != "head.weight"}
        return to_theirs(flip_classes(own), self.table(not config.predicts_tokens), self.name, OUR_BERT)

    def config_from(self, config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> BERTConfig:
        """Content of their config.json -> our configuration; the weights tell which outputs there are.

        Raises:
            TrunklineError: if theirs uses an option that a `BERT` does not have.
        """
        names = {
            "hidden_size": "dim",
            "num_hidden_layers": "n_layers",
            "num_attention_heads": "n_heads",
            "intermediate_size": "hidden_dim",
            "hidden_act": "activation",
            "hidden_dropout_prob": "dropout",
        }
        sizes = {usual: config.get(other, config.get(usual)) for usual, other in names.items()}
        predicts = any(name.startswith(self.heads["masked_head.dense"]) for name in weights)
        usual: dict[str, Any] = {
            "position_embedding_type": ("absolute",),
            "tie_word_embeddings": (True,),
            "is_decoder": (False,),
            "add_cross_attention": (False,),
            # The layer before the output has the activation of the blocks, but that of our network has GELU.
            "hidden_act" if sizes["hidden_act"] == config.get("hidden_act") else "activation": (
                ("gelu",) if predicts else ACTIVATIONS_OF_BERT
            ),
        }
        refuse_options(config, usual, self.name, OUR_BERT)
        trunk = TransformerConfig(
            dim=sizes["hidden_size"],
            depth=sizes["num_hidden_layers"],
            num_heads=sizes["num_attention_heads"],
            mlp_dim=sizes["intermediate_size"],
            mlp=ACTIVATIONS_OF_BERT[sizes["hidden_act"] or "gelu"],  # type: ignore[arg-type]
            norm_eps=1e-12 if self.trunk is TRUNK_OF_DISTILBERT else config.get("layer_norm_eps", 1e-12),
            norm_first=False,
            final_norm=False,
            dropout=0.1 if sizes["hidden_dropout_prob"] is None else sizes["hidden_dropout_prob"],
        )
        padding = config.get("pad_token_id", 1)
        if self.after_padding and (not isinstance(padding, int) or padding < 0):
            raise TrunklineError(
                f"{self.name} with pad_token_id={padding} cannot be converted: its positions begin after that number; "
                "write the one of its tokenizer's padding into config.json"
            )
        first = padding + 1 if self.after_padding else 0
        return BERTConfig(
            vocab_size=config["vocab_size"],
            max_length=config.get("max_position_embeddings", 512) - first,
            num_segments=config.get("type_vocab_size", 2) if "segment_embed" in self.trunk else 0,
            next_sentence="cls.seq_relationship.weight" in weights,
            predicts_tokens=predicts,
            pooler=any("pooler.dense" in name for name in weights) and "cls.seq_relationship.weight" not in weights,
            first_position=first,
            backbone=trunk,
        )

    def config_to(self, config: BERTConfig) -> dict[str, Any]:
        """Our configuration -> content of their config.json. Token ids are not in it, but that of a RoBERTa's padding.

        Raises:
            TrunklineError: if ours has an option that theirs does not have.
        """
        trunk, body, names = config.backbone, not config.predicts_tokens, {v: k for k, v in ACTIVATIONS_OF_BERT.items()}
        kind = 0 if body else 2 if config.next_sentence and self.classes[2] else 1
        first = max(config.first_position, 1) if self.after_padding else 0
        content: dict[str, Any] = {
            "model_type": self.model_type,
            "architectures": [self.classes[kind]],
            "vocab_size": config.vocab_size,
            "max_position_embeddings": config.max_length + first,
            "tie_word_embeddings": True,
            **({"pad_token_id": first - 1} if self.after_padding else {}),
        }
        if self.trunk is TRUNK_OF_DISTILBERT:
            content |= {
                **{"dim": trunk.dim, "n_layers": trunk.depth, "n_heads": trunk.num_heads},
                **{"hidden_dim": trunk.hidden_dim, "activation": names.get(trunk.mlp, "gelu")},
                **{"dropout": trunk.dropout, "attention_dropout": trunk.dropout},
            }
        else:
            content |= {
                **{"hidden_size": trunk.dim, "num_hidden_layers": trunk.depth, "num_attention_heads": trunk.num_heads},
                **{"intermediate_size": trunk.hidden_dim, "hidden_act": names.get(trunk.mlp, "gelu")},
                **{"hidden_dropout_prob": trunk.dropout, "attention_probs_dropout_prob": trunk.dropout},
                **{"layer_norm_eps": trunk.norm_eps, "type_vocab_size": max(config.num_segments, 1)},
            }
        expressed = self.config_from(content, dict.fromkeys(self._names_of(config)))  # type: ignore[arg-type]
        refuse_difference(replace(config, pooler=expressed.pooler), expressed, self.name, OUR_BERT)
        return content

    def _names_of(self, config: BERTConfig) -> list[str]:
        """Names that tell `config_from` which outputs there are."""
        ours = ["masked_head.dense"] if config.predicts_tokens else []
        ours += ["next_head"] if config.next_sentence else []
        found = [f"{names[0]}.weight" for place in ours for names in (self.heads.get(place, ()),) if names]
        return [*found, *(["pooler.dense.weight"] if config.pooler else [])]

    def family(self) -> ForeignFamily:
        """Its entry among the families."""
        return ForeignFamily(
            name=self.name,
            origin="transformers",
            network=BERT,
            recognises=with_model_type(self.model_type),
            config_from=self.config_from,
            config_to=self.config_to,
            weights_from=self.weights_from,
            weights_to=self.weights_to,
            layers=self.modules,
        )


GAMMA_BETA = {"gamma": "weight", "beta": "bias"}
"""Names of a norm's parameters in the oldest files -> those of today."""


def names_of_today(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict in the names that files of today have, without the numbers of positions (0, 1, ...) of old ones."""
    return {
        re.sub(r"LayerNorm\.(gamma|beta)$", lambda m: f"LayerNorm.{GAMMA_BETA[m[1]]}", name): value
        for name, value in weights.items()
        if not name.endswith("position_ids")
    }


def flip_classes(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Exchange the two classes of the output for pairs."""
    return {name: value.flip(0) if name.startswith("next_head.") else value for name, value in weights.items()}


PREDICTIONS = "cls.predictions"
BERT_LIKE = (
    BertLike(
        name="a BERT of transformers",
        model_type="bert",
        classes=("BertModel", "BertForMaskedLM", "BertForPreTraining"),
        trunk=TRUNK_OF_BERT,
        heads={
            "masked_head.dense": (f"{PREDICTIONS}.transform.dense",),
            "masked_head.norm": (f"{PREDICTIONS}.transform.LayerNorm",),
            "head": (PREDICTIONS,),
            "next_head": ("cls.seq_relationship",),
        },
        copies={f"{PREDICTIONS}.decoder.": f"{PREDICTIONS}."},
    ),
    BertLike(
        name="a RoBERTa",
        model_type="roberta",
        classes=("RobertaModel", "RobertaForMaskedLM", ""),
        trunk=TRUNK_OF_BERT,
        heads={
            "masked_head.dense": ("lm_head.dense",),
            "masked_head.norm": ("lm_head.layer_norm",),
            "head": ("lm_head",),
        },
        copies={"lm_head.decoder.": "lm_head."},
        after_padding=True,
    ),
    BertLike(
        name="a DistilBERT",
        model_type="distilbert",
        classes=("DistilBertModel", "DistilBertForMaskedLM", ""),
        trunk=TRUNK_OF_DISTILBERT,
        heads={
            "masked_head.dense": ("vocab_transform",),
            "masked_head.norm": ("vocab_layer_norm",),
            "head": ("vocab_projector",),
        },
        copies={},
    ),
)
TRANSFORMERS_BERT, ROBERTA, DISTILBERT = (kind.family() for kind in BERT_LIKE)
