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


@dataclass(frozen=True)
class PairColumns:
    """Which columns, or which languages, are source and target.

    Args:
        source: column of the source texts; in a TMX file and in a `translation` column, the source's language.
        target: the same of the target.
        language: column with the language of each row's target.
        pairs: directions such as `["en-de", "de-en"]`, instead of the other three. The languages are columns, or in a
            TMX file or a `translation` column. A row has one pair for each direction.

    Raises:
        TrunklineError: if source and target are the same column, if a direction is not two different languages with a
            hyphen between them, if one is there twice, or if columns are named beside the directions.
    """

    source: str = "source"
    target: str = "target"
    language: str | None = None
    pairs: Sequence[str] | None = None

    def __post_init__(self) -> None:
        if self.source == self.target:
            raise TrunklineError(
                f"source_column and target_column are both '{self.source}'; name two columns", "data.target_column"
            )
        if self.pairs is None:
            return
        given, at = f"pairs={', '.join(self.pairs)}", "data.pairs"
        if not self.pairs:
            raise TrunklineError("pairs is an empty list; give directions such as en-de, or leave it out", at)
        for pair in self.pairs:
            languages = pair.split("-")
            if len(languages) != 2 or not all(languages) or languages[0] == languages[1]:
                raise TrunklineError(
                    f"{given}: '{pair}' is not a direction, two different languages with a hyphen between them such as "
                    "en-de; write regions with an underscore (pt_BR)",
                    at,
                )
            if self.pairs.count(pair) > 1:
                raise TrunklineError(f"{given}: '{pair}' is there twice; leave one out", at)
        if self.language is not None:
            raise TrunklineError(
                f"{given} says the targets' languages, and so does language_column={self.language}; leave one out",
                "data.language_column",
            )
        for name, column in (("source", self.source), ("target", self.target)):
            if column != name:
                raise TrunklineError(
                    f"{given} says the columns, and so does {name}_column={column}; leave one out",
                    f"data.{name}_column",
                )

    @property
    def directions(self) -> list[tuple[str, str]]:
        """(source, target) of each pair of a row: names of columns or languages."""
        if self.pairs is None:
            return [(self.source, self.target)]
        return [(source, target) for source, _, target in (pair.partition("-") for pair in self.pairs)]

    @property
    def usual(self) -> bool:
        """Whether neither columns nor directions are named."""
        return self.pairs is None and (self.source, self.target) == ("source", "target")

    @property
    def key(self) -> list[Any]:
        """The choice as plain data."""
        return [self.source, self.target, self.language, None if self.pairs is None else list(self.pairs)]


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


def language_token(language: str) -> str:
    """The special token before a source that asks for a target language (arXiv:1611.04558)."""
    return f"<2{language}>"
