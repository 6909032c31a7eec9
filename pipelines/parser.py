"""Reads flags and configs, and says in one sentence what is wrong with them and where."""

import dataclasses
import re
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn, get_args, get_type_hints

import lightning as L
from lightning.pytorch import callbacks
from lightning.pytorch.cli import LightningArgumentParser

import trunkline.modules.callbacks
from trunkline import TrunklineError
from trunkline.datamodules import (
    ImageData,
    ImageTextData,
    LabelledTextData,
    MaskedTextData,
    SquadData,
    TaggedTextData,
    TextData,
)
from trunkline.modules.objectives.causal_lm import CausalLM
from trunkline.modules.objectives.contrastive_image_text import ContrastiveImageText
from trunkline.modules.objectives.image_classifier import ImageClassifier
from trunkline.modules.objectives.masked_lm import MaskedLM
from trunkline.modules.objectives.question_answering import QuestionAnswering
from trunkline.modules.objectives.text_classifier import TextClassifier
from trunkline.modules.objectives.token_classifier import TokenClassifier
from trunkline.pipelines.cli import own_error
from trunkline.pipelines.configs import nearest

# Importing a class makes its short name known: `class_path: ImageClassifier`.
OBJECTIVES = (
    CausalLM,
    ContrastiveImageText,
    ImageClassifier,
    MaskedLM,
    QuestionAnswering,
    TextClassifier,
    TokenClassifier,
)
DATA = (ImageData, ImageTextData, LabelledTextData, MaskedTextData, SquadData, TaggedTextData, TextData)


class Parser(LightningArgumentParser):
    """Reports bad input as an error with a suggestion, where argparse would print a page of usage.

    Flags cannot be abbreviated: a misspelt one is an error.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "allow_abbrev": False})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise instead of exiting."""
        own = own_error(ex)  # what our own constructors raised says it best
        raise own or TrunklineError(explain(" ".join(message.split()), self.known_names())) from ex

    def known_names(self) -> set[str]:
        """Every option, dotted."""
        parsers = [self, *(getattr(self._subcommands_action, "choices", None) or {}).values()]
        names = {action.dest for parser in parsers for action in parser._actions} | set(dotted(L.Trainer, "trainer"))
        for group, classes in (("model", OBJECTIVES), ("data", DATA)):
            for cls in classes:
                names |= set(dotted(cls, group))
        return names


def dotted(cls: type, prefix: str) -> Iterator[str]:
    """Names of a class's arguments, and of the fields of dataclasses among them."""
    for name, hint in get_type_hints(cls.__init__).items():  # type: ignore[misc]
        if name != "return":
            yield f"{prefix}.{name}"
            for kind in (hint, *get_args(hint)):
                if dataclasses.is_dataclass(kind) and isinstance(kind, type):
                    yield from dotted(kind, f"{prefix}.{name}")


def explain(message: str, names: set[str]) -> str:
    """Jsonargparse's message, in one line, as a sentence that names the flag or the line of a config, and the mend."""
    unknown = re.search(r"Option '(\S+)' is not|not accept option '(\S+)'|unrecognized arguments: ([^\s=]+)", message)
    if unknown:
        key = next(group for group in unknown.groups() if group).lstrip("-")
        place = locate(key)
        name = place.removeprefix("--") if place.startswith("--") else key
        level = name.count(".") + 1
        hint = nearest(name, {".".join(n.split(".")[-level:]) for n in names}, cutoff=0.6)
        return f"there is no option {place}{hint}" if place.startswith("--") else f"{place}: there is no '{key}'{hint}"
    path = re.search(r"import path string: (\S+)|given class_path '(\S+)'", message)
    if path:
        given = path[1] or path[2]
        return f"{locate(given)}: there is no class '{given}'{nearest(given.rpartition('.')[2], class_names())}"
    wrong = re.search(
        r'key "(\S+)": .*?(?:Expected an? (.+?)\.|Subtypes: \[(.+)\] Errors.*) (?:Got|Given) value: (.*)', message
    )
    if wrong:
        place = locate(wrong[1])
        subject = place if place.startswith("--") else f"{place}: {wrong[1]}"
        kinds = wrong[2] or wrong[3].replace(">, ", "> or ").replace("], ", "] or ").replace("NoneType", "null")
        kinds = re.sub(r"<class '(?:\w+\.)*(\w+)'>|typing\.", r"\1", kinds)
        return f"{subject} must be {kinds}, not '{wrong[4]}'"
    if "are required: fit.data" in message:
        return "trunkline fit needs a recipe, such as --config vit/digits"
    return message


def class_names() -> list[str]:
    """Classes that a `class_path` is likely to name."""
    return [c.__name__ for c in (*OBJECTIVES, *DATA)] + callbacks.__all__ + trunkline.modules.callbacks.__all__


def locate(text: str) -> str:
    """The flag on the command line, or the config's file and line, that gives a key or value."""
    arguments = sys.argv[1:]
    for argument, following in pairwise([*arguments, ""]):
        name, _, value = argument.partition("=")
        dotted_name = name.replace(".init_args.", ".").removesuffix("+")
        if name.startswith("--") and (f".{dotted_name[2:]}".endswith(f".{text}") or text in (value, following)):
            return dotted_name
    configs = [value for flag, value in pairwise(arguments) if flag in ("--config", "-c")]
    configs += [a.partition("=")[2] for a in arguments if a.startswith("--config=")]
    word = re.compile(rf"(?<!\w){re.escape(text.rpartition('.')[2])}(?!\w)")
    for config in reversed(configs):
        for number, line in enumerate(Path(config).read_text(encoding="utf-8").splitlines(), start=1):
            if word.search(line.partition("#")[0]):
                return f"{config}, line {number}"
    return text
