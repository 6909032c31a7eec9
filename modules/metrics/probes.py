"""How good frozen features are: what simple classifiers on them get right."""

from typing import NamedTuple

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

TEMPERATURE = 0.07
"""Of the neighbours' votes."""
STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
"""Inverse regularisation strengths C that a linear probe tries."""


class Labelled(NamedTuple):
    """Features and what they are of."""

    features: np.ndarray
    """(N, D)."""
    labels: np.ndarray
    """(N,) class numbers."""


def knn_accuracy(train: Labelled, test: Labelled, k: int) -> float:
    """Share of the test rows whose `k` nearest training rows by cosine vote for the right class.

    Votes count by exp(cosine / 0.07) (arXiv:1805.01978, as DINO takes it).
    """
    voters = KNeighborsClassifier(k, metric="cosine", weights=lambda distance: np.exp((1 - distance) / TEMPERATURE))
    return float(voters.fit(*train).score(*test))


def linear_probe_accuracy(train: Labelled, val: Labelled, test: Labelled) -> tuple[float, float]:
    """Accuracy on the test rows of a logistic regression on standardised features, and its C.

    C is the one of `STRENGTHS` that does best on the validation rows; then the probe learns from them too.
    """

    def fitted(strength: float, rows: Labelled) -> LogisticRegression:
        return make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=1000)).fit(*rows)

    best = max(STRENGTHS, key=lambda strength: fitted(strength, train).score(*val))
    both = Labelled(*(np.concatenate(parts) for parts in zip(train, val, strict=True)))
    return float(fitted(best, both).score(*test)), best
