from pathlib import Path

import pytest

from trunkline import TrunklineError
from trunkline.datamodules.folders import files_below


def test_files_below(tmp_path: Path) -> None:
    for name in ("b.png", "a/c.PNG", "a/notes.txt", "a/.hidden.png", ".cache/d.png", "e.jpg"):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.touch()
    found = [tmp_path / name for name in ("a/c.PNG", "b.png", "e.jpg")]
    assert files_below(tmp_path, (".png", ".jpg"), "image", "data.source") == found
    assert files_below(str(tmp_path), (".jpg",), "image", "data.source") == found[2:]


def test_nothing_below(tmp_path: Path) -> None:
    with pytest.raises(
        TrunklineError, match=r"^source=.*nowhere is not a folder; give one that holds images$"
    ) as error:
        files_below(tmp_path / "nowhere", (".png",), "image", "data.source")
    assert error.value.field == "data.source"
    with pytest.raises(TrunklineError, match=r"^images=.* holds no image file \(\.png \.jpg\); give one that does$"):
        files_below(tmp_path, (".png", ".jpg"), "image", "images")
