"""Constructor arguments of objectives: configurations from recipes and checkpoints, and back to plain data."""

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

from trunkline.contract import DataFacts
from trunkline.modules.networks.base import ConfigT, config_from_dict
from trunkline.modules.networks.resizing import SharedWords
from trunkline.modules.training.warm_start import TrainedWeights


@dataclasses.dataclass
class Beginning:
    """What an objective needs only until `start`."""

    facts: DataFacts = dataclasses.field(default_factory=DataFacts)
    weights: TrainedWeights | None = None
    words: Mapping[str, SharedWords] = dataclasses.field(default_factory=dict)
    """What their vocabulary and that of the data have in common; see `load_matching`."""


def as_config(config_class: type[ConfigT], value: Any) -> ConfigT:
    """A configuration from a dataclass, a plain mapping, or None for the defaults."""
    if isinstance(value, config_class):
        return copy.deepcopy(value)
    return config_from_dict(config_class, value if isinstance(value, Mapping) else {})


def as_plain(value: Any) -> Any:
    """Plain data: dataclasses become dicts and tuples become lists, as in JSON."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return {key: as_plain(v) for key, v in value.items()}
    return [as_plain(v) for v in value] if isinstance(value, list | tuple) else value
