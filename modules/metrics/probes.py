"""Probes: accuracy of simple classifiers on the features of a frozen network."""

from typing import NamedTuple

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

TEMPERATURE = 0.07
"""A neighbour's vote has the weight exp(cosine / TEMPERATURE)."""
STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
"""Values of C, the inverse strength of the regularisation, that a linear probe tries."""


class Labelled(NamedTuple):
    """Features and their classes."""

    features: np.ndarray
    """(N, D)."""
    labels: np.ndarray
    """(N,) class numbers."""


def knn_accuracy(train: Labelled, test: Labelled, k: int) -> float:
    """Accuracy of a nearest-neighbour classifier on the test rows.

    The `k` training rows with the highest cosines vote, each with the weight exp(cosine / 0.07), as in arXiv:1805.01978
    and in DINO (arXiv:2104.14294).
    """
    voters = KNeighborsClassifier(k, metric="cosine", weights=lambda distance: np.exp((1 - distance) / TEMPERATURE))
    return float(voters.fit(*train).score(*test))


def linear_probe_accuracy(train: Labelled, val: Labelled, test: Labelled) -> tuple[float, float]:
    """Accuracy of a logistic regression on the test rows, and its C.

    Features are standardised. C is the value in `STRENGTHS` with the best accuracy on the validation rows after fitting
    the training rows. The probe that is tested is then fitted to both.
    """

    def fitted(strength: float, rows: Labelled) -> LogisticRegression:
        return make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=1000)).fit(*rows)

    best = max(STRENGTHS, key=lambda strength: fitted(strength, train).score(*val))
    both = Labelled(*(np.concatenate(parts) for parts in zip(train, val, strict=True)))
    return float(fitted(best, both).score(*test)), best
