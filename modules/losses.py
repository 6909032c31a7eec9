"""Losses: pure functions of tensors. Needs only torch.

Shape legend: N tokens, D width, V vocabulary size; B pairs of this process, G pairs of all processes, E size of an
embedding.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from trunkline import TrunklineError
from trunkline.modules.attention_kernels import product_dtype
from trunkline.modules.chunked_cross_entropy import ChunkedCrossEntropy, chunks, same_key_not_target


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
    compiled: bool | None = None,
) -> Tensor:
    """Sum of the cross-entropies of the logits `x @ weight.T + bias`, without ever holding all (N, V) logits.

    The tokens are processed in chunks. The gradients of a chunk are computed together with its loss, so that there are
    three matrix products in all, as many as without chunks. Under autocast the products have autocast's type; the
    softmax is always float32, and so is what scales the gradients and adds up those of the weight.

    Args:
        x: (N, D) states.
        weight: (V, D) weight of the output layer.
        target: (N,) token ids; -100 is not counted.
        bias: (V,) bias of the output layer.
        label_smoothing: share of the target spread evenly over the vocabulary (arXiv:1512.00567).
        z_loss: factor of the squared log-partition, which keeps logits from drifting (arXiv:2204.02311).
        keys: (N,) keys of the tokens and (V,) keys of the classes. A class that has the same key as a token, but is
            not its target, is left out of that token's softmax. Not possible with label smoothing.
        chunk: tokens in a chunk; None chooses by the size of the vocabulary and the memory of the device.
        compiled: compile what is between the matrix products, with torch.compile; None does so on NVIDIA and AMD GPUs.
            Where that fails, a warning says so, and the result is the same.

    Returns:
        A scalar, float32 or wider; divide it by the number of targets for the mean.
    """
    if keys is not None and label_smoothing:
        raise TrunklineError("label smoothing spreads the target over classes that `keys` leaves out; use one of them")
    options = (label_smoothing, z_loss, chunk, x.is_cuda if compiled is None else compiled)
    return ChunkedCrossEntropy.apply(product_dtype(x), x, weight, bias, target, *(keys or (None, None)), *options)


@torch.no_grad()
def token_losses(x: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each token (N,), and the likeliest tokens (N,); for evaluation, also in chunks."""
    parts = []
    for part in chunks(len(x), len(weight), None):
        logits = F.linear(x[part], weight, bias).float()
        parts.append((F.cross_entropy(logits, target[part], reduction="none"), logits.argmax(dim=-1)))
    losses, best = zip(*parts, strict=True)
    return torch.cat(losses), torch.cat(best)


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
            losses = losses.masked_fill(same_key_not_target(keys[target], keys, target), 0.0)
        return losses.sum()

    with torch.autocast(image.device.type, enabled=False):
        parts = [
            checkpoint(part_loss, image[part], target[part], texts, factor, bias, use_reentrant=False)
            for part in chunks(len(image), len(texts), None)
        ]
    return torch.stack(parts).sum()
