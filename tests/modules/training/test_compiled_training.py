"""Compiled training: one graph for each objective, without breaks, that nothing else touches."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from resumed_run import arguments, write_config
from tasks import TASKS
from torch import nn
from torch._dynamo.utils import counters

from trunkline.pipelines.cli import main

RAGGED = {"translate", "speech", "listen"}
"""Tasks whose batches have as many rows as fit, and rows of different lengths."""


@pytest.mark.parametrize("task", TASKS)
def test_training_is_compiled_once(task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with an evaluation before training and after every step, in batches of another size."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["trunkline"])
    graphs: list[list[Any]] = []

    def backend(graph: Any, inputs: list[Any]) -> Any:
        graphs.append(inputs)
        return graph

    compile_network = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, **_: compile_network(self, backend=backend))
    options = {"limit_val_batches": 2, "num_sanity_val_steps": 2, "val_check_interval": 1, "max_steps": 6}
    config = write_config(tmp_path, task, log_every_n_steps=2, **options)
    content = yaml.safe_load(config.read_text())
    content["trainer"]["callbacks+"] = content["trainer"]["callbacks+"][:1]  # the average
    content["data"]["init_args"]["eval_batch_size"] = 7
    config.write_text(yaml.safe_dump(content))
    torch._dynamo.reset()
    counters.clear()
    main([*arguments(config, 1), "--compile", "true"])
    symbolic = [any(isinstance(x, torch.SymInt) for x in inputs) for inputs in graphs]
    assert symbolic == ([False, True] if task in RAGGED else [False])
    assert counters["graph_break"] == Counter()
    assert counters["unimplemented"] == Counter()
