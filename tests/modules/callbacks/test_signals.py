"""Signals: the step after which a run ends, what is saved, the exit code, and the job that goes back into the queue."""

import os
import random
import signal
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging
from lightning.pytorch.plugins.environments import SLURMEnvironment
from signalled_run import LAST, Pair
from tiny import batches, classifier, trainer
from torch.utils.data import DataLoader

from trunkline.datamodules import ImageData
from trunkline.modules.callbacks.graceful_stop import GracefulStop, Stopped
from trunkline.modules.training import slurm
from trunkline.modules.training.checkpoints import SafeCheckpointIO
from trunkline.modules.training.exact_resume import take_signals

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
CODES = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGUSR1: 138}


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Signals that no handler takes must not end the tests."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def outside_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("SLURM"):
            monkeypatch.delenv(name)


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A job of SLURM; the file gets what `scontrol` was called with. If REFUSE is set, it refuses."""
    folder = tmp_path / "bin"
    folder.mkdir()
    script = folder / "scontrol"
    script.write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n[ -z "$REFUSE" ] || {{ echo "$REFUSE" >&2; exit 1; }}\n'
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    return tmp_path / "calls"


class Signal(Callback):
    """Sends signals to this process when a hook is reached at a step."""

    def __init__(self, hook: str, step: int, *numbers: int) -> None:
        self.step, self.numbers = step, list(numbers)
        self.sent_at: int | None = None
        setattr(self, hook, self.send)

    def send(self, trainer: L.Trainer, *_: Any, **__: Any) -> None:
        if trainer.global_step == self.step and self.numbers:
            numbers, self.numbers, self.sent_at = self.numbers, [], trainer.global_step
            for number in numbers:
                os.kill(os.getpid(), number)


def fit(folder: Path, *callbacks: Callback, model: Any = None, checkpoint: Path | None = None, **options: Any) -> Any:
    rows = [{**batch, "valid": torch.ones(4, dtype=torch.bool)} for batch in batches(12)]
    loader, validation = (DataLoader(data, batch_size=None) for data in (rows, rows[:3]))  # type: ignore[arg-type]
    settings = {"max_epochs": 1, "plugins": [SafeCheckpointIO()], "num_sanity_val_steps": 0, **options}
    fitted = trainer(folder, callbacks=list(callbacks), **settings)
    fitted.fit(model or classifier(), loader, validation, ckpt_path=checkpoint, weights_only=True)
    return fitted


def saved(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(folder / LAST, weights_only=True)
    return found


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_after_backward", "on_before_zero_grad"])
def test_the_step_is_finished_and_saved(hook: str, number: signal.Signals, tmp_path: Path) -> None:
    with pytest.raises(Stopped) as stop:
        fit(tmp_path, GracefulStop(), Signal(hook, 4, number))
    assert stop.value.code == CODES[number]
    assert saved(tmp_path)["global_step"] == 5


def test_an_accumulation_is_finished(tmp_path: Path) -> None:
    """A checkpoint cannot hold its gradients."""
    with pytest.raises(Stopped):
        fit(tmp_path, GracefulStop(), Signal("on_train_batch_start", 1, signal.SIGTERM), accumulate_grad_batches=3)
    state = saved(tmp_path)
    assert state["global_step"] == 2
    assert state["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]["ready"] == 6


@pytest.mark.parametrize("hook", ["on_sanity_check_start", "setup"])
def test_before_the_first_step_nothing_is_saved(hook: str, tmp_path: Path) -> None:
    with pytest.raises(Stopped) as stop:
        fit(tmp_path, GracefulStop(), Signal(hook, 0, signal.SIGTERM), num_sanity_val_steps=1)
    assert stop.value.code == 143
    assert not (tmp_path / LAST).exists()


def test_a_signal_while_data_is_prepared(tmp_path: Path) -> None:
    callback, fitted = GracefulStop(), trainer(tmp_path)
    callback.listen(fitted)
    with pytest.raises(Stopped) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
    assert stop.value.code == 143
    callback.stop_listening()
    assert all(signal.getsignal(number) is signal.default_int_handler for number in SIGNALS)


def test_in_a_test_there_is_nothing_to_save(tmp_path: Path) -> None:
    rows = [{**batch, "valid": torch.ones(4, dtype=torch.bool)} for batch in batches(3)]
    fitted = trainer(tmp_path, callbacks=[GracefulStop(), Signal("on_test_batch_end", 0, signal.SIGTERM)])
    with pytest.raises(Stopped) as stop:
        fitted.test(classifier(), DataLoader(rows, batch_size=None), verbose=False)  # type: ignore[arg-type]
    assert stop.value.code == 143


class Loss(Callback):
    """The result of each validation."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, float]] = []

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.seen.append((trainer.global_step, float(trainer.callback_metrics["val/loss"])))


