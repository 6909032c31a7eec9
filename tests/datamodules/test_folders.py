"""Files below a folder: each real file once."""

import os
import pickle
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from trunkline.datamodules import folders
from trunkline.datamodules.folders import Visited, files_below, listed_files


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a/1.png", "a/2.png", "b/3.png", ".hidden/4.png", "b/.5.png", "b/note.txt"):
        (tmp_path / "root" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "root" / name).touch()
    return tmp_path / "root"


def found(folder: Path) -> list[str]:
    return [str(file.relative_to(folder)) for file in files_below(folder, (".png",), "image", "data.source")]


def test_circles_of_links_are_walked_once(folder: Path) -> None:
    (folder / "a" / "loop").symlink_to("..")
    (folder / "b" / "itself").symlink_to("itself")
    (folder / "b" / "other").symlink_to("../a")
    assert found(folder) == ["a/1.png", "a/2.png", "b/3.png"]


def test_a_link_to_a_file_that_is_there_itself_is_no_second_file(folder: Path) -> None:
    (folder / "0").mkdir()
    (folder / "0" / "copy.png").symlink_to("../a/1.png")
    (folder / "0" / "lost.png").symlink_to("nowhere.png")
    assert found(folder) == ["a/1.png", "a/2.png", "b/3.png"]


def test_links_to_elsewhere_are_followed(folder: Path, tmp_path: Path) -> None:
    """As those of the hub's cache, whose files stand in another folder or in a hidden one."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "6.png").touch()
    (tmp_path / "blobs" / "0123abc").touch()
    (folder / "blobs").symlink_to(tmp_path / "blobs")
    (folder / "a" / "7.png").symlink_to(tmp_path / "blobs" / "0123abc")
    (folder / "a" / "8.png").symlink_to(folder / ".hidden" / "4.png")
    assert found(folder) == ["a/1.png", "a/2.png", "a/7.png", "a/8.png", "b/3.png", "blobs/6.png"]


# --- lists of large folders


@pytest.fixture
def kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose list is kept: it changed long ago, and two files are many."""
    monkeypatch.setattr(folders, "KEPT_FROM", 2)
    monkeypatch.setattr(folders.time, "time_ns", lambda: (folder / "a").stat().st_mtime_ns + 10**12)
    return folder


def listed(folder: Path) -> list[str]:
    files = listed_files(folder, (".png",), folder.parent / "cache")
    assert [str(file) for file in files] == [str(file) for file in files_below(folder, (".png",), "image", "source")]
    return [str(file.relative_to(folder)) for file in files]


def fail(*arguments: object) -> None:
    pytest.fail("the folder is searched again")


def test_a_list_is_kept_until_a_folder_changes(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = listed_files(kept, (".png",), kept.parent / "cache")
    assert listed(kept) == ["a/1.png", "a/2.png", "b/3.png"]
    with monkeypatch.context() as patch:
        patch.setattr(folders, "walk", fail)
        again = listed_files(kept, (".png",), kept.parent / "cache")
        assert [*again] == [*files]
        assert isinstance(again.content.base, np.memmap)
        for some in (again, again.below("b")):
            assert [*pickle.loads(pickle.dumps(some))] == [*some]
            assert b".png" not in pickle.dumps(some)  # workers map the file too
    (kept / "b" / "3.png").rename(kept / "b" / "4.png")
    assert listed(kept) == ["a/1.png", "a/2.png", "b/4.png"]
    (kept / "c" / "d").mkdir(parents=True)
    (kept / "c" / "d" / "5.png").touch()
    assert listed(kept) == ["a/1.png", "a/2.png", "b/4.png", "c/d/5.png"]
    (kept / "c" / "d" / "5.png").unlink()
    assert listed(kept) == ["a/1.png", "a/2.png", "b/4.png"]
    (file,) = (kept.parent / "cache" / "folders").glob("*.files")
    for broken in (b"", file.read_bytes()[:-5], b"\xff" * 100):
        file.write_bytes(broken)
        assert listed(kept) == ["a/1.png", "a/2.png", "b/4.png"]


def test_a_folder_whose_time_is_set_back_has_changed(kept: Path) -> None:
    """As rsync and tar do it."""
    before = (kept / "b").stat()
    assert listed(kept) == ["a/1.png", "a/2.png", "b/3.png"]
    (kept / "b" / "6.png").touch()
    os.utime(kept / "b", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert listed(kept) == ["a/1.png", "a/2.png", "b/3.png", "b/6.png"]


def test_a_list_that_could_be_old_unseen_is_not_kept(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = kept.parent / "cache"
    (kept / "b" / "lost.png").symlink_to("../../late.png")
    assert listed(kept) == ["a/1.png", "a/2.png", "b/3.png"]
    (kept.parent / "late.png").touch()
    assert listed(kept) == ["a/1.png", "a/2.png", "b/3.png", "b/lost.png"]
    for file in (cache / "folders").glob("*.files"):
        file.unlink()
    # within the tick of a file system's clock, a second change would leave the time as it is
    monkeypatch.setattr(folders.time, "time_ns", lambda: (kept / "a").stat().st_mtime_ns + 10**9)
    assert listed(kept) == ["a/1.png", "a/2.png", "b/3.png", "b/lost.png"]
    assert list((cache / "folders").glob("*.files")) == []


def test_a_small_folder_and_a_cache_that_cannot_be_written(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (kept.parent / "cache").touch()  # a file stands where the cache should be
    assert listed(kept) == ["a/1.png", "a/2.png", "b/3.png"]
    (kept.parent / "cache").unlink()
    monkeypatch.setattr(folders, "KEPT_FROM", 10)
    assert listed(kept) == ["a/1.png", "a/2.png", "b/3.png"]
    assert not (kept.parent / "cache").exists()


def test_names_are_sorted_by_their_parts_as_paths_are(tmp_path: Path) -> None:
    names = ["a/x.png", "a-b/y.png", "a b.png", "a/x/z.png", "a.png", "\U0001f600/1.png", "é/2.png", "a/\udcff.png"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    files = files_below(tmp_path, (".png",), "image", "source")
    assert list(files) == sorted(tmp_path / name for name in names)
    assert files[-1] == list(files)[-1]
    assert files[1:3] == list(files)[1:3]
    with pytest.raises(IndexError):
        files[len(names)]
    groups = {name: [str(file.relative_to(tmp_path)) for file in files[a:b]] for name, a, b in files.groups()}
    assert [name for group in groups.values() for name in group] == [str(f.relative_to(tmp_path)) for f in files]
    assert groups["a"] == ["a/x/z.png", "a/x.png", "a/\udcff.png"]
    assert list(files.below("a")) == sorted(tmp_path / name for name in names if name.startswith("a/"))
    assert list(files.below("a").below("x")) == [tmp_path / "a/x/z.png"]
    assert list(files.below("nothing")) == []


def test_a_list_takes_little_more_than_its_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"n{n // 100:08}/n{n // 100:08}_{n}.JPEG" for n in range(20_000)]

    def made_up(folder: Path, visited: Visited) -> Iterator[str]:
        visited.folders.append(["", 0, 0])
        return iter(names)

    monkeypatch.setattr(folders, "walk", made_up)
    tracemalloc.start()
    files = listed_files(tmp_path, (".jpeg",), tmp_path / "cache")
    size = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert list(files[:1]) == [tmp_path / names[0]]
    assert len(files) == len(names)
    assert size < sum(map(len, names)) + 8 * len(names) + 50_000
    as_paths = sum(sys.getsizeof(path) + sys.getsizeof(str(path)) for path in files)
    assert size * 4 < as_paths
