"""What a run prints: what a user acts on, nothing twice, and paths that no width cuts."""

import logging
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from rich.table import Table

from trunkline.pipelines import training
from trunkline.pipelines.quiet import LOGGERS, quieten

LINES_BEFORE = [
    "trunkline fit: starting",
    "device   cpu, precision 32-true",
    "network  ViT, ",
    "data     digits: 1,257 train, 180 val, 360 test",
    "run",
]


def test_the_lines_of_a_run(tmp_path: Path) -> None:
    """As a program, because what other libraries print goes to its own streams."""
    program = Path(sys.executable).with_name("trunkline")
    command = "fit --config vit/digits --trainer.max_epochs 1 --trainer.check_val_every_n_epoch 1 --data.num_workers 0"
    environ = {**os.environ, "COLUMNS": "40", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    environ.pop("TRUNKLINE_RUN", None)
    done = subprocess.run(
        [program, *command.split()], cwd=tmp_path, env=environ, capture_output=True, text=True, check=True
    )
    said = done.stderr.splitlines()
    assert [line[: len(want)] for line, want in zip(said, LINES_BEFORE, strict=True)] == LINES_BEFORE
    (run,) = tmp_path.glob("runs/vit/digits/*")
    assert said[-1].split() == ["run", str(run.relative_to(tmp_path))]
    before, _, after = done.stdout.partition("vit/digits\n")
    assert not re.sub(r"(Sanity|Training|Epoch|Validation|Testing).*|[\s\x1b\[A]+", "", before)  # bars alone
    rows = dict(re.findall(r"│ (\S.*?) +│ (\S.*?) +│", after))
    assert rows["checkpoint"] == str(run.relative_to(tmp_path) / "checkpoints/last.ckpt")
    assert len(after.splitlines()) == len(rows) + 2  # the frame's first and last line


@pytest.mark.parametrize("columns", ["20", "400"])
def test_a_table_is_as_wide_as_its_longest_row(
    columns: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    table, path = Table(show_header=False), f"runs/{'long/' * 30}last.ckpt"
    table.add_row("checkpoint", path)
    training.print_whole(table)
    first, row, last = capsys.readouterr().out.splitlines()
    assert row == f"│ checkpoint │ {path} │"
    assert len(first) == len(row) == len(last)


def test_what_each_of_many_processes_would_say(caplog: pytest.LogCaptureFixture) -> None:
    """The real loggers of Lightning, as a process of a cluster uses them."""
    with warnings.catch_warnings():
        quieten()
        for name in LOGGERS:
            logger = logging.getLogger(name)
            with caplog.at_level(logging.INFO, name):
                logger.info("[rank: 3] Seed set to 0")
                logger.info("Initializing distributed: GLOBAL_RANK: 3, MEMBER: 4/8")
                logger.info("[rank: 3] something that a user acts on")
    assert [record.getMessage() for record in caplog.records] == ["[rank: 3] something that a user acts on"] * 3


def test_a_warning_has_no_line_of_source(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # so that it is restored
    with warnings.catch_warnings():
        quieten()
        assert (
            warnings.formatwarning("skipped: a.png", UserWarning, __file__, 3, "source") == "warning: skipped: a.png\n"
        )
        warnings.warn("old", FutureWarning, stacklevel=1)  # between libraries
