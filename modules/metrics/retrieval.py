"""Finding the right partner by cosine: ranks, and what is reported of them. Needs torch alone.

Shape legend: Q queries, G gallery, E numbers of an embedding.
"""

import torch
from torch import Tensor

RECALL_AT = (1, 5, 10)
CHUNK_ELEMENTS = 2**24
"""Cosines held at a time."""


@torch.no_grad()
def retrieval_ranks(queries: Tensor, gallery: Tensor, query_keys: Tensor, gallery_keys: Tensor) -> Tensor:
    """Rank, from 1, of the best right answer to each query; a wrong one that is as similar comes first.

    So embeddings that are all the same, or no numbers, find nothing.

    Args:
        queries: (Q, E) of length 1.
        gallery: (G, E) of length 1.
        query_keys: (Q,) integers; right answers are those of equal key.
        gallery_keys: (G,), with every query's key among them.

    Returns:
        (Q,) int64.
    """
    ranks = []
    size = max(1, CHUNK_ELEMENTS // len(gallery))
    for part, keys in zip(queries.split(size), query_keys.split(size), strict=True):
        cosines, right = part @ gallery.T, keys[:, None] == gallery_keys  # (q, G)
        best = cosines.masked_fill(~right, -torch.inf).amax(dim=1, keepdim=True)
        ranks.append(1 + (~(cosines < best) & ~right).sum(dim=1))
    return torch.cat(ranks)


def retrieval_metrics(image: Tensor, text: Tensor, image_keys: Tensor, text_keys: Tensor) -> dict[str, Tensor]:
    """Recall at 1, 5 and 10, the share of queries with a right answer among so many, and median rank, both ways.

    Args:
        image: (N, E) of length 1.
        text: (M, E) of length 1.
        image_keys: (N,) integers, see `retrieval_ranks`.
        text_keys: (M,).

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
    """(G,) float64 probabilities that of a random order's first 1, 2, … G answers one is right, over all queries.

    Args:
        query_keys: see `retrieval_ranks`.
        gallery_keys: see there.
    """
    keys, counts = gallery_keys.unique(return_counts=True)
    rights, queries = counts[torch.searchsorted(keys, query_keys)].unique(return_counts=True)
    total, place = len(gallery_keys), torch.arange(len(gallery_keys), device=keys.device)
    # Of the next answer being wrong too, if all before it were.
    wrong = (total - rights[:, None] - place).clamp(min=0).double() / (total - place)
    return queries.double() @ (1 - wrong.cumprod(dim=1)) / queries.sum()
