"""Samples seen and their speed, for batches that differ in size, over accumulated steps and a resume."""

import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from trunkline.contract import IGNORE
from trunkline.datamodules import samplers
from trunkline.datamodules.samplers import ResumableBatchSampler, ResumableLoader, SampleKey
from trunkline.modules.backbone import TransformerConfig
from trunkline.modules.callbacks import Throughput, throughput
from trunkline.modules.callbacks.throughput import count_tokens
from trunkline.modules.networks import GPTConfig
from trunkline.modules.objectives.causal_lm import CausalLM

LENGTHS = [5, 1, 7, 3, 8, 2, 6]
"""Targets in each batch of an epoch."""


class Ragged(CausalLM):
    """Counts tokens that have a target."""

    def batch_size(self, batch: Any) -> Tensor:  # type: ignore[override]
        return (batch["targets"] != IGNORE).sum()


class Seconds(Ragged):
    """Half a second each."""

    unit = "audio_seconds"
    unit_size = 0.5


class Clock(Callback):
    """A batch takes 2 seconds on it, a validation 1000."""

    now = 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        self.now += 2

    def on_validation_epoch_start(self, *_: Any) -> None:
        self.now += 1000


def batches() -> DataLoader[Any]:
    rows = torch.arange(9).repeat(len(LENGTHS), 1, 1) % 11
    targets = [row[:, 1:].clone() for row in rows]
    for row, length in zip(targets, LENGTHS, strict=True):
        row[:, length:] = IGNORE
    data = [{"tokens": r[:, :-1], "targets": t} for r, t in zip(rows, targets, strict=True)]
    return DataLoader(data, batch_size=None)  # type: ignore[arg-type]


def objective(kind: type[CausalLM]) -> CausalLM:
    torch.manual_seed(0)
    return kind(GPTConfig(11, 8, backbone=TransformerConfig(dim=8, depth=1, num_heads=2)))


def run(
    folder: Path,
    *callbacks: Callback,
    kind: type[CausalLM] = Ragged,
    resume: Path | None = None,
    clock: Clock | None = None,
    data: Any = None,
    **options: Any,
) -> dict[str, dict[int, float]]:
    """Train, and return the curves of TensorBoard."""
    clock = clock or Clock()
    trainer = L.Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        logger=TensorBoardLogger(folder, name="", version="", default_hp_metric=False),
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[clock, *callbacks],
        **{"log_every_n_steps": 2, "max_epochs": 2, "limit_val_batches": 1, **options},
    )
    with pytest.MonkeyPatch.context() as patch:
        for timed in (throughput, samplers):
            patch.setattr(timed, "time", SimpleNamespace(perf_counter=lambda: clock.now))
        given = {"datamodule": data} if data else {"train_dataloaders": batches(), "val_dataloaders": batches()}
        trainer.fit(objective(kind), ckpt_path=resume, **given)
    found = EventAccumulator(str(folder), {"scalars": 0}).Reload()
    return {tag: {e.step: e.value for e in found.Scalars(tag)} for tag in found.Tags()["scalars"]}


def test_batches_of_different_sizes(tmp_path: Path) -> None:
    found = run(tmp_path, Throughput())
    seen = [sum((LENGTHS * 2)[:step]) for step in range(15)]
    assert found["tokens_seen"] == {step: seen[step] for step in (2, 4, 6, 8, 10, 12, 14)}
    speed = {step: (seen[step] - seen[step - 2]) / 4 for step in (2, 4, 6, 8, 10, 12, 14)}
    assert found["throughput/tokens_per_sec"] == pytest.approx(speed)
    flops = found["throughput/flops_per_sec"]
    per_token = objective(Ragged).flops_per_batch({"tokens": torch.zeros(1, 8).long()}) // LENGTHS[1]  # type: ignore[typeddict-item]
    assert flops == pytest.approx({step: value * per_token for step, value in speed.items()})
    assert list(found["by_tokens/val/loss"]) == [seen[7], seen[14]]
    assert list(found["by_tokens/train/loss"]) == [seen[step] for step in speed]


