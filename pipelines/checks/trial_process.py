"""A process of a trial: `trunkline fit` for a few steps, with an observer."""

import dataclasses
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins import ClusterEnvironment
from lightning.pytorch.callbacks import Callback, WeightAveraging
from torch import nn
from torch.utils.data import DataLoader, Sampler

from trunkline import TrunklineError
from trunkline.datamodules.samplers import ResumableBatchSampler, ResumableLoader, SampleKey
from trunkline.modules.training.exact_resume import accumulates
from trunkline.modules.training.sharding import group_size
from trunkline.pipelines.checks.trial import Trial
from trunkline.pipelines.errors import from_outside, own_error
from trunkline.pipelines.quiet import quieten
from trunkline.pipelines.training import TrainingCLI

RANDOM_MIXING = ("mixup", "cutmix")
"""Arguments of objectives that mix the rows of a batch by chance."""
SMOOTHING = "label_smoothing"
"""The argument that keeps a loss above zero, however well the rows are known."""
RESTING = {
    "max_epochs": -1,
    "min_epochs": None,
    "min_steps": None,
    "max_time": None,
    "fast_dev_run": False,
    "overfit_batches": 0.0,
    "num_sanity_val_steps": 0,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_nodes": 1,
    "logger": None,
    "profiler": None,
}
"""Options of the trainer in every trial."""
NO_VALIDATION = {
    "limit_val_batches": 0,
    "limit_train_batches": 1.0,
    "val_check_interval": 1.0,
    "check_val_every_n_epoch": 1,
    "gradient_clip_val": None,
    "enable_checkpointing": False,
    "logger": False,
}
"""More of them, for a trial without the recipe's callbacks."""
WARMUP_STEPS = 10
"""Of a trial that repeats one batch."""
IDLE_BATCHES = 100
"""Batches in which there must be an optimiser step; so many times more if gradients are accumulated."""
NO_LOSS = (
    "the loss was not compared, because no step told it: leave `training_step` to TrunklineModule, and let `loss` "
    "return Loss(total, count) or a list of such terms"
)


class TrialObserver(Callback):
    """Looks on at a trial, and keeps what it has seen in `result`, which holds only plain data and tensors."""

    def __init__(self) -> None:
        self.result: dict[str, Any] = {}
        self.folder = Path()
        """Of the trial's files."""
        self.seen: list[Any] = []
        """Rows of the accumulation so far."""
        self.idle: tuple[int, int] = (0, 0)
        """The optimiser step, and the batches since then."""

    def after_step(self, trainer: L.Trainer, module: Any, rows: list[Any]) -> None:
        """Called after each optimiser step, with the rows of this process in it, by number."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.refuse_idleness(trainer)
        self.seen += row_numbers(batch)
        if not accumulates(trainer):
            rows, self.seen = self.seen, []
            self.after_step(trainer, pl_module, rows)

    def refuse_idleness(self, trainer: Any) -> None:
        """A trial ends after a number of optimiser steps; without them it would go on for ever.

        Raises:
            TrunklineError: if there was none in many batches.
        """
        step, batches = self.idle
        self.idle = (step, batches + 1) if step == trainer.global_step else (trainer.global_step, 0)
        most = IDLE_BATCHES * trainer.accumulate_grad_batches
        if self.idle[1] >= most:
            raise TrunklineError(
                f"no optimiser step in {most} batches: where `automatic_optimization` is false, `training_step` must "
                "make it (`self.optimizers().step()`)"
            )

    def hold(self, trainer: L.Trainer) -> None:
        """Say that this process is where it is to be killed, and wait for that."""
        (self.folder / f"held{trainer.global_rank}").touch()
        parent = multiprocessing.parent_process()
        while parent is not None and parent.is_alive():
            time.sleep(0.1)
        os._exit(1)  # nobody is left who would kill it


def trained_loss(module: L.LightningModule) -> float | None:
    """The loss that this process trained in the last step, of all terms whatever their names; None if not known."""
    loss = getattr(module, "trained_loss", None)
    return None if loss is None else float(loss)


def row_numbers(batch: Any) -> list[Any]:
    """Numbers of a batch's rows that are counted; sums of their content if the batch does not tell numbers."""
    index = batch.get("index") if isinstance(batch, dict) else None
    if isinstance(index, torch.Tensor):
        valid = batch.get("valid")
        found: list[Any] = (index if valid is None else index[valid]).tolist()
        return found
    values = batch.values() if isinstance(batch, dict) else batch if isinstance(batch, (list, tuple)) else [batch]
    first = next((value for value in values if isinstance(value, torch.Tensor) and value.dim() > 0), None)
    return [] if first is None else first.double().reshape(len(first), -1).sum(dim=1).tolist()


