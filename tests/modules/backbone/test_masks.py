"""Masks of the trunk that are added to the scores, and causality said per call."""

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_backbone import KEPT, assert_near, config, every, inputs, run_training_step, scalar, trunk
from torch import Tensor

from trunkline import TrunklineError
from trunkline.modules import attention_kernels
from trunkline.modules.attention_kernels import explicit_attention
from trunkline.modules.backbone import KVCache, Transformer, TransformerConfig
from trunkline.modules.backbone.masks import self_attention_mask

SHAPES = {"padding": (2, 7), "heads": (4, 7, 7), "one head": (1, 7, 7), "keys": (2, 1, 1, 7), "all": (2, 4, 7, 7)}


def additive(shape: tuple[int, ...], forbidden: float = 0.3) -> Tensor:
    """Random summands, some of them minus infinity; each query sees the first token."""
    mask = torch.randn(shape).masked_fill(torch.rand(shape) < forbidden, -math.inf)
    mask[..., 0] = 0.5
    return mask


def slow_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, causal: bool) -> Tensor:
    """A loop in float64 over rows, heads, queries and keys."""
    mask = mask.expand(*q.shape[:3], k.shape[2])
    out = torch.zeros_like(q)
    for b, h, t in ((b, h, t) for b in range(len(q)) for h in range(q.shape[1]) for t in range(q.shape[2])):
        keys = [s for s in range(k.shape[2]) if not (causal and s > t) and mask[b, h, t, s] > -math.inf]
        scores = [math.exp(float(q[b, h, t] @ k[b, h, s] / math.sqrt(q.shape[3]) + mask[b, h, t, s])) for s in keys]
        for s, score in zip(keys, scores, strict=True):
            out[b, h, t] += score / sum(scores) * v[b, h, s]
    return out


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("empty", [False, True])
def test_both_paths_against_a_loop(causal: bool, empty: bool) -> None:
    q, k, v = torch.randn(3, 2, 3, 5, 4, dtype=torch.float64)
    mask = additive((2, 3, 5, 5)).double()
    if empty:
        mask[1, 2, 3] = -math.inf  # a query that may attend to nothing
    want = slow_attention(q, k, v, mask, causal)
    whole, flag = self_attention_mask(mask, causal, 0, 5, q.device)
    assert not flag
    explicit, weights = explicit_attention(q, k, v, whole, False, 0.0, q.shape[-1] ** -0.5)
    for got in (explicit, F.scaled_dot_product_attention(q, k, v, attn_mask=whole)):
        assert_near(got, want, 1e-12)
    assert (want[1, 2, 3] == 0).all() == empty
    assert_near(weights.sum(-1)[0], torch.ones(3, 5, dtype=torch.float64))


@every()
@pytest.mark.parametrize("shape", ["padding", "heads", "all"])
def test_minus_infinity_is_false_and_zero_is_true(cfg: TransformerConfig, shape: str) -> None:
    model = trunk(cfg)
    x, context = inputs(cfg)
    boolean = torch.rand(SHAPES[shape]) < 0.7
    mask = torch.zeros(boolean.shape).masked_fill(~boolean, -math.inf)
    if context:
        context["context_mask"] = torch.rand(2, 5) < 0.7
    want = model(x, mask=boolean, **context, return_attention=True)
    if context:
        context["context_mask"] = torch.zeros(2, 5).masked_fill(~context["context_mask"], -math.inf)
    assert_near(model(x, mask=mask, **context).x, want.x)
    got = model(x, mask=mask, **context, return_attention=True)
    assert_near(got.x, want.x)
    assert_near(torch.stack(got.attention), torch.stack(want.attention))
    if context:
        assert_near(torch.stack(got.cross_attention), torch.stack(want.cross_attention))


@every()
@pytest.mark.parametrize(("attention", "kept"), [(False, None), (True, None), (False, "positions"), (True, "last two")])
def test_gradients_reach_an_additive_mask(cfg: TransformerConfig, attention: bool, kept: str | None) -> None:
    """Both paths agree with finite differences, so a bias by relative position can be learned."""
    model = trunk(cfg).double()
    x, context = inputs(cfg)
    x, context = x.double(), {name: value.double() for name, value in context.items()}
    mask = additive((4, 7, 7)).double().requires_grad_()
    keep = None if kept is None else KEPT[kept]

    def loss(mask: Tensor) -> Tensor:
        return scalar(model(x, mask=mask, **context, keep=keep, return_attention=attention).x)

    (gradient,) = torch.autograd.grad(loss(mask), mask)
    assert gradient.isfinite().all()
    assert (gradient[mask == -math.inf] == 0).all()
    direction = torch.randn_like(mask)
    with torch.no_grad():
        slope = (loss(mask + 1e-6 * direction) - loss(mask - 1e-6 * direction)) / 2e-6
    assert gradient.flatten() @ direction.flatten() == pytest.approx(slope.item(), rel=1e-5, abs=1e-7)
    assert gradient.abs().max() > 1e-4


