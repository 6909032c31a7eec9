"""The order of samples: a pure function of (seed, epoch), resumable at any batch on any number of processes."""

import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import DataLoader, Dataset
from torch.utils.data._utils.signal_handling import _error_if_any_worker_fails

from trunkline import LostProcess, TrunklineError
from trunkline.contract import EpochCut
from trunkline.datamodules.token_batches import TokenBatches

LOST_WORKER = re.compile(r"DataLoader worker \(pid.*\) (exited unexpectedly|is killed by signal)")
WORKER_ENDS_WITHIN = 5
"""Seconds after its connection breaks."""
FIELD_NOTE = "field: "
"""Prefix of the note on a worker's error that names the field at fault."""


class SampleKey(NamedTuple):
    """The key of an item in a dataset. Augmentation, masking and the like may depend only on (seed, epoch, index)."""

    epoch: int
    index: int  # type: ignore[assignment]  # hides tuple.index
    valid: bool = True
    """False for a filler: it makes the shares of all processes equally long, and is never counted in a metric."""


Order = Callable[[np.random.Generator], np.ndarray | Iterable[np.ndarray]]


class ResumableBatchSampler:
    """Batches of `SampleKey`s for one process.

    The order of an epoch depends only on (seed, epoch). It is cut into global batches, and each process takes every
    `world_size`-th sample of a global batch: step n has the same samples on any number of processes. Starting at
    batch n costs nothing, because no earlier sample is read. Fillers with `valid=False` give each process the same
    number of samples of a batch.

    Args:
        length: number of samples in the dataset.
        batch_size: samples in a global batch, over all processes.
        seed: seed of the order.
        shuffle: whether the order is random.
        drop_last: leave out the last batch if it is not full.
        rank: number of this process.
        world_size: number of processes.
        order: makes the order of an epoch from the epoch's generator: (length,) row numbers, or an iterator over the
            parts of it, which then need not be in memory at once. None is a random permutation; large files that are
            read faster one after the other need another order.
        batches: batches of different sizes, instead of `batch_size`, `drop_last` and `order`.
        moved: by epoch, the number of samples by which all batches of `batch_size` begin later. It may change at any
            time until the epoch is iterated.

    Raises:
        TrunklineError: if the processes cannot share a batch equally, or if the samples do not fill one batch.
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
        order: Order | None = None,
        batches: TokenBatches | None = None,
        moved: Mapping[int, int] | None = None,
    ) -> None:
        if batches is None:
            check_batch_size(length, batch_size, drop_last, world_size)
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.shuffle, self.drop_last, self.rank, self.world_size = shuffle, drop_last, rank, world_size
        self.order, self.batches, self.moved = order, batches, {} if moved is None else moved
        self.epoch = self.start = 0

    @property
    def sampler(self) -> "ResumableBatchSampler":
        """The same object, because Lightning looks for `set_epoch` at `batch_sampler.sampler`."""
        return self

    @property
    def cut(self) -> EpochCut:
        """What decides which samples are in which batch."""
        sizes = (self.batch_size, None) if self.batches is None else (None, self.batches.batch_tokens)
        return EpochCut(self.length, self.seed, len(self), *sizes)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Number of batches in a whole epoch, wherever the next iteration starts."""
        if self.batches is not None:
            return len(self.batches)
        return self.length // self.batch_size if self.drop_last else -(-self.length // self.batch_size)

    def __iter__(self) -> Iterator[list[SampleKey]]:
        """Batches of this process, from batch `start` on; the iteration after this one begins at batch 0."""
        start, self.start = self.start, 0
        for indices in self._global_batches(start):
            keys = [SampleKey(self.epoch, index) for index in indices[self.rank :: self.world_size].tolist()]
            if 0 < len(indices) % self.world_size <= self.rank:  # the others have one sample more
                keys.append(SampleKey(self.epoch, int(indices[0]), valid=False))
            yield keys

    def _global_batches(self, start: int) -> Iterator[np.ndarray]:
        """The row numbers of each batch, over all processes."""
        generator = np.random.default_rng((self.seed, self.epoch)) if self.shuffle else None
        if self.batches is not None:
            yield from self.batches.epoch(generator, start)
            return
        order: np.ndarray | Iterable[np.ndarray]
        if generator is None:
            order = np.arange(self.length)
        else:
            order = self.order(generator) if self.order else generator.permutation(self.length)
        parts = [order] if isinstance(order, np.ndarray) else order
        pieces = pieces_of(parts, self.batch_size, start * self.batch_size + self.moved.get(self.epoch, 0))
        yield from islice(pieces, max(len(self) - start, 0))


