"""Conversion by one table of names in both directions.

In messages, `family` names their model with its article ("a T5"), and `ours` the network.
"""

import dataclasses
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from trunkline import TrunklineError
from trunkline.modules.backbone import TransformerConfig
from trunkline.modules.networks.base import ConfigT
from trunkline.modules.networks.encoder_decoder import EncoderDecoderConfig
from trunkline.modules.networks.weights import enumerated

OURS = "an EncoderDecoder"
"""Our network in messages, where a converter names no other."""
KeyTable = Mapping[str, tuple[str, ...]]
"""Our name of a layer -> its names in the other library. A `*` stands for the number of a block. If there are several
names, ours has their matrices and biases stacked."""


def without_prefix(table: KeyTable, prefix: str) -> KeyTable:
    """The same table for a body alone, whose layers lack the first part of their names."""
    return {ours: tuple(name.removeprefix(prefix) for name in theirs) for ours, theirs in table.items()}


def layer_number(name: str, table: Collection[str]) -> tuple[str, str]:
    """A layer's name -> its name in the table, and the number of its block or nothing."""
    number = "" if name in table else next(iter(re.findall(r"\.(\d+)\.", name)), "")
    return name.replace(f".{number}.", ".*.", 1) if number else name, number


def from_theirs(weights: dict[str, Tensor], table: KeyTable, family: str, ours: str = OURS) -> dict[str, Tensor]:
    """Their state dict -> ours. Weights are taken out of theirs, so that what is stacked does not stay twice in memory.

    Raises:
        TrunklineError: with all weights that are not in the table, or all missing parts of stacked weights.
    """
    own_names = {theirs: own for own, names in table.items() for theirs in names}
    converted: dict[str, Tensor] = {}
    unknown, missing = [], []
    for name in list(weights):
        layer, _, kind = name.rpartition(".")
        place, number = layer_number(layer, own_names)
        if place not in own_names:
            unknown.append(f"'{name}'")
            continue
        own_name = f"{own_names[place].replace('*', number)}.{kind}"
        if own_name in converted:  # with the first of its parts
            continue
        parts = [f"{part.replace('*', number)}.{kind}" for part in table[own_names[place]]]
        absent = [part for part in parts if part not in weights]
        missing += [f"'{name}' but no '{part}'" for part in absent]
        if not absent:
            values = [weights.pop(part) for part in parts]
            converted[own_name] = values[0] if len(values) == 1 else torch.cat(values)
    if unknown:
        raise TrunklineError(f"weights of {family} have no place in {ours}: {enumerated(unknown)}")
    if missing:
        raise TrunklineError(f"the weights of {family} have {enumerated(missing)}")
    return converted


def shared_weight(weights: dict[str, Tensor], names: Sequence[str], family: str) -> dict[str, Tensor]:
    """Take a weight that may be there under several names out of a state dict, and give it the first of them.

    Raises:
        TrunklineError: if the copies differ.
    """
    copies = {name: weights.pop(name) for name in names if name in weights}
    for name, value in copies.items():
        first, *_ = copies
        if value is not copies[first] and not torch.equal(value, copies[first]):
            raise TrunklineError(f"'{name}' and '{first}' of {family} differ, but are one weight")
    return dict(zip(names, list(copies.values())[:1], strict=False))


def to_theirs(
    weights: Mapping[str, Tensor],
    table: KeyTable,
    family: str,
    ours: str = OURS,
    kinds: Collection[str] = ("weight", "bias"),
    sizes: Mapping[str, Sequence[int]] | None = None,
) -> dict[str, Tensor]:
    """Our state dict -> theirs, whose layers have these kinds of parameters.

    Args:
        weights: our state dict.
        table: names of ours and theirs.
        family: their model, for messages.
        ours: our network, for messages.
        kinds: last parts of the names of their parameters.
        sizes: rows of the parts of stacked layers whose parts differ, by our name in the table.

    Raises:
        TrunklineError: with all weights that are not in the table.
    """
    converted: dict[str, Tensor] = {}
    unknown = []
    for name, value in weights.items():
        layer, _, kind = name.rpartition(".")
        place, number = layer_number(layer, table)
        if place not in table or kind not in kinds:
            unknown.append(f"'{name}'")
            continue
        parts = table[place]
        rows = (sizes or {}).get(place) or [len(value) // len(parts)] * len(parts)
        for part, piece in zip(parts, value.split(list(rows)), strict=True):
            converted[f"{part.replace('*', number)}.{kind}"] = piece.clone()
    if unknown:
        raise TrunklineError(f"weights of {ours} have no place in {family}: {enumerated(unknown)}")
    return converted


def refuse_options(
    config: Mapping[str, Any], usual: Mapping[str, Collection[Any]], family: str, ours: str = OURS
) -> None:
    """Refuse a configuration of theirs in which an option has another value than ours can express.

    Raises:
        TrunklineError: with the name and the value of the option.
    """
    for name, values in usual.items():
        if name in config and config[name] not in values:
            raise TrunklineError(f"{family} with {name}={config[name]} cannot be converted: {ours} has no such option")


def refuse_difference(
    config: ConfigT, expressed: ConfigT, family: str, ours: str = OURS, free: Collection[str] = ()
) -> None:
    """Refuse a configuration of ours that is not the one which the other library's configuration expresses.

    Args:
        config: what is to be converted.
        expressed: what it would be after conversion to the other library and back.
        family: their model, for messages.
        ours: our network, for messages.
        free: fields that may differ.

    Raises:
        TrunklineError: with the first field that differs.
    """
    wanted, found = resolved(config), resolved(expressed)
    for name, value in wanted.items():
        if name not in free and value != found.get(name, value):
            raise TrunklineError(f"{ours} with {name}={value} cannot become {family}, which has {name}={found[name]}")


TRAINING_ONLY = {"dropout", "drop_path", "activation_checkpointing"}


def resolved(config: Any) -> dict[str, Any]:
    """All fields that decide what the network computes, with values in the place of None in the trunks."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, TransformerConfig):
            full = dataclasses.replace(
                value,
                num_kv_heads=value.kv_heads,
                mlp_dim=value.hidden_dim,
                head_dim=value.head_width,
                qkv_bias=value.attention_bias,
                attn_scale=value.head_width**-0.5 if value.attn_scale is None else value.attn_scale,
            )
            parts = dataclasses.asdict(full).items()
            values.update({f"{field.name}.{name}": part for name, part in parts if name not in TRAINING_ONLY})
        else:
            values[field.name] = value
    values.pop("drop_remainder", None)  # it follows from the sizes, or has no effect
    return values


def explicit(config: EncoderDecoderConfig) -> EncoderDecoderConfig:
    """The same encoder-decoder, without None, and with the usual values where an option has no effect."""
    relative, learned, usual = config.positions == "relative", config.positions == "learned", EncoderDecoderConfig
    return dataclasses.replace(
        config,
        target_vocab_size=config.target_vocabulary,
        share_embeddings=config.one_embedding,
        first_position=config.first_position if learned else 0,
        relative_buckets=config.relative_buckets if relative else usual.relative_buckets,
        relative_distance=config.relative_distance if relative else usual.relative_distance,
    )
