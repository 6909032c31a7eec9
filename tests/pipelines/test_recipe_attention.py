"""Recipes with other fields, which take flex attention on a GPU; `test_training.py` has the packaged ones."""

from pathlib import Path

import pytest
import torch
import yaml
from recipe_paths import SKIPPED, paths_of
from test_training import Dry, declared_facts

from trunkline import datamodules
from trunkline.pipelines.configs import find_config, resolve_configs


@pytest.mark.parametrize(
    ("recipe", "flags"),
    [
        ("gpt/gpt2_124m", "--data.packing documents"),
        ("gpt/modern_124m", "--model.network.backbone.window 256"),
        ("bert/squad", "--model.network.bert.backbone.dropout 0"),
        ("audio/librispeech_ctc", "--model.network.backbone.dropout 0"),
        ("audio/ast_audioset", "--data.log_mel.padding batch"),
    ],
)
def test_flex_attention_takes(recipe: str, flags: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRUNKLINE_RUN", "test")
    kind = getattr(datamodules, yaml.safe_load(find_config(recipe).read_text())["data"]["class_path"])
    monkeypatch.setattr(kind, "facts", property(lambda data: declared_facts(data, recipe)))
    resolved, name = resolve_configs(["fit", "--config", recipe, "--config", "trainer/cpu", *flags.split()])
    monkeypatch.setattr("sys.argv", ["trunkline", *resolved])
    with torch.device("meta"):
        cli = Dry(resolved, name)
    assert paths_of(cli.model, cli.datamodule, monkeypatch) == [SKIPPED]
