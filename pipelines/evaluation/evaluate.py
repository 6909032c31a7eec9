"""`trunkline evaluate`: what an image network knows, by retrieval, zero-shot classification, neighbours and probes."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from trunkline import TrunklineError
from trunkline.datamodules.images.image_data import ImageData
from trunkline.datamodules.pairs.emoji_pictures import OPENMOJI, TWEMOJI
from trunkline.datamodules.pairs.image_text_data import ImageTextData
from trunkline.pipelines.commands.output import check_output
from trunkline.pipelines.devices import find_device
from trunkline.pipelines.embedding import ImageNetwork, image_network
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
FLAGS_OF_TASKS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("captions", "caption_column", "image_folder", "flags"), ("retrieval",)),
    **dict.fromkeys(("label_column", "split_seed"), LABELLED),
    **dict.fromkeys(("class_names", "templates"), ("zero_shot",)),
    "k": ("knn",),
}
"""Flags that not all tasks know, and those that do."""
TEMPLATES = ("{}", "a photo of a {}", "a picture of a {}", "a drawing of a {}")


def evaluate(
    checkpoint: str,
    source: str,
    what: Measure | Literal["all"] = "all",
    split: Literal["train", "val", "test"] | None = None,
    captions: Literal["first", "all"] = "first",
    class_names: list[str] | str | None = None,
    templates: list[str] | str | None = None,
    k: int | None = None,
    image_column: str = "image",
    caption_column: str | None = None,
    label_column: str | None = None,
    train_split: str | None = None,
    val_split: str | None = None,
    test_split: str | None = None,
    val_fraction: float | None = None,
    test_fraction: float | None = None,
    split_seed: int | None = None,
    image_folder: str | None = None,
    flags: bool | None = None,
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
        k: neighbours that vote; None takes 20.
        image_column: see `ImageTextData` and `ImageData`, as the next eleven.
        caption_column: see there.
        label_column: see there.
        train_split: see there.
        val_split: see there.
        test_split: see there.
        val_fraction: see there; None takes, of images with captions, that of the checkpoint's training, so that nothing
            is both trained on and tested. Of labelled images give that of training yourself, as the next two.
        test_fraction: see there.
        split_seed: see there; of labelled images.
        image_folder: see there.
        flags: see there; of `twemoji` and `openmoji`.
        cache_dir: see there.
        skip_corrupt: leave out images that cannot be read, and count them, instead of stopping.
        batch_size: images or texts at a time.
        num_workers: processes that read images.
        output: a .json file for the same figures.
        device: auto, cpu, cuda, cuda:1, mps, …

    Raises:
        TrunklineError: for a missing file or split, a flag that does not apply, names or templates that cannot work, or
            a checkpoint that does not know texts where they are needed.
    """
    if output is not None:
        check_output(output, (".json",))
    place, trained = find_device(device), Trained.read(checkpoint)
    network = image_network(trained, place)
    run = Runner(network, batch_size, place, num_workers, skip_corrupt)
    paired = what == "retrieval" or source in (TWEMOJI, OPENMOJI) or (what == "all" and caption_column is not None)
    tasks = choose_tasks(what, paired, network, checkpoint, source)
    special = {
        "captions": None if captions == "first" else captions,
        "caption_column": caption_column,
        "image_folder": image_folder,
        "flags": flags,
        "label_column": label_column,
        "split_seed": split_seed,
        "class_names": class_names,
        "templates": templates,
        "k": k,
    }
    check_flags(special, tasks, source)
    names = ("caption_column", "image_folder", "flags") if paired else ("label_column", "split_seed")
    given: dict[str, Any] = {name: special[name] for name in names} | {
        "train_split": train_split,
        "val_split": val_split,
        "test_split": test_split,
        "val_fraction": val_fraction,
        "test_fraction": test_fraction,
        "cache_dir": cache_dir,
    }
    options: dict[str, Any] = {"source": source, "image_column": image_column, "skip_corrupt": skip_corrupt}
    options |= {name: value for name, value in given.items() if value is not None}
    options |= asdict(network.preprocessing)
    if paired:
        pairs = ImageTextData(**{**trained_fractions(trained), **options})
        tested, results = of_pairs(run, pairs, split, captions)
    else:
        labelled = ImageData(**options)
        tested, results = of_labels(run, labelled, split, tasks, class_names, templates, 20 if k is None else k)
    show(results, f"{checkpoint} on {source} ({tested})")
    if output is not None:
        save(results, output, {"checkpoint": checkpoint, "source": source, "split": tested})


def trained_fractions(trained: Trained) -> dict[str, float]:
    """Shares of the splits that a checkpoint of images with captions was trained with, as far as it says so."""
    shares = (trained.data or {}).get("fractions", {})
    return {f"{part}_fraction": share for part, share in shares.items()}


def of_pairs(run: Runner, data: ImageTextData, split: str | None, captions: str) -> tuple[str, list[Result]]:
    """The split that is looked at, and its figures."""
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
    """The split that is looked at, and its figures; the arguments after `data` are those of `evaluate`."""
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


def choose_tasks(what: str, paired: bool, network: ImageNetwork, checkpoint: str, source: str) -> list[str]:
    """What is asked for, or all that is possible.

    Raises:
        TrunklineError: if it is not.
    """
    possible = ["retrieval"] if paired else [*LABELLED]
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


def check_flags(given: dict[str, Any], tasks: list[str], source: str) -> None:
    """Refuse what would do nothing.

    Args:
        given: flags of `FLAGS_OF_TASKS` -> their values; None was not given.
        tasks: are measured.
        source: on this.

    Raises:
        TrunklineError: for the first of them.
    """
    for flag, value in given.items():
        if value is not None and not set(FLAGS_OF_TASKS[flag]) & set(tasks):
            raise TrunklineError(
                f"--{flag} is for {' or '.join(FLAGS_OF_TASKS[flag])}, but --source {source} is measured by "
                f"{', '.join(tasks)}; leave it out, or choose with --what"
            )
    if given["flags"] is not None and source not in (TWEMOJI, OPENMOJI):
        raise TrunklineError(f"--flags is for {TWEMOJI} and {OPENMOJI}, not for --source {source}; leave it out")


def label_names(given: list[str] | str | None, own: list[str]) -> list[str]:
    """Names of the classes.

    Raises:
        TrunklineError: for an empty one, or another number than the source's.
    """
    names = own if given is None else read_list(given, "class_names")
    if len(names) != len(own):
        raise TrunklineError(
            f"class_names has {len(names)} names, but the source has {len(own)} classes; give as many", "class_names"
        )
    for number, name in enumerate(names):
        if not name.strip():
            raise TrunklineError(f"class {number} has an empty name; name all {len(names)}", "class_names")
    return names


def read_templates(given: list[str] | str | None) -> list[str]:
    """Prompts with {} for the class.

    Raises:
        TrunklineError: for one without, or none.
    """
    templates = [given] if isinstance(given, str) and "{}" in given else read_list(given or [*TEMPLATES], "templates")
    for template in templates:
        if "{}" not in template:
            raise TrunklineError(
                f"the template {template!r} has no {{}}; write it where the class is to stand", "templates"
            )
    return templates


def read_list(given: list[str] | str, field: str) -> list[str]:
    """A list as it is, or the lines of a file.

    Raises:
        TrunklineError: if it cannot be read.
    """
    if not isinstance(given, str):
        return given
    try:
        return Path(given).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        message = f"cannot read {field} {given}: {error}; give a list, or a file with one a line"
        raise TrunklineError(message, field) from error


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
