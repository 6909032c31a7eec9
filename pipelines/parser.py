"""Reads flags and configs, and says in one sentence what is wrong with them and where."""

import dataclasses
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn, get_args, get_type_hints

import lightning as L
from lightning.pytorch import callbacks
from lightning.pytorch.cli import LightningArgumentParser

import trunkline.modules.callbacks
from trunkline import TrunklineError
from trunkline.datamodules import ImageData
from trunkline.modules.image_classifier import ImageClassifier
from trunkline.pipelines.configs import nearest

# Importing a class makes its short name known: `class_path: ImageClassifier`.
OBJECTIVES = (ImageClassifier,)
DATA = (ImageData,)


class Parser(LightningArgumentParser):
    """Reports bad input as an error with a suggestion, where argparse would print a page of usage.

    Flags cannot be abbreviated: a misspelt one is an error.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "allow_abbrev": False})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise instead of exiting."""
        own = own_error(ex)  # what our own constructors raised says it best
        raise own or TrunklineError(explain(" ".join(message.split()), self.known_names())) from ex

    def known_names(self) -> set[str]:
        """Every option, dotted."""
        parsers = [self, *(getattr(self._subcommands_action, "choices", None) or {}).values()]
        names = {action.dest for parser in parsers for action in parser._actions} | set(dotted(L.Trainer, "trainer"))
        for group, classes in (("model", OBJECTIVES), ("data", DATA)):
            for cls in classes:
                names |= set(dotted(cls, group))
        return names


def own_error(error: BaseException | None) -> TrunklineError | None:
    """The error of our own that others were raised from, if any."""
    while error is not None and not isinstance(error, TrunklineError):
        error = error.__cause__
    return error


def dotted(cls: type, prefix: str) -> Iterator[str]:
    """Names of a class's arguments, and of the fields of dataclasses among them."""
    for name, hint in get_type_hints(cls.__init__).items():  # type: ignore[misc]
        if name != "return":
            yield f"{prefix}.{name}"
            for kind in (hint, *get_args(hint)):
                if dataclasses.is_dataclass(kind) and isinstance(kind, type):
                    yield from dotted(kind, f"{prefix}.{name}")


def explain(message: str, names: set[str]) -> str:
    """Jsonargparse's message as a sentence that names the flag, or the line of the config, and the mend.

    Args:
        message: in one line.
        names: all options, dotted.
    """
    if unknown := re.search(r"Option '([\w.]+)' is not|not accept option '([\w.]+)'|recognized arguments: -*([\w.]+)", message):
        key = next(group for group in unknown.groups() if group)
        place = locate(key) or key
        meant = {name.split(".", n)[-1] for name in names for n in range(place.count(".") + 1)}
        ...
    return message
