"""Retrieval by cosine similarity: the rank of a query's right answer, and the recall that chance would give.

Needs torch only. Shape legend: Q queries, G gallery (what is searched), E size of an embedding.
"""

import torch
from torch import Tensor

RECALL_AT = (1, 5, 10)
COSINES_AT_ONCE = 2**24
"""Largest number of cosines in memory at once."""


@torch.no_grad()
def retrieval_ranks(queries: Tensor, gallery: Tensor, query_keys: Tensor, gallery_keys: Tensor) -> Tensor:
    """Rank of the best right answer to each query, counted from 1.

    Of equally similar answers the wrong ones come first, and NaN counts as more similar than anything. So embeddings
    that are all the same, or NaN, find nothing.

    Args:
        queries: (Q, E) of length 1.
        gallery: (G, E) of length 1.
        query_keys: (Q,) integers; the right answers to a query are those with the same key.
        gallery_keys: (G,) integers, among them the key of every query.

    Returns:
        (Q,) int64.
    """
    ranks = []
    size = max(1, COSINES_AT_ONCE // len(gallery))
    for part, keys in zip(queries.split(size), query_keys.split(size), strict=True):
        cosines, right = part @ gallery.T, keys[:, None] == gallery_keys  # (q, G)
        best = cosines.masked_fill(~right, -torch.inf).amax(dim=1, keepdim=True)
        ranks.append(1 + (~(cosines < best) & ~right).sum(dim=1))
    return torch.cat(ranks)


def retrieval_metrics(image: Tensor, text: Tensor, image_keys: Tensor, text_keys: Tensor) -> dict[str, Tensor]:
    """Recall at 1, 5 and 10 and the median rank, from image to text and from text to image.

    Recall at k is the share of queries with a right answer among the k most similar ones.

    Args:
        image: (N, E) of length 1.
        text: (M, E) of length 1.
        image_keys: (N,) integers; an image and a text belong together if their keys are equal.
        text_keys: (M,) integers.

    Returns:
        Scalars under open_clip's names, such as `text_to_image_R@10` and `image_to_text_median_rank`.
    """
    sides = {
        "image_to_text": (image, text, image_keys, text_keys),
        "text_to_image": (text, image, text_keys, image_keys),
    }
    metrics: dict[str, Tensor] = {}
    for name, side in sides.items():
        ranks = retrieval_ranks(*side)
        metrics |= {f"{name}_R@{k}": (ranks <= k).float().mean() for k in RECALL_AT}
        metrics[f"{name}_median_rank"] = ranks.float().quantile(0.5)
    return metrics


def chance_ranks(query_keys: Tensor, gallery_keys: Tensor) -> Tensor:
    """Recall at 1, 2, …, G when the gallery is in random order.

    Args:
        query_keys: (Q,) integers, as in `retrieval_ranks`.
        gallery_keys: (G,) integers.

    Returns:
        (G,) float64; entry k - 1 is the probability of a right answer among the first k, averaged over the queries.
    """
    keys, counts = gallery_keys.unique(return_counts=True)
    rights, queries = counts[torch.searchsorted(keys, query_keys)].unique(return_counts=True)
    total, place = len(gallery_keys), torch.arange(len(gallery_keys), device=keys.device)
    # Probability that the next answer is wrong if all before it were wrong; a row for each distinct number of right
    # answers: (distinct numbers, G)
    wrong = (total - rights[:, None] - place).clamp(min=0).double() / (total - place)
    return queries.double() @ (1 - wrong.cumprod(dim=1)) / queries.sum()
