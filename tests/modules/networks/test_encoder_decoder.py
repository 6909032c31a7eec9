"""The encoder-decoder: against torch's own Transformer, padding on either side, caches, generation, its start."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_networks import POST_NORM, T5, assert_near, pair, randomise
from torch import Tensor, nn

from trunkline import TrunklineError
from trunkline.modules.backbone import KVCache, Transformer, TransformerConfig
from trunkline.modules.losses import linear_cross_entropy
from trunkline.modules.networks import EncoderDecoder, EncoderDecoderConfig

KINDS = {
    "2017": pair(POST_NORM, scale_embeddings=True, max_target_length=12),
    "t5": pair(T5, positions="relative", relative_buckets=8, relative_distance=6, scale_output=True),
    "bart": pair(POST_NORM, positions="learned", embed_norm=True, output_bias=True),
    "rotary": pair(
        {"rope_theta": 1e4, "num_kv_heads": 2, "qk_norm": True},
        **{"positions": "none", "target_vocab_size": 23, "tie_embeddings": False},
    ),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def network(kind: str, **changes: Any) -> Any:
    return randomise(EncoderDecoder(replace(KINDS[kind], **changes)).double()).eval()


def words(*shape: int) -> Tensor:
    return torch.randint(0, 19, shape)


def ragged(side: str) -> tuple[Tensor, Tensor]:
    """Sources (4, 9) of 9, 4, 1 and 6 tokens, with padding of random ids, and their mask."""
    mask = torch.arange(9) < torch.tensor([9, 4, 1, 6])[:, None]
    return words(4, 9), mask if side == "right" else mask.flip(1)


# --- against torch


def test_against_torch_transformer() -> None:
    """The network of 2017: `nn.Transformer` with embeddings times sqrt(D), sines and cosines, and a tied output."""
    ours = network("2017")
    theirs = nn.Transformer(32, 4, 2, 2, 128, 0.0, "relu", layer_norm_eps=1e-6, batch_first=True)
    theirs.encoder.norm = theirs.decoder.norm = None
    names = {"layers.": "blocks.", "linear1": "mlp.fc1", "linear2": "mlp.fc2", "out_proj": "proj", "self_attn": "attn"}
    weights, own = {}, ours.state_dict()
    for name in theirs.state_dict():
        key = name.replace("norm2", "norm_cross").replace("norm3", "norm2") if "decoder" in name else name
        for old, new in {**names, "multihead_attn": "cross_attn"}.items():
            key = key.replace(old, new)
        if "cross_attn.in_proj_" in key:
            weights[name] = torch.cat([own[key.replace("in_proj_", f"{part}.")] for part in ("q", "kv")])
        else:
            weights[name] = own[key.replace("in_proj_", "qkv.")]
    theirs.load_state_dict(weights)
    tokens, mask = ragged("right")
    given, table = words(4, 7), own["token_embed.weight"]

    def embed(ids: Tensor) -> Tensor:
        angles = torch.arange(ids.shape[1])[:, None] / 10_000 ** (torch.arange(0, 32, 2, dtype=torch.float64) / 32)
        return table[ids] * math.sqrt(32) + torch.cat((angles.sin(), angles.cos()), dim=1)

    future = torch.ones(7, 7, dtype=torch.bool).triu(1)
    theirs.double().eval()
    states = theirs(
        embed(tokens), embed(given), tgt_mask=future, src_key_padding_mask=~mask, memory_key_padding_mask=~mask
    )
    assert_near(ours(tokens, given, mask), states @ table.T)


# --- padding


@every_kind
@pytest.mark.parametrize("side", ["right", "left"])
@torch.no_grad()
def test_a_row_is_as_alone(kind: str, side: str) -> None:
    model, (tokens, mask), given = network(kind), ragged(side), words(4, 7)
    out = model(tokens, given, mask)
    for row in range(4):
        assert_near(
            model(tokens[row][mask[row]][None], given[row : row + 1]), out[row : row + 1], 1e-7
        )  # rotary angles are float32


@every_kind
@torch.no_grad()
def test_float32_row_is_as_alone(kind: str) -> None:
    model, (tokens, mask), given = network(kind).float(), ragged("left"), words(4, 7)
    out = model(tokens, given, mask)
    for row in range(4):
        alone = model(tokens[row][mask[row]][None], given[row : row + 1])[0]
        assert (alone - out[row]).norm() < 1e-6 * out[row].norm()


@every_kind
@torch.no_grad()
def test_padding_of_prompts(kind: str) -> None:
    """Prompts of unequal length are padded on the left; what follows depends on no padding."""
    model, (tokens, mask), given = network(kind), ragged("right"), words(4, 7)
    seen = torch.arange(7) >= torch.tensor([0, 3, 6, 2])[:, None]
    context = model.encode(tokens, mask).x
    states = model.decode(given, context, mask, target_mask=seen).x
    for row in range(4):
        alone = model.decode(given[row][seen[row]][None], context[row : row + 1], mask[row : row + 1]).x
        assert_near(states[row][seen[row]], alone[0], 1e-7)


@every_kind
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_source_of_padding_alone(kind: str, dtype: torch.dtype) -> None:
    model, (tokens, mask), given = network(kind), ragged("right"), words(4, 7)
    want = model(tokens, given, mask)[1:]
    mask[0] = False
    with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
        out = (model if dtype == torch.float64 else model.float())(tokens, given, mask)
    out.float().square().mean().backward()
    assert out.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    if dtype == torch.float64:
        assert_near(out[1:], want, 1e-9)
    else:
        assert ((out[1:] - want).norm() / want.norm()).item() < 0.05


# --- compiled, in bfloat16, and for a chunked loss


@pytest.mark.parametrize(("kind", "masked"), [*((kind, True) for kind in KINDS), ("t5", False)])
def test_one_graph(kind: str, masked: bool) -> None:
    """With gradients, as in training; `eager` traces without a compiler."""
    model, (tokens, mask), given = network(kind).train(), ragged("right"), words(4, 7)
    inputs = (tokens, given, mask if masked else None)
    want = model(*inputs, return_logits=False)
    got = torch.compile(model, backend="eager", fullgraph=True)(*inputs, return_logits=False)
    assert_near(got, want, 1e-9)
    got.sum().backward()


@every_kind
def test_bfloat16_autocast(kind: str) -> None:
    model, (tokens, mask), given = network(kind).float(), ragged("right"), words(4, 7)
    want = model(tokens, given, mask)
    with torch.autocast("cpu", torch.bfloat16):
        got = model(tokens, given, mask)
    assert got.dtype == torch.bfloat16
    assert ((got.float() - want).norm() / want.norm()).item() < 0.05


@every_kind
def test_inputs_of_the_output_layer(kind: str) -> None:
    model, tokens, given, targets = network(kind), words(2, 9), words(2, 7), words(2, 7)
    logits, x = model(tokens, given), model(tokens, given, return_logits=False)
    assert_near(logits, F.linear(x, model.head.weight, model.head.bias), 1e-9)
    loss = linear_cross_entropy(x.flatten(0, 1), model.head.weight, targets.flatten(), model.head.bias)
    assert_near(loss, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"), 1e-9)


@every_kind
@torch.no_grad()
def test_attention_weights(kind: str) -> None:
    model, (tokens, mask), given = network(kind), ragged("left"), words(4, 7)
    source = model.encode(tokens, mask, return_attention=True)
    out = model.decode(given, source.x, mask, return_attention=True)
    assert_near(model.head(model.head_inputs(out.x)), model(tokens, given, mask), 1e-9)
    assert [a.shape for a in source.attention] == [(4, 4, 9, 9)] * 2
    assert [a.shape for a in out.attention] == [(4, 4, 7, 7)] * 2
    assert [a.shape for a in out.cross_attention] == [(4, 4, 7, 9)] * 2
    for layer in (*source.attention, *out.cross_attention):
        assert (layer.transpose(1, 3)[~mask] == 0).all()
        assert_near(layer.sum(-1), torch.ones(layer.shape[:3], dtype=torch.float64), 1e-9)
    assert torch.stack(out.attention).triu(1).abs().max() == 0


# --- caches


@every_kind
@torch.no_grad()
def test_cached_equals_uncached(kind: str) -> None:
    model, (tokens, mask), given = network(kind), ragged("right"), words(4, 9)
    context = model.encode(tokens, mask).x
    want = model.decode(given, context, mask).x
    cache = KVCache(model.config.decoder, 4, 9, dtype=torch.float64)
    parts = [
        model.decode(given[:, start:end], context, mask, cache=cache).x
        for start, end in ((0, 1), (1, 5), (5, 6), (6, 9))
    ]
    assert_near(torch.cat(parts, dim=1), want, 1e-9)
    assert_near(model.decode(given, context, mask, keep=slice(-1, None)).x, want[:, -1:], 1e-9)


# --- the start


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_small_at_first(kind: str) -> None:
    wide = {"dim": 256, "num_heads": 8, "head_dim": None, "mlp_dim": 512}
    config = replace(KINDS[kind], vocab_size=1000, target_vocab_size=1000)
    config = replace(config, encoder=replace(config.encoder, **wide), decoder=replace(config.decoder, **wide))
    logits = EncoderDecoder(config)(words(4, 9), words(4, 9))
    assert 0.02 < logits.std() < 1.5
    assert logits.mean().abs() < 0.1


def test_embeddings_at_first() -> None:
    wide = {"dim": 256, "num_heads": 8, "head_dim": None}
    for kind, std in (("2017", 1 / 16), ("t5", 1.0), ("bart", 0.02), ("rotary", 1.0)):
        both = {side: replace(getattr(KINDS[kind], side), **wide) for side in ("encoder", "decoder")}
        model = EncoderDecoder(replace(KINDS[kind], **both))
        assert model.token_embed.weight.std().item() == pytest.approx(std, rel=0.05)
        assert model.target_embed.weight.std().item() == pytest.approx(std, rel=0.05)


def test_queries_are_divided_where_scores_are_not() -> None:
    """T5's scores are as small at first as those that are divided by sqrt(E); those of muP are left alone."""
    shape = {"dim": 256, "depth": 1, "num_heads": 4}
    found = {}
    for scale in (None, 1.0, 1 / 64):
        trunk = TransformerConfig(**shape, attn_scale=scale)  # type: ignore[arg-type]
        model = EncoderDecoder(EncoderDecoderConfig(19, encoder=trunk, decoder=trunk))
        for linear in (model.decoder.blocks[0].cross_attn.q, model.encoder.blocks[0].attn.qkv):
            found.setdefault(scale, []).append(linear.weight[:256].std().item())
        assert model.encoder.blocks[0].attn.qkv.weight[256:].std().item() == pytest.approx(0.02, rel=0.05)
    assert found[None] == pytest.approx([0.02, 0.02], rel=0.05)
    assert found[1 / 64] == pytest.approx([0.02, 0.02], rel=0.05)
    assert found[1.0] == pytest.approx([0.0025, 0.0025], rel=0.05)


