"""What `trunkline evaluate` has measured, as a table and as JSON, and the check of its options."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from trunkline import TrunklineError
from trunkline.files import atomic_write

OPTIONS_OF_TASKS: dict[str, tuple[str, ...]] = {
    "captions": ("retrieval",),
    "class_names": ("zero_shot",),
    "templates": ("zero_shot",),
    "k": ("knn",),
    "scores": ("translation",),
    "tokenize": ("translation",),
    "num_beams": ("translation", "transcription"),
    "length_penalty": ("translation",),
    "no_repeat_ngram": ("translation",),
    "max_new_tokens": ("translation",),
    "language_model": ("transcription",),
    "lm_weight": ("transcription",),
    "length_bonus": ("transcription",),
}
"""Options that apply to some tasks only -> these tasks."""


class Result(NamedTuple):
    """One measured value."""

    task: str
    metric: str
    value: float
    chance: float | None = None
    """Expected value for random embeddings or guesses; None if unknown."""
    signature: str = ""
    """How sacreBLEU computed it, for its own scores."""

    @property
    def gain(self) -> str:
        """How many times better than chance, as text; empty if that is unknown."""
        if not self.chance or not self.value:
            return ""
        ratio = self.chance / self.value if "rank" in self.metric else self.value / self.chance
        return f"{ratio:.1f} times"


class Evaluation(NamedTuple):
    """What was measured."""

    source: str
    """Name of the source of the rows."""
    split: str
    """Its split, or `all`."""
    results: list[Result]
    number: int | None = None
    """Number of rows, if it is told."""
    unit: str = "pairs"
    """What a row is."""

    @property
    def rows(self) -> str:
        """The rows that it was measured on, for people."""
        number = "" if self.number is None else f", {self.number:,} {self.unit}"
        return f"{self.source} ({self.split}{number})"


def check_task_options(given: Mapping[str, Any], tasks: Sequence[str], source: str) -> None:
    """Refuse options that would have no effect.

    Args:
        given: options of `OPTIONS_OF_TASKS` -> their values; None if an option was left out.
        tasks: the tasks that are measured.
        source: the source of the data, for the error message.

    Raises:
        TrunklineError: for the first option that would have no effect.
    """
    for option, value in given.items():
        if value is not None and not {*OPTIONS_OF_TASKS[option]} & {*tasks}:
            raise TrunklineError(
                f"--{option} is for {' and '.join(OPTIONS_OF_TASKS[option])}, but {source} is measured by "
                f"{', '.join(tasks)}; leave it out, or choose another --what"
            )


def show(results: list[Result], title: str) -> None:
    """Print the results as a table, and below it the signatures of sacreBLEU's scores."""
    by_chance = any(result.chance is not None for result in results)
    table = Table(title=title, title_justify="left")
    for name in ("task", "metric"):
        table.add_column(name)
    for name in ("value", "chance", "better by") if by_chance else ("value",):
        table.add_column(name, justify="right")
    for result in results:
        chance = "" if result.chance is None else f"{result.chance:.4g}"
        cells = (result.task, result.metric, f"{result.value:.4g}", chance, result.gain)
        table.add_row(*cells[: len(table.columns)])
    Console().print(table)
    for result in results:
        if result.signature:
            print(f"{result.metric}: {result.signature}")


def save(results: list[Result], output: str, about: dict[str, Any]) -> None:
    """Write a JSON file with the entries of `about`, and task -> metric -> value and chance (or signature)."""
    for result in results:
        figures = about.setdefault(result.task, {})
        figures[result.metric] = {"value": result.value, "chance": result.chance}
        if result.signature:
            figures[result.metric]["signature"] = result.signature
    atomic_write(Path(output), [(json.dumps(about, indent=2) + "\n").encode()], field="output")
