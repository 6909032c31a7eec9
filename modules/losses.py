"""Losses: pure functions of tensors. Needs torch alone.

Shape legend: N tokens, D width, V vocabulary.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100
"""A target that is not counted, as everywhere in PyTorch."""
CHUNK_ELEMENTS = 2**25
"""Logits held at a time: 128 MiB in float32, and still matrices large enough to multiply at full speed."""


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    chunk: int | None = None,
) -> Tensor:
    """Sum of the cross-entropies of `x @ weight.T + bias`, without ever holding all (N, V) logits.

    Chunks of tokens are multiplied out, and their share of the gradients is taken at once: three
    products in all, as many as the plain way needs. Under autocast the products are of its type;
    the softmax is float32 in any case.

    Args:
        x: (N, D) states.
        weight: (V, D) of the output layer.
        target: (N,) token ids; -100 is not counted.
        bias: (V,) of the output layer.
        label_smoothing: share of the target spread evenly over the vocabulary (arXiv:1512.00567).
        z_loss: factor of the squared log-partition, which keeps logits from drifting (arXiv:2204.02311).
        chunk: tokens at a time; None chooses by the vocabulary.

    Returns:
        A scalar, float32 or wider; divide it by the number of targets for the mean.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    return _LinearCrossEntropy.apply(x, weight, bias, target, label_smoothing, z_loss, chunk)


@torch.no_grad()
def token_losses(x: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each token, and the likeliest token: (N,) and (N,); for evaluation, in chunks likewise."""
    parts = []
    for part in _chunks(len(x), len(weight), None):
        logits = F.linear(x[part], weight, bias).float()
        parts.append((F.cross_entropy(logits, target[part], reduction="none"), logits.argmax(dim=-1)))
    losses, best = zip(*parts, strict=True)
    return torch.cat(losses), torch.cat(best)


def _chunks(tokens: int, vocabulary: int, size: int | None) -> Iterator[slice]:
    """Slices of equal length, of about CHUNK_ELEMENTS logits."""
    count = max(1, -(-tokens * vocabulary // CHUNK_ELEMENTS))
    size = size or max(1, -(-tokens // count))
    return (slice(start, min(start + size, tokens)) for start in range(0, max(tokens, 1), size))


class _LinearCrossEntropy(torch.autograd.Function):
    """See `linear_cross_entropy`; the gradients are ready when the loss is."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        smoothing: float,
        z_loss: float,
        chunk: int | None,
    ) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_x = torch.empty_like(x) if needs_x else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if needs_weight else None
        grad_bias = torch.zeros_like(weight[:, 0], dtype=wide) if needs_bias else None
        total = torch.zeros((), dtype=wide, device=x.device)
        with torch.autocast(x.device.type, enabled=False):  # the types are chosen already
            for part in _chunks(len(x), len(weight), chunk):
                logits = F.linear(x[part], weight, bias).to(wide)  # (n, V)
                losses, grad = _losses_and_gradient(logits, target[part], smoothing, z_loss)
                total += losses
                grad = grad.to(x.dtype)
                if grad_x is not None:
                    torch.mm(grad, weight, out=grad_x[part])
                if grad_weight is not None and wide == x.dtype:
                    grad_weight.addmm_(grad.T, x[part])
                elif grad_weight is not None:
                    grad_weight += grad.T @ x[part]
                if grad_bias is not None:
                    grad_bias += grad.sum(dim=0)
                del logits, grad  # before the next ones are made
        ctx.save_for_backward(grad_x, grad_weight, grad_bias)
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (outer,) = grad_outputs
        grad_x, grad_weight, grad_bias = ctx.saved_tensors
        return (
            None if grad_x is None else grad_x * outer.to(grad_x.dtype),
            None if grad_weight is None else (grad_weight * outer).to(ctx.dtypes[0]),
            None if grad_bias is None else (grad_bias * outer).to(ctx.dtypes[1]),
            *(None,) * 4,
        )


def _losses_and_gradient(logits: Tensor, target: Tensor, smoothing: float, z_loss: float) -> tuple[Tensor, Tensor]:
    """Sum of the losses of (n, V) logits, and their gradient, which takes the logits' place in memory."""
    counted = (target != IGNORE)[:, None]
    picked = target.clamp(min=0)[:, None]  # (n, 1)
    partition = logits.logsumexp(dim=1, keepdim=True)  # (n, 1)
    losses = partition - (1 - smoothing) * logits.gather(1, picked)
    if smoothing:
        losses -= smoothing * logits.mean(dim=1, keepdim=True)
    if z_loss:
        losses += z_loss * partition.square()
    grad = logits.sub_(partition).exp_()
    if z_loss:
        grad *= 1 + 2 * z_loss * partition
    if smoothing:
        grad -= smoothing / logits.shape[1]
    grad.scatter_add_(1, picked, torch.full_like(partition, smoothing - 1))
    return losses.mul_(counted).sum(), grad.mul_(counted)
