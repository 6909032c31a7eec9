"""What every datamodule shares: loaders that resume the order of samples exactly."""

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.strategies import ParallelStrategy
from torch.utils.data import Dataset

from trunkline import TrunklineError
from trunkline.contract import DataFacts, EpochCut
from trunkline.datamodules.content_digest import SETTINGS, TOKENIZER_PART, plain_digest, plain_value, short_digest
from trunkline.datamodules.samplers import ResumableBatchSampler, ResumableLoader
from trunkline.datamodules.token_batches import TokenBatches
from trunkline.datamodules.workers import worker_start
from trunkline.ranges import check_ranges


def seed_generators(*parts: int) -> None:
    """Seed the global CPU generators of Python, numpy and torch, because augmentation libraries use all three."""
    words = np.random.SeedSequence(parts).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(words[1])
    torch.default_generator.manual_seed(int(words[2]))


@contextmanager
def preserved_generators() -> Iterator[None]:
    """Restore the global generators after the block, so that loading data in the main process changes nothing else.

    Use it around a batch, not around each sample: restoring numpy's generator takes 0.2 ms.
    """
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


NOT_SAMPLES = {"batch_size", "eval_batch_size", "num_workers", "cache_dir", "cache_waveforms", "max_skipped"}
"""Fields of datamodules that do not change the samples."""
TOKENIZER_FIELDS = {"tokenizer", "target_tokenizer"}
"""Fields that name a tokenizer, which is known by itself, wherever it comes from."""


@dataclass(kw_only=True, eq=False, repr=False)
class Loading:
    """How samples are loaded."""

    batch_size: int = 64
    """Samples per step, over all processes, so that a recipe means the same on any machine."""
    eval_batch_size: int | None = None
    """Samples per step in evaluation, over all processes; None uses `batch_size`."""
    num_workers: int | None = None
    """Processes that load data, for each training process. None chooses by what a sample costs: 0 for data in memory, 1
    if tokens are masked, and for files that are decoded the CPU cores per training process minus 1, at most 8."""
    seed: int = 0
    """Seed of the order of samples, the augmentation and the masking."""