def test_units_that_are_parts_of_what_is_counted(tmp_path: Path) -> None:
    """The checkpoint has whole numbers, and the x-axis too."""
    counter = Throughput()
    whole, found = run(tmp_path / "whole", Throughput()), run(tmp_path / "half", counter, kind=Seconds)
    seen = [sum((LENGTHS * 2)[:step]) for step in range(15)]
    assert found["audio_seconds_seen"] == {step: seen[step] / 2 for step in (2, 4, 6, 8, 10, 12, 14)}
    speed = {step: (seen[step] - seen[step - 2]) / 8 for step in (2, 4, 6, 8, 10, 12, 14)}
    assert found["throughput/audio_seconds_per_sec"] == pytest.approx(speed)
    assert found["throughput/flops_per_sec"] == pytest.approx(whole["throughput/flops_per_sec"])
    assert list(found["by_audio_seconds/val/loss"]) == [seen[7] // 2, seen[14] // 2]
    assert counter.state_dict()["seen"] == seen[14]
    assert counter.per_second == pytest.approx(speed[14])


def test_the_host_waits_for_the_device_when_logging_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waited = [0]

    class Steps(Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            waited.append(0)

    def read(value: Any) -> int:
        waited[-1] += isinstance(value, Tensor)
        return int(value)

    monkeypatch.setattr(throughput, "int", read, raising=False)
    run(
        tmp_path,
        Steps(),
        Throughput(),
        log_every_n_steps=3,
        max_steps=7,
        limit_val_batches=0,
        enable_checkpointing=False,
    )
    assert [count > 0 for count in waited[1:]] == [False, False, True, False, False, True, False]


class Saved(Callback):
    """What a checkpoint after each batch would hold."""

    def __init__(self, counter: Throughput) -> None:
        self.counter, self.seen = counter, []  # type: ignore[var-annotated]

    def on_train_batch_end(self, *_: Any) -> None:
        self.seen.append(self.counter.state_dict()["seen"])


@pytest.mark.parametrize("kind", [Ragged, CausalLM])
def test_accumulated_steps_and_a_resume(kind: type[CausalLM], tmp_path: Path) -> None:
    """An epoch of 7 batches has steps of 3, 3 and 1 batches."""
    sizes = LENGTHS if kind is Ragged else [8] * 7
    first, second, third = sum(sizes[:3]), sum(sizes[:6]), sum(sizes)
    options: dict[str, Any] = {"kind": kind, "accumulate_grad_batches": 3, "log_every_n_steps": 1}
    counter, saving = Throughput(), ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=3)
    saved = Saved(counter)
    found = run(tmp_path / "whole", counter, saved, saving, **options, max_epochs=1)["tokens_seen"]
    assert found == {1: first, 2: second, 3: third}
    assert saved.seen == [0, 0, first, first, first, second, third]
    found = run(tmp_path / "resumed", Throughput(), resume=tmp_path / "step=3.ckpt", **options)["tokens_seen"]
    assert found == {4: third + first, 5: third + second, 6: third + third}


@pytest.mark.parametrize("state", [{"samples_a_step": 8}, None])
def test_a_checkpoint_of_an_older_version(state: dict[str, int] | None, tmp_path: Path) -> None:
    """It holds the samples of a step, or nothing: then all steps are taken to be as the first one."""
    saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    run(tmp_path / "first", Throughput(), saving, kind=CausalLM, max_steps=3)
    content = torch.load(tmp_path / "step=3.ckpt", weights_only=True)
    content["callbacks"]["Throughput"] = state
    if state is None:
        del content["callbacks"]["Throughput"]
    torch.save(content, tmp_path / "old.ckpt")
    found = run(tmp_path / "second", Throughput(), kind=CausalLM, resume=tmp_path / "old.ckpt", max_steps=6)
    assert found["tokens_seen"] == {4: 32, 6: 48}
    assert found["throughput/tokens_per_sec"] == {4: 4.0, 6: 4.0}
    callback = Throughput()
    if state is not None:  # a resume may begin with a validation
        callback.load_state_dict(state)
        assert callback.state_dict() == {"seen": None, "samples_a_step": 8}


def test_a_second_run_counts_from_the_start(tmp_path: Path) -> None:
    callback = Throughput()
    for name in ("first", "second"):
        assert run(tmp_path / name, callback, max_steps=4)["tokens_seen"] == {2: 6, 4: 16}


def test_tokens_of_batches() -> None:
    mask = torch.tensor([[True, True, False], [True, False, False]])
    tokens, targets = torch.zeros(2, 3), torch.tensor([[4, 5, 2, IGNORE], [2, IGNORE, IGNORE, IGNORE]])
    assert count_tokens({"image": torch.zeros(2, 3)}) == 0
    assert count_tokens({"features": torch.zeros(2, 3, 4), "mask": mask, "targets": targets}) == 0
    assert count_tokens({"tokens": tokens}) == 6
    assert count_tokens({"tokens": tokens, "mask": mask}) == 3
    assert count_tokens({"tokens": tokens, "mask": mask, "target_tokens": targets, "targets": targets}) == 7


class SlowRows(Dataset[Any]):
    """Row n takes seconds[n] on a clock."""

    def __init__(self, clock: Clock, seconds: list[float]) -> None:
        self.clock, self.seconds = clock, seconds

    def __len__(self) -> int:
        return len(self.seconds)

    def __getitem__(self, key: SampleKey) -> dict[str, Tensor]:
        self.clock.now += self.seconds[key.index]
        return {"tokens": torch.arange(8), "targets": torch.arange(1, 9)}


class Given(L.LightningDataModule):
    """Asks a function for the loader of training."""

    def __init__(self, loader: Callable[[], ResumableLoader]) -> None:
        super().__init__()
        self.loader = loader

    def train_dataloader(self) -> ResumableLoader:
        return self.loader()


def wait(folder: Path, first: float, others: float) -> tuple[dict[int, float], list[str]]:
    """The logged shares, and the warnings, of steps of 2 seconds; `first` and `others` are the seconds of a row of the
    first 2 batches and of the other 18, which have 2 rows each.
    """
    clock = Clock()
    rows = SlowRows(clock, [first] * 4 + [others] * 36)
    loader = ResumableLoader(rows, ResumableBatchSampler(40, 2, seed=0, shuffle=False))
    loader.waited = 1000.0  # before this run
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        options = {"log_every_n_steps": 2, "max_epochs": 1, "limit_val_batches": 0}
        found = run(folder, Throughput(), clock=clock, data=Given(lambda: loader), **options)
    return found["throughput/data_wait"], [str(w.message) for w in said if "waits for data" in str(w.message)]


def test_the_time_that_training_waits_for_data(tmp_path: Path) -> None:
    shares, said = wait(tmp_path, 0.0, 0.5)
    assert shares == pytest.approx({2: 0.0} | dict.fromkeys(range(4, 21, 2), 1 / 3))
    assert len(said) == 1
    assert "waits for data in 33% of the time (the training process makes its batches itself): raise num_wo" in said[0]


class Behind:
    """A GPU that is done with its work some seconds after the host has given it."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.done = seconds, 0.0

    def record(self) -> None:
        self.done = throughput.time.perf_counter() + self.seconds

    def query(self) -> bool:
        return throughput.time.perf_counter() >= self.done


@pytest.mark.parametrize(("seconds", "share"), [(3.5, 0.0), (0.5, 1 / 3)])
def test_what_is_loaded_while_a_gpu_works_is_no_waiting(
    seconds: float, share: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch comes 1 second after the step before it, and begins 2 seconds later."""
    monkeypatch.setattr(throughput, "event_of", lambda device: Behind(seconds))
    shares, said = wait(tmp_path, 0.0, 0.5)
    assert shares == pytest.approx({2: 0.0} | dict.fromkeys(range(4, 21, 2), share))
    assert len(said) == (share > 0)


@pytest.mark.parametrize(
    ("first", "others", "shares"),
    [(0.1, 0.1, {2: 1 / 11, 20: 1 / 11}), (3.0, 0.0, {2: 12 / 16, 20: 0.0})],
    ids=["a short wait", "a slow start"],
)
def test_no_reason_to_warn(first: float, others: float, shares: dict[int, float], tmp_path: Path) -> None:
    found, said = wait(tmp_path, first, others)
    assert {step: found[step] for step in shares} == pytest.approx(shares)
    assert said == []


def test_a_loader_for_each_epoch(tmp_path: Path) -> None:
    """None of its seconds are those of the loader before it."""
    clock = Clock()

    def loader() -> ResumableLoader:
        rows = SlowRows(clock, [0.5] * 8)
        return ResumableLoader(rows, ResumableBatchSampler(8, 2, seed=0, shuffle=False))

    options = {"log_every_n_steps": 2, "max_epochs": 3, "limit_val_batches": 0}
    options |= {"reload_dataloaders_every_n_epochs": 1}
    found = run(tmp_path, Throughput(), clock=clock, data=Given(loader), **options)
    assert found["throughput/data_wait"] == pytest.approx(dict.fromkeys(range(2, 13, 2), 1 / 3))


def test_a_loader_of_another_kind_is_not_timed(tmp_path: Path) -> None:
    assert "throughput/data_wait" not in run(tmp_path, Throughput(), max_steps=4)
