"""Checks before training: sizes of network and data, tokenizers, options of a loss."""

import dataclasses
import inspect
from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any, Literal

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from trunkline import TrunklineError
from trunkline.contract import DataFacts, HasFacts
from trunkline.modules.backbone import TransformerConfig
from trunkline.modules.networks.base import ConfigT
from trunkline.modules.networks.companions import Companions
from trunkline.modules.networks.resizing import SharedWords
from trunkline.modules.training.warm_start import FREE


def facts_of(trainer: L.Trainer) -> DataFacts:
    """What the trainer's datamodule knows; no facts if the trainer was given bare data loaders."""
    data: Any = getattr(trainer, "datamodule", None)
    if inspect.getattr_static(data, "facts", None) is None:  # `hasattr` would compute them, and hide their errors
        return DataFacts()
    known: HasFacts = data
    return known.facts


def sizes_of(facts: DataFacts) -> dict[str, Any]:
    """The data's sizes, by the name of the network's configuration field."""
    known = {name: getattr(facts, fact) for name, fact in FACTS.items()}
    sizes = {name: len(fact) or None if isinstance(fact, list) else fact for name, fact in known.items()}
    return {name: size for name, size in sizes.items() if size is not None}


FACTS = {
    "image_size": "image_size",
    "in_chans": "channels",
    "num_classes": "class_names",
    "num_outputs": "class_names",
    "vocab_size": "vocab_size",
    "max_length": "max_length",
    "target_vocab_size": "target_vocab_size",
    "max_target_length": "max_target_length",
    "num_mels": "num_mels",
    "max_frames": "max_frames",
}
"""Field of a network's configuration -> the fact that it follows from."""
ROOMY = {
    "vocab_size": "take their tokenizer",
    "max_length": "set the data's max_length to at most {}",
    "target_vocab_size": "take their tokenizer of the targets",
    "max_target_length": "set the data's max_target_length to at most {}",
    "max_frames": "lower the data's max_seconds, so that a clip has at most {} frames",
}
"""Sizes that may be larger in the network than in the data -> what to do if trained weights have too small a size."""
PLACE_IN_DATA = {
    "vocab_size": "data.tokenizer",
    "max_length": "data.max_length",
    "target_vocab_size": "data.target_tokenizer",
    "max_target_length": "data.max_target_length",
    "max_frames": "data.log_mel.max_seconds",
}


VOCABULARIES = {"vocab_size": "tokenizer", "target_vocab_size": "target_tokenizer"}
"""Size of a vocabulary -> whose it is."""


def with_sizes_of_data(
    config: ConfigT,
    facts: DataFacts,
    source: Any = None,
    place: str = "model.network",
    words: Mapping[str, SharedWords] = MappingProxyType({}),
) -> ConfigT:
    """Fill the sizes that a recipe leaves out of the network's configuration with the data's sizes.

    A size that still has its default counts as left out, unless `facts.stated` has it. The vocabulary and the row
    length may be larger in the network than in the data; if they are left out and there is a `source`, they are taken
    from it, so that its weights fit.

    Args:
        config: a dataclass; nested dataclasses are filled too, except trunks, which do not depend on the data.
        facts: what the data knows.
        source: the configuration, of the same class, of a network whose weights will be copied.
        place: where the configuration stands in a recipe, for messages.
        words: what known vocabularies of `source` and of the data have in common. If they differ, or if tokens were
            added for which `source` has no rows, the network gets the data's size.

    Raises:
        TrunklineError: if a stated size differs from the data's, or if `source` is too small for the data.
    """
    sizes, changed = sizes_of(facts), {}
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        own, at = getattr(config, field.name), f"{place}.{field.name}"
        trained = getattr(source, field.name, None)
        if dataclasses.is_dataclass(own) and not isinstance(own, TransformerConfig):
            changed[field.name] = with_sizes_of_data(own, facts, trained, at, words)
            continue
        size, shared = sizes.get(field.name), words.get(VOCABULARIES.get(field.name, ""))
        if shared is not None and trained is not None and (not shared.same_ids or trained < (size or 0)):
            trained = None
        roomy = field.name in ROOMY
        left_out = own == field.default and at not in facts.stated
        if left_out and roomy and trained is not None:
            own = changed[field.name] = trained
            check_trained(field.name, own, size)
        elif left_out and size is not None:
            own = changed[field.name] = size
        check_size(field.name, own, size, at)
    return dataclasses.replace(config, **changed)  # type: ignore[type-var]


def with_trained_shape(
    config: ConfigT, trained: Any, stated: Collection[str], place: str = "model.network", usual: Any = None
) -> ConfigT:
    """Fill what a recipe leaves out of the network's configuration with the values of the weights to start from.

    The sizes that the data knows are left to `with_sizes_of_data`, and rates such as that of dropout to the recipe.

    Args:
        config: a dataclass; nested ones are filled too. A field that has its default counts as left out.
        trained: configuration of the trained network; fields that it lacks stay as they are.
        stated: places of fields that the recipe states, although they may have their default.
        place: where the configuration stands in a recipe.
        usual: the network's default for this part: its trunk is not always `TransformerConfig()`.
    """
    changed: dict[str, Any] = {}
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        name, at = field.name, f"{place}.{field.name}"
        own, found = getattr(config, name), getattr(trained, name, None)
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if dataclasses.is_dataclass(own) and dataclasses.is_dataclass(found):
            changed[name] = with_trained_shape(own, found, stated, at, default)
        elif dataclasses.is_dataclass(own) or dataclasses.is_dataclass(found) or name in FREE | FACTS.keys():
            continue
        elif hasattr(trained, name) and at not in stated and own in (default, getattr(usual, name, default)):
            changed[name] = found
    try:
        return dataclasses.replace(config, **changed)  # type: ignore[type-var]
    except TrunklineError:  # stated and trained values contradict each other, which is reported field by field later
        return config


