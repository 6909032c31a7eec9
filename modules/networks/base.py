"""Base class of the networks: a configuration of plain data, and weights that load without Lightning."""

import dataclasses
import difflib
import json
from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, Self, TypeVar, get_type_hints

import torch
from torch import nn

from trunkline import TrunklineError
from trunkline.modules.backbone import Transformer, TransformerConfig, TransformerOutput
from trunkline.modules.networks.companions import CARD_FILE, Companions, check_rows
from trunkline.modules.networks.graphs import Graph
from trunkline.modules.networks.hub import check_repository, upload
from trunkline.modules.networks.image_transform import ImageTransform
from trunkline.modules.networks.intermediates import Indices, states_of
from trunkline.modules.networks.lora import LoRAConfig, add_lora, merge_lora, merged_copy
from trunkline.modules.networks.model_card import model_card
from trunkline.modules.networks.resizing import resize_positions_of_text
from trunkline.modules.networks.weights import refuse_changed
from trunkline.names import with_article

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
ConfigT = TypeVar("ConfigT")
NetworkT = TypeVar("NetworkT", bound="Network")


def config_from_dict(config_class: type[ConfigT], data: Mapping[str, Any]) -> ConfigT:
    """Build a (nested) configuration dataclass from plain data, such as that of a JSON file or a checkpoint.

    Raises:
        TrunklineError: for a key that the configuration does not have; suggests the nearest one.
    """
    hints = get_type_hints(config_class)
    values = {}
    for key, value in data.items():
        if key not in hints:
            near = difflib.get_close_matches(key, hints, n=1)
            raise TrunklineError(
                f"{config_class.__name__} has no field '{key}'" + (f"; did you mean '{near[0]}'?" if near else "")
            )
        if dataclasses.is_dataclass(hints[key]) and isinstance(value, Mapping):
            value = config_from_dict(hints[key], value)
        values[key] = tuple(value) if isinstance(value, list) else value
    return config_class(**values)


OWN_TO_TRUNK = {"causal", "dropout", "drop_path", "activation_checkpointing"}
"""Fields in which a given trunk may differ from the network's configuration: they change neither its weights nor its
results in evaluation, or, like `causal`, are passed in each call."""


def trunk_for(config: TransformerConfig, trunk: Transformer | None, name: str = "backbone") -> Transformer:
    """Make a new trunk, or check and return a given one.

    Args:
        config: the trunk's configuration inside the network's.
        trunk: an existing trunk, which keeps its weights, dropout and checkpointing; None makes a new one.
        name: the field of the network's configuration that holds `config`.

    Raises:
        TrunklineError: with the field in which the given trunk differs.
    """
    if trunk is None:
        return Transformer(config)
    resolved = {
        "num_kv_heads": "kv_heads",
        "mlp_dim": "hidden_dim",
        "head_dim": "head_width",
        "qkv_bias": "attention_bias",
    }  # None stands for a default
    for field in dataclasses.fields(config):
        value = resolved.get(field.name, field.name)
        found, own = getattr(trunk.config, value), getattr(config, value)
        if found != own and field.name not in OWN_TO_TRUNK:
            raise TrunklineError(
                f"the given trunk has {field.name}={found}, but the network's configuration has "
                f"{name}.{field.name}={own}; make them equal"
            )
    return trunk


def refuse_nan(network: nn.Module, source: str | Path) -> None:
    """Check that all weights are finite numbers: others give results that look like real ones.

    Args:
        network: a network whose weights were just read.
        source: where they were read from, for the message.

    Raises:
        TrunklineError: if one is not; names the first.
    """
    # A sum is finite only if all numbers are (or if they are huge), and it needs no memory.
    suspects = (pair for pair in network.state_dict().items() if not pair[1].sum().isfinite())
    wrong = next((name for name, weight in suspects if not weight.isfinite().all()), None)
    if wrong is not None:
        raise TrunklineError(
            f"the weights in {source} are not finite, first in {wrong}: its training has diverged; take an earlier "
            "checkpoint"
        )


WORD_FOR = {"pos_embed": "positions", "target_pos_embed": "positions of targets"}
"""Name of a table of positions -> what messages call it."""


