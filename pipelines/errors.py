"""Prints an error for the user: the message, and the flag or the line of a config that caused it."""

import errno
import os
import re
import shutil
import sys
import textwrap
import time
from collections.abc import Collection, Iterator
from fnmatch import fnmatchcase
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import yaml

from trunkline import FoundByAll, LostProcess, TrunklineError
from trunkline.compilers import REMEDIES, compiler_failure


def own_error(error: BaseException | None) -> TrunklineError | None:
    """The `TrunklineError` that is this error or one of its causes; None if there is none."""
    while error is not None and not isinstance(error, TrunklineError):
        error = error.__cause__
    return error


TRY_AGAIN = 75
"""Exit code after a `LostProcess` (EX_TEMPFAIL of sysexits.h): a scheduler starts the job again; 2 is for bad input."""
NO_MEMORY = re.compile(
    r"can't allocate memory|not enough memory|out of memory|bad_alloc|Storage size calculation overf"
)

LOST_PROCESS = re.compile(
    r"gloo.*(Connection (closed|reset) by peer|Connection refused|Broken pipe|Timed out waiting|(Connect|Read|Write) "
    r"timeout|Socket closed|Pair is not connected)|Application timeout caused pair closure|Operation timed out!|"
    r"NCCL.*(remote process|timeout|timed out)|Timed out waiting \d+ms for (send|recv)"
)
"""What the libraries of communication say when a process is gone or does not answer."""


def from_outside(error: BaseException, batch_size: int | None = None) -> TrunklineError | None:
    """A message for an error that is no defect of ours although a library raised it; None for any other error.

    Args:
        error: the error.
        batch_size: rows that the command takes at a time, if it has a flag for them.
    """
    reason = " ".join(str(error).split())
    name = type(error).__name__
    if isinstance(error, MemoryError) or name == "OutOfMemoryError" or NO_MEMORY.search(reason):
        asked = f" ({found[0]})" if (found := re.search(r"[Tt]ried to allocate [\d,.]+ \w+", reason)) else ""
        if batch_size is not None and batch_size > 1:
            return TrunklineError(
                f"there is not enough memory{asked} for {batch_size} rows at a time; try {batch_size // 2}",
                "batch_size",
            )
        return TrunklineError(
            f"there is not enough memory{asked}; make the network (dim, depth), its inputs or batch_size smaller"
        )
    if name in ("DistBackendError", "DistNetworkError", "DistStoreError") or LOST_PROCESS.search(reason):
        return LostProcess(
            "another process of this run has ended or does not answer; its own message says why. Resume the run from "
            "its last checkpoint"
        )
    if "DataLoader worker" in reason:  # torch raises the loss of one anywhere, also while a run ends because of it
        from trunkline.datamodules.samplers import LOST_WORKER, lost_worker

        return lost_worker() if LOST_WORKER.search(reason) else None
    if failure := compiler_failure(error):
        return TrunklineError(f"torch.compile failed: {failure}; {REMEDIES} set compile to false", "compile")
    if name == "MisconfigurationException":  # Lightning's word for asking too much
        return TrunklineError(reason)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
        place = f" {error.filename}" if error.filename else ""
        return TrunklineError(f"cannot use{place}: {error.strerror}; free some space, or mend its permissions")
    if reason.startswith("Early stopping conditioned on metric"):
        return TrunklineError(reason)
    return None


def report(error: TrunklineError, options: Collection[str] | None = None) -> None:
    """Print the message of an error, and below it the flag or the line of a config that caused it.

    The traceback of a worker process is left out. If several processes find the same error at the same time, only the
    first one prints it.

    Args:
        error: the error.
        options: names of the command's own flags (`batch_size`); None for a command whose flags are the keys of a
            config (`data.batch_size`).
    """
    message = re.split(r"TrunklineError: ", str(error))[-1].strip()
    width = min(shutil.get_terminal_size().columns, 120)
    text = textwrap.fill(f"error: {message}", width, break_long_words=False, break_on_hyphens=False)
    place = None if error.field is None else place_of(error.field, options)
    if isinstance(error, FoundByAll) and not error.first:
        time.sleep(1)  # the end of one process ends the others, of which the first is about to print
        return
    rank = int(os.environ.get("LOCAL_RANK", "0")) if "MASTER_ADDR" in os.environ else 0
    if rank:
        first = os.getppid()
        time.sleep(1)
        if os.getppid() != first:
            return
    print(f"\n{text}" + (f"\n  ({place})" if place else ""), file=sys.stderr)


