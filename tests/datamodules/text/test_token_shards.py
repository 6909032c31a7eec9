"""Tokens on disk: exactly the text's, once, whole or not at all, whatever interrupts the work."""

import errno
import io
import json
import multiprocessing
import os
import pickle
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models

from trunkline import TrunklineError
from trunkline.datamodules.text import preparation
from trunkline.datamodules.text.preparation import Preparation, default_cache
from trunkline.datamodules.text.text_sources import open_text
from trunkline.datamodules.text.token_shards import INDEX, TokenStream, token_type
from trunkline.datamodules.tokenizers import end_of_text_id
from trunkline.files import file_state

SHARES = {"train": 0.8, "val": 0.2}


@pytest.fixture(autouse=True)
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparation, "GROUP_BYTES", 4000)
    monkeypatch.setattr(preparation, "BATCH_BYTES", 700)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """200 documents of 0 to 199 words."""
    path = tmp_path / "in.jsonl"
    texts = [" ".join(f"w{n * k % 97}" for k in range(n % 50)) + "\n" for n in range(200)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def prepared(path: Path, cache: Path, tokenizer: str = "bpe", size: int | None = 300, **shares: float) -> Preparation:
    result = Preparation([(open_text(str(path), "text"), shares or SHARES)], tokenizer, size, cache)
    result.prepare()
    return result


def files(folder: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in sorted(folder.iterdir())}


# --- what is written


def test_shards_hold_each_document_in_order_with_its_end(corpus: Path, tmp_path: Path) -> None:
    done = prepared(corpus, tmp_path / "cache")
    end = end_of_text_id(done.tokenizer)
    expected: dict[str, list[int]] = {"train": [], "val": []}
    ends: dict[str, list[int]] = {"train": [], "val": []}
    size = dict.fromkeys(SHARES, 0)
    for piece in done.pieces():
        expected[piece.split] += [*done.tokenizer.encode(piece.text).ids, end]
        ends[piece.split].append(len(expected[piece.split]))
        size[piece.split] += len(piece.text.encode())
    index = done.index()
    assert index is not None
    assert index["dtype"] == "uint16"
    for split in SHARES:
        stream = done.stream(split)
        assert len(stream.shards) > 3
        assert stream.read(0, len(stream)).tolist() == expected[split]
        assert stream.document_ends().tolist() == ends[split]
        entry = index["splits"][split]
        assert (entry["tokens"], entry["documents"], entry["bytes"]) == (
            len(expected[split]),
            len(ends[split]),
            size[split],
        )


def test_a_text_in_pieces_is_one_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trunkline.datamodules.tables.PIECE", 100)
    text = "".join(f"line {n}  of this text é\n" for n in range(1000))
    (tmp_path / "in.txt").write_text(text)
    done = prepared(tmp_path / "in.txt", tmp_path / "cache")
    cut = int(len(text.encode()) * 0.8)
    train = text.encode()[:cut].decode("utf-8", "ignore")
    stream = done.stream("train")
    assert stream.read(0, len(stream)).tolist() == [*done.tokenizer.encode(train).ids, 0]
    assert stream.document_ends().tolist() == [len(stream)]
    assert done.stream("val").document_ends().tolist() == [len(done.stream("val"))]


@pytest.mark.parametrize(("size", "dtype"), [(65536, "uint16"), (65537, "uint32")])
def test_ids_at_the_border_of_16_bits(size: int, dtype: str, tmp_path: Path) -> None:
    assert np.dtype(token_type(size)).name == dtype
    vocab = {"<eos>": 0, "?": 1, "last": size - 1}
    Tokenizer(models.WordLevel(vocab, unk_token="?")).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "in.jsonl").write_text('{"text": "last"}\n{"text": "x"}\n')
    done = prepared(tmp_path / "in.jsonl", tmp_path / "cache", str(tmp_path / "tokenizer.json"), None, train=1.0)
    stream = done.stream("train")
    assert stream.read(0, 4).tolist() == [size - 1, 0, 1, 0]
    assert stream.read(0, 4).dtype == dtype
    assert sum(f.stat().st_size for f in done.folder.glob("*.bin")) == 4 * np.dtype(dtype).itemsize


def test_sources_of_their_own(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "val.txt").write_text("a b c")
    sources = [
        (open_text(str(corpus), "text"), {"train": 1.0}),
        (open_text(str(tmp_path / "val.txt"), "text"), {"val": 1.0}),
    ]
    done = Preparation(sources, "bpe", 300, tmp_path / "cache")
    stream = done.stream("val")
    assert done.tokenizer.decode(stream.read(0, len(stream)).tolist()) == "a b c"
    assert done.prepare()["splits"]["train"]["documents"] == 200


