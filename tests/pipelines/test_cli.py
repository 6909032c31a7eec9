"""The command line: what it accepts, what it says about bad input, and what a run leaves behind."""

import math
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from recorded_run import Run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from trunkline import TrunklineError, __version__
from trunkline.datamodules.samplers import lost_worker
from trunkline.files import load_checkpoint
from trunkline.pipelines import cli, errors, training
from trunkline.pipelines.cli import main
from trunkline.pipelines.configs import config_names
from trunkline.pipelines.errors import TRY_AGAIN, report
from trunkline.seal import proves_itself

DIGITS = ["fit", "--config", "vit/digits"]
SMALL = """
model:
  class_path: ImageClassifier
  init_args:
    network:
      patch_size: 8
      backbone: {dim: 16, depth: 1, num_heads: 2}
data:
  init_args: {val_fraction: 0.2, test_fraction: 0.6, num_workers: 0}
trainer:
  max_epochs: 2
  check_val_every_n_epoch: 1
  log_every_n_steps: 2
  enable_progress_bar: false
  callbacks:
    - class_path: trunkline.modules.callbacks.GracefulStop
    - class_path: trunkline.modules.callbacks.LastCheckpoint
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args: {filename: best, monitor: val/acc, mode: max, enable_version_counter: false}
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args: {filename: "{step}", monitor: step, mode: max, save_top_k: 2, every_n_train_steps: 1}
test_with: best
"""


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Each test works in a folder of its own, and leaves the process as it was."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["trunkline"])
    monkeypatch.setenv("COLUMNS", "100")
    for variable in ("TRUNKLINE_RUN", "PL_GLOBAL_SEED", "PL_SEED_WORKERS", "LOCAL_RANK", "MASTER_ADDR"):
        monkeypatch.setenv(variable, "")  # so that it is restored
        monkeypatch.delenv(variable)
    (tmp_path / "small.yaml").write_text(SMALL)
    return tmp_path


@pytest.fixture
def message(capsys: pytest.CaptureFixture[str]) -> Callable[[list[str]], str]:
    """Run a command that must fail with exit code 2 and one message, and return that."""

    def run(arguments: list[str]) -> str:
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        output = capsys.readouterr()
        assert stop.value.code == 2
        assert output.err.count("error:") == 1
        assert "Traceback" not in output.err
        assert "usage:" not in output.err + output.out
        return " ".join(output.err.partition("error:")[2].split())

    return run


