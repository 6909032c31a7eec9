"""A checkpoint proves itself by the digest inside it, wherever it was copied, and whatever bit was flipped."""

import os
import re
import shutil
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from trunkline import TrunklineError
from trunkline.files import digest, digest_file, find_fault, load_checkpoint
from trunkline.seal import MANIFEST, SEAL_LENGTH, proves_itself, seal, seal_folder, sealed_at


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    path = tmp_path / "a.ckpt"
    torch.save({"weights": torch.arange(300), "global_step": 7}, path)
    seal(path)
    return path


def flip(path: Path, bit: int) -> None:
    with path.open("r+b") as stream:
        stream.seek(bit // 8)
        byte = stream.read(1)[0]
        stream.seek(bit // 8)
        stream.write(bytes([byte ^ 1 << bit % 8]))


@pytest.mark.parametrize("mmap", [None, True])
def test_torch_reads_a_sealed_file(mmap: bool | None, sealed: Path) -> None:
    assert proves_itself(sealed)
    for read in (load_checkpoint, lambda path, mmap: torch.load(path, weights_only=True, mmap=mmap)):
        content = read(sealed, mmap=mmap)
        assert torch.equal(content["weights"], torch.arange(300))
    assert zipfile.ZipFile(sealed).testzip() is None


def test_any_flipped_bit_is_refused(sealed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is loaded; in the comment and its length, every bit is tried."""
    size = sealed.stat().st_size
    monkeypatch.setattr(torch, "load", lambda *arguments, **options: pytest.fail("it was loaded"))
    for bit in [*range(0, 8 * size, 97), *range(8 * (size - SEAL_LENGTH - 40), 8 * size)]:
        flip(sealed, bit)
        assert proves_itself(sealed) is False, bit
        with pytest.raises(TrunklineError, match="is damaged: it is not as it was saved"):
            load_checkpoint(sealed)
        flip(sealed, bit)
    assert proves_itself(sealed)


def test_cut_or_lengthened(sealed: Path) -> None:
    data = sealed.read_bytes()
    for length in (*range(20, len(data), 61), len(data) - SEAL_LENGTH, len(data) - 1):
        sealed.write_bytes(data[:length])
        assert proves_itself(sealed) is False, length
    sealed.write_bytes(data + b"\n")
    assert proves_itself(sealed) is False


def test_lost_comment(sealed: Path) -> None:
    """Without its comment a file is one of another project: it loads by name, but no resume takes it for valid."""
    data = sealed.read_bytes()[:-SEAL_LENGTH]
    sealed.write_bytes(data[:-2] + b"\0\0")
    assert proves_itself(sealed) is None
    assert find_fault(sealed) is None
    assert load_checkpoint(sealed)["global_step"] == 7
    assert find_fault(sealed, unchecked=False) == f"the checkpoint {sealed} cannot be checked: it holds no digest"


def legacy(path: Path) -> None:
    torch.save({"x": 1}, path, _use_new_zipfile_serialization=False)


def commented(path: Path) -> None:
    torch.save({"x": 1}, path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = b"of somebody else"


@pytest.mark.parametrize("write", [lambda path: torch.save({"x": 1}, path), legacy, commented])
def test_files_of_other_projects_load(write: Callable[[Path], None], tmp_path: Path) -> None:
    write(tmp_path / "b.ckpt")
    assert proves_itself(tmp_path / "b.ckpt") is None
    assert sealed_at(tmp_path / "b.ckpt") is None
    assert load_checkpoint(tmp_path / "b.ckpt") == {"x": 1}


def test_digest_beside_an_older_file(tmp_path: Path) -> None:
    """It is still checked; beside a file that proves itself it does not matter."""
    path = tmp_path / "old.ckpt"
    torch.save({"weights": torch.arange(300)}, path)
    digest_file(path).write_text(digest(path))
    assert find_fault(path, unchecked=False) is None
    flip(path, 4 * path.stat().st_size)
    assert re.search(r"damaged: it does not match its \.sha256", str(find_fault(path)))
    flip(path, 4 * path.stat().st_size)
    seal(path)
    assert find_fault(path, unchecked=False) is None


def test_the_time_stays_when_a_file_is_copied(sealed: Path, tmp_path: Path) -> None:
    before, copy = sealed_at(sealed), tmp_path / "copy.ckpt"
    copy.write_bytes(sealed.read_bytes())
    os.utime(copy, (5, 5))
    assert sealed_at(copy) == before
    assert before is not None
    assert before > 1.7e9


def test_only_a_fresh_archive_is_sealed(sealed: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no archive " * 9)
    for path in (sealed, tmp_path / "text"):
        before = path.read_bytes()
        with pytest.raises(ValueError, match="is no archive without a comment"):
            seal(path)
        assert path.read_bytes() == before


@pytest.fixture
def sealed_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "step=3.ckpt"
    (folder / "inner").mkdir(parents=True)
    for number, name in enumerate((".metadata", "__0_0.distcp", "inner/with two  blanks é")):
        (folder / name).write_bytes(bytes(range(64)) * number)
    seal_folder(folder)
    return folder


def test_a_sealed_folder(sealed_folder: Path, tmp_path: Path) -> None:
    assert proves_itself(sealed_folder)
    assert find_fault(sealed_folder, unchecked=False) is None
    at = sealed_at(sealed_folder)
    assert at is not None
    copy = shutil.copytree(sealed_folder, tmp_path / "copy")
    (copy / "added later").write_text("by somebody else")
    assert proves_itself(copy)
    assert sealed_at(copy) == at
    seal_folder(copy)  # again: the old manifest is no part of the new one
    assert proves_itself(copy)
    assert subprocess.run(["sha256sum", "--check", "--status", MANIFEST], cwd=copy, check=False).returncode == 0


def test_any_flipped_bit_of_a_folder_is_refused(sealed_folder: Path) -> None:
    for path in [path for path in sealed_folder.rglob("*") if path.is_file()]:
        for bit in range(0, 8 * path.stat().st_size, 1 if path.name == MANIFEST else 97):
            flip(path, bit)
            assert proves_itself(sealed_folder) is False, (path, bit)
            flip(path, bit)
    flip(sealed_folder / "__0_0.distcp", 5)
    assert find_fault(sealed_folder) == f"the checkpoint {sealed_folder} is damaged: it is not as it was saved"


def test_a_folder_without_all_its_files(sealed_folder: Path) -> None:
    manifest = (sealed_folder / MANIFEST).read_bytes()
    for length in range(0, len(manifest), 7):
        (sealed_folder / MANIFEST).write_bytes(manifest[:length])
        assert not proves_itself(sealed_folder), length
    (sealed_folder / MANIFEST).write_bytes(manifest)
    (sealed_folder / ".metadata").unlink()  # an empty one
    assert proves_itself(sealed_folder) is False
    (sealed_folder / MANIFEST).unlink()
    assert proves_itself(sealed_folder) is None
    assert sealed_at(sealed_folder) is None
    assert find_fault(sealed_folder) == f"there is no checkpoint {sealed_folder}"


@pytest.mark.slow
def test_an_archive_of_many_tensors(tmp_path: Path) -> None:
    """More than 65,535 parts: zip64, whose end has more records."""
    path = tmp_path / "a.ckpt"
    torch.save({str(number): torch.full((1,), number) for number in range(66_000)}, path)
    assert b"PK\x06\x07" in path.read_bytes()[-100:]
    seal(path)
    for mmap in (None, True):
        assert load_checkpoint(path, mmap=mmap)["65999"].item() == 65999