class Network(nn.Module):
    """A plain torch network that can be rebuilt from its configuration, and that is saved as two standard files.

    A subclass names its configuration dataclass in `config_class`, takes an instance of it as its first argument and
    keeps it as `config`. Its second argument, `trunk`, is an existing `Transformer` to use, so that several networks
    can share its weights; without it the network makes its own trunk.
    """

    config_class: ClassVar[type]
    config: Any
    companions: Companions | None = None
    """What goes with the network; filled by everything that loads one, written by `save_pretrained`."""

    @property
    def tokenizer(self) -> Any:
        """The tokenizer that goes with it, of the tokenizers library; None if none is known.

        Raises:
            TrunklineError: if it has more tokens than the network's embedding has rows.
        """
        found = None if self.companions is None else self.companions.tokenizer
        weights = [name for name, whose in self.word_weights().items() if whose == "tokenizer"]
        if found is not None and self.companions is not None and weights:
            check_rows(found, self.companions, len(self.get_parameter(weights[0])) - self.extra_words)
        return found

    @property
    def transform(self) -> ImageTransform | None:
        """What makes a picture its input (C, H, W), as in the evaluation of its training; None if it is not known."""
        return None if self.companions is None else self.companions.transform

    def output_modules(self) -> list[nn.Module]:
        """The parts after the trunk (pooling, heads): never frozen, and with the full rate in layer-wise decay."""
        return []

    def word_weights(self) -> dict[str, str]:
        """Weights with a row for each token -> whose tokens they are: those of `tokenizer` or `target_tokenizer`."""
        return {}

    extra_words: ClassVar[int] = 0
    """Rows at the end of the `word_weights` that are for no token."""

    def text_positions(self) -> dict[str, tuple[nn.Embedding, int]]:
        """Learned positions of texts or frames by their names, and the number of rows before the first position."""
        return {}

    def rotary_length(self) -> int:
        """Largest number of tokens, if their positions are rotations; else 0."""
        return 0

    def adapt(self, source: Any) -> list[str]:
        """Change the weights of a trained network of the same class, in place, to the sizes of this network's inputs.

        Returns:
            what was changed, such as `positions 512 to 1024`, for a message.
        """
        changed, trained = [], source.text_positions()
        for name, (own, first) in self.text_positions().items():
            table, _ = trained.get(name, (own, first))
            if own.num_embeddings != table.num_embeddings:
                changed.append(f"{WORD_FOR[name]} {table.num_embeddings - first} to {own.num_embeddings - first}")
                resize_positions_of_text(table, own.num_embeddings, first)
        before, after = source.rotary_length(), self.rotary_length()
        if 0 < before < after:
            changed.append(f"rotary positions {before} to {after}, the new ones untrained")
        return changed

    def graphs(self) -> list[Graph]:
        """What of it `trunkline export` writes: a function with named inputs and outputs, or several."""
        kind = with_article(type(self).__name__)
        raise TrunklineError(f"{kind} does not say what of it is exported; give it a method `graphs`")

    def read_trunk(self) -> tuple[Transformer, Callable[..., TransformerOutput]]:
        """The trunk that reads the inputs, and the method that runs it: it takes `layers`, as the trunk does."""
        raise TrunklineError(f"{with_article(type(self).__name__)} has several parts; take the states of one of them")

    def forward_intermediates(
        self, *inputs: Any, indices: Indices = None, norm: bool = False, intermediates_only: bool = False, **named: Any
    ) -> Any:
        """States between the blocks, as timm's method of this name gives them.

        An encoder-decoder gives those of its encoder.

        Args:
            inputs: as for `forward_features`, or `encode` of a network that has it.
            indices: the last n blocks, a list of numbers (negative ones count from the end), or None for all. States
                come in the order of the blocks.
            norm: apply the trunk's final norm to them.
            intermediates_only: leave out the final states.
            named: further arguments of `forward_features` or `encode`, such as `mask`.

        Returns:
            (final states, [states (B, T, D) of each chosen block]), or only the list.

        Raises:
            TrunklineError: for a block that the trunk does not have, or for a network of several parts.
        """
        trunk, read = self.read_trunk()
        out, states = states_of(trunk, partial(read, *inputs, **named), indices, norm)
        return states if intermediates_only else (out.x, states)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the network and what goes with it into `folder`, which is created if missing.

        Always `config.json`, `model.safetensors` and a model card README.md, unless there is one already, which may
        have been edited; as far as they are known `tokenizer.json`, and `preprocessing.json` with how pictures and
        sounds are prepared and the names of the classes. Adapters of LoRA are merged into the weights that are written.

        Raises:
            TrunklineError: if a layer was replaced, so that the weights are not those of the configuration.
        """
        from safetensors.torch import save_model

        from trunkline.files import replacing  # here, so that importing a network stays light

        folder = Path(folder)
        merged = merged_copy(self)
        refuse_changed(merged)
        content = {"network": type(self).__name__, **dataclasses.asdict(self.config)}
        texts = {CONFIG_FILE: json.dumps(content, indent=2) + "\n"}
        texts |= {} if self.companions is None else self.companions.files()
        texts |= {} if (folder / CARD_FILE).exists() else {CARD_FILE: model_card(self)}
        # A network that was read from this folder may still read from its old file, which must stay as it is.
        with replacing(*(folder / name for name in texts), folder / WEIGHTS_FILE) as (*files, weights_file):
            for file, text in zip(files, texts.values(), strict=True):
                file.write_text(text, encoding="utf-8")
            save_model(merged, str(weights_file))

    def push_to_hub(self, repository: str, private: bool | None = None, token: str | None = None) -> str:
        """Upload what `save_pretrained` writes to the Hugging Face hub; needs `huggingface_hub`.

        Args:
            repository: `owner/name`, or a name of your own account; it is created if missing.
            private: of a repository that is created: whether others cannot see it. None is the account's setting.
            token: of the hub; None takes that of the environment (`HF_TOKEN`) or of `hf auth login`.

        Returns:
            the repository's address.

        Raises:
            TrunklineError: if the name is none of a repository, there is no token, or the hub cannot be reached or
                refuses.
        """
        check_repository(repository)
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return upload(folder, repository, private, token)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        config: Mapping[str, Any] | str | Path | None = None,
        dtype: torch.dtype | None = torch.float32,
    ) -> Self:
        """Rebuild a network from files: of `save_pretrained`, or of a model of transformers, timm or open_clip.

        A foreign model becomes the same network, with equal results; an option that this class does not have is an
        error. Call `eval()` before using the network.

        Args:
            source: the folder, a file of weights with its configuration file beside it, or the name of a Hugging Face
                hub repository (needs `huggingface_hub`).
            config: of a foreign model, if no file has it: the content of its configuration file, or a path to it.
            dtype: type of the weights; None keeps that of the files.

        Raises:
            TrunklineError: if a file is missing or damaged, or describes another network; or if weights are missing,
                left over, of another shape or not finite.
        """
        # By name: that module knows all networks, so that an import here would be a circle.
        load = import_module("trunkline.modules.networks.pretrained").load_pretrained
        try:
            return load(source, (cls,), config, dtype)
        except TrunklineError as error:
            raise TrunklineError(f"cannot load {with_article(cls.__name__)} from {source}: {error}") from error

    @classmethod
    def from_checkpoint(cls, file: str | Path, *, merge: bool = True) -> Self:
        """The network inside a checkpoint of `trunkline fit`; needs neither Lightning nor anything but torch.

        Its weights are the averaged ones, if the run kept an average. As after `from_pretrained`, call `eval()` before
        using it.

        Args:
            file: the checkpoint, or the folder of a run.
            merge: of a run with LoRA: merge the adapters into the weights, or keep them, frozen weights and all.

        Raises:
            TrunklineError: if it is missing, damaged, or holds another network.
        """
        from trunkline.files import load_checkpoint  # here, so that importing a network stays light
        from trunkline.run_folders import find_checkpoint

        file = find_checkpoint(file)
        content = load_checkpoint(file)
        name = content.get("classes", {}).get("network", "").rpartition(".")[2]
        if name and name != cls.__name__:
            raise TrunklineError(
                f"{file} holds {with_article(name)}, not {with_article(cls.__name__)}; load it with "
                f"{name}.from_checkpoint"
            )
        return network_of(cls, content, file, merge)


def stored_config(content: Mapping[str, Any]) -> Any:
    """The network's configuration in a training checkpoint; None if it has none."""
    given = content.get("hyper_parameters")
    return given.get("network") if isinstance(given, dict) else None


