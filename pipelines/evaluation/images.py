"""The tasks of `trunkline evaluate` on images: which can be measured, their options, and their results."""

from pathlib import Path
from typing import NamedTuple

import torch

from trunkline import TrunklineError
from trunkline.datamodules.images.image_data import ImageData
from trunkline.datamodules.pairs.image_text_data import ImageTextData
from trunkline.pipelines.embedding import ImageNetwork, image_network
from trunkline.pipelines.evaluation.data import as_trained
from trunkline.pipelines.evaluation.measures import (
    Features,
    Runner,
    choose_split,
    neighbours,
    probe,
    retrieval,
    zero_shot,
)
from trunkline.pipelines.evaluation.results import Evaluation, Result, check_task_options
from trunkline.pipelines.trained import Trained

LABELLED = ("zero_shot", "knn", "linear_probe")
NEIGHBOURS = 20
TEMPLATES = ("{}", "a photo of a {}", "a picture of a {}", "a drawing of a {}")


class ImageOptions(NamedTuple):
    """Options of `evaluate` that apply to images; None if they are left out."""

    what: str = "all"
    captions: str | None = None
    class_names: list[str] | str | None = None
    templates: list[str] | str | None = None
    k: int | None = None


def evaluate_images(
    trained: Trained,
    data: ImageData | ImageTextData,
    split: str | None,
    options: ImageOptions,
    device: torch.device,
) -> Evaluation:
    """Measure the network of a checkpoint on images; `trunkline evaluate` says what the arguments mean.

    Raises:
        TrunklineError: as `evaluate`.
    """
    network = image_network(trained, device)
    tasks = choose_tasks(options.what, data, network, trained.file)
    given = options._asdict()
    del given["what"]
    check_task_options(given, tasks, data.source)
    same_kind = isinstance(data, ImageTextData) == (network.clip is not None)
    data = as_trained(data, network.preprocessing, (same_kind and trained.data) or {})
    run = Runner(network, data.eval_batch_size or data.batch_size, device, data.worker_count(), data.skip_corrupt)
    if isinstance(data, ImageTextData):
        return of_pairs(run, data, split, options.captions or "first")
    return of_labels(run, data, split, tasks, options)


def of_pairs(run: Runner, data: ImageTextData, split: str | None, captions: str) -> Evaluation:
    """The results for images with captions."""
    tested = choose_split(split, data.rows, data.source)
    return Evaluation(data.source, tested, retrieval(run, data.rows[tested], captions))


def of_labels(run: Runner, data: ImageData, split: str | None, tasks: list[str], options: ImageOptions) -> Evaluation:
    """The results for labelled images."""
    features = Features(run, data)
    tested = choose_split(split, features.rows, data.source)
    results: list[Result] = []
    if "zero_shot" in tasks:
        names = label_names(options.class_names, data.class_names)
        results += zero_shot(run, features.of(tested), names, read_templates(options.templates))
    if "knn" in tasks:
        results += neighbours(features, tested, NEIGHBOURS if options.k is None else options.k)
    if "linear_probe" in tasks:
        results += probe(features, tested)
    return Evaluation(data.source, tested, results)


def choose_tasks(what: str, data: ImageData | ImageTextData, network: ImageNetwork, checkpoint: str) -> list[str]:
    """The tasks to measure: the given one, or all that data and network allow.

    Raises:
        TrunklineError: if the network does not allow the task.
    """
    possible = ["retrieval"] if isinstance(data, ImageTextData) else [*LABELLED]
    tasks = possible if what == "all" else [what]
    if network.clip is None and what == "all":
        tasks = [task for task in tasks if task not in ("retrieval", "zero_shot")]
    if not tasks or (network.clip is None and what in ("retrieval", "zero_shot")):
        raise TrunklineError(
            f"{checkpoint} is of ImageClassifier, which has no text tower; give --what knn or linear_probe and a "
            "labelled --data.source, or a checkpoint of ContrastiveImageText"
        )
    return tasks


def label_names(given: list[str] | str | None, own: list[str]) -> list[str]:
    """Names of the classes: the given ones, or those of the source.

    Raises:
        TrunklineError: if a name is empty, or if there are not as many names as the source has classes.
    """
    names = own if given is None else read_list(given, "class_names")
    if len(names) != len(own):
        raise TrunklineError(
            f"class_names has {len(names)} names, but the source has {len(own)} classes; give {len(own)} names",
            "class_names",
        )
    for number, name in enumerate(names):
        if not name.strip():
            raise TrunklineError(f"class {number} has an empty name; name all {len(names)}", "class_names")
    return names


def read_templates(given: list[str] | str | None) -> list[str]:
    """The given prompts, or the default ones; each has {} for the class name.

    Raises:
        TrunklineError: if a prompt has no {}, or a file of prompts cannot be read.
    """
    templates = [given] if isinstance(given, str) and "{}" in given else read_list(given or [*TEMPLATES], "templates")
    for template in templates:
        if "{}" not in template:
            raise TrunklineError(
                f"the template {template!r} has no {{}}; put {{}} where the class name belongs", "templates"
            )
    return templates


def read_list(given: list[str] | str, field: str) -> list[str]:
    """The given list, or the lines of the given file.

    Raises:
        TrunklineError: if the file cannot be read.
    """
    if not isinstance(given, str):
        return given
    try:
        return Path(given).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        message = f"cannot read {field} {given}: {error}; give a list, or a file with one entry per line"
        raise TrunklineError(message, field) from error
