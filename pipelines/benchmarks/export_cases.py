"""An exported GPT-2 in onnxruntime against our own network in eager mode."""

import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from trunkline.modules.networks import GPT, GPTConfig
from trunkline.modules.networks.export import export_network, runner_of
from trunkline.pipelines.benchmarks.memory import peak_memory
from trunkline.pipelines.benchmarks.timing import Side, compare

EXPORTED_SHAPE = GPTConfig()
"""GPT-2 124M."""
EXPORTED_LENGTH = 256
"""Tokens of a row."""
EXPORTED_ROWS = (1, 4)
"""Rows at once."""


def some_tokens(rows: int) -> torch.Tensor:
    """Random token ids (rows, EXPORTED_LENGTH)."""
    return torch.randint(EXPORTED_SHAPE.vocab_size, (rows, EXPORTED_LENGTH), generator=torch.Generator().manual_seed(0))


def timed(work: Callable[[], Any]) -> Side:
    """A side that measures one call without gradients."""

    def side() -> float:
        start = time.perf_counter()
        with torch.inference_mode():
            work()
        return time.perf_counter() - start

    return side


def exported_forward(rounds: int, batch_size: int | None) -> list[dict[str, Any]]:
    """Forward passes; both sides have torch's number of threads."""
    network, rows = GPT(EXPORTED_SHAPE).eval(), []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "gpt2.onnx")
        (found,) = export_network(network, file, "onnx")
        network.save_pretrained(folder)
        run = runner_of(file, "onnx", ["logits"])
        for size in EXPORTED_ROWS if batch_size is None else (batch_size,):
            tokens = some_tokens(size)
            case, ours, theirs = (
                f"GPT-2 in onnxruntime, {size} x {EXPORTED_LENGTH}",
                partial(run, {"tokens": tokens}),
                partial(network, tokens),
            )
            rows.append(compare(case, "our own eager", timed(ours), timed(theirs), rounds))
        memory = [peak_memory(partial(load, folder)) / 2**20 for load in (load_onnx, load_network_of)]
        weights = sum(p.numel() * p.element_size() for p in network.parameters()) / 1e6
        print(
            f"ONNX file {file.stat().st_size / 1e6:.1f} MB for {weights:.1f} MB of weights; largest difference "
            f"{found.difference:.1e}; peak memory of loading and one row: {memory[0]:.0f} MiB, eager "
            f"{memory[1]:.0f} MiB"
        )
    return rows


def load_onnx(folder: str) -> Callable[[], Any]:
    """Prepares to load and run the exported network."""
    import onnxruntime

    assert onnxruntime
    return lambda: runner_of(Path(folder, "gpt2.onnx"), "onnx", ["logits"])({"tokens": some_tokens(1)})


def load_network_of(folder: str) -> Callable[[], Any]:
    """Prepares to load and run our network."""

    def work() -> None:
        with torch.inference_mode():
            GPT.from_pretrained(folder).eval()(some_tokens(1))

    return work
