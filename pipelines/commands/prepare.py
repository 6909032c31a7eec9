"""`trunkline prepare`: tokenise a recipe's text before the run, for example on a machine without accelerators."""

import sys
import time
from typing import Any

from jsonargparse import SUPPRESS, ActionConfigFile
from rich.console import Console
from rich.table import Table

from trunkline import TrunklineError
from trunkline.datamodules.base import TrunklineDataModule
from trunkline.datamodules.text.preparation import Preparation
from trunkline.datamodules.text.text_data import TokenisedText
from trunkline.datamodules.translation.translation_data import TranslationData
from trunkline.pipelines.configs import resolve_configs
from trunkline.pipelines.objectives import data_classes
from trunkline.pipelines.parser import RecipeParser

SECTIONS = ("model", "trainer", "optimizer", "lr_scheduler")
UNREAD = ("seed_everything", "name", "run_dir", "resume", "threads", "compile", "test_with", "ckpt_path")


def run_prepare(arguments: list[str]) -> None:
    """Prepare the data of a recipe, and print where it is.

    Args:
        arguments: the command, and options as for `trunkline fit`; only the `data` section is used.

    Raises:
        TrunklineError: for bad input.
    """
    arguments, _ = resolve_configs(arguments[1:] if arguments[:1] == ["prepare"] else arguments)
    sys.argv[1:] = arguments  # the parser's messages look for flags and configs here
    data_classes()  # imports them, so that recipes can use their short names
    parser = make_parser()
    data = parser.instantiate_classes(parser.parse_args(own_arguments(arguments))).get("data")
    if data is None:
        raise TrunklineError("trunkline prepare needs a recipe, such as --config gpt/demo, or --data TextData")
    start = time.perf_counter()
    data.prepare_data()
    seconds = time.perf_counter() - start
    prepared = preparations(data)
    if not prepared:
        print(f"{type(data).__name__} keeps nothing of its own on disk; its data can be read")
        return
    Console(soft_wrap=True).print(summary(data, prepared, seconds))
    print(*(preparation.folder for preparation in prepared), sep="\n")  # in a table they could be wrapped


def make_parser() -> RecipeParser:
    """A parser that accepts a whole recipe and reads only its data."""
    parser = RecipeParser(
        prog="trunkline prepare",
        description="Tokenise the text of a recipe once; `trunkline fit` with the same data then starts at once. "
        "Other sections of the recipe are not read.",
    )
    parser.add_argument(
        "-c", "--config", action=ActionConfigFile, help="A recipe's file or short name; compose several."
    )
    parser.add_subclass_arguments(TrunklineDataModule, "data", required=False)
    for name in (*SECTIONS, *UNREAD):
        parser.add_argument(f"--{name}", type=Any, default=None, help=SUPPRESS)
    return parser


def own_arguments(arguments: list[str]) -> list[str]:
    """The command line without flags such as `--trainer.max_epochs 3`, which this parser does not know."""
    kept: list[str] = []
    dropping = False
    for argument in arguments:
        if argument.startswith("-") and not argument[1:2].isdigit():
            name = argument.lstrip("-").partition("=")[0].partition(".")[0]
            foreign = argument.startswith("--") and name in (*SECTIONS, *UNREAD)
            dropping = foreign and "=" not in argument
            if foreign:
                continue
        elif dropping:
            dropping = False
            continue
        kept.append(argument)
    return kept


def preparations(data: TrunklineDataModule) -> list[Preparation]:
    """The prepared corpora of a datamodule; empty if it prepares none."""
    if isinstance(data, TranslationData):
        return data.preparations
    return [data.preparation] if isinstance(data, TokenisedText) else []


def summary(data: Any, prepared: list[Preparation], seconds: float) -> Table:
    """A table of what was prepared."""
    table = Table(show_header=False, title="prepared")
    bytes_read, sides = 0, [""] if len(prepared) == 1 else [" sources", " targets"]
    for preparation, side in zip(prepared, sides, strict=True):
        for split, entry in preparation.prepare()["splits"].items():
            size = f"{entry['bytes'] / 1e6:,.1f} MB of text"
            table.add_row(split + side, f"{entry['tokens']:,} tokens, {entry['documents']:,} documents, {size}")
            bytes_read += entry["bytes"]
    facts = data.facts
    table.add_row("vocabulary", f"{facts.vocab_size:,} tokens of {data.tokenizer}")
    if isinstance(data, TranslationData):
        if data.target_tokenizer is not None:
            table.add_row("of the targets", f"{facts.target_vocab_size:,} tokens of {data.target_tokenizer}")
        data.setup("fit")
        for split in data.datasets:
            table.add_row(f"{split} pairs", data.summary(split))
    table.add_row("time", f"{seconds:.1f} s, {bytes_read / 1e6 / seconds:.1f} MB/s")
    return table
