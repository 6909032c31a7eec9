"""The timing of commands; no figure is asserted, because machines differ."""

import sys
from pathlib import Path

import pytest

from trunkline.pipelines.benchmarks import start
from trunkline.pipelines.benchmarks.benchmark import benchmark
from trunkline.pipelines.benchmarks.start import COMMANDS, start_times, wait_for


def test_first_line_and_end(tmp_path: Path) -> None:
    """The pauses are the command's own: at least as long as it sleeps."""
    code = "import time; print(1, flush=True); time.sleep(0.5); print(2, flush=True); time.sleep(0.25)"
    wait = wait_for([sys.executable, "-c", code], str(tmp_path))
    assert wait.whole >= wait.first + 0.75
    assert wait.end >= 0.25
    silent = wait_for([sys.executable, "-c", ""], str(tmp_path))
    assert silent.first == silent.whole
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
