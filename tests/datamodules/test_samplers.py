"""The order of samples, the loader that starts it where the trainer's counters stand, and seeded draws."""

import contextlib
import os
import random
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

from trunkline import TrunklineError
from trunkline.contract import EpochCut
from trunkline.datamodules import samplers
from trunkline.datamodules.base import TrunklineDataModule, preserved_generators, seed_generators
from trunkline.datamodules.samplers import ResumableBatchSampler, ResumableLoader, SampleKey
from trunkline.datamodules.token_batches import TokenBatches

WORKERS = pytest.mark.parametrize("workers", [0, 2])


def order(epoch: int = 0, start: int = 0, **options: Any) -> list[list[int]]:
    """Indices of a fresh sampler's batches."""
    sampler = ResumableBatchSampler(**{"length": 12, "batch_size": 4, "shuffle": True, **options})
    sampler.set_epoch(epoch)
    sampler.start = start
    return [[key.index for key in batch] for batch in sampler]


def flat(batches: list[list[int]]) -> list[int]:
    return [index for batch in batches for index in batch]


class Keys(Dataset[dict[str, int]]):
    """Tells what it was asked for and by which process; `bad` cannot be read."""

    def __init__(self, length: int = 12, bad: int = -1) -> None:
        self.length, self.bad = length, bad

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, key: SampleKey) -> dict[str, int]:
        if key.index == self.bad:
            try:
                raise OSError("a decoder's complaint")
            except OSError as error:
                raise TrunklineError(f"cannot read row {self.bad}; fix it") from error
        return {"epoch": key.epoch, "index": key.index, "valid": key.valid, "process": os.getpid()}


# --- ResumableBatchSampler


def test_order_is_the_one_of_every_version() -> None:
    # A changed order would silently break the resume of every run that is under way.
    assert order(seed=0, epoch=0) == [[9, 2, 7, 4], [5, 11, 0, 3], [6, 10, 8, 1]]
    assert order(seed=7, epoch=3) == [[4, 2, 5, 8], [7, 3, 11, 10], [0, 1, 9, 6]]


def test_an_order_in_parts_is_that_order() -> None:
    whole = np.random.default_rng(4).permutation(23)
    for borders in ([], [1, 2, 9], [0, 4, 4, 8, 12], [22]):
        parts = np.split(whole, borders)
        for batch_size, drop_last in ((4, True), (4, False), (6, False), (23, True)):
            for start in range(4):
                options = {"length": 23, "batch_size": batch_size, "drop_last": drop_last, "start": start}
                got, expected = (order(order=made, **options) for made in (lambda _, p=parts: iter(p), lambda _: whole))
                assert got == expected
                plain = [whole[n : n + batch_size].tolist() for n in range(start * batch_size, 23, batch_size)]
                assert got == [batch for batch in plain if not drop_last or len(batch) == batch_size]


def test_a_process_makes_the_keys_of_its_own_samples_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[SampleKey] = []

    def counted(*values: Any, **options: Any) -> SampleKey:
        made.append(SampleKey(*values, **options))
        return made[-1]

    monkeypatch.setattr(samplers, "SampleKey", counted)
    for rank in range(3):
        made.clear()
        batches = list(ResumableBatchSampler(10, 6, shuffle=True, rank=rank, world_size=3))
        assert made == [key for batch in batches for key in batch]
        assert [len(batch) for batch in batches] == [2, 2]  # 6 samples, then 4 and two fillers
        assert [key.valid for key in batches[1]] == [True, rank == 0]