@every()
@pytest.mark.parametrize("kept", KEPT)
def test_keep_takes_rows_of_an_additive_mask(cfg: TransformerConfig, kept: str) -> None:
    model, keep = trunk(cfg), KEPT[kept]
    rows = torch.arange(7).expand(2, 7)[:, keep] if isinstance(keep, slice) else keep
    x, context = inputs(cfg)
    if context:
        context["context_mask"] = torch.randn(2, 1, 7, 5)
    for shape in SHAPES.values():
        mask = additive(shape)
        full = model(x, mask=mask, **context).x
        assert_near(model(x, mask=mask, **context, keep=keep).x, full.take_along_dim(rows[..., None], dim=1))


@every(causal=True)
def test_cache_with_an_additive_mask(cfg: TransformerConfig) -> None:
    model = trunk(cfg)
    x, context = inputs(cfg)
    mask = additive((2, 4, 7, 7))
    want = model(x, mask=mask, **context).x
    cache = KVCache(cfg, batch_size=2, max_length=7)
    parts = [model(x[:, a:b], mask=mask[:, :, a:b, :b], cache=cache, **context).x for a, b in ((0, 3), (3, 4), (4, 7))]
    assert_near(torch.cat(parts, dim=1), want)


@every(dropout=0.3)
def test_checkpointing_with_an_additive_mask(cfg: TransformerConfig) -> None:
    model = trunk(cfg).train()
    x, kwargs = inputs(cfg)
    bias = additive((4, 7, 7)).requires_grad_()
    found = []
    for recompute in (False, True):
        model.config, bias.grad = replace(cfg, activation_checkpointing=recompute), None
        torch.manual_seed(1)
        scalar(model(x, mask=bias, **kwargs).x).backward()
        _, gradients, calls = run_training_step(model, x, mask=bias, **kwargs)
        assert calls == cfg.depth * (1 + recompute)
        assert bias.grad is not None
        found.append([bias.grad, *gradients])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("attention", [False, True])
def test_bfloat16_with_a_float32_mask(causal: bool, attention: bool) -> None:
    """Under autocast and with bfloat16 weights; the mask stays float32, as a learned bias would."""
    model, x, mask = trunk(config(causal=causal)), torch.randn(2, 7, 32), additive((4, 7, 7)).requires_grad_()
    want = model(x, mask=mask).x
    (gradient,) = torch.autograd.grad(scalar(want), mask)
    for pure in (False, True):
        model, given = (model.bfloat16(), x.bfloat16()) if pure else (model, x)
        with torch.autocast("cpu", torch.bfloat16, enabled=not pure):
            out = model(given, mask=mask, return_attention=attention).x
            with torch.no_grad():
                fused = model(given, mask=mask).x
        (found,) = torch.autograd.grad(scalar(out.float()), mask)
        for got, exact in ((out, want), (fused, want), (found, gradient)):
            assert 0 < ((got.float() - exact).norm() / exact.norm()).item() < 0.05


@every()
def test_causal_said_per_call(cfg: TransformerConfig) -> None:
    """The same weights serve both ways, whatever the configuration says."""
    model = trunk(cfg)
    x, context = inputs(cfg)
    other = Transformer(replace(cfg, causal=not cfg.causal)).eval()
    other.load_state_dict(model.state_dict())
    for causal in (False, True):
        for keep in (None, slice(-2, None)):
            for mask in (None, torch.arange(7) < torch.tensor([[7], [4]])):
                kwargs: dict[str, Any] = {"keep": keep, "mask": mask, **context}
                want = (model if cfg.causal == causal else other)(x, **kwargs).x
                assert torch.equal(model(x, causal=causal, **kwargs).x, want)
                assert torch.equal(other(x, causal=causal, **kwargs).x, want)


def test_the_flag_alone_says_causal(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[bool, bool]] = []
    fused = F.scaled_dot_product_attention

    def spy(*args: Tensor, **kwargs: Any) -> Tensor:
        seen.append((kwargs["attn_mask"] is None, kwargs["is_causal"]))
        return fused(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    for cfg in (config(causal=False), config(causal=True)):
        model, x = trunk(cfg), torch.randn(1, 5, 32)
        model(x, causal=True)
        model(x, causal=False)
        model(x, causal=True, mask=torch.zeros(5, 5)[None])
    assert seen == 2 * (2 * [(True, True)] + 2 * [(True, False)] + 2 * [(False, False)])


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.complex64])
@pytest.mark.parametrize("name", ["mask", "context_mask"])
def test_other_kinds_of_mask_are_refused(dtype: torch.dtype, name: str) -> None:
    cfg = config(cross_attention=True)
    x, context = inputs(cfg)
    mask = torch.ones(2, 7 if name == "mask" else 5, dtype=dtype)
    with pytest.raises(TrunklineError, match=rf"mask is boolean.*or floating point.*but got {dtype}"):
        trunk(cfg)(x, **context, **{name: mask})


