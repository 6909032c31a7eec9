"""Ranges of fields, and names that can only be those of local paths."""

import math
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from trunkline import TrunklineError
from trunkline.names import check_regular, looks_like_path
from trunkline.ranges import check_ranges, check_rising


@pytest.mark.parametrize(
    ("interval", "inside", "outside", "words"),
    [
        ("[1, inf)", [1, 7, None], [0, -3, math.nan, math.inf], "at least 1"),
        ("(0, inf)", [1e-9, [1, 2]], [0, [1, 0], (2.0, -1.0)], "above 0"),
        ("[0, 1]", [0, 1, 0.5], [-0.1, 1.1], "from 0 to 1"),
        ("[0, 1)", [0, 0.99], [1, -1e-9], "from 0 up to below 1"),
        ("(0, 1]", [1, 1e-9], [0, 2], "above 0 and at most 1"),
        ("(0, 1)", [0.5], [0, 1], "above 0 and below 1"),
        ("(-inf, inf)", [-1e300, 0], [math.inf, -math.inf, math.nan], "a finite number"),
    ],
)
def test_intervals(interval: str, inside: list[object], outside: list[object], words: str) -> None:
    for value in inside:
        check_ranges("data", SimpleNamespace(share=value), share=interval)
    for value in outside:
        with pytest.raises(TrunklineError) as caught:
            check_ranges("data", {"share": value}, share=f"{interval}; leave it out")
        assert str(caught.value) == f"share must be {words}, not {value}; leave it out"
        assert caught.value.field == "data.share"


def test_rising_pairs() -> None:
    check_rising("data", SimpleNamespace(scale=(1, 1)), "scale")
    with pytest.raises(TrunklineError, match="scale must be a smallest and a largest number, not 2 and 1"):
        check_rising("data", SimpleNamespace(scale=(2, 1)), "scale")


@pytest.mark.parametrize(
    "name", ["./a", "../a", "/a/b", "~/a", "a/", "a/b/c", "a\\b", "a.txt", "b/a.JSONL", "x.ckpt", "here/a"]
)
def test_paths(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert looks_like_path(name)


@pytest.mark.parametrize("name", ["squad", "owner/name", "google-bert/bert-base-uncased", "mistralai/Mistral-7B-v0.1"])
def test_names_of_the_hub(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert not looks_like_path(name)


def test_pipes_and_devices_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (str(tmp_path / "pipe"), os.devnull):
        with pytest.raises(TrunklineError, match="is not a regular file") as caught:
            check_regular(path, "data.source")
        assert caught.value.field == "data.source"
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file", tmp_path / "missing"):
        check_regular(path)
