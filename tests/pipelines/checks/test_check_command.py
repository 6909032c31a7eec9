"""`trunkline check`: its flags, a run of it with a real SIGKILL, and in the long form every recipe and every fault."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import record_numbers
from faulty_tasks import own_config

from trunkline import TrunklineError
from trunkline.pipelines.checks import check
from trunkline.pipelines.checks.check import CHECKS, RUNNERS, Finding, check_recipe, chosen_checks, split_own
from trunkline.pipelines.checks.trials import TrialFailed
from trunkline.pipelines.cli import main
from trunkline.pipelines.configs import config_names
from trunkline.pipelines.help import CHECK_NAMES

DEMOS = ["vit/digits", "gpt/demo", "bert/demo", "clip/emoji", "audio/digits", "seq2seq/dates"]
SMALL_DATA = {
    "audio/ast_audioset": ["--data.val_fraction", "0.2"],
    "seq2seq/transformer_base_wmt": ["--data.pairs", "null"],
}
"""Further flags of recipes on small data."""
RECIPES = [name for name in config_names() if not name.startswith("trainer/")]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Each test works in a folder of its own; so do the check's trials."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["trunkline"])
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(check, "mkdtemp", lambda prefix: str(tmp_path / "temporary"))
    return tmp_path


def write_recipe(model: str = "own_task.CloudClassifier", data: str = "own_task.CloudData") -> str:
    Path("own.yaml").write_text("\n".join(own_config(model, data)))
    return "own.yaml"


@pytest.fixture
def checked(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Exit code and output of a check, which leaves nothing behind."""

    def run(*arguments: str) -> tuple[int, str]:
        try:
            main(["check", *arguments])
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        assert not Path("temporary").exists()
        assert not Path("runs").exists()
        output = capsys.readouterr()
        print(output.out, output.err[-3000:])
        return code, " ".join((output.out + output.err).split())

    return run


# --- flags


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "trunkline check needs a recipe, such as --config vit/digits"),
        (["--config", "vit/digit"], "there is no config 'vit/digit'; did you mean 'vit/digits'"),
        (["--config", "vit/digits", "--only", "resum"], "--only: there is no check 'resum'; did you mean 'resume'"),
        (["--config", "vit/digits", "--only=,"], "--only: there is no check ''; there are agreement, parameters"),
        (["--config", "vit/digits", "--processes", "0"], "--processes must be a whole number from 1 to 64, not '0'"),
        (["--config", "vit/digits", "--processes=two"], "--processes must be a whole number from 1 to 64, not 'two'"),
        (["--config", "vit/digits", "--only"], "--only is the last word; write its value after it"),
    ],
)
def test_bad_flags(arguments: list[str], message: str, checked: Callable[..., tuple[int, str]]) -> None:
    code, text = checked(*arguments)
    assert code == 2
    assert text.count("error:") == 1
    assert message in text


def test_own_flags_are_taken_out() -> None:
    given = ["--config", "a", "--only=resume", "--data.batch_size", "3", "--processes", "4"]
    assert split_own(given) == (["--config", "a", "--data.batch_size", "3"], {"--only": "resume", "--processes": "4"})
    assert chosen_checks("resume, agreement") == ["agreement", "resume"]
    assert chosen_checks(None) == list(CHECKS) == list(RUNNERS) == list(CHECK_NAMES)


def test_flags_of_the_parser(capsys: pytest.CaptureFixture[str]) -> None:
    """Those that `fit` answers without training."""
    with pytest.raises(SystemExit):
        main(["check", "--config", "vit/digits", "--trainer.max_epochs", "7", "--print_config"])
    assert "max_epochs: 7" in capsys.readouterr().out


class Bench:
    """Stands for a `Workbench`: its first trial succeeds, the others fail."""

    def __init__(self, error: TrialFailed, first: bool) -> None:
        self.error, self.first = error, first

    def run(self, trial: Any) -> list[Any]:
        if self.first:
            self.first = False
            return [{"device": "cuda", "devices": 4}]
        raise self.error


def test_a_trial_that_fails_is_a_row_with_its_reason(capsys: pytest.CaptureFixture[str]) -> None:
    lost: Any = Bench(TrialFailed("out of memory", "data.batch_size", log="the traceback\n"), first=True)
    (row,) = check_recipe(lost, ["overfit"], None)
    assert row == Finding("overfit", "ends before its last step", False, "", "out of memory (--data.batch_size)")
    assert capsys.readouterr().err.endswith("the traceback\n")
    more: Any = Bench(TrialFailed("-"), first=True)
    with pytest.raises(TrunklineError, match="--processes 5: there are only 4 devices here"):
        check_recipe(more, [], 5)


def test_a_recipe_that_makes_no_step_is_bad_input() -> None:
    ours: Any = Bench(TrialFailed("batch_size=3 …", "data.batch_size"), first=False)
    with pytest.raises(TrunklineError, match=r"^batch_size=3 …") as found:
        check_recipe(ours, [], None)
    assert found.value.field == "data.batch_size"
    theirs: Any = Bench(TrialFailed("KeyError: 'x'", log="the traceback\n"), first=False)
    with pytest.raises(TrunklineError, match="the recipe cannot make its first step: KeyError: 'x'"):
        check_recipe(theirs, [], None)


