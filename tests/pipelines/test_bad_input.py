"""Bad input of every kind, to every command: one message that says what is wrong, and nothing is written or changed."""

import functools
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import docstring_parser
import pytest
from bad_inputs import BadInput, read_table, snapshot, write_files

from trunkline.pipelines.cli import main

CASES = read_table()
LIMIT = 200
"""Seconds after which a command hangs. A command takes at most a few, but the machine may be slow."""


@pytest.fixture(scope="module", autouse=True)
def read_docstrings_once() -> Iterator[None]:
    """Parsers read the docstrings of the same classes again for each command, which is half of their time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(docstring_parser, "parse_from_object", functools.cache(docstring_parser.parse_from_object))
        yield


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bad")
    write_files(folder)
    return folder


@pytest.fixture
def folder(files: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder with the files, where the command runs. What it may keep for later, it keeps elsewhere."""
    monkeypatch.chdir(files)
    monkeypatch.setattr("sys.argv", ["trunkline"])
    monkeypatch.setattr("logging.raiseExceptions", False)  # Lightning's log goes to the stream of an earlier test
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TRUNKLINE_CACHE", str(tmp_path_factory.getbasetemp() / "trunkline"))
    for variable in ("TRUNKLINE_RUN", "PL_GLOBAL_SEED", "PL_SEED_WORKERS", "LOCAL_RANK", "MASTER_ADDR"):
        monkeypatch.setenv(variable, "")  # so that it is restored
        monkeypatch.delenv(variable)
    return files


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    """A block that fails if it takes longer."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"no end after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=case.command, marks=[pytest.mark.slow] * case.slow) for case in CASES]
)
def test_bad_input(case: BadInput, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = snapshot(folder)
    with limited(LIMIT), pytest.raises(SystemExit) as stop:
        main(case.arguments)
    output = capsys.readouterr()
    said = " ".join(output.err.split())
    assert stop.value.code == 2
    assert said.count("error:") == 1
    assert "Traceback" not in output.out + said
    assert "usage:" not in output.out + said
    assert [words for words in case.words if words not in said] == [], said
    assert snapshot(folder) == before


def test_the_table_covers_all_commands() -> None:
    assert len(CASES) == len({case.command for case in CASES})
    assert sum(not case.slow for case in CASES) >= 250
    assert {case.arguments[0] for case in CASES} >= {
        *("fit", "validate", "test", "prepare", "predict", "generate", "fill-mask"),
        *("embed", "search", "transcribe", "translate", "evaluate", "benchmark"),
    }


def test_a_hang_would_be_seen(folder: Path) -> None:
    with limited(1), pytest.raises(TimeoutError):
        os.open("pipe.txt", os.O_RDONLY)
