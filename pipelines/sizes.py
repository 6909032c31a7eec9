"""Sizes that a recipe states once, in its data: which of them it leaves to the network, and what came out of that."""

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
}
"""Fact -> fields of a network's configuration that follow from it."""


def facts_left_out(facts: DataFacts) -> DataFacts:
    """The facts without those that the recipe states for its network too, for example a longer row.

    Whether what is stated fits the data is looked at before the first step.
    """
    keys = [plain(flag) for flag, _ in flags()]
    keys += [entry.key for config in config_files() for entry in read_entries(config)]
    stated = {key.rpartition(".")[2] for key in keys if key.startswith(f"{NETWORK}.")}
    dropped: dict[str, Any] = {fact: None for fact, fields in FIELDS.items() if stated & set(fields)}
    return replace(facts, **dropped)


def write_sizes(config: Namespace, hyperparameters: Any) -> None:
    """Put the sizes that a network came out with into its resolved config, which then makes the same network again.

    Args:
        config: of the run, changed in place.
        hyperparameters: of its objective.
    """
    network = hyperparameters.get("network")
    if network is not None and config.get("model.init_args.network") is not None:
        config["model.init_args.network"] = dict_to_namespace(network)
