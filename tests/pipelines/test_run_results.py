"""What a run leaves and says at its end: the weights that it tested, files that exist, and logs in its own folder."""

import errno
import importlib.util
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import yaml

import trunkline
from trunkline import TrunklineError
from trunkline.files import load_checkpoint
from trunkline.modules.training.checkpoints import SafeCheckpointIO
from trunkline.pipelines import training
from trunkline.pipelines.cli import main
from trunkline.pipelines.loggers import missing_package
from trunkline.pipelines.trained import Trained

SMALL = """
model:
  init_args:
    network: {patch_size: 8, backbone: {dim: 16, depth: 1, num_heads: 2}}
data:
  init_args: {val_fraction: 0.2, test_fraction: 0.6, num_workers: 0}
trainer:
  max_epochs: 2
  check_val_every_n_epoch: 1
  enable_progress_bar: false
  enable_model_summary: false
  logger: false  # its pictures take longer to draw than the network to train
test_with: best
"""
FIT = ["fit", "--config", "vit/digits", "--config", "small.yaml"]
RUN = Path("runs/vit/digits/test")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRUNKLINE_RUN", "test")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr("sys.argv", ["trunkline"])
    for variable in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        monkeypatch.setenv(variable, "")  # so that it is restored
        monkeypatch.delenv(variable)
    (tmp_path / "small.yaml").write_text(SMALL)
    return tmp_path


@pytest.fixture
def rows(capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, str]]:
    """Runs a command, and returns its closing table."""

    def run(*arguments: str) -> dict[str, str]:
        main([*arguments])
        return dict(re.findall(r"│ (\S.*?) +│ (\S.*?) +│", capsys.readouterr().out))

    return run


def scores(table: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in table.items() if name.startswith("test/")}


@pytest.mark.parametrize("chosen", ["best", "last"])
def test_a_finished_run_tests_the_same_weights_when_resumed(chosen: str, rows: Callable[..., dict[str, str]]) -> None:
    """The averaged ones, as `test` on the same file does."""
    first = rows(*FIT, "--test_with", chosen)
    file = RUN / f"checkpoints/{chosen}.ckpt"
    assert first["checkpoint"] == str(file)
    step = load_checkpoint(file)["global_step"]
    assert first["weights"] == f"averaged, of step {step}"
    before = (RUN / "config.yaml").read_text()
    again = rows(*FIT, "--test_with", chosen, "--resume", str(RUN / "checkpoints/last.ckpt"))
    tested = rows("test", "--ckpt_path", str(file))
    assert scores(first) == scores(again) == scores(tested)
    assert len(scores(first)) > 2
    for table in (again, tested):
        assert (table["checkpoint"], table["weights"]) == (first["checkpoint"], first["weights"])
    content = load_checkpoint(file)
    raw, averaged = content["current_model_state"], content["state_dict"]
    assert not all(torch.equal(averaged[name], value) for name, value in raw.items())  # it could have been the others
    assert (RUN / "config.yaml").read_text() == before  # that of the resume is beside it
    assert yaml.safe_load((RUN / "config_2.yaml").read_text())["resume"] == str(RUN / "checkpoints/last.ckpt")
    assert rows("test", "--ckpt_path", "runs/vit")["checkpoint"] == str(RUN / "checkpoints/best.ckpt")


@pytest.mark.parametrize(
    ("flags", "weights"),
    [
        (["--trainer.max_epochs", "0"], "averaged, of step 0, not saved"),
        (["--trainer.fast_dev_run", "true"], "averaged, of step 1, not saved"),
        (["--trainer.enable_checkpointing", "false"], "averaged, of step 10, not saved"),
    ],
)
def test_a_run_that_saves_nothing_names_no_checkpoint(
    flags: list[str], weights: str, rows: Callable[..., dict[str, str]]
) -> None:
    table = rows(*FIT, *flags)
    assert "checkpoint" not in table
    assert table["weights"] == weights
    assert scores(table)
    assert list(Path("runs").rglob("*.ckpt")) == []


