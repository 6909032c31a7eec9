"""Settings in which machines differ, forced by environment variables (`make test-everywhere` sets them).

TRUNKLINE_TEST_THREADS: number of PyTorch threads in each process; 1 unless set, because the models are tiny.
TRUNKLINE_TEST_BFLOAT16: `on` or `off`: whether Muon orthogonalises in bfloat16.
TRUNKLINE_TEST_ORDER: a seed; files, classes and tests then run in a random order.
"""

import os
import random
from typing import Any

import torch

LONGEST = (
    "resume bad_input export training compiled_training no_waiting run_results packaging early_signals dates benchmark "
    "full_disk cli attention_paths downstream reduction tensor_parallel floors check_findings seq2seq compiled_loss "
    "device_benchmark reuse"
)
"""Test files (without `test_` and `.py`) that take long, the longest first."""


def apply() -> None:
    """Apply the settings of threads and bfloat16 to this process; processes that tests start must call it too."""
    torch.set_num_threads(int(os.environ.get("TRUNKLINE_TEST_THREADS", "1")))
    forced = os.environ.get("TRUNKLINE_TEST_BFLOAT16")
    if forced is not None:
        native = {"on": True, "off": False}[forced]
        from trunkline.modules.training import muon

        asked = muon.multiplies_bfloat16
        muon.multiplies_bfloat16 = lambda device: native if device.type == "cpu" else asked(device)


def reorder(items: list[Any]) -> None:
    """Begin with the `LONGEST` files: at the end no process waits for another that has just begun one of them.

    With a seed, shuffle files, classes in a file and tests in a class; shared fixtures are still made only once.
    """
    seed = os.environ.get("TRUNKLINE_TEST_ORDER")
    if seed is None:
        places = {f"test_{name}": place for place, name in enumerate(LONGEST.split())}
        items.sort(key=lambda item: places.get(item.path.stem, len(places)))
        return

    def place(*names: object) -> float:
        return random.Random(f"{seed} {names}").random()

    items.sort(key=lambda item: (place(item.path), place(item.path, item.cls), place(item.nodeid)))