class SmallBatches(Sampler[list[SampleKey]]):
    """The batches of a sampler, each cut to its first rows and then into equal parts.

    Part n has every `parts`-th row from row n on, as process n of as many processes would have.

    Args:
        sampler: of one process.
        rows: most rows of a batch of this process.
        parts: number of parts of each batch; fillers make them equally long.
    """

    def __init__(self, sampler: ResumableBatchSampler, rows: int, parts: int) -> None:
        self.whole, self.rows, self.parts = sampler, rows, parts

    @property
    def sampler(self) -> ResumableBatchSampler:
        """Where Lightning sets the epoch."""
        return self.whole

    def __len__(self) -> int:
        return len(self.whole) * self.parts

    def __iter__(self) -> Iterator[list[SampleKey]]:
        for keys in self.whole:
            kept = keys[: self.rows]
            kept += [kept[0]._replace(valid=False)] * (-len(kept) % self.parts)
            yield from (kept[part :: self.parts] for part in range(self.parts))


class Repeated(torch.utils.data.Dataset[Any]):
    """One batch, many times."""

    def __init__(self, batch: Any, count: int) -> None:
        self.batch, self.count = batch, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        if index >= self.count:
            raise IndexError
        return self.batch


class TrialCLI(TrainingCLI):
    """`trunkline fit` for a few steps, without its test, its table and whatever the trial switches off."""

    def __init__(self, trial: Trial, arguments: list[str], recipe: str | None, folder: Path) -> None:
        self.trial, self.folder = trial, folder
        super().__init__(arguments, recipe)

    def before_instantiate_classes(self) -> None:
        config, trial = self.config[self.subcommand], self.trial
        trainer = config.trainer
        options: dict[str, Any] = {**RESTING, "max_steps": trial.steps, "devices": trial.processes}
        if trial.callbacks != "all":
            options |= NO_VALIDATION
        elif trainer.get("limit_val_batches") is None:
            options["limit_val_batches"] = 1
        if trial.epoch is not None:
            options |= short_epochs(trainer, trial.epoch)
        if trial.parts is not None:
            options["accumulate_grad_batches"] = trial.parts
        if trial.precision is not None:
            options["precision"] = trial.precision
            config.compile = False
        strategy = trainer.get("strategy")
        alone = trial.processes == 1
        own = strategy not in (None, "auto") and not (isinstance(strategy, str) and not portable(strategy))
        options["strategy"] = "auto" if alone else strategy if own else "ddp"
        for name, value in options.items():
            trainer[name] = value
        if trial.still:
            given = config.model.get("init_args") or {}
            for name in (*RANDOM_MIXING, *([SMOOTHING] if trial.one_batch else [])):
                if given.get(name):
                    given[name] = 0.0
        config.run_dir, config.name, config.resume = str(self.folder / "runs"), "check", trial.resume
        config.test_with = "none"
        super().before_instantiate_classes()

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        config = self._get(self.config_init, "trainer")
        callbacks = config.get("callbacks") or []
        if self.trial.callbacks != "all":
            averaged = self.trial.callbacks == "average"
            callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
            config["callbacks"] = [c for c in callbacks if averaged and isinstance(c, WeightAveraging)]
        plugins = config.get("plugins") or []
        plugins = plugins if isinstance(plugins, list) else [plugins]
        config["plugins"] = [p for p in plugins if not isinstance(p, ClusterEnvironment)]  # the trial's is another
        trainer = super().instantiate_trainer(**kwargs)
        observer = self.trial.observer
        observer.folder = self.folder
        trainer.callbacks.append(observer)  # type: ignore[attr-defined]  # last, so that it sees the others' work
        return trainer

    def fit(self, **kwargs: Any) -> None:
        """Train for the trial's steps."""
        trial, data = self.trial, self.datamodule
        if trial.still:
            data.num_workers = 0
            self.trainer.callbacks.append(Still())  # type: ignore[attr-defined]
        if trial.one_batch:
            steady = {"schedule": "constant", "warmup": float(WARMUP_STEPS)}
            self.model.optimizer_config = dataclasses.replace(self.model.optimizer_config, **steady)
        if trial.rows is not None:
            data.train_dataloader = self.small_loader(data.train_dataloader)
        checkpoint = self.checkpoint
        self.trainer.fit(**{**kwargs, "ckpt_path": None if checkpoint is None else str(checkpoint)}, weights_only=True)

    def small_loader(self, make: Callable[[], Any]) -> Callable[[], Any]:
        """What `train_dataloader` returns instead: a loader of the trial's small batches."""
        trial, data = self.trial, self.datamodule
        assert trial.rows is not None
        rows = max(trial.rows * group_size(self.trainer) // trial.processes, 1)
        parts = trial.parts or 1

        def train_dataloader() -> Any:
            loader = make()
            if isinstance(loader, ResumableLoader):
                sampler: Any = SmallBatches(loader.batch_sampler, rows, parts)  # type: ignore[arg-type]
                loader = DataLoader(loader.dataset, batch_sampler=sampler, collate_fn=loader.collate_fn)
            elif parts > 1:  # a loader of the user's own
                data.batch_size = max(data.batch_size // parts, 1)
                loader = make()
            if trial.one_batch:
                loader = DataLoader(Repeated(next(iter(loader)), trial.steps * parts), batch_size=None)
            return loader

        return train_dataloader


BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
"""Layers through which a row's output depends on the other rows of its batch, in training mode only."""


def batch_norms(module: nn.Module) -> dict[str, nn.Module]:
    """Those layers that are in training mode, by name; others may be frozen."""
    return {name: part for name, part in module.named_modules() if isinstance(part, BATCH_NORMS) and part.training}


class Still(Callback):
    """Switches off what is random in a step, by evaluation mode. Statistics of the batch are not random: they stay."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        norms = batch_norms(pl_module)
        pl_module.eval()
        for norm in norms.values():
            norm.train()


def short_epochs(trainer: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """Options of a trainer for epochs of at most so many optimiser steps.

    A validation within an epoch, or after more batches, comes at the end of each, where schedules and callbacks read.
    """
    batches, limit = steps * (trainer.get("accumulate_grad_batches") or 1), trainer.get("limit_train_batches")
    options: dict[str, Any] = {"limit_train_batches": min(batches, limit) if isinstance(limit, int) else batches}
    if trainer.get("val_check_interval") is not None:
        options |= {"val_check_interval": 1.0, "check_val_every_n_epoch": 1}
    return options


def portable(strategy: str) -> bool:
    """Whether a strategy works with processes that it has not started."""
    return not any(word in strategy for word in ("spawn", "fork", "notebook"))


def run_rank(
    trial: Trial,
    arguments: list[str],
    recipe: str | None,
    folder: Path,
    rank: int,
    *,
    environ: dict[str, str],
    cwd: str,
) -> None:
    """One process of a trial. It writes `result<rank>.pt`, or `error<rank>.pt`, and all that it prints to a log."""
    if hasattr(os, "setsid"):
        os.setsid()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environ)
    log = os.open(folder / f"log{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    multiprocessing.set_start_method(None, force=True)  # that of an ordinary process, for those that load data
    if cwd not in sys.path:  # for classes of the user's own, beside their config
        sys.path.append(cwd)
    sys.argv = ["trunkline", *arguments]
    quieten()
    try:
        TrialCLI(trial, list(arguments), recipe, folder)
    except Exception as error:
        own = own_error(error) or from_outside(error)
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        found = {"message": reason if own is None else str(own), "field": getattr(own, "field", None)}
        torch.save({**found, "own": own is not None}, folder / f"error{rank}.pt")
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1 if own is None else 2)  # at once, also if other processes wait for this one in a collective
    torch.save(trial.observer.result, folder / f"result{rank}.pt")
