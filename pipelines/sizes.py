"""Sizes that a recipe states once, in its data, and that the network takes from there."""

from dataclasses import replace
from typing import Any

from jsonargparse import Namespace, dict_to_namespace

from trunkline.contract import DataFacts
from trunkline.pipelines.errors import config_files, flags, plain, read_entries

NETWORK = "model.network"
FIELDS = {
    "image_size": ("image_size",),
    "channels": ("in_chans",),
    "class_names": ("num_classes", "num_outputs"),
    "vocab_size": ("vocab_size",),
    "max_length": ("max_length",),
    "target_vocab_size": ("target_vocab_size",),
    "max_target_length": ("max_target_length",),
    "num_mels": ("num_mels",),
    "max_frames": ("max_frames",),
}
"""Fact about the data -> fields of a network's configuration that follow from it."""


def facts_left_out(facts: DataFacts) -> DataFacts:
    """Remove the facts that the recipe also states for its network, for example a longer row.

    Whether the stated sizes fit the data is checked before the first step.
    """
    keys = [plain(flag) for flag, _ in flags()]
    keys += [entry.key for config in config_files() for entry in read_entries(config)]
    stated = {key.rpartition(".")[2] for key in keys if key.startswith(f"{NETWORK}.")}
    dropped: dict[str, Any] = {fact: None for fact, fields in FIELDS.items() if stated & set(fields)}
    return replace(facts, **dropped)


def write_sizes(config: Namespace, hyperparameters: Any) -> None:
    """Write the network's final sizes into the resolved config, so that it makes the same network again.

    Args:
        config: config of the run, changed in place.
        hyperparameters: hyperparameters of its objective.
    """
    network = hyperparameters.get("network")
    if network is not None and config.get("model.init_args.network") is not None:
        config["model.init_args.network"] = dict_to_namespace(network)
