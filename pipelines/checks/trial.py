"""What a trial is: a run of a few steps of the user's recipe, of which some things are changed."""

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Trial:
    """A run of a few steps.

    Everything that is not said here is as in the user's recipe.
    """

    title: str
    observer: Any
    """The `TrialObserver` that looks on; its `result` comes back from each process."""
    steps: int = 1
    """Optimiser steps."""
    processes: int = 1
    precision: str | None = None
    callbacks: Literal["none", "average", "all"] = "none"
    """Which of the recipe's callbacks take part: all, or only a weight average."""
    still: bool = True
    """Whether dropout, drop path and mixup are off, and the loader has no processes of its own."""
    rows: int | None = None
    """Most rows of a batch, over all processes."""
    parts: int | None = None
    """Each batch is cut into this many, whose gradients are accumulated; None accumulates as the recipe does."""
    epoch: int | None = None
    """Most optimiser steps of an epoch; None leaves its length to the recipe."""
    one_batch: bool = False
    """Whether the first batch is repeated, with a constant learning rate after a few steps and no label smoothing."""
    resume: str | None = None
    """The checkpoint to start from."""
    held: bool = False
    """Whether the observer stops all processes at some step (`TrialObserver.hold`), where they are killed."""
