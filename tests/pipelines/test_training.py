"""Every packaged config, and fit followed by test."""

import dataclasses
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningCLI
from recipe_paths import PATHS, PLAIN, paths_of

from trunkline import TrunklineError, datamodules
from trunkline.contract import DataFacts
from trunkline.datamodules import TranslationData
from trunkline.modules.backbone import TransformerConfig
from trunkline.modules.training.background_saves import BackgroundCheckpointIO
from trunkline.modules.training.checkpoints import SafeCheckpointIO
from trunkline.pipelines import training
from trunkline.pipelines.cli import main
from trunkline.pipelines.configs import CONFIGS, config_names, find_config, resolve_configs
from trunkline.pipelines.recipes import recipes
from trunkline.pipelines.runs import choose_run
from trunkline.pipelines.training import TrainingCLI

SYNCHRONOUS = "trunkline.modules.training.checkpoints.SafeCheckpointIO"
RECIPES = [name for name in config_names() if not name.startswith("trainer/")]
MACHINES = [name for name in config_names() if name.startswith("trainer/")]
FIRST = list({name.partition("/")[0]: name for name in reversed(RECIPES)}.values())
"""One recipe of each kind."""
FAST = {(FIRST[number % len(FIRST)], machine) for number, machine in enumerate(MACHINES)}
"""Every machine with one of them, and every one of them with a machine: there are more machines than kinds."""
PAIRS = [
    pytest.param(recipe, machine, marks=[pytest.mark.slow] * ((recipe, machine) not in FAST))
    for recipe in RECIPES
    for machine in MACHINES
]


class Dry(TrainingCLI):
    """Instantiates everything and trains nothing."""

    def fit(self, **kwargs: Any) -> None:
        pass


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRUNKLINE_RUN", "test")
    monkeypatch.setattr("sys.argv", ["trunkline"])


@pytest.mark.parametrize("name", [name for name in config_names() if not name.startswith("trainer/")])
def test_a_recipe_keeps_its_best_weights_or_means_the_last(name: str) -> None:
    """Without a best checkpoint, it tests the last weights, or validates only these."""
    recipe = yaml.safe_load(find_config(name).read_text())
    trainer = recipe["trainer"]
    monitored = [c["init_args"]["monitor"] for c in trainer.get("callbacks+", []) if "Checkpoint" in c["class_path"]]
    best = any(metric.startswith("val/") for metric in monitored)
    once = trainer.get("val_check_interval") is not None and trainer["val_check_interval"] == trainer.get("max_steps")
    assert best or once or recipe.get("test_with") in ("last", "none")


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


CLASSES = {
    "audio/ast_audioset": 527,
    "audio/esc50": 50,
    "audio/speech_commands": 35,
    "bert/classify": 2,
    "bert/classify_demo": 14,
    "bert/tagging": 9,
    "vit/cifar10": 10,
    "vit/digits": 10,
    "vit/imagenet_b16": 1000,
    "vit/imagenet_s16": 1000,
}
"""Classes of the data that each recipe names."""
TOKENS = {
    "audio/digits": 12,
    "bert/classify_demo": 4096,
    "clip/lit": 49408,
    "clip/siglip_b16": 32000,
    "clip/vit_b32": 49408,
    "gpt/shakespeare_char": 65,
    "gpt/shakespeare_char_baseline": 65,
    "seq2seq/dates": 183,
    "seq2seq/phrases": 200,
}
"""Sizes of the vocabularies that recipes do not state; the other ones start from a BERT's."""


def declared_facts(data: Any, recipe: str) -> DataFacts:
    """What a datamodule would tell, as far as its recipe declares it: no hub, file or checkpoint is read."""
    names = [str(number) for number in range(CLASSES.get(recipe, 0))] or None
    known = "image_size", "channels", "max_length", "vocab_size", "max_target_length", "target_vocab_size"
    fields = {name: getattr(data, name, None) for name in known}
    if hasattr(data, "tokenizer") and not fields["vocab_size"]:
        fields["vocab_size"] = TOKENS.get(recipe, 30528)
    if hasattr(data, "log_mel"):
        fields |= {"num_mels": data.log_mel.num_mels, "max_frames": data.log_mel.max_frames}
    ragged = isinstance(data, TranslationData) or (hasattr(data, "log_mel") and data.log_mel.padding == "batch")
    return DataFacts(class_names=names, ragged=ragged, **fields)


