"""Ranks and recall against loops in float64."""

import math
from itertools import permutations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

import trunkline.modules.metrics.retrieval as retrieval
from trunkline.modules.metrics.retrieval import chance_ranks, retrieval_metrics, retrieval_ranks


def brute(queries: Tensor, gallery: Tensor, query_keys: list[int], gallery_keys: list[int]) -> list[int]:
    ranks = []
    for query, key in zip(queries.double().tolist(), query_keys, strict=True):
        cosines = [math.fsum(a * b for a, b in zip(query, row, strict=True)) for row in gallery.double().tolist()]
        best = max(c for c, k in zip(cosines, gallery_keys, strict=True) if k == key)
        ranks.append(1 + sum(c >= best and k != key for c, k in zip(cosines, gallery_keys, strict=True)))
    return ranks


@pytest.mark.parametrize("elements", [1, 100, 2**24])
@pytest.mark.parametrize("keys", [list(range(30)), [n % 7 for n in range(30)]])
def test_against_a_loop(elements: int, keys: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval, "COSINES_AT_ONCE", elements)
    image, text = normalize(torch.randn(30, 4), dim=1), normalize(torch.randn(41, 4), dim=1)
    text_keys = keys + keys[:11]
    ranks = {
        "image_to_text": brute(image, text, keys, text_keys),
        "text_to_image": brute(text, image, text_keys, keys),
    }
    assert retrieval_ranks(image, text, torch.tensor(keys), torch.tensor(text_keys)).tolist() == ranks["image_to_text"]
    found = retrieval_metrics(image, text, torch.tensor(keys), torch.tensor(text_keys))
    want = {f"{way}_R@{k}": np.mean([r <= k for r in rank]) for way, rank in ranks.items() for k in (1, 5, 10)}
    want |= {f"{way}_median_rank": np.median(rank) for way, rank in ranks.items()}
    assert {name: value.item() for name, value in found.items()} == pytest.approx(want)
    assert 0 < want["image_to_text_R@5"] < 1


def test_what_is_all_the_same_finds_nothing() -> None:
    same = normalize(torch.ones(20, 8), dim=1)
    found = retrieval_metrics(same, same, torch.arange(20), torch.arange(20))
    assert all(value == (20 if "median" in name else 0) for name, value in found.items())


def test_what_is_no_number_finds_nothing() -> None:
    """A network that has diverged must not look perfect."""
    lost = torch.full((20, 8), torch.nan)
    found = retrieval_metrics(lost, lost, torch.arange(20), torch.arange(20))
    assert all(value == (20 if "median" in name else 0) for name, value in found.items())


def test_a_tie_counts_against_the_query() -> None:
    gallery = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    for right, rank in ((0, 2), (1, 2), (2, 3)):
        assert retrieval_ranks(gallery[:1], gallery, torch.tensor([right]), torch.arange(3)).tolist() == [rank]
    # Another right answer is no rival.
    assert retrieval_ranks(gallery[:1], gallery, torch.tensor([0]), torch.tensor([0, 0, 1])).tolist() == [1]


def test_chance_over_all_orders() -> None:
    queries, gallery = [0, 1, 1, 2], [0, 0, 0, 1, 1, 2]
    ranks = np.array([[min(p.index(n) for n in range(6) if gallery[n] == q) + 1 for q in queries]
                      for p in permutations(range(6))])  # fmt: skip
    want = [(ranks <= k).mean() for k in range(1, 7)]
    np.testing.assert_allclose(chance_ranks(torch.tensor(queries), torch.tensor(gallery)), want)
    np.testing.assert_allclose(chance_ranks(torch.arange(9), torch.arange(9)), np.arange(1, 10) / 9)
