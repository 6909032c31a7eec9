"""Parsers of flags and configs, whose errors say in one sentence what is wrong and where."""

import dataclasses
import inspect
import re
import sys
import sysconfig
import traceback
from collections.abc import Collection, Iterator, Sequence
from functools import reduce
from importlib import import_module
from importlib.util import find_spec
from inspect import Parameter
from operator import or_
from pathlib import Path
from typing import Any, NoReturn, Union, get_args, get_origin, get_type_hints

from jsonargparse import ArgumentParser, set_parsing_settings

from trunkline import TrunklineError
from trunkline.pipelines.configs import nearest
from trunkline.pipelines.errors import Place, config_files, flags, locate, own_error, plain, read_entries
from trunkline.pipelines.familiar_flags import familiar
from trunkline.pipelines.objectives import KINDS, PROBES, data_classes, import_class, objective_classes, short
from trunkline.pipelines.renamed import OLD_KEYS, moved, new_flag, outdated

LIBRARIES = ("trunkline.", "lightning.")
"""Packages whose class paths are not the user's own."""
TENSOR_PARALLELISM = (
    "tensor parallelism is an option of the strategy in trainer/fsdp; set --config trainer/fsdp "
    "--trainer.strategy.tensor_parallel_size 2"
)
NO_TENSOR_PARALLELISM = re.compile(
    r"(?:Option '|unrecognized arguments: --|import path string: \w+ .*NestedArg\(key=')(tensor[_-]parallel[_-]size)\b"
)
"""What jsonargparse says where no class takes the option."""
OPEN_ENDED = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)


class CommandParser(ArgumentParser):
    """Reports bad input with one message and a suggestion, where argparse would print a page of usage.

    Flags cannot be abbreviated: a misspelt flag is an error.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "allow_abbrev": False})

    def parse_args(self, args: Sequence[str] | None = None, *others: Any, **options: Any) -> Any:  # type: ignore[override]
        """Parse; help shows the docstring below each field of a dataclass, and to read them all takes a second."""
        asked = any("help" in argument for argument in args or [])
        set_parsing_settings(docstring_parse_attribute_docstrings=asked)
        return super().parse_args(args, *others, **options)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise instead of exiting."""
        own = own_error(ex)  # an error of our own constructors has the best message
        raise own or TrunklineError(explain(" ".join(message.split()), self.known_names())) from ex

    def known_names(self) -> set[str]:
        """Dotted names of all options."""
        parsers = [self, *(getattr(self._subcommands_action, "choices", None) or {}).values()]
        return {action.dest for parser in parsers for action in parser._actions}


class RecipeParser(CommandParser):
    """A `CommandParser` that reads recipes."""

    def known_names(self) -> set[str]:
        from lightning import Trainer

        names = super().known_names() | set(dotted(Trainer, "trainer"))
        for group, classes in (("model", objective_classes()), ("data", data_classes())):
            for cls in classes:
                names |= set(dotted(cls, group))
        return names


def dotted(cls: type, prefix: str) -> Iterator[str]:
    """Dotted names of a class's arguments, of those that it passes on to its bases, and of dataclass fields in them."""
    for base in cls.__mro__:
        if "__init__" not in vars(base) or base is object:
            continue
        parameters = inspect.signature(base.__init__).parameters  # type: ignore[misc]
        try:
            hints = get_type_hints(base.__init__)  # type: ignore[misc]
        except NameError:  # types that are imported only for type checkers: these arguments are no options
            return
        for name in [name for name in hints if name in parameters and parameters[name].kind not in OPEN_ENDED]:
            yield f"{prefix}.{name}"
            for kind in (hints[name], *get_args(hints[name])):
                if dataclasses.is_dataclass(kind) and isinstance(kind, type):
                    yield from dotted(kind, f"{prefix}.{name}")
        if all(parameter.kind is not Parameter.VAR_KEYWORD for parameter in parameters.values()):
            return


