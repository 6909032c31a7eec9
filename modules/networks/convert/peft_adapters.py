"""LoRA adapters in the files of the library peft: ours for models of transformers, and theirs for networks of ours.

A folder of peft holds `adapter_config.json`, and in `adapter_model.safetensors` an A and a B for each adapted layer, by
the layer's name in transformers. Where one layer there is several stacked ones here with an A and a B each, theirs gets
all of them as one of a higher rank.
"""

import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trunkline import TrunklineError
from trunkline.files import replacing
from trunkline.modules.networks.base import Network
from trunkline.modules.networks.convert.families import FOREIGN_FAMILIES
from trunkline.modules.networks.convert.family import ForeignFamily
from trunkline.modules.networks.convert.foreign_files import ForeignWeights
from trunkline.modules.networks.convert.key_tables import KeyTable, layer_number
from trunkline.modules.networks.convert.peft_folders import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    read_adapter_config,
    scale_of,
)
from trunkline.modules.networks.convert.transformers_gpt2 import GPT2
from trunkline.modules.networks.lora import Adapter, LoRALinear, freeze_base, linear_layers, refuse_adapted
from trunkline.modules.networks.weights import assign_weights, enumerated
from trunkline.names import with_article

PREFIX_OF_PEFT = "base_model.model."
TASK_TYPES = {
    "WhisperForConditionalGeneration": None,  # peft's class of the next task wants token ids as inputs
    **{"ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM"},
    **{"ForConditionalGeneration": "SEQ_2_SEQ_LM", "MarianMTModel": "SEQ_2_SEQ_LM"},
    **{"ForSequenceClassification": "SEQ_CLS", "ForTokenClassification": "TOKEN_CLS"},
    "ForQuestionAnswering": "QUESTION_ANS",
}
"""End of the name of a class of transformers -> the `task_type` of peft."""
HEADS_OF_TASKS = ("classifier", "qa_outputs")
"""What peft looks for in the file of such a task, each as a whole, even if it has not learned."""


class LowRank(NamedTuple):
    """An adapter in their file."""

    a: Tensor
    """(r, K)."""
    b: Tensor
    """(N, r)."""
    scale: float
    """What B A is multiplied by."""


# --- writing


def save_adapter(network: Network, folder: str | Path, base: str | None = None) -> ForeignFamily:
    """Write what LoRA has trained as a folder of peft, for the model of transformers that the frozen network is.

    Other layers that learn, such as output modules, go with it whole, where their model has them (`modules_to_save` of
    peft).

    Args:
        network: with adapters: after `add_lora`, or of `from_checkpoint(..., merge=False)`.
        folder: the folder to write, which is created if missing.
        base: name or folder of the model without adapters, for those who load it by that.

    Returns:
        the family of the model.

    Raises:
        TrunklineError: without adapters, if no model of transformers is such a network, or if it has no place for
            something that learns.
    """
    from safetensors.torch import save_file

    adapted = {n: module for n, module in network.named_modules() if isinstance(module, LoRALinear)}
    if not adapted:
        raise TrunklineError("the network has no adapters; give it some with add_lora, or load it with merge=False")
    family, (table, *_), content = adapted_family(network)
    found = {name: low for own, layer in adapted.items() for name, low in adapters_to_theirs(own, layer, table, family)}
    weights: dict[str, Tensor] = {}
    for name, low in found.items():
        weights |= {f"{name}.lora_A.weight": low.a, f"{name}.lora_B.weight": low.b}
    layers, layer_weights = trained_layers(network, family, table)
    rank = Counter(len(low.a) for low in found.values()).most_common(1)[0][0]
    alphas = {name: low.scale * len(low.a) for name, low in found.items()}
    alpha = next(alphas[name] for name, low in found.items() if len(low.a) == rank)
    architecture = content["architectures"][0]
    options = {
        "peft_type": "LORA",
        "task_type": next((task for end, task in TASK_TYPES.items() if architecture.endswith(end)), None),
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": plain_number(alpha),
        "lora_dropout": next(module.dropout.p for module in network.modules() if isinstance(module, Adapter)),
        "target_modules": sorted(found),
        "rank_pattern": {name: len(low.a) for name, low in found.items() if len(low.a) != rank},
        "alpha_pattern": {name: plain_number(value) for name, value in alphas.items() if value != alpha},
        "modules_to_save": sorted(layers) or None,
        "bias": "none",
        "fan_in_fan_out": family is GPT2,
    }
    weights = {PREFIX_OF_PEFT + name: value.detach().clone().contiguous() for name, value in weights.items()}
    weights |= {PREFIX_OF_PEFT + name: value.detach().clone().contiguous() for name, value in layer_weights.items()}
    folder = Path(folder)
    with replacing(folder / ADAPTER_CONFIG, folder / ADAPTER_WEIGHTS) as (config_file, weights_file):
        config_file.write_text(json.dumps(options, indent=2) + "\n", encoding="utf-8")
        save_file(weights, weights_file, {"format": "pt"})
    return family


