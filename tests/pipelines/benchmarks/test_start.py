"""The timing of commands; no figure is asserted, because machines differ."""

import sys
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest

from trunkline.pipelines.benchmarks import start
from trunkline.pipelines.benchmarks.benchmark import benchmark
from trunkline.pipelines.benchmarks.start import COMMANDS, start_times, wait_for


def test_first_line_and_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that ticks whenever it is read: at the start, at what is printed, and at the end."""
    monkeypatch.setattr(start, "time", SimpleNamespace(perf_counter=count().__next__))
    # Not with print: where Python's output is unbuffered, that writes the end of the line by itself.
    assert wait_for([sys.executable, "-c", "import os; os.write(1, b'1')"], str(tmp_path)) == (1, 2, 1)
    silent = wait_for([sys.executable, "-c", ""], str(tmp_path))
    assert silent.first == silent.whole == 1
    assert silent.end == 0


def test_failure(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"failed: what went wrong"):
        wait_for([sys.executable, "-c", "import sys; sys.exit('what went wrong')"], str(tmp_path))


def test_rows(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert {"fit --help", "fit --print_config"} < set(COMMANDS)
    monkeypatch.setattr(start, "COMMANDS", {"version": "--version"})
    (row,) = start_times(1)
    assert row["command"] == "version"
    assert 0 < float(str(row["first"])) <= float(str(row["whole"]))
    assert 0 < float(str(row["ratio"])) < 1  # it imports no torch
    monkeypatch.setattr("trunkline.pipelines.benchmarks.benchmark.start_times", lambda rounds: [row])
    benchmark("start")
    assert f"version: first line {row['first']:.2f} s" in capsys.readouterr().out
