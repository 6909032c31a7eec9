"""What fine-tuning is measured against: characters' n-grams and a logistic regression."""

from trunkline.datamodules.text_tasks.labelled_text import LabelledTextData


def ngram_accuracy(data: LabelledTextData) -> float:
    """Accuracy of scikit-learn's logistic regression over TF-IDF of 1 to 4 characters, without any pre-training.

    Args:
        data: its training rows are learnt; the test split's are counted, or if there is none the validation split's.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    splits = data.read()
    texts = {split: [" ".join(data.texts(row)) for row in rows] for split, (rows, _) in splits.items()}
    held_out = "test" if "test" in splits else "val"
    vectorizer = TfidfVectorizer(analyzer="char_wb", ngram_range=(1, 4))
    model = LogisticRegression(max_iter=1000).fit(vectorizer.fit_transform(texts["train"]), splits["train"][1])
    return float(model.score(vectorizer.transform(texts[held_out]), splits[held_out][1]))
