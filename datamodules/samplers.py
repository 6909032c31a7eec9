"""The order of samples: a pure function of (seed, epoch), resumable at any batch on any number of processes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import DataLoader, Dataset

from trunkline import TrunklineError

FIELD_NOTE = "field: "
"""Begins the note of a worker's error that names its field."""


class SampleKey(NamedTuple):
    """What a dataset is asked for. Augmentation and the like may depend on (seed, epoch, index) alone."""

    epoch: int
    index: int  # type: ignore[assignment]  # hides tuple.index
    valid: bool = True
    """False for a filler that makes all processes' shares equally long; never counted in a metric."""


class ResumableBatchSampler:
    """Batches of `SampleKey`s for one process.

    An epoch's order depends on (seed, epoch) only. It is cut into global batches, and each process takes
    every `world_size`-th sample of a global batch: the same samples make up step n on any number of
    processes. Starting at batch n costs nothing, because nothing before it is read.

    Args:
        length: number of samples in the dataset.
        batch_size: samples in a global batch, over all processes.
        seed: of the order.
        shuffle: whether epochs are permuted.
        drop_last: leave out a last batch that is not full. Else it is ragged, and fillers with
            `valid=False` give each process the same number of samples.
        rank: this process.
        world_size: number of processes.
        order: makes the (length,) row numbers of an epoch from its generator; None is a permutation. Files that are
            best read in one go need another.

    Raises:
        TrunklineError: if the batch cannot be shared equally, or not one batch is full.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = False,
        drop_last: bool = False,
        rank: int = 0,
        world_size: int = 1,
        order: Callable[[np.random.Generator], np.ndarray] | None = None,
    ) -> None:
        if batch_size < 1 or batch_size % world_size:
            raise TrunklineError(
                f"batch_size={batch_size} (over all processes) cannot be shared by {world_size} process(es); "
                f"set batch_size and eval_batch_size to multiples of {world_size}",
                field="data.batch_size" if drop_last else "data.eval_batch_size",
            )
        if drop_last and length < batch_size:
            raise TrunklineError(
                f"batch_size={batch_size} is larger than the training data ({length} samples), so that not one "
                f"batch is full; set batch_size to at most {length}",
                field="data.batch_size",
            )
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.shuffle, self.drop_last, self.rank, self.world_size = shuffle, drop_last, rank, world_size
        self.order = order
        self.epoch = self.start = 0

    @property
    def sampler(self) -> "ResumableBatchSampler":
        """Itself: Lightning looks for `set_epoch` at `batch_sampler.sampler`."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration runs through."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Batches of a whole epoch, wherever the next iteration starts."""
        return self.length // self.batch_size if self.drop_last else -(-self.length // self.batch_size)

    def __iter__(self) -> Iterator[list[SampleKey]]:
        """Batches of this process from number `start` on; the epoch after that starts at 0 again."""
        start, self.start = self.start, 0
        order = np.arange(self.length)
        if self.shuffle:
            generator = np.random.default_rng((self.seed, self.epoch))
            order = self.order(generator) if self.order else generator.permutation(self.length)
        for batch in range(start, len(self)):
            indices = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            fillers = -len(indices) % self.world_size
            keys = [SampleKey(self.epoch, int(i)) for i in indices]
            keys += [SampleKey(self.epoch, int(indices[0]), valid=False)] * fillers
            yield keys[self.rank :: self.world_size]


class FieldNotes(Dataset[Any]):
    """A dataset in a worker process, whose errors note their field: torch sends no more than their traceback."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, keys: list[SampleKey]) -> list[Any]:
        try:
            several = getattr(self.dataset, "__getitems__", None)
            return several(keys) if several else [self.dataset[key] for key in keys]
        except TrunklineError as error:
            if error.field is not None:
                error.add_note(FIELD_NOTE + error.field)
            raise


class ResumableLoader(DataLoader[Any]):
    """A DataLoader that asks where to start at the moment the first batch of an epoch is wanted.

    Lightning makes the iterator before it has restored its counters, and worker processes prefetch as
    soon as they exist: a loader that began at once would begin at the wrong sample.

    Args:
        dataset: takes `SampleKey`s.
        batch_sampler: the order.
        position: returns (epoch, batches of it already done); None means always from the beginning.
        **options: as for `DataLoader`.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        batch_sampler: ResumableBatchSampler,
        position: Callable[[], tuple[int, int]] | None = None,
        **options: Any,
    ) -> None:
        dataset = FieldNotes(dataset) if options.get("num_workers") else dataset
        super().__init__(dataset, batch_sampler=batch_sampler, **options)
        self.position = position

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Lazily, from `position()` on.

        Raises:
            TrunklineError: as the dataset raised it, with workers too.
        """
        if self.position is not None:
            self.batch_sampler.epoch, self.batch_sampler.start = self.position()  # type: ignore[union-attr]
        with plain_errors(self.num_workers):
            yield from super().__iter__()


@contextmanager
def plain_errors(num_workers: int) -> Iterator[None]:
    """Raise a worker's `TrunklineError` as the dataset raised it: torch puts the traceback into its message."""
    try:
        yield
    except TrunklineError as error:
        if not num_workers:
            raise
        message, _, field = str(error).rpartition("TrunklineError: ")[2].strip().partition(f"\n{FIELD_NOTE}")
        raise TrunklineError(message, field or None) from error
