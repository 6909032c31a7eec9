"""The `trunkline` command."""

import inspect
import json
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib import import_module
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any, NamedTuple

from trunkline import LostProcess, TrunklineError, __version__
from trunkline.pipelines.errors import TRY_AGAIN, from_outside, options_given, own_error, report
from trunkline.pipelines.launch import is_first_process
from trunkline.pipelines.objectives import import_class
from trunkline.pipelines.quick_imports import import_torchmetrics, put_off_collection, resume_collection
from trunkline.pipelines.quiet import quieten

TRAINING = {
    "fit": "train a model, then test it",
    "validate": "evaluate a checkpoint on the validation split",
    "test": "evaluate a checkpoint on the test split",
}
PREPARATION = {
    "check": "prove on this machine that a recipe can be trained: processes, resume, gradients, memory, time",
    "prepare": "tokenise a recipe's text ahead of its run",
}
LISTINGS = {"list": "the packaged recipes by model, with data, size, time and result"}
HELP = ("-h", "--help")
REFUSED = "TRUNKLINE_REFUSED"
"""Environment variable with the path of a file that bad input makes."""


class Function(NamedTuple):
    """A command that is a function. It is imported only when called, so that `trunkline --help` answers at once."""

    module: str
    name: str
    help: str
    completion: str | None = None
    """Path of what completes the command's arguments before they are read."""


FUNCTIONS = {
    "convert": Function("commands.convert", "convert", "write a checkpoint's network as one safetensors file"),
    "draw": Function(
        "commands.draw", "draw_runs", "write what TensorBoard shows of runs as files: curves, pictures, texts"
    ),
    "embed": Function("commands.embed", "embed", "write embeddings of texts, images or sounds with a checkpoint"),
    "evaluate": Function(
        "evaluation.evaluate",
        "evaluate",
        "judge a network: retrieval, zero-shot, k-NN, linear probe; BLEU and exact match; word error rate",
        completion="evaluation.data.with_data_class",
    ),
    "export": Function("commands.export", "export", "write a checkpoint's network as ONNX or as a program of torch"),
    "fill-mask": Function(
        "commands.fill_mask", "fill_mask", "predict the masked words of a sentence with a checkpoint"
    ),
    "generate": Function("commands.generate", "generate_text", "continue a text with a checkpoint"),
    "predict": Function("commands.predict", "predict", "classify images, sounds or texts with a checkpoint"),
    "search": Function("commands.search", "search", "find the pictures that a text describes, with a checkpoint"),
    "transcribe": Function("commands.transcribe", "transcribe", "write what is said in recordings with a checkpoint"),
    "translate": Function("commands.translate", "translate", "translate or summarise texts with a checkpoint"),
    "benchmark": Function("benchmarks.benchmark", "benchmark", "measure speed side by side with peers"),
}
"""Commands that are functions, by name; their modules are below `trunkline.pipelines`."""

POSITIONAL = {
    "draw": "--runs",
    "fill-mask": "--sentence",
    "search": "--query",
    "transcribe": "--audio",
    "translate": "--text",
}
"""Flag of each command whose value may follow the command without the flag."""
DEFECT = "If no code of your own is at fault, this is a defect of Trunkline: please report it with these lines."
"""The line below the traceback of an error that is not about the input."""
SEVERAL = ("draw", "fill-mask", "transcribe", "translate")
"""Commands of which several values may follow."""


def main(arguments: list[str] | None = None) -> None:
    """Entry point. Bad input prints one message and exits with code 2, the loss of another process of the run with
    `TRY_AGAIN`; only a defect of ours prints a traceback.
    """
    if arguments is None:
        arguments = sys.argv[1:]
        put_off_collection()
    command = arguments[0] if arguments else "--help"
    options: Mapping[str, inspect.Parameter] | None = None
    try:
        if answered(command, arguments):
            return
        say_that_it_starts(command)
        import_torchmetrics(arguments)
        if command in TRAINING:
            from trunkline.pipelines.training import run_training

            resume_collection()
            run_training(arguments)
        elif command == "check":
            from trunkline.pipelines.checks.check import run_check

            resume_collection()
            run_check(arguments)
        elif command in PREPARATION:
            from trunkline.pipelines.commands.prepare import run_prepare

            resume_collection()
            run_prepare(arguments)
        else:
            function = load_function(FUNCTIONS[command])
            resume_collection()
            parameters = inspect.signature(function).parameters
            options = None if "data" in parameters else parameters  # data's flags are those of a config
            run_function(function, command, arguments)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except Exception as error:
        own = own_error(error) or from_outside(error, rows_at_a_time(options, arguments))
        if own is None:
            error.add_note(DEFECT)
            raise
        if not isinstance(own, LostProcess):
            note_refusal()
        report(own, options)
        raise SystemExit(TRY_AGAIN if isinstance(own, LostProcess) else 2) from None


