"""The compiled step of the chunked loss, and the loss inside a compiled network: the numbers of the plain one."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters

from trunkline.modules import chunked_cross_entropy
from trunkline.modules.chunked_cross_entropy import LOGITS_AT_ONCE, chunks, logits_at_once
from trunkline.modules.losses import linear_cross_entropy

TOKENS, WIDTH, VOCABULARY = 37, 16, 101
KEYS = torch.arange(TOKENS) % 9, torch.arange(VOCABULARY) % 9


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing compiled before: beyond a limit of variants torch would no longer compile.

    Without vector instructions, some C++ that torch writes is no valid C++; there the traced graph is run instead.
    """
    torch._dynamo.reset()
    counters.clear()
    backend = "aot_eager" if torch.backends.cpu.get_cpu_capability() == "DEFAULT" else "inductor"
    compiled = torch.compile(chunked_cross_entropy._softmax, backend=backend)
    monkeypatch.setattr(chunked_cross_entropy, "_compiler", lambda: compiled)
    monkeypatch.setattr(chunked_cross_entropy, "_not_compiled", [])
    yield
    torch._dynamo.reset()


def inputs(dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], Tensor]:
    draw = torch.Generator().manual_seed(0)
    shapes = (TOKENS, WIDTH), (VOCABULARY, WIDTH), (VOCABULARY,)
    target = torch.randint(0, VOCABULARY, (TOKENS,), generator=draw)
    target[::5] = -100
    return [torch.randn(shape, generator=draw, dtype=dtype, requires_grad=True) for shape in shapes], target


def plain(
    parts: list[Tensor], target: Tensor, label_smoothing: float = 0, z_loss: float = 0, keys: Any = None
) -> Tensor:
    logits = F.linear(*parts)
    if keys is not None:
        same = keys[0][:, None] == keys[1]
        logits = logits.masked_fill(same & (torch.arange(VOCABULARY) != target[:, None]), -torch.inf)
    total = F.cross_entropy(logits, target, label_smoothing=label_smoothing, reduction="sum")
    return total + z_loss * logits.logsumexp(-1)[target != -100].square().sum()


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("options", [{"label_smoothing": 0.1, "z_loss": 1e-3}, {"keys": KEYS}], ids=["smooth", "keys"])
def test_value_and_gradients(options: dict[str, Any]) -> None:
    """In float64, and in chunks of 20 and 17, then of 8 and 5 tokens, for which nothing new is compiled."""
    parts, target = inputs()
    x, weight, bias = parts
    want = plain(parts, target, **options)
    expected = torch.autograd.grad(want * 3, parts)
    for chunk in (20, 8):
        got = linear_cross_entropy(x, weight, target, bias, chunk=chunk, compiled=True, **options)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(torch.autograd.grad(got * 3, parts), expected, rtol=1e-12, atol=1e-12)
        assert graphs() == 1


class Outer(nn.Module):
    """A language model with tied weights that returns its loss."""

    def __init__(self, compiled: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.body = nn.Linear(WIDTH, WIDTH)
        self.compiled = compiled

    def forward(self, tokens: Tensor, target: Tensor) -> Tensor:
        states = self.body(self.embed(tokens))
        return linear_cross_entropy(states, self.embed.weight, target, chunk=20, compiled=self.compiled) / len(target)


@pytest.mark.parametrize(("compiled", "dtype"), [(False, None), (True, torch.bfloat16)])
def test_inside_a_compiled_network(compiled: bool, dtype: torch.dtype | None) -> None:
    """One graph without a break, in which the loss is one operation; the gradients of tied weights add up."""
    tokens, target = torch.randint(0, VOCABULARY, (2, TOKENS))
    found, traced = [], []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        traced.append([str(node.target) for node in graph.graph.nodes])
        return graph

    for outer in (True, False):
        network = Outer(compiled and outer)
        call = torch.compile(network, backend=backend, fullgraph=True) if outer else network
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            call(tokens, target).backward()
        found.append([p.grad for p in network.parameters()])
    torch.testing.assert_close(*found, rtol=1e-5 if dtype is None else 0.02, atol=1e-6 if dtype is None else 2e-3)
    assert len(traced) == 1
    assert graphs() == 1 + compiled
    assert not counters["graph_break"]


def test_scaled_in_float32() -> None:
    """A factor that float16 does not have, and gradients that would vanish in it: they reach float32 weights whole."""
    (x, weight, bias), target = inputs(torch.float32)
    factor = 2.0**-26 / 3

    def gradients(factor: float, dtype: torch.dtype) -> tuple[Tensor, ...]:
        with torch.autocast("cpu", dtype):
            return torch.autograd.grad(linear_cross_entropy(x, weight, target, bias) * factor, (x, weight, bias))

    for dtype in (torch.float16, torch.bfloat16):
        for small, large in zip(gradients(factor, dtype), gradients(1.0, dtype), strict=True):
            assert small.dtype == torch.float32
            torch.testing.assert_close(small / factor, large, rtol=1e-6, atol=1e-30)
    exact = torch.autograd.grad(plain([each.double() for each in (x, weight, bias)], target), (x, weight, bias))
    for mine, theirs in zip(gradients(1.0, torch.float16), exact, strict=True):
        assert ((mine - theirs).norm() / theirs.norm()).item() < 2e-3


def test_where_nothing_can_be_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """One warning with the reason, one attempt, and the same result."""
    (x, weight, bias), target = inputs()
    asked = []

    def refuse(*_: Any) -> None:
        asked.append(1)
        raise RuntimeError("no compiler here")

    compiled = torch.compile(chunked_cross_entropy._softmax, backend=refuse)
    monkeypatch.setattr(chunked_cross_entropy, "_compiler", lambda: compiled)
    want = linear_cross_entropy(x, weight, target, bias, chunk=20, compiled=False)
    with torch.compiler.set_stance("force_eager"):  # as in an evaluation
        assert torch.equal(linear_cross_entropy(x, weight, target, bias, chunk=20, compiled=True), want)
    with pytest.warns(UserWarning, match=r"the loss could not be compiled, .*no compiler here") as caught:
        got = linear_cross_entropy(x, weight, target, bias, chunk=20, compiled=True)
    assert torch.equal(got, want)
    assert len(caught) == len(asked) == 1


@pytest.mark.parametrize(
    ("memory", "tokens", "size", "rows"),
    [
        (None, 4096, 4, 586),  # a CPU: 7 chunks
        (80 << 30, 4096, 2, 1024),  # a quarter of the tokens
        (80 << 30, 32 * 1024, 2, 3277),  # 10 chunks of at most 320 MiB
        (80 << 30, 32 * 1024, 4, 1639),
        (16 << 30, 32 * 1024, 2, 656),
        (1 << 30, 4096, 2, 164),  # no less than 2**23 logits
    ],
)
def test_chunks_are_as_large_as_the_device_allows(memory: int | None, tokens: int, size: int, rows: int) -> None:
    at_once = logits_at_once(tokens * 50304, size, memory)
    parts = list(chunks(tokens, 50304, None, at_once))
    assert parts[0].stop == rows
    assert [part.start for part in parts[1:]] == [part.stop for part in parts[:-1]]
    assert parts[-1].stop == tokens
    if memory is not None:
        assert rows * 50304 * size <= max(memory / 256, LOGITS_AT_ONCE / 4 * size)
