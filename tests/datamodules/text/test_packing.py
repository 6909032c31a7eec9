"""Rows of one length from a stream of tokens: every target once, and no document sees another."""

import time
from pathlib import Path

import numpy as np
import pytest
import torch

from trunkline.datamodules.samplers import ResumableBatchSampler, ResumableLoader, SampleKey
from trunkline.datamodules.text.packing import Blocks, Documents, PackedRows, best_fit, cut_documents
from trunkline.datamodules.text.token_shards import TokenStream


def make_stream(folder: Path, sizes: list[int]) -> TokenStream:
    """Token i of the stream is i + 1; documents of these sizes, over two shards that a document ends."""
    ends = np.cumsum(sizes)
    half = len(sizes) // 2
    border = int(ends[half - 1]) if half else 0
    shards = []
    for name, begin, stop in (("a", 0, border), ("b", border, int(ends[-1]))):
        if begin < stop:
            np.arange(begin + 1, stop + 1, dtype=np.uint16).tofile(folder / f"{name}.bin")
            np.save(folder / f"{name}.ends.npy", ends[(ends > begin) & (ends <= stop)] - begin)
            shards.append((f"{name}.bin", stop - begin))
    return TokenStream(folder, shards, "uint16")


def pairs(rows: PackedRows, epoch: int = 0, world_size: int = 1, batch_size: int = 6) -> list[tuple[int, int]]:
    """(token, target) of all targets that evaluation counts, over all processes."""
    result = []
    for rank in range(world_size):
        sampler = ResumableBatchSampler(len(rows), batch_size, rank=rank, world_size=world_size)
        sampler.set_epoch(epoch)
        for batch in ResumableLoader(rows, sampler):
            counted = batch["targets"] != -100
            result += list(zip(batch["tokens"][counted].tolist(), batch["targets"][counted].tolist(), strict=True))
    return result


# --- blocks


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("size", [2, 8, 9, 10, 57])
def test_evaluation_counts_each_target_once(size: int, world_size: int, tmp_path: Path) -> None:
    rows = PackedRows(Blocks(make_stream(tmp_path, [1, size - 1]), 8, None))
    assert sorted(pairs(rows, world_size=world_size)) == [(n, n + 1) for n in range(1, size)]


@pytest.mark.parametrize("size", [9, 10, 16, 17, 18, 57])
def test_training_rows_are_full_and_move_each_epoch(size: int, tmp_path: Path) -> None:
    rows = PackedRows(Blocks(make_stream(tmp_path, [size]), 8, 3))
    assert len(rows) == (size - 1) // 8
    firsts = set()
    for epoch in range(20):
        offset = int(np.random.default_rng((3, epoch)).integers(8))
        for index in range(len(rows)):
            item = rows[SampleKey(epoch, index)]
            start = min(offset + 8 * index, size - 1 - 8)
            assert item["tokens"].tolist() == list(range(start + 1, start + 9))
            assert item["targets"].tolist() == list(range(start + 2, start + 10))
            firsts.add(start)
    if size > 9:
        assert len(firsts) > 1


def test_block_items_have_their_documented_keys(tmp_path: Path) -> None:
    rows = PackedRows(Blocks(make_stream(tmp_path, [5, 6]), 8, None))
    first, second = rows.__getitems__([SampleKey(0, 1), SampleKey(0, 0, valid=False)])
    assert set(first) == {"tokens", "targets", "index", "valid"}
    assert first["tokens"].dtype == first["targets"].dtype == torch.int64
    assert first["tokens"].tolist() == [9, 10, 0, 0, 0, 0, 0, 0]
    assert first["targets"].tolist() == [10, 11] + [-100] * 6
    assert (first["index"], first["valid"], second["index"], second["valid"]) == (1, True, 0, False)
    assert second["targets"].tolist() == [-100] * 8  # a filler counts nothing


@pytest.mark.parametrize("size", [1, 8, 9, 57])
def test_rows_without_targets_share_no_token(size: int, tmp_path: Path) -> None:
    blocks = Blocks(make_stream(tmp_path, [size]), 8, None, overlap=0)
    tokens = np.concatenate([blocks.read(SampleKey(0, n)) for n in range(len(blocks))])
    assert tokens.tolist() == list(range(1, size + 1))
    blocks.seed = 3
    assert all(len(blocks.read(SampleKey(e, n))) == 8 for e in range(9) for n in range(len(blocks)))