def rows_at_a_time(options: Mapping[str, inspect.Parameter] | None, arguments: list[str]) -> int | None:
    """The batch size of a command that is a function, as given or by default; None if it has none."""
    if options is None or "batch_size" not in options:
        return None
    given = [value for name, value in options_given(arguments) if name == "--batch_size"]
    size: int = int(given[-1]) if given and given[-1].isdigit() else options["batch_size"].default
    return size


def note_refusal() -> None:
    """Make the file that a job's script waits for: of several processes' exit codes it sees only one.

    The first process that ends lets srun end the others, and their codes, which are larger, hide that of bad input.
    """
    file = os.environ.get(REFUSED)
    if file:
        with suppress(OSError):
            Path(file).touch()


def answered(command: str, arguments: list[str]) -> bool:
    """Print what needs no training library: help pages, the version, the list of recipes. True if that was asked for.

    Raises:
        TrunklineError: for an unknown command.
    """
    if command == "--version":
        print(f"trunkline {__version__}")
    elif command in (*HELP, "help"):
        print(usage())
    elif command in LISTINGS:
        from trunkline.pipelines.recipes import recipe_table

        print(recipe_table())
    elif command not in (*TRAINING, *PREPARATION, *FUNCTIONS):
        from trunkline.pipelines.configs import nearest

        known = [*TRAINING, *PREPARATION, *LISTINGS, *FUNCTIONS]
        raise TrunklineError(f"there is no command '{command}'{nearest(command, known)}")
    else:
        page = help_page(command, arguments)
        if page is None:
            return False
        print(page)
    return True


def help_page(command: str, arguments: list[str]) -> str | None:
    """The help page that the arguments ask for; None if they ask for none, or for one that the parser prints.

    `--help all`, and `--help data` or `--help model` for a recipe, become flags of the parser.
    """
    place = next((number for number, argument in enumerate(arguments) if argument in HELP), None)
    if place is None:
        return None
    from trunkline.pipelines import help as pages

    topic = arguments[place + 1] if place + 1 < len(arguments) else ""
    if command in FUNCTIONS:
        function = FUNCTIONS[command]
        return pages.function_page(command, function.help, function.module, function.name, POSITIONAL.get(command))
    title = {**TRAINING, **PREPARATION}[command]
    if topic == "all":
        del arguments[place + 1]
        return None
    if topic in ("data", "model"):
        recipes = [value for name, value in options_given(arguments) if name in ("--config", "-c")]
        if not recipes:
            return pages.class_page(topic)
        arguments[1:] = [f"--{topic}.help", pages.class_of(recipes, topic)]
        return None
    return pages.training_page(command, title)


def say_that_it_starts(command: str) -> None:
    """Print a line before the libraries are imported, which takes seconds.

    Only the first process of a run says it, and the commands that write to standard output only to a terminal.
    """
    if is_first_process() and (command in (*TRAINING, "check") or sys.stderr.isatty()):
        print(f"trunkline {command}: starting", file=sys.stderr, flush=True)


def load_function(function: Function) -> Callable[..., None]:
    """Import the function of a command."""
    found: Callable[..., None] = getattr(import_module(f"trunkline.pipelines.{function.module}"), function.name)
    return found


def run_function(function: Callable[..., None], command: str, arguments: list[str]) -> None:
    """Call the function of a command; `arguments` are the command and its flags."""
    from jsonargparse import auto_cli

    from trunkline.pipelines.parser import CommandParser

    quieten()
    sys.argv[1:] = arguments  # error messages look for flags here
    given = arguments[1:]
    completion = FUNCTIONS[command].completion
    if completion:
        given = import_class(f"trunkline.pipelines.{completion}")(given)
    values = list(takewhile(lambda argument: not argument.startswith("-"), given))
    if command in SEVERAL and values:
        given = [POSITIONAL[command], json.dumps(values), *given[len(values) :]]
    elif command in POSITIONAL and values:
        given = [POSITIONAL[command], *given]
    given = switched_on(function, given)
    options: dict[str, Any] = {"as_positional": False, "parser_class": CommandParser}
    auto_cli(function, args=given, prog=f"trunkline {command}", **options)


def switched_on(function: Callable[..., None], arguments: list[str]) -> list[str]:
    """The arguments with `true` after each yes-or-no flag that stands without a value."""
    parameters = inspect.signature(function).parameters.values()
    switches = {f"--{parameter.name}" for parameter in parameters if isinstance(parameter.default, bool)}
    found = []
    for argument, following in pairwise([*arguments, "--"]):
        found.append(argument)
        if argument in switches and following.startswith("-"):
            found.append("true")
    return found


def usage() -> str:
    """The help text: all commands, one per line."""
    commands = {**LISTINGS, **TRAINING, **PREPARATION, **{name: f.help for name, f in FUNCTIONS.items()}}
    lines = "\n".join(f"  {name:<10} {text}" for name, text in commands.items())
    return (
        "usage: trunkline COMMAND [options]\n\n"
        f"{lines}\n\ntrunkline COMMAND --help lists its options. Configs have short names, and compose left to right:\n"
        "  trunkline fit --config vit/digits --config trainer/cpu --trainer.max_epochs 5"
    )


if __name__ == "__main__":
    main()
