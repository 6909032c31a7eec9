"""How a network starts from trained weights, and what of it shall not learn."""

import dataclasses
import json
from pathlib import Path
from typing import Any, TypeVar

import torch

from trunkline import TrunklineError
from trunkline.modules.backbone import Transformer, TransformerConfig
from trunkline.modules.networks.base import CONFIG_FILE, Network, config_from_dict
from trunkline.modules.networks.bert import BERT
from trunkline.modules.networks.gpt import GPT
from trunkline.modules.networks.text_head import TextHead, without_heads
from trunkline.modules.training.checkpoints import load_checkpoint

N = TypeVar("N", bound=Network)
FREE = {"dropout", "drop_path", "activation_checkpointing", "next_sentence", "tie_embeddings"}
"""Fields of a configuration in which a network may differ from the one that it starts from."""
SHOWN = {"dim", "depth", "mlp_dim", "num_kv_heads"}
"""Fields of a trunk's configuration that the shapes of its weights tell."""


def freeze(network: Network, blocks: int) -> list[torch.nn.Module]:
    """Let only the output modules and the blocks from number `blocks` on learn; returns what stands still."""
    learning = [*network.output_modules()]
    for trunk in (m for m in network.modules() if isinstance(m, Transformer)):
        if blocks < len(trunk.blocks):
            learning += [*trunk.blocks[blocks:], trunk.norm]
    kept = {p for module in learning for p in module.parameters()}
    for p in network.parameters():
        p.requires_grad_(p in kept)
    inside = {m for module in learning for m in module.modules()}  # their dropout has no parameters
    return [m for m in network.modules() if m not in inside and kept.isdisjoint(m.parameters())]


def network_from_checkpoint(network_class: type[N], path: str | Path) -> N:
    """The network inside a training checkpoint (with averaged weights, where the run kept an average).

    Raises:
        TrunklineError: if the file is damaged, or holds no such network.
    """
    return network_of(network_class, load_checkpoint(path), path)


def network_of(network_class: type[N], checkpoint: dict[str, Any], path: str | Path) -> N:
    """See `network_from_checkpoint`; of a checkpoint that is read already."""
    config = checkpoint.get("hyper_parameters", {}).get("network")
    if config is None:
        raise TrunklineError(f"{path} is no checkpoint of a Trunkline run: it names no network")
    network = network_class(config_from_dict(network_class.config_class, config))
    prefix = "network."
    weights = {k.removeprefix(prefix): v for k, v in checkpoint["state_dict"].items() if k.startswith(prefix)}
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        first = str(error).split("\n")[1:2] or [str(error)]
        raise TrunklineError(f"the weights in {path} do not fit its configuration: {first[0].strip()}") from error
    return network


def check_same_sizes(there: Any, here: Any, name: str, flag: str, free: set[str] = FREE) -> None:
    """Compare two configurations, of which weights tell a part only (the number of heads, say, not).

    Raises:
        TrunklineError: naming the first difference and the flag.
    """
    for field in dataclasses.fields(here):
        found, own = getattr(there, field.name), getattr(here, field.name)
        if dataclasses.is_dataclass(own):
            check_same_sizes(found, own, name, f"{flag}.{field.name}", free)
        elif found != own and field.name not in free:
            raise TrunklineError(
                f"{name} was trained with {field.name}={found}, but the network has {own}; set "
                f"{flag}.{field.name} {'null' if found is None else found}"
            )


def trunks_of(config: Any, flag: str) -> dict[str, TransformerConfig]:
    """Flag -> trunk, of all that a configuration holds."""
    found = {}
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), f"{flag}.{field.name}"
        if isinstance(value, TransformerConfig):
            found[name] = value
        elif dataclasses.is_dataclass(value):
            found |= trunks_of(value, name)
    return found


def load_matching(
    network: Network, source: Network, name: str, argument: str = "init_from", flag: str = "--model.network"
) -> None:
    """Copy weights from `source`; output modules may differ in shape, all else must fit.

    Args:
        network: to change.
        source: of the same class.
        name: of the source, for messages, as the next two.
        argument: that gave the name.
        flag: that sets the network's configuration.

    Raises:
        TrunklineError: naming the first weight or option that does not fit.
    """
    network.adapt(source)
    outputs = {p for m in network.output_modules() for p in m.parameters()}
    weights = source.state_dict()
    for key, own in network.state_dict(keep_vars=True).items():
        if key in weights and weights[key].shape == own.shape:
            continue
        if own not in outputs:
            found = tuple(weights[key].shape) if key in weights else "missing"
            raise TrunklineError(
                f"{argument} {name} does not fit: {key} is {found} there and {tuple(own.shape)} here; "
                f"give {flag} the sizes in its config.json"
            )
        weights[key] = own.detach()
    there = trunks_of(source.config, flag)
    for trunk_flag, trunk in trunks_of(network.config, flag).items():
        check_same_sizes(there[trunk_flag], trunk, f"{argument} {name}", trunk_flag, FREE | SHOWN)
    network.load_state_dict({key: weights[key] for key in network.state_dict()})


def start_from(network: TextHead, name: str, argument: str = "init_from") -> None:
    """Copy the weights of a checkpoint, a folder or a hub name: a `TextHead`'s, or only those of its body.

    Args:
        network: to change.
        name: see `read_network`.
        argument: that gave it, for messages.

    Raises:
        TrunklineError: if it holds another kind of network, or one of other sizes; names the flag.
    """
    source, config = read_network(name, type(network.body), argument), network.config
    own, target = (network, config) if isinstance(source, TextHead) else (network.body, config.body)
    body = source.config.body if isinstance(source, TextHead) else source.config
    if type(body) is not type(config.body):
        kind = "gpt" if config.bert is not None else "bert"
        raise TrunklineError(
            f"{argument} {name} holds a {kind.upper()}; set --model.network.{kind} instead of {config.body_flag}"
        )
    check_same_sizes(body, config.body, f"{argument} {name}", config.body_flag)
    if target is config.body:
        source = without_heads(source)
    load_matching(own, source, name, argument, config.body_flag if own is network.body else "--model.network")


def read_network(name: str, body: type[Network], argument: str) -> Any:
    """The network of a checkpoint, a folder or a hub name: a `TextHead`, or a language model.

    Args:
        name: of it.
        body: class that a hub name is taken for.
        argument: that gave the name, for messages.
    """
    known: list[type[Network]] = [TextHead, BERT, GPT]
    if Path(name).is_file():
        fields = set(load_checkpoint(name).get("hyper_parameters", {}).get("network") or ())
        fits = [c for c in known if fields == {field.name for field in dataclasses.fields(c.config_class)}]
        if not fits:
            raise TrunklineError(
                f"{argument} {name} is no checkpoint of a language model or a task on text; give one of MaskedLM, "
                "CausalLM or such a task"
            )
        return network_from_checkpoint(fits[0], name)
    try:
        kind = json.loads(Path(name, CONFIG_FILE).read_text(encoding="utf-8"))["network"]
    except (OSError, ValueError, KeyError, TypeError):  # `from_pretrained` says what is wrong
        kind = None
    return next((c for c in known if c.__name__ == kind), body).from_pretrained(name)