# --- documents

SIZES = {
    "mixed": [3, 8, 1, 20, 5, 2, 7, 9, 16, 4, 4, 17, 1],
    "one": [5],
    "full": [8, 8, 16],
    "long": [41],
    "tiny": [1] * 19,
}


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_each_token_is_in_one_row_and_predicts_its_own_document(sizes: list[int], tmp_path: Path) -> None:
    rows = PackedRows(Documents(make_stream(tmp_path, sizes), 8))
    document = np.repeat(np.arange(len(sizes)), sizes)
    seen: list[int] = []
    for index in range(len(rows)):
        item = {
            name: value.tolist() for name, value in rows[SampleKey(0, index)].items() if name not in ("index", "valid")
        }
        owners: dict[int, set[tuple[int, int]]] = {}
        for place, (token, target, segment) in enumerate(
            zip(item["tokens"], item["targets"], item["document"], strict=True)
        ):
            if segment == 0:
                assert (token, target) == (0, -100)
                continue
            seen.append(token)
            owners.setdefault(segment, set()).add((int(document[token - 1]), token - place))
            last = token == len(document) or document[token] != document[token - 1]
            assert target == (-100 if last else token + 1)
        assert all(len(chunk) == 1 for chunk in owners.values())  # of one document, in its order without gaps
        used = [number for number in item["document"] if number]
        assert used == sorted(used)
        assert set(used) == set(range(1, len(owners) + 1))
        assert item["document"][len(used) :] == [0] * (8 - len(used))
    assert sorted(seen) == list(range(1, sum(sizes) + 1))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_each_target_within_a_document_counts_once(world_size: int, tmp_path: Path) -> None:
    sizes = SIZES["mixed"]
    rows = PackedRows(Documents(make_stream(tmp_path, sizes), 8))
    ends = set(np.cumsum(sizes).tolist())
    expected = [(n, n + 1) for n in range(1, sum(sizes)) if n not in ends]
    assert sorted(pairs(rows, world_size=world_size)) == expected
    assert sorted(pairs(rows, epoch=3)) == expected


def test_documents_are_cut_into_chunks() -> None:
    starts, sizes = cut_documents(np.array([3, 11, 28, 29]), 8)
    assert starts.tolist() == [0, 3, 11, 19, 27, 28]
    assert sizes.tolist() == [3, 8, 8, 8, 1, 1]
    assert [part.tolist() for part in cut_documents(np.zeros(0, np.int64), 8)] == [[], []]


def slow_best_fit(sizes: list[int], length: int) -> list[int]:
    """As the paper has it, looking at every row."""
    rows, free = [0] * len(sizes), []
    for item in sorted(range(len(sizes)), key=lambda n: -sizes[n]):
        fitting = [room for room in free if room >= sizes[item]]
        if not fitting:
            free.append(length)
        # of rows that are as full, any will do: the free places decide
        row = len(free) - 1 if not fitting else free.index(min(fitting))
        free[row] -= sizes[item]
        rows[item] = row
    return sorted(free)


@pytest.mark.parametrize("length", [1, 2, 7, 64, 100])
def test_best_fit_is_the_paper_s(length: int) -> None:
    draw = np.random.default_rng(length)
    for count in (0, 1, 2, 50, 300):
        sizes = np.minimum(draw.geometric(3 / (length + 2), count), length)
        rows = best_fit(sizes, length)
        used = np.bincount(rows, sizes).astype(int)
        assert sorted(set(rows.tolist())) == list(range(len(used)))
        assert (length - used).min(initial=0) >= 0
        assert sorted((length - used).tolist()) == slow_best_fit(sizes.tolist(), length)


def test_packing_is_quick_and_tight() -> None:
    sizes = np.random.default_rng(0).integers(1, 257, 200_000)
    start = time.process_time()
    rows = best_fit(sizes, 256)
    assert time.process_time() - start < 2  # 8 million in 80 s at worst; a quarter second here
    assert sizes.sum() / (256 * (rows.max() + 1)) > 0.99
