"""What a device cannot do is said before the first step, a lack of memory with what would fit; on pretended GPUs."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import tiny
import torch
from resumed_run import arguments, write_config

from trunkline import TrunklineError
from trunkline.modules.objectives.image_classifier import ImageClassifier
from trunkline.pipelines import device_limits
from trunkline.pipelines.cli import main
from trunkline.pipelines.device_limits import (
    DeviceLimits,
    MemoryUse,
    check_compiler,
    check_precision,
    out_of_memory,
    rows_that_fit,
)

GPU, CPU = torch.device("cuda"), torch.device("cpu")
GIB = 2**30


def pretend(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], name: str = "Tesla T4") -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)


@pytest.mark.parametrize(
    ("precision", "capability", "expected"),
    [
        ("bf16-mixed", (7, 5), "Tesla T4 has compute capability 7.5, and bfloat16 needs 8.0.*set 16-mixed or 32-true"),
        ("bf16-true", (7, 0), "set 16-mixed or 32-true"),
        ("bf16", (6, 1), "set 16-mixed or 32-true"),
        ("transformer-engine", (8, 0), "8-bit .* need 8.9; set bf16-mixed"),
        ("transformer-engine-float16", (7, 5), "need 8.9; set 16-mixed"),
    ],
)
def test_a_precision_that_a_gpu_lacks(
    precision: str, capability: tuple[int, int], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, capability)
    with pytest.raises(TrunklineError, match=expected) as caught:
        check_precision(precision, GPU)
    assert caught.value.field == "trainer.precision"


def test_precisions_that_a_device_has(monkeypatch: pytest.MonkeyPatch) -> None:
    for capability, precisions in {
        (7, 5): ("16-mixed", "16-true", "32-true", "64-true"),
        (8, 0): ("bf16-mixed", "bf16-true", "bf16", "16"),
        (9, 0): ("transformer-engine", "bf16-mixed"),
    }.items():
        pretend(monkeypatch, capability)
        for precision in precisions:
            check_precision(precision, GPU)
    for precision in ("32-true", "bf16-mixed", "bf16-true", "16-true", "64-true"):
        check_precision(precision, CPU)


@pytest.mark.parametrize(
    ("precision", "device", "expected"),
    [
        ("16-mixed", CPU, "set bf16-mixed or 32-true"),
        ("transformer-engine", CPU, "need an NVIDIA GPU, not cpu"),
        ("transformer-engine", torch.device("mps"), "need an NVIDIA GPU, not mps"),
        ("64-true", torch.device("mps"), r"mps does not compute in it \(.+\); set 32-true"),  # here there is no MPS
        ("bf16-mixed", torch.device("mps"), "mps does not compute in it"),
    ],
)
def test_a_precision_that_another_device_lacks(precision: str, device: torch.device, expected: str) -> None:
    with pytest.raises(TrunklineError, match=expected):
        check_precision(precision, device)


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(device_limits.sys, "platform", "linux")
    there: set[str] = {"gcc", "g++"}
    monkeypatch.setattr(shutil, "which", lambda name: name if name in there else None)
    monkeypatch.setattr(device_limits, "find_spec", lambda name: object())
    pretend(monkeypatch, (8, 0))
    check_compiler(CPU)
    check_compiler(GPU)
    there -= {"gcc"}
    with pytest.raises(TrunklineError, match=r"a C compiler .* none was found: install gcc, or set compile to false"):
        check_compiler(GPU)
    there -= {"g++"}
    with pytest.raises(
        TrunklineError, match=r"torch.compile needs a C\+\+ compiler .* install g\+\+, or set"
    ) as caught:
        check_compiler(CPU)
    assert caught.value.field == "compile"
    monkeypatch.setenv("CXX", "my-compiler")
    with pytest.raises(TrunklineError, match="CXX"):
        check_compiler(CPU)
    there |= {"my-compiler", "gcc"}
    check_compiler(CPU)
    monkeypatch.setattr(device_limits, "find_spec", lambda name: None)
    with pytest.raises(TrunklineError, match="Triton, which is not installed: pip install triton, or set"):
        check_compiler(GPU)
    pretend(monkeypatch, (6, 1))
    with pytest.raises(TrunklineError, match=r"compute capability 7.0 or newer, which Tesla T4 is not, or set compile"):
        check_compiler(GPU)


def test_a_compiler_that_fails_in_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from torch._inductor import config as inductor  # takes seconds

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    config = write_config(tmp_path)
    line = [*arguments(config, 1), "--compile", "true"]
    monkeypatch.setattr("sys.argv", ["trunkline", *line])
    torch._dynamo.reset()
    with inductor.patch({"cpp.cxx": (None, "false")}), pytest.raises(SystemExit):
        main(line)
    said = " ".join(capsys.readouterr().err.split())
    assert "error: torch.compile failed: No working C++ compiler" in said
    assert "or set compile to false (--compile)" in said


def test_a_run_is_refused_before_its_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["trunkline"])
    config = write_config(tmp_path)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    for options, words in {
        ("--trainer.precision", "16-mixed"): "precision 16-mixed cannot be used",
        ("--compile", "true"): "torch.compile needs a C++ compiler",
    }.items():
        with pytest.raises(SystemExit):
            main([*arguments(config, 1), *options])
        said = " ".join(capsys.readouterr().err.split())
        assert words in said
        assert f"({options[0]})" in said
        assert not list(tmp_path.glob("runs/*/*"))


def test_the_rows_that_fit() -> None:
    """With 10 GiB of weights and so on, and 2.5 GiB for each of 16 rows, 12 would fit into 40 GiB: so 8 of 16 do."""
    use = MemoryUse(capacity=40 * GIB, peak=38 * GIB, asked=12 * GIB, resident=10 * GIB, fixed=10 * GIB)
    assert rows_that_fit(16, use) == 8
    assert rows_that_fit(24, use._replace(peak=58 * GIB)) == 12
    assert rows_that_fit(1, use) == 0
    assert rows_that_fit(16, use._replace(fixed=39 * GIB)) == 0
    assert rows_that_fit(16, use._replace(fixed=50 * GIB)) == 0
    first_step = use._replace(resident=3 * GIB)  # without gradients and states yet: a row took (50 - 3) / 16 GiB
    assert rows_that_fit(20, first_step._replace(peak=22 * GIB)) == 10  # (34 - 3) / 20 each, and 30 are left: not 20


class Full(L.Callback):
    """Runs out of memory in the third step, as a GPU does."""

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB. GPU 0 has a total …")


def test_a_batch_that_does_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["trunkline"])
    measured: list[MemoryUse] = []

    def measure(trainer: L.Trainer, module: L.LightningModule, error: BaseException) -> MemoryUse:
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "mem_get_info", lambda device: (3 * GIB, 80 * GIB))
            patch.setattr(torch.cuda, "memory_reserved", lambda device: 5 * GIB)
            patch.setattr(torch.cuda, "max_memory_allocated", lambda device: 6 * GIB)
            measured.append(device_limits_measure(trainer, module, error))
        return measured[-1]

    device_limits_measure = device_limits.measure
    monkeypatch.setattr(device_limits, "measure", measure)
    monkeypatch.setattr(
        DeviceLimits,
        "on_exception",
        lambda self, trainer, module, error: setattr(error, "__cause__", out_of_memory(trainer, module, error)),
    )
    pretend(monkeypatch, (8, 0))
    config = write_config(tmp_path)
    text = config.read_text().replace("callbacks+:", "callbacks+:\n  - class_path: test_device_limits.Full")
    config.write_text(text)
    with pytest.raises(SystemExit) as stop:
        main([*arguments(config, 1), "--trainer.accumulate_grad_batches", "2"])
    assert stop.value.code == 2
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("error:") == 1
    assert (
        "the GPU's 8.00 GiB are not enough (tried to allocate 3.00 GiB more; the most at a time was 6.00 GiB)" in said
    )
    assert "a batch of 20 rows was tried; 10 may fit" in said
    assert "--data.batch_size 10 --trainer.accumulate_grad_batches 4" in said
    for words in ("activation_checkpointing true", "--trainer.precision bf16-mixed", "--config trainer/fsdp"):
        assert words in said
    (use,) = measured
    weights = sum(p.numel() * 4 for p in ImageClassifier(tiny.vit()).parameters())
    assert (use.capacity, use.peak, use.asked) == (8 * GIB, 6 * GIB, 3 * GIB)
    assert use.fixed > 3 * weights > 0  # and an average


def fake(data: Any, **options: Any) -> Any:
    fields = {"world_size": 1, "evaluating": False, "sanity_checking": False, "accumulate_grad_batches": 1}
    strategy = SimpleNamespace(root_device=CPU)
    return SimpleNamespace(datamodule=data, strategy=strategy, precision="bf16-mixed", **{**fields, **options})


def test_what_is_said_of_other_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    use = MemoryUse(capacity=40 * GIB, peak=38 * GIB, asked=12 * GIB, resident=10 * GIB, fixed=10 * GIB)
    monkeypatch.setattr(device_limits, "measure", lambda *_: use)
    module, error = ImageClassifier(tiny.vit()), torch.OutOfMemoryError()
    data = SimpleNamespace(batch_size=64, eval_batch_size=32)
    several = out_of_memory(fake(data, world_size=4), module, error)
    assert "16 rows in each process was tried; 8 may fit" in str(several)
    assert "--data.batch_size 32 --trainer.accumulate_grad_batches 2" in str(several)
    assert "--trainer.precision" not in str(several)
    evaluation = out_of_memory(fake(data, evaluating=True), module, error)
    assert "--data.eval_batch_size 16" in str(evaluation)
    assert "accumulate" not in str(evaluation)
    assert evaluation.field == "data.eval_batch_size"
    tokens = out_of_memory(fake(SimpleNamespace(batch_size=64, batch_tokens=1000)), module, error)
    assert "batches were of batch_tokens 1000; 500 may fit: set --data.batch_tokens" in str(tokens)
    mixed = fake(SimpleNamespace(batch_size=64, eval_batch_size=32, batch_tokens=1000), evaluating=True)
    assert "--data.eval_batch_size 16" in str(out_of_memory(mixed, module, error))
    monkeypatch.setattr(device_limits, "measure", lambda *_: use._replace(fixed=50 * GIB))
    assert "take 50.00 GiB, so that no smaller batch would fit" in str(out_of_memory(fake(data), module, error))


def test_only_a_gpu_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    error = torch.OutOfMemoryError()
    DeviceLimits().on_exception(fake(None), ImageClassifier(tiny.vit()), error)
    assert error.__cause__ is None
    monkeypatch.setattr(device_limits, "out_of_memory", lambda *_: TrunklineError("explained"))
    trainer = fake(None)
    trainer.strategy.root_device = GPU
    DeviceLimits().on_exception(trainer, ImageClassifier(tiny.vit()), error)
    assert str(error.__cause__) == "explained"


def test_an_evaluation_needs_neither_scaled_gradients_nor_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that a GPU trained in 16-mixed, compiled, may be evaluated on a CPU."""
    monkeypatch.setattr(device_limits, "finds_compiler", lambda *_: False)
    limits, trainer = DeviceLimits("16-mixed", compiled=True), fake(None)
    trainer.strategy.root_device = CPU
    for stage in ("validate", "test"):
        limits.setup(trainer, ImageClassifier(tiny.vit()), stage)
    for each, expected in ((limits, "16-mixed cannot be used"), (DeviceLimits(compiled=True), "needs a C.. compiler")):
        with pytest.raises(TrunklineError, match=expected):
            each.setup(trainer, ImageClassifier(tiny.vit()), "fit")
