"""The chunked loss is the plain one, in value and gradients, without the plain one's memory."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trunkline.modules import chunked_cross_entropy
from trunkline.modules.losses import linear_cross_entropy, token_losses

TOKENS, WIDTH, VOCABULARY = 37, 16, 101


def inputs(dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    shapes = (TOKENS, WIDTH), (VOCABULARY, WIDTH), (VOCABULARY,)
    target = torch.randint(0, VOCABULARY, (TOKENS,))
    target[::5] = -100
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes], target


def plain(x: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, smoothing: float, z_loss: float) -> Tensor:
    logits = F.linear(x, weight, bias)
    total = F.cross_entropy(logits, target, label_smoothing=smoothing, reduction="sum")
    return total + z_loss * logits.logsumexp(-1)[target != -100].square().sum()


@pytest.mark.parametrize(("smoothing", "z_loss"), [(0, 0), (0.1, 0), (0, 1e-2), (0.2, 1e-3)])
@pytest.mark.parametrize("chunk", [None, 1, 8, 1000])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_value_and_gradients(
    dtype: torch.dtype, tolerance: float, chunk: int | None, smoothing: float, z_loss: float
) -> None:
    (x, weight, bias), target = inputs(dtype)
    got = linear_cross_entropy(x, weight, target, bias, label_smoothing=smoothing, z_loss=z_loss, chunk=chunk)
    want = plain(x, weight, target, bias, smoothing, z_loss)
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
    for mine, theirs in zip(
        torch.autograd.grad(got * 3, (x, weight, bias)), torch.autograd.grad(want * 3, (x, weight, bias)), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "z_loss": 1e-3}, {"keys": True}])
def test_blocks_change_no_bit(dtype: torch.dtype, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    (x, weight, bias), target = inputs(dtype)
    if "keys" in options:
        options = {"keys": (torch.randint(0, 9, (TOKENS,)), torch.randint(0, 9, (VOCABULARY,)))}
    found = []
    for block in (2**18, 5 * VOCABULARY, 1):
        monkeypatch.setattr(chunked_cross_entropy, "BLOCK", block)
        got = linear_cross_entropy(x, weight, target, bias, chunk=20, **options)
        found.append((got, *torch.autograd.grad(got, (x, weight, bias))))
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))


def test_large_logits_stay_finite() -> None:
    (x, weight, _), target = inputs(torch.float32)
    got = linear_cross_entropy(x * 1e3, weight, target)
    torch.testing.assert_close(got, plain(x * 1e3, weight, target, None, 0, 0))
    assert got.isfinite()


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_side_gets_no_gradient(frozen: int) -> None:
    (x, weight, _), target = inputs(torch.float64)
    sides = [x, weight]
    sides[frozen].requires_grad_(False)
    linear_cross_entropy(x, weight, target).backward()
    assert sides[frozen].grad is None
    (want,) = torch.autograd.grad(plain(x, weight, target, None, 0, 0), sides[1 - frozen])
    torch.testing.assert_close(sides[1 - frozen].grad, want)


def test_autocast_multiplies_in_bfloat16_and_sums_in_float32() -> None:
    (x, weight, bias), target = inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = linear_cross_entropy(x, weight, target, bias)
    want = plain(x, weight, target, bias, 0, 0)
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(want.item(), rel=0.02)
    pairs = zip(torch.autograd.grad(got, (x, weight)), torch.autograd.grad(want, (x, weight)), strict=True)
    for mine, theirs in pairs:
        assert mine.dtype == torch.float32
        assert ((mine - theirs).norm() / theirs.norm()).item() < 0.02


def test_nothing_to_predict() -> None:
    (x, weight, _), target = inputs(torch.float32)
    got = linear_cross_entropy(x, weight, torch.full_like(target, -100))
    got.backward()
    assert got.item() == 0
    assert x.grad is not None
    assert x.grad.abs().max() == 0


def test_token_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    (x, weight, bias), target = inputs(torch.float32)
    monkeypatch.setattr(chunked_cross_entropy, "LOGITS_AT_ONCE", 500)
    mine, best = token_losses(x, weight, target, bias)
    logits = F.linear(x, weight, bias)
    torch.testing.assert_close(mine, F.cross_entropy(logits, target, reduction="none"))
    assert torch.equal(best, logits.argmax(-1))
    assert [len(t) for t in token_losses(x[:0], weight, target[:0])] == [0, 0]


MEASURE = """
import re, sys, torch
from pathlib import Path
import torch.nn.functional as F
from trunkline.modules.losses import linear_cross_entropy
torch.set_num_threads(1)
x, weight = torch.randn(4096, 16, requires_grad=True), torch.randn(32000, 16, requires_grad=True)
target = torch.randint(0, 32000, (4096,))
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
before = peak()
if sys.argv[1] == "plain":
    loss = F.cross_entropy(x @ weight.T, target, reduction="sum")
else:
    loss = linear_cross_entropy(x, weight, target)
loss.backward()
print((peak() - before) / 1024)
"""


def peak(which: str) -> float:
    """MiB beyond the inputs, in a process of its own."""
    run = subprocess.run([sys.executable, "-c", MEASURE, which], capture_output=True, text=True, check=True)
    return float(run.stdout)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells the peak of a process")
def test_peak_memory() -> None:
    """All logits are 500 MiB; the plain way holds them and their gradients, ours a quarter and its softmax."""
    assert peak("plain") > 950
    assert peak("chunked") < 350
