"""Beams of one source share its keys and values in the cache."""

import pytest
import torch
from test_backbone import assert_near, config, inputs, trunk

from trunkline.modules.backbone import KVCache


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("per_query", [False, True])
def test_beams_share_keys_and_values_of_their_context(kv_heads: int, per_query: bool) -> None:
    cfg = config(causal=True, cross_attention=True, num_kv_heads=kv_heads)
    model = trunk(cfg)
    x, context = inputs(cfg, batch=3)
    cache = KVCache(cfg, batch_size=3, max_length=11)
    model(x, cache=cache, **context)
    before = [k for k, _ in cache.cross.values()]
    index, beams = torch.arange(3).repeat_interleave(4), x.repeat_interleave(4, dim=0)
    for order in (index, torch.arange(12).view(3, 4).flip(1).flatten()):
        cache.reorder(order)
    assert [len(k) for k, _ in cache.cross.values()] == [3, 3]
    assert all(torch.equal(k, old) for (k, _), old in zip(cache.cross.values(), before, strict=True))
    new, mask = torch.randn(12, 2, 32), torch.rand(12, 1, 2 if per_query else 1, 5) > 0.3
    mask[..., 0] = True
    got = model(new, cache=cache, context_mask=mask, return_attention=True, **context)
    chosen = {k: v[index] for k, v in context.items()}
    whole = torch.ones(12, 1, 9, 5, dtype=torch.bool)
    whole[:, :, 7:] = mask
    want = model(torch.cat((beams, new), dim=1), context_mask=whole, return_attention=True, **chosen)
    assert got.cross_attention is not None
    assert want.cross_attention is not None
    assert_near(got.cross_attention[0], want.cross_attention[0][:, :, 7:])
    assert_near(got.cross_attention[-1].sum(-1), torch.ones(12, 4, 2))
    cache.length = 7
    assert_near(model(new, cache=cache, context_mask=mask, **context).x, got.x)
    cache.reorder(torch.tensor([1, 5, 5, 8]))  # sources 0, 1, 1, 2
    assert [len(k) for k, _ in cache.cross.values()] == [4, 4]
    assert all(torch.equal(k, old[[0, 1, 1, 2]]) for (k, _), old in zip(cache.cross.values(), before, strict=True))
