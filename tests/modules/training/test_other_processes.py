"""A run that is resumed on other numbers of processes is the run of one process."""

import json
import signal
import socket
from pathlib import Path

import pytest
import torch
from recorded_run import Run, go_on, halt_at
from resumed_run import arguments, lines, wait_for_halt, write_config

from trunkline.pipelines.record import device_name

SLOW = pytest.mark.slow


def train_on(config: Path, processes: list[int], stops: list[int], sizes: list[int] | None = None) -> None:
    """Train on so many processes, one number after the other; a SIGTERM ends each but the last at one of the steps.

    Args:
        config: see `write_config`.
        processes: their numbers.
        stops: optimiser steps at which they end.
        sizes: batch sizes of each number, instead of the config's.
    """
    folder = config.parent
    for part, count in enumerate(processes):
        ranks = list(range(count))
        if part < len(stops):
            halt_at(folder, "batch end", stops[part], ranks)
        size = ["--data.batch_size", str(sizes[part])] if sizes else []
        run = Run([*arguments(config, count, resume=part > 0), *size], folder, count)
        if part == len(stops):
            assert run.wait() == [0] * count, run.output()
            continue
        wait_for_halt(run, folder, ranks)
        run.signal(signal.SIGTERM)
        go_on(folder)
        assert run.wait() == [128 + signal.SIGTERM] * count, run.output()


def check_records(folder: Path, processes: list[int]) -> None:
    """Each start of a run has left a record, of all its processes."""
    (run,) = (folder / "runs").glob("*/*/")
    names = ["record.json", *(f"record_{n}.json" for n in range(2, len(processes) + 1))]
    assert {file.name for file in run.glob("record*.json")} == set(names)
    for name, count in zip(names, processes, strict=True):
        record = json.loads((run / name).read_text())
        assert record["processes"] == count
        assert record["devices"] == [device_name(torch.device("cpu"))] * count
        assert record["hosts"] == [socket.gethostname()]
        assert record["strategy"].endswith("DDPStrategy" if count > 1 else "SingleDeviceStrategy")


def steps_of(folder: Path) -> dict[tuple[int, int, int], tuple[list[int], float, int]]:
    """(epoch, optimiser steps, batch) -> rows, loss and number of processes; none may be trained on twice."""
    found: dict[tuple[int, int, int], list[tuple[int, list[int], float]]] = {}
    for rank in range(len(list(folder.glob("rank*.jsonl")))):
        for line in lines(folder, rank):
            if "index" in line:
                at = (line["epoch"], line["step"], line["batch"])
                found.setdefault(at, []).append((rank, line["index"], line["loss"]))
    for parts in found.values():
        assert [rank for rank, _, _ in parts] == list(range(len(parts)))
    return {
        at: (sorted(row for _, rows, _ in parts for row in rows), sum(p[2] for p in parts) / len(parts), len(parts))
        for at, parts in found.items()
    }


@pytest.mark.parametrize(
    ("task", "accumulate"),
    [
        ("image", 1),
        pytest.param("documents", 1, marks=SLOW),
        pytest.param("masked", 2, marks=SLOW),
        pytest.param("pairs", 2, marks=SLOW),
        pytest.param("translate", 1, marks=SLOW),
    ],
)
def test_two_then_three_then_one_process(task: str, accumulate: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The same samples in every step, and the same losses; without dropout, which each process draws by itself."""
    found = []
    for name, processes, stops in (("one", [1], []), ("several", [2, 3, 1], [5 // accumulate, 15 // accumulate])):
        folder = tmp_path_factory.mktemp(name)
        options = {"batch_size": 24, "max_epochs": 2, "accumulate_grad_batches": accumulate}
        train_on(write_config(folder, task, exact=True, **options), processes, stops)  # type: ignore[arg-type]
        check_records(folder, processes)
        found.append(steps_of(folder))
    one, several = found
    assert one.keys() == several.keys()
    assert {count for _, _, count in several.values()} == {1, 2, 3}
    losses = torch.tensor([[one[at][1], several[at][1]] for at in one])
    assert losses[:, 0].max() - losses[:, 0].min() > 0.1  # equal losses are not those of a network that does not move
    assert [one[at][0] for at in one] == [several[at][0] for at in one]
    torch.testing.assert_close(losses[:, 1], losses[:, 0], rtol=0, atol=1e-5)


@SLOW
@pytest.mark.parametrize("task", ["image", "documents", "pairs"])
def test_other_processes_that_need_another_batch_size(task: str, tmp_path: Path) -> None:
    """Each sample of an epoch once, but for less than a batch at its end."""
    config = write_config(tmp_path, task, batch_size=20, max_epochs=2)
    train_on(config, [2, 3, 1], [5, 20], sizes=[20, 24, 26])
    steps = steps_of(tmp_path)
    assert {count for _, _, count in steps.values()} == {1, 2, 3}
    rows = {epoch: [r for at in sorted(steps) if at[0] == epoch for r in steps[at][0]] for epoch in (0, 1)}
    known = max(rows[0] + rows[1]) + 1
    for epoch, size in ((0, 24), (1, 26)):
        assert len(rows[epoch]) == len(set(rows[epoch]))
        assert known - len(rows[epoch]) < size
