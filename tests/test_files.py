"""Files appear whole or not at all, in order, and are known again; what is wrong with a checkpoint is said."""

import errno
import fcntl
import hashlib
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import Timeout
from safetensors.torch import load_file, save_file

from trunkline import TrunklineError
from trunkline.files import (
    atomic_write,
    cannot_write,
    digest,
    digest_file,
    digests,
    find_fault,
    in_use,
    known_digests,
    load_checkpoint,
    lock,
    read_json,
    remove_unused,
    replacing,
    write_json,
)


def files(folder: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in sorted(folder.iterdir())}


# --- writing


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path) -> None:
    def parts() -> Iterator[bytes]:
        yield b"new"
        raise KeyboardInterrupt

    atomic_write(tmp_path / "a", [b"old"])
    with pytest.raises(KeyboardInterrupt):
        atomic_write(tmp_path / "a", parts())
    assert files(tmp_path) == {"a": b"old"}


def test_others_may_read_what_is_written(tmp_path: Path) -> None:
    """A file has the rights that the user's mask gives any new file, so that a group can share a cache."""
    mask = os.umask(0o027)
    try:
        atomic_write(tmp_path / "new" / "a", [b"1", memoryview(b"2")])
    finally:
        os.umask(mask)
    assert files(tmp_path / "new") == {"a": b"12"}
    assert (tmp_path / "new" / "a").stat().st_mode & 0o777 == 0o640


def write_both(folder: Path) -> None:
    with replacing(folder / "first", folder / "second") as (first, second):
        second.write_bytes(b"new")
        first.write_bytes(b"new")


