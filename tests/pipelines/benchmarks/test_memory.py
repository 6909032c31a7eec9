"""Peak memory; apart from the other benchmarks, because the process that measures imports this file anew."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from trunkline.pipelines.benchmarks.memory import peak_memory


def prepared(mebibytes: int) -> Callable[[], None]:
    """Preparation that itself takes 100 MiB for a while and keeps 30."""
    kept = [torch.ones(30 << 18), torch.ones(100 << 18)][:1]

    def work() -> None:
        torch.ones(mebibytes << 18)  # freed at once
        kept[0].add_(1)

    return work


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_peak_is_what_the_work_took() -> None:
    assert peak_memory(partial(prepared, 64)) / 2**20 == pytest.approx(64, abs=6)