def adapted_family(network: Network) -> tuple[ForeignFamily, tuple[KeyTable, ...], dict[str, Any]]:
    """The model of transformers that a network is, the names of its layers (see `layers`), and its configuration.

    Raises:
        TrunklineError: if there is none, or none of which the names are known.
    """
    reasons = []
    for family in FOREIGN_FAMILIES:
        if family.layers is None or not isinstance(network, family.network):
            continue
        if family.suits is not None and not family.suits(network):
            continue
        try:
            return family, family.layers(network.config), family.config_to(network.config)
        except TrunklineError as error:
            reasons.append(str(error))
    kind = with_article(type(network).__name__)
    raise TrunklineError(
        "; ".join(reasons)
        or f"peft has no place for the adapters of {kind}, because transformers has no such model; save_pretrained "
        "writes the network with its adapters merged"
    )


def adapters_to_theirs(
    own: str, layer: LoRALinear, table: KeyTable, family: ForeignFamily
) -> Iterable[tuple[str, LowRank]]:
    """Their names of a layer's adapters, and the adapters.

    Args:
        own: our name of the layer.
        layer: the layer.
        table: names of all layers.
        family: for messages.

    Raises:
        TrunklineError: if theirs has no such layer.
    """
    place, number = layer_number(own, table)
    if place not in table:
        raise TrunklineError(f"the adapter of {own} has no place in {family.name}; merge it with merge_lora")
    names = [name.replace("*", number) for name in table[place]]
    parts = {int(part): adapter for part, adapter in layer.adapters.items() if isinstance(adapter, Adapter)}
    if len(names) == len(layer.rows):
        for part, adapter in parts.items():
            yield names[part], LowRank(adapter.lora_A.weight, adapter.lora_B.weight, adapter.scale)
    elif len(names) == 1:
        yield names[0], one_adapter(layer.rows, parts)
    else:
        raise TrunklineError(f"the one adapter of {own} cannot become {len(names)} of {family.name}; merge it first")


@torch.no_grad()
def one_adapter(rows: tuple[int, ...], parts: Mapping[int, Adapter]) -> LowRank:
    """The adapters of stacked layers as one, whose rank is the sum of theirs: each B reads the rows of its own A."""
    scale = next(iter(parts.values())).scale
    a = torch.cat([adapter.lora_A.weight for adapter in parts.values()])
    b = a.new_zeros(sum(rows), len(a))
    column = 0
    for part, adapter in parts.items():
        first, rank = sum(rows[:part]), len(adapter.lora_A.weight)
        b[first : first + rows[part], column : column + rank] = adapter.lora_B.weight * (adapter.scale / scale)
        column += rank
    return LowRank(a, b, scale)


