"""One process of `trunkline benchmark --what ddp`."""

import logging
import os
import warnings
from datetime import timedelta
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader

from trunkline.modules.callbacks import GracefulStop, Throughput
from trunkline.modules.networks import ViTConfig
from trunkline.modules.objectives.image_classifier import ImageClassifier
from trunkline.modules.training.optim import OptimizerConfig
from trunkline.pipelines.benchmarks.image_cases import StepClock

WARMUP = 2
"""Steps before those that are measured: DDP settles its buckets in the first."""


class CommonStart(StepClock):
    """Begins to measure when all processes have done the first steps."""

    def __init__(self, steps: int, warmup: int, start: Any) -> None:
        super().__init__(steps, warmup)
        self.barrier = start

    def on_train_batch_end(self, trainer: L.Trainer, *others: Any) -> None:
        if trainer.global_step == self.warmup:
            self.barrier.wait()
        super().on_train_batch_end(trainer, *others)


def train_in_process(
    rank: int,
    processes: int,
    strategy: dict[str, Any] | None,
    port: int,
    batch_size: int,
    steps: int,
    start: Any,
    results: Any,
    folder: str,
) -> None:
    """Train, and put the seconds per step into `results`.

    Args:
        rank: number of this process.
        processes: number of all of them.
        strategy: options of Lightning's DDPStrategy; None trains a network of one's own.
        port: of the first process.
        batch_size: images in each step.
        steps: number of steps that are measured.
        start: a barrier at which the processes meet before the measured steps.
        results: a queue.
        folder: for what a trainer writes.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    options: dict[str, Any] = {"devices": 1}
    if strategy is not None:
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "TORCHELASTIC_RUN_ID": "benchmark"}
        ranks |= {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        os.environ |= {name: str(value) for name, value in ranks.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        hours, minutes, seconds = map(int, strategy["timeout"].split(":"))
        timeout = timedelta(hours=hours, minutes=minutes, seconds=seconds)
        options = {"devices": processes, "strategy": DDPStrategy(**{**strategy, "timeout": timeout})}
    module = ImageClassifier(ViTConfig(), optimizer=OptimizerConfig(schedule="constant", warmup=0))
    batch = {"image": torch.randn(batch_size, 3, 224, 224), "label": torch.randint(0, 1000, (batch_size,))}
    clock = CommonStart(steps, WARMUP, start)
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=steps + WARMUP,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        use_distributed_sampler=False,
        logger=False,
        default_root_dir=folder,
        callbacks=[Throughput(), GracefulStop(), clock],
        **options,
    )
    data: Any = DataLoader([batch] * (steps + WARMUP), batch_size=None)  # type: ignore[arg-type]
    trainer.fit(module, data)
    results.put(clock.seconds / steps)
