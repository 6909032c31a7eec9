"""What of a network can be exported: functions with named inputs and outputs, and the sizes that may vary."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor


class Axis(NamedTuple):
    """A size that may be another one in each call."""

    name: str
    low: int = 1
    """The smallest size."""
    high: int | None = None
    """The largest; None for no limit."""


BATCH = Axis("batch")


class Input(NamedTuple):
    """An input of a graph."""

    shape: tuple[Axis | int, ...]
    draw: Callable[[Sequence[int], Generator], Tensor]
    """Makes an example of a given shape."""


def token_input(vocab_size: int, length: Axis) -> Input:
    """Token ids (B, T), int64."""
    return Input((BATCH, length), lambda shape, draws: torch.randint(vocab_size, tuple(shape), generator=draws))


def mask_input(length: Axis) -> Input:
    """(B, T) bool, False for padding, which is on the right in the examples."""

    def draw(shape: Sequence[int], draws: Generator) -> Tensor:
        rows, width = shape
        real = torch.randint(1, width + 1, (rows, 1), generator=draws)
        real[0] = width
        return torch.arange(width) < real

    return Input((BATCH, length), draw)


def number_input(*shape: Axis | int) -> Input:
    """Pictures, frames or states (B, ...), float32."""
    return Input((BATCH, *shape), lambda sizes, draws: torch.randn(tuple(sizes), generator=draws))


@dataclass(frozen=True)
class Graph:
    """A function of a network that can be exported."""

    run: Callable[..., dict[str, Any]]
    """Takes the inputs by their names, and returns the outputs by theirs."""
    inputs: dict[str, Input]
    name: str = ""
    """What it is called in a network that has several."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Plain values that whoever runs it needs."""
