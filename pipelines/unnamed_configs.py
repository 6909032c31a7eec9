"""The config that an evaluation takes from the checkpoint's run, although nobody named it: it must not run any code.

A config decides which classes are imported and made. One that somebody names is their choice; one that lies beside a
checkpoint may have come with it from anywhere.
"""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.utilities import rank_zero_info

from trunkline import TrunklineError
from trunkline.files import find_fault
from trunkline.pipelines.configs import StrictLoader, find_config
from trunkline.pipelines.errors import read_entries
from trunkline.pipelines.parser import CLASS_PATH, LIBRARIES
from trunkline.pipelines.runs import newest_config
from trunkline.run_folders import find_checkpoint


def checked_checkpoint(name: str) -> str:
    """The checkpoint that the flag of an evaluation names: a file, or the best one of a run's folder.

    Raises:
        TrunklineError: if there is none, or if it is damaged.
    """
    path = find_checkpoint(name, "ckpt_path")
    fault = find_fault(path)
    if fault is not None:
        raise TrunklineError(f"--ckpt_path: {fault}")
    return str(path)


def use_run_config(arguments: list[str]) -> list[str]:
    """Add the config that the checkpoint's run saved, for an evaluation without `--config`.

    Raises:
        TrunklineError: if there is no checkpoint or no config, or if the config would run code that is not Trunkline's.
    """
    values = [a.partition("=")[2] or b for a, b in pairwise([*arguments, ""]) if a.partition("=")[0] == "--ckpt_path"]
    if not values:
        raise TrunklineError(f"trunkline {arguments[0]} needs --ckpt_path, the checkpoint to evaluate")
    folder = Path(checked_checkpoint(values[-1])).parent.parent
    config = newest_config(folder)
    if config is None:
        raise TrunklineError(f"there is no {folder / 'config.yaml'}, which a run saves; name one with --config")
    refuse_foreign(find_config(str(config)))
    if config.name != "config.yaml":
        rank_zero_info(f"evaluating with {config}, of the last resume")
    return [arguments[0], "--config", str(config), *arguments[1:]]


def refuse_foreign(config: Path) -> None:
    """Refuse a config that names code other than Trunkline's and Lightning's, or another file with such names.

    Raises:
        TrunklineError: with the first name, its line, and how to use the config all the same.
    """
    content = yaml.load(config.read_text(encoding="utf-8"), StrictLoader)
    parts = [(content.get(name), "trunkline.") for name in ("model", "data")] + [(content.get("trainer"), "trainer")]
    for part, inside in parts:
        name = next(_foreign({} if part is None else part, inside, config.parent), None)
        if name is not None or not isinstance(part, dict | None):
            name = str(part) if name is None else name
            line = next((f", line {entry.line}," for entry in read_entries(str(config)) if entry.value == name), "")
            raise TrunklineError(
                f"{config}{line} names {name}, which is no class of Trunkline; a config beside a checkpoint may not "
                f"decide what code runs; if you trust it, name it: --config {config}"
            )


def _foreign(value: Any, inside: str, folder: Path) -> Iterator[str]:
    """Names in a part of a config through which other code, or another config, would be read.

    Args:
        value: the part.
        inside: the package of the class whose arguments these are; `trainer` for the trainer's own. Arguments of
            Trunkline's classes are never functions, and may be names of files; Lightning's take functions by path.
        folder: of the config.
    """
    if isinstance(value, dict):
        path = value.get("class_path")
        if path is not None:
            path = str(path)
            allowed = {"trunkline.": LIBRARIES[:1], "trainer": LIBRARIES, "lightning.": ()}[inside]
            if "." in path and not path.startswith(allowed):
                yield path
            inside = "trunkline." if "trunkline." in (inside, path[: len("trunkline.")]) else "lightning."
        for key, item in value.items():
            if key != "class_path":  # facts hold functions
                yield from _foreign(item, "lightning." if key == "facts" else inside, folder)
    elif isinstance(value, list):
        for item in value:
            yield from _foreign(item, inside, folder)
    elif isinstance(value, str) and inside != "trunkline.":
        imports = CLASS_PATH.fullmatch(value) and not (inside == "trainer" and value.startswith(LIBRARIES))
        if imports or Path(value).is_file() or (folder / value).is_file():
            yield value
