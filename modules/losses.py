"""Losses: pure functions of tensors. Needs only torch.

Shape legend: N tokens, D width, V vocabulary size; B pairs of this process, G pairs of all processes, E size of an
embedding.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from trunkline import TrunklineError
from trunkline.contract import IGNORE

LOGITS_AT_ONCE = 2**25
"""Logits in memory at once: 128 MiB in float32, and the matrices are still large enough to multiply at full speed."""
BLOCK = 2**18
"""Logits of which one core of a CPU computes the softmax at once: 1 MiB in float32, which its cache holds."""


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
    """Sum of the cross-entropies of the logits `x @ weight.T + bias`, without ever holding all (N, V) logits.

    The tokens are processed in chunks. The gradients of a chunk are computed together with its loss, so that there are
    three matrix products in all, as many as without chunks. Under autocast the products have autocast's type; the
    softmax is always float32.

    Args:
        x: (N, D) states.
        weight: (V, D) weight of the output layer.
        target: (N,) token ids; -100 is not counted.
        bias: (V,) bias of the output layer.
        label_smoothing: share of the target spread evenly over the vocabulary (arXiv:1512.00567).
        z_loss: factor of the squared log-partition, which keeps logits from drifting (arXiv:2204.02311).
        keys: (N,) keys of the tokens and (V,) keys of the classes. A class that has the same key as a token, but is
            not its target, is left out of that token's softmax. Not possible with label smoothing.
        chunk: tokens in a chunk; None chooses by the size of the vocabulary.

    Returns:
        A scalar, float32 or wider; divide it by the number of targets for the mean.
    """
    if keys is not None and label_smoothing:
        raise TrunklineError("label smoothing spreads the target over classes that `keys` leaves out; use one of them")
    device = x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    return _LinearCrossEntropy.apply(x, weight, bias, target, label_smoothing, z_loss, keys, chunk)


@torch.no_grad()
def token_losses(x: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each token (N,), and the likeliest tokens (N,); for evaluation, also in chunks."""
    parts = []
    for part in _chunks(len(x), len(weight), None):
        logits = F.linear(x[part], weight, bias).float()
        parts.append((F.cross_entropy(logits, target[part], reduction="none"), logits.argmax(dim=-1)))
    losses, best = zip(*parts, strict=True)
    return torch.cat(losses), torch.cat(best)


