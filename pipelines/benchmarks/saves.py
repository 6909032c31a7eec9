"""Case of `trunkline benchmark` with checkpoints: how long a save holds up training."""

import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from trunkline.modules.training.background_saves import BackgroundCheckpointIO
from trunkline.modules.training.checkpoints import SafeCheckpointIO
from trunkline.pipelines.benchmarks.timing import compare

TENSORS, SIDE = 20, 2500
"""Number and side of the square matrices in a checkpoint; together 500 MB."""
STEP = 192
"""Side of the matrices whose product stands for a step of training."""


def save_stalls(rounds: int, batch_size: int | None) -> list[dict[str, Any]]:
    """How long a save of 500 MB holds up training, against writing it at once; and a step beside it, against one alone.

    The files lie in the folder of temporary files. The batch size does not matter.
    """
    content = {"state_dict": {str(number): torch.randn(SIDE, SIDE) for number in range(TENSORS)}}
    background, matrix = BackgroundCheckpointIO(), torch.randn(STEP, STEP)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.ckpt")

        def held_up() -> float:
            start = time.perf_counter()
            background.save_checkpoint(content, path)
            seconds = time.perf_counter() - start
            background.wait()
            return seconds

        def at_once() -> float:
            start = time.perf_counter()
            SafeCheckpointIO().save_checkpoint(content, path)
            return time.perf_counter() - start

        def beside() -> float:
            background.save_checkpoint(content, path)
            start, steps = time.perf_counter(), 0
            while not background.check() or steps == 0:
                matrix @ matrix
                steps += 1
            return (time.perf_counter() - start) / steps

        def alone() -> float:
            start, steps = time.perf_counter(), 1000
            for _ in range(steps):
                matrix @ matrix
            return (time.perf_counter() - start) / steps

        return [
            compare("training held up by a save", "written at once", held_up, at_once, rounds),
            compare("a step beside a save", "a step alone", beside, alone, rounds),
        ]
