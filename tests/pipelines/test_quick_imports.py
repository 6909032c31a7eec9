"""What a command leaves out while it imports torchmetrics, and when it does not."""

import subprocess
import sys
from pathlib import Path

import pytest

from trunkline.pipelines.quick_imports import LEFT_OUT, import_torchmetrics, names_foreign_class

CODE = """
import sys
from trunkline.pipelines.quick_imports import LEFT_OUT, import_torchmetrics
import_torchmetrics({arguments!r})
import torchmetrics
print(*sorted(LEFT_OUT & set(sys.modules)))
import torch
from lightning_utilities.core.imports import RequirementCache, package_available
assert RequirementCache("torchvision") and package_available("scipy")
assert not package_available("no_such_package") and not RequirementCache("no-such-package>=1")
metric = torchmetrics.classification.MulticlassAccuracy(3, average="micro")
metric.update(torch.tensor([0, 1, 2, 2]), torch.tensor([0, 1, 1, 2]))
print(metric.compute().item())
import torchvision.transforms.v2, scipy.signal, matplotlib.figure
"""


def outcome(arguments: list[str]) -> list[str]:
    """In a process of its own: what was imported of `LEFT_OUT`, and an accuracy."""
    run = [sys.executable, "-c", CODE.format(arguments=arguments)]
    ended = subprocess.run(run, capture_output=True, text=True, check=False, timeout=300)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.splitlines()


def test_nothing_heavy_is_imported_and_all_of_it_can_be() -> None:
    assert outcome(["fit", "--config", "vit/digits"]) == ["", "0.75"]


def test_a_class_of_ones_own_gets_everything() -> None:
    imported, accuracy = outcome(["fit", "--model", "mine.CloudClassifier"])
    assert "torchvision" in imported
    assert accuracy == "0.75"


@pytest.mark.parametrize(
    ("text", "foreign"),
    [
        ("model:\n  class_path: ImageClassifier\n", False),
        ("model:\n  class_path: mine.CloudClassifier\n", True),
        ("trainer:\n  callbacks:\n    - class_path: lightning.pytorch.callbacks.Timer\n", False),
        ("trainer:\n  logger: {class_path: my.loggers.Log}\n", True),
        ("data:\n  class_path: 'my_data.Data'\n", True),
    ],
)
def test_foreign_classes(text: str, foreign: bool, tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(text)
    assert names_foreign_class(["fit", "--config", str(tmp_path / "own.yaml")]) == foreign
    assert names_foreign_class(["fit", f"--config={tmp_path / 'own.yaml'}", "--config", "vit/digits"]) == foreign


def test_flags_and_broken_configs() -> None:
    assert names_foreign_class(["fit", "--trainer.callbacks+=mine.Callback"])
    assert not names_foreign_class(["fit", "--config", "no/such/config"])
    assert not names_foreign_class(["fit", "--trainer.callbacks+=lightning.pytorch.callbacks.Timer"])


def test_collection_is_put_off_and_resumed() -> None:
    """In a process of its own: garbage of the imports is not looked for; that of a run is found again."""
    code = """
import gc
from trunkline.pipelines.quick_imports import put_off_collection, resume_collection
resume_collection()
assert gc.isenabled() and gc.get_freeze_count() == 0
put_off_collection()
assert not gc.isenabled()
resume_collection()
assert gc.isenabled() and gc.get_freeze_count() > 1000
cycle = []
cycle.append(cycle)
del cycle
assert gc.collect() >= 1
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300)
    assert ended.returncode == 0, ended.stderr


def test_once_imported_nothing_is_changed() -> None:
    import lightning_utilities.core.imports as imports
    import torchmetrics  # noqa: F401

    before = imports.package_available, imports.RequirementCache.__bool__
    import_torchmetrics(["fit"])
    assert before == (imports.package_available, imports.RequirementCache.__bool__)
    assert {"torchvision", "transformers"} <= LEFT_OUT
