"""The measurements of `trunkline evaluate`: retrieval, zero-shot classification, nearest neighbours, linear probes."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchmetrics.functional.classification import multiclass_accuracy

from trunkline import TrunklineError
from trunkline.datamodules.images.image_data import ImageData
from trunkline.datamodules.images.image_sources import ImageRows
from trunkline.datamodules.pairs.pair_sources import PairRows
from trunkline.modules.metrics.probes import Labelled, knn_accuracy, linear_probe_accuracy
from trunkline.modules.metrics.retrieval import chance_ranks, retrieval_metrics
from trunkline.modules.networks.clip import unit
from trunkline.pipelines.embedding import ImageNetwork, Pictures, embed_images, embed_texts, pooled
from trunkline.pipelines.evaluation.results import Result


class Runner(NamedTuple):
    """A network and the settings with which it embeds pictures and texts."""

    network: ImageNetwork
    batch_size: int
    device: torch.device
    num_workers: int
    skip_corrupt: bool


def choose_split(split: str | None, rows: Mapping[str, Any], source: str) -> str:
    """The given split; for None the test split, or the validation split if there is no test split.

    Raises:
        TrunklineError: if the source does not have this split.
    """
    if split is None:
        split = "test" if "test" in rows else "val"
    if split not in rows:
        raise TrunklineError(
            f"{source} has no {split} split, only {', '.join(rows)}; set {split}_fraction or {split}_split",
            "data.source",
        )
    return split


class CaptionedPictures(Pictures):
    """Pictures with captions. A picture whose captions cannot be read is skipped like a broken picture."""

    rows: PairRows

    def read(self, row: int) -> dict[str, Any]:
        self.rows.captions(row)  # raises an error if they cannot be read
        return super().read(row)


def retrieval(run: Runner, rows: PairRows, captions: str) -> list[Result]:
    """Recall and median rank, from image to text and from text to image.

    As in validation, images with the same first caption count as equal: all of their texts are right answers.
    """
    _, preprocessing, clip, encoder = run.network
    assert clip is not None
    assert encoder is not None
    pictures = CaptionedPictures(rows, len(rows), preprocessing, run.skip_corrupt)
    images, kept = embed_images(clip.encode_image, pictures, run.batch_size, run.device, run.num_workers)
    numbers: dict[str, int] = {}
    texts, text_keys, image_keys = [], [], []
    for own in (rows.captions(row) for row in kept):
        key = numbers.setdefault(own[0], len(numbers))
        own = own[:1] if captions == "first" else own
        texts += own
        text_keys += [key] * len(own)
        image_keys.append(key)
    found = embed_texts(clip, encoder, texts, run.batch_size, run.device)
    keys = torch.tensor(image_keys), torch.tensor(text_keys)
    metrics = retrieval_metrics(images, found, *keys)
    chances = {"image_to_text": chance_ranks(*keys), "text_to_image": chance_ranks(*reversed(keys))}
    results = []
    for name, value in metrics.items():
        way, _, measure = name.rpartition("_R@")
        if way:
            chance = float(chances[way][min(int(measure), len(chances[way])) - 1])
        else:
            chance = 1.0 + int((chances[name.removesuffix("_median_rank")] < 0.5).sum())
        results.append(Result("retrieval", name, float(value), chance))
    return results


class Features:
    """Pooled features of the image trunk on the splits of labelled images. Each split is computed once."""

    def __init__(self, run: Runner, data: ImageData) -> None:
        data.setup("test")
        self.run, self.source, self.found = run, data.source, dict[str, Labelled]()
        self.rows: dict[str, ImageRows] = {split: dataset.rows for split, dataset in data.datasets.items()}  # type: ignore[attr-defined]

    def of(self, split: str) -> Labelled:
        """Features and labels of a split."""
        if split not in self.found:
            rows, run = self.rows[split], self.run
            pictures = Pictures(rows, len(rows.labels), run.network.preprocessing, run.skip_corrupt)
            encode = pooled(run.network.trunk)
            features, kept = embed_images(encode, pictures, run.batch_size, run.device, run.num_workers)
            self.found[split] = Labelled(features.numpy(), rows.labels[kept])
        return self.found[split]

    def learning(self, split: str, task: str) -> Labelled:
        """Features and labels of the training split.

        Args:
            split: the split that the task is measured on.
            task: its name, for the error message.

        Raises:
            TrunklineError: if the task is measured on the training split itself.
        """
        if split == "train":
            raise TrunklineError(f"{task} learns from the training split; set split to val or test", "split")
        return self.of("train")


def zero_shot(run: Runner, test: Labelled, names: Sequence[str], templates: Sequence[str]) -> list[Result]:
    """Top-1 and top-5 accuracy, where classes are ranked by the similarity of their texts to the image."""
    clip, device = run.network.clip, run.device
    with torch.inference_mode():
        assert clip is not None
        images = unit(clip.image.head(torch.from_numpy(test.features).to(device))).cpu()
    cosines, labels = images @ class_embeddings(run, names, templates).T, torch.from_numpy(test.labels)
    results = []
    for top in (n for n in (1, 5) if n < len(names)):
        accuracy = multiclass_accuracy(cosines, labels, num_classes=len(names), top_k=top, average="micro")
        results.append(Result("zero_shot", f"top{top}", float(accuracy), top / len(names)))
    return results


def class_embeddings(run: Runner, names: Sequence[str], templates: Sequence[str]) -> Tensor:
    """(classes, E): for each class the mean embedding of its prompts, scaled to length 1 (arXiv:2103.00020, 3.1.4)."""
    _, _, clip, encoder = run.network
    assert clip is not None
    assert encoder is not None
    prompts = [template.replace("{}", name) for name in names for template in templates]
    found = embed_texts(clip, encoder, prompts, run.batch_size, run.device)
    return unit(found.unflatten(0, (len(names), len(templates))).mean(dim=1))


def neighbours(features: Features, split: str, k: int) -> list[Result]:
    """Accuracy of the vote of the `k` nearest training rows (`knn_accuracy`).

    Raises:
        TrunklineError: if `k` is below 1 or above the number of training rows.
    """
    train = features.learning(split, "knn")
    if not 1 <= k <= len(train.labels):
        raise TrunklineError(f"k={k} must be from 1 to {len(train.labels)}, the number of training rows", "k")
    test = features.of(split)
    return [Result("knn", "accuracy", knn_accuracy(train, test, k), commonest(train, test))]


def probe(features: Features, split: str) -> list[Result]:
    """Accuracy of a linear probe, and its C (`linear_probe_accuracy`).

    Raises:
        TrunklineError: if there are no validation rows, or if they are the rows to be measured on.
    """
    train = features.learning(split, "linear_probe")
    if split == "val":
        raise TrunklineError(
            "linear_probe chooses its regularisation on the validation split; set split to test", "split"
        )
    val, test = features.of(choose_split("val", features.rows, features.source)), features.of(split)
    accuracy, strength = linear_probe_accuracy(train, val, test)
    return [Result("linear_probe", "accuracy", accuracy, commonest(train, test)), Result("linear_probe", "C", strength)]


def commonest(train: Labelled, test: Labelled) -> float:
    """Accuracy of a guess that is always the most frequent training class."""
    return float((test.labels == np.bincount(train.labels).argmax()).mean())