def test_table_and_exit_code(monkeypatch: pytest.MonkeyPatch, checked: Callable[..., tuple[int, str]]) -> None:
    rows = [Finding("resume", "same", True, "0 differences"), Finding("estimates", "memory", None, "3 MiB")]
    monkeypatch.setattr(check, "check_recipe", lambda *_: rows)
    code, text = checked("--config", "vit/digits")
    assert code == 0
    assert "resume │ same │ pass │ 0 differences" in text
    assert "estimates │ memory │ estimate │ 3 MiB" in text
    assert "all passed in 0 s" in text
    rows.append(Finding("overfit", "learnt", False, "loss 1 to 1", "the network cannot learn"))
    code, text = checked("--config", "vit/digits")
    assert code == 1
    assert "overfit │ learnt │ FAIL │ loss 1 to 1" in text
    assert "FAIL overfit: the network cannot learn" in text
    assert "1 of 2 failed" in text


# --- real processes


def test_a_run_that_is_killed(checked: Callable[..., tuple[int, str]]) -> None:
    """One process, SIGKILL, resume; dropout on."""
    code, text = checked("--config", write_recipe(), "--processes", "1", "--only", "resume")
    assert code == 0
    assert "SIGKILL after step 3 of 5: 0 differences" in text


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("processes", ["2", "3"])
def test_a_task_of_ones_own(processes: str, checked: Callable[..., tuple[int, str]]) -> None:
    code, text = checked("--config", write_recipe(), "--processes", processes)
    assert code == 0
    assert f"{processes} processes as one process │ pass" in text
    assert f"SIGKILL after step 3 of 5, {processes} processes: 0 differences" in text
    assert text.count("│ pass │") == 5
    assert text.count("│ estimate │") == 3


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_sharded_weights(checked: Callable[..., tuple[int, str]]) -> None:
    """With a machine's file: whole gradients of FSDP2 are compared, and its checkpoints in parts."""
    machine = ["--config", "trainer/fsdp", "--trainer.accelerator", "cpu", "--trainer.precision", "32-true"]
    code, text = checked("--config", write_recipe(), *machine, "--compile", "false", "--only", "agreement,resume")
    assert code == 0
    assert "2 processes as one process │ pass" in text
    assert "SIGKILL after step 3 of 5, 2 processes: 0 differences" in text


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("model", "data", "only", "messages"),
    [
        ("faulty_tasks.SumOfSums", None, "agreement", ["FAIL agreement: 2 processes: the loss differs by 5.0e-01"]),
        ("faulty_tasks.Normed", None, "agreement", ["FAIL agreement: 2 processes: the loss differs", "SyncBatchNorm"]),
        (
            "faulty_tasks.Unused",
            None,
            "agreement,parameters,resume",
            [
                "network.spare.weight and network.spare.bias got no gradient at all, and DDP",
                "FAIL resume: RuntimeError",
            ],
        ),
        (
            None,
            "faulty_tasks.AnyOrder",
            "agreement,resume",
            ["2 processes got other rows than one process", "FAIL resume: after the resume, step 3 trained on other"],
        ),
    ],
)
def test_faults_of_several_processes(
    model: str | None, data: str | None, only: str, messages: list[str], checked: Callable[..., tuple[int, str]]
) -> None:
    recipe = write_recipe(model or "own_task.CloudClassifier", data or "own_task.CloudData")
    code, text = checked("--config", recipe, "--processes", "2", "--only", only)
    assert code == 1
    for message in messages:
        assert message in text


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("callback", ["Forgetful", "ForgetfulOfEpochs"])
def test_a_callback_that_forgets(callback: str, checked: Callable[..., tuple[int, str]]) -> None:
    forgets = [f"--trainer.callbacks+=faulty_tasks.{callback}"]
    code, text = checked("--config", write_recipe(), *forgets, "--processes", "1", "--only", "resume")
    assert code == 1
    assert "the samples were the same" in text
    assert "must save it" in text


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_what_no_process_can_do(checked: Callable[..., tuple[int, str]]) -> None:
    """A step that raises is bad input; a batch that three processes cannot share fails the check."""
    code, text = checked("--config", write_recipe("faulty_tasks.Broken"), "--only", "overfit")
    assert code == 2
    assert "error: the recipe cannot make its first step: RuntimeError: no such head" in text
    share = ["--processes", "3", "--data.batch_size", "10", "--only", "agreement"]
    code, text = checked("--config", write_recipe(), *share)
    assert code == 1
    assert "FAIL agreement: batch_size=10 (over all processes) cannot be shared by 3 process(es)" in text
    assert "(--data.batch_size)" in text


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("recipe", DEMOS)
def test_demos(recipe: str, checked: Callable[..., tuple[int, str]]) -> None:
    code, text = checked("--config", recipe, "--processes", "2")
    assert code == 0, text


SMALL = [(recipe, "trainer/cpu") for recipe in sorted(set(RECIPES) - set(DEMOS))]
"""Recipes and machines. Other kinds are trained with sharded weights in test_resume.py and test_sharding.py."""


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("recipe", "machine"), [*SMALL, ("bert/tagging", "trainer/fsdp"), ("bert/squad", "trainer/fsdp")]
)
def test_recipes_on_small_data(
    recipe: str, machine: str, tmp_path: Path, checked: Callable[..., tuple[int, str]]
) -> None:
    shrunk = record_numbers.shrunk_recipes(tmp_path)[recipe]
    here = ["--config", machine, "--trainer.accelerator", "cpu", "--trainer.precision", "32-true"]
    only = ["--processes", "2", "--only", "agreement,parameters,resume"]
    code, text = checked("--config", recipe, *here, *shrunk.arguments(), *SMALL_DATA.get(recipe, []), *only)
    assert code == 0, text
    assert sys.argv[1] == "fit"
