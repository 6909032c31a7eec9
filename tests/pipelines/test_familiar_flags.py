"""Flags of other tools are answered with ours, and `null` takes away every optional value."""

import inspect
from types import NoneType
from typing import get_args, get_type_hints

import pytest

from trunkline.pipelines.cli import FUNCTIONS, load_function, main
from trunkline.pipelines.errors import flags
from trunkline.pipelines.familiar_flags import FAMILIAR, familiar
from trunkline.pipelines.parser import CommandParser, explain_option
from trunkline.pipelines.training import TrainingCLI


@pytest.fixture(scope="module")
def known() -> set[str]:
    """Names of all flags of `fit`."""

    class Parsed(Exception):
        pass

    class Names(TrainingCLI):
        def parse_arguments(self, parser: CommandParser, args: object) -> None:  # type: ignore[override]
            raise Parsed(parser.known_names())

    with pytest.raises(Parsed) as stop:
        Names(["fit"], None)
    names: set[str] = stop.value.args[0]
    return names


@pytest.mark.parametrize(
    ("typed", "ours"),
    [
        ("lr", "model.optimizer.lr"),
        ("epochs", "trainer.max_epochs"),
        ("batch-size", "data.batch_size"),
        ("gpus", "trainer.devices"),
        ("per_device_train_batch_size", "data.batch_size"),
        ("gradient-accumulation-steps", "trainer.accumulate_grad_batches"),
        ("FP16", "trainer.precision"),
        ("wd", "model.optimizer.weight_decay"),
        ("output_dir", "run_dir"),
        ("n_layer", "model.network.backbone.depth"),
    ],
)
def test_flags_of_other_tools(typed: str, ours: str, known: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["trunkline", "fit", "--config", "x.yaml", f"--{typed}", "1"])
    assert dict(flags())[typed] == "1"
    assert explain_option(typed, known) == f"there is no option --{typed}; did you mean '--{ours}'?"


def test_a_short_flag(known: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["trunkline", "fit", "--config", "x.yaml", "-b", "3"])
    assert explain_option("b", known) == "there is no option -b; did you mean '--data.batch_size'?"


def test_a_flag_of_another_network(known: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """It exists, but not in this recipe: the message does not offer it again."""
    monkeypatch.setattr("sys.argv", ["trunkline", "fit", "--config", "x.yaml", "--model.network.backbone.dim", "3"])
    said = explain_option("model.network.backbone.dim", known)
    assert said.startswith(
        "this recipe has no option --model.network.backbone.dim; its network may have it as --model."
    )
    assert "--model.network.bert.backbone.dim" in said
    assert "did you mean" not in said


def test_every_flag_that_is_named_exists(known: set[str]) -> None:
    """In `fit` or in another command; and no familiar name stands for two things."""
    of_commands = {name for f in FUNCTIONS.values() for name in inspect.signature(load_function(f)).parameters}
    assert {name for ours in FAMILIAR.values() for name in ours} - known - of_commands - {"ckpt_path"} == set()
    typed = [name for names in FAMILIAR for name in names.split()]
    assert len(typed) == len(set(typed)) > 150


def test_a_command_names_only_its_own_flags(capsys: pytest.CaptureFixture[str]) -> None:
    assert familiar("gpus", {"trainer.devices"}) == "trainer.devices"
    assert familiar("gpus", {"device"}) == "device"
    assert familiar("gpus", {"output"}) is None
    for typed, ours in (("ckpt", "checkpoint"), ("max-tokens", "max_new_tokens"), ("gpu", "device")):
        with pytest.raises(SystemExit):
            main(["generate", f"--{typed}", "x"])
        assert f"no option --{typed}; did you mean '--{ours}'?" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("command", FUNCTIONS)
def test_null_takes_away_every_optional_value(command: str) -> None:
    function = load_function(FUNCTIONS[command])
    optional = [name for name, hint in get_type_hints(function).items() if NoneType in get_args(hint)]
    assert optional or command == "export"  # which has none
    parser = CommandParser()
    parser.add_function_arguments(function, as_positional=False, skip={"data"})
    needed_by_some = ("checkpoint", "query", "sentence", "text", "audio", "images", "runs")
    given = [word for name in needed_by_some for word in (f"--{name}", "x")]
    names = set(inspect.signature(function).parameters)
    pairs = zip(given[::2], given[1::2], strict=True)
    needed = [word for flag, value in pairs if flag[2:] in names and flag[2:] not in optional for word in (flag, value)]
    for name in optional:
        assert parser.parse_args([*needed, f"--{name}", "null"])[name] is None, name
