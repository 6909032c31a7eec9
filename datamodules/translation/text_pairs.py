"""A pair of texts, a source of pairs, and the choice of their columns and languages."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from trunkline import TrunklineError


class Pair(NamedTuple):
    """A source text and its target text."""

    number: int
    """Number of the row, which decides its split; all directions of a row have the same number."""
    place: str
    """File and line, or row, for messages."""
    source: str
    target: str
    language: str | None = None
    """Language of the target, if known."""


@dataclass
class PairSource:
    """A source of pairs; nothing is read before `pairs` is called."""

    files: list[Path]
    """Local files that it reads."""
    key: list[Any]
    """Everything else that decides the texts, as plain data."""
    pairs: Callable[[], Iterator[Pair]]
    """All pairs once, in order; raises a `TrunklineError` that names the file and row at fault."""


def check_language(pair: Pair, languages: Sequence[str] | None) -> None:
    """Check that the target's language is one that the model learns.

    Args:
        pair: a pair.
        languages: the languages; None if the model is told none, and then any pair is right.

    Raises:
        TrunklineError: if the language is another one or unknown.
    """
    if languages is None or pair.language in languages:
        return
    if pair.language is None:
        raise TrunklineError(
            f"{pair.place}: the language of the target is not known; name the column that has it with "
            "language_column, or the direction with pairs (such as en-de)",
            field="data.language_column",
        )
    raise TrunklineError(
        f"{pair.place}: the target's language '{pair.language}' is not among languages={', '.join(languages)}; add it, "
        "or leave this row out",
        field="data.languages",
    )
