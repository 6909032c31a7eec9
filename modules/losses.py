"""Losses: pure functions of tensors. Needs torch alone.

Shape legend: N tokens, D width, V vocabulary; of pairs B own ones, G those of all processes, E numbers of an embedding.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

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
    keys: tuple[Tensor, Tensor] | None = None,
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
        keys: (N,) and (V,); a class with the key of a token's target, but not the target itself, is no wrong answer
            to that token: it is left out. Not with label smoothing.
        chunk: tokens at a time; None chooses by the vocabulary.

    Returns:
        A scalar, float32 or wider; divide it by the number of targets for the mean.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    return _LinearCrossEntropy.apply(x, weight, bias, target, label_smoothing, z_loss, keys, chunk)


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
        keys: tuple[Tensor, Tensor] | None,
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
                if keys is not None:
                    logits.masked_fill_(_others_of_key(keys[0][part], keys[1], target[part]), -torch.inf)
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
            *(None,) * 5,
        )


def _others_of_key(own: Tensor, keys: Tensor, target: Tensor) -> Tensor:
    """(n, V), True where a class has a row's key and is not its target; of (n,), (V,) and (n,)."""
    return (own[:, None] == keys).scatter_(1, target.clamp(min=0)[:, None], False)


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


def infonce_loss(
    image: Tensor,
    text: Tensor,
    images: Tensor,
    texts: Tensor,
    factor: Tensor,
    start: int = 0,
    keys: Tensor | None = None,
) -> Tensor:
    """Sum over own pairs of CLIP's symmetric loss (arXiv:2103.00020): each image names its text among all, and back.

    Args:
        image: (B, E) own embeddings of length 1.
        text: (B, E) likewise.
        images: (G, E) those of all processes, the own ones from row `start` on.
        texts: (G, E) likewise.
        factor: of the cosines, the inverse temperature.
        start: see `images`.
        keys: (G,) of the texts; pairs of equal key are not held against each other.

    Returns:
        A scalar; over all processes' sums divided by G it is the mean, of which ln G is the level of chance.
    """
    target = torch.arange(start, start + len(image), device=image.device)
    both = None if keys is None else (keys[target], keys)
    with torch.autocast(image.device.type, enabled=False):  # cosines times 100 are too coarse in bfloat16
        to_texts = linear_cross_entropy(factor * image, texts, target, keys=both)
        to_images = linear_cross_entropy(factor * text, images, target, keys=both)
    return (to_texts + to_images) / 2


def sigmoid_loss(
    image: Tensor, texts: Tensor, factor: Tensor, bias: Tensor, start: int = 0, keys: Tensor | None = None
) -> Tensor:
    """Sum over own images of SigLIP's loss (arXiv:2303.15343): does a text belong to an image, for each text.

    Args:
        image: (B, E) own embeddings of length 1.
        texts: (G, E) those of all processes, the own ones from row `start` on.
        factor: of the cosines.
        bias: added to them.
        start: see `texts`.
        keys: (G,) of the texts; pairs of equal key are not held against each other.

    Returns:
        A scalar; the sum over all processes divided by G is the paper's.
    """
    target = torch.arange(start, start + len(image), device=image.device)

    def part_loss(image: Tensor, target: Tensor, texts: Tensor, factor: Tensor, bias: Tensor) -> Tensor:
        logits = factor * (image @ texts.T) + bias  # (b, G)
        sign = torch.ones_like(logits).scatter_(1, target[:, None], -1.0)
        losses = F.softplus(sign * logits)
        if keys is not None:
            losses = losses.masked_fill(_others_of_key(keys[target], keys, target), 0.0)
        return losses.sum()

    with torch.autocast(image.device.type, enabled=False):
        parts = [
            checkpoint(part_loss, image[part], target[part], texts, factor, bias, use_reentrant=False)
            for part in _chunks(len(image), len(texts), None)
        ]
    return torch.stack(parts).sum()