def printed(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> Any:
    """The composed config."""
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--print_config"])
    assert stop.value.code in (0, None)
    return yaml.safe_load(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("error", "code", "refused"),
    [
        (TrunklineError("bad"), 2, True),
        (RuntimeError("[gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]:80"), TRY_AGAIN, False),
        (lost_worker(), TRY_AGAIN, False),
    ],
)
def test_what_a_job_learns_from_an_error(
    error: Exception, code: int, refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another attempt may help against a lost process; bad input leaves the file that the job's script looks for."""

    def fail(*_: Any) -> bool:
        raise error

    monkeypatch.setattr(cli, "answered", fail)
    monkeypatch.setenv("TRUNKLINE_REFUSED", str(tmp_path / "refused"))
    with pytest.raises(SystemExit) as stop:
        main(["fit"])
    assert stop.value.code == code
    assert (tmp_path / "refused").exists() == refused


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["--help"], ["-h"]):
        main(arguments)
        text = capsys.readouterr().out
        assert all(f"\n  {command} " in text for command in ("list", "fit", "validate", "test", "predict", "benchmark"))
    main(["--version"])
    assert capsys.readouterr().out == f"trunkline {__version__}\n"
    for command, flag in (("fit", "--resume"), ("test", "--ckpt_path"), ("predict", "--checkpoint")):
        main([command, "--help"])
        assert f"{flag} " in capsys.readouterr().out


BAD_INPUT = [
    (["fti"], "there is no command 'fti'; did you mean 'fit'"),
    (["fit", "--config", "vit/digit"], "there is no config 'vit/digit'; did you mean 'vit/digits'"),
    (["fit", "--config=vit/digit"], "there is no config 'vit/digit'; did you mean 'vit/digits'"),
    (["fit"], "needs a recipe, such as --config vit/digits"),
    (["fit", "vit/digits"], "'vit/digits' follows no option; write the option that it belongs to before it"),
    (
        ["translate", "--checkpoint", "x.ckpt", "red"],
        "'red' follows no option; write a text directly after the command",
    ),
    (["search", "--checkpoint", "x.ckpt", "red"], "if it begins with a hyphen, write --query='-5 degrees'"),
    ([*DIGITS, "--model.optimizer.lrr", "1"], "--model.optimizer.lrr; did you mean '--model.optimizer.lr'"),
    ([*DIGITS, "--trainer.max_epoch", "3"], "--trainer.max_epoch; did you mean '--trainer.max_epochs'"),
    ([*DIGITS, "--data.batchsize=3"], "--data.batchsize; did you mean '--data.batch_size'"),
    (
        [*DIGITS, "--model.init_args.network.backbone.dimm", "3"],
        "--model.network.backbone.dimm; did you mean '--model.network.backbone.dim'",
    ),
    ([*DIGITS, "--resum", "auto"], "there is no option --resum; did you mean '--resume'"),
    ([*DIGITS, "--data.batch_size", "many"], "--data.batch_size must be int, not 'many'"),
    ([*DIGITS, "--trainer.max_epochs", "two"], "--trainer.max_epochs must be int or null, not 'two'"),
    (
        [*DIGITS, "--model.network.pool", "max"],
        r"--model.network.pool must be Literal\['cls', 'mean', 'map', 'cls_mean'\], not 'max'",
    ),
    (
        [*DIGITS, "--model", "ImageClasifier"],
        "--model: there is no class 'ImageClasifier'; did you mean 'ImageClassifier'",
    ),
    ([*DIGITS, "--trainer.strategy", "dpp"], "--trainer: .*strategy='dpp'"),
    (
        [*DIGITS, "--trainer.val_check_interval", "9999"],
        r"of the trainer do not fit .*val_check_interval` \(9999\) must be less",
    ),
    ([*DIGITS, "--model.network.backbone.num_heads", "5"], r"num_heads=5 does not divide dim=\d+; set num_heads to"),
    ([*DIGITS, "--model.network.patch_size", "3"], "patch_size=3 does not divide image_size=.*; set patch_size"),
    (
        [*DIGITS, "--model.network.num_classes", "7"],
        r"num_classes=7, but the data needs 10; leave num_classes out.*\(--model.network.num_classes\)",
    ),
    (
        [*DIGITS, "--data.batch_size", "99999"],
        r"batch_size=99999 is larger .*; set batch_size to at most 1257 \(--data.batch_size\)",
    ),
    ([*DIGITS, "--resume", "nothing"], "--resume nothing: there is no checkpoint nothing; give 'auto'"),
    ([*DIGITS, "--resume", "small.yaml"], "small.yaml is not a checkpoint of plain data: .*could run code"),
    (["test"], "trunkline test needs --ckpt_path, the checkpoint to evaluate"),
    (["test", "--config", "vit/digits"], "--ckpt_path: nothing to evaluate; name a checkpoint"),
    (["validate", "--ckpt_path=a/b.ckpt"], "--ckpt_path: there is no checkpoint a/b.ckpt"),
    (["test", "--ckpt_path", "small.yaml"], "there is no .*config.yaml, which a run saves; name one with"),
    (["predict", "--chekpoint", "x"], "there is no option --chekpoint; did you mean '--checkpoint'"),
    (["predict", "--checkpoint", "x", "--images", "."], "there is no checkpoint x"),
]


@pytest.mark.parametrize(
    ("arguments", "expected"), BAD_INPUT, ids=lambda value: value[-1] if isinstance(value, list) else ""
)
def test_bad_input(arguments: list[str], expected: str, message: Callable[[list[str]], str]) -> None:
    """One message that names the flag and the mend; nothing was begun."""
    text = message(arguments)
    assert re.search(expected, text), text
    assert not list(Path().glob("runs/**/*.ckpt"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("trainer:\n  max_epochs: many\n", "own.yaml, line 2: trainer.max_epochs must be int or null, not 'many'"),
        ("trainr:\n  max_epochs: 3\n", "there is no 'trainr.max_epochs'; did you mean 'trainer.max_epochs'"),
        (
            "# a comment\ntrainer:\n  max_epoch: 3\n",
            "own.yaml, line 3: there is no 'trainer.max_epoch'; did you mean 'trainer.max_epochs'",
        ),
        ("model:\n  init_args:\n    label_smothing: 1\n", "own.yaml, line 3: .*; did you mean 'label_smoothing'"),
        (
            "model:\n  init_args:\n    network:\n      backbone: {dimm: 4}\n",
            "own.yaml, line 4: .*; did you mean 'dim'",
        ),
        (
            "data:\n  init_args: {augmentation: {hflop: 1}}\n",
            "own.yaml, line 2: there is no 'hflop'; did you mean 'hflip'",
        ),
        (
            "trainer:\n  callbacks+:\n    - class_path: trunkline.modules.callbacks.GracefulStp\n",
            "own.yaml, line 3: there is no class .*; did you mean 'GracefulStop'",
        ),
        ("model: [1,\n", "own.yaml is no YAML: .* line 2"),
        ("just words\n", "own.yaml has no sections"),
    ],
)
def test_bad_config(text: str, expected: str, message: Callable[[list[str]], str], elsewhere: Path) -> None:
    """The message names the file, the line and the nearest name."""
    (elsewhere / "own.yaml").write_text(text)
    assert re.search(expected, said := message([*DIGITS, "--config", "own.yaml"])), said


def test_composition(elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Later files win over earlier ones, and flags over all; `callbacks+` appends and `callbacks` replaces."""
    monitor = "- class_path: lightning.pytorch.callbacks.LearningRateMonitor"
    options = "model:\n  init_args: {optimizer: {lr: 0.5, warmup: 7}}\n"
    (elsewhere / "own.yaml").write_text(f"{options}trainer:\n  max_epochs: 5\n  callbacks+:\n    {monitor}\n")
    before = printed(DIGITS, capsys)
    assert before["trainer"]["accelerator"] == "cpu"
    after = printed([*DIGITS, "--config", "own.yaml", "--model.optimizer.warmup", "9"], capsys)
    optimizer = after["model"]["init_args"]["optimizer"]
    assert (optimizer["lr"], optimizer["warmup"], after["trainer"]["max_epochs"]) == (0.5, 9, 5)
    assert optimizer["name"] == before["model"]["init_args"]["optimizer"]["name"]
    classes = [[c["class_path"] for c in config["trainer"]["callbacks"]] for config in (before, after)]
    assert classes[1] == [*classes[0], "lightning.pytorch.callbacks.LearningRateMonitor"]
    assert "trunkline.modules.callbacks.GracefulStop" in classes[0]
    (elsewhere / "own.yaml").write_text(f"trainer:\n  callbacks:\n    {monitor}\n")
    replaced = printed([*DIGITS, "--config", "own.yaml"], capsys)["trainer"]["callbacks"]
    assert [c["class_path"] for c in replaced] == ["lightning.pytorch.callbacks.LearningRateMonitor"]


def test_own_file_wins_over_packaged_name(elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "vit/digits" in config_names()
    (elsewhere / "vit").mkdir()
    text = (Path(training.__file__).parent.parent / "configs/vit/digits.yaml").read_text()
    (elsewhere / "vit/digits").write_text(re.sub("max_epochs: .*", "max_epochs: 1234", text))
    assert printed(DIGITS, capsys)["trainer"]["max_epochs"] == 1234


def test_interrupt_and_bugs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Ctrl-C before training ends without a traceback; errors that are not about input keep theirs."""

    def run(error: BaseException) -> None:
        def fail(*arguments: Any) -> None:
            raise error

        monkeypatch.setattr(training, "TrainingCLI", fail)
        main(["fit"])

    with pytest.raises(SystemExit) as stop:
        run(KeyboardInterrupt())
    assert stop.value.code == 130
    with pytest.raises(RuntimeError, match="a bug") as bug:
        run(RuntimeError("a bug"))
    (note,) = bug.value.__notes__  # Python prints it below the traceback
    assert "a defect of Trunkline: please report it" in note
    assert "\n" not in note
    wrapped = ValueError("Does not validate")
    wrapped.__cause__ = TrunklineError("what we said")
    capsys.readouterr()
    with pytest.raises(SystemExit):
        run(wrapped)
    assert capsys.readouterr().err == "trunkline fit: starting\n\nerror: what we said\n"


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("", "not enough memory (Tried to allocate 2.00 GiB) for 64 rows at a time; try 32 (--batch_size)"),
        ("--batch_size 8 --batch_size=6", "for 6 rows at a time; try 3 (--batch_size)"),
        ("--batch_size 1", "not enough memory (Tried to allocate 2.00 GiB); make the network"),
    ],
)
def test_a_command_whose_batch_does_not_fit(
    flags: str, expected: str, message: Callable[[list[str]], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of …")

    monkeypatch.setattr("trunkline.pipelines.cli.run_function", full)
    assert expected in message(["embed", "--checkpoint", "x", *flags.split()])


def test_report_by_rank(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Another process than the first reports what it alone found, and is silent if the first has ended too."""
    monkeypatch.setattr(errors.time, "sleep", lambda seconds: None)
    for rank, parents, expected in (("0", [1, 2], 1), ("1", [7, 7], 1), ("1", [7, 1], 0)):
        monkeypatch.setenv("LOCAL_RANK", rank)
        monkeypatch.setenv("MASTER_ADDR", "localhost")
        monkeypatch.setattr(os, "getppid", iter(parents).__next__)
        report(TrunklineError("Caught in worker\nTraceback\ntrunkline.TrunklineError: the image is broken\n"))
        assert capsys.readouterr().err.count("\nerror: the image is broken\n") == expected


def shown(text: str) -> dict[str, float]:
    """Metrics of the closing table."""
    return {name: float(value) for name, value in re.findall(r"(\w+/\w+) +│ ([\d.]+)", text)}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Folder and output of a small run."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "small.yaml").write_text(SMALL)
    run = Run([*DIGITS, "--config", "small.yaml"], folder)
    assert run.wait() == [0], run.output()
    (path,) = (folder / "runs/vit/digits").iterdir()
    return path, run.output()


def test_run_folder(trained: tuple[Path, str]) -> None:
    folder, output = trained
    names = {file.name for file in folder.iterdir()}
    assert {"config.yaml", "checkpoints"} <= names
    files = {file.name: file for file in (folder / "checkpoints").iterdir()}
    assert {"best.ckpt", "last.ckpt"} <= files.keys()
    assert len(files) == 4  # and the last two steps
    assert all(proves_itself(file) for file in files.values())
    assert (
        yaml.safe_load((folder / "config.yaml").read_text())["model"]["init_args"]["network"]["backbone"]["dim"] == 16
    )
    events = EventAccumulator(str(folder))
    events.Reload()
    assert [e.step for e in events.Scalars("train/loss")][:3] == [1, 3, 5]
    assert shown(output)["val/acc"] == pytest.approx(events.Scalars("val/acc")[-1].value, abs=1e-4)
    assert shown(output).keys() >= {"test/acc", "test/loss", "val/acc", "val/loss"}


@pytest.mark.parametrize("command", ["test", "validate"])
def test_evaluation_with_the_config_of_the_run(
    command: str, trained: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    """From another folder and without --config: the same numbers as at the end of the fit."""
    folder, output = trained
    best = folder / "checkpoints/best.ckpt"
    main([command, f"--ckpt_path={best}"])
    stage = {"test": "test", "validate": "val"}[command]
    found = {name: value for name, value in shown(capsys.readouterr().out).items() if name.startswith(stage)}
    if command == "test":
        assert found == {name: value for name, value in shown(output).items() if name.startswith("test")}
    else:
        callbacks = torch.load(best, weights_only=True)["callbacks"]
        (score,) = [c["best_model_score"] for c in callbacks.values() if c.get("monitor") == "val/acc"]
        assert found["val/acc"] == pytest.approx(score.item(), abs=1e-4)
    assert not (Path.cwd() / "runs").exists()


def test_resolved_config_runs_again(trained: tuple[Path, str], elsewhere: Path) -> None:
    """To the same weights, bit for bit."""
    folder, _ = trained
    run = Run(["fit", "--config", str(folder / "config.yaml")], elsewhere)
    assert run.wait() == [0], run.output()
    (again,) = elsewhere.glob("runs/vit/digits/*/checkpoints/last.ckpt")
    states = [torch.load(p, weights_only=True)["state_dict"] for p in (folder / "checkpoints/last.ckpt", again)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_other_architecture(trained: tuple[Path, str], message: Callable[[list[str]], str]) -> None:
    last = str(trained[0] / "checkpoints/last.ckpt")
    wider = ["--config", str(trained[0] / "config.yaml"), "--model.network.backbone.dim", "32"]
    for arguments in (["fit", *wider, "--resume", last], ["test", *wider, "--ckpt_path", last]):
        text = message(arguments)
        assert re.search(
            r"the checkpoint is of another architecture: .*first network\.\w+.*16.*32.* use the config.yaml", text
        )
    assert [file.name for file in trained[0].glob("config*.yaml")] == ["config.yaml"]
    assert "dim: 32" not in (trained[0] / "config.yaml").read_text()  # the run's own stays


def test_damaged_checkpoint_in_a_moved_folder(
    trained: tuple[Path, str], elsewhere: Path, message: Callable[[list[str]], str]
) -> None:
    """Evaluation refuses it; automatic resume says so, goes on from an older one, and still knows the best."""
    folder = elsewhere / "runs/vit/digits/moved"
    shutil.copytree(trained[0], folder)
    last = folder / "checkpoints/last.ckpt"
    data = bytearray(last.read_bytes())
    data[len(data) // 2] ^= 1
    last.write_bytes(data)
    assert re.search(r"--ckpt_path: the checkpoint .*last.ckpt is damaged", message(["test", "--ckpt_path", str(last)]))
    run = Run([*DIGITS, "--config", "small.yaml", "--resume", "auto"], elsewhere)
    assert run.wait() == [0], run.output()
    assert "skipped: the checkpoint runs/vit/digits/moved/checkpoints/last.ckpt is damaged" in run.output()
    assert re.search(r"resuming from runs/vit/digits/moved/checkpoints/(?!last)", run.output())
    assert shown(run.output())["test/loss"] == shown(trained[1])["test/loss"]


def test_loss_that_is_not_finite(elsewhere: Path) -> None:
    """Exit code 2, one message, and the checkpoint before it is whole and finite."""
    poison = "\n    - class_path: recorded_run.Poison\n      init_args: {step: 5}\n"
    (elsewhere / "small.yaml").write_text(SMALL.replace("\n  callbacks:\n", f"\n  callbacks:{poison}", 1))
    run = Run([*DIGITS, "--config", "small.yaml"], elsewhere)
    assert run.wait() == [2]
    text = " ".join(run.output().split())
    assert text.count("error:") == 1
    assert re.search(r"error: the loss is not finite by step 5 .*Lower optimizer.lr.*then resume", text)
    assert "Traceback" not in text
    files = {file.name: file for file in elsewhere.glob("runs/vit/digits/*/checkpoints/*.ckpt")}
    assert files.keys() == {"best.ckpt", "step=4.ckpt", "step=5.ckpt"}
    state = load_checkpoint(files["step=5.ckpt"])
    assert state["global_step"] == 5
    assert all(math.isfinite(value.double().sum()) for value in state["state_dict"].values())