def test_order_of_what_reaches_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Contents before names, the first name before the second, the folder last."""
    calls: list[str] = []

    def recorded(name: str) -> Callable[..., Any]:
        real = getattr(os, name)

        def function(what: Any, *rest: Any) -> Any:
            path = os.readlink(f"/proc/self/fd/{what}") if name == "fsync" else str(rest[0])
            calls.append(f"{name} {Path(path).name.split('.')[:2]}")
            return real(what, *rest)

        return function

    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, recorded(name))
    write_both(tmp_path)
    assert calls == [
        "fsync ['', 'first']",
        "fsync ['', 'second']",
        "replace ['first']",
        "replace ['second']",
        f"fsync {tmp_path.name.split('.')[:2]}",
    ]
    assert files(tmp_path) == {"first": b"new", "second": b"new"}


@pytest.mark.parametrize("failing", [1, 2, 3, 4, 5])
def test_a_failure_leaves_old_or_new_files_and_no_others(
    failing: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("first", "second"):
        (tmp_path / name).write_bytes(b"old")
    calls: list[int] = []

    def fails(real: Callable[..., Any]) -> Callable[..., Any]:
        def function(*arguments: Any) -> Any:
            calls.append(1)
            if len(calls) == failing:
                raise OSError(errno.EIO, "Input/output error")
            return real(*arguments)

        return function

    for function in ("fsync", "replace"):
        monkeypatch.setattr(os, function, fails(getattr(os, function)))
    with pytest.raises(OSError, match="Input/output error"):
        write_both(tmp_path)
    renamed = [b"new"] * max(0, failing - 3)
    assert list(files(tmp_path).values()) == [*renamed, b"old", b"old"][:2]
    assert set(files(tmp_path)) == {"first", "second"}


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device; free some space, or choose"),
        (OSError(errno.EDQUOT, "Quota exceeded"), "Quota exceeded; free some space, or choose"),
        (OSError(errno.EACCES, "Permission denied"), "Permission denied; choose"),
        (RuntimeError("file write failed"), "file write failed; free some space, or choose"),
    ],
)
def test_message_of_a_failed_write(error: Any, words: str, tmp_path: Path) -> None:
    path = tmp_path / "not there" / "nor this" / "a.ckpt"
    found = cannot_write(path, error, "data.place", ", then go on")
    start, _, rest = str(found).partition(" MB free there): ")
    assert start.startswith(f"cannot write {path} (")
    assert float(start.rpartition("(")[2].replace(",", "")) >= 0
    assert rest == f"{words} another place, then go on"
    assert found.field == "data.place"
    known = str(cannot_write(path, error, "data.place", needed=1_234_560_000))
    assert known.startswith(f"cannot write {path} (needs 1,234.6 MB, ")


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x")
    for write in (lambda path: atomic_write(path, [b""]), lock):
        with pytest.raises(TrunklineError, match=r"cannot write .*/a/b/c .*choose another cache_dir") as caught:
            write(tmp_path / "a" / "b" / "c")
        assert caught.value.field == "data.cache_dir"


def test_json(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    assert read_json(path) is None
    write_json(path, {"é": [1, None]})
    assert read_json(path) == {"é": [1, None]}
    path.write_text('{"torn')
    assert read_json(path) is None


def try_lock(path: str, answer: Any) -> None:
    try:
        lock(Path(path)).acquire(timeout=0)
    except Timeout:
        answer.put("taken")
    else:
        answer.put("free")


def test_lock_between_processes(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    answer, path = context.Queue(), tmp_path / "new" / "a.lock"

    def ask() -> str:
        process = context.Process(target=try_lock, args=(str(path), answer))
        process.start()
        process.join()
        return answer.get(timeout=60)

    with lock(path):
        assert ask() == "taken"
    assert ask() == "free"
    with lock(path):  # the process that had it has ended
        assert ask() == "taken"


def keep_in_use(path: str, ready: Any, go_on: Any) -> None:
    with in_use(Path(path)):
        ready.set()
        go_on.wait(60)


def test_a_file_in_use_is_not_removed(tmp_path: Path) -> None:
    """Neither by this process nor by another; once its writer has been killed, it is."""
    context = multiprocessing.get_context("fork")
    ready, go_on, path = context.Event(), context.Event(), tmp_path / "a.tmp"
    process = context.Process(target=keep_in_use, args=(str(path), ready, go_on))
    process.start()
    assert ready.wait(60)
    remove_unused([path, tmp_path / "not there"])
    assert files(tmp_path) == {"a.tmp": b""}
    process.kill()
    process.join()
    (tmp_path / "folder.tmp").mkdir()
    with in_use(tmp_path / "mine.tmp"):
        remove_unused(sorted(tmp_path.iterdir()))
        assert {path.name for path in tmp_path.iterdir()} == {"folder.tmp", "mine.tmp"}
    remove_unused([tmp_path / "mine.tmp"])
    assert {path.name for path in tmp_path.iterdir()} == {"folder.tmp"}


def test_a_file_that_vanished_before_it_was_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, path, lock_file = [], tmp_path / "a.tmp", fcntl.flock

    def late(stream: Any, how: int) -> None:
        if not calls:
            path.unlink()  # as another process does that finds it not yet locked
        calls.append(how)
        lock_file(stream, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with in_use(path):
        assert path.exists()
    assert len(calls) == 2


def test_without_locks_only_old_files_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(stream: Any, how: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with in_use(tmp_path / "new"):
        pass
    for hours in (23, 25):
        (tmp_path / f"{hours} hours").touch()
        then = time.time() - hours * 3600
        os.utime(tmp_path / f"{hours} hours", (then, then))
    remove_unused(list(tmp_path.iterdir()))
    assert set(files(tmp_path)) == {"new", "23 hours"}


# --- knowing a file again


def test_digests_are_remembered_until_a_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, hashed = tmp_path / "a.txt", []
    real = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda *a: (hashed.append(1), real(*a))[1])
    path.write_text("one")
    digests([path], tmp_path)
    assert len(hashed) == 1  # too young to be remembered
    os.utime(path, ns=(0, 10**9))
    first = digests([path], tmp_path)
    assert first == [hashlib.blake2b(b"one", digest_size=20).hexdigest()]
    assert digests([path], tmp_path) == first
    assert len(hashed) == 2
    path.write_text("two")
    os.utime(path, ns=(0, 2 * 10**9))
    assert digests([path], tmp_path) != first
    (tmp_path / "digests.json").write_text("{ torn")
    assert digests([path], tmp_path) != first
    assert len(hashed) == 4


def test_a_file_that_cannot_be_digested(tmp_path: Path) -> None:
    with pytest.raises(TrunklineError, match=r"cannot read .*/none: No such file or directory; check its permissions"):
        digests([tmp_path / "none"], tmp_path)


# --- checkpoints


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "a.ckpt"
    torch.save({"x": torch.arange(3)}, path)
    digest_file(path).write_text(f"{digest(path)}\n{'0' * 64}\n")
    return path


def test_digest_beside_a_checkpoint(checkpoint: Path) -> None:
    assert digest_file(checkpoint).name == "a.ckpt.sha256"
    assert known_digests(checkpoint) == [hashlib.sha256(checkpoint.read_bytes()).hexdigest(), "0" * 64]
    assert find_fault(checkpoint) is None
    digest_file(checkpoint).unlink()
    assert known_digests(checkpoint) == []
    assert find_fault(checkpoint) is None


@pytest.mark.parametrize("mmap", [None, True])
def test_load_checkpoint(mmap: bool | None, checkpoint: Path) -> None:
    assert load_checkpoint(checkpoint, mmap=mmap)["x"].tolist() == [0, 1, 2]
    for damaged, words in ((b"", "is empty"), (b"x", r"is damaged: it does not match its \.sha256 file")):
        checkpoint.write_bytes(damaged)
        with pytest.raises(TrunklineError, match=f"a.ckpt {words}; .*resume=auto") as caught:
            load_checkpoint(checkpoint, mmap=mmap, field="data.tokenizer")
        assert caught.value.field == "data.tokenizer"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (lambda: [1, 2], "not a checkpoint of a training run: it holds a list"),
        (lambda: {"x": Path("a")}, "not a checkpoint of plain data: .*could run code"),
    ],
)
@pytest.mark.parametrize("mmap", [None, True])
def test_what_is_no_checkpoint(content: Callable[[], Any], words: str, mmap: bool | None, tmp_path: Path) -> None:
    torch.save(content(), tmp_path / "a.ckpt")
    with pytest.raises(TrunklineError, match=f"a.ckpt is {words}") as caught:
        load_checkpoint(tmp_path / "a.ckpt", mmap=mmap, field="resume")
    assert caught.value.field == "resume"


def test_importing_is_light() -> None:
    """The package itself imports nothing of it, and it imports no torch."""
    code = (
        "import sys, trunkline; print('trunkline.files' in sys.modules); "
        "import trunkline.files; print('torch' in sys.modules, 'numpy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False", "False"]


def test_safetensors_files_can_be_read_by_others(tmp_path: Path) -> None:
    """The library makes files that only their owner may read: of no use on a cluster."""
    (tmp_path / "plain").touch()
    with replacing(tmp_path / "ours") as (temporary,):
        save_file({"a": torch.ones(2)}, temporary)
    modes = {name: (tmp_path / name).stat().st_mode & 0o777 for name in ("plain", "ours")}
    assert modes["ours"] == modes["plain"]
    assert load_file(tmp_path / "ours")["a"].tolist() == [1, 1]
