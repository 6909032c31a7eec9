"""On a GPU every objective learns in half precision, compiled and not, and a killed run resumes to the same weights."""

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import device_reads
import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import Callback
from recorded_run import Run
from resumed_run import EPOCHS, arguments, assert_same_run, kill_and_resume, write_config
from tasks import BATCHES, TASKS
from torch import Tensor, nn

from trunkline.pipelines.cli import main

STEPS = 20
WIDE, LONG = 64, 192
"""Width of two heads that flex attention takes, and of a row that it cuts into blocks."""
MARGIN = 0.5
"""How far half precision may lead away from float32's weights, in times the way that float32 went."""


class Kept(Callback):
    """Keeps what a run computed."""

    start: Tensor
    end: Tensor
    losses: list[Tensor]

    def __init__(self) -> None:
        LATEST[:] = [self]
        self.losses = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.start = flat(pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *_: Any) -> None:
        self.losses.append(outputs["loss"].detach().clone())

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.end = flat(pl_module)
        assert trainer.global_step == STEPS


LATEST: list[Kept] = []
GRAPHS: list[torch.fx.GraphModule] = []
Change = Callable[[dict[str, Any]], None]
"""Changes the content of a recipe."""


def kept_graph(backend: str, graph: torch.fx.GraphModule, examples: list[Any]) -> Any:
    """What a compiler makes of a graph, which is kept."""
    GRAPHS.append(graph)
    return torch._dynamo.lookup_backend(backend)(graph, examples)  # type: ignore[arg-type]


def flat(module: nn.Module) -> Tensor:
    """All weights, as one vector on the host."""
    return torch.cat([p.detach().cpu().double().flatten() for p in module.parameters()])


def nothing(content: dict[str, Any]) -> None:
    """A recipe as it is."""


def train(
    task: str, precision: str, compiled: bool, device: torch.device, folder: Path, change: Change = nothing
) -> Kept:
    """Twenty steps of a task, with no randomness but that of the data."""
    kind = "gpu" if device.type == "cuda" else "cpu"
    options: dict[str, Any] = {"max_steps": STEPS, "limit_val_batches": 2, "val_check_interval": 10}
    config = write_config(folder, task, exact=True, accelerator=kind, devices=1, **options)
    content = yaml.safe_load(config.read_text())
    content["trainer"]["callbacks+"] = [{"class_path": "test_gpu_training.Kept"}]
    change(content)
    if (kind, precision) == ("cpu", "16-mixed"):
        content["trainer"]["plugins"] = [{"class_path": "half_on_cpu.HalfOnCPU"}]
    else:
        content["trainer"]["precision"] = precision
    content["compile"] = compiled
    config.write_text(yaml.safe_dump(content))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("sys.argv", ["trunkline"])
        if compiled:
            compile_network = nn.Module.compile
            backend = partial(kept_graph, "inductor" if kind == "gpu" else "eager")
            patch.setattr(nn.Module, "compile", lambda self, **_: compile_network(self, backend=backend))
        torch._dynamo.reset()
        GRAPHS.clear()
        main(arguments(config, 1))
    return LATEST[0]


@pytest.fixture(scope="module")
def in_float32(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, torch.device], Kept]:
    """A task trained eagerly in float32 on the same device; each once."""

    @cache
    def trained(task: str, device: torch.device) -> Kept:
        return train(task, "32-true", False, device, tmp_path_factory.mktemp(task))

    return trained


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("task", TASKS)
def test_half_precision_learns_what_float32_learns(
    task: str, precision: str, compiled: bool, device: torch.device, in_float32: Any, tmp_path: Path
) -> None:
    """From the same weights and batches to nearly the same weights, also if a step or two overflow in 16-mixed."""
    exact, kept = in_float32(task, device), train(task, precision, compiled, device, tmp_path)
    assert torch.equal(kept.start, exact.start)
    assert len(kept.losses) == STEPS
    assert all(loss.isfinite() for loss in kept.losses)
    way = (exact.end - exact.start).norm()
    assert way > 0
    assert (kept.end - exact.end).norm() < MARGIN * way


def test_flex_attention_in_training(device: torch.device, tmp_path: Path) -> None:
    """Rows of several documents, wide and long enough for it, through the whole of `trunkline fit`."""

    def change(content: dict[str, Any]) -> None:
        network, data = content["model"]["init_args"]["network"], content["data"]["init_args"]
        network["backbone"]["dim"], network["max_length"], data["max_length"] = WIDE, LONG, LONG
        data["batch_size"] = 4
        content["trainer"] |= {"val_check_interval": 1.0, "max_epochs": STEPS}

    folders = tmp_path / "float32", tmp_path / "compiled"
    for folder in folders:
        folder.mkdir()
    exact = train("documents", "32-true", False, device, folders[0], change)
    kept = train("documents", "bf16-mixed", True, device, folders[1], change)
    (graph,) = GRAPHS
    calls = [str(node.target) for node in graph.graph.nodes]
    assert calls.count("flex_attention") == (2 if device.type == "cuda" else 0)
    assert all(loss.isfinite() for loss in kept.losses)
    assert (kept.end - exact.end).norm() < MARGIN * (exact.end - exact.start).norm()


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("task", [task for task in TASKS if task != "speech"])
def test_a_step_that_logs_nothing_does_not_wait(
    task: str, compiled: bool, device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch's CTC loss, for speech, always waits: it reads lengths on the host and copies them back to the GPU."""
    quiet: list[int] = []
    monkeypatch.setattr(device_reads, "QUIET", quiet)

    def change(content: dict[str, Any]) -> None:
        content["trainer"]["callbacks+"].append({"class_path": "device_reads.NoWaits"})
        content["trainer"]["log_every_n_steps"] = 5

    train(task, "bf16-mixed", compiled, device, tmp_path, change)
    assert quiet == [step for step in range(1, STEPS) if (step + 1) % 5]


NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


@pytest.mark.parametrize(
    ("task", "compiled"),
    [
        *((task, False) for task in ("image", "documents", "classify", "pairs", "translate")),
        *(pytest.param(task, True, marks=NEEDS_GPU) for task in ("image", "documents")),  # on a CPU it takes minutes
    ],
)
def test_a_killed_run_resumes_to_the_same_weights(
    task: str, compiled: bool, device: torch.device, tmp_path: Path
) -> None:
    """In bfloat16, with dropout on the device, at tolerance 0; the CTC loss of PyTorch cannot promise it on a GPU."""
    kind = "gpu" if device.type == "cuda" else "cpu"
    options: dict[str, Any] = {"accelerator": kind, "precision": "bf16-mixed", "deterministic": True}
    folders = tmp_path / "whole", tmp_path / "killed"
    for folder in folders:
        folder.mkdir()
    configs = [write_config(folder, task, **options) for folder in folders]
    for config in configs:
        config.write_text(f"{config.read_text()}compile: {str(compiled).lower()}\n")
    run = Run(arguments(configs[0], 1), folders[0], 1)
    assert run.wait() == [0], run.output()
    kill_and_resume(configs[1], 1, 0, EPOCHS * BATCHES, seed=task, kills=2)
    assert_same_run(folders[1], folders[0])
