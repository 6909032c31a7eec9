"""The loss that never holds all logits, on a GPU: less memory and time than the plain one, and the same numbers."""

import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from trunkline.modules.losses import linear_cross_entropy
from trunkline.pipelines.benchmarks.loss_cases import loss_step
from trunkline.pipelines.benchmarks.timing import seconds_a_step

TOKENS, VOCABULARY, DIM = 4096, 50304, 768
ROUNDS, STEPS = 9, 10


def gradients(loss: Callable[[Tensor, Tensor], Tensor], x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The loss under autocast, and both gradients."""
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    with torch.autocast(x.device.type, torch.bfloat16):
        total = loss(x, weight)
    return total.detach(), *torch.autograd.grad(total, (x, weight))


def test_peak_memory_of_the_loss(device: torch.device) -> None:
    tokens, words, dim = (TOKENS, VOCABULARY, DIM) if device.type == "cuda" else (64, 300, 16)
    x, weight = torch.randn(tokens, dim, device=device), 0.02 * torch.randn(words, dim, device=device)
    target = torch.randint(0, words, (tokens,), device=device)
    losses = {
        "chunked": lambda x, weight: linear_cross_entropy(x, weight, target),
        "plain": lambda x, weight: F.cross_entropy((x @ weight.T).float(), target, reduction="sum"),
    }
    results, peaks = {}, {}
    for name, loss in losses.items():
        gradients(loss, x, weight)  # compiles, and makes the workspace of the matrix products
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
        results[name] = gradients(loss, x, weight)
        if device.type == "cuda":
            peaks[name] = torch.cuda.max_memory_allocated(device) - before
    wide = x.double().requires_grad_(), weight.double().requires_grad_()
    total = F.cross_entropy(wide[0] @ wide[1].T, target, reduction="sum")
    exact = total.detach(), *torch.autograd.grad(total, wide)
    for chunked, plain, want in zip(results["chunked"], results["plain"], exact, strict=True):
        off, allowed = (chunked - want).norm(), (plain - want).norm()
        assert off <= 1.5 * allowed + 1e-3 * want.norm()
    if device.type == "cuda":
        assert peaks["chunked"] < peaks["plain"]


def test_time_of_the_loss(device: torch.device) -> None:
    """Less than that of all logits at once: both in turn, so that what else slows the device down slows both."""
    on_gpu = device.type == "cuda"
    tokens, words, dim = (TOKENS, VOCABULARY, DIM) if on_gpu else (64, 300, 16)
    rounds, steps = (ROUNDS, STEPS) if on_gpu else (1, 1)
    chunked, plain = (loss_step(kind, tokens, device, True, dim, words) for kind in ("chunked", "plain"))
    for step in (chunked, plain):
        seconds_a_step(step, 2, device)  # compiles
    pairs = [[seconds_a_step(step, steps, device) for step in (chunked, plain)] for _ in range(rounds)]
    ratio = statistics.median(theirs / ours for ours, theirs in pairs)
    assert ratio > 1 or not on_gpu, pairs
