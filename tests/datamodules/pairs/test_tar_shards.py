"""Tar shards: the index and its cache, what is read, the order of an epoch, and broken shards."""

import io
import json
import os
import pickle
import tarfile
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from trunkline import TrunklineError
from trunkline.datamodules.pairs import tar_index, tar_shards
from trunkline.datamodules.pairs.image_text_data import set_aside
from trunkline.datamodules.pairs.tar_shards import TarPairs
from trunkline.datamodules.samplers import ResumableBatchSampler

LONG = "x" * 120  # longer than a header has room for: a GNU long name or a PAX record


def picture(value: int, kind: str = "png") -> bytes:
    """A grey picture of one value as a file."""
    buffer = io.BytesIO()
    Image.new("L", (4, 4), value).save(buffer, kind)
    return buffer.getvalue()


def write(path: Path, members: dict[str, bytes], kind: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=kind) as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def numbered(folder: Path, *sizes: int) -> list[Path]:
    """Shards of so many samples; the picture of sample n is of the value n and its text says so."""
    shards, n = [], 0
    for number, size in enumerate(sizes):
        members = {}
        for _ in range(size):
            members |= {f"{n:04}.png": picture(n), f"{n:04}.txt": f"number {n}\n".encode()}
            n += 1
        shards.append(write(folder / f"{number:03}.tar", members))
    return shards


def pairs(shards: list[Path], column: str = "caption", window: int = 16, skip: bool = False) -> TarPairs:
    return TarPairs(shards, column, shards[0].parent / "cache", window, skip)


def contents(rows: TarPairs) -> list[tuple[int, list[str]]]:
    return [(rows.image(n).convert("L").getpixel((0, 0)), rows.captions(n)) for n in range(len(rows))]  # type: ignore[misc]


# --- what is read


@pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_samples_are_members_of_one_key(kind: int, tmp_path: Path) -> None:
    members = {
        "a/readme.md": b"nothing",
        "a.b/1.jpg": picture(10, "jpeg"),
        "a.b/1.txt": b"two words\nand a line\n",
        "a.b/1.json": json.dumps({"caption": "not this"}).encode(),
        "a/1.json": json.dumps({"caption": "one", "url": "x"}).encode(),
        "a/1.seg.png": picture(99),
        "a/1.PNG": picture(20),
        f"{LONG}.webp": picture(30, "webp"),
        f"{LONG}.json": json.dumps({"caption": ["first", "second"]}).encode(),
    }
    rows = pairs([write(tmp_path / "s.tar", members, kind)])
    assert contents(rows) == [(10, ["two words\nand a line"]), (20, ["one"]), (30, ["first", "second"])]
    assert rows.name(0) == f"{tmp_path}/s.tar, a.b/1.jpg"
    assert rows.name(2).startswith(f"{tmp_path}/s.tar, xxxxx")
    assert contents(pickle.loads(pickle.dumps(rows))) == contents(rows)


def test_no_more_files_are_open_than_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tar_shards, "OPEN_FILES", 2)
    rows = pairs(numbered(tmp_path, 1, 1, 1, 1))
    assert [caption for _, (caption,) in contents(rows) + contents(rows)] == [f"number {n}" for n in range(4)] * 2
    assert len(rows.opened) == 2


def test_incomplete_samples_are_rows_that_cannot_be_read(tmp_path: Path) -> None:
    members = {
        "1.png": picture(1)[:30],
        "1.txt": b"a",
        "2.txt": b"b",
        "3.png": picture(3),
        "4.png": picture(4),
        "4.json": b"{no json",
        "5.png": picture(5),
        "5.json": b'{"text": "e"}',
        "6.png": picture(6),
        "6.txt": b" \n",
    }
    rows = pairs([write(tmp_path / "s.tar", members)])
    assert len(rows) == 6
    for row, name, part in ((0, "1.png", "cannot read the image"), (1, "2.txt", "the cell is empty")):
        with pytest.raises(TrunklineError, match=f"{part}.*|s.tar, {name}.*{part}") as caught:
            rows.image(row)
        assert f"{tmp_path}/s.tar, {name}" in str(caught.value)
    for row, part in (
        (2, "s.tar, 3.png has no .txt or .json beside it"),
        (3, "s.tar, 4.json: the caption cannot be read"),
        (4, "s.tar, 5.json: 'caption' is not a text or a list of texts but null"),
        (5, "s.tar, 6.txt: 'txt' has an empty caption"),
    ):
        with pytest.raises(TrunklineError) as caught:
            rows.captions(row)
        assert part in str(caught.value)
        assert "skip_corrupt=true" in str(caught.value)


