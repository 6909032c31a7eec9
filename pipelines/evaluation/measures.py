"""What `trunkline evaluate` measures: retrieval, zero-shot classification, neighbours and linear probes."""

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


class Result(NamedTuple):
    """One figure."""

    task: str
    metric: str
    value: float
    chance: float | None = None
    """The same of a network that knows nothing."""

    @property
    def gain(self) -> str:
        """How many times better than that."""
        if not self.chance or not self.value:
            return ""
        ratio = self.chance / self.value if "rank" in self.metric else self.value / self.chance
        return f"{ratio:.1f} times"


class Runner(NamedTuple):
    """How pictures and texts go through the network."""

    network: ImageNetwork
    batch_size: int
    device: torch.device
    num_workers: int
    skip_corrupt: bool


def choose_split(split: str | None, rows: Mapping[str, Any], source: str) -> str:
    """The split that is asked for, or the best there is.

    Raises:
        TrunklineError: if the source does not have it.
    """
    if split is None:
        split = "test" if "test" in rows else "val"
    if split not in rows:
        raise TrunklineError(
            f"{source} has no {split} split, but {', '.join(rows)}; set {split}_fraction or {split}_split",
            "data.source",
        )
    return split


class CaptionedPictures(Pictures):
    """Pictures that have captions: one whose captions cannot be read is no better than one that cannot be seen."""

    rows: PairRows

    def read(self, row: int) -> dict[str, Any]:
        """As in the base class, and the captions."""
        self.rows.captions(row)
        return super().read(row)


def retrieval(run: Runner, rows: PairRows, captions: str) -> list[Result]:
    """Recall and median rank both ways.

    Right are the texts of all images with the same first caption, as in validation.
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
    """Pooled features of the image trunk on the splits of labelled images, each split looked at once."""

    def __init__(self, run: Runner, data: ImageData) -> None:
        data.setup("test")
        self.run, self.source, self.found = run, data.source, dict[str, Labelled]()
        self.rows: dict[str, ImageRows] = {split: dataset.rows for split, dataset in data.datasets.items()}  # type: ignore[attr-defined]

    def of(self, split: str) -> Labelled:
        """Those of a split."""
        if split not in self.found:
            rows, run = self.rows[split], self.run
            pictures = Pictures(rows, len(rows.labels), run.network.preprocessing, run.skip_corrupt)
            encode = pooled(run.network.trunk)
            features, kept = embed_images(encode, pictures, run.batch_size, run.device, run.num_workers)
            self.found[split] = Labelled(features.numpy(), rows.labels[kept])
        return self.found[split]

    def learning(self, split: str, task: str) -> Labelled:
        """The training split, for a task that is measured on another.

        Raises:
            TrunklineError: if it is the same.
        """
        if split == "train":
            raise TrunklineError(f"{task} learns from the training split; set split to val or test", "split")
        return self.of("train")


def zero_shot(run: Runner, test: Labelled, names: Sequence[str], templates: Sequence[str]) -> list[Result]:
    """Top-1 and top-5 accuracy of the class whose text is most similar."""
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
    """(classes, E): of each class the mean over its prompts, made to length 1 (arXiv:2103.00020, 3.1.4)."""
    _, _, clip, encoder = run.network
    assert clip is not None
    assert encoder is not None
    prompts = [template.replace("{}", name) for name in names for template in templates]
    found = embed_texts(clip, encoder, prompts, run.batch_size, run.device)
    return unit(found.unflatten(0, (len(names), len(templates))).mean(dim=1))


def neighbours(features: Features, split: str, k: int) -> list[Result]:
    """See `knn_accuracy`.

    Raises:
        TrunklineError: if there are fewer training rows than neighbours.
    """
    train = features.learning(split, "knn")
    if not 1 <= k <= len(train.labels):
        raise TrunklineError(f"k={k} must be from 1 to {len(train.labels)}, the number of training rows", "k")
    test = features.of(split)
    return [Result("knn", "accuracy", knn_accuracy(train, test, k), commonest(train, test))]


def probe(features: Features, split: str) -> list[Result]:
    """See `linear_probe_accuracy`.

    Raises:
        TrunklineError: if there are no validation rows, or it is measured on them.
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
    """Accuracy of always naming the commonest training class."""
    return float((test.labels == np.bincount(train.labels).argmax()).mean())
