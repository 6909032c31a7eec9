"""Read a pretrained network: a folder of `save_pretrained`, files of transformers, timm or open_clip, or a hub name."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from trunkline import TrunklineError
from trunkline.modules import networks
from trunkline.modules.networks.base import CONFIG_FILE, Network, config_from_dict, refuse_nan
from trunkline.modules.networks.bert import BERT
from trunkline.modules.networks.companions import COMPANION_FILES, Companions
from trunkline.modules.networks.convert.companion_files import (
    PREPROCESSOR_FILE,
    PROCESSOR_FILE,
    TOKENIZER_CONFIG_FILE,
    companions_from_theirs,
    with_padding_of_tokenizer,
)
from trunkline.modules.networks.convert.families import described_by, foreign_family
from trunkline.modules.networks.convert.family import ForeignFamily
from trunkline.modules.networks.convert.foreign_files import (
    CONFIG_FILES,
    PART_FILES,
    WEIGHTS_FILES,
    ForeignWeights,
    open_weights,
    read_config,
)
from trunkline.modules.networks.convert.peft_adapters import load_adapter
from trunkline.modules.networks.convert.peft_folders import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    base_of_adapter,
    is_adapter_folder,
)
from trunkline.modules.networks.convert.sentence_transformers import (
    MODULES_FILE,
    POOLING_FILES,
    sentence_family,
    sentence_options,
)
from trunkline.modules.networks.gpt import GPT
from trunkline.modules.networks.lora import merge_lora
from trunkline.modules.networks.text_head import TextHead
from trunkline.modules.networks.weights import assign_weights, unfilled
from trunkline.names import hub_access, looks_like_path, with_article


@dataclass
class Pretrained:
    """A network in files: its class and configuration, and on request the network."""

    source: Path
    """Its folder, or its file of weights."""
    network_class: type[Network]
    content: dict[str, Any]
    """Content of the configuration file."""
    family: ForeignFamily | None
    """The family of a foreign model; None for files of `save_pretrained`."""
    adapter: Path | None = None
    """A folder of peft with adapters for it, which are merged into its weights."""

    @cached_property
    def weights(self) -> ForeignWeights:
        """In the names of the files.

        Raises:
            TrunklineError: if a file is missing or damaged.
        """
        return open_weights(self.source)

    @cached_property
    def config(self) -> Any:
        """Configuration of the network.

        Raises:
            TrunklineError: for a field that the network does not have, or an option of a foreign model.
        """
        if self.family is None:
            return config_from_dict(self.network_class.config_class, self.content)
        with described_by(self.family, self.source):
            return self.family.config_from(self.content, self.weights)

    @property
    def companions(self) -> Companions:
        """What lies beside the network: tokenizer, how pictures are prepared, names of classes.

        Raises:
            TrunklineError: if a file of it is damaged.
        """
        folder = self.source if self.source.is_dir() else self.source.parent
        if self.family is None:
            return Companions.in_folder(folder)
        return companions_from_theirs(folder, self.content, self.family.origin)

    def network(self, dtype: torch.dtype | None = torch.float32) -> Any:
        """The network, in training mode.

        Args:
            dtype: type of its weights; None keeps that of the files.

        Raises:
            TrunklineError: if the weights do not fit the configuration, or are not finite.
        """
        config = self.config
        if self.family is None:
            network = unfilled(self.network_class, config)
            weights = {name: self.weights[name] for name in self.weights}
        else:
            with described_by(self.family, self.source):
                network = unfilled(self.network_class, config)
            weights = self.family.weights_from(self.weights, config)
        assign_weights(network, weights, self.source, dtype)
        refuse_nan(network, self.source)
        network.companions = self.companions
        if self.adapter is not None:
            merge_lora(load_adapter(network, self.adapter))
            refuse_nan(network, self.adapter)
        return network


def find_pretrained(
    source: str | Path,
    accepted: tuple[type[Network], ...] = (),
    config: Mapping[str, Any] | str | Path | None = None,
) -> Pretrained:
    """Read what kind of network is in files; its configuration and weights are read when they are asked for.

    Args:
        source: a folder, a file of weights with its configuration file beside it, or a hub name. A folder of peft
            stands for the base model that it names, with its adapters merged.
        accepted: classes of networks that are not Trunkline's own, which a configuration file may name.
        config: of a foreign model, if no file has it: the content of its configuration file, or a path to it.

    Raises:
        TrunklineError: if there is no configuration file, or it describes a model that no network of ours can be.
    """
    place = pretrained_place(source)
    if is_adapter_folder(place):
        return replace(find_pretrained(base_of_adapter(place, pretrained_place), accepted, config), adapter=place)
    folder = place if place.is_dir() else place.parent
    content = dict(config) if isinstance(config, Mapping) else read_config(Path(config or folder))
    if "network" in content:
        name = content.pop("network")
        kind = next((own for own in accepted if own.__name__ == name), None) or getattr(networks, str(name), None)
        if not (isinstance(kind, type) and issubclass(kind, Network)):
            raise TrunklineError(
                f"{folder / CONFIG_FILE} describes {with_article(str(name))}, which is no network of Trunkline's"
            )
        return Pretrained(place, kind, content, None)
    family = foreign_family(content, folder if config is None else "the given configuration")
    content = with_padding_of_tokenizer(content, folder)
    if family.network in (BERT, GPT) and (not accepted or TextHead in accepted):
        pooling = sentence_options(folder)
        family = family if pooling is None else sentence_family(family, pooling)
    return Pretrained(place, family.network, content, family)


def load_pretrained(
    source: str | Path,
    accepted: tuple[type[Network], ...] = (),
    config: Mapping[str, Any] | str | Path | None = None,
    dtype: torch.dtype | None = torch.float32,
) -> Any:
    """The network in files, in training mode; arguments and errors as for `find_pretrained` and `Pretrained.network`.

    If classes are accepted, it is of one of them.
    """
    found = find_pretrained(source, accepted, config)
    if accepted and not issubclass(found.network_class, accepted):
        name, wanted = found.network_class.__name__, " or ".join(with_article(kind.__name__) for kind in accepted)
        raise TrunklineError(
            f"{found.source} describes {with_article(name)}, not {wanted}; load it with {name}.from_pretrained"
        )
    return found.network(dtype)


def pretrained_place(source: str | Path) -> Path:
    """The file or folder of that name, or the hub's cached copy of the repository of that name.

    Raises:
        TrunklineError: if there is none, and no such repository can be reached.
    """
    path = Path(source)
    if path.is_dir():
        return path
    if path.is_file():
        if path.suffix in WEIGHTS_SUFFIXES:
            return path
        raise TrunklineError(
            f"{source} is a file, but from_pretrained takes a folder that save_pretrained wrote, a file of weights, or "
            "a hub name; load a checkpoint of `trunkline fit` with from_checkpoint, and convert other formats, such as "
            "GGUF or ONNX, to safetensors"
        )
    if looks_like_path(str(source)):
        raise TrunklineError(f"'{source}' is no folder; fix the path, or give the name of a hub repository")
    try:
        from huggingface_hub import snapshot_download

        with hub_access():
            folder = Path(snapshot_download(str(source), allow_patterns=[*BESIDE, *SAFE]))
            if not any((folder / name).is_file() for name in SAFE):  # older repositories
                folder = Path(snapshot_download(str(source), allow_patterns=[*BESIDE, *PICKLED]))
            return folder
    except Exception as error:  # the hub's client raises many kinds, offline or for a bad name
        raise TrunklineError(f"'{source}' is no folder, and the hub gave no such repository: {error}") from error


WEIGHTS_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt", ".json")
"""Of files of weights, and of the list of their parts."""
SAFE = [name for name in (*WEIGHTS_FILES, *PART_FILES, ADAPTER_WEIGHTS) if "safetensors" in name]
PICKLED = [name for name in (*WEIGHTS_FILES, *PART_FILES) if "safetensors" not in name]
BESIDE = [
    *(*CONFIG_FILES, *COMPANION_FILES, PREPROCESSOR_FILE, PROCESSOR_FILE),
    *(TOKENIZER_CONFIG_FILE, MODULES_FILE, POOLING_FILES, ADAPTER_CONFIG),
]
