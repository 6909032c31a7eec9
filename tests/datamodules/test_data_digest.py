"""The digest of what training reads."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from own_task import CloudData

from trunkline.datamodules.base import TrunklineDataModule


@dataclass
class Shake:
    width: float = 0.1


@dataclass(kw_only=True, eq=False, repr=False)
class FolderOfClouds(CloudData):
    folder: Path | None = None
    shake: Shake = field(default_factory=Shake)
    names: list[str] = field(default_factory=list)
    content: ClassVar[list[Any]] = []

    def data_key(self) -> list[Any]:
        return self.content


def digest(content: list[Any] | None = None, **fields: Any) -> str | None:
    data = FolderOfClouds(**fields)
    data.content = content or []  # type: ignore[misc]
    data.setup("fit")
    return data.digest()


def test_digest_changes_with_what_is_read_and_with_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    plain = digest()
    assert re.fullmatch("[0-9a-f]{16}", str(plain))
    assert digest(batch_size=6, eval_batch_size=3, num_workers=2) == plain
    assert digest(folder=tmp_path / "a") == digest(folder=tmp_path / "b")  # the same data in another place
    changed: list[dict[str, Any]] = [
        {"seed": 1},
        {"rows": 12},
        {"shake": Shake(0.2)},
        {"names": ["x"]},
        {"content": ["x"]},
    ]
    assert len({plain, digest(folder=tmp_path), *(digest(**fields) for fields in changed)}) == 2 + len(changed)


def test_no_digest_of_a_datamodule_that_says_nothing() -> None:
    assert TrunklineDataModule().digest() is None