# --- reading


def test_reads_across_shards(tmp_path: Path) -> None:
    sizes, tokens = [3, 1, 5], np.arange(9, dtype=np.uint16) * 7
    names = []
    for n, part in enumerate(np.split(tokens, np.cumsum(sizes)[:-1])):
        part.tofile(tmp_path / f"{n}.bin")
        names.append((f"{n}.bin", len(part)))
    for stream in (
        TokenStream(tmp_path, names, "uint16"),
        pickle.loads(pickle.dumps(TokenStream(tmp_path, names, "uint16"))),
    ):
        assert len(stream) == 9
        for start in range(10):
            for stop in range(start, 10):
                assert stream.read(start, stop).tolist() == tokens[start:stop].tolist()
        for start, stop in ((-1, 2), (0, 10), (5, 4)):
            with pytest.raises(IndexError):
                stream.read(start, stop)


def test_a_pickled_stream_does_not_carry_the_tokens(corpus: Path, tmp_path: Path) -> None:
    stream = prepared(corpus, tmp_path / "cache").stream("train")
    assert len(pickle.dumps(stream)) < 2000 < len(stream)


# --- the cache


def test_a_prepared_text_is_not_read_again(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepared(corpus, tmp_path / "cache")
    before = {f: f.stat().st_mtime_ns for f in first.folder.iterdir()}
    monkeypatch.setattr(Preparation, "pieces", None)
    second = prepared(corpus, tmp_path / "cache")
    assert second.folder == first.folder
    assert {f: f.stat().st_mtime_ns for f in first.folder.iterdir()} == before


def test_the_folder_is_of_the_content_and_the_settings(corpus: Path, tmp_path: Path) -> None:
    def folder(
        path: Path, tokenizer: str = "bpe", size: int | None = 300, column: str = "text", **shares: float
    ) -> str:
        source = open_text(str(path), column)
        return Preparation([(source, shares or SHARES)], tokenizer, size, tmp_path / "cache").folder.name

    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(corpus.read_bytes())
    assert folder(copy) == folder(corpus)
    assert folder(corpus, "chars", None) == folder(corpus, "chars", 500)  # which only pads it
    assert folder(corpus, "bpe", None) == folder(corpus, "bpe", 8192)
    text = tmp_path / "in.txt"
    text.write_bytes(corpus.read_bytes())
    copy.write_bytes(corpus.read_bytes().replace(b"w1", b"w2"))
    others = [
        folder(corpus),
        folder(copy),
        folder(text),
        folder(corpus, size=301),
        folder(corpus, "wordpiece"),
        folder(corpus, "chars"),
        folder(corpus, column="body"),
        folder(corpus, train=0.9, val=0.1),
        folder(corpus, train=0.8, test=0.2),
    ]
    assert len(set(others)) == len(others)


def test_default_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRUNKLINE_CACHE", "/somewhere")
    assert default_cache() == Path("/somewhere")
    monkeypatch.delenv("TRUNKLINE_CACHE")
    assert default_cache() == Path.home() / ".cache" / "trunkline"


# --- interruptions


def prepare_until_killed(corpus: str, cache: str, kill_at: int) -> None:
    real, done = os.fsync, []

    def fsync(descriptor: int) -> None:
        done.append(descriptor)
        if len(done) > kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        real(descriptor)

    os.fsync = fsync
    prepared(Path(corpus), Path(cache))


def test_a_killed_preparation_goes_on_to_the_same_bytes(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.utime(corpus, ns=(0, 10**9))
    whole = files(prepared(corpus, tmp_path / "whole").folder)
    for kill_at in (12, 34):  # before a shard has its name
        cache = tmp_path / f"cache{kill_at}"
        context = multiprocessing.get_context("fork")
        process = context.Process(target=prepare_until_killed, args=(str(corpus), str(cache), kill_at))
        process.start()
        process.join(timeout=60)
        assert process.exitcode == -signal.SIGKILL
        rest = Preparation([(open_text(str(corpus), "text"), SHARES)], "bpe", 300, cache)
        assert rest.index() is None
        assert list(rest.folder.glob(".*.tmp"))
        encoded: list[int] = []
        real = preparation.add
        monkeypatch.setattr(preparation, "add", lambda *a, real=real, n=encoded: (n.append(len(a[1])), real(*a))[1])
        groups = len(list(rest.folder.glob("group-*.json")))
        rest.prepare()
        monkeypatch.undo()
        monkeypatch.setattr(preparation, "GROUP_BYTES", 4000)
        monkeypatch.setattr(preparation, "BATCH_BYTES", 700)
        assert files(rest.folder) == whole
        if groups:
            skipped = json.loads(whole[f"group-{groups - 1:05d}.json"])["pieces"]
            assert sum(encoded) == json.loads(whole[max(n for n in whole if n.startswith("group"))])["pieces"] - skipped
    assert groups > 0


@pytest.mark.parametrize("damage", ["short", "missing", "index", "save_point", "ends"])
def test_a_damaged_cache_is_mended(damage: str, corpus: Path, tmp_path: Path) -> None:
    done = prepared(corpus, tmp_path / "cache")
    whole = files(done.folder)
    path = {"index": done.folder / INDEX, "save_point": done.folder / "group-00001.json"}.get(
        damage, done.folder / "train-00002.bin"
    )
    if damage == "missing":
        path.unlink()
    elif damage == "ends":
        (done.folder / "train-00002.ends.npy").unlink()
    else:
        os.truncate(path, path.stat().st_size // 2)
    if damage == "save_point":
        (done.folder / INDEX).unlink()
    assert files(prepared(corpus, tmp_path / "cache").folder) == whole


class FullDisk(io.FileIO):
    """Takes some bytes and no more."""

    def write(self, content: Any) -> int:
        super().write(bytes(content)[: len(content) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("name", ["train-00001.bin", "val-00000.ends.npy", "group-00001.json", "tokenizer.json", INDEX])
def test_a_full_disk_leaves_no_torn_file(
    name: str, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path.open

    def full(path: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
        return FullDisk(path, "w") if f".{name}." in path.name else real(path, mode, *args, **options)

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(TrunklineError) as caught:
        prepared(corpus, tmp_path / "cache")
    message = str(caught.value)
    assert f"/{name} (" in message
    assert " MB free there): No space left on device; free some space, or choose another cache_dir" in message
    assert caught.value.field == "data.cache_dir"
    monkeypatch.setattr(Path, "open", real)
    folder = next(f for f in (tmp_path / "cache").iterdir() if f.is_dir())
    assert not list(folder.glob(".*"))
    assert not (folder / name).exists()
    assert not (folder / INDEX).exists()
    assert files(prepared(corpus, tmp_path / "cache").folder) == files(prepared(corpus, tmp_path / "other").folder)


def test_a_folder_that_cannot_be_made(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(TrunklineError, match=r"cannot write .*/file/cache/.*Not a directory; choose another cache_dir"):
        prepared(corpus, tmp_path / "file" / "cache")


def test_a_file_that_changes_meanwhile_is_refused(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = preparation.add

    def add(*args: Any) -> int:
        if file_state(corpus)[1] != 5:
            os.utime(corpus, ns=(5, 5))
        return real(*args)

    monkeypatch.setattr(preparation, "add", add)
    with pytest.raises(TrunklineError, match=r"in\.jsonl changed while it was read"):
        prepared(corpus, tmp_path / "cache")


@pytest.mark.parametrize(("split", "flag"), [("val", "val_fraction"), ("test", "test_fraction")])
def test_an_empty_split_is_refused(split: str, flag: str, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    with pytest.raises(TrunklineError) as caught:
        prepared(tmp_path / "in.jsonl", tmp_path / "cache", train=0.9, **{split: 0.1})
    assert f"the {split} split is empty" in str(caught.value)
    assert f"raise {flag}" in str(caught.value)
    assert f"{split}_source" in str(caught.value)


# --- several processes


def prepare_in_a_process(corpus: str, cache: str, start: Any, waiting: Any, results: Any) -> None:
    encoded = []
    real = preparation.add

    def add(*args: Any) -> int:
        if not encoded:  # the others find the lock taken
            for _ in range(2):
                waiting.acquire()
        encoded.append(1)
        return real(*args)

    def report(*args: Any, **options: Any) -> None:
        print(*args, **options)
        waiting.release()

    preparation.add = add
    preparation.print = report  # type: ignore[attr-defined]
    start.wait()
    done = prepared(Path(corpus), Path(cache))
    results.put((len(encoded), files(done.folder), done.tokenizer.to_str()))


def test_processes_at_once_do_the_work_once(corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    context = multiprocessing.get_context("fork")
    start, waiting, results = context.Barrier(3), context.Semaphore(0), context.Queue()
    arguments = (str(corpus), str(tmp_path / "cache"), start, waiting, results)
    processes = [context.Process(target=prepare_in_a_process, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    answers = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(timeout=60)
    assert sorted(count > 0 for count, _, _ in answers) == [False, False, True]
    assert answers[0][1:] == answers[1][1:] == answers[2][1:]
    assert "waiting for another process that prepares" in capfd.readouterr().err
