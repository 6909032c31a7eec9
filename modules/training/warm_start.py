"""Start a network from trained weights, and freeze parts of it."""

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from trunkline import TrunklineError
from trunkline.files import load_checkpoint
from trunkline.modules import networks
from trunkline.modules.backbone import Transformer, TransformerConfig
from trunkline.modules.networks.base import (
    CONFIG_FILE,
    Network,
    config_from_dict,
    nameless,
    network_of,
    stored_config,
)
from trunkline.modules.networks.companions import Companions
from trunkline.modules.networks.convert.foreign_files import CONFIG_FILES
from trunkline.modules.networks.pretrained import WEIGHTS_SUFFIXES, Pretrained, find_pretrained
from trunkline.modules.networks.resizing import SharedWords
from trunkline.names import with_article
from trunkline.run_folders import find_checkpoint, is_checkpoint

N = TypeVar("N", bound=Network)
FREE = {"dropout", "drop_path", "activation_checkpointing", "next_sentence", "tie_embeddings"}
"""Configuration fields that may differ between a network and the one whose weights it starts from."""
SHOWN = {"dim", "depth", "mlp_dim", "num_kv_heads"}
"""Fields of a trunk's configuration that show in the shapes of its weights, which are compared anyway."""
RESIZED = {"vocab_size", "target_vocab_size", "max_length", "max_target_length"}
"""Sizes of texts, which may differ where rows can be resized or matched."""
ADAPTED = {"image_size", "max_frames", "num_mels", "num_classes", "num_outputs", "pool", "hidden"}
ADAPTED |= {"max_length", "max_target_length"}
"""Fields in which a network may differ although they show in its weights: see `Network.adapt` and `output_modules`."""
NETWORK_OF = {
    "CausalLM": "GPT",
    "ContrastiveImageText": "CLIP",
    "ImageClassifier": "ViT",
    "MaskedLM": "BERT",
    "QuestionAnswering": "TextHead",
    "TextClassifier": "TextHead",
    "TokenClassifier": "TextHead",
}
"""Objective -> network, for old checkpoints, which do not name their network."""


def class_path(kind: type) -> str:
    """`module.Class`: how a checkpoint names a class."""
    return f"{kind.__module__}.{kind.__qualname__}"


def network_class_of(content: Mapping[str, Any], known: tuple[type[Network], ...] = ()) -> type[Network] | None:
    """The class of the network in a training checkpoint; None if it is neither Trunkline's own nor one of `known`.

    Nothing is imported: a checkpoint from elsewhere must not decide which code runs.
    """
    classes = content.get("classes")
    path = classes.get("network", "") if isinstance(classes, dict) else ""
    for kind in known:
        if class_path(kind) == path:
            return kind
    if path and not path.startswith("trunkline."):
        return None
    name = path.rpartition(".")[2] or NETWORK_OF.get(content.get("objective", ""), "")
    return getattr(networks, name, None)


def names_weights(argument: str) -> bool:
    """Whether an argument of an objective names trained weights: `init_from`, or one like it for a part."""
    return argument.startswith("init_") and argument.endswith("from")


def starts_from_weights(arguments: Mapping[str, Any]) -> bool:
    """Whether the arguments of an objective name trained weights."""
    return any(value for name, value in arguments.items() if names_weights(name))


def network_from_checkpoint(network_class: type[N], path: str | Path) -> N:
    """The network inside a training checkpoint; raises the errors of `network_of` and `load_checkpoint`."""
    return network_of(network_class, load_checkpoint(path), path)


@dataclasses.dataclass
class TrainedWeights:
    """Weights to start from: a training checkpoint, a run, or whatever `find_pretrained` reads."""

    name: str
    """Name of the file, folder or repository."""
    argument: str
    """The argument that gave the name, for messages."""
    network_class: type[Network]
    config: Any
    """Configuration of the trained network."""
    content: dict[str, Any] | None
    """Content of a training checkpoint; None for a folder or a hub name."""
    pretrained: Pretrained | None = None
    """The folder or hub repository; None for a training checkpoint."""

    @classmethod
    def read(cls, name: str, argument: str, accepted: tuple[type[Network], ...]) -> "TrainedWeights":
        """Read class and configuration of the network; `network` makes the network itself.

        Raises:
            TrunklineError: if nothing can be read, or if the network is not of an accepted class.
        """
        content, pretrained, file = None, None, find_checkpoint(name, f"model.{argument}", other=CONFIG_FILE)
        if is_checkpoint(file) or (file.is_file() and not has_configuration(file)):
            content = load_checkpoint(file, field=f"model.{argument}")
            kind = network_class_of(content, accepted)
            config = stored_config(content)
        else:
            try:
                pretrained = find_pretrained(name, accepted)
            except TrunklineError as error:
                raise TrunklineError(f"{argument}={name}: {error}", f"model.{argument}") from error
            kind, config = pretrained.network_class, None
        if kind in accepted and config is None and pretrained is None:
            raise nameless(file, f"model.{argument}")
        if kind not in accepted:
            objective = (content or {}).get("objective", "something else")
            found = with_article(kind.__name__) if kind else f"weights of {objective}"
            raise TrunklineError(
                f"{argument} {name} holds {found}; give a checkpoint or a folder of "
                f"{' or '.join(k.__name__ for k in accepted)}",
                field=f"model.{argument}",
            )
        try:
            config = config_from_dict(kind.config_class, config) if pretrained is None else pretrained.config
        except TrunklineError as error:
            raise TrunklineError(f"{argument}={name}: {error}", f"model.{argument}") from error
        return cls(name, argument, kind, config, content, pretrained)

    @property
    def companions(self) -> Companions:
        """What goes with the network, such as its tokenizer."""
        if self.pretrained is not None:
            return self.pretrained.companions
        return Companions.of_checkpoint(self.content or {}, self.name)

    def network(self) -> Any:
        """The network, in training mode."""
        if self.pretrained is not None:
            return self.pretrained.network()
        assert self.content is not None
        return network_of(self.network_class, self.content, self.name)


