"""What it costs to train one network in two processes, against two processes that each train their own."""

import multiprocessing
import socket
import tempfile
import time
from functools import partial
from typing import Any

import yaml

from trunkline.pipelines.benchmarks.timing import compare
from trunkline.pipelines.configs import find_config

PROCESSES = 2
MEASURED_STEPS = 8
"""Steps that are measured."""
LONGEST = 600
"""Seconds after which a process that hangs ends the benchmark."""
# A fork of a server that has imported everything starts at once, and shares nothing with other measurements.
CONTEXT = multiprocessing.get_context("forkserver")
MODULE = "trunkline.pipelines.benchmarks.ddp_process"


def ddp_scaling(rounds: int, batch_size: int | None) -> list[dict[str, Any]]:
    """ViT-Ti/16 at 224 pixels in float32 through `trainer.fit`, one thread a process, as `trainer/ddp_cpu` trains it.

    `batch_size` is that of each process. The ratio is that of the summed throughputs.
    """
    CONTEXT.set_forkserver_preload([MODULE])
    strategy = yaml.safe_load(find_config("trainer/ddp_cpu").read_text(encoding="utf-8"))["trainer"]["strategy"]
    together = partial(seconds_per_step, strategy["init_args"], batch_size or 16)
    apart = partial(seconds_per_step, None, batch_size or 16)
    return [compare("2 DDP processes", "2 independent processes", together, apart, rounds)]


def seconds_per_step(strategy: dict[str, Any] | None, batch_size: int, steps: int = MEASURED_STEPS) -> float:
    """Seconds in which the processes together train on `batch_size` images for each of them.

    Args:
        strategy: options of Lightning's DDPStrategy; None lets each process train a network of its own.
        batch_size: images in each process's step.
        steps: number of steps that are measured.

    Raises:
        RuntimeError: if a process fails.
    """
    from trunkline.pipelines.benchmarks.ddp_process import train_in_process  # here, because it imports an objective

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    results, start = CONTEXT.SimpleQueue(), CONTEXT.Barrier(PROCESSES)
    with tempfile.TemporaryDirectory() as folder:
        arguments = (PROCESSES, strategy, port, batch_size, steps, start, results, folder)
        processes = [CONTEXT.Process(target=train_in_process, args=(rank, *arguments)) for rank in range(PROCESSES)]
        try:
            for process in processes:
                process.start()
            deadline = time.monotonic() + LONGEST
            for process in processes:
                process.join(max(deadline - time.monotonic(), 0))
        finally:
            for process in processes:
                process.kill()
    codes = [process.exitcode for process in processes]
    if codes != [0] * PROCESSES:
        raise RuntimeError(f"the processes of the benchmark ended with {codes}")
    return PROCESSES / sum(1 / results.get() for _ in processes)
