"""Which files and bytes the digest of data reads, and what it makes of values."""

import hashlib
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trunkline import TrunklineError
from trunkline.datamodules.base import TrunklineDataModule
from trunkline.datamodules.content_digest import (
    blocks,
    plain_digest,
    plain_value,
    sampled_digest,
    spaced,
    stored_digest,
)


def test_few_files_of_many_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """64 of each split, the first and the last among them; by hand: 63 steps of 199/63 files."""
    opened: list[str] = []
    files = [tmp_path / f"{n:03d}" for n in range(200)]
    for file in files:
        file.write_bytes(file.name.encode())
    real = Path.open
    monkeypatch.setattr(Path, "open", lambda self, *args: (opened.append(self.name), real(self, *args))[1])
    sampled_digest(200, lambda row: [files[row]])
    assert sorted(opened) == [f"{int(n * 199 / 63 + 1e-9):03d}" for n in range(64)]
    assert (spaced(1), spaced(0), spaced(3)) == ([0], [], [0, 1, 2])


@pytest.mark.parametrize("size", [0, 1, 1 << 20, (1 << 20) + 1, 5_000_011])
def test_a_mebibyte_of_a_file_is_read(size: int, tmp_path: Path) -> None:
    """All of a small file; of a larger one four quarters of a mebibyte, at the beginning, at both thirds and at its
    end.
    """
    quarter = 1 << 18
    last = size - quarter
    expected = [(0, size)] if size <= 1 << 20 else [(n * last // 3, quarter) for n in range(4)]
    assert blocks(size) == expected
    content = np.random.default_rng(size).bytes(size)
    (tmp_path / "a").write_bytes(content)
    seen = b"".join(content[first : first + number] for first, number in expected)
    found = hashlib.blake2b(f"{size} ".encode() + seen, digest_size=8).hexdigest()
    assert stored_digest(tmp_path / "a") == stored_digest(content) == found


def test_files_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A broken file is the matter of whoever reads it; one that another machine can read is a difference."""
    assert stored_digest(tmp_path / "none") == stored_digest(tmp_path) == "no file"
    (tmp_path / "a").write_bytes(b"x")

    def refuse(*_: Any) -> None:
        raise PermissionError

    monkeypatch.setattr(Path, "open", refuse)
    assert stored_digest(tmp_path / "a") == "PermissionError"


def test_the_place_of_files_that_match_a_pattern(tmp_path: Path) -> None:
    expected = ["pattern", "cc-{00..03}/*.tar"]
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        assert plain_value(str(tmp_path / place / "cc-{00..03}/*.tar")) == expected
    assert plain_value("a{b,c}") == "a{b,c}"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (np.int64(1), np.int64(2)),
        (np.arange(3), np.arange(1, 4)),
        (b"a", b"b"),
        (date(2026, 1, 1), date(2026, 1, 2)),
        (Decimal("0.1"), Decimal("0.2")),
    ],
)
def test_values_that_json_has_not_are_seen(one: Any, other: Any) -> None:
    """Such as a sum that the user's own `data_key` returns, or a cell of a table."""
    assert plain_digest({"train": [one]}) == plain_digest({"train": [one]}) != plain_digest({"train": [other]})


@pytest.mark.parametrize("name", ["settings", "tokenizers"])
def test_names_that_the_digest_has_itself_are_refused(name: str) -> None:
    class Own(TrunklineDataModule):
        def data_key(self) -> dict[str, Any]:
            return {name: 1}

    with pytest.raises(TrunklineError, match=f"Own.data_key returns values named '{name}'.*another name"):
        Own().digest()