def nameless(path: str | Path, field: str | None = None) -> TrunklineError:
    """The error for a checkpoint that names no network."""
    return TrunklineError(f"{path} is not a checkpoint of a Trunkline run: it names no network", field)


def network_of(
    network_class: type[NetworkT], content: Mapping[str, Any], path: str | Path, merge: bool = True
) -> NetworkT:
    """The network inside a training checkpoint (with averaged weights, if the run kept an average).

    Args:
        network_class: its class.
        content: of the checkpoint.
        path: of the checkpoint, for messages.
        merge: whether adapters of LoRA are merged into the weights.

    Raises:
        TrunklineError: if the checkpoint names no network, or its weights do not fit the configuration.
    """
    config = stored_config(content)
    if config is None:
        raise nameless(path)
    from trunkline.files import check_parts  # here, so that importing a network stays light

    check_parts(content, path, {"state_dict": dict})
    network = network_class(config_from_dict(network_class.config_class, config))
    lora = config_from_dict(LoRAConfig, content["hyper_parameters"].get("lora") or {})
    if lora.rank:
        add_lora(network, lora)
    prefix = "network."
    weights = {k.removeprefix(prefix): v for k, v in content["state_dict"].items() if k.startswith(prefix)}
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        first = str(error).split("\n")[1:2] or [str(error)]
        raise TrunklineError(f"the weights in {path} do not fit its configuration: {first[0].strip()}") from error
    refuse_nan(network, path)
    network.companions = Companions.of_checkpoint(content, path)
    return merge_lora(network) if merge else network
