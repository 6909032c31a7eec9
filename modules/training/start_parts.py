"""Start a network from weights of another kind: a part of it, a part of them, or the trunk alone."""

import re
from collections.abc import Mapping
from operator import attrgetter
from types import MappingProxyType, SimpleNamespace
from typing import Any, NamedTuple

from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from trunkline import TrunklineError
from trunkline.modules.backbone import Transformer
from trunkline.modules.networks import AST, BERT, CLIP, GPT, EncoderDecoder, SpeechEncoder, TextHead, ViT, Whisper
from trunkline.modules.networks.base import Network
from trunkline.modules.networks.bert import BERTConfig
from trunkline.modules.networks.gpt import GPTConfig
from trunkline.modules.networks.resizing import SharedWords
from trunkline.modules.networks.text_head import TextHeadConfig, without_heads
from trunkline.modules.training.warm_start import (
    FREE,
    RESIZED,
    SHOWN,
    Taken,
    TrainedWeights,
    check_same_sizes,
    load_matching,
)
from trunkline.names import with_article


class Fit(NamedTuple):
    """A part of a network, and the part of other weights that it can take over; "" is all of it."""

    here: str
    there: str

    @property
    def is_trunk(self) -> bool:
        """Whether only a trunk is taken over, without embeddings."""
        return self.here in ("backbone", "encoder", "decoder")


WHOLE = Fit("", "")
FITS: dict[tuple[type[Network], type[Network]], Fit] = {
    (BERT, CLIP): Fit("", "text.body"),
    (BERT, TextHead): Fit("", "body"),
    (EncoderDecoder, BERT): Fit("encoder", "backbone"),
    (EncoderDecoder, GPT): Fit("decoder", "backbone"),
    (GPT, CLIP): Fit("", "text.body"),
    (GPT, TextHead): Fit("", "body"),
    (SpeechEncoder, AST): Fit("backbone", "backbone"),
    (SpeechEncoder, Whisper): Fit("backbone", "encoder"),
    (TextHead, BERT): Fit("body", ""),
    (TextHead, CLIP): Fit("body", "text.body"),
    (TextHead, GPT): Fit("body", ""),
    (ViT, CLIP): Fit("", "image"),
    (Whisper, GPT): Fit("decoder", "backbone"),
    (Whisper, SpeechEncoder): Fit("encoder", "backbone"),
}
"""(network, weights of) -> what fits. A trunk alone, as in arXiv:1907.12461, leaves the rest of the network as made."""
CROSS = {"causal", "cross_attention"}
"""Fields in which a trunk may differ from the one whose weights it takes: a decoder also attends to an encoder."""


def donors(network_class: type[Network]) -> tuple[type[Network], ...]:
    """The networks whose weights one of this class can start from, itself first."""
    return (network_class, *(there for here, there in FITS if here is network_class))


def part_for(network_class: type[Network], weights: TrainedWeights) -> Fit:
    """What of a network takes over what of these weights."""
    return FITS.get((network_class, weights.network_class), WHOLE)


def within(whole: Any, path: str) -> Any:
    """A part of a network, or of its configuration, by its path."""
    return attrgetter(path)(whole) if path else whole


def sizes_from(network_class: type[Network], weights: TrainedWeights) -> Any:
    """The trained sizes, in fields as the network's configuration has them.

    Raises:
        TrunklineError: if the weights hold the part that is wanted, but of another kind.
    """
    here, there = part_for(network_class, weights)
    sizes = within(weights.config, there)
    if here:
        field = {BERTConfig: "bert", GPTConfig: "gpt"}.get(type(sizes), here)
        return SimpleNamespace(**{field: sizes})
    if there and not isinstance(sizes, network_class.config_class):
        raise TrunklineError(
            f"{weights.argument} {weights.name} holds {with_article(weights.network_class.__name__)} with another "
            f"{there} than {with_article(network_class.__name__)}; give weights that have one",
            field=f"model.{weights.argument}",
        )
    return sizes