def explain(message: str, names: Collection[str]) -> str:
    """Turn jsonargparse's message (in one line) into a sentence that names the flag or the line, and the remedy."""
    if parallel := NO_TENSOR_PARALLELISM.search(message):
        return f"{locate(parallel[1]).text}: {TENSOR_PARALLELISM}"
    # An argument of a class, such as a strategy; the last error is the one inside it.
    nested = re.search(
        r"key \"(trainer\.\S+)\": .* - (.+?) Given value type: .* Given value: (NestedArg|{'class_path)", message
    )
    if nested:
        return explain_nested(nested[1], nested[2])
    unknown = re.search(r"Option '(\S+)' is not|not accept option '(\S+)'|unrecognized arguments: ([^\s=]+)", message)
    if unknown:
        return explain_option(next(group for group in unknown.groups() if group).lstrip("-"), names)
    other = re.search(r"Subclasses are disabled for (\w+), thus '(?:\w+\.)*(\w+)' is not accepted", message)
    if other:
        return (
            f"the recipe's network is a {other[2].removesuffix('Config')}, but this model needs a "
            f"{other[1].removesuffix('Config')}; start from a recipe of this model"
        )
    path = re.search(r"import path string: (\S+)|given class_path '(\S+)'", message)
    if path:
        return explain_class(path[1] or path[2])
    wrong = re.search(
        r'key "(\S+)": .*?(?:Expected an? (.+?)\.|Subtypes: \[(.+)\] Errors.*) (?:Got|Given) value: (.*)', message
    )
    if wrong:
        place = locate(wrong[1])
        subject = place.text if place.is_flag else f"{place.text}: {wrong[1]}"
        kinds = wrong[2] or wrong[3].replace(">, ", "> or ").replace("], ", "] or ").replace("NoneType", "null")
        kinds = re.sub(r"<class '(?:\w+\.)*(\w+)'>|typing\.", r"\1", kinds)
        return f"{subject} must be {kinds}, not '{wrong[4]}'"
    if "are required: fit.data" in message:
        return "trunkline fit needs a recipe, such as --config vit/digits"
    if message.endswith("are required: data"):
        return "there is no data; say which, such as --data.source openmoji"
    if lacking := re.search(r"following arguments are required: (.+)", message):
        return f"this command needs {' and '.join(f'--{name}' for name in lacking[1].split(', '))}"
    return message


def explain_nested(key: str, inner: str) -> str:
    """The message for a class at `key` whose argument is wrong, for which `inner` is the message."""
    path = re.fullmatch(r"Expected a dot import path string: (\S+)", inner)
    if path is None:
        return inner
    given = next((plain(flag) for flag, _ in flags() if plain(flag).startswith(f"{key}.")), key)
    option = given.removeprefix(f"{key}.")
    said = f"--{given}: {key} is the word '{path[1]}', which takes no {option}"
    return f"{said}; name a class instead, such as --trainer.strategy DDPStrategy"


def explain_option(key: str, names: Collection[str]) -> str:
    """The message for an unknown option."""
    place = locate(key, preferred=OLD_KEYS)
    if place.is_flag:
        new = new_flag(place.key)
        if new is not None:
            return f"there is no option {place.text} any more; it is --{new} now"
        if place.key in names:  # of another recipe's class
            others = [name for name in sorted(names) if name != place.key and same_end(name, place.key)]
            where = f"; its network may have it as --{' or --'.join(others)}" if others else ""
            return f"this recipe has no option {place.text}{where}; `--help model` after its --config lists its options"
        ours = familiar(place.key, names)
        hint = closest(place.key, names, "--") if ours is None else f"; did you mean '--{ours}'?"
        return f"there is no option {place.text}{hint}"
    if place.config is None and f"-{key}" in sys.argv:
        ours = familiar(key, names)
        return f"there is no option -{key}" + ("" if ours is None else f"; did you mean '--{ours}'?")
    if place.config is None:
        text = next((name for name in ("text", "query", "sentence") if name in names), None)
        mend = (
            "write the option that it belongs to before it"
            if text is None
            else (f"write a text directly after the command; if it begins with a hyphen, write --{text}='-5 degrees'")
        )
        return f"'{key}' follows no option; {mend}"
    return of_older_version(place) or f"{place.text}: there is no '{key}'{closest(key, names)}"


def same_end(name: str, other: str) -> bool:
    """Whether the last two parts of dotted names are the same."""
    return name.split(".")[-2:] == other.split(".")[-2:]


def closest(name: str, names: Collection[str], dashes: str = "") -> str:
    """A hint at the nearest known name with the same number of parts."""
    level = name.count(".") + 1
    return nearest(f"{dashes}{name}", {dashes + ".".join(known.split(".")[-level:]) for known in names}, cutoff=0.6)


def explain_class(path: str) -> str:
    """The message for a class path that cannot be imported."""
    place, names = locate(path), likely_classes()
    older = of_older_version(place)
    if older:
        return older
    if moved(path, names):
        return f"{place.text}: there is no class '{path}' any more; it is {short(path)} now"
    module, _, name = path.rpartition(".")
    if module and not f"{module}.".startswith(LIBRARIES):
        if module not in sys.modules:
            return f"{place.text}: there is no module {module} in this folder or among the installed packages"
        classes = [known for known, value in vars(sys.modules[module]).items() if isinstance(value, type)]
        return f"{place.text}: the module {module} has no class '{name}'{nearest(name, classes)}"
    return f"{place.text}: there is no class '{path}'{nearest(short(path), names)}"