def pieces_of(parts: Iterable[np.ndarray], size: int, skip: int) -> Iterator[np.ndarray]:
    """Cut an array that comes in parts into pieces of `size`; the last one can be shorter.

    Args:
        parts: the parts; only one of them is kept at a time.
        size: values in a piece.
        skip: number of values at the beginning to leave out.
    """
    rest = np.zeros(0, np.int64)
    for part in parts:
        if skip >= len(part):
            skip -= len(part)
            continue
        rest = np.concatenate([rest, part[skip:]]) if len(rest) else part[skip:]
        skip, whole = 0, len(rest) - len(rest) % size
        for begin in range(0, whole, size):
            yield rest[begin : begin + size]
        rest = rest[whole:]
    if len(rest):
        yield rest


def check_batch_size(length: int, batch_size: int, drop_last: bool, world_size: int) -> None:
    """Check that the processes can share a batch equally, and that the samples fill a batch.

    Raises:
        TrunklineError: if not.
    """
    if batch_size < 1 or batch_size % world_size:
        raise TrunklineError(
            f"batch_size={batch_size} (over all processes) cannot be shared by {world_size} process(es); "
            f"set batch_size and eval_batch_size to multiples of {world_size}",
            field="data.batch_size" if drop_last else "data.eval_batch_size",
        )
    if drop_last and length < batch_size:
        raise TrunklineError(
            f"batch_size={batch_size} is larger than the training data ({length} samples), so that no "
            f"batch is full; set batch_size to at most {length}",
            field="data.batch_size",
        )


class FieldNotes(Dataset[Any]):
    """A dataset in a worker process. It adds an error's field as a note, because torch passes on only the traceback."""

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
    """A DataLoader that reads its start position only when the first batch of an epoch is requested.

    Lightning creates the iterator before it restores its counters, and worker processes prefetch as soon as they exist:
    a loader that read the position at once would start at the wrong sample.

    Args:
        dataset: indexed with `SampleKey`s.
        batch_sampler: the order of the samples.
        position: returns (epoch, number of its batches already done); None always starts at the beginning.
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
        self.waited = 0.0
        """Seconds in which this process made batches, or waited for its workers to: see `CountsWaiting`."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Batches from `position()` on.

        Raises:
            TrunklineError: as the dataset raised it, also if a worker process did.
        """
        if self.position is not None:
            self.batch_sampler.epoch, self.batch_sampler.start = self.position()  # type: ignore[union-attr]
        with plain_errors(self.num_workers):
            batches, end = super().__iter__(), object()
            while True:
                begun = time.perf_counter()
                batch = next(batches, end)
                self.waited += time.perf_counter() - begun
                if batch is end:
                    return
                yield batch


def hear_torch_out() -> None:
    """Let torch say now that a worker was lost: the signal of its end would interrupt the saving of the last step."""
    until = time.monotonic() + WORKER_ENDS_WITHIN
    with suppress(RuntimeError):  # raised once for all workers of a loader
        while time.monotonic() < until:
            _error_if_any_worker_fails()
            time.sleep(0.01)


def lost_worker() -> LostProcess:
    """The message for `LOST_WORKER`."""
    return LostProcess(
        "a process that loads data was killed, most likely because memory ran out; lower num_workers or batch_size",
        "data.num_workers",
    )


@contextmanager
def plain_errors(num_workers: int) -> Iterator[None]:
    """Raise a worker's `TrunklineError` as the dataset raised it: torch replaces its message by the traceback.

    Raises:
        TrunklineError: also if a worker was killed.
    """
    try:
        yield
    except (RuntimeError, ConnectionError, EOFError) as error:  # the latter two if it died while it sent a batch
        lost = num_workers > 0 if isinstance(error, ConnectionError | EOFError) else LOST_WORKER.search(str(error))
        if not lost:
            raise
        if not isinstance(error, RuntimeError):
            hear_torch_out()
        raise lost_worker() from error
    except TrunklineError as error:
        if not num_workers:
            raise
        message, _, field = str(error).rpartition("TrunklineError: ")[2].strip().partition(f"\n{FIELD_NOTE}")
        raise TrunklineError(message, field or None) from error