def check_trained(name: str, trained: int, size: int | None) -> None:
    """Compare a size of trained weights with the data's.

    Raises:
        TrunklineError: if the data needs a larger size.
    """
    if size is not None and trained < size:
        raise TrunklineError(
            f"the weights to start from have {name}={trained}, but the data needs at least {size}; "
            + ROOMY[name].format(trained)
            + ("" if name in VOCABULARIES else f", or state {name} in the network, whose positions are then resized"),
            field=PLACE_IN_DATA[name],
        )


def check_size(name: str, own: Any, size: Any, place: str) -> None:
    """Compare a size of a network with the data's.

    Raises:
        TrunklineError: if the network's size does not fit the data.
    """
    if size is None or own == size or (name in ROOMY and own is not None and own >= size):
        return
    if name == "image_size" and _sides(own) == _sides(size):
        return
    needed = "at least " if name in ROOMY else ""
    raise TrunklineError(
        f"the network has {name}={own}, but the data needs {needed}{size}; leave {name} out of the network, which then "
        f"takes the data's, or set it to {size}",
        field=place,
    )


def _sides(image_size: int | tuple[int, int]) -> tuple[int, int]:
    """(height, width) in pixels."""
    return (image_size, image_size) if isinstance(image_size, int) else image_size


def check_sizes(config: Any, facts: DataFacts, place: str = "model.network") -> None:
    """Compare all sizes of a network's configuration with the data's, by `check_size`."""
    sizes = sizes_of(facts)
    for field in dataclasses.fields(config):
        own, at = getattr(config, field.name), f"{place}.{field.name}"
        if dataclasses.is_dataclass(own) and not isinstance(own, TransformerConfig):
            check_sizes(own, facts, at)
        else:
            check_size(field.name, own, sizes.get(field.name), at)


def shared_words(
    companions: Companions,
    argument: str,
    source: str,
    facts: DataFacts,
    vocabulary: Literal["same", "matched"] = "same",
) -> dict[str, SharedWords]:
    """Compare the data's tokenizers with those of the weights that a run starts from.

    Args:
        companions: what goes with the weights.
        argument: the argument that names the weights, for messages.
        source: their name.
        facts: what the data knows.
        vocabulary: `matched` if the tokenizers may differ.

    Returns:
        what they have in common, for each of `tokenizer` and `target_tokenizer` that is known on both sides.

    Raises:
        TrunklineError: if a tokenizer differs although it must not: the same ids would mean other words.
    """
    if facts.tokenizer is None:
        return {}
    own, found = {"tokenizer": facts.tokenizer}, {}
    if facts.max_target_length is not None:  # sources and targets
        own["target_tokenizer"] = facts.target_tokenizer or facts.tokenizer
    for name, tokenizer in own.items():
        trained = getattr(companions, name)
        if trained is None:
            continue
        words = SharedWords.of(trained.get_vocab(), tokenizer.get_vocab())
        if not words.same_ids and vocabulary == "same":
            raise TrunklineError(
                f"{argument} {source} was trained with another {name} than the data's, so that its ids mean other "
                f"words; set {name} to {source}, or the model's init_vocabulary to matched, which takes over the "
                f"{len(words.here)} of the data's {words.new} tokens that both have",
                field=f"data.{name}",
            )
        if 2 * len(words.here) < words.new:
            rank_zero_warn(
                f"{argument} {source}: its {name} knows only {len(words.here)} of the data's {words.new} tokens, and "
                f"the others begin as the mean of all; if that is not meant, set data.{name} to {source}"
            )
        found[name] = words
    return found


def check_loss_options(label_smoothing: float, z_loss: float = 0.0) -> None:
    """Check the ranges of a loss's options.

    Raises:
        TrunklineError: if one is out of range.
    """
    if not 0 <= label_smoothing < 1:
        raise TrunklineError(
            f"label_smoothing must be from 0 up to below 1, not {label_smoothing}", field="model.label_smoothing"
        )
    if z_loss < 0:
        raise TrunklineError(f"z_loss must be 0 or more, not {z_loss}", field="model.z_loss")


def check_architecture(saved: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Compare the weights in a checkpoint with those of an objective by their names and shapes.

    Raises:
        TrunklineError: naming the first difference, instead of a list of all.
    """
    shapes = [{key: tuple(value.shape) for key, value in weights.items()} for weights in (saved, own)]
    different = [key for key in {**own, **saved} if shapes[0].get(key) != shapes[1].get(key)]
    if different:
        key = different[0]
        there, here = (found.get(key, "missing") for found in shapes)
        raise TrunklineError(
            f"the checkpoint is of another architecture: {len(different)} weight(s) differ, first {key}: "
            f"{there} in the checkpoint, {here} here; use the config.yaml of the run that wrote it"
        )
