"""Timing of two sides in turn: a machine's other work affects both, so their ratio is more reliable than seconds."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn

Side = Callable[[], float]
"""Runs one measurement and returns the seconds per step."""


def compare(case: str, peer: str, ours: Side, theirs: Side, rounds: int) -> dict[str, Any]:
    """Measure two sides in turn, after two warm-up rounds; ratios above 1 mean that ours is faster."""
    for side in (ours, theirs) * 2:  # compilation, allocation and caches
        side()
    pairs = []
    for turn in track(range(rounds), description=case, transient=True):
        sides = (theirs, ours) if turn % 2 else (ours, theirs)
        seconds = {side: side() for side in sides}
        pairs.append((seconds[ours], seconds[theirs]))
    ratios = sorted(b / a for a, b in pairs)
    return {
        "case": case,
        "peer": peer,
        "ms": 1e3 * statistics.median(a for a, _ in pairs),
        "peer_ms": 1e3 * statistics.median(b for _, b in pairs),
        "ratio": statistics.median(ratios),
        "range": (ratios[0], ratios[-1]),
    }


def bare_loop(network: nn.Module, loss: Callable[[], Tensor], bf16: bool = False, steps: int = 1) -> Side:
    """A plain training loop on one fixed batch: forward pass by `loss`, backward pass, AdamW."""
    step, device = training_step(network, loss, bf16), next(network.parameters()).device
    return lambda: seconds_a_step(step, steps, device)


def training_step(network: nn.Module, loss: Callable[[], Tensor], bf16: bool = False) -> Callable[[], None]:
    """A step of such a loop."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)
    device = next(network.parameters()).device.type

    def step() -> None:
        network.train()
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def seconds_a_step(step: Callable[[], object], steps: int, device: torch.device) -> float:
    """Seconds per step; the device has finished its work before the clock starts, and before it stops."""
    finish_work(device)
    start = time.perf_counter()
    for _ in range(steps):
        step()
    finish_work(device)
    return (time.perf_counter() - start) / steps


def finish_work(device: torch.device) -> None:
    """Wait until an accelerator has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
