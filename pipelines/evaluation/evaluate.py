"""`trunkline evaluate`: measure an image network by retrieval, zero-shot classification, neighbours and probes."""

import json
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from trunkline import TrunklineError
from trunkline.datamodules.base import TrunklineDataModule
from trunkline.datamodules.images.image_data import ImageData
from trunkline.datamodules.pairs.image_text_data import ImageTextData
from trunkline.pipelines.commands.output import check_output
from trunkline.pipelines.devices import find_device
from trunkline.pipelines.embedding import ImageNetwork, image_network
from trunkline.pipelines.evaluation.data import as_trained
from trunkline.pipelines.evaluation.measures import (
    Features,
    Result,
    Runner,
    choose_split,
    neighbours,
    probe,
    retrieval,
    zero_shot,
)
from trunkline.pipelines.trained import Trained

Measure = Literal["retrieval", "zero_shot", "knn", "linear_probe"]
LABELLED = ("zero_shot", "knn", "linear_probe")
OPTIONS_OF_TASKS = {"captions": "retrieval", "class_names": "zero_shot", "templates": "zero_shot", "k": "knn"}
"""Options that apply to one task only -> that task."""
NEIGHBOURS = 20
TEMPLATES = ("{}", "a photo of a {}", "a picture of a {}", "a drawing of a {}")


def evaluate(
    checkpoint: str,
    data: TrunklineDataModule,
    what: Measure | Literal["all"] = "all",
    split: Literal["train", "val", "test"] | None = None,
    captions: Literal["first", "all"] = "first",
    class_names: list[str] | str | None = None,
    templates: list[str] | str | None = None,
    k: int | None = None,
    output: str | None = None,
    device: str = "auto",
) -> None:
    """Evaluate the network of a checkpoint on images with captions or labels, and print a table.

    `retrieval` finds the right text for each image, and the right image for each text. `zero_shot` chooses the class
    whose text is most similar to the image. `knn` and `linear_probe` learn the classes from frozen features of the
    training split; they work for image classifiers too. `all` measures everything that data and checkpoint allow.

    Images and texts are prepared as in the checkpoint's training. If the data is of the same class as in training,
    shares (`val_fraction`, `test_fraction`) and seed (`split_seed`) that you leave out are those of training, so that
    no training row is tested; a `split_seed` of 0 counts as left out. Old checkpoints do not store them; for these the
    default shares are used.

    Args:
        checkpoint: file that `trunkline fit` saved, of a network for images and texts or of an image classifier.
        data: ImageTextData or ImageData, with the flags of `trunkline fit` (`--data.source openmoji`). If the class is
            left out, it is ImageTextData for `twemoji`, `openmoji`, `--what retrieval` and flags that only this class
            has (`--data.caption_column`), otherwise ImageData. With `skip_corrupt`, images that cannot be read are
            skipped and counted.
        what: the task to measure.
        split: the split to measure on. None is the test split, or the validation split if there is no test split.
        captions: use only the first caption of each image, or all.
        class_names: names that replace those of the data: a list, or a file with one name per line.
        templates: zero-shot prompts with {} for the class name: a list, a single one, or a file with one per line.
        k: number of neighbours that vote. None is 20.
        output: a .json file to which the results are written as well.
        device: auto, cpu, cuda, cuda:1, mps, …

    Raises:
        TrunklineError: for a missing file or split, an option that does not apply, class names or templates that cannot
            be used, or a task on texts with a network that has no text tower.
    """
    if output is not None:
        check_output(output, (".json",))
    if not isinstance(data, ImageData | ImageTextData):
        raise TrunklineError(f"{type(data).__name__} holds no images; give ImageData or ImageTextData", "data")
    place, trained = find_device(device), Trained.read(checkpoint)
    network = image_network(trained, place)
    tasks = choose_tasks(what, data, network, checkpoint)
    all_captions = None if captions == "first" else captions
    given = {"captions": all_captions, "class_names": class_names, "templates": templates, "k": k}
    check_task_options(given, tasks, data.source)
    same_kind = isinstance(data, ImageTextData) == (network.clip is not None)
    data = as_trained(data, network.preprocessing, (same_kind and trained.data) or {})
    run = Runner(network, data.eval_batch_size or data.batch_size, place, data.worker_count(), data.skip_corrupt)
    if isinstance(data, ImageTextData):
        tested, results = of_pairs(run, data, split, captions)
    else:
        tested, results = of_labels(run, data, split, tasks, class_names, templates, NEIGHBOURS if k is None else k)
    show(results, f"{checkpoint} on {data.source} ({tested})")
    if output is not None:
        save(results, output, {"checkpoint": checkpoint, "source": data.source, "split": tested})


