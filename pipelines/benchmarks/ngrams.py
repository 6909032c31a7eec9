"""A baseline for fine-tuning: logistic regression on character n-grams."""

from trunkline.datamodules.text_tasks.labelled_text import LabelledTextData


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
