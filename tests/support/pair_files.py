"""Helpers of the tests that read pairs of texts."""

from pathlib import Path
from typing import Any

import datasets
import pytest

from trunkline import TrunklineError
from trunkline.datamodules.hub import NamedSource
from trunkline.datamodules.translation.parallel_sources import open_pairs
from trunkline.datamodules.translation.text_pairs import Pair, PairColumns, PairSource


def opened(source: object, second: object = None, /, field: str = "source", **columns: Any) -> PairSource:
    """A source, or two text files; `columns` are those of `PairColumns`."""
    target = None if second is None else NamedSource(str(second), field.replace("source", "target_source"))
    return open_pairs(NamedSource(str(source), field), target, PairColumns(**columns))


def read(source: object, second: object = None, /, **columns: Any) -> list[Pair]:
    return list(opened(source, second, **columns).pairs())


def texts(pairs: list[Pair]) -> list[tuple[str, str]]:
    return [(pair.source, pair.target) for pair in pairs]


def fault(source: object, second: object = None, /, **columns: Any) -> TrunklineError:
    """The error of a source that cannot be read."""
    with pytest.raises(TrunklineError) as caught:
        read(source, second, **columns)
    assert "\n" not in str(caught.value)
    return caught.value


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def fake_hub(monkeypatch: pytest.MonkeyPatch, rows: list[dict[str, Any]]) -> list[Any]:
    asked: list[Any] = []

    def load(*args: Any, **options: Any) -> list[dict[str, Any]]:
        asked.append((args, options))
        return rows

    monkeypatch.setattr(datasets, "load_dataset", load)
    return asked