@pytest.mark.parametrize(("interval", "step"), [(4, 4), (1.0, 10)], ids=["within an epoch", "at its end"])
def test_in_a_validation_the_step_before_it_is_saved(interval: float, step: int, tmp_path: Path) -> None:
    """Not the averaged weights that it evaluates; the resumed run repeats the validation, and equals a whole one."""

    def train(*callbacks: Callback, checkpoint: Path | None = None) -> tuple[Loss, dict[str, torch.Tensor]]:
        data = ImageData(image_size=8, channels=1, batch_size=96, eval_batch_size=60, val_fraction=0.2, num_workers=0)
        loss, model = Loss(), classifier()
        options: dict[str, Any] = {"max_epochs": 2, "val_check_interval": interval, "plugins": [SafeCheckpointIO()]}
        options |= {"num_sanity_val_steps": 0, "limit_train_batches": 10}
        own = [EMAWeightAveraging(decay=0.5), loss, GracefulStop(), *callbacks]
        fitted = trainer(tmp_path, callbacks=own, **options)
        try:
            fitted.fit(model, datamodule=data, ckpt_path=checkpoint, weights_only=True)
            ended = (None, fitted.global_step)
        except Stopped as stop:
            ended = (stop.code, fitted.global_step)
        assert ended == ((143, step) if callbacks else (None, 20))
        assert bool(loss.seen) == (not callbacks)
        return loss, dict(model.network.state_dict())

    whole = train()
    train(Signal("on_validation_batch_start", step, signal.SIGTERM))
    assert saved(tmp_path)["global_step"] == step
    resumed = train(checkpoint=tmp_path / LAST)
    assert len(whole[0].seen) > 1
    assert resumed[0].seen == whole[0].seen
    assert all(torch.equal(resumed[1][name], value) for name, value in whole[1].items())


def test_the_second_ctrl_c_ends_at_once(tmp_path: Path) -> None:
    with pytest.raises(Stopped) as stop:
        fit(tmp_path, GracefulStop(), Signal("on_after_backward", 4, signal.SIGINT, signal.SIGINT))
    assert stop.value.code == 130
    assert not (tmp_path / LAST).exists()


def test_a_scheduler_may_ask_several_times(tmp_path: Path) -> None:
    """It sends SIGUSR1 ahead of the time limit and SIGTERM at it; the first one's requeue counts."""
    numbers = (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM)
    with pytest.raises(Stopped) as stop:
        fit(tmp_path, GracefulStop(), Signal("on_after_backward", 4, *numbers))
    assert stop.value.code == 138
    assert saved(tmp_path)["global_step"] == 5
    assert all(signal.getsignal(number) is signal.SIG_IGN for number in SIGNALS)  # while it ends


def test_an_ended_run_gives_the_handlers_back(tmp_path: Path) -> None:
    callback = GracefulStop()
    fit(tmp_path, callback)
    assert callback.previous == {}
    assert all(signal.getsignal(number) is signal.default_int_handler for number in SIGNALS)


# --- SLURM