def start_from(
    network: Network,
    weights: TrainedWeights,
    words: Mapping[str, SharedWords] = MappingProxyType({}),
    place: str = "model.network",
) -> None:
    """Copy trained weights into a network, or into the part of it that `FITS` names, and say what was taken over.

    Args:
        network: the network.
        weights: of one of its `donors`.
        words: as for `load_matching`.
        place: where the network's configuration stands in a recipe, for messages.

    Raises:
        TrunklineError: for a part of another kind, and as `load_matching` does.
    """
    part, named = part_for(type(network), weights), f"{weights.argument} {weights.name}"
    if isinstance(network, TextHead):
        own_body = check_body(network.config, weights, place)
        place = own_body if part.here else place
    source, own = weights.network(), within(network, part.here)
    given = within(source, part.there)
    if isinstance(own, Transformer):
        taken = copy_trunk(own, given, named, f"{place}.{part.here}")
    else:
        if part != WHOLE:
            given = without_output(given)
        taken = load_matching(own, given, weights.name, weights.argument, place, words)
    announce(network, weights, taken, part)


def check_body(config: TextHeadConfig, weights: TrainedWeights, place: str) -> str:
    """Compare the body of a task's network with that of the weights.

    Returns:
        where the body's configuration stands in a recipe.

    Raises:
        TrunklineError: if the body is of another kind or has other sizes.
    """
    there = part_for(TextHead, weights).there or ("body" if weights.network_class is TextHead else "")
    body, own = within(weights.config, there), "bert" if config.bert is not None else "gpt"
    if type(body) is not type(config.body):
        other = "gpt" if own == "bert" else "bert"
        raise TrunklineError(
            f"{weights.argument} {weights.name} holds a {other.upper()}; set network.{other} instead of network.{own}",
            field=f"model.{weights.argument}",
        )
    named = f"{weights.argument} {weights.name}"
    check_same_sizes(body, config.body, named, f"{place}.{own}", FREE | RESIZED)
    return f"{place}.{own}"


def without_output(network: Network) -> Network:
    """Remove the output layer of a part, in place: it was trained for something else."""
    if isinstance(network, BERT | GPT):
        return without_heads(network)
    if isinstance(network, ViT):
        network.head = nn.Identity()
    return network


def copy_trunk(trunk: Transformer, source: Transformer, name: str, place: str) -> Taken:
    """Copy the weights of one trunk into another, which may have cross-attention besides.

    Raises:
        TrunklineError: with all options that differ, or the first weight that does not fit.
    """
    check_same_sizes(source.config, trunk.config, name, place, FREE | CROSS | SHOWN)
    own, weights = trunk.state_dict(keep_vars=True), source.state_dict()
    for key, value in weights.items():
        here = tuple(own[key].shape) if key in own else "missing"
        if here != tuple(value.shape):
            raise TrunklineError(
                f"{name} does not fit: {key} is {tuple(value.shape)} there and {here} here; give "
                f"{place.removeprefix('model.')} the sizes that it has there",
                field=place,
            )
    trunk.load_state_dict({**own, **weights})
    return Taken([own[key] for key in weights], [])


def announce(network: Network, weights: TrainedWeights, taken: Taken, part: Fit = WHOLE) -> None:
    """Say in one line, in the first process, what a network took over, what was resized, and what it has not."""
    kind, count = weights.network_class.__name__, sum(value.numel() for value in taken.weights)
    origin = f"{part.there} of {kind}" if part.there else kind
    text = f"{weights.argument} {weights.name}: {len(taken.weights)} weights ({count:,} parameters) of {origin}"
    text += f" for the {part.here}" if part.here else ""
    new = untrained(network, {id(value) for value in taken.weights})
    for what, items in (("resized", taken.resized), ("new", new)):
        text += f"; {what}: {', '.join(items)}" if items else ""
    rank_zero_info(text)


def untrained(module: nn.Module, taken: set[int], name: str = "") -> list[str]:
    """The modules and parameters, the largest ones, none of whose weights were taken over; `*` for all blocks."""
    own, start = {id(p) for p in module.parameters()}, f"{name}." if name else ""
    if name and own and own.isdisjoint(taken):
        return [name]
    found = [start + leaf for leaf, p in module.named_parameters(recurse=False) if id(p) not in taken]
    for leaf, child in module.named_children():
        found += untrained(child, taken, start + leaf)
    return [*dict.fromkeys(re.sub(r"\.\d+(?=\.)", ".*", each) for each in found)]
