"""A loaded network under a head of this project, in a plain PyTorch loop."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.tiles import PATTERNS
from trunkline.modules.training.optim import decay_groups
from trunkline.modules.training.warm_start import freeze


class Sorter(nn.Module):
    """Scores of the patterns, from the pooled features of a loaded Vision Transformer."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.head = nn.Linear(body.config.backbone.dim, len(PATTERNS))

    def forward(self, pictures: Tensor) -> Tensor:
        """(B, 3, height, width) -> (B, patterns)."""
        return self.head(self.body.forward_head(self.body.forward_features(pictures), pre_logits=True))


def learn(sorter: Sorter, pictures: Tensor, labels: Tensor, steps: int, frozen_blocks: int) -> list[float]:
    """Fine-tune all but the first blocks, the upper ones faster; the loss of each step."""
    frozen = freeze(sorter.body, frozen_blocks)
    groups = decay_groups(sorter.body, lr=1e-2, weight_decay=0.05, layer_decay=0.75)
    groups.append({"params": list(sorter.head.parameters()), "lr": 1e-2, "weight_decay": 0.0})
    optimizer = torch.optim.AdamW(groups)
    sorter.train()
    for module in frozen:
        module.eval()
    losses = []
    for chosen in batches(len(labels), steps):
        loss = F.cross_entropy(sorter(pictures[chosen]), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    sorter.eval()
    return losses


def batches(count: int, steps: int, size: int = 16) -> Iterator[Tensor]:
    """Random row numbers for each step."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        yield torch.randperm(count, generator=generator)[:size]
