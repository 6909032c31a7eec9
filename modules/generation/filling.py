"""Fill masks in texts with a masked language model. Needs only torch."""

from typing import NamedTuple

import torch
from torch import Tensor

from trunkline.modules.networks import BERT


class Filling(NamedTuple):
    """The likeliest tokens for one mask."""

    position: int
    """Position of the mask in its row."""
    tokens: list[int]
    """Token ids, the likeliest first."""
    probabilities: list[float]


@torch.inference_mode()
def fill_masks(network: BERT, tokens: Tensor, mask_id: int, count: int = 5) -> list[Filling]:
    """The `count` likeliest tokens at each position of a row (T,) that holds `mask_id`.

    Each mask is filled as if the others stayed masked.
    """
    positions = (tokens == mask_id).nonzero()[:, 0]
    training = network.training
    network.eval()
    logits = network(tokens[None], keep=positions[None])[0].float()  # (N, V)
    network.train(training)
    best = logits.softmax(dim=-1).topk(min(count, logits.shape[1]))
    rows = zip(positions.tolist(), best.indices.tolist(), best.values.tolist(), strict=True)
    return [Filling(*row) for row in rows]
