"""Which sizes of a batch a compiled network leaves open."""

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def let_sizes_vary(batch: Mapping[str, Any]) -> None:
    """Let the graph of a compiled network be for any number of rows, and any length.

    Otherwise the first batch would be compiled for its own sizes, and the first one of other sizes for all. A batch of
    a single row still gets a graph of its own, because PyTorch broadcasts a size of 1 and compiles it as a constant.

    Args:
        batch: fields (B,) or (B, T, ...); others are left as they are.
    """
    if "torch._dynamo" not in sys.modules:  # so nothing was compiled; to import it would take a second
        return
    for field in batch.values():
        if isinstance(field, Tensor):
            torch._dynamo.maybe_mark_dynamic(field, list(range(min(field.ndim, 2))))
