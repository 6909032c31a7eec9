"""The case of `trunkline benchmark` with the loss of a language model alone."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trunkline.modules.losses import linear_cross_entropy
from trunkline.pipelines.benchmarks.memory import Prepare, peak_memory
from trunkline.pipelines.benchmarks.timing import Side, compare, seconds_a_step

TOKENS, WIDTH, VOCABULARY = 4096, 768, 50304
"""4 rows of GPT-2's 1,024 tokens, its width, and its vocabulary rounded up to a multiple of 64."""


def plain_loss(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """The sum of the losses of all logits at once."""
    return F.cross_entropy(F.linear(x, weight), target, reduction="sum")


def loss_step(
    kind: str, tokens: int, device: torch.device, bf16: bool, width: int, vocabulary: int
) -> Callable[[], None]:
    """Make a forward and backward pass of output layer and loss, on random numbers.

    Args:
        kind: `chunked`, which is compiled on a GPU; `plain`; or `compiled`, the plain one.
        tokens: rows of logits.
        device: where.
        bf16: whether the products are computed in bfloat16; all else is float32.
        width: of the rows.
        vocabulary: logits of a row.
    """
    torch.manual_seed(0)
    x, weight = (torch.randn(n, width, device=device).mul_(0.02).requires_grad_() for n in (tokens, vocabulary))
    target = torch.randint(0, vocabulary, (tokens,), device=device)
    loss = {"chunked": linear_cross_entropy, "plain": plain_loss, "compiled": torch.compile(plain_loss)}[kind]

    def step() -> None:
        x.grad = weight.grad = None
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            value = loss(x, weight, target) / tokens
        value.backward()

    return step


def _timed_step(kind: str, tokens: int) -> Side:
    """Seconds of such a step: in float32 on a CPU, with products in bfloat16 on a GPU."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    step = loss_step(kind, tokens, device, device.type == "cuda", WIDTH, VOCABULARY)
    return lambda: seconds_a_step(step, 1, device)


def _peak_of(prepare: Prepare) -> int:
    """Bytes that a step needs beyond what it is given, on the device that it runs on."""
    if not torch.cuda.is_available():
        return peak_memory(prepare)
    work = prepare()
    work()  # compilation needs memory of its own
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    return torch.cuda.max_memory_allocated() - before


def chunked_loss(rounds: int, batch_size: int | None) -> list[dict[str, Any]]:
    """The chunked loss against the plain one; prints the memory of both. On a GPU, also against the plain compiled."""
    tokens = batch_size or TOKENS
    ours, peers = partial(_timed_step, "chunked", tokens), {"plain loss": partial(_timed_step, "plain", tokens)}
    if torch.cuda.is_available():
        peers["plain loss, compiled"] = partial(_timed_step, "compiled", tokens)
    peaks = {name: _peak_of(prepare) / 2**20 for name, prepare in {"chunked loss": ours, **peers}.items()}
    shown = ", ".join(f"{name} {peak:.0f} MiB" for name, peak in peaks.items())
    print(f"loss of {tokens} x {VOCABULARY} logits, peak memory: {shown}")
    return [compare("chunked loss", name, ours(), peer(), rounds) for name, peer in peers.items()]
