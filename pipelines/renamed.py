"""Names of older versions, so that an error message can give the new name."""

import sys
from collections.abc import Collection
from typing import NamedTuple

from trunkline.pipelines.errors import Entry
from trunkline.pipelines.objectives import known_class, short

RENAMED = {
    "data.path": "data.source",
    "data.val_path": "data.val_source",
    "data.test_path": "data.test_source",
    "data.hub_split": "data.train_split",
}
"""Old key of a config -> new key, both as in flags."""

_LABELLED = [
    "source",
    "image_column",
    "label_column",
    "train_split",
    "val_split",
    "val_fraction",
    "test_fraction",
    "split_seed",
    "skip_corrupt",
    "cache_dir",
    "batch_size",
    "num_workers",
]
OF_COMMANDS = {
    "evaluate": {name: f"data.{name}" for name in [*_LABELLED, "caption_column", "test_split", "image_folder", "flags"]}
}
"""The same of flags that one command alone had."""
CALLBACKS = "trainer.callbacks."
OF_CALLBACKS = {"ImageProbes": {name: f"data.{name}" for name in _LABELLED}}
"""The same of arguments of a callback, by its class."""
OLD_KEYS = {*RENAMED, *(CALLBACKS + name for names in OF_CALLBACKS.values() for name in names)}
"""Keys of a config that may have another name now."""


class Outdated(NamedTuple):
    """An entry of a config that was written for an older version."""

    line: int
    old: str
    new: str

    def __str__(self) -> str:
        return f"line {self.line}: {self.old} is {self.new} now"


def new_flag(old: str) -> str | None:
    """What a flag of this process's command is called now, if it had another name; both without their dashes."""
    command = "".join(sys.argv[1:2])
    return RENAMED.get(old) or OF_COMMANDS.get(command, {}).get(old)


def outdated(entries: Collection[Entry], class_names: Collection[str]) -> list[Outdated]:
    """The keys and class paths of a config that have a new name.

    Args:
        entries: all entries of the config.
        class_names: names of classes that a config can use without a path.
    """
    found, callback = [], ""
    for entry in entries:
        argument = entry.key.partition(CALLBACKS)[2]
        if argument == "class_path":
            callback = short(entry.value or "")
        if entry.key in RENAMED:
            found.append(Outdated(entry.line, entry.key, RENAMED[entry.key]))
        elif argument in OF_CALLBACKS.get(callback, {}):
            new = OF_CALLBACKS[callback][argument]
            found.append(Outdated(entry.line, f"{callback}.{argument}", f"{callback}.{new}"))
        elif entry.value and moved(entry.value, class_names):
            found.append(Outdated(entry.line, entry.value, short(entry.value)))
    return found


def moved(path: str, class_names: Collection[str]) -> bool:
    """Whether this is the old path of a class that has another path now."""
    return path.startswith("trunkline.") and short(path) in class_names and known_class(path) is None
