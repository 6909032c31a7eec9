"""Every packaged config, and fit followed by test."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from trunkline.modules.image_classifier import ImageClassifier
from trunkline.pipelines.cli import main
from trunkline.pipelines.configs import CONFIGS, config_names, find_config, resolve_configs
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


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_instantiates(recipe: str) -> None:
    arguments, name = resolve_configs(
        ["fit", "--config", recipe, "--config", "trainer/cpu", "--trainer.precision", "32"]
    )
    cli = Dry(arguments, name)
    own = yaml.safe_load(find_config(recipe).read_text())
    assert isinstance(cli.model, ImageClassifier)
    assert cli.model.network.config.backbone.dim == own["model"]["init_args"]["network"]["backbone"]["dim"]
    assert cli.datamodule.batch_size == own["data"]["init_args"]["batch_size"]
    assert cli.trainer.max_epochs == own["trainer"]["max_epochs"]
    kinds = [type(callback).__name__ for callback in cli.trainer.callbacks]
    defaults = yaml.safe_load((CONFIGS / "defaults.yaml").read_text())["trainer"]["callbacks"]
    for callback in [*defaults, *own["trainer"]["callbacks+"]]:  # appended, not replaced
        assert callback["class_path"].rpartition(".")[2] in kinds


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