def place_of(field: str, options: Collection[str] | None = None) -> str | None:
    """Where a field such as `data.batch_size` was given: its flag, else its line in a config.

    If it was not given at all, the flag that would set it; None if the command has no such flag.

    Args:
        field: as in `TrunklineError`; a * stands for any parts of the name.
        options: as in `report`.
    """
    name = plain(field)
    ends = [name] if "*" in name else list(tails(name))
    given = [plain(flag) for flag, _ in flags()]
    for end in ends:
        found = [flag for flag in given if fnmatchcase(flag, end)]
        if found:
            return f"--{found[-1]}"
    for config in reversed(config_files()):
        lines = [entry.line for entry in read_entries(config) if fnmatchcase(entry.key, name)]
        if lines:
            return f"{config}, line {lines[-1]}"
    if "*" in name:
        return None
    if options is None:
        return f"--{name}"
    return next((f"--{end}" for end in ends if end in options), None)


class Entry(NamedTuple):
    """A key of a config, with its value."""

    key: str
    """Dotted name; keys inside a list have the list's name before them."""
    value: str | None
    """None if the value has keys or items of its own."""
    line: int
    """Line number, from 1."""


class Place(NamedTuple):
    """Where the user wrote something."""

    text: str
    """The place as messages name it: `--data.batch_size`, or `mine.yaml, line 3`."""
    key: str
    """The full dotted name."""
    is_flag: bool = False
    config: str | None = None
    line: int = 0
    """Line in the config."""
    entries: tuple[Entry, ...] = ()
    """All entries of the config."""


def locate(text: str, preferred: Collection[str] = ()) -> Place:
    """Find where a key, or a value such as a class path, was given.

    Args:
        text: the value, or the key, which may lack its first parts.
        preferred: full keys that are chosen first if several keys have the same last parts.
    """
    name = plain(text)
    for flag, value in flags():
        if name in tails(plain(flag)) or value == text:
            return Place(f"--{plain(flag)}", plain(flag), is_flag=True)
    for config in reversed(config_files()):
        entries = read_entries(config)
        found = [entry for entry in entries if name in tails(entry.key) or entry.value == text]
        if found:
            best = next((entry for entry in found if entry.key in preferred), found[-1])
            place = f"{config}, line {best.line}"
            return Place(place, best.key, config=config, line=best.line, entries=tuple(entries))
    return Place(text, name)


def options_given(arguments: list[str] | None = None) -> Iterator[tuple[str, str]]:
    """Options with their dashes, and the values that follow them; None means this process's command line."""
    for argument, following in pairwise([*(sys.argv[1:] if arguments is None else arguments), ""]):
        if argument.startswith("-"):
            name, equals, value = argument.partition("=")
            yield name, value if equals else following


def flags(arguments: list[str] | None = None) -> Iterator[tuple[str, str]]:
    """Long options without their dashes, and their values; None: of this process's command line."""
    return ((name[2:], value) for name, value in options_given(arguments) if name.startswith("--"))


def plain(name: str) -> str:
    """A dotted name as people write it: without `init_args`, and without the `+` that appends to a list."""
    return ".".join(part.removesuffix("+") for part in name.split(".") if part.removesuffix("+") != "init_args")


def tails(name: str) -> Iterator[str]:
    """The dotted name itself, and the name without its first part, without its first two parts, and so on."""
    parts = name.split(".")
    return (".".join(parts[start:]) for start in range(len(parts)))


def config_files(arguments: list[str] | None = None) -> list[str]:
    """The configs among the arguments, in order; None means this process's command line."""
    return [value for name, value in options_given(arguments) if name in ("--config", "-c")]


def read_entries(config: str) -> list[Entry]:
    """All keys of a config in the order of their lines; empty if the config cannot be read."""
    try:
        return list(_entries(yaml.compose(Path(config).read_text(encoding="utf-8"), Loader=yaml.SafeLoader), ""))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return []


def value_entries(name: str, value: str) -> list[Entry]:
    """All keys inside the value of a flag or key `name`, if it is a mapping as in YAML or JSON."""
    try:
        return list(_entries(yaml.compose(value, Loader=yaml.SafeLoader), name))
    except yaml.YAMLError:
        return []


def _entries(node: yaml.Node | None, prefix: str) -> Iterator[Entry]:
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            if isinstance(item, yaml.ScalarNode):
                yield Entry(prefix, item.value, item.start_mark.line + 1)
            yield from _entries(item, prefix)
    elif isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            name = plain(f"{prefix}.{key.value}" if prefix else str(key.value))
            yield Entry(name, value.value if isinstance(value, yaml.ScalarNode) else None, key.start_mark.line + 1)
            yield from _entries(value, name)
