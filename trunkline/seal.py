"""A checkpoint's SHA-256 inside its own file, so that a copy of the file alone still proves itself.

A file of `torch.save` is a zip archive, and an archive may end with a comment that its readers skip. The comment says
when the file was sealed, and ends with the SHA-256 of everything before that digest. One rename replaces both at once.

A checkpoint that is a folder of files is sealed by one more file, which is written last and ends in the same way.
"""

import hashlib
import os
import re
import struct
import time
from collections.abc import Mapping
from pathlib import Path

SHA_DIGITS = 64
"""Length of a SHA-256 in hexadecimal digits."""
SEAL_PATTERN = re.compile(rb"trunkline saved=(\d{10}\.\d{6}) sha256=([0-9a-f]{64})")
SEAL_LENGTH = len(b"trunkline saved=0000000000.000000 sha256=") + SHA_DIGITS
"""Length of the comment in bytes."""
ARCHIVE_START, ARCHIVE_END = b"PK\x03\x04", b"PK\x05\x06"
"""What an archive begins with, and what its last record begins with."""
END_LENGTH = 22
"""Bytes of the last record, whose last two are the length of the comment behind it."""
MANIFEST = "SHA256SUMS"
"""The file that seals a folder. The program sha256sum checks it too, and warns of its last line, which is the seal."""


def seal(file: Path) -> None:
    """Append the comment to a file that `torch.save` has just written.

    Raises:
        ValueError: if the file does not end as an archive without a comment does.
        OSError: if it cannot be written.
    """
    with file.open("r+b") as stream:
        stream.seek(-END_LENGTH, os.SEEK_END)
        record = stream.read()
        if not record.startswith(ARCHIVE_END) or record[-2:] != b"\0\0":
            raise ValueError(f"{file} is no archive without a comment")
        stream.seek(-2, os.SEEK_END)
        stream.write(struct.pack("<H", SEAL_LENGTH))
        stream.write(f"trunkline saved={time.time():017.6f} sha256=".encode())
    value = _digest(file, file.stat().st_size)
    with file.open("ab") as stream:
        stream.write(value)


def seal_folder(folder: Path, digests: Mapping[str, str] | None = None) -> None:
    """Write `MANIFEST` into a folder: the SHA-256 of each file in it, folders below included.

    Each file is flushed to the disk before the manifest is, so that a manifest never vouches for more than is there.

    Args:
        folder: the folder.
        digests: file name -> what `flushed_digest` said, perhaps in another process. By default all files are read.

    Raises:
        OSError: if a file cannot be read or the manifest not be written.
    """
    if digests is None:
        found = (path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)
        digests = {path.relative_to(folder).as_posix(): flushed_digest(path) for path in found}
    lines = [f"{value}  {name}\n" for name, value in sorted(digests.items())]
    text = ("".join(lines) + f"trunkline saved={time.time():017.6f} sha256=").encode()
    with (folder / MANIFEST).open("wb") as stream:
        stream.write(text + hashlib.sha256(text).hexdigest().encode())
        stream.flush()
        os.fsync(stream.fileno())


def flushed_digest(file: Path) -> str:
    """Flush a file to the disk, and return its SHA-256 for `seal_folder`.

    Raises:
        OSError: if it cannot be flushed or read.
    """
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
    return _digest(file).decode()


def proves_itself(file: Path) -> bool | None:
    """Whether a file is as `seal` left it: False if it is damaged, None if it carries no seal.

    One flipped bit is noticed wherever it is, in the comment and in its length too. An archive that was cut short is
    damaged, whether it had a seal or not. The same holds for a folder that `seal_folder` sealed; files that were added
    to it later do not matter.
    """
    if file.is_dir():
        return _folder_proves_itself(file)
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(len(ARCHIVE_START))
        stream.seek(max(0, size - END_LENGTH - SEAL_LENGTH - 0xFFFF))
        tail = stream.read()
    comment = tail[-SEAL_LENGTH:]
    if comment.startswith(b"trunkline") or tail[-SEAL_LENGTH - END_LENGTH :].startswith(
        ARCHIVE_END
    ):  # no single bit hides both
        found = SEAL_PATTERN.fullmatch(comment)
        return found is not None and found[2] == _digest(file, size - SHA_DIGITS)
    if start != ARCHIVE_START:
        return None
    record = tail.rfind(ARCHIVE_END)
    stated = tail[record + END_LENGTH - 2 : record + END_LENGTH]
    whole = record >= 0 and int.from_bytes(stated, "little") == len(tail) - record - END_LENGTH
    return None if whole else False


def sealed_at(file: Path) -> float | None:
    """When a file or folder was sealed, in seconds since 1970; None if it carries no seal. Copying keeps it."""
    if file.is_dir():
        return sealed_at(file / MANIFEST) if (file / MANIFEST).is_file() else None
    with file.open("rb") as stream:
        stream.seek(max(0, file.stat().st_size - SEAL_LENGTH))
        found = SEAL_PATTERN.fullmatch(stream.read())
    return None if found is None else float(found[1])


def _folder_proves_itself(folder: Path) -> bool | None:
    """As `proves_itself`."""
    if not (folder / MANIFEST).is_file():
        return None
    text = (folder / MANIFEST).read_bytes()
    body, found = text[:-SEAL_LENGTH], SEAL_PATTERN.fullmatch(text[-SEAL_LENGTH:])
    if found is None or found[2] != hashlib.sha256(text[:-SHA_DIGITS]).hexdigest().encode():
        return False
    for line in body.decode().split("\n")[:-1]:
        value, _, name = line.partition("  ")
        if not (folder / name).is_file() or _digest(folder / name) != value.encode():
            return False
    return True


def _digest(file: Path, size: int | None = None) -> bytes:
    """SHA-256 of a file's first `size` bytes, or of all of it, in hexadecimal digits."""
    value = hashlib.sha256()
    size = file.stat().st_size if size is None else size
    with file.open("rb") as stream:
        while size > 0 and (part := stream.read(min(size, 1 << 20))):
            value.update(part)
            size -= len(part)
    return value.hexdigest().encode()