def _chunks(tokens: int, vocabulary: int, size: int | None) -> Iterator[slice]:
    """Slices of equal length, each with about LOGITS_AT_ONCE logits."""
    count = max(1, -(-tokens * vocabulary // LOGITS_AT_ONCE))
    size = size or max(1, -(-tokens // count))
    return (slice(start, min(start + size, tokens)) for start in range(0, max(tokens, 1), size))


class _LinearCrossEntropy(torch.autograd.Function):
    """The computation of `linear_cross_entropy`; its forward pass computes the gradients too."""

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
        parts = list(_chunks(len(x), len(weight), chunk))
        memory = x.new_empty(len(x[parts[0]]), len(weight))  # each chunk uses it again, because new pages are slow
        with torch.autocast(x.device.type, enabled=False):  # the inputs have the right types already
            for part in parts:
                logits = _product(x[part], weight, bias, memory[: len(x[part])])  # (n, V)
                counted = (target[part] != IGNORE)[:, None]
                part_keys = None if keys is None else (keys[0][part], keys[1])
                losses, grad = _block_by_block(logits, target[part], smoothing, z_loss, part_keys, wide)
                total += losses.mul_(counted).sum()
                if grad_x is not None:
                    torch.mm(grad, weight, out=grad_x[part]).mul_(counted)
                if grad_weight is not None and wide == x.dtype:
                    grad_weight.addmm_(grad.T, x[part] * counted)
                elif grad_weight is not None:
                    grad_weight += grad.T @ (x[part] * counted)
                if grad_bias is not None:
                    grad_bias += grad.mul_(counted).sum(dim=0)
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


def _same_key_not_target(row_keys: Tensor, class_keys: Tensor, target: Tensor) -> Tensor:
    """Mask (n, V), True where a class has the same key as the row but is not the row's target.

    `row_keys` and `target` are (n,), `class_keys` is (V,).
    """
    return (row_keys[:, None] == class_keys).scatter_(1, target.clamp(min=0)[:, None], False)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """Logits (n, V) of the states x (n, D), written to `out`."""
    if bias is None:
        return torch.mm(x, weight.T, out=out)
    return torch.addmm(bias, x, weight.T, out=out)


def _block_by_block(
    logits: Tensor,
    target: Tensor,
    smoothing: float,
    z_loss: float,
    keys: tuple[Tensor, Tensor] | None,
    wide: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Losses (n, 1) of (n, V) logits in the `wide` type, and their gradients, which overwrite the logits in memory.

    Those of tokens that are not counted are not zero yet. A few rows at a time go through all steps, so that a CPU's
    cache holds them.
    """
    rows, vocabulary = logits.shape
    at_once = BLOCK * torch.get_num_threads() if logits.device.type == "cpu" else LOGITS_AT_ONCE // 4
    count = max(1, at_once // max(vocabulary, 1))
    losses = logits.new_empty(rows, 1, dtype=wide)
    spare, copy = (logits.new_empty(min(count, rows), vocabulary, dtype=wide) for _ in range(2))
    for start in range(0, rows, count):
        block = slice(start, min(start + count, rows))
        size = block.stop - start
        values = logits[block] if wide == logits.dtype else copy[:size].copy_(logits[block])
        if keys is not None:
            values.masked_fill_(_same_key_not_target(keys[0][block], keys[1], target[block]), -torch.inf)
        losses[block], grad = _losses_and_gradient(values, target[block], smoothing, z_loss, spare[:size])
        if wide != logits.dtype:
            logits[block] = grad
    return losses, logits


def _log_partition(logits: Tensor, spare: Tensor) -> Tensor:
    """The same as `logits.logsumexp(dim=1, keepdim=True)`, but the exponentials are written to `spare`."""
    largest = logits.amax(dim=1, keepdim=True)
    largest = torch.where(largest.abs() == torch.inf, 0, largest)
    return torch.sub(logits, largest, out=spare).exp_().sum(dim=1, keepdim=True).log_().add_(largest)


def _losses_and_gradient(
    logits: Tensor, target: Tensor, smoothing: float, z_loss: float, spare: Tensor
) -> tuple[Tensor, Tensor]:
    """Losses (n, 1) of (n, V) logits, and their gradient, which overwrites the logits; `spare` is overwritten too."""
    picked = target.clamp(min=0)[:, None]  # (n, 1)
    partition = _log_partition(logits, spare)  # (n, 1)
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
    return losses, grad


def infonce_loss(
    image: Tensor,
    text: Tensor,
    images: Tensor,
    texts: Tensor,
    factor: Tensor,
    start: int = 0,
    keys: Tensor | None = None,
) -> Tensor:
    """CLIP's symmetric loss (arXiv:2103.00020), summed over the pairs of this process.

    Each image must find its text among all texts, and each text its image among all images.

    Args:
        image: (B, E) image embeddings of this process, of length 1.
        text: (B, E) text embeddings of this process, of length 1.
        images: (G, E) image embeddings of all processes; those of this process begin at row `start`.
        texts: (G, E) text embeddings of all processes, in the same order.
        factor: inverse temperature, which multiplies the cosines.
        start: first row of this process in `images` and `texts`.
        keys: (G,) keys of the texts; pairs with equal keys are not each other's wrong answers.

    Returns:
        A scalar. The sum over all processes divided by G is the mean loss; guessing gives ln G.
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
    """SigLIP's loss (arXiv:2303.15343), summed over the images of this process.

    For each image and each text it asks whether the two belong together.

    Args:
        image: (B, E) image embeddings of this process, of length 1.
        texts: (G, E) text embeddings of all processes, of length 1; those of this process begin at row `start`.
        factor: multiplies the cosines.
        bias: added to the scaled cosines.
        start: first row of this process in `texts`.
        keys: (G,) keys of the texts; pairs with equal keys are not each other's wrong answers.

    Returns:
        A scalar. The sum over all processes divided by G is the paper's loss.
    """
    target = torch.arange(start, start + len(image), device=image.device)

    def part_loss(image: Tensor, target: Tensor, texts: Tensor, factor: Tensor, bias: Tensor) -> Tensor:
        logits = factor * (image @ texts.T) + bias  # (b, G)
        sign = torch.ones_like(logits).scatter_(1, target[:, None], -1.0)
        losses = F.softplus(sign * logits)
        if keys is not None:
            losses = losses.masked_fill(_same_key_not_target(keys[target], keys, target), 0.0)
        return losses.sum()

    with torch.autocast(image.device.type, enabled=False):
        parts = [
            checkpoint(part_loss, image[part], target[part], texts, factor, bias, use_reentrant=False)
            for part in _chunks(len(image), len(texts), None)
        ]
    return torch.stack(parts).sum()
