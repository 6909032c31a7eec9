"""Every packaged config, and fit followed by test."""

import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from tokenizers import Tokenizer, models

from trunkline import TrunklineError
from trunkline.pipelines import training
from trunkline.pipelines.cli import main
from trunkline.pipelines.configs import CONFIGS, config_names, find_config, resolve_configs
from trunkline.pipelines.runs import choose_run
from trunkline.pipelines.training import TrainingCLI

RECIPES = [name for name in config_names() if not name.startswith("trainer/")]
MACHINES = [name for name in config_names() if name.startswith("trainer/")]


class Dry(TrainingCLI):
    """Instantiates everything and trains nothing."""

    def fit(self, **kwargs: Any) -> None:
        pass


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRUNKLINE_RUN", "test")
    monkeypatch.setattr("sys.argv", ["trunkline"])


@pytest.mark.parametrize("name", config_names())
def test_header_states_command_time_and_result(name: str) -> None:
    first, *rest = [line for line in find_config(name).read_text().splitlines() if line.startswith("#")]
    assert f"--config {name}" in first
    assert any(line.startswith("# Measured: ") for line in rest)
    assert len(rest) >= 2
    assert not any("TODO" in line for line in rest)


def assert_agrees(config: Any, given: dict[str, Any]) -> None:
    """What a recipe says of the network is what the network is."""
    for name, value in given.items():
        found = getattr(config, name)
        if isinstance(value, dict):
            assert_agrees(found, value)
        else:
            assert found == pytest.approx(value)


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_instantiates(recipe: str, tmp_path: Path) -> None:
    arguments = ["fit", "--config", recipe, "--config", "trainer/cpu", "--trainer.precision", "32"]
    own = yaml.safe_load(find_config(recipe).read_text())
    if own["data"]["class_path"] != "ImageData":  # neither a file of the user's own, a hub nor a checkpoint is read
        arguments += ["--data.vocab_size", str(own["data"]["init_args"].get("vocab_size", 4096))]
    if own["data"]["init_args"].get("tokenizer") == "last.ckpt":
        words = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4}, "[UNK]"))
        words.save(str(tmp_path / "tokenizer.json"))
        arguments += ["--data.tokenizer", str(tmp_path / "tokenizer.json")]
    cli = Dry(*resolve_configs(arguments))
    assert type(cli.model).__name__ == own["model"]["class_path"]
    assert type(cli.datamodule).__name__ == own["data"]["class_path"]
    assert_agrees(cli.model.network.config, own["model"]["init_args"]["network"])
    if own["data"]["class_path"] in ("TextData", "MaskedTextData"):
        assert cli.model.network.config.vocab_size == cli.datamodule.facts.vocab_size
    assert cli.datamodule.batch_size == own["data"]["init_args"]["batch_size"]
    for name in ("max_epochs", "max_steps"):
        if name in own["trainer"]:
            assert getattr(cli.trainer, name) == own["trainer"][name]
    kinds = [type(callback).__name__ for callback in cli.trainer.callbacks]
    defaults = yaml.safe_load((CONFIGS / "defaults.yaml").read_text())["trainer"]["callbacks"]
    for callback in [*defaults, *own["trainer"].get("callbacks+", [])]:  # appended, not replaced
        assert callback["class_path"].rpartition(".")[2] in kinds


@pytest.mark.parametrize("inherited", [None, "there"])
def test_a_run_leaves_no_name_behind(inherited: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second run of the same process gets a folder of its own; one that another process started keeps its name."""
    monkeypatch.delenv("TRUNKLINE_RUN")
    if inherited is not None:
        monkeypatch.setenv("TRUNKLINE_RUN", inherited)
    seen = []

    def choose(arguments: list[str], recipe: str) -> None:
        choose_run(Path("runs"), recipe, None)
        seen.append(os.environ["TRUNKLINE_RUN"])
        raise TrunklineError("broken")

    monkeypatch.setattr(training, "TrainingCLI", choose)
    with pytest.raises(TrunklineError, match="broken"):
        training.run_training(["fit", "--config", "vit/digits"])
    assert os.environ.get("TRUNKLINE_RUN") == inherited
    assert (seen == ["there"]) == (inherited is not None)


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_any_recipe_composes_with_any_machine(recipe: str, machine: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["fit", "--config", recipe, "--config", machine, "--print_config"])
    assert end.value.code == 0
    result = yaml.safe_load(capsys.readouterr().out)
    own = yaml.safe_load(find_config(machine).read_text())
    assert result["trainer"]["accelerator"] == own["trainer"]["accelerator"]
    assert result["trainer"]["devices"] == own["trainer"]["devices"]
    assert result["compile"] == own.get("compile", False)


def table(text: str) -> dict[str, str]:
    """Rows of the closing table."""
    return dict(re.findall(r"│ (\S.*?) +│ (\S.*?) +│", text))


def test_fit_tests_the_averaged_best_weights_and_test_agrees(capsys: pytest.CaptureFixture[str]) -> None:
    small = "--trainer.max_epochs 4 --trainer.check_val_every_n_epoch 1 --test_with best --data.num_workers 0"
    main(["fit", "--config", "vit/digits", *small.split()])
    fitted = table(capsys.readouterr().out)
    best = Path("runs/vit/digits/test/checkpoints/best.ckpt")
    assert fitted["checkpoint"] == str(best)
    assert fitted["look at it"] == "tensorboard --logdir runs"
    assert {"config.yaml", "checkpoints"} <= {p.name for p in Path("runs/vit/digits/test").iterdir()}
    main(["test", "--ckpt_path", str(best)])
    tested = table(capsys.readouterr().out)
    for name in ("test/acc", "test/acc_top5", "test/loss"):
        assert tested[name] == fitted[name]
    main(["validate", "--ckpt_path", str(best)])
    assert 0 < float(table(capsys.readouterr().out)["val/loss"]) < 2.5
