"""The help pages. They are made from source code and the headers of recipes, and import nothing that takes time."""

import ast
import re
import textwrap
from functools import cache
from pathlib import Path
from typing import NamedTuple

import yaml
from docstring_parser import parse

from trunkline import TrunklineError
from trunkline.pipelines.configs import find_config
from trunkline.pipelines.objectives import KINDS, short
from trunkline.pipelines.recipes import NOT_RUN, recipes

ROOT = Path(__file__).resolve().parent.parent
WIDTH = 100

FLAGS = {
    "--config NAME": "recipe, machine or YAML file; several compose from left to right",
    "--data.source SOURCE": "file, folder or hub name of your own data",
    "--data.batch_size N": "samples per step, over all processes",
    "--data.num_workers N": "processes that load data, for each training process",
    "--model.optimizer.lr X": "peak learning rate",
    "--model.optimizer.weight_decay X": "of matrices; norms and biases have none",
    "--model.optimizer.warmup X": "steps, or below 1 the share of all steps",
    "--model.init_from FILE": "fine-tune: a checkpoint, a run, a folder or a hub name",
    "--model.freeze_blocks N": "keep the first blocks of the trunk as they are",
    "--model.network.backbone.depth N": "blocks of the trunk; dim, num_heads, dropout likewise",
    "--trainer.max_epochs N": "length of the training; or --trainer.max_steps N",
    "--trainer.devices N": "GPUs or CPU processes; --trainer.num_nodes N machines",
    "--trainer.accelerator NAME": "cpu, gpu, mps, …",
    "--trainer.precision P": "32-true, bf16-mixed, …",
    "--trainer.accumulate_grad_batches N": "batches whose gradients make up a step",
    "--trainer.gradient_clip_val X": "largest norm of the gradient",
    "--trainer.fast_dev_run true": "one batch of everything, to try a recipe out",
    "--resume auto": "continue the newest run of the recipe; or a run's folder, or a checkpoint",
    "--name NAME": "name of the run below --run_dir; default: the recipe's",
    "--seed_everything N": "seed of weights, order, augmentation and dropout",
    "--compile true": "torch.compile the network",
    "--threads N": "CPU threads of each process",
    "--test_with best|last|none": "weights of the test after the training",
    "--print_config": "print the merged config, and train nothing",
}
"""The flags of `fit` that people use, with their help."""

EVALUATION_FLAGS = {
    "--ckpt_path FILE": "the checkpoint; its run's own config is used",
    "--config NAME": "another recipe or YAML file",
    "--data.source SOURCE": "other data",
    "--data.batch_size N": "samples per step, over all processes",
    "--trainer.accelerator NAME": "cpu, gpu, mps, …",
    "--trainer.devices N": "number of devices",
    "--trainer.precision P": "32-true, bf16-mixed, …",
}


PREPARATION_FLAGS = {
    "--config NAME": "the recipe whose text is tokenised; other flags of fit may follow, and are not read",
    "--data.source SOURCE": "other text: a file, a folder or a hub name",
    "--data.tokenizer NAME": "other tokens",
    "--data.vocab_size N": "size of a vocabulary that is learnt",
    "--data.cache_dir FOLDER": "where the tokens are kept",
}

CHECK_FLAGS = {
    "--config NAME": "recipe, machine or YAML file; all flags of fit may follow, and mean the same",
    "--processes N": "processes that are compared with one; default: all GPUs of this machine, on a CPU 2",
    "--only NAMES": "some of the checks: agreement,parameters,overfit,resume,estimates",
}
CHECK_NAMES = {
    "agreement": "one process, accumulated gradients and N processes give the same loss and gradients",
    "parameters": "each parameter that is not frozen has a gradient and a group of the optimiser",
    "overfit": "the loss of a few rows falls by 75%",
    "resume": "a run that SIGKILL ends and that is resumed gives the same checkpoint, bit for bit",
    "estimates": "memory of a process, size of a checkpoint, time of an epoch",
}


