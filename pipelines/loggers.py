"""Loggers that a user names: they write into the run's folder, and a missing package is said in one line."""

import re
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from trunkline import TrunklineError

SAVING = (CSVLogger, TensorBoardLogger)
"""Loggers of Lightning that demand a `save_dir`."""


def make_save_dir_optional() -> None:
    """Let the loggers that demand a `save_dir` be named without one; "" then means the run's folder."""
    for kind in SAVING:
        init: Any = kind.__init__
        if len(init.__defaults__) == init.__code__.co_argcount - 2:  # all but `self` and `save_dir` have a default
            init.__defaults__ = ("", *init.__defaults__)


def place_loggers(given: Any, folder: str | Path) -> list[Any]:
    """Set the `save_dir` of those loggers in a config that have none.

    Args:
        given: the trainer's `logger`, as parsed.
        folder: the run's folder.

    Returns:
        The arguments that were changed, for `forget_places`.
    """
    entries = [
        entry.get("init_args") for entry in (given if isinstance(given, list) else [given]) if hasattr(entry, "get")
    ]
    changed = [arguments for arguments in entries if arguments is not None and arguments.get("save_dir") == ""]
    for arguments in changed:
        arguments["save_dir"] = str(folder)
    return changed


def forget_places(changed: list[Any]) -> None:
    """Undo `place_loggers`: the saved config must not send the logs of a later run into this run's folder."""
    for arguments in changed:
        arguments["save_dir"] = ""


def missing_package(error: BaseException | None) -> TrunklineError | None:
    """The error for a class whose package is not installed, if that is what caused `error`; otherwise None."""
    path = None
    while error is not None:
        path = path or re.search(r"class_path '(?:\w+\.)*(\w+)'", str(error))
        wanted = re.search(r"Requirement '([^']+)' not met", str(error))
        if isinstance(error, ModuleNotFoundError) and wanted:
            return TrunklineError(
                f"{path[1] if path else 'the logger'} needs a package that is not installed; install it with pip "
                f"install '{wanted[1]}', or choose another logger",
                "trainer.logger",
            )
        error = error.__cause__ or error.__context__
    return None
