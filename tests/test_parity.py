"""Parity with independent references: torch's own layers, timm, and plain float64 loops."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import AttentionPoolLatent, resample_abs_pos_embed
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, BertForPreTraining, GPT2Config, GPT2LMHeadModel, GPT2Model

from trunkline import TrunklineError
from trunkline.modules.backbone import (
    AttentionPool,
    PatchEmbed,
    Transformer,
    TransformerConfig,
    resize_positions,
    sincos_positions,
    sincos_positions_2d,
)
from trunkline.modules.backbone.attention import Attention, rotate, rotation_table
from trunkline.modules.backbone.transformer import Block
from trunkline.modules.networks import BERT, GPT, BERTConfig, ViT, ViTConfig
from trunkline.modules.networks.convert import (
    bert_from_transformers,
    gpt_config_from_transformers,
    gpt_from_transformers,
    vit_from_timm,
)


def randomise(module: nn.Module, scale: float = 0.2) -> Any:
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn_like(p), alpha=scale)
    return module


def assert_near(got: Tensor, want: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


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


# --- patches, pooling and the ViT ---


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


VITS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # timm's arguments, and ours
    "cls": ({}, {}),
    "registers": ({"reg_tokens": 4}, {"num_registers": 4}),
    "no_embed_class": ({"no_embed_class": True}, {}),
    "no_embed_class-registers": ({"no_embed_class": True, "reg_tokens": 4}, {"num_registers": 4}),
    "map": ({"global_pool": "map", "class_token": False}, {"pool": "map"}),
    "wide": ({"img_size": (32, 80)}, {"image_size": (32, 80)}),
    "features": ({"num_classes": 0, "in_chans": 1}, {"num_classes": 0, "in_chans": 1}),
    "qk_norm": ({"qk_norm": True}, {"qk_norm": True}),
}


def vit_pair(name: str, image_size: int | tuple[int, int] = 64, depth: int = 2) -> tuple[nn.Module, ViT, Tensor]:
    """ViT-Ti/16 of timm with random weights and biases, ours after conversion, and two images."""
    theirs, ours = (dict(changes) for changes in VITS[name])
    theirs = {"img_size": image_size, "num_classes": 10, "depth": depth, **theirs}
    peer = timm.create_model("vit_tiny_patch16_224", pretrained=False, **theirs).eval()
    randomise(peer, 0.05)
    trunk = TransformerConfig(192, depth, 3, qk_norm=ours.pop("qk_norm", False))
    vit = ViT(ViTConfig(**{"image_size": image_size, "num_classes": 10, "backbone": trunk, **ours})).eval()
    vit.load_state_dict(vit_from_timm(peer.state_dict(), math.prod(vit.patch_embed.grid)))
    return peer, vit, torch.randn(2, vit.config.in_chans, *vit.config.size)


@pytest.mark.parametrize("name", VITS)
@torch.no_grad()
def test_vit_against_timm(name: str) -> None:
    peer, vit, image = vit_pair(name)
    want = peer(image)
    assert 0.2 < want.std() < 20
    assert_near(vit(image), want)


@torch.no_grad()
def test_vit_tiny_in_full_against_timm() -> None:
    peer, vit, image = vit_pair("cls", image_size=224, depth=12)
    assert sum(p.numel() for p in vit.parameters()) == sum(p.numel() for p in peer.parameters()) - 192  # cls position
    assert_near(vit(image), peer(image))


def test_vit_gradients_against_timm() -> None:
    peer, vit, image = vit_pair("cls")
    images = [image.clone().requires_grad_() for _ in range(2)]
    for model, x in zip((peer, vit), images, strict=True):
        F.cross_entropy(model(x), torch.tensor([3, 7])).backward()
    assert images[0].grad is not None
    assert images[1].grad is not None
    assert_near(images[1].grad, images[0].grad)
    gradients = {name: p.grad for name, p in peer.named_parameters()}
    want = vit_from_timm(gradients, math.prod(vit.patch_embed.grid))
    want["cls_token"] = gradients["cls_token"]  # the converter adds its position
    for name, p in vit.named_parameters():
        assert p.grad is not None
        assert_near(p.grad, want[name])


# --- GPT-2


def gpt2_pair(**options: Any) -> tuple[Any, GPT, Tensor]:
    """A small GPT-2 of transformers with random weights, biases and norms, ours after conversion, and two texts."""
    sizes = {"vocab_size": 50, "n_positions": 16, "n_embd": 32, "n_layer": 3, "n_head": 4}
    peer: Any = GPT2LMHeadModel(GPT2Config(**{**sizes, "bos_token_id": None, "eos_token_id": None, **options}))
    randomise(peer.eval(), 0.1)
    gpt = GPT(gpt_config_from_transformers(peer.config.to_dict())).eval()
    gpt.load_state_dict(gpt_from_transformers(peer.state_dict()))
    return peer, gpt, torch.randint(0, 50, (2, 16))


GPT2S: dict[str, dict[str, Any]] = {
    "usual": {},
    "wide": {"n_inner": 40, "activation_function": "relu", "layer_norm_epsilon": 1e-3},
    "untied": {"tie_word_embeddings": False, "activation_function": "gelu"},
}


@pytest.mark.parametrize("name", GPT2S)
@torch.no_grad()
def test_gpt_against_transformers(name: str) -> None:
    peer, gpt, tokens = gpt2_pair(**GPT2S[name])
    want = peer(tokens).logits
    assert 0.2 < want.std() < 20
    assert_near(gpt(tokens), want)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[1, :5] = False
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    want = peer(tokens, attention_mask=mask.long(), position_ids=positions).logits
    assert_near(gpt(tokens, mask=mask)[mask], want[mask])


def test_gpt_gradients_against_transformers() -> None:
    peer, gpt, tokens = gpt2_pair(attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0)
    for model in (lambda x: peer(x).logits, gpt):
        F.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    want = gpt_from_transformers({name: p.grad for name, p in peer.named_parameters()})
    for name, p in gpt.named_parameters():
        assert p.grad is not None
        assert_near(p.grad, want[name])


@torch.no_grad()
def test_gpt_from_the_names_in_files() -> None:
    """Files of GPT-2 lack the prefix and the tied head; old ones hold causal masks."""
    peer, gpt, tokens = gpt2_pair()
    bare = GPT2Model(peer.config)
    bare.load_state_dict(peer.transformer.state_dict())
    mask = torch.ones(1, 1, 16, 16).tril()
    weights = {**bare.state_dict(), "h.0.attn.bias": mask, "h.0.attn.masked_bias": torch.tensor(-1e4)}
    gpt.load_state_dict(gpt_from_transformers(weights))
    assert_near(gpt(tokens), peer(tokens).logits)


@pytest.mark.parametrize(
    "option",
    [{"activation_function": "tanh"}, {"scale_attn_weights": False}, {"scale_attn_by_inverse_layer_idx": True}],
)
def test_gpt2_with_options_of_its_own(option: dict[str, Any]) -> None:
    ((name, value),) = option.items()
    with pytest.raises(TrunklineError, match=f"a GPT-2 with {name}={value} cannot be converted"):
        gpt_config_from_transformers(GPT2Config(**option).to_dict())


# --- BERT


def bert_pair(next_sentence: bool) -> tuple[Any, BERT, dict[str, Tensor]]:
    """A small BERT of transformers with random weights, ours after conversion, and two padded pairs of texts.

    Without token 0, whose embedding gets no gradient there.
    """
    sizes = {"vocab_size": 50, "max_position_embeddings": 16, "hidden_size": 32, "num_hidden_layers": 3}
    more = {"num_attention_heads": 4, "intermediate_size": 40, "hidden_dropout_prob": 0.0}
    kind = BertForPreTraining if next_sentence else BertForMaskedLM
    peer: Any = kind(BertConfig(**sizes, **more, attention_probs_dropout_prob=0.0))
    randomise(peer.eval(), 0.1)
    trunk = {"dim": 32, "depth": 3, "num_heads": 4, "mlp_dim": 40, "norm_eps": 1e-12}
    backbone = TransformerConfig(**trunk, norm_first=False, final_norm=False)
    bert = BERT(BERTConfig(50, 16, next_sentence=next_sentence, backbone=backbone)).eval()
    bert.load_state_dict(bert_from_transformers(peer.state_dict()))
    tokens, segments = torch.randint(1, 50, (2, 14)), (torch.arange(14) > 6).long().expand(2, 14)
    mask = torch.arange(14) < torch.tensor([[14], [9]])
    return peer, bert, {"tokens": tokens, "segments": segments, "mask": mask}


@pytest.mark.parametrize("next_sentence", [False, True])
@torch.no_grad()
def test_bert_against_transformers(next_sentence: bool) -> None:
    peer, bert, batch = bert_pair(next_sentence)
    mask = batch["mask"]
    theirs = peer(batch["tokens"], attention_mask=mask.long(), token_type_ids=batch["segments"])
    want = theirs.prediction_logits if next_sentence else theirs.logits
    assert 0.2 < want.std() < 20
    assert_near(bert(**batch)[mask], want[mask])
    keep = torch.tensor([[3, 7], [0, 8]])
    assert_near(bert(**batch, keep=keep), torch.stack([want[0, [3, 7]], want[1, [0, 8]]]))
    if next_sentence:
        states = bert(**batch, keep=slice(0, 1), return_logits=False)
        assert_near(bert.next_sentence(states[:, 0]).flip(1), theirs.seq_relationship_logits)


def test_bert_gradients_against_transformers() -> None:
    peer, bert, batch = bert_pair(next_sentence=False)
    labels = torch.randint(0, 50, (2, 14)).masked_fill(~batch["mask"], -100)
    theirs = {"attention_mask": batch["mask"].long(), "token_type_ids": batch["segments"], "labels": labels}
    peer(batch["tokens"], **theirs).loss.backward()
    F.cross_entropy(bert(**batch).flatten(0, 1), labels.flatten()).backward()
    grads = {name: p.grad for name, p in peer.named_parameters()}
    want = bert_from_transformers(grads)
    for name, p in bert.named_parameters():
        assert p.grad is not None
        assert_near(p.grad, want[name])