@dataclass(kw_only=True, eq=False, repr=False)
class TrunklineDataModule(Loading, L.LightningDataModule):
    """Loaders for the datasets that a subclass puts into `datasets` in its `setup`.

    Subclasses are dataclasses, with `@dataclass(kw_only=True, eq=False, repr=False)`: each field is an argument, and
    holds the value from the recipe. Values derived from fields are properties. Code outside reads only `facts`.
    """

    def __post_init__(self) -> None:
        check_ranges("data", self, batch_size="[1, inf)", eval_batch_size="[1, inf)", num_workers="[0, inf)")
        check_ranges("data", self, seed="[0, inf)")
        L.LightningDataModule.__init__(self)
        self.datasets: dict[str, Dataset[Any]] = {}
        """Map-style datasets by split (train, val, test), indexed with `SampleKey`s. If a dataset has a method `order`,
        it shuffles each epoch of training with it (argument `order` of `ResumableBatchSampler`)."""
        self.cut: EpochCut | None = None
        self.moved: dict[int, int] = {}

    @property
    def facts(self) -> DataFacts:
        """What a network, an objective or a callback may need to know about this data."""
        return DataFacts()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint says about the data, as plain values; a subclass adds what is needed to use it without."""
        source = getattr(self, "source", None)  # a field of all but some of a user's own
        source = source if isinstance(source, str) else None
        rows = {split: len(self.datasets[split]) for split in ("train", "val", "test") if split in self.datasets}  # type: ignore[arg-type]
        return {"source": source, "rows": rows}

    def digest(self) -> str | None:
        """Short hexadecimal digest of what training reads, after `setup`; None if nothing is known about it.

        It is the same in all processes, and on all machines that have the same data, wherever the files are.
        """
        parts = self.digest_parts()
        return plain_digest(parts) if parts else None

    def digest_parts(self) -> dict[str, Any]:
        """What `digest` is made of, by name, as plain values: a digest of each split and of whatever else `data_key`
        names; `tokenizers`; and `settings`, the fields that change samples or their order.

        Empty if a datamodule has neither `datasets` nor a `data_key`.
        """
        if not self.datasets and not self._key:
            return {}
        tokenizers = [short_digest(text) for text in self._tokenizers()]
        left_out = NOT_SAMPLES | (TOKENIZER_FIELDS if tokenizers else set())
        names = [part.name for part in fields(self) if part.name not in left_out]
        settings = {name: plain_value(getattr(self, name)) for name in names}
        sizes = {split: len(rows) for split, rows in self.datasets.items()}  # type: ignore[arg-type]
        parts = {name: plain_digest([sizes.get(name), self._key.get(name)]) for name in {**self._key, **sizes}}
        return {**parts, TOKENIZER_PART: tokenizers, SETTINGS: settings}

    def data_key(self) -> dict[str, Any] | list[Any]:
        """What else tells this data from other data, as plain values that are found without reading all of it, such as
        `sampled_digest` of each split; without the folder in which the data is.

        Returns:
            the values of each split, and others under names of their own, but not `settings` or `tokenizers`. A list
            has the name `data`.
        """
        return {}

    @cached_property
    def _key(self) -> dict[str, Any]:
        """`data_key`, found once: the processes compare it before a run, and the run's record holds it."""
        found = self.data_key()
        key = found if isinstance(found, dict) else {"data": found} if found else {}
        for name in (SETTINGS, TOKENIZER_PART):
            if name in key:
                raise TrunklineError(
                    f"{type(self).__name__}.data_key returns values named {name!r}, a name that the digest of the data "
                    "has itself; give them another name"
                )
        return key

    def compare_tokenizers(self) -> None:
        """Check that all processes of a training have the same tokenizers. All of them must call this, in `setup`.

        Each machine with a cache folder of its own learns its own tokenizer, perhaps from other texts.

        Raises:
            TrunklineError: in all processes, if one differs; names it.
        """
        if self.trainer is None or self.trainer.world_size == 1:
            return
        own = list(short_digest("".join(self._tokenizers())).encode())
        strategy = self.trainer.strategy
        everyone = strategy.all_gather(torch.tensor(own, device=strategy.root_device)).tolist()
        other = next((rank for rank, digest in enumerate(everyone) if digest != everyone[0]), None)
        if other is not None:
            raise TrunklineError(
                f"process {other} has another tokenizer than process 0, so that the same token would mean different "
                "words; let all machines share the folder cache_dir and the data, or give all the same tokenizer.json "
                "as tokenizer",
                "data.tokenizer",
            )

    def _tokenizers(self) -> list[str]:
        facts = self.facts
        return [tokenizer.to_str() for tokenizer in (facts.tokenizer, facts.target_tokenizer) if tokenizer is not None]

    @property
    def in_memory(self) -> bool:
        """Whether reading a sample costs less than sending it between processes."""
        return False

    @property
    def most_workers(self) -> int:
        """Largest number of processes that is chosen: 0 if they would cost more than they save, 1 if all that is needed
        is that a batch is made while the last one is trained on, many if a sample is expensive.
        """
        return 0 if self.in_memory else 8

    @property
    def limits_tokens(self) -> bool:
        """Whether something else than `batch_size` limits the batches of training."""
        return False

    def train_dataloader(self) -> ResumableLoader:
        """Shuffled full batches, from the position of the trainer's counters on."""
        return self.loader("train", train=True)

    def val_dataloader(self) -> ResumableLoader | list[Any]:
        """Every validation sample once."""
        return self.loader("val") if "val" in self.datasets else []

    def test_dataloader(self) -> ResumableLoader | list[Any]:
        """Every test sample once."""
        return self.loader("test") if "test" in self.datasets else []

    def loader(self, split: str, train: bool = False) -> ResumableLoader:
        """The loader of one split for this process."""
        dataset, sampler = self.datasets[split], self.sampler(split, train)
        if train:
            self.cut = sampler.cut
        workers = self.worker_count()
        return ResumableLoader(
            dataset,
            sampler,
            position=self.position if train and self.trainer else None,
            num_workers=workers,
            pin_memory=self.on_gpu(),  # then Lightning's copy to the device does not make the host wait
            persistent_workers=workers > 0,
            worker_init_fn=worker_start(),
        )

    def sampler(self, split: str, train: bool = False) -> ResumableBatchSampler:
        """The order of one split for this process."""
        dataset, (rank, processes) = self.datasets[split], self.share(train)
        # Processes that train on the same samples evaluate different ones, and may be more than the samples of a batch.
        evaluated = self.eval_batch_size or -(-self.batch_size // processes) * processes
        return ResumableBatchSampler(
            len(dataset),  # type: ignore[arg-type]
            self.batch_size if train else evaluated,
            seed=self.seed,
            shuffle=train,
            drop_last=train,
            rank=rank,
            world_size=processes,
            order=getattr(dataset, "order", None),
            batches=self.token_batches(split),
            moved=self.moved if train else None,
        )

    def share(self, train: bool = False) -> tuple[int, int]:
        """Which share of the samples this process has, and how many shares there are."""
        if self.trainer is None:
            return 0, 1
        # Fewer than processes where some of them share the computation of the same samples.
        shares = self.trainer.distributed_sampler_kwargs if train else None
        if shares is None:
            return self.trainer.global_rank, self.trainer.world_size
        return shares["rank"], shares["num_replicas"]

    def train_cut(self) -> EpochCut:
        """How an epoch of training is cut into batches, after `setup`."""
        return self.cut or self.sampler("train", train=True).cut

    def move_batches(self, epoch: int, samples: int) -> None:
        """Let all batches of an epoch of training begin this number of samples later: see `CutsEpochs`."""
        self.moved.clear()
        self.moved[epoch] = samples

    def token_batches(self, split: str) -> TokenBatches | None:
        """Batches of a split that are limited by tokens; None for `batch_size` rows."""
        return None

    def position(self) -> tuple[int, int]:
        """(epoch, number of its batches that are already trained on), from the trainer's counters."""
        assert self.trainer is not None
        loop = self.trainer.fit_loop
        epoch = loop.epoch_progress.current.processed  # type: ignore[attr-defined]  # Lightning declares its base class
        return epoch, loop.epoch_loop.batch_progress.current.ready

    def worker_count(self) -> int:
        """`num_workers`, or if it is None a number that suits this machine and its training processes."""
        if self.num_workers is not None:
            return self.num_workers
        return min(max(self.core_count() - 1, 1), self.most_workers)

    def on_gpu(self) -> bool:
        """Whether batches go to a CUDA device."""
        if self.trainer is None:
            return torch.cuda.is_available()
        return self.trainer.strategy.root_device.type == "cuda"

    def core_count(self) -> int:
        """CPU cores for each training process on this machine.

        SLURM gives each task its own cores. The processes that Lightning or torchrun starts share theirs.
        """
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        sharing = self.trainer.num_devices if self.trainer else 1
        if self.trainer and sharing > 1 and under_slurm(self.trainer):
            if asked := os.environ.get("SLURM_CPUS_PER_TASK"):
                return min(cores, int(asked))
            of_job = int(os.environ.get("SLURM_CPUS_ON_NODE") or os.cpu_count() or 1)
            if cores < of_job:  # else this SLURM binds no task to its cores
                return cores
        return cores // sharing


def under_slurm(trainer: L.Trainer) -> bool:
    """Whether SLURM has started each of the processes that train together."""
    strategy = trainer.strategy
    return isinstance(strategy, ParallelStrategy) and isinstance(strategy.cluster_environment, SLURMEnvironment)
