"""Names of older versions, so that an error message can give the new name."""

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


class Outdated(NamedTuple):
    """An entry of a config that was written for an older version."""

    line: int
    old: str
    new: str

    def __str__(self) -> str:
        return f"line {self.line}: {self.old} is {self.new} now"


def outdated(entries: Collection[Entry], class_names: Collection[str]) -> list[Outdated]:
    """The keys and class paths of a config that have a new name.

    Args:
        entries: all entries of the config.
        class_names: names of classes that a config can use without a path.
    """
    found = []
    for entry in entries:
        if entry.key in RENAMED:
            found.append(Outdated(entry.line, entry.key, RENAMED[entry.key]))
        elif entry.value and moved(entry.value, class_names):
            found.append(Outdated(entry.line, entry.value, short(entry.value)))
    return found


def moved(path: str, class_names: Collection[str]) -> bool:
    """Whether this is the old path of a class that has another path now."""
    return path.startswith("trunkline.") and short(path) in class_names and known_class(path) is None
