"""Checkpoints that older code has written load, work with their commands, go on, and give runs their weights.

`record_numbers.py checkpoints` made the fixtures, one of each objective, with the figures that are expected here.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import old_checkpoints
import pytest
import torch
from old_checkpoints import LATER, OBJECTIVES, STEPS
from torch import Tensor

from trunkline.files import find_fault

FIXTURES = Path(__file__).parent / "fixtures" / "checkpoints"
FIGURES: dict[str, Any] = json.loads((FIXTURES / "figures.json").read_text())
PRINTED = {"MaskedLM": 1.1e-3}
"""Tolerance of figures that a command prints with three decimals."""


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test works in a folder of its own, and leaves the process as it was."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["trunkline"])
    for variable in ("TRUNKLINE_RUN", "TRUNKLINE_CACHE", "PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        monkeypatch.setenv(variable, "")  # so that it is restored
        monkeypatch.delenv(variable)


def fixture(objective: str) -> str:
    return str(FIXTURES / f"{objective}.ckpt")


def saved(objective: str) -> dict[str, Tensor]:
    """The network's weights in a fixture, read without the code under test."""
    weights = torch.load(fixture(objective), weights_only=True)["state_dict"]
    return {name.removeprefix("network."): value for name, value in weights.items() if name.startswith("network.")}


def assert_close(found: Any, wanted: Any, tolerance: float = 1e-4) -> None:
    """Compare nested lists and dicts: numbers by their difference, all else to the letter."""
    if isinstance(wanted, float):
        assert found == pytest.approx(wanted, rel=tolerance, abs=tolerance)
    elif isinstance(wanted, list):
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            assert_close(one, other, tolerance)
    elif isinstance(wanted, dict):
        assert found.keys() == wanted.keys()
        for name in wanted:
            assert_close(found[name], wanted[name], tolerance)
    else:
        assert found == wanted


def test_there_is_one_of_each_objective() -> None:
    assert FIGURES.keys() == OBJECTIVES.keys() == {file.stem for file in FIXTURES.glob("*.ckpt")}
    assert [find_fault(FIXTURES / f"{name}.ckpt", unchecked=False) for name in FIGURES] == [None] * len(FIGURES)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_commands_find_what_they_found(objective: str, tmp_path: Path) -> None:
    found = OBJECTIVES[objective].ask(fixture(objective), tmp_path)
    assert_close(found, FIGURES[objective]["found"], PRINTED.get(objective, 1e-4))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_training_goes_on(objective: str, tmp_path: Path) -> None:
    """From the step, with the batches, weights and optimiser's state, that a run without a pause has."""
    folder = tmp_path / "old" / "checkpoints"
    folder.mkdir(parents=True)
    for file in FIXTURES.glob(f"{objective}.ckpt*"):  # with its digest, where that stands beside it
        shutil.copyfile(file, folder / f"last{file.name.removeprefix(objective)}")
    found = old_checkpoints.fit(
        objective, tmp_path, LATER, f"--resume={folder / 'last.ckpt'}", weights=str(tmp_path / "first.pt")
    )
    assert (found["start"], found["end"], len(found["losses"])) == (STEPS, LATER, LATER - STEPS)
    assert_equal(torch.load(tmp_path / "first.pt"), saved(objective))
    losses = [float.fromhex(loss) for loss in found["losses"]]
    # Muon multiplies in bfloat16 where the machine does, so that what follows its first step is rounded otherwise.
    compared = 1 if objective == "ImageClassifier" else len(losses)
    assert_close(losses[:compared], FIGURES[objective]["later"][:compared])


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_run_starts_from_it(objective: str, tmp_path: Path) -> None:
    given = f"--model.init_from={fixture(objective)}"
    found = old_checkpoints.fit(
        objective, tmp_path, 1, given, *tokenizer(objective), weights=str(tmp_path / "first.pt")
    )
    assert (found["start"], found["end"]) == (0, 1)
    assert_equal(torch.load(tmp_path / "first.pt"), saved(objective))


def tokenizer(objective: str) -> list[str]:
    """The flag that takes the tokenizer from the checkpoint too."""
    return [] if objective in ("ImageClassifier", "AudioClassifier") else [f"--data.tokenizer={fixture(objective)}"]


def test_task_starts_from_language_model(tmp_path: Path) -> None:
    given = f"--model.init_from={fixture('MaskedLM')}"
    more = tokenizer("MaskedLM")
    old_checkpoints.fit("TextClassifier", tmp_path, 1, given, *more, weights=str(tmp_path / "first.pt"))
    assert_tower(torch.load(tmp_path / "first.pt"), saved("MaskedLM"))


def test_towers_start_from_image_classifier_and_language_model(tmp_path: Path) -> None:
    given = [f"--model.init_image_from={fixture('ImageClassifier')}", f"--model.init_text_from={fixture('MaskedLM')}"]
    old_checkpoints.fit("ContrastiveImageText", tmp_path, 1, *given, weights=str(tmp_path / "first.pt"))
    weights = torch.load(tmp_path / "first.pt")
    for source in ("ImageClassifier", "MaskedLM"):
        assert_tower(weights, saved(source))


def assert_equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


def assert_tower(found: dict[str, Tensor], source: dict[str, Tensor]) -> None:
    """Every weight of the source's trunk and embeddings is that of one part of a larger network."""
    trunk = {name: value for name, value in source.items() if not name.startswith(("head", "masked_head"))}
    assert len(trunk) > 5
    for name, value in trunk.items():
        assert any(torch.equal(found[own], value) for own in found if own.endswith(f".{name}")), name