def test_order_is_a_pure_function_of_seed_and_epoch() -> None:
    sampler = ResumableBatchSampler(12, 4, seed=3, shuffle=True)
    seen = {}
    for epoch in (2, 0, 1, 2, 0):
        sampler.set_epoch(epoch)
        batches = [[key.index for key in batch] for batch in sampler]
        assert seen.setdefault(epoch, batches) == batches == order(seed=3, epoch=epoch)
        random.seed(epoch), np.random.seed(epoch), torch.manual_seed(epoch)


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = {tuple(flat(order(seed=seed, epoch=epoch))) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16


def test_without_shuffling_all_epochs_run_through_the_rows() -> None:
    for epoch in (0, 5):
        assert order(shuffle=False, epoch=epoch) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("length", [1, 3, 4, 5, 12, 13])
def test_an_epoch_has_each_sample_once(length: int, shuffle: bool) -> None:
    batches = order(length=length, shuffle=shuffle)
    assert sorted(flat(batches)) == list(range(length))
    assert [len(batch) for batch in batches[:-1]] == [4] * (len(batches) - 1)


@pytest.mark.parametrize(
    ("length", "drop_last", "batches"), [(12, True, 3), (13, True, 3), (13, False, 4), (0, False, 0)]
)
def test_len_is_of_the_whole_epoch_and_drop_last_leaves_out_the_rest(
    length: int, drop_last: bool, batches: int
) -> None:
    sampler = ResumableBatchSampler(length, 4, shuffle=True, drop_last=drop_last)
    got = list(sampler)
    assert len(sampler) == len(got) == batches
    sampler.start = 2
    assert len(sampler) == batches
    indices = [key.index for batch in got for key in batch]
    assert len(indices) == len(set(indices)) == (batches * 4 if drop_last else length)


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("start", [0, 1, 2, 3])
def test_starts_at_a_batch_once_and_the_next_epoch_at_its_beginning(start: int, drop_last: bool) -> None:
    options = {"length": 14, "seed": 1, "drop_last": drop_last}
    sampler = ResumableBatchSampler(14, 4, seed=1, shuffle=True, drop_last=drop_last)
    sampler.set_epoch(2)
    sampler.start = start
    assert [[key.index for key in batch] for batch in sampler] == order(epoch=2, **options)[start:]
    sampler.set_epoch(3)
    assert [[key.index for key in batch] for batch in sampler] == order(epoch=3, **options)


@pytest.mark.parametrize("moved", [-3, 1, 3])
@pytest.mark.parametrize("parts", [False, True])
def test_all_batches_of_an_epoch_can_begin_at_another_sample(moved: int, parts: bool) -> None:
    def in_parts(generator: np.random.Generator) -> Any:
        permutation = generator.permutation(23)
        return iter([permutation[:7], permutation[7:8], permutation[8:]]) if parts else permutation

    moves: dict[int, int] = {}
    ranks = [
        ResumableBatchSampler(
            23, 4, seed=1, shuffle=True, drop_last=True, rank=r, world_size=2, order=in_parts, moved=moves
        )
        for r in range(2)
    ]
    moves[2] = moved  # after the sampler was made
    whole = flat(order(length=23, seed=1, epoch=2))
    for sampler in ranks:
        sampler.set_epoch(2)
        sampler.start = 3
    found = [[key.index for share in shares for key in share] for shares in zip(*map(list, ranks), strict=True)]
    first = 12 + moved
    want = [whole[at : at + 4] for at in range(first, min(first + 8, 23), 4)]
    assert [sorted(batch) for batch in found] == [sorted(batch) for batch in want]
    assert ranks[0].cut == ranks[1].cut == EpochCut(samples=23, seed=1, batches=5, batch_size=4, batch_tokens=None)
    for sampler in ranks:
        sampler.set_epoch(3)
    other = [key.index for sampler in ranks for batch in sampler for key in batch]
    assert sorted(other) == sorted(flat(order(length=23, seed=1, epoch=3, drop_last=True)))


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("drop_last", [False, True])
def test_any_number_of_processes_sees_the_same_global_batches(world_size: int, drop_last: bool) -> None:
    options = {"length": 24, "batch_size": 6, "drop_last": drop_last, "seed": 5, "epoch": 1}
    shares = [order(rank=rank, world_size=world_size, **options) for rank in range(world_size)]
    assert {len(batch) for share in shares for batch in share} == {6 // world_size}
    for whole, *parts in zip(order(**options), *shares, strict=True):
        assert sorted(flat(parts)) == sorted(whole)
    # a run that goes on with other processes loses and repeats nothing
    tails = [order(rank=rank, world_size=world_size, start=2, **options) for rank in range(world_size)]
    head = flat(order(**options)[:2])
    assert sorted(head + [index for tail in tails for index in flat(tail)]) == list(range(24))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("length", [1, 2, 3, 11, 12, 13, 14, 23, 24])
def test_ragged_evaluation_counts_each_sample_once_in_equal_shares(length: int, world_size: int) -> None:
    ranks = [list(ResumableBatchSampler(length, 12, rank=r, world_size=world_size)) for r in range(world_size)]
    for shares in zip(*ranks, strict=True):
        assert len({len(share) for share in shares}) == 1
        assert len(shares[0]) > 0
    keys = [key for rank in ranks for batch in rank for key in batch]
    assert sorted(key.index for key in keys if key.valid) == list(range(length))
    assert sum(not key.valid for key in keys) == -length % world_size
    assert all(0 <= key.index < length for key in keys)


def test_keys_carry_their_epoch() -> None:
    sampler = ResumableBatchSampler(4, 2)
    assert sampler.sampler is sampler  # where Lightning looks for set_epoch
    sampler.set_epoch(9)
    assert list(sampler) == [[SampleKey(9, 0), SampleKey(9, 1)], [SampleKey(9, 2), SampleKey(9, 3)]]


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"batch_size": 4, "world_size": 3}, ["batch_size=4", "3 process", "batch_size", "multiples of 3"]),
        ({"batch_size": 0}, ["batch_size=0", "batch_size"]),
        ({"batch_size": 13, "drop_last": True}, ["batch_size=13", "12 samples", "batch_size to at most 12"]),
    ],
)
def test_impossible_batches_are_refused(options: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(TrunklineError) as caught:
        ResumableBatchSampler(12, **options)
    assert all(part in str(caught.value) for part in parts)


# --- batches by tokens

LENGTHS = np.random.default_rng(4).integers(1, 40, 101)


def by_tokens(limit: int = 160, **options: Any) -> list[list[SampleKey]]:
    """The batches of a fresh sampler, with their keys."""
    epoch, start = options.pop("epoch", 0), options.pop("start", 0)
    options = {"shuffle": True, "drop_last": True, "seed": 1, **options}
    sampler = ResumableBatchSampler(len(LENGTHS), 7, batches=TokenBatches(LENGTHS, limit), **options)
    sampler.set_epoch(epoch)
    sampler.start = start
    batches = list(sampler)
    assert len(sampler) == len(batches) + start
    return batches


def test_batches_by_tokens_are_pure_and_hold_each_row_once() -> None:
    sizes = set()
    for epoch in (0, 1, 5):
        batches = by_tokens(epoch=epoch)
        assert batches == by_tokens(epoch=epoch)
        assert batches != by_tokens(epoch=epoch, seed=2)
        assert sorted(key.index for batch in batches for key in batch) == list(range(101))
        assert {(key.epoch, key.valid) for batch in batches for key in batch} == {(epoch, True)}
        sizes.add(tuple(sorted(map(len, batches))))
    assert len(sizes) == 1
    assert by_tokens(epoch=0) != by_tokens(epoch=1)


@pytest.mark.parametrize("start", [0, 1, 7, 14])
def test_batches_by_tokens_go_on_at_a_batch(start: int) -> None:
    assert by_tokens(start=start, epoch=3) == by_tokens(epoch=3)[start:]


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_batches_by_tokens_on_several_processes(world_size: int, shuffle: bool) -> None:
    whole = by_tokens(shuffle=shuffle, epoch=2)
    ranks = [by_tokens(shuffle=shuffle, epoch=2, rank=r, world_size=world_size) for r in range(world_size)]
    assert any(len(batch) % world_size for batch in whole)
    for batch, *shares in zip(whole, *ranks, strict=True):
        assert len({len(share) for share in shares}) == 1
        assert len(shares[0]) > 0
        keys = [key for share in shares for key in share]
        assert sorted(key for key in keys if key.valid) == sorted(batch)
        fillers = [key for key in keys if not key.valid]
        assert len(fillers) == -len(batch) % world_size
        shortest = min(-(-LENGTHS[key.index] // 8) for key in batch)
        assert all(-(-LENGTHS[key.index] // 8) == shortest for key in fillers)  # they make no batch longer


def test_batches_by_tokens_need_no_batch_size() -> None:
    sampler = ResumableBatchSampler(3, 7, world_size=4, drop_last=True, batches=TokenBatches(LENGTHS[:3], 1000))
    assert len(list(sampler)) == len(sampler) == 1


# --- ResumableLoader


def make_loader(workers: int, dataset: Keys | None = None, **options: Any) -> ResumableLoader:
    sampler = ResumableBatchSampler(12, 4, seed=2, shuffle=True)
    return ResumableLoader(dataset or Keys(), sampler, num_workers=workers, persistent_workers=workers > 0, **options)


@WORKERS
def test_loader_asks_for_the_position_at_the_first_batch(workers: int) -> None:
    counters, asked = [(0, 0)], []

    def position() -> tuple[int, int]:
        asked.append(counters[-1])
        return counters[-1]

    batches = iter(make_loader(workers, position=position))
    assert asked == []
    counters.append((4, 2))  # as Lightning restores them after iter()
    assert next(batches)["index"].tolist() == order(seed=2, epoch=4)[2]
    assert asked == [(4, 2)]
    assert next(batches, None) is None


@WORKERS
def test_one_loader_runs_many_epochs(workers: int) -> None:
    loader, counters = make_loader(workers), [0, 0]
    loader.position = lambda: (counters[0], counters[1])
    processes = set()
    for epoch, start in [(0, 0), (1, 2), (2, 0), (3, 1)]:
        counters[:] = epoch, start
        batches = list(loader)
        assert [batch["index"].tolist() for batch in batches] == order(seed=2, epoch=epoch)[start:]
        assert {int(e) for batch in batches for e in batch["epoch"]} == {epoch}
        processes |= {int(p) for batch in batches for p in batch["process"]}
        assert len(loader) == 3
    assert processes == {os.getpid()} if workers == 0 else len(processes) == workers and os.getpid() not in processes


@WORKERS
def test_an_epoch_left_early_does_not_leak_into_the_next(workers: int) -> None:
    loader = make_loader(workers)
    assert next(iter(loader))["index"].tolist() == order(seed=2)[0]
    loader.batch_sampler.set_epoch(1)  # type: ignore[union-attr]
    assert [batch["index"].tolist() for batch in loader] == order(seed=2, epoch=1)


@WORKERS
def test_an_error_of_the_dataset_arrives_as_it_was_raised(workers: int) -> None:
    loader = make_loader(workers, Keys(bad=7))
    with pytest.raises(TrunklineError, match=r"^cannot read row 7; fix it$"):
        list(loader)
    if workers:  # else torch waits 5 s for each, once the garbage collector finds them through the traceback
        loader._iterator._shutdown_workers()  # type: ignore[union-attr]


# --- seeds


def draws() -> tuple[float, float, float]:
    return random.random(), np.random.rand(), torch.rand(()).item()


def test_seeds_give_the_same_draws_whatever_came_before_and_leave_the_generators_alone() -> None:
    seen = []
    for n in range(3):
        random.seed(n), np.random.seed(n), torch.manual_seed(n)
        draws()
        after = random.getstate(), np.random.get_state(legacy=False)["state"], torch.get_rng_state()
        with preserved_generators():
            seed_generators(1, 2, 3)
            seen.append(draws())
        assert random.getstate() == after[0]
        np.testing.assert_equal(np.random.get_state(legacy=False)["state"], after[1])
        assert torch.equal(torch.get_rng_state(), after[2])
    assert seen[0] == seen[1] == seen[2]


def test_seeds_differ_in_each_part_and_generator() -> None:
    seen = set()
    for parts in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 2**33)]:
        seed_generators(*parts)
        seen |= set(draws())
    assert len(seen) == 15


def test_generators_are_restored_after_an_error() -> None:
    torch.manual_seed(5)
    expected = torch.rand(()).item()
    torch.manual_seed(5)
    with contextlib.suppress(ZeroDivisionError), preserved_generators():
        seed_generators(1)
        raise ZeroDivisionError
    assert torch.rand(()).item() == expected


# --- under Lightning


class Recorder(L.LightningModule):
    """Writes down the indices of each training and validation batch; saves a checkpoint after step `save_at`."""

    def __init__(self, save_at: int = -1, path: Path = Path()) -> None:
        super().__init__()
        self.weight, self.save_at, self.path = torch.nn.Parameter(torch.zeros(1)), save_at, path
        self.trained: dict[int, list[list[int]]] = {}
        self.validated: list[int] = []

    def training_step(self, batch: dict[str, Tensor]) -> Tensor:
        assert set(batch["epoch"].tolist()) == {self.current_epoch}
        self.trained.setdefault(self.current_epoch, []).append(batch["index"].tolist())
        return self.weight.sum()

    def on_train_batch_end(self, *_: Any) -> None:
        if self.global_step == self.save_at:
            self.trainer.save_checkpoint(self.path)

    def validation_step(self, batch: dict[str, Tensor]) -> None:
        self.validated += batch["index"][batch["valid"]].tolist()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        self.trainer.estimated_stepping_batches  # noqa: B018  # asking for it once broke Lightning's resume
        return torch.optim.SGD(self.parameters(), lr=0.1)


class KeysData(TrunklineDataModule):
    def setup(self, stage: str) -> None:
        self.datasets = {"train": Keys(14), "val": Keys(5)}


def fit(model: Recorder, workers: int, folder: Path, **options: Any) -> Recorder:
    trainer = L.Trainer(
        max_epochs=3,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=folder,
    )
    trainer.fit(model, datamodule=KeysData(batch_size=4, eval_batch_size=3, num_workers=workers, seed=6), **options)
    return model


@WORKERS
def test_trainer_runs_through_a_new_permutation_each_epoch(workers: int, tmp_path: Path) -> None:
    model = fit(Recorder(), workers, tmp_path)
    assert model.trained == {e: order(length=14, seed=6, epoch=e, drop_last=True) for e in range(3)}
    assert len({tuple(flat(batches)) for batches in model.trained.values()}) == 3
    assert model.validated == [0, 1, 2, 3, 4] * 3


@pytest.mark.parametrize("save_at", [1, 3, 5])
def test_trainer_resumes_at_the_next_batch(save_at: int, tmp_path: Path) -> None:
    whole = fit(Recorder(save_at, tmp_path / "half.ckpt"), 0, tmp_path).trained
    rest = fit(Recorder(), 0, tmp_path, ckpt_path=tmp_path / "half.ckpt", weights_only=True).trained
    steps = [(epoch, batch) for epoch, batches in whole.items() for batch in batches]
    assert [(epoch, batch) for epoch, batches in rest.items() for batch in batches] == steps[save_at:]