@pytest.mark.parametrize(
    ("environment", "job"),
    [({}, "17"), ({"SLURM_ARRAY_JOB_ID": "16", "SLURM_ARRAY_TASK_ID": "3"}, "16_3")],
    ids=["job", "array"],
)
def test_sigusr1_requeues_the_job_after_saving(
    environment: dict[str, str], job: str, scontrol: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    fault = counted_as_fault(tmp_path, monkeypatch)
    with pytest.raises(Stopped) as stop:
        fit(tmp_path, GracefulStop(), Signal("on_after_backward", 4, signal.SIGUSR1))
    assert stop.value.code == 138
    assert saved(tmp_path)["global_step"] == 5
    assert scontrol.read_text() == f"requeue {job}\n"
    assert not fault.exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_other_signals_do_not(
    number: signal.Signals, scontrol: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault = counted_as_fault(tmp_path, monkeypatch)
    with pytest.raises(Stopped):
        fit(tmp_path, GracefulStop(), Signal("on_after_backward", 4, number))
    assert not scontrol.exists()
    assert not fault.exists()


def counted_as_fault(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file by which a job's script counts this attempt as a fault."""
    file = folder / "fault"
    file.touch()
    monkeypatch.setenv("TRUNKLINE_FAULT", str(file))
    return file


def test_a_time_limit_before_the_first_step_counts_as_a_fault(
    scontrol: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would come back for ever. So would a fault of another process, after which srun sends this one a SIGTERM."""
    fault = counted_as_fault(tmp_path, monkeypatch)
    with pytest.raises(Stopped):
        fit(tmp_path, GracefulStop(), Signal("on_sanity_check_start", 0, signal.SIGUSR1), num_sanity_val_steps=1)
    assert scontrol.exists()
    assert fault.exists()


def test_what_scontrol_answers_is_said(scontrol: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert slurm.requeue("17") == "requeued job 17"
    monkeypatch.setenv("REFUSE", "Requested operation is presently disabled")
    want = "SLURM does not requeue job 17 (Requested operation is presently disabled); submit it again"
    assert slurm.requeue("17") == want
    monkeypatch.setenv("PATH", "")
    assert slurm.requeue("17").startswith("SLURM does not requeue job 17 (")
    assert slurm.slurm_job() == "17"
    monkeypatch.delenv("SLURM_JOB_ID")
    assert slurm.slurm_job() is None


def test_lightnings_own_requeue_never_acts(tmp_path: Path, scontrol: Path) -> None:
    """Also where the environment is the one that Lightning chooses by itself, which requeues."""
    environment = type("Alone", (SLURMEnvironment,), {"world_size": lambda self: 1, "global_rank": lambda self: 0})()
    assert environment.auto_requeue
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)  # Lightning leaves a handler that is there already
    seen: list[Any] = []

    class Look(Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
            seen.append(signal.getsignal(signal.SIGUSR1))

    for callbacks, taken in (((GracefulStop(), Look()), False), ((Look(),), True), ((Look(),), False)):
        fitted = trainer(tmp_path, callbacks=list(callbacks), max_steps=1)
        fitted._accelerator_connector.cluster_environment = environment
        if taken:
            take_signals(fitted)  # as the command line does
        fitted.fit(classifier(), DataLoader(batches(1), batch_size=None))  # type: ignore[arg-type]
    assert getattr(seen[0], "__func__", None) is GracefulStop._receive
    assert seen[1] is signal.SIG_DFL
    assert type(seen[2]).__name__ == "_HandlersCompose"  # what Lightning does if it is let


def test_a_left_over_checkpoint_of_lightnings_requeue_does_not_win(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SLURMEnvironment, "detect", staticmethod(lambda: True))
    model = classifier()
    fitted = trainer(tmp_path, max_steps=2)
    monkeypatch.setattr(fitted._accelerator_connector, "cluster_environment", None, raising=False)
    fitted.fit(model, DataLoader(batches(2), batch_size=None))  # type: ignore[arg-type]
    fitted.save_checkpoint(tmp_path / "hpc_ckpt_1.ckpt")
    for taken, steps in ((False, 0), (True, 3)):  # Lightning alone takes it, and has nothing left to do
        fitted = trainer(tmp_path, max_steps=3 if taken else 2)
        if taken:
            take_signals(fitted)
        started: list[int] = []
        start = type("Start", (Callback,), {"on_train_start": lambda self, t, m: started.append(t.global_step)})()  # noqa: B023
        fitted.callbacks.append(start)  # type: ignore[attr-defined]
        fitted.fit(model, DataLoader(batches(3), batch_size=None))  # type: ignore[arg-type]
        assert started == ([0] if taken else [])
        assert fitted.global_step == (steps or 2)


# --- several processes


def send_at_random(tmp_path: Path, count: int, seconds: float) -> None:
    """In a tight loop of two processes, to either or both: both end after the same step, soon, and with 143.

    Before that they train with validations of different length: they agree only in the batches that both have.
    """
    chance, pair = random.Random(0), Pair(tmp_path)
    try:
        pair.start(6, uneven=True)
        assert [(ending.code, ending.step) for ending in pair.endings()] == [(0, 6), (0, 6)]
        for _ in range(count):
            ranks = chance.choice([[0], [1], [0, 1]])
            endings = pair.run(chance.randint(1, 8), ranks, chance.uniform(0, 0.02))
            assert [ending.code for ending in endings] == [143, 143]
            assert endings[0].step == endings[1].step == saved(tmp_path)["global_step"]
            for rank in ranks:
                received = endings[rank].received_at
                assert received is not None
                assert endings[rank].step - received <= 2  # the step that was running, and one more
                assert endings[rank].seconds < seconds
    finally:
        pair.end()


def test_signals_at_random_times(tmp_path: Path) -> None:
    send_at_random(tmp_path, 4, 60)


@pytest.mark.slow
def test_fifty_signals_at_random_times(tmp_path: Path) -> None:
    send_at_random(tmp_path, 50, 5)
