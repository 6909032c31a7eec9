"""Which flag or line of a config a message names, and what it says of names that older versions had."""

import errno
import re
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from trunkline import TrunklineError
from trunkline.datamodules import ImageData, ImageTextData
from trunkline.modules.backbone import TransformerConfig
from trunkline.pipelines import renamed
from trunkline.pipelines.cli import main
from trunkline.pipelines.errors import from_outside, locate, place_of, read_entries, report
from trunkline.pipelines.objectives import objective_classes
from trunkline.pipelines.parser import dotted

CONFIG = """\
# batch_size in a comment
data:
  class_path: ImageData
  init_args:
    batch_size: 8
    augmentation: {hflip: 0.5, crop_scale: [0.5, 1.0]}
model:
  init_args:
    network:
      max_length: 16
trainer:
  callbacks+:
    - class_path: mine.Callback
      init_args: {batch_size: 3}
"""


@pytest.fixture
def command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets it; the files are `one.yaml`, and `two.yaml` with a batch size alone."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one.yaml").write_text(CONFIG)
    (tmp_path / "two.yaml").write_text("\n\ndata: {init_args: {batch_size: 4}}\n")
    return lambda text: monkeypatch.setattr(sys, "argv", ["trunkline", *text.split()])


@pytest.mark.parametrize(
    ("arguments", "field", "place"),
    [
        ("fit --data.batch_size 3", "data.batch_size", "--data.batch_size"),
        ("fit --data.init_args.batch_size=3 --data.seed 1", "data.batch_size", "--data.batch_size"),
        ("fit --config one.yaml --data.batch_size 3", "data.batch_size", "--data.batch_size"),
        ("fit --config one.yaml", "data.batch_size", "one.yaml, line 5"),
        ("fit --config=one.yaml", "model.network.max_length", "one.yaml, line 10"),
        ("fit -c one.yaml", "data.augmentation.hflip", "one.yaml, line 6"),
        ("fit --config one.yaml --config two.yaml", "data.batch_size", "two.yaml, line 3"),
        ("fit --config two.yaml --config one.yaml", "data.batch_size", "one.yaml, line 5"),
        ("fit --config one.yaml --config two.yaml", "data.class_path", "one.yaml, line 3"),
        ("fit --config one.yaml", "trainer.max_epochs", "--trainer.max_epochs"),
        ("fit --config gone.yaml", "data.seed", "--data.seed"),
        ("fit --model.seed 3", "data.seed", "--data.seed"),
        ("fit --model.network.max_length 4", "data.max_length", "--data.max_length"),
    ],
)
def test_place_of_a_field(arguments: str, field: str, place: str, command_line: Callable[..., None]) -> None:
    command_line(arguments)
    assert place_of(field) == place


@pytest.mark.parametrize(
    ("arguments", "field", "place"),
    [
        ("embed --batch_size 3", "data.batch_size", "--batch_size"),
        ("embed", "data.batch_size", "--batch_size"),
        ("embed --pool mean", "pool", "--pool"),
        ("embed", "data.seed", None),
        ("embed --data.batch_size 3", "data.batch_size", "--data.batch_size"),
        ("embed --size 3", "data.batch_size", "--batch_size"),
    ],
)
def test_place_of_a_field_for_a_function(
    arguments: str, field: str, place: str | None, command_line: Callable[..., None]
) -> None:
    """Whose flags have no groups."""
    command_line(arguments)
    assert place_of(field, ("batch_size", "pool")) == place