class Option(NamedTuple):
    """An option of a command, as its function declares it."""

    name: str
    kind: str
    default: str | None
    """Source code of the default; None if the option is required."""
    help: str


def training_page(command: str, title: str) -> str:
    """Help of `fit`, `validate`, `test`, `prepare` or `check` on one screen."""
    evaluates = command in ("validate", "test")
    usage = f"usage: trunkline {command} {'--ckpt_path FILE' if evaluates else '--config RECIPE'} [options]"
    lines = [f"trunkline {command}: {title}", "", usage, ""]
    if command == "fit":
        done = [recipe for recipe in recipes() if recipe.result != NOT_RUN]
        lines += ["recipes that train on two CPU cores; `trunkline list` has all:"]
        lines += columns({recipe.name: f"{recipe.result}; {recipe.time.partition(',')[0]}" for recipe in done})
        lines += ["", "flags that people use:"]
    if command == "check":
        lines += ["what is checked, in runs of a few steps; exit code 1 if anything fails:", *columns(CHECK_NAMES), ""]
    pages = {"fit": FLAGS, "prepare": PREPARATION_FLAGS, "check": CHECK_FLAGS}
    lines += columns(EVALUATION_FLAGS if evaluates else pages[command])
    lines += ["", f"all flags: trunkline {command} --help all"]
    lines += ["flags of a recipe's data or model: trunkline fit --config vit/digits --help data (or: --help model)"]
    return "\n".join(lines)


def function_page(command: str, title: str, module: str, function: str, positional: str | None) -> str:
    """Help of a command that is a function.

    Args:
        command: its name.
        title: one line about it.
        module: path of the function's module below `trunkline.pipelines`.
        function: the function's name.
        positional: flag whose value may follow the command without the flag.
    """
    file = ROOT / "pipelines" / f"{module.replace('.', '/')}.py"
    described, found = options(file, function)
    required = "".join(
        f" --{option.name} {option.name.upper()}"
        for option in found
        if option.default is None and f"--{option.name}" != positional
    )
    usage = f"usage: trunkline {command}{' [' + positional[2:].upper() + ']' if positional else ''}{required} [options]"
    lines = [f"trunkline {command}: {title}", "", *textwrap.wrap(usage, WIDTH, subsequent_indent="       "), ""]
    lines += [*described, ""]
    rows = {f"--{option.name}": with_type(option) for option in found}
    rows |= {"--config": "a YAML file with values of these flags", "--print_config": "print all values, and stop"}
    lines += columns(rows)
    return "\n".join(lines)


def class_page(group: str) -> str:
    """The classes that a recipe's `data` or `model` may name, a line each."""
    paths = dict.fromkeys(kind.data if group == "data" else kind.objective for kind in KINDS.values())
    lines = [f"classes of `{group}`; a recipe names one, and has its flags:"]
    lines += columns({short(path): first_line(path) for path in paths})
    return "\n".join([*lines, "", f"its flags: trunkline fit --{group}.help CLASS; or: --config RECIPE --help {group}"])


def class_of(configs: list[str], group: str) -> str:
    """The class that the last of these configs names for `data` or `model`.

    Raises:
        TrunklineError: if none names one, or there is no such config.
    """
    for config in reversed(configs):
        content = yaml.safe_load(find_config(config).read_text(encoding="utf-8"))
        found = (content.get(group) or {}).get("class_path")
        if found:
            return str(found)
    raise TrunklineError(f"{' and '.join(configs)} name no class for `{group}`; name a recipe, such as vit/digits")


def columns(rows: dict[str, str]) -> list[str]:
    """Lines of two columns; a long text goes on below itself."""
    width = min(max(map(len, rows)), 36) + 4
    lines = []
    for name, text in rows.items():
        wrapped = textwrap.wrap(text, WIDTH - width, break_long_words=False) or [""]
        lines += textwrap.wrap(name, width - 3) if len(name) > width - 2 else []
        first = "" if len(name) > width - 2 else f"  {name}"
        lines += [f"{first:<{width}}{wrapped[0]}", *(" " * width + line for line in wrapped[1:])]
    return lines


