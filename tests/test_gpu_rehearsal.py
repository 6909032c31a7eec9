"""The tests for a GPU are rehearsed on the CPU, so that a renamed function does not break them unnoticed."""

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from tasks import TASKS

ROOT = Path(__file__).parents[1]
RESUMED, PRECISIONS, MODES = 5, 2, 2
"""Resumed tasks, and how each task is trained."""
WAITING = (len(TASKS) - 1) * MODES
"""All but speech."""
OTHERS = 2 + 1 + 16
"""Memory and time of the loss, flex attention, and generation."""


@pytest.mark.parametrize(
    ("chosen", "count"),
    [
        ("loss or flex_attention_in or low_precision or (own and eager)", 2 + 1 + 8 + PRECISIONS + 1),
        pytest.param("test", len(TASKS) * PRECISIONS * MODES + WAITING + RESUMED + OTHERS, marks=pytest.mark.slow),
    ],
    ids=["a few", "all"],
)
def test_the_tests_for_a_gpu_pass_on_a_cpu(chosen: str, count: int, tmp_path: Path) -> None:
    """What needs a kernel of CUDA is skipped; all others pass."""
    report = tmp_path / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", "-k", chosen]
    command += ["--junitxml", str(report), "--basetemp", str(tmp_path / "tests"), "tests/gpu"]
    environment = {**os.environ, "TRUNKLINE_TEST_GPU": "cpu"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]
    cases = list(ElementTree.parse(report).iter("testcase"))
    skipped = [found.get("message") for case in cases for found in case.iter("skipped")]
    assert set(skipped) <= {"there is no CUDA device"}
    assert len(cases) - len(skipped) == count
