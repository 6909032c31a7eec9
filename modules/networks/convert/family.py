"""What the conversion of one family of foreign models consists of."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from trunkline.modules.networks.base import Network
from trunkline.modules.networks.convert.key_tables import KeyTable

Library = Literal["transformers", "timm", "open_clip"]


@dataclass(frozen=True)
class ForeignFamily:
    """Foreign models that differ only in sizes and options, and the network of ours that can be each of them.

    Weights go in both directions without loss: what came from a file goes back bit for bit.
    """

    name: str
    """With its article, for messages: "a T5"."""
    origin: Library
    """Whose files and names they are."""
    network: type[Network]
    """Our class."""
    recognises: Callable[[Mapping[str, Any]], bool]
    """Whether the content of a configuration file describes such a model."""
    config_from: Callable[[Mapping[str, Any], Mapping[str, Tensor]], Any]
    """Content of their configuration file -> our configuration. The weights may be asked for names and shapes, where
    the file does not say enough. It raises a `TrunklineError` for an option that ours does not have."""
    config_to: Callable[[Any], dict[str, Any]]
    """Our configuration -> content of their file. It raises a `TrunklineError` for an option that theirs has not."""
    weights_from: Callable[[Mapping[str, Tensor], Any], dict[str, Tensor]]
    """Their state dict and our configuration -> our state dict. It raises a `TrunklineError` for a weight that ours has
    not."""
    weights_to: Callable[[Mapping[str, Tensor], Any], dict[str, Tensor]]
    """Our state dict and configuration -> their state dict, in the names of their files."""
    suits: Callable[[Network], bool] | None = None
    """Whether a network of ours may become such a model, where its configuration does not say enough."""
    layers: Callable[[Any], tuple[KeyTable, ...]] | None = None
    """Our configuration -> our names of the layers and those of their modules, for adapters; first the names of today,
    then older ones. None where adapters are not supported."""
    antialias: bool = True
    """Whether theirs smooths learned positions that it interpolates for smaller images; see `ViT.resize`."""


def with_model_type(*names: str) -> Callable[[Mapping[str, Any]], bool]:
    """Recognise a config.json of transformers by its `model_type`."""
    return lambda config: config.get("model_type") in names