# --- the index


def test_index_is_kept_until_the_shard_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = numbered(tmp_path, 3, 2)
    expected = contents(pairs(shards))
    scanned: list[str] = []
    original = tar_index.scan
    monkeypatch.setattr(tar_index, "scan", lambda shard: scanned.append(shard.name) or original(shard))
    assert contents(pairs(shards)) == expected
    assert scanned == []
    key = pairs(shards).key
    write(shards[1], {"n.png": picture(77), "n.txt": b"new"})
    os.utime(shards[1], (1, 1))
    rows = pairs(shards)
    assert scanned == ["001.tar"]
    assert contents(rows) == [*expected[:3], (77, ["new"])]
    assert rows.key != key
    assert len(list((tmp_path / "cache" / "tar").glob("*.joined"))) == 1


def test_an_index_that_is_there_is_opened_without_a_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = numbered(tmp_path, 3, 2)
    expected = contents(pairs(shards))
    with monkeypatch.context() as patch:
        patch.setattr(tar_index, "lock", lambda file: pytest.fail("waits for processes that read the index too"))
        rows = pairs(shards)
    assert contents(rows) == expected
    assert isinstance(rows.index.samples.base, np.memmap)
    large = pairs(numbered(tmp_path / "large", 300))
    assert len(pickle.dumps(large)) < len(pickle.dumps(rows)) + 50  # the index itself is not sent to workers


