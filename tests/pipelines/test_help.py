"""Help pages and the list of recipes: complete, and made without the libraries that take seconds to import."""

import inspect
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import yaml

from trunkline import TrunklineError
from trunkline.pipelines import cli
from trunkline.pipelines.cli import FUNCTIONS, POSITIONAL, PREPARATION, TRAINING, load_function, main
from trunkline.pipelines.configs import config_names
from trunkline.pipelines.help import EVALUATION_FLAGS, FLAGS, PREPARATION_FLAGS, class_of, function_page, options
from trunkline.pipelines.recipes import NOT_RUN, Recipe, machines, recipes
from trunkline.pipelines.training import TrainingCLI

EVERY = [*TRAINING, *PREPARATION, *FUNCTIONS]


def page(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What a command prints; nothing else may be said."""
    main(arguments)
    output = capsys.readouterr()
    assert output.err == ""
    return output.out


@pytest.mark.parametrize("command", EVERY)
def test_each_command_has_a_page_with_its_title(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    titles = {**TRAINING, **PREPARATION, **{name: function.help for name, function in FUNCTIONS.items()}}
    for flag in ("-h", "--help"):
        lines = page([command, flag], capsys).splitlines()
        assert lines[0] == f"trunkline {command}: {titles[command]}"
        assert lines[2].startswith(f"usage: trunkline {command} ")
        assert max(map(len, lines)) <= 120
    assert len(set(titles.values())) == len(titles)


@pytest.mark.parametrize("command", FUNCTIONS)
def test_page_has_every_option_as_the_function_declares_it(command: str) -> None:
    """Read from source code: the same names and defaults as of the imported function, each with a sentence."""
    declared = inspect.signature(function := load_function(FUNCTIONS[command])).parameters
    file = Path(inspect.getfile(function))
    found = {option.name: option for option in options(file, function.__name__)[1]}
    assert list(found) == list(declared)
    for name, parameter in declared.items():
        assert len(found[name].help) >= 8
        if parameter.default is parameter.empty:
            assert found[name].default is None
        elif parameter.default != "":
            assert yaml.safe_load(str(found[name].default)) == parameter.default
    text = function_page(command, "", FUNCTIONS[command].module, FUNCTIONS[command].name, POSITIONAL.get(command))
    assert all(f"\n  --{name} " in text or f"\n  --{name}\n" in text for name in declared)


def test_choices_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    """Also those of a type that another file declares."""
    declared = inspect.signature(load_function(FUNCTIONS["generate"])).parameters["dtype"].annotation
    assert ", ".join(get_args(declared)) in page(["generate", "--help"], capsys)
    assert "--num_samples " in (text := page(["generate", "-h"], capsys))
    assert "(whole number; default: 1)" in text  # not `true`, to which 1 is equal
    assert "usage: trunkline translate [TEXT] --checkpoint CHECKPOINT [options]" in page(["translate", "-h"], capsys)
    assert "usage: trunkline search [QUERY] --checkpoint CHECKPOINT [options]" in page(["search", "-h"], capsys)
    assert "usage: trunkline prepare --config RECIPE [options]" in (text := page(["prepare", "-h"], capsys))
    assert "--ckpt_path" not in text


def test_fit_fits_a_screen(capsys: pytest.CaptureFixture[str]) -> None:
    """The recipes that were run, with their results, and flags that exist."""
    lines = page(["fit", "--help"], capsys).splitlines()
    assert len(lines) <= 50
    assert max(map(len, lines)) <= 110
    shown = {line.split()[0]: line for line in lines if line.startswith("  ")}
    for recipe in recipes():
        assert (recipe.name in shown) == (recipe.result != NOT_RUN)
        if recipe.name in shown:
            assert recipe.result in shown[recipe.name]
    assert "learning rate" in shown["--model.optimizer.lr"]
    assert 20 <= len(FLAGS) <= 25


def test_flags_on_the_page_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    class Parsed(Exception):
        pass

    def names(self: TrainingCLI, *args: object) -> None:
        raise Parsed(self.parser.known_names())  # type: ignore[attr-defined]

    monkeypatch.setattr(TrainingCLI, "parse_arguments", names)
    for command, shown in (("fit", FLAGS | PREPARATION_FLAGS), ("test", EVALUATION_FLAGS)):
        with pytest.raises(Parsed) as stop:
            TrainingCLI([command], None)
        known = stop.value.args[0] | {"config", "print_config", "model.network.backbone.depth"}
        assert {flag.split()[0].removeprefix("--") for flag in shown} - known == set()


def test_list_has_every_config(capsys: pytest.CaptureFixture[str]) -> None:
    lines = page(["list"], capsys).splitlines()
    names = [line.split()[0] for line in lines if "/" in line.split(" ")[0]]
    assert names == sorted(name for name in config_names() if not name.startswith("trainer/")) + [
        name for name, _ in machines()
    ]
    digits = next(line for line in lines if line.startswith("vit/digits "))
    assert digits.split("  ")[-1] == "99.2% test accuracy"
    assert all(text in digits for text in ("handwritten digits", "0.2 M", "80 s"))


def test_recipe_of_a_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own/a.yaml").write_text(
        "# make a\n# In short: my data | 3 M | 1 h\n# Measured: 5% errors on\n# two sets (seed 0); more.\nmodel: {}\n"
    )
    monkeypatch.setattr("trunkline.pipelines.recipes.CONFIGS", tmp_path)
    monkeypatch.setattr("trunkline.pipelines.recipes.config_names", lambda: ["own/a"])
    assert recipes() == [Recipe("own/a", "my data", "3 M", "1 h", "5% errors on two sets")]
    (tmp_path / "own/a.yaml").write_text("# make a\n# Measured: 5%\n")
    with pytest.raises(TrunklineError, match="own/a has no line '# In short: data"):
        recipes()


def test_classes_and_their_flags(capsys: pytest.CaptureFixture[str]) -> None:
    """Without a recipe the classes, with one the flags of its class."""
    text = page(["fit", "--help", "data"], capsys)
    assert all(f"  {name} " in text for name in ("ImageData", "TextData", "SpeechData", "TranslationData"))
    assert "ImageClassifier " in page(["fit", "--help", "model"], capsys)
    assert class_of(["vit/digits", "trainer/cpu"], "data") == "ImageData"
    with pytest.raises(TrunklineError, match="trainer/cpu name no class for `data`; name a recipe"):
        class_of(["trainer/cpu"], "data")
    with pytest.raises(SystemExit):
        main(["fit", "--config", "vit/digits", "--help", "data"])
    assert "--data.crop_pct" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["fit", "--help", "all"])
    assert "--trainer.max_epochs " in capsys.readouterr().out


def test_answers_import_no_training_library() -> None:
    """In a process of its own: `--help` of every command, `list` and `--version`."""
    asked = [["--help"], ["--version"], ["list"], ["fit", "--help", "data"], *([name, "--help"] for name in EVERY)]
    heavy = "torch", "lightning", "torchmetrics", "torchvision", "numpy", "pandas", "jsonargparse", "rich"
    code = f"""
import sys
from trunkline.pipelines.cli import main
for arguments in {asked!r}:
    main(arguments)
assert not [name for name in {heavy!r} if name in sys.modules], sorted(sys.modules)
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300)
    assert ended.returncode == 0, ended.stderr
    assert len(ended.stdout.splitlines()) > 300


def test_a_line_before_the_imports(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Said by the first process, before anything that takes time; to a terminal by every command."""

    class Terminal:
        def __init__(self) -> None:
            self.text = ""

        def isatty(self) -> bool:
            return True

        def write(self, text: str) -> None:
            self.text += text

        def flush(self) -> None:
            pass

    cli.say_that_it_starts("fit")
    cli.say_that_it_starts("generate")
    assert capsys.readouterr().err == "trunkline fit: starting\n"
    monkeypatch.setattr("sys.stderr", terminal := Terminal())
    cli.say_that_it_starts("generate")
    assert terminal.text == "trunkline generate: starting\n"
    monkeypatch.setenv("LOCAL_RANK", "1")
    cli.say_that_it_starts("fit")
    monkeypatch.delenv("LOCAL_RANK")
    monkeypatch.setenv("SLURM_PROCID", "1")
    cli.say_that_it_starts("fit")
    assert terminal.text == "trunkline generate: starting\n"