def test_a_run_without_our_callbacks_names_what_lightning_saves(rows: Callable[..., dict[str, str]]) -> None:
    table = rows(*FIT, "--trainer.callbacks", "null")
    (saved,) = Path("runs").rglob("*.ckpt")
    assert (table["checkpoint"], table["weights"]) == (str(saved), "as trained, of step 10")
    assert scores(rows("test", "--ckpt_path", str(saved))) == scores(table)


def test_an_older_last_checkpoint_is_not_named(rows: Callable[..., dict[str, str]]) -> None:
    rows(*FIT)
    later = ["--resume", str(RUN), "--trainer.enable_checkpointing", "false", "--trainer.max_epochs", "3"]
    table = rows(*FIT, *later)
    assert (RUN / "checkpoints/last.ckpt").exists()
    assert "checkpoint" not in table
    assert table["weights"] == "averaged, of step 15, not saved"


def test_a_model_card_has_the_scores_of_the_last_validation(rows: Callable[..., dict[str, str]]) -> None:
    """Also after a resume that has validated nothing yet; the hub's library reads them."""
    rows(*FIT, "--trainer.max_steps", "7", "--test_with", "none")
    rows(*FIT, "--trainer.max_steps", "8", "--test_with", "none", "--resume", str(RUN))
    validated = rows("validate", "--ckpt_path", str(RUN / "checkpoints/best.ckpt"))
    want = {
        name: value for name, value in validated.items() if name.startswith("val/") and name != "val/skipped_images"
    }
    assert len(want) > 2
    trunkline.load(RUN / "checkpoints/last.ckpt").save_pretrained("vit")
    text = Path("vit/README.md").read_text()
    for line in (
        "data | ImageData digits",
        "rows | train 358, val 360, test 1,079",
        "steps | 8",
        "validated at step | 5",
    ):
        assert f"| {line} |" in text
    assert re.search(r"\| command \| `trunkline .*fit --config vit/digits", text)
    results = huggingface_hub.ModelCard(text).data.eval_results
    assert {each.metric_name: f"{each.metric_value:.4f}" for each in results} == want
    assert {(each.task_type, each.dataset_name) for each in results} == {("image-classification", "digits")}
    assert {"accuracy", "loss"} <= {each.metric_type for each in results}


