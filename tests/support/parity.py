"""Helpers of the parity tests."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def randomise(module: nn.Module, scale: float = 0.2) -> Any:
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn_like(p), alpha=scale)
    return module


@torch.random.fork_rng()
def random_peer(model: Any, config: dict[str, Any]) -> Any:
    """A model of transformers in which no weight is zero; the same at each call."""
    torch.manual_seed(0)
    return randomise(model(model.config_class(**config)).eval(), 0.1)


def padded_texts(padding: int) -> tuple[Tensor, Tensor]:
    """Tokens (2, 13) of two texts, and their mask; the second ends with padding."""
    tokens = torch.randint(2, 50, (2, 13), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(13) < torch.tensor([[13], [9]])
    return tokens.where(mask, padding), mask


def assert_near(got: Tensor, want: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


@torch.enable_grad()
def memorise(network: Any, words: int, sources: Tensor | None = None) -> Any:
    """Teach an encoder-decoder sixteen random texts, because a random network repeats one word for ever.

    They are about sixteen random texts, or about these sixteen sources.
    """
    tokens, texts = torch.randint(3, words, (16, 9)), torch.randint(3, words, (16, 8))
    tokens = tokens if sources is None else sources
    given = F.pad(texts[:, :-1], (1, 0))
    if getattr(network.config, "scale_output", False):  # large embeddings learn slowly
        network.token_embed.weight.data *= 0.1
    optimizer = torch.optim.Adam(network.parameters(), 0.01)
    for _ in range(50):
        loss = F.cross_entropy(network(tokens, given).flatten(0, 1), texts.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network
