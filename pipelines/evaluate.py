"""`trunkline evaluate`: what an image network knows, by retrieval, zero-shot classification, neighbours and probes."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torchmetrics.functional.classification import multiclass_accuracy

from trunkline import TrunklineError
from trunkline.datamodules.emoji_pictures import OPENMOJI, TWEMOJI
from trunkline.datamodules.image import ImageData
from trunkline.datamodules.image_text import ImageTextData
from trunkline.datamodules.image_text_sources import PairRows
from trunkline.datamodules.sources import ImageRows
from trunkline.modules.networks.clip import unit
from trunkline.modules.probes import Labelled, knn_accuracy, linear_probe_accuracy
from trunkline.modules.retrieval import chance_ranks, retrieval_metrics
from trunkline.pipelines.image_text_checkpoint import (
    ImageNetwork,
    Pictures,
    embed_images,
    embed_texts,
    load_image_network,
    own_flags,
    pooled,
)
from trunkline.pipelines.text_checkpoint import find_device

Task = Literal["retrieval", "zero_shot", "knn", "linear_probe"]
TEMPLATES = ("{}", "a photo of a {}", "a picture of a {}", "a drawing of a {}")


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


def evaluate(
    checkpoint: str,
    source: str,
    what: Task | Literal["all"] = "all",
    split: Literal["train", "val", "test"] | None = None,
    captions: Literal["first", "all"] = "first",
    class_names: list[str] | str | None = None,
    templates: list[str] | str | None = None,
    k: int = 20,
    image_column: str = "image",
    caption_column: str | None = None,
    label_column: str = "label",
    train_split: str | None = None,
    val_split: str | None = None,
    test_split: str | None = None,
    val_fraction: float | None = None,
    test_fraction: float | None = None,
    image_folder: str | None = None,
    cache_dir: str | None = None,
    skip_corrupt: bool = False,
    batch_size: int = 64,
    num_workers: int = 0,
    output: str | None = None,
    device: str = "auto",
) -> None:
    """Judge the network of a checkpoint on a source of images with captions or with labels, and print a table.

    `retrieval` finds the right text for each image and the reverse. `zero_shot` names an image's class by the most
    similar text. `knn` and `linear_probe` learn classes from the frozen features of the training split, which an image
    classifier's checkpoint has too. `all` is what source and checkpoint allow.

    Args:
        checkpoint: of a `trunkline fit` of images and texts, or of an image classifier.
        source: as for training: of images with captions (`twemoji`, `openmoji`; others with --caption_column or --what
            retrieval), or of labelled images (`digits`, …).
        what: is measured.
        split: on which it is measured; None takes test, or where there is none val.
        captions: whether a text is an image's first caption, or each of its own.
        class_names: a list, or a file with one a line, in place of the source's own.
        templates: of zero-shot prompts, with {} for the class: a list, one, or a file with one a line.
        k: neighbours that vote.
        image_column: see `ImageTextData` and `ImageData`, as the next nine.
        caption_column: see there.
        label_column: see there.
        train_split: see there.
        val_split: see there.
        test_split: see there.
        val_fraction: see there; give the fractions of training, so that nothing is both trained on and tested.
        test_fraction: see there.
        image_folder: see there.
        cache_dir: see there.
        skip_corrupt: leave out images that cannot be read, and count them, instead of stopping.
        batch_size: images or texts at a time.
        num_workers: processes that read images.
        output: a .json file for the same figures.
        device: auto, cpu, cuda, cuda:1, mps, …

    Raises:
        TrunklineError: for a missing file or split, names or templates that cannot work, or a checkpoint that does not
            know texts where they are needed.
    """
    if output is not None and (not output.endswith(".json") or not Path(output).absolute().parent.is_dir()):
        raise TrunklineError(f"--output {output} must be a .json file in a folder that exists")
    paired = what == "retrieval" or source in (TWEMOJI, OPENMOJI) or caption_column is not None
    place = find_device(device)
    run = Runner(load_image_network(checkpoint, place), batch_size, place, num_workers, skip_corrupt)
    tasks = choose_tasks(what, paired, run.network, checkpoint, source)
    given: dict[str, Any] = {
        "train_split": train_split,
        "val_split": val_split,
        "test_split": test_split,
        "val_fraction": val_fraction,
        "test_fraction": test_fraction,
        "cache_dir": cache_dir,
        **({"caption_column": caption_column, "image_folder": image_folder} if paired else {}),
    }
    options: dict[str, Any] = {"source": source, "image_column": image_column, "skip_corrupt": skip_corrupt}
    options |= {name: value for name, value in given.items() if value is not None}
    options |= asdict(run.network.preprocessing)
    with own_flags():
        if paired:
            pairs = ImageTextData(**options).rows
            tested = choose_split(split, pairs, source)
            results = retrieval(run, pairs[tested], captions)
        else:
            data = ImageData(**options, label_column=label_column)
            features = Features(run, data)
            tested = choose_split(split, features.rows, source)
            results = []
            if "zero_shot" in tasks:
                names = named(class_names, data.class_names)
                results += zero_shot(run, features.of(tested), names, read_templates(templates))
            if "knn" in tasks:
                results += neighbours(features, tested, k)
            if "linear_probe" in tasks:
                results += probe(features, tested)
    show(results, f"{checkpoint} on {source} ({tested})")
    if output is not None:
        save(results, output, {"checkpoint": checkpoint, "source": source, "split": tested})


def choose_tasks(what: str, paired: bool, network: ImageNetwork, checkpoint: str, source: str) -> list[str]:
    """What is asked for, or all that is possible.

    Raises:
        TrunklineError: if it is not.
    """
    possible = ["retrieval"] if paired else ["zero_shot", "knn", "linear_probe"]
    if what not in ("all", *possible):
        raise TrunklineError(f"{source} has captions and no classes; give --what retrieval, or a labelled --source")
    tasks = possible if what == "all" else [what]
    if network.clip is None and what == "all":
        tasks = [task for task in tasks if task not in ("retrieval", "zero_shot")]
    if not tasks or (network.clip is None and what in ("retrieval", "zero_shot")):
        raise TrunklineError(
            f"{checkpoint} is of ImageClassifier, which knows no texts; give --what knn or linear_probe and a labelled "
            "--source, or a checkpoint of ContrastiveImageText"
        )
    return tasks


def choose_split(split: str | None, rows: Mapping[str, Any], source: str) -> str:
    """The split that is asked for, or the best there is.

    Raises:
        TrunklineError: if the source does not have it.
    """
    if split is None:
        split = "test" if "test" in rows else "val"
    if split not in rows:
        raise TrunklineError(
            f"--source {source} has no {split} split, but {', '.join(rows)}; set --{split}_fraction or --{split}_split"
        )
    return split


class CaptionedPictures(Pictures):
    """Pictures that have captions: one whose captions cannot be read is no better than one that cannot be seen."""

    rows: PairRows

    def read(self, row: int) -> dict[str, Any]:
        """See `TransformedImages`."""
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
            raise TrunklineError(f"{task} learns from the training split; measure it on --split val or test")
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
        raise TrunklineError(f"--k {k} must be from 1 to {len(train.labels)}, the number of training rows")
    test = features.of(split)
    return [Result("knn", "accuracy", knn_accuracy(train, test, k), commonest(train, test))]


def probe(features: Features, split: str) -> list[Result]:
    """See `linear_probe_accuracy`.

    Raises:
        TrunklineError: if there are no validation rows, or it is measured on them.
    """
    train = features.learning(split, "linear_probe")
    if split == "val":
        raise TrunklineError("linear_probe chooses its regularisation on the validation split; set --split test")
    val, test = features.of(choose_split("val", features.rows, features.source)), features.of(split)
    accuracy, strength = linear_probe_accuracy(train, val, test)
    return [Result("linear_probe", "accuracy", accuracy, commonest(train, test)), Result("linear_probe", "C", strength)]


def commonest(train: Labelled, test: Labelled) -> float:
    """Accuracy of always naming the commonest training class."""
    return float((test.labels == np.bincount(train.labels).argmax()).mean())


def named(given: list[str] | str | None, own: list[str]) -> list[str]:
    """Names of the classes.

    Raises:
        TrunklineError: for an empty one, or another number than the source's.
    """
    names = own if given is None else read_list(given, "--class_names")
    if len(names) != len(own):
        raise TrunklineError(
            f"--class_names has {len(names)} names, but the source has {len(own)} classes; give as many"
        )
    for number, name in enumerate(names):
        if not name.strip():
            raise TrunklineError(f"class {number} has an empty name; name all {len(names)} with --class_names")
    return names


def read_templates(given: list[str] | str | None) -> list[str]:
    """Prompts with {} for the class.

    Raises:
        TrunklineError: for one without, or none.
    """
    templates = [given] if isinstance(given, str) and "{}" in given else read_list(given or [*TEMPLATES], "--templates")
    for template in templates:
        if "{}" not in template:
            raise TrunklineError(f"--templates: {template!r} has no {{}}; write it where the class is to stand")
    return templates


def read_list(given: list[str] | str, flag: str) -> list[str]:
    """A list as it is, or the lines of a file.

    Raises:
        TrunklineError: if it cannot be read.
    """
    if not isinstance(given, str):
        return given
    try:
        return Path(given).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise TrunklineError(f"cannot read {flag} {given}: {error}; give a list, or a file with one a line") from error


def show(results: list[Result], title: str) -> None:
    """Print."""
    table = Table(title=title, title_justify="left")
    for name in ("task", "metric"):
        table.add_column(name)
    for name in ("value", "chance", "better by"):
        table.add_column(name, justify="right")
    for result in results:
        chance = "" if result.chance is None else f"{result.chance:.4g}"
        table.add_row(result.task, result.metric, f"{result.value:.4g}", chance, result.gain)
    Console().print(table)


def save(results: list[Result], output: str, about: dict[str, Any]) -> None:
    """Write JSON: about what, then task -> metric -> value and chance."""
    for result in results:
        figures = about.setdefault(result.task, {})
        figures[result.metric] = {"value": result.value, "chance": result.chance}
    Path(output).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
