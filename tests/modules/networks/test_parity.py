"""Parity of the trunk and its embeddings with torch's own layers, timm, and plain float64 loops."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from parity import assert_near, randomise
from timm.layers import AttentionPoolLatent, resample_abs_pos_embed
from torch import Tensor, nn

from trunkline import TrunklineError
from trunkline.modules.backbone import Transformer, TransformerConfig
from trunkline.modules.backbone.attention import Attention, rotate, rotation_table
from trunkline.modules.backbone.transformer import Block
from trunkline.modules.networks.attention_pool import AttentionPool
from trunkline.modules.networks.patches import PatchEmbed, resize_positions, sincos_positions_2d
from trunkline.modules.networks.positions import sincos_positions

# --- torch.nn.Transformer*Layer ---


def from_torch(weights: dict[str, Tensor], cross: bool) -> dict[str, Tensor]:
    """State dict of an nn.TransformerEncoder or nn.TransformerDecoder -> of our trunk."""
    names = {"layers.": "blocks.", "linear1": "mlp.fc1", "linear2": "mlp.fc2", "out_proj": "proj"}
    names |= {"self_attn": "attn", "multihead_attn": "cross_attn", "attn.in_proj_": "attn.qkv."}
    names |= {"norm2": "norm_cross", "norm3": "norm2"} if cross else {}
    out = {}
    for name, value in weights.items():
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        if "cross_attn.qkv" in name:
            out[name.replace("qkv", "q")], out[name.replace("qkv", "kv")] = value.split((32, 64))
        else:
            out[name] = value
    return out


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_torch_layers(cross: bool, norm_first: bool, activation: Any, causal: bool, padded: bool) -> None:
    layer_class, stack_class = (
        (nn.TransformerDecoderLayer, nn.TransformerDecoder)
        if cross
        else (nn.TransformerEncoderLayer, partial(nn.TransformerEncoder, enable_nested_tensor=False))
    )
    layer = layer_class(32, 4, 48, 0.0, activation, 1e-6, batch_first=True, norm_first=norm_first)
    theirs = randomise(stack_class(layer, 2, norm=nn.LayerNorm(32, eps=1e-6)))
    cfg = TransformerConfig(32, 2, 4, mlp_dim=48, mlp=activation, norm_first=norm_first, cross_attention=cross)
    ours = Transformer(replace(cfg, causal=causal))
    ours.load_state_dict(from_torch(theirs.state_dict(), cross))
    x, context = torch.randn(2, 7, 32), torch.randn(2, 5, 32)
    mask = torch.arange(7) < torch.tensor([[7], [4]]) if padded else None
    context_mask = torch.arange(5) < torch.tensor([[2], [5]]) if padded else None
    forbidden = torch.ones(7, 7, dtype=torch.bool).triu(1) if causal else None  # in torch, True = may not attend
    if cross:
        got = ours(x, mask=mask, context=context, context_mask=context_mask).x
        absent, absent_context = (None if m is None else ~m for m in (mask, context_mask))
        want = theirs(x, context, forbidden, tgt_key_padding_mask=absent, memory_key_padding_mask=absent_context)
    else:
        got = ours(x, mask=mask).x
        want = theirs(x, forbidden, src_key_padding_mask=None if mask is None else ~mask)
    assert_near(got, want)


# --- plain loops in float64 ---


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    rows = [[math.fsum((w * v).tolist()) for w in layer.weight] for v in x]
    return torch.tensor(rows, dtype=torch.float64) + (0 if layer.bias is None else layer.bias)


def normalise(norm: nn.Module, x: Tensor) -> Tensor:
    """Each row of (N, D), by the formulas of arXiv:1607.06450 and arXiv:1910.07467."""
    rows = []
    for v in x:
        mean = v.sum() / len(v) if isinstance(norm, nn.LayerNorm) else 0.0
        rows.append((v - mean) / ((v - mean).pow(2).sum() / len(v) + 1e-6) ** 0.5 * norm.weight)
    return torch.stack(rows) + (0 if getattr(norm, "bias", None) is None else norm.bias)


def turn(v: Tensor, position: int, theta: float) -> Tensor:
    """Rotate the pairs (i, i + E/2) of one head, as complex numbers."""
    half = len(v) // 2
    out = v.clone()
    for i in range(half):
        angle = position * theta ** (-2 * i / len(v))
        pair = complex(v[i], v[i + half]) * complex(math.cos(angle), math.sin(angle))
        out[i], out[i + half] = pair.real, pair.imag
    return out


def attention(attn: Attention, x: Tensor, cfg: TransformerConfig, context: Tensor | None = None) -> Tensor:
    """(T, D) -> (T, D), one head and one query at a time."""
    heads, kv_heads, e = cfg.num_heads, cfg.num_kv_heads or cfg.num_heads, cfg.dim // cfg.num_heads
    if context is None:
        q, k, v = linear(attn.qkv, x).split((heads * e, kv_heads * e, kv_heads * e), dim=1)
    else:
        q, (k, v) = linear(attn.q, x), linear(attn.kv, context).chunk(2, dim=1)
    out = torch.zeros(len(x), cfg.dim, dtype=torch.float64)
    for h in range(heads):
        own, shared = slice(h * e, (h + 1) * e), slice(h * kv_heads // heads * e, (h * kv_heads // heads + 1) * e)
        queries, keys, values = q[:, own], k[:, shared], v[:, shared]
        if attn.q_norm is not None and attn.k_norm is not None:
            queries, keys = normalise(attn.q_norm, queries), normalise(attn.k_norm, keys)
        if (theta := cfg.rope_theta) is not None and context is None:
            queries, keys = (torch.stack([turn(u, t, theta) for t, u in enumerate(w)]) for w in (queries, keys))
        for t in range(len(x)):
            seen = t + 1 if cfg.causal and context is None else len(keys)
            scores = [math.exp(float(queries[t] @ keys[s]) / math.sqrt(e)) for s in range(seen)]
            for s in range(seen):
                out[t, own] += scores[s] / sum(scores) * values[s]
    return linear(attn.proj, out)


ACTIVATIONS: dict[str, Callable[[float], float]] = {
    "gelu": lambda v: v * 0.5 * (1 + math.erf(v / math.sqrt(2))),
    "gelu_tanh": lambda v: v * 0.5 * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))),
    "quick_gelu": lambda v: v / (1 + math.exp(-1.702 * v)),
    "relu": lambda v: max(v, 0.0),
    "relu2": lambda v: max(v, 0.0) ** 2,
    "swiglu": lambda v: v / (1 + math.exp(-v)),  # SiLU, of the gate
}


def block(module: Block, x: Tensor, cfg: TransformerConfig, context: Tensor | None) -> Tensor:
    def mlp(v: Tensor) -> Tensor:
        hidden = linear(module.mlp.fc1, v)
        gate, value = hidden.chunk(2, dim=1) if cfg.mlp == "swiglu" else (hidden, torch.ones_like(hidden))
        active = [[ACTIVATIONS[cfg.mlp](h) for h in row] for row in gate.tolist()]
        return linear(module.mlp.fc2, torch.tensor(active, dtype=torch.float64) * value)

    steps = [(partial(attention, module.attn, cfg=cfg), module.norm1)]
    if context is not None:
        steps.append((partial(attention, module.cross_attn, cfg=cfg, context=context), module.norm_cross))
    for sublayer, norm in (*steps, (mlp, module.norm2)):
        x = x + sublayer(normalise(norm, x)) if cfg.norm_first else normalise(norm, x + sublayer(x))
    return x


@pytest.mark.parametrize("kv_heads", [None, 2, 1])
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("rope_theta", [None, 50.0])
@pytest.mark.parametrize("causal", [False, True])
@torch.no_grad()
def test_attention_against_loops(kv_heads: int | None, qk_norm: bool, rope_theta: float | None, causal: bool) -> None:
    cfg = TransformerConfig(16, 1, 4, kv_heads, qk_norm=qk_norm, rope_theta=rope_theta, causal=causal, final_norm=False)
    model = randomise(Transformer(cfg).double())
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    for p in model.blocks[0].mlp.fc2.parameters():
        p.zero_()  # leaves x + attn(norm1(x))
    got = model(x).x
    attn, norm = model.blocks[0].attn, model.blocks[0].norm1
    want = torch.stack([row + attention(attn, normalise(norm, row), cfg) for row in x])
    assert_near(got, want, 1e-6)  # our angles are float32


@pytest.mark.parametrize("mlp", ACTIVATIONS)
@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize(("bias", "cross"), [(False, False), (True, True)])
@torch.no_grad()
def test_block_against_loops(mlp: Any, norm: Any, norm_first: bool, bias: bool, cross: bool) -> None:
    cfg = TransformerConfig(16, 1, 2, mlp_dim=8, mlp=mlp, norm=norm, bias=bias, norm_first=norm_first)
    cfg = replace(cfg, cross_attention=cross, final_norm=False)
    model = randomise(Transformer(cfg).double())
    x, context = torch.randn(4, 16, dtype=torch.float64), torch.randn(3, 16, dtype=torch.float64) if cross else None
    got = model(x[None], context=None if context is None else context[None]).x[0]
    assert_near(got, block(model.blocks[0], x, cfg, context), 1e-10)


# --- positions ---


def test_rotary_scores_depend_on_the_distance_alone() -> None:
    q, k = torch.randn(2, 1, 1, 1, 16).unbind()

    def score(at: int, other: int) -> Tensor:
        turned = (rotate(x, rotation_table(torch.tensor([t]), 16, 10_000.0)) for x, t in ((q, at), (k, other)))
        return torch.mul(*turned).sum()

    for distance in (0, 1, 7, -4):
        for start in (5, 60, 400):
            assert_near(score(start, start + distance), score(10, 10 + distance), 1e-4)
    assert score(10, 11).item() != pytest.approx(score(10, 17).item(), abs=1e-2)
    turned = rotate(q, rotation_table(torch.tensor([123]), 16, 10_000.0))
    assert_near(turned.norm(), q.norm())
    assert_near(turned[0, 0, 0].double(), turn(q[0, 0, 0].double(), 123, 10_000.0))
    assert torch.equal(rotate(q, rotation_table(torch.tensor([0]), 16, 10_000.0)), q)


@pytest.mark.parametrize(("length", "dim", "theta"), [(12, 16, 10_000.0), (3, 2, 100.0)])
def test_sincos_positions(length: int, dim: int, theta: float) -> None:
    got = sincos_positions(length, dim, theta)
    assert got.shape == (length, dim)
    for position in range(length):
        for i in range(dim // 2):
            angle = position / theta ** (2 * i / dim)
            assert got[position, i].item() == pytest.approx(math.sin(angle), abs=1e-5)
            assert got[position, dim // 2 + i].item() == pytest.approx(math.cos(angle), abs=1e-5)


@pytest.mark.parametrize("grid", [(3, 3), (2, 5), (4, 1)])
def test_sincos_positions_2d(grid: tuple[int, int]) -> None:
    """big_vision: [sin(x w), cos(x w), sin(y w), cos(y w)] with w from 1 to 1 / theta inclusive."""
    got = sincos_positions_2d(grid, 16).unflatten(0, grid)
    for y in range(grid[0]):
        for x in range(grid[1]):
            for i in range(4):
                w = 1 / 10_000 ** (i / 3)
                want = [math.sin(x * w), math.cos(x * w), math.sin(y * w), math.cos(y * w)]
                assert got[y, x, i::4].tolist() == pytest.approx(want, abs=1e-5)


def test_widths_that_sincos_cannot_fill() -> None:
    with pytest.raises(TrunklineError, match="even dim, not 15"):
        sincos_positions(4, 15)
    with pytest.raises(TrunklineError, match="multiple of 4, not 18"):
        sincos_positions_2d((2, 2), 18)


@pytest.mark.parametrize(("old", "new"), [((4, 4), (7, 7)), ((6, 4), (3, 5)), ((2, 8), (8, 2)), ((3, 5), (3, 5))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resized_positions(old: tuple[int, int], new: tuple[int, int], dtype: torch.dtype) -> None:
    positions = torch.randn(1, old[0] * old[1], 8, dtype=dtype)
    want = resample_abs_pos_embed(positions, list(new), list(old), num_prefix_tokens=0)
    got = resize_positions(positions, old, new)
    assert got.dtype == dtype
    assert_near(got, want, 1e-6)


# --- patches and pooling ---


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("size", [(8, 8), (12, 8), (4, 20)])
def test_patches_against_convolution(channels: int, size: tuple[int, int]) -> None:
    embed = randomise(PatchEmbed(size, 4, channels, 16))
    image = torch.randn(2, channels, *size)
    want = F.conv2d(image, embed.proj.weight.reshape(16, channels, 4, 4), embed.proj.bias, stride=4)
    assert_near(embed(image), want.flatten(2).mT)  # (B, D, rows, columns) -> (B, T, D)


@pytest.mark.parametrize("masked", [False, True])
def test_attention_pool_against_timm(masked: bool) -> None:
    theirs = randomise(AttentionPoolLatent(32, num_heads=4, mlp_ratio=2, norm_layer=partial(nn.LayerNorm, eps=1e-6)))
    ours = AttentionPool(TransformerConfig(32, 1, 4, 2, mlp_dim=64, qk_norm=True))
    ours.load_state_dict(
        {
            "query" if name == "latent" else f"attn.{name}" if name.startswith(("q.", "kv.", "proj.")) else name: value
            for name, value in theirs.state_dict().items()
        }
    )
    x = torch.randn(3, 6, 32)
    mask = (torch.arange(6) < torch.tensor([[6], [2], [4]]))[:, None, None] if masked else None
    assert_near(ours(x, mask), theirs(x, attn_mask=mask))