Call = tuple[tuple[int, ...], int, bool]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """Of each call of PyTorch's attention: sizes of the queries, heads of the keys, and whether queries share these."""
    fused, seen = F.scaled_dot_product_attention, []

    def watched(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        seen.append((tuple(q.shape), k.shape[1], options["enable_gqa"]))
        return fused(q, k, v, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    return seen


def on_both(monkeypatch: pytest.MonkeyPatch, net: Transformer, x: Tensor, **options: Any) -> list[list[Tensor]]:
    """Output and gradients as on a CPU, and as with the memory-efficient kernel of a GPU."""
    found = []
    for only in (False, True):
        monkeypatch.setattr(attention_kernels, "only_memory_efficient", lambda q, mask, only=only: only)
        net.zero_grad()
        out = net(x, **options).x
        out.square().sum().backward()
        found.append([out.detach(), *(p.grad.clone() for p in net.parameters() if p.grad is not None)])
    return found


@pytest.mark.parametrize("masked", [False, True])
def test_heads_that_cannot_share_keys_get_their_own(
    masked: bool, monkeypatch: pytest.MonkeyPatch, calls: list[Call]
) -> None:
    """As on a GPU with a mask: outputs and gradients are those of shared keys."""
    net = trunk(config(num_kv_heads=2, num_heads=4, causal=not masked)).double()
    x = torch.randn(2, 7, net.config.dim, dtype=torch.float64)
    mask = torch.arange(7) < torch.tensor([[7], [4]]) if masked else None
    found = on_both(monkeypatch, net, x, mask=mask)
    shape = (2, 4, 7, net.config.head_width)
    assert calls == [(shape, 2, True)] * net.config.depth + [(shape, 4, False)] * net.config.depth
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("width", "fields"), [(3, {}), (6, {"num_kv_heads": 2}), (6, {"attn_scale": 0.7, "rope_theta": 1e4})]
)
def test_zeros_widen_heads_that_the_kernel_does_not_take(
    width: int, fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch, calls: list[Call]
) -> None:
    """In numbers of 4 bytes to a multiple of 4; the scale stays that of the true width."""
    cfg = config(num_heads=4, head_dim=width, **fields)
    net, x = trunk(cfg), torch.randn(2, 7, cfg.dim)
    found = on_both(monkeypatch, net, x, mask=torch.arange(7) < torch.tensor([[7], [4]]))
    widths = [shape[3] for shape, *_ in calls]
    assert widths == [width] * cfg.depth + [{3: 4, 6: 8}[width]] * cfg.depth
    for got, want in zip(found[1], found[0], strict=True):
        assert (got - want).abs().max() <= 1e-5 * max(want.abs().max().item(), 1)


@pytest.mark.parametrize(
    ("dtype", "width"), [(torch.bfloat16, 40), (torch.float16, 40), (torch.float32, 36), (torch.float64, 36)]
)
def test_the_width_of_heads_follows_their_type(dtype: torch.dtype, width: int) -> None:
    """Heads of 36, as in audio/digits."""
    heads = torch.ones(2, 4, 7, 36, dtype=dtype)
    adapted = attention_kernels.for_memory_efficient(heads, heads, heads, None, False)
    for part in adapted[:3]:
        assert part is not None
        assert part.shape == (2, 4, 7, width)
        assert part[..., :36].eq(1).all()
        assert part[..., 36:].eq(0).all()


@pytest.mark.parametrize("heads_in_mask", [1, 4])
def test_one_query_copies_no_keys(heads_in_mask: int, monkeypatch: pytest.MonkeyPatch, calls: list[Call]) -> None:
    """As in a step of generation with grouped queries: its heads become queries of one head."""
    cache_config = config(num_kv_heads=2, num_heads=4, causal=True)
    net, x = trunk(cache_config).double(), torch.randn(2, 7, cache_config.dim, dtype=torch.float64)
    mask = torch.rand(2, heads_in_mask, 1, 7) < 0.6
    mask[..., -1] = True
    found = []
    for only in (False, True):
        monkeypatch.setattr(attention_kernels, "only_memory_efficient", lambda q, mask, only=only: only)
        cache = KVCache(cache_config, 2, 7, torch.float64)
        with torch.no_grad():
            net(x[:, :6], cache=cache)
            del calls[:]
            found.append(net(x[:, 6:], mask=mask, cache=cache).x)
    assert calls == [((2, 2, 2, cache_config.head_width), 2, False)] * cache_config.depth
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("device", "dtype", "masked", "only"),
    [
        ("cpu", torch.float32, True, False),
        ("cuda", torch.bfloat16, False, False),
        ("cuda", torch.bfloat16, True, True),
        ("cuda", torch.float32, False, True),
    ],
)
def test_where_only_the_memory_efficient_kernel_is_fast(
    device: str, dtype: torch.dtype, masked: bool, only: bool
) -> None:
    q: Any = SimpleNamespace(device=torch.device(device), dtype=dtype)
    assert attention_kernels.only_memory_efficient(q, torch.ones(1) if masked else None) is only
