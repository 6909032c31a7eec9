"""Times and memory of loading, as the benchmark prints them."""

import sys
from typing import Any

import pytest

from trunkline.pipelines.benchmarks.loading import PEERS, loading_times, run_python, show_loads


def test_a_failed_load_says_why() -> None:
    with pytest.raises(RuntimeError, match=r"a load failed: (?s:.)*no such thing"):
        run_python("raise SystemExit('no such thing')")


def test_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    row: dict[str, Any] = {"model": "GPT-2 124M", "library": "transformers", "megabytes": 497.8, "seconds": 0.4}
    row |= {"peer_seconds": 0.5, "ratio": 0.8, "range": (0.7, 0.9), "memory": 1.05, "peer_memory": 1.02}
    show_loads([row])
    assert capsys.readouterr().out == (
        "GPT-2 124M, 498 MB: 0.40 s, 0.80 times transformers's own (0.70 to 0.90); peak memory 1.05 times the weights, "
        "transformers's 1.02\n"
    )


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process's memory is read from /proc")
def test_nothing_is_twice_in_memory() -> None:
    (row,) = loading_times(1, ("BERT-base",))
    assert row["model"] in PEERS
    assert 430 < row["megabytes"] < 450
    assert 0.9 < row["memory"] < 1.2
