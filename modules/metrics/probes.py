"""Probes: how well simple classifiers do on the features of a frozen network."""

from typing import NamedTuple

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

TEMPERATURE = 0.07
"""Divides the cosine by which a neighbour's vote is weighted."""
STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
"""Values of C, the inverse of the regularisation, that a linear probe chooses from."""


class Labelled(NamedTuple):
    """Features and their classes."""

    features: np.ndarray
    """(N, D)."""
    labels: np.ndarray
    """(N,) class numbers."""


def knn_accuracy(train: Labelled, test: Labelled, k: int) -> float:
    """Accuracy of a nearest-neighbour classifier on the test rows.

    The `k` training rows of highest cosine vote, each with the weight exp(cosine / 0.07), as in DINO (arXiv:2104.14294)
    and before it in arXiv:1805.01978.
    """
    voters = KNeighborsClassifier(k, metric="cosine", weights=lambda distance: np.exp((1 - distance) / TEMPERATURE))
    return float(voters.fit(*train).score(*test))


def linear_probe_accuracy(train: Labelled, val: Labelled, test: Labelled) -> tuple[float, float]:
    """Accuracy of a logistic regression on the test rows, and its C.

    Features are standardised. C is the one of `STRENGTHS` that does best on the validation rows after learning from the
    training rows; the probe that is tested has then learned from both.
    """

    def fitted(strength: float, rows: Labelled) -> LogisticRegression:
        return make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=1000)).fit(*rows)

    best = max(STRENGTHS, key=lambda strength: fitted(strength, train).score(*val))
    both = Labelled(*(np.concatenate(parts) for parts in zip(train, val, strict=True)))
    return float(fitted(best, both).score(*test)), best
