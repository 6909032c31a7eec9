"""Check that each parameter which is not frozen gets a gradient, and that an optimiser moves it."""

from collections.abc import Mapping
from typing import Any

NAMED_AT_MOST = 5
"""Most parameters that a message names."""


def parameter_faults(alone: Mapping[str, Any]) -> list[str]:
    """What is wrong with parameters, a sentence for each kind of fault.

    Args:
        alone: result of a `StepObserver`.
    """
    gradients = alone["gradients"]
    unused = [name for name, gradient in gradients.items() if gradient is None]
    dead = [name for name, gradient in gradients.items() if gradient is not None and not gradient.any()]
    faults = []
    if unused:
        faults.append(
            f"{named(unused)} got no gradient, because the loss does not use it; remove it, use it, or freeze it with "
            "requires_grad_(False)"
        )
    if dead:
        faults.append(
            f"the gradient of {named(dead)} is zero in every entry, so that it cannot learn; look for a factor of "
            "zero, a detach or a saturated function behind it"
        )
    if alone["ungrouped"]:
        faults.append(
            f"{named(alone['ungrouped'])} is in no group of the optimiser, so that it never changes; make it a part of "
            "`network`, return it from `configure_optimizers`, or freeze it with requires_grad_(False)"
        )
    return faults


def named(names: list[str]) -> str:
    """Some names, and the number of the others."""
    more = f" and {len(names) - NAMED_AT_MOST} more" if len(names) > NAMED_AT_MOST else ""
    return ", ".join(names[:NAMED_AT_MOST]) + more


def parameter_figures(alone: Mapping[str, Any]) -> str:
    """How many parameters were looked at."""
    frozen = f", {alone['frozen']} frozen" if alone["frozen"] else ""
    return f"{len(alone['gradients'])} parameters that learn{frozen}"
