"""The `trunkline` command."""

import os
import re
import shutil
import sys
import textwrap
import time
from collections.abc import Callable
from typing import Any

from trunkline import TrunklineError, __version__

TRAINING = {
    "fit": "train a model, then test it",
    "validate": "evaluate a checkpoint on the validation split",
    "test": "evaluate a checkpoint on the test split",
}
PREPARATION = {"prepare": "tokenise a recipe's text ahead of its run"}


def predict_command() -> Callable[..., None]:
    """Imported when called, so that `trunkline --help` answers at once; likewise below."""
    from trunkline.pipelines.commands.predict import predict

    return predict


def benchmark_command() -> Callable[..., None]:
    """See `predict_command`."""
    from trunkline.pipelines.benchmarks.benchmark import benchmark

    return benchmark


def generate_command() -> Callable[..., None]:
    """See `predict_command`."""
    from trunkline.pipelines.commands.generate import generate

    return generate


def fill_mask_command() -> Callable[..., None]:
    """See `predict_command`."""
    from trunkline.pipelines.commands.fill_mask import fill_mask

    return fill_mask


def embed_command() -> Callable[..., None]:
    """See `predict_command`."""
    from trunkline.pipelines.commands.embed import embed

    return embed


def search_command() -> Callable[..., None]:
    """See `predict_command`."""
    from trunkline.pipelines.commands.search import search

    return search


def evaluate_command() -> Callable[..., None]:
    """See `predict_command`."""
    from trunkline.pipelines.evaluation.evaluate import evaluate

    return evaluate


FUNCTIONS = {
    "embed": (embed_command, "write embeddings of texts or images with a checkpoint"),
    "evaluate": (evaluate_command, "judge an image network by retrieval, zero-shot, k-NN or a linear probe"),
    "fill-mask": (fill_mask_command, "name the masked words of a sentence with a checkpoint"),
    "generate": (generate_command, "continue a text with a checkpoint"),
    "predict": (predict_command, "classify a folder of images with a checkpoint"),
    "search": (search_command, "find the pictures that a text describes, with a checkpoint"),
    "benchmark": (benchmark_command, "measure speed side by side with peers"),
}

POSITIONAL = {"fill-mask": "--sentence", "search": "--query"}
"""Flags whose value may stand right after the command."""


def main(arguments: list[str] | None = None) -> None:
    """Entry point. Bad input ends with one message and exit code 2."""
    arguments = sys.argv[1:] if arguments is None else arguments
    command = arguments[0] if arguments else "--help"
    try:
        if command in TRAINING:
            from trunkline.pipelines.training import run_training

            run_training(arguments)
        elif command in PREPARATION:
            from trunkline.pipelines.commands.prepare import run_prepare

            run_prepare(arguments)
        elif command in FUNCTIONS:
            from jsonargparse import auto_cli

            from trunkline.pipelines.parser import Parser

            sys.argv[1:] = arguments
            if command in POSITIONAL and arguments[1:] and not arguments[1].startswith("-"):
                arguments = [command, POSITIONAL[command], *arguments[1:]]
            options: dict[str, Any] = {"as_positional": False, "parser_class": Parser}
            auto_cli(FUNCTIONS[command][0](), args=arguments[1:], prog=f"trunkline {command}", **options)
        elif command == "--version":
            print(f"trunkline {__version__}")
        elif command in ("-h", "--help", "help"):
            print(usage())
        else:
            from trunkline.pipelines.configs import nearest

            raise TrunklineError(
                f"there is no command '{command}'{nearest(command, [*TRAINING, *PREPARATION, *FUNCTIONS])}"
            )
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except Exception as error:
        own = own_error(error)
        if own is None:
            raise
        report(own)
        raise SystemExit(2) from None


def own_error(error: BaseException | None) -> TrunklineError | None:
    """The error of our own that others were raised from, if any."""
    while error is not None and not isinstance(error, TrunklineError):
        error = error.__cause__
    return error


def usage() -> str:
    """The commands, a line each."""
    commands = {**TRAINING, **PREPARATION, **{name: text for name, (_, text) in FUNCTIONS.items()}}
    lines = "\n".join(f"  {name:<10} {text}" for name, text in commands.items())
    return (
        "usage: trunkline COMMAND [options]\n\n"
        f"{lines}\n\ntrunkline COMMAND --help lists its options. Configs have short names, and compose left to right:\n"
        "  trunkline fit --config vit/digits --config trainer/cpu --trainer.max_epochs 5"
    )


def report(error: TrunklineError) -> None:
    """Print the message alone: of an error that came out of a worker process, without the worker's traceback.

    Processes that find the same fault at the same time leave the message to the first one.
    """
    message = re.split(r"TrunklineError: ", str(error))[-1].strip()
    width = min(shutil.get_terminal_size().columns, 120)
    text = textwrap.fill(f"error: {message}", width, break_long_words=False, break_on_hyphens=False)
    rank = int(os.environ.get("LOCAL_RANK", "0")) if "MASTER_ADDR" in os.environ else 0
    if rank:
        first = os.getppid()
        time.sleep(1)
        if os.getppid() != first:
            return
    print(f"\n{text}", file=sys.stderr)


if __name__ == "__main__":
    main()
