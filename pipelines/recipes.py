"""What the packaged recipes say about themselves in their first lines: data, size, time and measured result."""

import re
from pathlib import Path
from typing import NamedTuple

from trunkline import TrunklineError
from trunkline.pipelines.configs import CONFIGS, config_names

SHORT, MEASURED, NOT_RUN = "# In short: ", "# Measured: ", "not yet run"


class Recipe(NamedTuple):
    """A recipe in five words or so each."""

    name: str
    data: str
    parameters: str
    time: str
    result: str
    """What was measured, up to its first qualification; `NOT_RUN` if nothing was."""


def header(name: str) -> list[str]:
    """The comment lines at the beginning of a packaged config."""
    lines = (CONFIGS / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    return lines[: next((number for number, line in enumerate(lines) if not line.startswith("#")), len(lines))]


def recipes() -> list[Recipe]:
    """All packaged recipes, sorted by name; configs of machines are not among them.

    Raises:
        TrunklineError: if a recipe lacks the line `# In short: data | parameters | time`, or `# Measured: `.
    """
    found = []
    for name in config_names():
        if name.startswith("trainer/"):
            continue
        text = "\n".join(header(name))
        short = re.search(rf"^{SHORT}(.+) \| (.+) \| (.+)$", text, re.M)
        measured = re.search(rf"^{MEASURED}(.+)(?:\n# )?(.*)", text, re.M)
        if short is None or measured is None:
            raise TrunklineError(f"the config {name} has no line '{SHORT}data | parameters | time' or '{MEASURED}…'")
        result = re.split(r"[;(]|, |\. |\.$", " ".join(measured.groups()))[0]
        found.append(Recipe(name, short[1], short[2], short[3], result.strip()))
    return found


def machines() -> list[tuple[str, str]]:
    """The packaged configs of machines, each with its description."""
    names = [name for name in config_names() if name.startswith("trainer/")]
    return [(name, header(name)[1].removeprefix("# ").rstrip(".")) for name in names]


def recipe_table() -> str:
    """All recipes by model, a line each, with data, size, time and result; then the machines."""
    rows = [Recipe("recipe", "data", "size", "time", "measured"), *recipes()]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = []
    folder = ""
    for row in rows:
        if row.name != "recipe" and Path(row.name).parent.name != folder:
            folder = Path(row.name).parent.name
            lines.append("")
        lines.append("  ".join([*map(str.ljust, row[:4], widths), row.result]).rstrip())
    width = max(len(name) for name, _ in machines())
    lines += ["", "machines, to be added to a recipe"] + [f"{name:<{width}}  {text}" for name, text in machines()]
    return "\n".join(lines)
