"""Configs by short name: `vit/digits` is the packaged `configs/vit/digits.yaml`."""

import difflib
from collections.abc import Iterable
from pathlib import Path

from trunkline import TrunklineError

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
DEFAULTS = CONFIGS / "defaults.yaml"


def nearest(name: str, known: Iterable[str]) -> str:
    """A question that names what was probably meant, or nothing."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.4)
    return f"; did you mean '{near[0]}'?" if near else ""


def config_names() -> list[str]:
    """Short names of all packaged configs."""
    return sorted(str(p.relative_to(CONFIGS).with_suffix("")) for p in CONFIGS.rglob("*.yaml") if p != DEFAULTS)


def find_config(name: str) -> Path:
    """The file of a path or a short name; a file of the user's own comes first.

    Raises:
        TrunklineError: if there is neither; suggests the nearest packaged name.
    """
    for path in (Path(name), CONFIGS / f"{name}.yaml"):
        if path.is_file():
            return path
    raise TrunklineError(
        f"there is no config '{name}'{nearest(name, config_names())} Packaged: {', '.join(config_names())}"
    )


def resolve_configs(arguments: list[str]) -> tuple[list[str], str | None]:
    """Command-line arguments with short names replaced by files, and the recipe's name (the first config's)."""
    resolved, recipe = [], None
    is_config = False
    for argument in arguments:
        name = argument.removeprefix("--config=") if argument.startswith("--config=") else argument
        if is_config or name != argument:
            path = find_config(name)
            if recipe is None:
                packaged = CONFIGS in path.resolve().parents
                recipe = str(path.resolve().relative_to(CONFIGS).with_suffix("")) if packaged else path.stem
            argument = str(path) if is_config else f"--config={path}"
        is_config = argument == "--config"
        resolved.append(argument)
    return resolved, recipe
