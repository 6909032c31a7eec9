"""Turns an error into words for a person: the message, and the flag or the line of a config that it is about."""

import os
import re
import shutil
import sys
import textwrap
import time
from collections.abc import Collection, Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import yaml

from trunkline import TrunklineError


def own_error(error: BaseException | None) -> TrunklineError | None:
    """The error of our own that others were raised from, if any."""
    while error is not None and not isinstance(error, TrunklineError):
        error = error.__cause__
    return error


def report(error: TrunklineError, options: Collection[str] | None = None) -> None:
    """Print the message, and below it where on the command line or in a config its cause stands.

    Of an error that came out of a worker process, the message alone, without the worker's traceback. Processes that
    find the same fault at the same time leave the message to the first one.

    Args:
        error: what happened.
        options: names of the command's flags, if it has flags of its own (`batch_size`); None: those of a
            config (`data.batch_size`).
    """
    message = re.split(r"TrunklineError: ", str(error))[-1].strip()
    width = min(shutil.get_terminal_size().columns, 120)
    text = textwrap.fill(f"error: {message}", width, break_long_words=False, break_on_hyphens=False)
    place = None if error.field is None else place_of(error.field, options)
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
        field: see `TrunklineError`.
        options: see `report`.
    """
    name = plain(field)
    ends = [name] if options is None else list(tails(name))
    given = [flag for flag, _ in flags() if plain(flag) in ends]
    if given:
        return f"--{plain(given[-1])}"
    for config in reversed(config_files()):
        lines = [entry.line for entry in read_entries(config) if entry.key == name]
        if lines:
            return f"{config}, line {lines[-1]}"
    if options is None:
        return f"--{name}"
    return next((f"--{end}" for end in ends if end in options), None)


class Entry(NamedTuple):
    """A key of a config."""

    key: str
    """Dotted; those in a list have the list's name before them."""
    value: str | None
    """None of what has keys or items of its own."""
    line: int
    """From 1."""


class Place(NamedTuple):
    """Where something stands that a person wrote."""

    text: str
    """For a message: `--data.batch_size`, or `mine.yaml, line 3`."""
    key: str
    """The whole dotted name there."""
    is_flag: bool = False
    config: str | None = None
    line: int = 0
    """Of the config."""
    entries: tuple[Entry, ...] = ()
    """All of that config."""


def locate(text: str, preferred: Collection[str] = ()) -> Place:
    """Where the end of a key, or a value such as a class path, was given.

    Args:
        text: the key or value.
        preferred: whole keys, one of which it is rather than another with the same end.
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
    """Options with their dashes, and the values that they seem to have; None: of this process's command line."""
    for argument, following in pairwise([*(sys.argv[1:] if arguments is None else arguments), ""]):
        if argument.startswith("-"):
            name, equals, value = argument.partition("=")
            yield name, value if equals else following


def flags() -> Iterator[tuple[str, str]]:
    """Long options on the command line without their dashes, and their values."""
    return ((name[2:], value) for name, value in options_given() if name.startswith("--"))


def plain(name: str) -> str:
    """A dotted name as people write it: without `init_args`, and without the `+` that appends to a list."""
    return ".".join(part.removesuffix("+") for part in name.split(".") if part.removesuffix("+") != "init_args")


def tails(name: str) -> Iterator[str]:
    """A dotted name, and what is left of it without its first parts."""
    parts = name.split(".")
    return (".".join(parts[start:]) for start in range(len(parts)))


def config_files(arguments: list[str] | None = None) -> list[str]:
    """The configs among arguments (None: of this process's command line), the first one first."""
    return [value for name, value in options_given(arguments) if name in ("--config", "-c")]


def read_entries(config: str) -> list[Entry]:
    """All keys of a config in the order of their lines; none if it cannot be read."""
    try:
        return list(_entries(yaml.compose(Path(config).read_text(encoding="utf-8"), Loader=yaml.SafeLoader), ""))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
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