def test_what_is_shared() -> None:
    def count(**changes: Any) -> int:
        return sum(p.numel() for p in EncoderDecoder(replace(KINDS["t5"], **changes)).parameters())

    table = 19 * 32
    one = count()
    assert count(tie_embeddings=False, scale_output=False) == one + table
    assert count(share_embeddings=False) == one + table
    assert count(share_embeddings=False, tie_embeddings=False) == one + 2 * table
    assert count(target_vocab_size=19) == one
    assert count(target_vocab_size=23) == one + 23 * 32
    assert count(target_vocab_size=23, tie_embeddings=False) == one + 2 * 23 * 32
    assert count(output_bias=True) == one + 19
    model = EncoderDecoder(KINDS["t5"])
    assert model.target_embed.weight is model.token_embed.weight is model.head.weight
    assert model.output_modules() == []
    assert EncoderDecoder(KINDS["rotary"]).output_modules() != []


# --- trunks that are given, and bad input


def test_given_trunks() -> None:
    config = KINDS["t5"]
    encoder, decoder = Transformer(config.encoder), Transformer(config.decoder)
    before = encoder.blocks[0].attn.qkv.weight.clone()
    model = EncoderDecoder(config, encoder, decoder)
    assert model.encoder is encoder
    assert model.decoder is decoder
    assert torch.equal(encoder.blocks[0].attn.qkv.weight, before)
    wrong = Transformer(replace(config.encoder, depth=3))
    with pytest.raises(TrunklineError, match=r"trunk has depth=3, but .* encoder\.depth=2; make them equal"):
        EncoderDecoder(config, wrong)
    with pytest.raises(TrunklineError, match=r"has cross_attention=False, but .* decoder\.cross_attention=True"):
        EncoderDecoder(config, encoder, Transformer(config.encoder))


def test_causality_is_set() -> None:
    trunk = TransformerConfig(dim=32, depth=1, num_heads=4)
    for given in (trunk, replace(trunk, causal=True, cross_attention=True)):
        config = EncoderDecoderConfig(encoder=given, decoder=given)
        assert (config.encoder.causal, config.encoder.cross_attention) == (False, False)
        assert (config.decoder.causal, config.decoder.cross_attention) == (True, True)


def test_bad_input() -> None:
    with pytest.raises(TrunklineError, match=r"encoder\.dim=32 and decoder\.dim=16 differ.*make them equal") as error:
        replace(KINDS["t5"], decoder=TransformerConfig(dim=16, depth=1, num_heads=4))
    assert error.value.field == "model.network.decoder.dim"
    model = network("t5")
    with pytest.raises(TrunklineError, match=r"a source of 10 tokens is longer than the 9 .* larger max_length$"):
        model(words(2, 10), words(2, 3))
    model = network("2017")
    with pytest.raises(
        TrunklineError, match=r"a target of 13 tokens is longer than the 12 .* larger max_target_length"
    ):
        model(words(2, 9), words(2, 13))
