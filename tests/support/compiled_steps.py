"""Compiled steps of generation, not compiled: which graphs there would be, and which memory they would read."""

from typing import Any

import pytest
from torch import Tensor

from trunkline.modules.generation import compiled


def record_steps(patch: pytest.MonkeyPatch) -> set[tuple[Any, int]]:
    """Let compiled decoders run their step as it is; returns what of each step is seen.

    Returns:
        The form of its graph, and the address of its cache.
    """
    seen: set[tuple[Any, int]] = set()

    def step_of(options: Any, form: Any) -> Any:
        def step(decoder: Any, tokens: Tensor, state: Any) -> Tensor:
            seen.add((form, state.cache.keys[0].data_ptr()))
            return compiled._step(decoder, tokens, state)

        return step

    patch.setattr(compiled, "compiled_step", step_of)
    return seen