@pytest.mark.parametrize(
    "named",
    [
        "CSVLogger",
        "[CSVLogger,TensorBoardLogger]",
        pytest.param("TensorBoardLogger", marks=pytest.mark.slow),
        pytest.param("false", marks=pytest.mark.slow),  # as in the other tests
    ],
)
def test_loggers_write_into_the_folder_of_the_run(named: str, rows: Callable[..., dict[str, str]]) -> None:
    """Without a word about where; the config and the checkpoints stay where they are without them."""
    table = rows(*FIT, "--trainer.logger", named)
    assert table["checkpoint"] == str(RUN / "checkpoints/best.ckpt")
    assert ("look at it" in table) == ("TensorBoardLogger" in named)
    assert {path.name for path in Path().iterdir()} == {"small.yaml", "runs"}
    assert {path.name for path in (RUN / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    logs = {path.parent.name for path in RUN.rglob("metrics.csv")} | {p.parent.name for p in RUN.rglob("events.*")}
    assert len(logs) == {"f": 0, "[": 2}.get(named[0], 1)
    saved = yaml.safe_load((RUN / "config.yaml").read_text())["trainer"]["logger"]
    entries = saved if isinstance(saved, list) else [saved] if saved else []
    assert [entry["init_args"]["save_dir"] for entry in entries] == [""] * len(entries)  # the config runs again
    assert scores(rows("test", "--ckpt_path", str(RUN))) == scores(table)


def test_no_folder_of_runs_is_the_usual_one(rows: Callable[..., dict[str, str]]) -> None:
    assert rows(*FIT, "--run_dir", "null", "--trainer.logger", "null")["look at it"] == "tensorboard --logdir runs"
    assert {path.name for path in Path().iterdir()} == {"small.yaml", "runs"}


def test_a_logger_whose_package_is_missing(capsys: pytest.CaptureFixture[str], elsewhere: Path) -> None:
    name, package = "MLFlowLogger", "mlflow"
    if importlib.util.find_spec(package) or importlib.util.find_spec("mlflow_skinny"):
        pytest.skip(f"{package} is installed")
    with pytest.raises(SystemExit) as end:
        main([*FIT, "--trainer.logger", name])
    text = " ".join(capsys.readouterr().err.split())
    assert end.value.code == 2
    assert re.search(
        rf"error: {name} needs a package .* pip install '{package}\S*', or choose .*--trainer.logger", text
    )
    assert [path.name for path in elsewhere.iterdir()] == ["small.yaml"]


def test_what_is_no_missing_package() -> None:
    inner = ModuleNotFoundError("Requirement 'wandb>=0.12' not met. HINT: …")
    outer = ValueError("Problem with given class_path 'lightning.pytorch.loggers.WandbLogger': …")
    outer.__cause__ = inner
    assert re.match(r"WandbLogger needs .*pip install 'wandb>=0.12'", str(missing_package(outer)))
    assert missing_package(ValueError("Problem with given class_path 'a.B'")) is None
    assert missing_package(None) is None


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.ENOENT])
def test_a_disk_that_fills_while_training(
    number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever writes: one message; other errors are not hidden."""

    def full(*arguments: Any) -> None:
        writer = threading.Thread(target=fail)  # as TensorBoard's
        writer.start()
        writer.join()
        fail()

    def fail() -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(training, "TrainingCLI", full)
    if number == errno.ENOENT:
        monkeypatch.setattr(threading, "excepthook", lambda arguments: None)  # otherwise it is printed
        with pytest.raises(OSError, match="No such file"):
            training.run_training([*FIT])
        return
    with pytest.raises(SystemExit) as end:
        main([*FIT, "--run_dir", "."])
    assert end.value.code == 2
    text = " ".join(capsys.readouterr().err.split())
    assert re.search(rf"cannot write .*{os.strerror(number)};.*--run_dir", text)
    assert "Traceback" not in text


def test_weights_that_are_not_finite_are_not_evaluated(
    rows: Callable[..., dict[str, str]], elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows(*FIT, "--trainer.max_epochs", "1")
    content = load_checkpoint(RUN / "checkpoints/last.ckpt")
    content["state_dict"]["network.head.bias"][0] = torch.nan
    SafeCheckpointIO().save_checkpoint(content, RUN / "checkpoints/nan.ckpt")
    for command in ("test", "validate"):
        with pytest.raises(SystemExit):
            main([command, "--ckpt_path", str(RUN / "checkpoints/nan.ckpt")])
        said = " ".join(capsys.readouterr().err.split())
        assert re.search(r"error: the weights in \S*nan\.ckpt are not finite, first in network\.head\.bias", said)


def test_checkpoints_without_their_keys(rows: Callable[..., dict[str, str]], elsewhere: Path) -> None:
    """Each is refused where it is needed, by name, and nothing else is."""
    rows(*FIT, "--trainer.max_epochs", "1")
    whole = load_checkpoint(RUN / "checkpoints/last.ckpt")
    broken = elsewhere / "broken.ckpt"
    wanted = {
        "state_dict": {"read", "start", "load", "resume"},
        "hyper_parameters": {"read", "start"},
        "loops": {"load", "resume"},
        "callbacks": {"resume"},
        "optimizer_states": {"resume"},
        "classes": {"read"},
    }
    for key, refusing in wanted.items():
        SafeCheckpointIO().save_checkpoint({**whole, key: 5}, broken)
        calls: dict[str, Callable[[], Any]] = {
            "read": lambda: Trained.read(str(broken)).network,
            "start": lambda: training.TrunklineModule.read_weights(
                Trained.read(str(RUN)).module(), str(broken)
            ).network(),
            "load": lambda: SafeCheckpointIO().load_checkpoint(broken),
            "resume": lambda: training.run_training([*FIT, "--resume", str(broken), "--trainer.max_epochs", "1"]),
        }
        for name, call in calls.items():
            if name not in refusing:
                if name != "resume":
                    call()
                continue
            with pytest.raises(TrunklineError, match=rf"broken.ckpt is not a .*(holds no {key}|names no network)"):
                call()
