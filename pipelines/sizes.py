"""Sizes that a recipe states once, in its data, and that the network takes from there."""

from dataclasses import replace
from typing import Any

from jsonargparse import Namespace, dict_to_namespace

from trunkline.contract import DataFacts
from trunkline.pipelines.errors import config_files, flags, plain, read_entries, value_entries

NETWORK = "model.network."


def with_stated(facts: DataFacts) -> DataFacts:
    """The facts, and which fields of the network the recipe or a flag states, for example a longer row."""
    keys = []
    for flag, value in flags():
        keys += [plain(flag), *(entry.key for entry in value_entries(plain(flag), value))]
    keys += [entry.key for config in config_files() for entry in read_entries(config)]
    return replace(facts, stated=frozenset(key for key in keys if key.startswith(NETWORK)))


def write_sizes(config: Namespace, hyperparameters: Any) -> None:
    """Write the network's final sizes into the resolved config, so that it makes the same network again.

    Args:
        config: config of the run, changed in place.
        hyperparameters: hyperparameters of its objective.
    """
    network = hyperparameters.get("network")
    if network is not None and config.get("model.init_args.network") is not None:
        config["model.init_args.network"] = dict_to_namespace(network)
