"""Speech for tests of this folder."""

from pathlib import Path
from typing import Any

import pytest
from small_speech import SPOKEN, Make, log_mel
from sound_files import write_spoken

from trunkline.datamodules import SpeechData


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Makes speech of `SPOKEN` recordings, or of another source."""

    def made(source: str | None = None, **options: Any) -> SpeechData:
        fields: dict[str, Any] = {"log_mel": log_mel(), "batch_size": 4, "num_workers": 0, "val_fraction": 0.25}
        fields |= {"cache_dir": str(tmp_path / "cache"), **options}
        return SpeechData(source or write_spoken(tmp_path, SPOKEN), **fields)

    return made