def trained_layers(network: Network, family: ForeignFamily, table: KeyTable) -> tuple[set[str], dict[str, Tensor]]:
    """Their names of the layers outside of adapters that learn, and the weights of these layers, by their full names.

    Raises:
        TrunklineError: if theirs has no such layer, or ours has adapters beside it.
    """
    adapted = {name for name, module in network.named_modules() if isinstance(module, LoRALinear)}
    own = {name: value for name, value in network.state_dict().items() if ".adapters." not in name}
    learning = [
        name.rpartition(".")
        for name, p in network.named_parameters(remove_duplicate=False)  # what is tied must go under each of its names
        if p.requires_grad and ".adapters." not in name
    ]
    for layer, dot, kind in learning:
        if layer_number(layer, table)[0] not in table or kind not in ("weight", "bias") or layer in adapted:
            raise TrunklineError(
                f"{layer}{dot}{kind} has learned, but an adapter of {family.name} has no place for it; write the "
                "merged network instead"
            )
    heads = [ours for ours, names in table.items() if names[0].partition(".")[0] in HEADS_OF_TASKS]
    layers = dict.fromkeys([layer for layer, *_ in learning] + heads)
    theirs = family.weights_to(own, network.config) if layers else {}
    weights: dict[str, Tensor] = {}
    names: set[str] = set()
    for layer in layers:
        place, number = layer_number(layer, table)
        parts = [name.replace("*", number) for name in table[place]]
        names |= {parts[0].partition(".")[0]} if layer in heads else {*parts}
        for kind in ("weight", "bias"):
            pieces = own[f"{layer}.{kind}"].chunk(len(parts)) if f"{layer}.{kind}" in own else ()
            # The names of files have the same values, in their library's order of rows and columns.
            weights |= {f"{p}.{kind}": theirs.get(f"{p}.{kind}", v) for p, v in zip(parts, pieces, strict=bool(pieces))}
    return names, weights


def plain_number(value: float) -> float:
    """16 for 16.0: peft's alphas are integers."""
    return int(value) if value == int(value) else value


# --- reading


def load_adapter(network: Network, folder: str | Path) -> Network:
    """Give a network the adapters in a folder of peft, in place, and the layers that were trained whole beside them.

    These learn here too. All else is frozen, as by `add_lora`. With `merge_lora` it becomes plain.

    Args:
        network: the network for which the adapters were trained, without adapters.
        folder: of `save_adapter`, or of `save_pretrained` of a `PeftModel`.

    Returns:
        the same network.

    Raises:
        TrunklineError: if a file is missing or damaged, if a weight has no place in the network or another shape, or
            for an option of peft that is not LoRA as in the paper.
    """
    refuse_adapted(network)
    folder = Path(folder)
    config, weights = read_adapter_config(folder), ForeignWeights(folder / ADAPTER_WEIGHTS)
    family, tables, _ = adapted_family(network)
    names = [name.removeprefix(PREFIX_OF_PEFT) for name in weights]
    found: dict[str, dict[int, LowRank]] = {}
    counts: dict[str, int] = {}
    whole: dict[str, Tensor] = {}
    layers: set[str] = set()
    for name in names:
        layer, _, kind = name.rpartition(".lora_")
        if kind == "B.weight" and f"{layer}.lora_A.weight" in names:
            continue
        if kind == "A.weight" and f"{layer}.lora_B.weight" in names:
            a, b = (weights[f"{PREFIX_OF_PEFT}{layer}.lora_{part}.weight"] for part in "AB")
            own, part, counts[own] = place_in_ours(layer, tables, family, folder)
            found.setdefault(own, {})[part] = LowRank(a, b, scale_of(config, layer, len(a)))
        elif not layer:
            layer, _, kind = name.rpartition(".")
            own, part, _ = place_in_ours(layer, tables, family, folder)
            layers.add(own)
            place, number = layer_number(own, tables[-1])  # the last names are those of files
            whole[f"{tables[-1][place][part].replace('*', number)}.{kind}"] = weights[PREFIX_OF_PEFT + name]
        else:
            raise TrunklineError(f"{folder} holds '{name}', which is no pair of A and B of LoRA")
    places = {layer.name: layer for layer in linear_layers(network)}
    unknown = [own for own in found if own not in places]
    if unknown:
        raise TrunklineError(f"{folder} adapts {enumerated(unknown)}, but only linear layers of trunks have adapters")
    made = {}
    for own, parts in found.items():
        rows = places[own].rows if counts[own] > 1 else (sum(places[own].rows),)
        dropout, named = config.get("lora_dropout", 0.0), f"{own} in {folder}"
        weight = places[own].module.weight
        adapters = {part: adapter_from(low, weight, rows[part], dropout, named) for part, low in sorted(parts.items())}
        made[own] = rows, adapters
    learning = load_layers(network, family, whole, layers, folder) if whole else set()
    freeze_base(network)
    for name, p in network.named_parameters(remove_duplicate=False):
        if name in learning:
            p.requires_grad_(True)
    for own, (rows, adapters) in made.items():
        places[own].replace(LoRALinear(places[own].module, rows, adapters))
    return network


