"""What the commands that generate text share: the number format of the network, texts about sources, and printing."""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from trunkline.modules.generation.compiled import CompiledDecoder
from trunkline.modules.generation.decoding import GenerationConfig
from trunkline.modules.generation.low_precision import TextNetwork, to_bfloat16, to_int8
from trunkline.modules.generation.sampling import generate

NumberFormat = Literal["float32", "bfloat16", "int8"]


def prepared(network: TextNetwork, dtype: NumberFormat, device: torch.device) -> TextNetwork:
    """Move the network to a device and convert its weights to a number format."""
    network = network.to(device)
    if dtype == "float32":
        return network
    return to_int8(network) if dtype == "int8" else to_bfloat16(network)


class SourceWriter:
    """Writes texts about batches of sources with an encoder-decoder.

    Args:
        network: the encoder-decoder, in evaluation mode and on its device.
        compile: compile the step that makes a token. Its code is for one number of sources, so a batch that is smaller
            than one before it is filled up.
    """

    def __init__(self, network: Any, compile: bool = False) -> None:
        self.network, self.compile, self.rows = network, compile, 0
        self.decoder: CompiledDecoder | None = None

    def write(
        self,
        source: Tensor,
        mask: Tensor | None,
        prompts: Tensor,
        config: GenerationConfig,
        end_ids: Sequence[int],
        numbers: Sequence[int],
    ) -> list[list[int]]:
        """The tokens of a text for each source.

        Args:
            source: (B, S, ...) sources, as the network's `encode` takes them.
            mask: (B, S) bool, False for padding of the sources.
            prompts: (B, T) tokens that the texts begin with.
            config: how tokens are chosen.
            end_ids: tokens that end a text.
            numbers: (B,) number of each source, which decides its random numbers.
        """
        count = len(source)
        if not self.compile:
            return generate(self.network.decoder_of(source, mask), prompts, None, config, end_ids, numbers)
        self.rows = max(self.rows, count)
        rows = torch.arange(self.rows, device=source.device).clamp(max=count - 1)  # the last one again and again
        decoder = self.network.decoder_of(source[rows], None if mask is None else mask[rows])
        if self.decoder is None:
            self.decoder = CompiledDecoder(decoder)
        self.decoder.decoder = decoder  # with the memory and the graphs of the sources before
        numbers = [*numbers, *[numbers[-1]] * (self.rows - count)]
        return generate(self.decoder, prompts[rows], None, config, end_ids, numbers)[:count]


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
