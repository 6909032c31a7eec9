"""Baselines without a network: logistic regression on character n-grams."""

from collections.abc import Iterable, Sequence
from itertools import islice

import numpy as np

from trunkline.datamodules.text_tasks.labelled_text import LabelledTextData
from trunkline.datamodules.translation.dates import open_dates
from trunkline.datamodules.translation.text_pairs import Pair

DATE_PARTS = {
    "century": slice(0, 2),
    "decade": slice(2, 3),
    "year": slice(3, 4),
    "month": slice(5, 7),
    "day": slice(8, 10),
}
"""Part of a date -> its characters in ISO 8601. A year that is not in the training strings has parts that are."""


def ngram_accuracy(data: LabelledTextData) -> float:
    """Accuracy of scikit-learn's logistic regression on TF-IDF of 1 to 4 characters, without pre-training.

    Args:
        data: the regression is fitted to its training split, and tested on its test split, or on its validation split
            if there is no test split.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    splits = data.read()
    texts = {split: [" ".join(data.texts(row)) for row in rows] for split, (rows, _) in splits.items()}
    held_out = "test" if "test" in splits else "val"
    vectorizer = TfidfVectorizer(analyzer="char_wb", ngram_range=(1, 4))
    model = LogisticRegression(max_iter=1000).fit(vectorizer.fit_transform(texts["train"]), splits["train"][1])
    return float(model.score(vectorizer.transform(texts[held_out]), splits[held_out][1]))


def date_matches(names: Sequence[str], rows: int | None = None) -> dict[str, float]:
    """Share of exactly right dates, if a logistic regression predicts each part of the date from 1 to 5 characters.

    n-grams across word borders tell a number in the day from the same number in the year. The regressions are one class
    against the rest, fitted by stochastic gradient descent, so that all training strings take about 80 seconds of CPU
    time. The settings were chosen on `dates:val`.

    Args:
        names: held-out sets of dates, such as `dates:years`.
        rows: number of training strings; None uses all.

    Returns:
        name of the set -> share.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import SGDClassifier

    sources, targets = sides(islice(open_dates("dates").pairs(), rows))
    tests = {name: sides(open_dates(name).pairs()) for name in names}
    vectorizer = TfidfVectorizer(
        analyzer="char", ngram_range=(1, 5), sublinear_tf=True, min_df=3, lowercase=False, dtype=np.float32
    )
    features = vectorizer.fit_transform(sources)
    held_out = {name: vectorizer.transform(test) for name, (test, _) in tests.items()}
    right = {name: np.ones(len(test), dtype=bool) for name, (test, _) in tests.items()}
    for part in DATE_PARTS.values():
        model = SGDClassifier(loss="log_loss", alpha=1e-6, max_iter=3, tol=None, random_state=0, n_jobs=-1)
        model.fit(features, [target[part] for target in targets])
        for name, (_, truth) in tests.items():
            right[name] &= model.predict(held_out[name]) == [target[part] for target in truth]
    return {name: float(matches.mean()) for name, matches in right.items()}


def sides(pairs: Iterable[Pair]) -> tuple[list[str], list[str]]:
    """Sources and targets."""
    both = [(pair.source, pair.target) for pair in pairs]
    return [source for source, _ in both], [target for _, target in both]