def place_in_ours(layer: str, tables: Iterable[KeyTable], family: ForeignFamily, folder: Path) -> tuple[str, int, int]:
    """Our name of their layer, its number among those that are stacked in ours, and how many these are.

    Their model may have been a body where ours has an output layer, or the other way round; then the first parts of the
    names differ.

    Raises:
        TrunklineError: if ours has no such layer.
    """
    number = next(iter(re.findall(r"\.(\d+)\.", layer)), "")
    place = layer.replace(f".{number}.", ".*.", 1) if number else layer
    for table in tables:
        places = {theirs: (own, part) for own, names in table.items() for part, theirs in enumerate(names)}
        near = [t for t in places if f".{t}".endswith(f".{place}") or f".{place}".endswith(f".{t}")]
        if place in places or len(near) == 1:
            own, part = places[place if place in places else near[0]]
            return own.replace("*", number), part, len(table[own])
    raise TrunklineError(
        f"{folder} holds weights of '{layer}', which has no place in {family.name} as this network is one"
    )


def load_layers(
    network: Network, family: ForeignFamily, whole: Mapping[str, Tensor], layers: Collection[str], folder: Path
) -> set[str]:
    """Put the layers of peft's `modules_to_save` in the place of the network's.

    Args:
        network: the network.
        family: the model that it is.
        whole: weights of these layers, by their names in files.
        layers: our names of them.
        folder: for messages.

    Returns:
        our names of their parameters.

    Raises:
        TrunklineError: if they have another shape, or if one has changed alone that is tied to another.
    """
    weights = family.weights_from({**family.weights_to(network.state_dict(), network.config), **whole}, network.config)
    parameters = dict(network.named_parameters(remove_duplicate=False))
    learning = set()
    for name, p in parameters.items():
        if name.rpartition(".")[0] not in layers:
            continue
        tied = next((n for n, q in parameters.items() if q is p and n.rpartition(".")[0] not in layers), None)
        if tied is None:
            learning.add(name)
        elif not torch.equal(weights[name].to(p), p):
            raise TrunklineError(
                f"{folder} holds '{name}' trained apart from '{tied}', but the network has one weight for both; train "
                "it in peft with ensure_weight_tying, or merge the adapter there"
            )
    assign_weights(network, weights, folder, next(network.parameters()).dtype)
    return learning


def adapter_from(low: LowRank, weight: Tensor, rows: int, dropout: float, named: str) -> Adapter:
    """The adapter of our layer with that weight.

    Raises:
        TrunklineError: if it has another shape.
    """
    adapter = Adapter(weight, rows, len(low.a), low.scale, dropout)
    for own, value in ((adapter.lora_A, low.a), (adapter.lora_B, low.b)):
        if own.weight.shape != value.shape:
            raise TrunklineError(
                f"the adapter of {named} is {tuple(value.shape)} where the network needs {tuple(own.weight.shape)}; "
                "it was trained for a model of another size"
            )
        with torch.no_grad():
            own.weight.copy_(value)
    return adapter
