"""No training step makes the host wait for its device, unless it logs."""

from pathlib import Path
from typing import Any

import device_reads
import meta_device
import pytest
import torch
import torch.nn.functional as F
import yaml
from device_reads import HostReads, NoReads, no_reads, no_waits
from lightning.pytorch.callbacks import Callback
from recorded_run import Run
from resumed_run import arguments, write_config
from tasks import BATCHES, TASKS

from trunkline.modules.callbacks.curves import Curves
from trunkline.modules.objectives.audio_task import AudioTask
from trunkline.modules.objectives.speech_recognizer import SpeechRecognizer
from trunkline.modules.training.finite_steps import FiniteSteps
from trunkline.pipelines.cli import main

RUN_WITH_MORE = {"block": "documents", "masked": "masked_pairs", "classify": "adapted"}
"""Tasks of which another runs every line, and more; `block` is also what the runs in half precision train."""
ALL = [pytest.param(task, marks=[pytest.mark.slow] * (task in RUN_WITH_MORE)) for task in TASKS]


def recipe(folder: Path, task: str, *callbacks: str, optimizer: dict[str, Any] | None = None, **trainer: Any) -> Path:
    """One epoch of a task, with weights averaged; it logs in every fifth step."""
    options = {"max_epochs": 1, "log_every_n_steps": 5, "val_check_interval": 1.0, "logger": True, **trainer}
    config = write_config(folder, task, **options)
    content = yaml.safe_load(config.read_text())
    content["model"]["init_args"]["optimizer"] = optimizer or content["model"]["init_args"]["optimizer"]
    content["trainer"]["callbacks+"] = [
        *(each for each in content["trainer"]["callbacks+"] if each["class_path"].endswith("WeightAverage")),
        *({"class_path": path} for path in callbacks),
    ]
    config.write_text(yaml.safe_dump(content))
    return config


def run(folder: Path, task: str, monkeypatch: pytest.MonkeyPatch, *callbacks: str, **options: Any) -> None:
    """Train a task as on an accelerator."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sys.argv", ["trunkline"])
    monkeypatch.setattr(Curves, "on_fit_end", lambda *_: None)  # drawn after all steps, which takes as long as they
    # There the optimiser leaves a bad step out by itself, and the host learns of it at the next step.
    monkeypatch.setattr(FiniteSteps, "host_may_wait", lambda self, result: False)
    main(arguments(recipe(folder, task, *callbacks, **options), 1))


@pytest.mark.parametrize("task", ALL)
def test_a_step_reads_nothing(task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if task == "speech":  # PyTorch's CTC loss waits itself, so its objective may
        monkeypatch.setattr(device_reads, "ALLOWED", (*device_reads.ALLOWED, "objectives/speech_recognizer.py"))
    quiet: list[int] = []
    monkeypatch.setattr(device_reads, "QUIET", quiet)
    run(tmp_path, task, monkeypatch, "device_reads.NoReads")
    assert quiet == [step for step in range(1, BATCHES) if (step + 1) % 5]


HALF = {"plugins": [{"class_path": "half_on_cpu.HalfOnCPU"}], "gradient_clip_val": 0.5}


@pytest.mark.parametrize(
    ("task", "name", "options"),
    [
        pytest.param("image", "adamw", {}, marks=pytest.mark.slow),
        ("block", "adamw", {}),
        ("block", "adamw", {"rms_scaled": True}),
        ("block", "muon", {}),
        ("block", "adamw", {"skip_nonfinite": 3}),
    ],
)
def test_nor_does_a_clipped_step_in_16_mixed(
    task: str, name: str, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither does the loss scaler, which lets these optimisers leave out a step that overflows."""
    quiet: list[int] = []
    monkeypatch.setattr(device_reads, "QUIET", quiet)
    optimizer = {"name": name, "lr": 0.01, **options}
    run(tmp_path, task, monkeypatch, "device_reads.NoReads", optimizer=optimizer, **HALF)
    assert quiet == [step for step in range(1, BATCHES) if (step + 1) % 5]


@pytest.mark.parametrize("task", ALL)
def test_no_step_waits_for_a_copy_to_the_device(task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meta_device.pretend(monkeypatch)
    if task == "speech":  # PyTorch's CTC loss waits itself, so its objective may
        monkeypatch.setattr(F, "ctc_loss", lambda log_probs, *_, **__: log_probs.sum(dim=(0, 2)))
        monkeypatch.setattr(SpeechRecognizer, "count", AudioTask.count)
    options = {"strategy": {"class_path": "meta_device.OnMeta"}, "log_every_n_steps": BATCHES}
    with pytest.raises(meta_device.Enough):
        run(tmp_path, task, monkeypatch, "meta_device.NoCopies", enable_progress_bar=False, **options)


def test_bf16_mixed_reads_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path, "block", monkeypatch, "device_reads.NoReads", precision="bf16-mixed", gradient_clip_val=0.5)


class TwoOnAnAccelerator(NoReads):
    """As in `run`, for a process that does not inherit the patch."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        pl_module.finite_steps.host_may_wait = lambda result: False


def test_two_processes_do_not_wait_for_each_other(tmp_path: Path) -> None:
    """A contrastive loss compares the pairs of all processes, and knows without asking how many each has."""
    path = recipe(tmp_path, "pairs", "test_no_waiting.TwoOnAnAccelerator")
    run = Run(arguments(path, 2), tmp_path, processes=2)
    assert run.wait() == [0, 0], run.log.read_text()


class Reader(Callback):
    """Reads the loss in every step, as a careless callback would."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
        outputs["loss"].item()


def test_a_reading_callback_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(HostReads, match=r"_local_scalar_dense.*test_no_waiting"):
        run(tmp_path, "own", monkeypatch, "test_no_waiting.Reader", "device_reads.NoReads")


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.item(),
        lambda x: bool(x > 0),
        lambda x: float(x),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x.numpy(),
        lambda x: x.expand(3)[x.expand(3) > 0],
        lambda x: x.expand(3).nonzero(),
        lambda x: torch.equal(x, x),
        lambda x: x.expand(3).clone().masked_select(x > 0),
        lambda x: torch.arange(3).repeat_interleave(torch.arange(3)),
    ],
)
def test_every_kind_of_read_is_found(read: Any) -> None:
    with no_reads(), pytest.raises(HostReads):
        read(torch.tensor(1.0))


def test_waits_for_a_gpu_are_errors_only_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `tests/gpu` uses; without a GPU nothing is set."""
    modes: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    for there, want in ((False, []), (True, ["error", "default"])):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        with no_waits():
            assert modes == want[:1]
        assert modes == want