def test_what_a_killed_process_left_is_used_or_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = numbered(tmp_path, 3, 2)
    expected = contents(pairs(shards))
    (file,) = (tmp_path / "cache" / "tar").glob("*.joined")
    (file.parent / f".{file.name}.0123.tmp").write_bytes(b"half of it")
    monkeypatch.setattr(tar_index, "scan", lambda shard: pytest.fail("each shard was scanned already"))
    whole = file.read_bytes()
    for content in (None, b"", whole[:-9], whole[: len(whole) // 2], whole[:-8] + b"\xff" * 8):
        file.unlink() if content is None else file.write_bytes(content)
        assert contents(pairs(shards)) == expected
        assert file.read_bytes() == whole
        assert not list(file.parent.glob(".*.tmp"))


def test_memory_does_not_grow_with_the_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither while it is joined nor later. The index of a million samples has 33 MB, their numbers have 8 MB."""
    sample = np.array([(512, 30_000, 31_232, 60, False)], tar_index.SAMPLE)
    monkeypatch.setattr(tar_index, "scan", lambda shard: (np.repeat(sample, 10_000), ""))
    monkeypatch.setattr(tar_index, "GROUP_SHARDS", 10)
    shards = [tmp_path / f"{n:03}.tar" for n in range(100)]
    for shard in shards:
        shard.touch()
    tracemalloc.start()
    joined, rows = pairs(shards), pairs(shards)
    assert len(joined) == len(rows) == 1_000_000
    train = set_aside({"train": rows}, {"val": 0.1})["train"]
    sampler = ResumableBatchSampler(len(train), 4096, shuffle=True, drop_last=True, world_size=8, order=train.order)
    sampler.start = len(sampler) - 1
    (batch,) = sampler
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len({key.index for key in batch}) == 512
    assert peak < 16_000_000, peak  # the rows of a window of 16 shards, several times


# --- the order


def epoch(rows: TarPairs, *seed: int) -> np.ndarray:
    """The row numbers of a whole epoch."""
    return np.concatenate([*rows.order(np.random.default_rng(seed))])


def test_an_epoch_goes_through_windows_of_shards(tmp_path: Path) -> None:
    sizes = [3, 1, 4, 1, 5, 9, 2]
    rows = pairs(numbered(tmp_path, *sizes), window=2)
    order = epoch(rows, 0, 1)
    assert sorted(order) == list(range(25))
    shard_of = np.repeat(np.arange(7), sizes)
    shards = np.random.default_rng((0, 1)).permutation(7)  # an independent walk through the windows
    place = 0
    for begin in range(0, 7, 2):
        window = shards[begin : begin + 2]
        size = sum(sizes[shard] for shard in window)
        assert set(shard_of[order[place : place + size]]) == set(window)
        place += size
    assert order.tolist() == epoch(rows, 0, 1).tolist()
    assert order.tolist() != epoch(rows, 0, 2).tolist()
    mixed = epoch(pairs(rows.shards, window=7), 0)
    assert sorted(mixed) == list(range(25))
    assert (np.diff(shard_of[mixed]) != 0).sum() > 10  # shards take turns within a window


# --- broken shards


@pytest.mark.parametrize(
    ("cut", "samples", "message"),
    [
        (512 * 9 + 30, 2, "0002.png is cut short"),  # in the content of the fifth member
        (512 * 8 + 100, 2, "it ends without its end mark at byte 4096"),  # in its header
        (512 * 8, 2, "it ends without its end mark at byte 4096"),
        (512 * 11 + 3, 2, "0002.txt is cut short"),
    ],
)
def test_a_shard_cut_short(
    cut: int, samples: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scanned: list[str] = []
    (whole,) = numbered(tmp_path, 1)
    (tmp_path / "short.tar").write_bytes(numbered(tmp_path / "b", 4)[0].read_bytes()[:cut])
    with pytest.raises(TrunklineError) as caught:
        pairs([whole, tmp_path / "short.tar"])
    assert str(caught.value).startswith(f"the shard {tmp_path}/short.tar of {cut} bytes is broken: {message}")
    assert str(caught.value).endswith("set skip_corrupt=true to use the samples before that")
    monkeypatch.setattr(tar_index, "scan", lambda shard, scan=tar_index.scan: scanned.append(shard.name) or scan(shard))
    for _ in range(2):  # said in each run
        with pytest.warns(UserWarning, match=rf"short\.tar of {cut} bytes .*only the {samples} samples before"):
            rows = pairs([whole, tmp_path / "short.tar"], skip=True)
        assert len(rows) == 1 + samples
    assert contents(rows)[:3] == [(0, ["number 0"]), (0, ["number 0"]), (1, ["number 1"])]
    assert scanned == ["short.tar"]  # once for all runs
    with pytest.raises(TrunklineError, match=f"{message}.*skip_corrupt=true"):
        pairs([whole, tmp_path / "short.tar"])


def test_noise_between_members(tmp_path: Path) -> None:
    (shard,) = numbered(tmp_path, 3)
    content = bytearray(shard.read_bytes())
    content[512 * 8 : 512 * 9] = b"\x07" * 512
    shard.write_bytes(content)
    with pytest.raises(TrunklineError, match="there is something else than a member at byte 4096"):
        pairs([shard])


def test_what_is_no_shard(tmp_path: Path) -> None:
    (shard,) = numbered(tmp_path, 2)
    with tarfile.open(tmp_path / "packed.tar", "w:gz") as archive:
        archive.add(shard)
    write(tmp_path / "other.tar", {"1.cls": b"3"})
    (tmp_path / "empty.tar").touch()
    for name, message in (
        ("packed.tar", r"packed\.tar is not an uncompressed tar file: .*not compressed$"),
        ("empty.tar", r"empty\.tar is not an uncompressed tar file: "),
        ("other.tar", r"other\.tar holds no images with texts \(KEY\.jpg with KEY\.txt or KEY\.json\)"),
        ("missing.tar", r"cannot read the shard .*missing\.tar: No such file"),
    ):
        with pytest.raises(TrunklineError, match=message):
            pairs([tmp_path / name])


def test_a_shard_that_changes_while_it_is_used(tmp_path: Path) -> None:
    (shard,) = numbered(tmp_path, 2)
    rows: Any = pairs([shard])
    os.truncate(shard, 2000)
    with pytest.raises(TrunklineError, match=r"000\.tar became shorter while it was used"):
        rows.captions(1)
    rows = pairs(numbered(tmp_path / "b", 2))
    rows.shards[0].unlink()
    with pytest.raises(TrunklineError, match=r"cannot read the shard .*No such file"):
        rows.image(0)


def test_the_batch_sampler_takes_the_order_and_resumes_within_it(tmp_path: Path) -> None:
    rows = pairs(numbered(tmp_path, 4, 4, 4), window=1)

    def batches(start: int, **options: int) -> list[list[int]]:
        sampler = ResumableBatchSampler(12, 4, seed=3, shuffle=True, order=rows.order, **options)
        sampler.set_epoch(2)
        sampler.start = start
        return [[key.index for key in batch] for batch in sampler]

    whole = batches(0)
    assert [{index // 4 for index in batch} for batch in whole] == [{n} for n in (batch[0] // 4 for batch in whole)]
    assert sorted(index for batch in whole for index in batch) == list(range(12))
    assert batches(1) == whole[1:]
    shares = [batches(0, rank=rank, world_size=2) for rank in (0, 1)]
    assert [sorted(a + b) for a, b in zip(*shares, strict=True)] == [sorted(batch) for batch in whole]