def with_type(option: Option) -> str:
    """Help of an option with its type and default."""
    default = "required" if option.default is None else f"default: {option.default}"
    return f"{option.help} ({option.kind}; {default})" if option.kind else f"{option.help} ({default})"


# --- reading source code


@cache
def syntax(file: Path) -> ast.Module:
    """The syntax tree of a file."""
    return ast.parse(file.read_text(encoding="utf-8"))


def source_of(path: str) -> Path:
    """File of a module such as `trunkline.pipelines.cli`; of a package, its `__init__.py`."""
    file = ROOT.joinpath(*path.split(".")[1:]).with_suffix(".py")
    return file if file.is_file() else file.with_suffix("") / "__init__.py"


def definition(file: Path, name: str) -> tuple[Path, ast.stmt]:
    """Where a name is defined or assigned, following imports.

    Raises:
        TrunklineError: if it is not found in the package.
    """
    for statement in syntax(file).body:
        if isinstance(statement, ast.FunctionDef | ast.ClassDef) and statement.name == name:
            return file, statement
        if isinstance(statement, ast.Assign) and any(
            isinstance(t, ast.Name) and t.id == name for t in statement.targets
        ):
            return file, statement
        if isinstance(statement, ast.ImportFrom) and (statement.module or "").startswith("trunkline."):
            original = next((a.name for a in statement.names if (a.asname or a.name) == name), None)
            if original is not None:
                return definition(source_of(str(statement.module)), original)
    raise TrunklineError(f"{file} defines no {name}")


def options(file: Path, function: str) -> tuple[list[str], list[Option]]:
    """The lines that describe a function, and its options."""
    _, found = definition(file, function)
    assert isinstance(found, ast.FunctionDef)
    described = parse(ast.get_docstring(found) or "")
    helps = {parameter.arg_name: " ".join((parameter.description or "").split()) for parameter in described.params}
    paragraphs = [described.short_description or "", *(described.long_description or "").split("\n\n")]
    text = [line for paragraph in paragraphs for line in textwrap.wrap(" ".join(paragraph.split()), WIDTH)]
    arguments = found.args.args
    defaults: list[ast.expr | None] = [None] * (len(arguments) - len(found.args.defaults)) + list(found.args.defaults)
    return text, [
        Option(
            argument.arg,
            kind_of(file, argument.annotation),
            None if default is None else as_typed(default),
            helps.get(argument.arg, ""),
        )
        for argument, default in zip(arguments, defaults, strict=True)
    ]


def as_typed(default: ast.expr) -> str:
    """A default as one types it in a shell or a YAML file."""
    value = ast.literal_eval(default)
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return '""' if value == "" else str(value)


def kind_of(file: Path, annotation: ast.expr | None) -> str:
    """A type in words: names as they are, the choices of a Literal, nothing for a class of data."""
    if annotation is None or isinstance(annotation, ast.Constant):
        return "null"
    if isinstance(annotation, ast.BinOp):
        return f"{kind_of(file, annotation.left)} or {kind_of(file, annotation.right)}"
    if isinstance(annotation, ast.Subscript):
        inner = annotation.slice
        if ast.unparse(annotation.value) == "Literal":
            return ", ".join(
                str(ast.literal_eval(c)) for c in (inner.elts if isinstance(inner, ast.Tuple) else [inner])
            )
        return f"{ast.unparse(annotation.value)} of {kind_of(file, inner)}"
    name = ast.unparse(annotation)
    if name in ("str", "int", "float", "bool"):
        return {"str": "text", "int": "whole number", "float": "number", "bool": "true or false"}[name]
    where, found = definition(file, name)
    return kind_of(where, found.value) if isinstance(found, ast.Assign) else ""


def first_line(path: str) -> str:
    """First line of a class's docstring, by the class's path."""
    module, _, name = path.rpartition(".")
    _, found = definition(source_of(module), name)
    assert isinstance(found, ast.ClassDef)
    return re.sub("`+", "", (ast.get_docstring(found) or "").partition("\n")[0].rstrip("."))
