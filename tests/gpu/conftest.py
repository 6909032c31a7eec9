"""What only a GPU shows: all tests here have the marker `gpu`, and are skipped where there is no CUDA device.

`pytest -m gpu` runs them. TRUNKLINE_TEST_GPU=cpu runs the same tests on the CPU, as far as it goes: networks are traced
but not compiled, and memory is not compared. That finds defects of the tests themselves, and says nothing about a GPU.
"""

import os
from pathlib import Path

import pytest
import torch

PRETENDED = os.environ.get("TRUNKLINE_TEST_GPU") == "cpu"
HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = None if PRETENDED or torch.cuda.is_available() else "needs a CUDA device"
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if reason is not None:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def device() -> torch.device:
    return torch.device("cpu" if PRETENDED else "cuda")
