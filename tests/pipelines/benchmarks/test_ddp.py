"""`trunkline benchmark --what ddp`: its arithmetic, processes that fail, and one step of both sides."""

from collections.abc import Callable
from typing import Any

import pytest

from trunkline.pipelines.benchmarks import ddp
from trunkline.pipelines.benchmarks.ddp import ddp_scaling, seconds_per_step


class Processes:
    """Stands in for multiprocessing: each process takes the seconds that are given, or fails."""

    def __init__(self, seconds: Callable[[int, Any], float], code: int = 0) -> None:
        self.seconds, self.code = seconds, code
        self.put: list[float] = []
        self.started: list[tuple[Any, ...]] = []

    def Process(self, target: Any, args: tuple[Any, ...]) -> "Processes":
        self.started.append(args)
        self.put.append(self.seconds(args[0], args[2]))
        return self

    def Barrier(self, count: int) -> None:
        assert count == 2

    def SimpleQueue(self) -> "Processes":
        return self

    def get(self) -> float:
        return self.put.pop()

    def set_forkserver_preload(self, modules: list[str]) -> None:
        assert modules == ["trunkline.pipelines.benchmarks.ddp_process"]

    def start(self) -> None:
        pass

    join = kill = lambda self, *_: None

    @property
    def exitcode(self) -> int:
        return self.code


def test_the_ratio_is_that_of_the_summed_throughputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Independent processes of 1 s and 2 s a step train 1.5 batches a second, two DDP processes of 1.6 s 1.25."""
    stand_in = Processes(lambda rank, strategy: 1.6 if strategy else 1.0 + rank)
    monkeypatch.setattr(ddp, "CONTEXT", stand_in)
    (row,) = ddp_scaling(rounds=1, batch_size=5)
    assert (row["case"], row["peer"]) == ("2 DDP processes", "2 independent processes")
    assert row["ms"] == pytest.approx(1600)
    assert row["ratio"] == pytest.approx(1.25 / 1.5)
    assert {args[4] for args in stand_in.started} == {5}
    assert [args[0] for args in stand_in.started[:2]] == [0, 1]
    assert stand_in.started[0][2]["process_group_backend"] == "gloo"  # as trainer/ddp_cpu says


def test_a_process_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ddp, "CONTEXT", Processes(lambda *_: 1.0, code=3))
    with pytest.raises(RuntimeError, match=r"ended with \[3, 3\]"):
        seconds_per_step(None, 1)


@pytest.mark.slow
def test_both_sides_train() -> None:
    options = {"process_group_backend": "gloo", "timeout": "0:05:00"}
    assert seconds_per_step(options, 1, steps=1) > 0
    assert seconds_per_step(None, 1, steps=1) > 0
