"""Find configs by short name: `vit/digits` is the packaged file `configs/vit/digits.yaml`."""

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from trunkline import TrunklineError

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
DEFAULTS = CONFIGS / "defaults.yaml"


def nearest(name: str, known: Iterable[str], cutoff: float = 0.4) -> str:
    """`; did you mean 'NAME'?` with the known name nearest to `name`; empty if none is similar."""
    near = difflib.get_close_matches(name, sorted(known), n=1, cutoff=cutoff)
    return f"; did you mean '{near[0]}'?" if near else ""


def config_names() -> list[str]:
    """Short names of all packaged configs."""
    return sorted(str(p.relative_to(CONFIGS).with_suffix("")) for p in CONFIGS.rglob("*.yaml") if p != DEFAULTS)


class StrictLoader(yaml.SafeLoader):
    """Reads plain YAML, and refuses a key that stands twice in a section: one of its values would be lost."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for key, _ in node.value:
            if keys.count(key.value) > 1 and key.value != "<<":
                raise yaml.constructor.ConstructorError(
                    problem=f"'{key.value}' stands here twice; remove one of them", problem_mark=key.start_mark
                )
        return super().construct_mapping(node, deep)


def find_config(name: str) -> Path:
    """The config file for a path or a short name; an existing path comes first.

    Raises:
        TrunklineError: if there is neither, with the nearest packaged name; or if it is not a YAML file with sections.
    """
    if Path(name).exists() and not Path(name).is_file() and not Path(name).is_dir():
        raise TrunklineError(f"--config {name} is not a regular file; give a YAML file")
    for path in (Path(name), CONFIGS / f"{name}.yaml"):
        if path.is_file():
            try:
                content = yaml.load(path.read_text(encoding="utf-8"), StrictLoader)
            except (yaml.YAMLError, UnicodeDecodeError) as error:
                raise TrunklineError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
            if not isinstance(content, dict):
                raise TrunklineError(f"{path} has no sections such as `model:`, `data:` and `trainer:`")
            return path
    raise TrunklineError(
        f"there is no config '{name}'{nearest(name, config_names()) or ';'} packaged are {', '.join(config_names())}"
    )


def resolve_configs(arguments: list[str]) -> tuple[list[str], str | None]:
    """Replace short names of configs by files; also returns the recipe's name, which is that of the first config.

    Raises:
        TrunklineError: if a config cannot be read, or if two of them are whole packaged recipes.
    """
    resolved, recipe, complete = [], None, []
    is_config = False
    for argument in arguments:
        name = argument.removeprefix("--config=") if argument.startswith("--config=") else argument
        if is_config or name != argument:
            path = find_config(name)
            packaged = CONFIGS in path.resolve().parents
            if packaged and "model" in yaml.safe_load(path.read_text(encoding="utf-8")):
                complete.append(name)
            if recipe is None:
                recipe = str(path.resolve().relative_to(CONFIGS).with_suffix("")) if packaged else path.stem
            argument = str(path) if is_config else f"--config={path}"
        is_config = argument in ("--config", "-c")
        resolved.append(argument)
    if arguments[-1:] in (["--config"], ["-c"]):
        raise TrunklineError(f"{arguments[-1]} is the last word; write the name of a config after it")
    if len(set(complete)) > 1:
        raise TrunklineError(
            f"{' and '.join(complete)} are both recipes, which cannot be merged; give one of them, and change it with "
            "flags or a config of your own"
        )
    return resolved, recipe