def has_configuration(file: Path) -> bool:
    """Whether a file is one of weights that has, or needs, its configuration file beside it: it is no checkpoint."""
    beside = any((file.parent / name).is_file() for name in CONFIG_FILES)
    return file.suffix == ".safetensors" or (file.suffix in WEIGHTS_SUFFIXES and beside)


def freeze(network: Network, blocks: int) -> list[torch.nn.Module]:
    """Freeze all but the output modules and the blocks from number `blocks` on.

    Args:
        network: the network; before an optimiser gets its parameters.
        blocks: first blocks to freeze, with the embeddings; with the trunk's depth or more, also its final norm.

    Returns:
        The frozen modules. They are to stay in evaluation mode, because their dropout would only be noise: in a loop of
        your own, call `eval()` on each after `network.train()`.
    """
    learning = [*network.output_modules()]
    for trunk in (m for m in network.modules() if isinstance(m, Transformer)):
        if blocks < len(trunk.blocks):
            learning += [*trunk.blocks[blocks:], trunk.norm]
    kept = {p for module in learning for p in module.parameters()}
    for p in network.parameters():
        p.requires_grad_(p in kept)
    inside = {m for module in learning for m in module.modules()}  # with their dropout, which has no parameters
    return [m for m in network.modules() if m not in inside and kept.isdisjoint(m.parameters())]


class Difference(NamedTuple):
    """A field in which two configurations differ."""

    place: str
    """As errors name it: `model.network.backbone.dim`."""
    there: Any
    here: Any

    @property
    def mend(self) -> str:
        """What to set: `network.backbone.dim to 16`."""
        return f"{self.place.removeprefix('model.')} to {'null' if self.there is None else self.there}"


def differences(there: Any, here: Any, place: str, free: Collection[str]) -> list[Difference]:
    """The fields, also of nested configurations, in which `there` and `here` differ, except those in `free`."""
    found = []
    for field in dataclasses.fields(here):
        if field.name in free or not hasattr(there, field.name):
            continue
        other, own, at = getattr(there, field.name), getattr(here, field.name), f"{place}.{field.name}"
        if dataclasses.is_dataclass(own) and dataclasses.is_dataclass(other):
            found += differences(other, own, at, free)
        elif other != own:
            found.append(Difference(at, other, own))
    return found


def check_same_sizes(there: Any, here: Any, name: str, place: str, free: set[str] = FREE) -> None:
    """Compare two configurations, because the shapes of weights do not show all fields (not the number of heads).

    Raises:
        TrunklineError: with all differences together.
    """
    found = differences(there, here, place, free)
    if found:
        trained = listed([f"{d.place.rpartition('.')[2]}={d.there}" for d in found])
        raise TrunklineError(
            f"{name} was trained with {trained}, but the network has {listed([str(d.here) for d in found])}; set "
            f"{listed([d.mend for d in found])}",
            field=found[0].place,
        )


def listed(parts: list[str]) -> str:
    """`a, b and c`."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def trunks_of(config: Any, place: str) -> dict[str, TransformerConfig]:
    """All trunk configurations inside a network's configuration, by their place in a recipe."""
    found = {}
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), f"{place}.{field.name}"
        if isinstance(value, TransformerConfig):
            found[name] = value
        elif dataclasses.is_dataclass(value):
            found |= trunks_of(value, name)
    return found


class Taken(NamedTuple):
    """What a network took over."""

    weights: list[Tensor]
    """Its parameters and buffers that have trained values now; each once."""
    resized: list[str]
    """What had another size, such as `positions 512 to 1024`."""