def of_pairs(run: Runner, data: ImageTextData, split: str | None, captions: str) -> tuple[str, list[Result]]:
    """The split that was measured, and the results for images with captions."""
    tested = choose_split(split, data.rows, data.source)
    return tested, retrieval(run, data.rows[tested], captions)


def of_labels(
    run: Runner,
    data: ImageData,
    split: str | None,
    tasks: list[str],
    class_names: list[str] | str | None,
    templates: list[str] | str | None,
    k: int,
) -> tuple[str, list[Result]]:
    """The split that was measured, and the results for labelled images. See `evaluate` for the arguments."""
    features = Features(run, data)
    tested = choose_split(split, features.rows, data.source)
    results = []
    if "zero_shot" in tasks:
        names = label_names(class_names, data.class_names)
        results += zero_shot(run, features.of(tested), names, read_templates(templates))
    if "knn" in tasks:
        results += neighbours(features, tested, k)
    if "linear_probe" in tasks:
        results += probe(features, tested)
    return tested, results


def choose_tasks(what: str, data: ImageData | ImageTextData, network: ImageNetwork, checkpoint: str) -> list[str]:
    """The tasks to measure: the given one, or all that data and network allow.

    Raises:
        TrunklineError: if data or network do not allow the task.
    """
    paired = isinstance(data, ImageTextData)
    possible = ["retrieval"] if paired else [*LABELLED]
    if what not in ("all", *possible):
        has, fix = "captions and no classes", "--what retrieval, or labelled images with --data ImageData"
        if not paired:
            has, fix = "classes and no captions", "images with captions with --data ImageTextData, or another --what"
        raise TrunklineError(f"{data.source} has {has}, as {type(data).__name__} reads it; give {fix}")
    tasks = possible if what == "all" else [what]
    if network.clip is None and what == "all":
        tasks = [task for task in tasks if task not in ("retrieval", "zero_shot")]
    if not tasks or (network.clip is None and what in ("retrieval", "zero_shot")):
        raise TrunklineError(
            f"{checkpoint} is of ImageClassifier, which has no text tower; give --what knn or linear_probe and a "
            "labelled --data.source, or a checkpoint of ContrastiveImageText"
        )
    return tasks


def check_task_options(given: dict[str, Any], tasks: list[str], source: str) -> None:
    """Refuse options that would have no effect.

    Args:
        given: options of `OPTIONS_OF_TASKS` -> their values; None if an option was left out.
        tasks: the tasks that are measured.
        source: the source of the data, for the error message.

    Raises:
        TrunklineError: for the first option that would have no effect.
    """
    for option, value in given.items():
        if value is not None and OPTIONS_OF_TASKS[option] not in tasks:
            raise TrunklineError(
                f"--{option} is for {OPTIONS_OF_TASKS[option]}, but {source} is measured by {', '.join(tasks)}; leave "
                "it out, or choose another --what"
            )


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


def show(results: list[Result], title: str) -> None:
    """Print the results as a table."""
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
    """Write a JSON file with the entries of `about`, and task -> metric -> value and chance."""
    for result in results:
        figures = about.setdefault(result.task, {})
        figures[result.metric] = {"value": result.value, "chance": result.chance}
    Path(output).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