def of_older_version(place: Place) -> str | None:
    """The message for a config of an older version, with the new names; None if `place` is in no such config."""
    found = outdated(place.entries, likely_classes())
    if not any(entry.line == place.line for entry in found):
        return None
    mended = "; ".join(map(str, found))
    return f"{place.config} was written for an older version; {mended}; change {'it' if len(found) == 1 else 'them'}"


def likely_classes() -> list[str]:
    """Names of classes that a `class_path` is likely to name."""
    import lightning.pytorch.callbacks

    import trunkline.modules.callbacks

    own = [short(path) for kind in KINDS.values() for path in (kind.objective, kind.data)] + [short(PROBES)]
    return own + lightning.pytorch.callbacks.__all__ + trunkline.modules.callbacks.__all__


def whole_numbers_first(cls: type) -> None:
    """Let a 1 be a whole number where a class takes those and fractions, as `limit_val_batches` of the trainer does.

    jsonargparse takes the first type that fits. But `typing` makes one object of `Union[int, float]` and of
    `Union[float, int]`, whichever it met first: where scikit-learn, say, is imported before Lightning, 1 batch would
    become 1.0, all of them.
    """
    annotations = getattr(inspect.unwrap(cls.__init__), "__annotations__", {})  # type: ignore[misc]
    for name, annotation in annotations.items():
        kinds = list(get_args(annotation)) if get_origin(annotation) is Union else []
        if {int, float} <= {*kinds} and kinds.index(float) < kinds.index(int):
            kinds.remove(int)
            kinds.insert(kinds.index(float), int)
            annotations[name] = reduce(or_, kinds)  # unlike that of `Union`, its order is kept


def import_recipe_classes(texts: Collection[str]) -> None:
    """Import the classes that a recipe may name without a path, such as `class_path: ImageClassifier`.

    Args:
        texts: the command line and the configs.
    """
    import trunkline.modules.callbacks

    assert trunkline.modules.callbacks.__all__
    import_own_classes()
    objective_classes()
    data_classes()
    if any(short(PROBES) in text for text in texts):
        import_class(PROBES)


ROOMS = [
    str(Path(__file__).resolve().parents[1] / name) for name in ("pipelines", "modules", "datamodules", "trunkline")
]
"""Folders of our own code; in a clone, the user's own may stand beside them."""
CLASS_PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)+")


def import_own_classes() -> None:
    """Import the user's modules that flags and configs name by class paths.

    jsonargparse would hide an error inside such a module, or call it a wrong type.

    Raises:
        TrunklineError: with the error as the module raised it, and its line.
    """
    given = [value for name, value in flags() if plain(name).rpartition(".")[2] in ("model", "data", "callbacks")]
    given += [value for name, value in flags() if plain(name).endswith("class_path")]
    for config in config_files():
        given += [entry.value or "" for entry in read_entries(config) if entry.key.endswith("class_path")]
    for path in given:
        module = path.rpartition(".")[0]
        if not CLASS_PATH.fullmatch(path) or f"{module}.".startswith(LIBRARIES):
            continue
        try:
            import_module(module)
        except Exception as error:  # whatever the user's code raises
            if isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}."):
                continue  # the module itself is missing, which the parser reports
            said = f"{type(error).__name__}: {error}"
            raise TrunklineError(
                f"{locate(path).text}: importing {module} failed{line_of(error, module)}: {said}"
            ) from error


def line_of(error: Exception, module: str) -> str:
    """` at FILE, line N`: the last line of the user's module in the traceback; empty if none is there."""
    if isinstance(error, SyntaxError):
        return ""  # its message names them
    spec = find_spec(module.partition(".")[0])
    folder = Path((spec and spec.origin) or "").parent
    lines = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).is_relative_to(folder)]
    return f" at {lines[-1].filename}, line {lines[-1].lineno}" if spec and lines else ""


def of_own_constructor(error: BaseException) -> TrunklineError | None:
    """The error that a class of the user's own raised when it was made, which jsonargparse hides; None if none did."""
    cause = error.__cause__
    while cause is not None and cause.__cause__ is not None:
        cause = cause.__cause__
    installed = (sysconfig.get_path(name) for name in ("purelib", "platlib", "stdlib"))
    libraries = *ROOMS, *(str(Path(path).resolve()) for path in installed)  # an environment may be reached by a link
    own = [
        frame
        for frame in (traceback.extract_tb(cause.__traceback__) if cause else [])
        if Path(frame.filename).is_file() and not str(Path(frame.filename).resolve()).startswith(libraries)
    ]
    return (
        TrunklineError(f"{own[-1].filename}, line {own[-1].lineno}: {type(cause).__name__}: {cause}") if own else None
    )
