"""`--data.help` explains every argument of every datamodule, wherever it is declared."""

import re

import pytest

from trunkline import datamodules
from trunkline.datamodules.base import TrunklineDataModule
from trunkline.pipelines.parser import RecipeParser

NAMES = [name for name in datamodules.__all__ if name.endswith("Data")]


@pytest.mark.parametrize("name", NAMES)
def test_every_argument_is_explained(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    parser = RecipeParser(prog="trunkline")
    parser.add_subclass_arguments(TrunklineDataModule, "data", required=False)
    with pytest.raises(SystemExit):
        parser.parse_args(["--data.help", f"trunkline.datamodules.{name}"])
    _, *sections = capsys.readouterr().out.partition("Help for")[2].split("\n  --data.")
    found = [re.match(r"(\w+) \S+ (.*?) ?\((required, )?type: ", " ".join(text.split())) for text in sections]
    texts = {match[1]: match[2] for match in found if match}
    assert {"source", "batch_size", "seed", "val_fraction", "train_split"} <= set(texts)
    assert [argument for argument, text in texts.items() if len(text) < 8] == []
