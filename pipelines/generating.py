"""What the commands that generate text share: the number format of the network, and printing."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

from trunkline.modules.generation.low_precision import TextNetwork, to_bfloat16, to_int8

NumberFormat = Literal["float32", "bfloat16", "int8"]


def prepared(network: TextNetwork, dtype: NumberFormat, device: torch.device) -> TextNetwork:
    """Move the network to a device and convert its weights to a number format."""
    network = network.to(device)
    if dtype == "float32":
        return network
    return to_int8(network) if dtype == "int8" else to_bfloat16(network)


def write(text: str) -> None:
    """Print without delay."""
    sys.stdout.write(text)
    sys.stdout.flush()


@contextmanager
def readers_may_leave() -> Iterator[None]:
    """End the block quietly if the reader of the standard output, such as `head`, has stopped reading."""
    try:
        yield
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