SIZES = (
    "image_size",
    "in_chans",
    "num_classes",
    "num_outputs",
    "vocab_size",
    "max_length",
    "target_vocab_size",
    "max_target_length",
)


def sizes(config: Any) -> dict[str, Any]:
    """All sizes that follow from data, in a network's configuration and those within."""
    found = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value) and not isinstance(value, TransformerConfig):
            found |= sizes(value)
        elif field.name in SIZES:
            found[field.name] = value
    return found


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_instantiates(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    own = yaml.safe_load(find_config(recipe).read_text())
    kind = getattr(datamodules, own["data"]["class_path"])
    monkeypatch.setattr(kind, "facts", property(lambda data: declared_facts(data, recipe)))
    arguments = ["fit", "--config", recipe, "--config", "trainer/cpu", "--trainer.precision", "32"]
    resolved, name = resolve_configs(arguments)
    monkeypatch.setattr("sys.argv", ["trunkline", *resolved])  # where the sizes are found that a network states
    with torch.device("meta"):  # whole networks, whose weights nobody needs
        cli = Dry(resolved, name)
    assert type(cli.model).__name__ == own["model"]["class_path"]
    assert type(cli.datamodule) is kind
    assert_agrees(cli.model.network.config, own["model"]["init_args"]["network"])
    facts, network = cli.datamodule.facts, sizes(cli.model.network.config)
    stated = re.findall(r"^ {6,8}(\w+): ", find_config(recipe).read_text().partition("\ndata:")[0], re.M)
    for name, size in (
        ("image_size", facts.image_size),
        ("in_chans", facts.channels),
        ("vocab_size", facts.vocab_size),
        ("max_length", facts.max_length),
        ("target_vocab_size", facts.target_vocab_size),
        ("max_target_length", facts.max_target_length),
        ("num_classes", facts.class_names and len(facts.class_names)),
        ("num_outputs", facts.class_names and len(facts.class_names)),
    ):
        if name in network and size is not None and name not in stated:
            assert network[name] == size, name
    limits = ("batch_tokens", "batch_seconds", "batch_size")
    size = next(name for name in limits if name in own["data"]["init_args"])
    assert getattr(cli.datamodule, size) == own["data"]["init_args"][size]
    for name in ("max_epochs", "max_steps"):
        if name in own["trainer"]:
            assert getattr(cli.trainer, name) == own["trainer"][name]
    kinds = [type(callback).__name__ for callback in cli.trainer.callbacks]
    defaults = yaml.safe_load((CONFIGS / "defaults.yaml").read_text())["trainer"]["callbacks"]
    for callback in [*defaults, *own["trainer"].get("callbacks+", [])]:  # appended, not replaced
        assert callback["class_path"].rpartition(".")[2] in kinds
    assert type(cli.trainer.strategy.checkpoint_io) is BackgroundCheckpointIO
    assert "FailedSaves" in kinds
    millions = sum(parameter.numel() for parameter in cli.model.network.parameters()) / 1e6
    stated_size = next(row.parameters for row in recipes() if row.name == recipe)
    assert stated_size == (f"{millions:.0f} M" if millions >= 10 else f"{millions:.1f} M")
    paths = paths_of(cli.model, cli.datamodule, monkeypatch)
    assert paths
    assert paths == PATHS.get(recipe, [PLAIN] * len(paths))


def test_saves_without_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where memory is short; the files are as safe."""
    resolved, name = resolve_configs(["fit", "--config", "vit/digits", "--trainer.plugins", f"[{SYNCHRONOUS}]"])
    monkeypatch.setattr("sys.argv", ["trunkline", *resolved])
    assert type(Dry(resolved, name).trainer.strategy.checkpoint_io) is SafeCheckpointIO


@pytest.mark.parametrize("inherited", [None, "there"])
def test_a_run_leaves_no_name_behind(inherited: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second run of the same process gets a folder of its own; one that another process started keeps its name."""
    monkeypatch.delenv("TRUNKLINE_RUN")
    if inherited is not None:
        monkeypatch.setenv("TRUNKLINE_RUN", inherited)
    seen = []

    def choose(arguments: list[str], recipe: str, typed: list[str]) -> None:
        choose_run(Path("runs"), recipe, None)
        seen.append(os.environ["TRUNKLINE_RUN"])
        raise TrunklineError("broken")

    monkeypatch.setattr(training, "TrainingCLI", choose)
    with pytest.raises(TrunklineError, match="broken"):
        training.run_training(["fit", "--config", "vit/digits"])
    assert os.environ.get("TRUNKLINE_RUN") == inherited
    assert (seen == ["there"]) == (inherited is not None)


@pytest.mark.parametrize(("recipe", "machine"), PAIRS)
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
    small = "--trainer.max_epochs 2 --trainer.check_val_every_n_epoch 1 --test_with best --data.num_workers 0"
    main(["fit", "--config", "vit/digits", *small.split()])
    fitted = table(capsys.readouterr().out)
    best = Path("runs/vit/digits/test/checkpoints/best.ckpt")
    assert fitted["checkpoint"] == str(best)
    assert fitted["look at it"] == "tensorboard --logdir runs"
    assert {"config.yaml", "checkpoints"} <= {p.name for p in Path("runs/vit/digits/test").iterdir()}
    main(["test", "--ckpt_path", str(best)])
    printed = capsys.readouterr().out
    assert printed.count("test/loss") == 1  # in the table alone
    tested = table(printed)
    for name in ("test/acc", "test/acc_top5", "test/loss"):
        assert tested[name] == fitted[name]
    main(["validate", "--ckpt_path", str(best)])
    assert 0 < float(table(capsys.readouterr().out)["val/loss"]) < 2.5


@pytest.mark.parametrize(("split", "other"), [("test", "validate"), ("val", "test")])
def test_a_split_that_the_data_lacks(split: str, other: str) -> None:
    """Lightning then returns no results."""
    with pytest.raises(TrunklineError, match=f"has no {split} split; .* trunkline {other}$"):
        TrainingCLI.evaluate(None, lambda **_: [], split, {"ckpt_path": "a.ckpt"})  # type: ignore[arg-type]


def test_names_that_lightning_keeps_to_itself() -> None:
    """What `TrainingCLI` overrides and calls of LightningCLI; in a release without them it would do nothing."""
    assert {"_parse_ckpt_path", "_get"} <= vars(LightningCLI).keys()
    assert "self._parse_ckpt_path()" in inspect.getsource(LightningCLI.__init__)


@pytest.mark.parametrize(
    "before",
    [
        "import typing; typing.Union[float, int, None]",
        pytest.param("import sklearn.datasets", marks=pytest.mark.slow),  # which does the same
    ],
)
def test_one_batch_is_not_all_whatever_was_imported_before(before: str) -> None:
    """`typing` keeps one order of `Union[int, float]` and `Union[float, int]`, that of the first; then 1 was 1.0."""
    averages = "--trainer.callbacks+ StochasticWeightAveraging --trainer.callbacks.swa_epoch_start 2"
    limits = "--trainer.limit_val_batches 1 --trainer.limit_test_batches 0.5 --trainer.overfit_batches 2"
    command = f"fit --config vit/digits {averages} --trainer.callbacks.swa_lrs 0.1 {limits} --print_config"
    code = f"{before}\nfrom trunkline.pipelines.cli import main\nmain({command.split()})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    names = ("limit_val_batches", "limit_test_batches", "overfit_batches", "swa_epoch_start")
    found = dict(re.findall(r"(\w+): (\S+)$", done.stdout, re.M))
    assert [found[name] for name in names] == ["1", "0.5", "2", "2"]
