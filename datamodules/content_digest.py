"""What tells data from other data at a bounded cost: some rows of each split are looked at, and some bytes of each."""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, is_dataclass
from datetime import date, time, timedelta
from decimal import Decimal
from io import BytesIO
from itertools import chain
from pathlib import Path
from typing import Any

DIGEST_FORMAT = 2
"""Version of the digests of data; those of another version are not compared. It changes with what is digested."""
SAMPLED = 64
"""Most rows of a split that are looked at."""
MOST_BYTES = 1 << 20
"""Most bytes of a row's file that are read."""
BLOCKS = 4
"""Places of a larger file at which they are read: a copy that broke off may be whole at its beginning."""
READERS = 8
"""Files that are read at once: on a network disk this is a matter of waiting."""
TOKENIZER_PART = "tokenizers"
"""The part of a digest that is of the tokenizers."""
SETTINGS = "settings"
"""The part of a digest that is not a hash: the fields of the datamodule, by name."""


def short_digest(content: str | bytes | memoryview) -> str:
    """16 hexadecimal digits that tell a content from others."""
    content = content.encode() if isinstance(content, str) else content
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def value_text(value: Any) -> str:
    """Values (numbers, texts, bytes, times, arrays, lists, dictionaries in any order) as a text; of others the type."""
    return json.dumps(value, sort_keys=True, default=_as_json)


def _as_json(value: Any) -> Any:
    if isinstance(value, bytes):
        return short_digest(value)
    if isinstance(value, date | time | timedelta | Decimal):
        return str(value)
    return value.tolist() if hasattr(value, "tolist") else type(value).__qualname__


def plain_digest(value: Any) -> str:
    """The short digest of `value_text`."""
    return short_digest(value_text(value))


def plain_value(value: Any) -> Any:
    """A field's value as plain data without the place of local files, which is another one on another machine."""
    if isinstance(value, str | Path) and os.path.exists(value):
        return ["folder"] if os.path.isdir(value) else ["file", os.path.getsize(value)]
    if isinstance(value, str) and (pattern := re.match(r"([^{*?[]*/)[^/]*[{*?[]", value)) and os.path.isdir(pattern[1]):
        return ["pattern", value.removeprefix(pattern[1])]
    if isinstance(value, dict):
        return {str(key): plain_value(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain_value(part) for part in value]
    if is_dataclass(value) and not isinstance(value, type):
        return plain_value(asdict(value))
    return value if value is None or isinstance(value, str | int | float) else type(value).__qualname__


def spaced(count: int, most: int = SAMPLED) -> list[int]:
    """At most so many of the numbers from 0 to `count` - 1, evenly spaced, the first and the last one among them."""
    kept = min(count, most)
    return [n * (count - 1) // max(kept - 1, 1) for n in range(kept)]


def blocks(size: int, most: int = MOST_BYTES, count: int = BLOCKS) -> list[tuple[int, int]]:
    """(first, number) of the bytes of a file that are read: all, or `most` of them in `count` blocks.

    The first block is at the beginning of the file, the last one at its end, and the others are evenly between them.
    """
    if size <= most:
        return [(0, size)]
    return [(first, most // count) for first in spaced(size - most // count + 1, count)]


def stored_digest(stored: bytes | Path) -> str:
    """The digest of the size and of some bytes of a content, or of a file; for a file, else what is wrong with it."""
    try:
        if isinstance(stored, Path) and not stored.is_file():  # such as a pipe, whose end never comes
            return "no file"
        with BytesIO(stored) if isinstance(stored, bytes) else stored.open("rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            found = hashlib.blake2b(f"{size} ".encode(), digest_size=8)
            for first, number in blocks(size):
                stream.seek(first)
                found.update(stream.read(number))
    except OSError as error:
        return type(error).__name__
    return found.hexdigest()


def sampled_digest(count: int, stored: Callable[[int], Iterable[bytes | Path]]) -> str:
    """The digest of some of the rows of a split.

    Args:
        count: number of rows.
        stored: what is stored of a row: contents, and paths of files, of which only the content counts.
    """
    pieces = [piece for row in spaced(count) for piece in stored(row)]
    files = list(dict.fromkeys(piece for piece in pieces if isinstance(piece, Path)))
    shares = [files[reader::READERS] for reader in range(READERS)]
    with ThreadPoolExecutor(READERS) as pool:  # a share for each: handing over single files takes longer than reading
        found = list(pool.map(lambda share: [stored_digest(file) for file in share], shares))
    known = dict(zip(chain(*shares), chain(*found), strict=True))
    return plain_digest([known[piece] if isinstance(piece, Path) else stored_digest(piece) for piece in pieces])


def different_parts(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Names of the parts in which two digests differ, such as `train`; of the settings the fields, as `data.seed`.

    A field that only one of them has is of another version of the program, and left out.
    """
    ours, theirs = one.get(SETTINGS) or {}, other.get(SETTINGS) or {}
    names = [name for name in dict.fromkeys([*one, *other]) if name != SETTINGS and one.get(name) != other.get(name)]
    return names + [f"data.{name}" for name in sorted(ours.keys() & theirs.keys()) if ours[name] != theirs[name]]