def test_report(command_line: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    command_line("fit --config one.yaml")
    report(TrunklineError("batch_size=8 is larger than the data; set it to at most 5", "data.batch_size"))
    assert capsys.readouterr().err == (
        "\nerror: batch_size=8 is larger than the data; set it to at most 5\n  (one.yaml, line 5)\n"
    )
    report(TrunklineError("nothing is named"))
    report(TrunklineError("no flag sets it", "data.seed"), ("batch_size",))
    assert capsys.readouterr().err == "\nerror: nothing is named\n\nerror: no flag sets it\n"


def test_locate_ends_of_keys_and_values(command_line: Callable[..., None]) -> None:
    command_line("fit --config one.yaml --trainer.callbacks+=mine.Other --model Net")
    for text, place, key in (
        ("mine.Other", "--trainer.callbacks", "trainer.callbacks"),
        ("Net", "--model", "model"),
        ("mine.Callback", "one.yaml, line 13", "trainer.callbacks.class_path"),
        ("crop_scale", "one.yaml, line 6", "data.augmentation.crop_scale"),
        ("batch_size", "one.yaml, line 14", "trainer.callbacks.batch_size"),
        ("data.batch_size", "one.yaml, line 5", "data.batch_size"),
        ("size", "size", "size"),
    ):
        found = locate(text)
        assert (found.text, found.key) == (place, key)
    assert locate("batch_size", preferred=["data.batch_size"]).text == "one.yaml, line 5"


def test_entries_of_what_is_no_yaml(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("model: [1,\n")
    (tmp_path / "b.yaml").write_text("")
    assert read_entries(str(tmp_path / "a.yaml")) == read_entries(str(tmp_path / "b.yaml")) == []


# --- names of older versions


@pytest.fixture
def message(capsys: pytest.CaptureFixture[str], command_line: Callable[..., None]) -> Callable[[list[str]], str]:
    """Run a command that must fail with one message, and return that in one line."""
    command_line("")

    def run(arguments: list[str]) -> str:
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2
        said = " ".join(capsys.readouterr().err.split())
        return said.removeprefix(f"trunkline {arguments[0]}: starting ")

    return run


OLD_CLASSES = {
    "trunkline.modules.image_classifier.ImageClassifier": "ImageClassifier",
    "trunkline.datamodules.image.ImageData": "ImageData",
    "trunkline.pipelines.probe_callback.ImageProbes": "ImageProbes",
}


def saved_config(folder: Path) -> Path:
    """The config that a run of an older version left, with its checkpoint."""
    model, data, probes = OLD_CLASSES
    trunk = {"dim": 16, "depth": 1, "num_heads": 2}
    network = {"image_size": 8, "patch_size": 4, "num_classes": 10, "backbone": trunk}
    config: dict[str, Any] = {
        "seed_everything": 0,
        "trainer": {"callbacks": [{"class_path": probes, "init_args": {"source": "digits"}}]},
        "model": {"class_path": model, "init_args": {"network": network}},
        "data": {"class_path": data, "init_args": {"path": "digits", "hub_split": None, "image_size": 8}},
    }
    (folder / "run/checkpoints").mkdir(parents=True)
    (folder / "run/config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    checkpoint = folder / "run/checkpoints/last.ckpt"
    checkpoint.write_bytes(b"not read")
    return checkpoint


def test_the_saved_config_of_an_older_version(tmp_path: Path, message: Callable[[list[str]], str]) -> None:
    """All that has another name now is said at once, with its line."""
    checkpoint = saved_config(tmp_path)
    said = message(["test", "--ckpt_path", str(checkpoint)])
    config = checkpoint.parent.parent / "config.yaml"
    assert f"error: {config} was written for an older version; line" in said
    lines = config.read_text().splitlines()
    renamed_keys = {"data.path": "data.source", "data.hub_split": "data.train_split"}
    for old, new in {**OLD_CLASSES, **renamed_keys, "ImageProbes.source": "ImageProbes.data.source"}.items():
        end = f"- class_path: {old}" if "Probes" in old else f"class_path: {old}"
        key = old.rpartition(".")[2]
        (line,) = [line for line in lines if line.strip() in (end, f"{key}: digits", f"{key}: null")]
        assert f"line {lines.index(line) + 1}: {old} is {new} now" in said
    # With the new names it is read; the checkpoint is looked at only then.
    text = config.read_text().replace("source: digits", "data: {source: digits}")
    text = text.replace("path: digits", "source: digits").replace("hub_split:", "train_split:")
    for old, new in OLD_CLASSES.items():
        text = text.replace(old, new)
    config.write_text(text)
    said = message(["test", "--ckpt_path", str(checkpoint)])
    assert "older version" not in said
    assert "last.ckpt is not a checkpoint of plain data" in said


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("data:\n  init_args:\n    path: a\n", "own.yaml was .* older version; line 3: data.path is data.source now"),
        ("data: {init_args: {test_path: x}}\n", "line 1: data.test_path is data.test_source now; change it$"),
        ("model:\n  class_path: OLD.modules.image_classifier.ImageClassifier\n", "line 2: .* is ImageClassifier now"),
        ("data:\n  class_path: OLD.datamodules.image.ImageData\n", "line 2: .* is ImageData now"),
        (
            "trainer:\n  callbacks+:\n    - class_path: OLD.pipelines.probe_callback.ImageProbes\n",
            "line 3: .* is ImageProbes now",
        ),
        (
            "trainer:\n  callbacks+:\n    - class_path: ImageProbes\n      init_args:\n        source: digits\n        "
            "batch_size: 3\n        k: 3\n    - class_path: Timer\n      init_args: {interval: step}\n"
            "data: {source: digits, batch_size: 4}\n",
            "line 5: ImageProbes.source is ImageProbes.data.source now; line 6: ImageProbes.batch_size is "
            "ImageProbes.data.batch_size now; change them$",
        ),
    ],
)
def test_old_names_in_a_config(text: str, expected: str, tmp_path: Path, message: Callable[[list[str]], str]) -> None:
    (tmp_path / "own.yaml").write_text(text.replace("OLD", "trunkline"))
    said = message(["fit", "--config", "vit/digits", "--config", "own.yaml"])
    assert re.search(expected, said), said


@pytest.mark.parametrize("old", renamed.RENAMED)
def test_old_flags(old: str, message: Callable[[list[str]], str]) -> None:
    said = message(["fit", "--config", "vit/digits", f"--{old}", "x"])
    assert said == f"error: there is no option --{old} any more; it is --{renamed.RENAMED[old]} now"


@pytest.mark.parametrize("old", renamed.OF_COMMANDS["evaluate"])
def test_old_flags_of_a_command(old: str, message: Callable[[list[str]], str]) -> None:
    said = message(["evaluate", "--checkpoint", "x.ckpt", "--data", "ImageData", f"--{old}", "x"])
    assert said == f"error: there is no option --{old} any more; it is --data.{old} now"
    assert any(old in {field.name for field in fields(kind)} for kind in (ImageData, ImageTextData))
    assert f"--{old} any more" not in message(["predict", f"--{old}", "x"])


def test_old_class_paths_as_flags(message: Callable[[list[str]], str]) -> None:
    for group, old in zip(("model", "data"), OLD_CLASSES, strict=False):
        said = message(["fit", "--config", "vit/digits", f"--{group}", old])
        assert said == f"error: --{group}: there is no class '{old}' any more; it is {OLD_CLASSES[old]} now"


def test_a_misspelt_path_is_not_taken_for_an_old_one(message: Callable[[list[str]], str]) -> None:
    said = message(["fit", "--config", "vit/digits", "--model", "trunkline.modules.ImageClasifier"])
    assert "; did you mean 'ImageClassifier'?" in said
    assert not renamed.moved("trunkline.datamodules.ImageData", ["ImageData"])  # it is there
    assert not renamed.moved("mine.ImageData", ["ImageData"])


def test_names_of_arguments_that_are_handed_on() -> None:
    class Base:
        def __init__(self, lr: float = 0.1) -> None: ...

    class Own(Base):
        def __init__(self, config: TransformerConfig, *rest: int, **shared: float) -> None: ...

    class Closed(Own):
        def __init__(self, other: int) -> None: ...

    found = set(dotted(Own, "model"))
    assert found >= {"model.config", "model.config.dim", "model.lr"}
    assert not {"model.rest", "model.shared", "model.return"} & found
    assert list(dotted(Closed, "model")) == ["model.other"]
    assert set(dotted(objective_classes()[0], "model")) >= {"model.optimizer.lr", "model.network.backbone.dim"}


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), "there is not enough memory; make the network"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 192 bytes. Error code 12"),
            "there is not enough memory (tried to allocate 192 bytes); make the network",
        ),
        (OSError(errno.ENOSPC, "No space left on device", "a.csv"), "cannot use a.csv: No space left on device; free"),
        (RuntimeError("Early stopping conditioned on metric `x` which is not available."), "Early stopping"),
        (
            RuntimeError(
                "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:538] Connection closed by peer [::1]:80"
            ),
            "another process of this run has ended",
        ),
        (
            RuntimeError("[gloo/unbound_buffer.cc:84] Timed out waiting 300000ms for recv"),
            "another process of this run",
        ),
        (RuntimeError("Application timeout caused pair closure"), "another process of this run"),  # in a backward pass
        (RuntimeError("[gloo/transport/tcp/pair.cc:77] Read timeout [::1]:80"), "another process of this run"),
        (torch.distributed.DistBackendError("NCCL communicator was aborted on rank 1."), "another process of this run"),
        (
            RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "),
            "a process that loads data was killed",
        ),
        (RuntimeError("DataLoader worker raised"), None),
        (RuntimeError("Connection closed by peer"), None),  # of a hub, for all we know
        (RuntimeError("a bug"), None),
        (KeyError("a bug"), None),
        (OSError(errno.EINVAL, "Invalid argument"), None),
    ],
)
def test_errors_of_libraries_that_are_no_defects(error: Exception, expected: str | None) -> None:
    found = from_outside(error)
    assert (found is None) == (expected is None)
    assert expected is None or str(found).startswith(expected)


@pytest.mark.parametrize(
    ("line", "field", "expected"),
    [
        ("fit --model.network.image.patch_size 0", "model.network*.patch_size", "--model.network.image.patch_size"),
        ("fit --model.network.dim 3", "model.network.*.dim", None),
        ("evaluate --num_beams 0", "model.generation.num_beams", "--num_beams"),
    ],
)
def test_fields_whose_place_is_not_known(
    line: str, field: str, expected: str | None, command_line: Callable[..., None]
) -> None:
    command_line(line)
    assert place_of(field) == expected
