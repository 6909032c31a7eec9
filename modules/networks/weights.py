"""Fill a network with weights from files, in the time that reading them takes: no weight is first drawn by chance."""

from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from trunkline import TrunklineError

ModuleT = TypeVar("ModuleT", bound=nn.Module)
LISTED = 10
"""Number of weights that a message names."""


class _Unfilled(TorchFunctionMode):
    """Leaves out what gives weights their first values.

    On the meta device it has no effect, but PyTorch would import a second's worth of its own Python code for it.
    """

    fills = frozenset(
        (
            *("normal_", "uniform_", "trunc_normal_", "kaiming_uniform_", "xavier_uniform_"),
            *("zeros_", "ones_", "constant_", "fill_", "zero_", "div_", "mul_"),
        )
    )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in self.fills:
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


def unfilled(network_class: type[ModuleT], config: Any) -> ModuleT:
    """A network whose weights have shapes, but neither values nor memory, until `assign_weights` gives them."""
    with torch.device("meta"), _Unfilled():
        return network_class(config)


def assign_weights(
    network: nn.Module, weights: dict[str, Tensor], source: object, dtype: torch.dtype | None = torch.float32
) -> None:
    """Make tensors the weights of a network, without a copy where their type is right already.

    Weights that share memory in the network, such as a tied output layer, stay one; either name is enough.

    Args:
        network: the network; its own values are dropped.
        weights: by the names of the network's state dict. They are taken out of the dictionary one by one, so that a
            tensor that must be copied does not stay twice in memory.
        source: where they come from, for messages.
        dtype: type of the weights in the network; None keeps that of the tensors.

    Raises:
        TrunklineError: with all weights that are missing, that the network does not have, whose shape is another, or
            that are tied in the network but differ in the file.
    """
    own = network.state_dict(keep_vars=True)
    shared: dict[int, list[str]] = {}
    for name, value in own.items():
        shared.setdefault(id(value), []).append(name)
    faults = [f"'{name}' is missing" for names in shared.values() for name in names[:1] if not {*names} & {*weights}]
    faults += [f"'{name}' has no place in it" for name in weights if name not in own]
    faults += [
        f"'{name}' is {tuple(weights[name].shape)} there and {tuple(value.shape)} here"
        for name, value in own.items()
        if name in weights and weights[name].shape != value.shape
    ]
    faults += [
        f"'{name}' is {str(weights[name].dtype).removeprefix('torch.')} there, as after quantisation, and float here"
        for name, value in own.items()
        if name in weights and isinstance(value, nn.Parameter) and not weights[name].is_floating_point()
    ]
    for names in shared.values():
        given = [name for name in names if name in weights]
        faults += [
            f"'{name}' and '{given[0]}' differ, but are one here"
            for name in given[1:]
            if weights[name] is not weights[given[0]] and not torch.equal(weights[name], weights[given[0]])
        ]
    if faults:
        raise TrunklineError(f"the weights in {source} do not fit a {type(network).__name__}: {enumerated(faults)}")
    for names in shared.values():
        old = own[names[0]]
        given = [name for name in names if name in weights]
        value = [weights.pop(name) for name in given].pop()  # they are equal
        value = value.to(dtype if dtype is not None and value.is_floating_point() else value.dtype).contiguous()
        if isinstance(old, nn.Parameter):
            value = nn.Parameter(value, requires_grad=old.requires_grad)
        for name in names:
            place, _, leaf = name.rpartition(".")
            setattr(network.get_submodule(place), leaf, value)


def refuse_changed(network: Any) -> None:
    """Refuse to save a network in which a layer was replaced: its files could not be loaded again.

    Raises:
        TrunklineError: with the weights that are not those of its configuration, or what goes wrong when the class is
            made of it.
    """
    kind = type(network).__name__
    try:
        made = unfilled(type(network), network.config)
    except (TypeError, RuntimeError, NotImplementedError) as error:
        raise TrunklineError(
            f"this {kind} cannot be saved, because it could not be loaded again: it cannot be made of its "
            f"configuration alone and without values ({error}); let its constructor need nothing but `config`, and "
            "read no values of tensors"
        ) from error
    wanted = {name: tuple(value.shape) for name, value in made.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    faults = [
        f"'{name}' is {found.get(name, 'missing')}, but {wanted.get(name, 'missing')} by the configuration"
        for name in (*wanted, *(name for name in found if name not in wanted))
        if wanted.get(name) != found.get(name)
    ]
    if faults:
        raise TrunklineError(
            f"this {kind} cannot be saved, because it could not be loaded again: {enumerated(faults)}. Change "
            f"the configuration and make a {kind} of it, into which you load the weights that stay, or save "
            "the state dict yourself"
        )


def enumerated(faults: Iterable[str]) -> str:
    """The first faults, and the number of the others."""
    every = list(faults)
    more = len(every) - LISTED
    return "; ".join(every[:LISTED]) + (f"; and {more} more" if more > 0 else "")
