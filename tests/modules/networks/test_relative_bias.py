"""T5's relative position bias against plain loops, inside the trunk and with a cache."""

import math
from typing import Any

import pytest
import torch
from test_networks import assert_near, randomise

from trunkline import TrunklineError
from trunkline.modules.backbone import KVCache, Transformer, TransformerConfig
from trunkline.modules.networks.positions import RelativeBias


def bucket(offset: int, causal: bool, buckets: int, distance: int) -> int:
    """The formula of T5 for a key `offset` tokens after the query."""
    first = 0
    if not causal:
        buckets //= 2
        first = buckets if offset > 0 else 0
    elif offset > 0:
        offset = 0
    exact = buckets // 2
    if abs(offset) < exact:
        return first + abs(offset)
    far = math.log(abs(offset) / exact) / math.log(distance / exact) * (buckets - exact)
    return first + min(exact + math.floor(far + 1e-9), buckets - 1)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("buckets", "distance"), [(32, 100), (8, 11), (4, 3)])
@pytest.mark.parametrize("start", [0, 3])
def test_bias_against_loops(causal: bool, buckets: int, distance: int, start: int) -> None:
    module = RelativeBias(2, buckets, distance, causal)
    torch.nn.init.normal_(module.table.weight)
    mask = torch.rand(3, start + 40) > 0.3
    bias, masked = module(40, start), module(40, start, mask)
    assert bias.shape == (1, 2, 40, start + 40)
    for query in range(40):
        for key in range(start + 40):
            want = module.table.weight[bucket(key - query - start, causal, buckets, distance)]
            assert torch.equal(bias[0, :, query, key], want)
            for row in range(3):
                assert (masked[row, :, query, key] == (want if mask[row, key] else -math.inf)).all()


@pytest.mark.parametrize("causal", [False, True])
def test_bias_moves_attention_and_learns(causal: bool) -> None:
    """Scores are q k / sqrt(E) + bias; every bucket that occurs has a gradient."""
    cfg = TransformerConfig(32, 1, 4, causal=causal)
    model, module, x = randomise(Transformer(cfg)).eval(), RelativeBias(4, 8, 5, causal), torch.randn(2, 9, 32)
    torch.nn.init.normal_(module.table.weight)
    plain = model(x, return_attention=True).attention
    out = model(x, mask=module(9), return_attention=True)
    assert plain is not None
    assert out.attention is not None
    assert_near(out.attention[0], (plain[0].log() + module(9)).softmax(dim=-1))
    model(x, mask=module(9)).x.square().sum().backward()
    gradient = module.table.weight.grad
    assert gradient is not None
    met = sorted({bucket(k - q, causal, 8, 5) for q in range(9) for k in range(q + 1 if causal else 9)})
    assert (gradient.abs().amax(dim=1) > 0).nonzero()[:, 0].tolist() == met


def test_bias_with_a_cache() -> None:
    cfg = TransformerConfig(32, 2, 4, causal=True)
    model, module, x = randomise(Transformer(cfg)).eval(), RelativeBias(4, 8, 5, causal=True), torch.randn(2, 9, 32)
    torch.nn.init.normal_(module.table.weight)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, :3] = False
    want, cache = model(x, mask=module(9, mask=mask)).x, KVCache(cfg, 2, 9)
    parts = [
        model(x[:, start:end], mask=module(end - start, start, mask[:, :end]), cache=cache).x
        for start, end in ((0, 4), (4, 5), (5, 9))
    ]
    assert_near(torch.cat(parts, dim=1)[mask], want[mask])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"buckets": 3}, "relative_buckets=3 must be an even number of at least 4"),
        ({"buckets": 2}, "relative_buckets=2 must be an even number of at least 4"),
        ({"buckets": 32, "max_distance": 8}, "relative_distance=8 must be above 8, .* relative_buckets=32 tells apart"),
        ({"buckets": 32, "max_distance": 16, "causal": True}, "relative_distance=16 must be above 16"),
    ],
)
def test_buckets_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TrunklineError, match=message):
        RelativeBias(4, **options)