def load_matching(
    network: Network,
    source: Network,
    name: str,
    argument: str = "init_from",
    place: str = "model.network",
    words: Mapping[str, SharedWords] = MappingProxyType({}),
) -> Taken:
    """Copy weights from `source`; output modules may have another shape, everything else must fit or can be resized.

    Args:
        network: the network that is changed.
        source: a network of the same class; it is changed too.
        name: name of the source, for messages.
        argument: the argument that gave the name, for messages.
        place: where the network's configuration stands in a recipe, for messages.
        words: tokens in common, for each of `tokenizer` and `target_tokenizer` that are known on both sides.

    Raises:
        TrunklineError: with the first weight or option that does not fit.
    """
    free = FREE | ADAPTED | (RESIZED if words else set())
    unlike = differences(source.config, network.config, place, free)
    untied = differences(source.config, network.config, place, free - {"tie_embeddings"})
    resized = network.adapt(source)
    weights, own = source.state_dict(), network.state_dict(keep_vars=True)
    resized += match_words(network, weights, own, f"{argument} {name}", words)
    fresh, taken = own_outputs(network), []

    def refuse(key: str, what: str, differing: list[Difference] = unlike) -> TrunklineError:
        mend = f": set {listed([d.mend for d in differing])}" if differing else ""
        whose = network.word_weights().get(key)
        if whose and whose not in words and key in weights and len(weights[key]) != len(own[key]):
            mend += "; tokens can be matched only if the tokenizers of both are known"
        return TrunklineError(
            f"{argument} {name} does not fit: {what}; give {place.removeprefix('model.')} the sizes that it has "
            f"there{mend}",
            field=f"model.{argument}",
        )

    for keys in tied(own):
        given, value = [key for key in keys if key in weights], own[keys[0]]
        for other in given[1:]:
            if not torch.equal(weights[other], weights[given[0]]):
                raise refuse(other, f"{given[0]} and {other} differ there and are one here", untied)
        if given and weights[given[0]].shape == value.shape:
            taken.append(value)
        elif value in fresh:
            weights |= dict.fromkeys(keys, value.detach())
        else:
            shape = tuple(weights[given[0]].shape) if given else "missing"
            raise refuse(keys[0], f"{keys[0]} is {shape} there and {tuple(value.shape)} here")
        weights |= {key: weights[given[0]] for key in keys if given and key not in weights}
    there = trunks_of(source.config, place)
    for trunk_place, trunk in trunks_of(network.config, place).items():
        check_same_sizes(there[trunk_place], trunk, f"{argument} {name}", trunk_place, FREE | SHOWN)
    network.load_state_dict({key: weights[key] for key in own})
    return Taken(taken, resized)


def tied(weights: Mapping[str, Tensor]) -> list[list[str]]:
    """The names of each weight in a state dict that keeps its parameters; a tied one has several."""
    names: dict[int, list[str]] = {}
    for name, value in weights.items():
        names.setdefault(id(value), []).append(name)
    return [*names.values()]


def own_outputs(network: Network) -> set[Tensor]:
    """The parameters of the output modules that no other part has: not an embedding to which an output is tied."""
    outputs = {m for module in network.output_modules() for m in module.modules()}
    others = {p for m in network.modules() if m not in outputs for p in m.parameters(recurse=False)}
    return {p for m in outputs for p in m.parameters() if p not in others}


def match_words(
    network: Network,
    weights: dict[str, Tensor],
    own: Mapping[str, Tensor],
    source: str,
    words: Mapping[str, SharedWords],
) -> list[str]:
    """Give the weights that have a row for each token the rows of the network's own tokens, in place.

    Args:
        network: the network that will take the weights.
        weights: the trained weights.
        own: those of the network.
        source: where they come from, for messages.
        words: as for `load_matching`.

    Returns:
        what was changed, for a message.

    Raises:
        TrunklineError: if the trained vocabulary has more tokens than the weights have rows.
    """
    changed: dict[str, str] = {}
    for key, whose in network.word_weights().items():
        if key not in weights or whose not in words:
            continue
        shared, extra = words[whose], network.extra_words
        before, after = (len(each[key]) - extra for each in (weights, own))
        if shared.old > before:
            raise TrunklineError(
                f"the {whose} of {source} has {shared.old} tokens, but its {key} only {before} rows; put the "
                f"{whose}.json beside it that belongs to the weights",
                field=f"model.{source.partition(' ')[0]}",
            )
        weights[key] = shared.rows(weights[key], after + extra, extra)
        if before != after or not shared.same_ids:
            known = "" if shared.same_ids else f" ({len(shared.here)} of {shared.new} tokens known)"
            name = "vocabulary" if whose == "tokenizer" else "vocabulary of targets"
            changed[whose] = f"{name} {before} to {after}{known}"
    return [*changed.values()]
