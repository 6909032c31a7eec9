"""Files below a folder: each real file once."""

from pathlib import Path

import pytest

from trunkline.datamodules.folders import files_below


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
