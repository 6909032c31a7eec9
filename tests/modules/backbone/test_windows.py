"""Windows: each token sees the last few tokens, by whichever path, against the same trunk with a mask from a loop."""

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_backbone import KEPT, assert_near, config, every, inputs, scalar, trunk
from test_masks import additive
from torch import Tensor

from trunkline import TrunklineError
from trunkline.modules.backbone import KVCache, Transformer, TransformerConfig
from trunkline.modules.backbone.masks import causal_mask

WINDOW = 3
SEEN = torch.tensor([[key <= query and query - key < WINDOW for key in range(7)] for query in range(7)])
PADDED = torch.arange(7) < torch.tensor([[7], [4]])
MASKS = {"none": None, "right": PADDED, "left": PADDED.flip(1), "added": None}
DOCUMENT = torch.tensor([[1, 1, 1, 1, 1, 2, 2], [1, 1, 2, 2, 2, 2, 0]])


def windowed(cfg: TransformerConfig) -> tuple[Transformer, Transformer]:
    """A trunk, and one with the same weights that has a window."""
    model = trunk(cfg)
    other = Transformer(replace(cfg, window=WINDOW)).eval()
    other.load_state_dict(model.state_dict())
    return model, other


def with_window(mask: Tensor | None) -> Tensor:
    """A mask that also says what the window says."""
    if mask is not None and mask.is_floating_point():
        return mask.masked_fill(~SEEN, -math.inf)
    return SEEN.expand(2, 1, 7, 7) & (True if mask is None else mask[:, None, None])


@every(causal=True)
@pytest.mark.parametrize("name", MASKS)
def test_a_window_is_a_mask(cfg: TransformerConfig, name: str) -> None:
    """States, weights of attention, selected tokens and gradients."""
    (model, other), (x, context) = windowed(cfg), inputs(cfg)
    mask = additive((4, 7, 7)) if name == "added" else MASKS[name]
    want, got = (
        net(x, mask=m, **context, return_attention=True) for net, m in ((model, with_window(mask)), (other, mask))
    )
    assert_near(got.x, want.x)
    assert_near(torch.stack(got.attention), torch.stack(want.attention))
    assert not torch.stack(got.attention)[..., ~SEEN].any()
    for keep in KEPT.values():
        assert_near(
            other(x, mask=mask, **context, keep=keep).x, model(x, mask=with_window(mask), keep=keep, **context).x
        )
    grads = []
    for net, m in ((model, with_window(mask)), (other, mask)):
        net.zero_grad()
        scalar(net(x, mask=m, **context).x).backward()
        grads.append([p.grad.clone() for p in net.parameters() if p.grad is not None])
    for one, two in zip(*grads, strict=True):
        assert_near(one, two, 1e-4)


@every(causal=True)
@pytest.mark.parametrize("name", ["none", "left"])
def test_a_cache_forgets(cfg: TransformerConfig, name: str) -> None:
    """Several tokens at a time, and one by one."""
    _, other = windowed(cfg)
    (x, context), mask = inputs(cfg), MASKS[name]
    want = other(x, mask=mask, **context).x
    for borders in ((0, 3, 4, 7), range(8), (0, 7)):
        cache = KVCache(other.config, batch_size=2, max_length=7)
        parts = []
        for a, b in itertools.pairwise(borders):
            seen = None if mask is None else mask[:, :b]
            parts.append(other(x[:, a:b], mask=seen, cache=cache, **context).x)
        assert_near(torch.cat(parts, dim=1), want)


@pytest.mark.parametrize("rope_theta", [None, 100.0])
def test_documents(rope_theta: float | None) -> None:
    model, other = windowed(config(causal=True, rope_theta=rope_theta))
    x = torch.randn(2, 7, 32)
    assert_near(other(x, document=DOCUMENT).x, model(x, document=DOCUMENT, mask=SEEN[None]).x)


def test_a_window_over_slots_whose_number_of_tokens_is_a_tensor() -> None:
    """As in a `FixedCache`: the place of the query is a tensor, and there are more keys than tokens."""
    for start in range(7):
        seen = causal_mask(torch.tensor([start]), 1, 7, torch.device("cpu"), WINDOW)
        assert seen.shape == (1, 1, 1, 7)
        assert torch.equal(seen[0, 0, 0], SEEN[start])


@pytest.mark.parametrize("length", [1, 3, 4])
def test_no_mask_is_built_for_texts_within_the_window(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[bool, bool]] = []
    fused = F.scaled_dot_product_attention

    def spy(*args: Tensor, **kwargs: Any) -> Tensor:
        seen.append((kwargs["attn_mask"] is None, kwargs["is_causal"]))
        return fused(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    trunk(config(causal=True, window=WINDOW))(torch.randn(1, length, 32))
    assert seen == 2 * [(length <= WINDOW, 1 < length <= WINDOW)]


def test_one_graph_on_both_sides_of_the_window() -> None:
    """A symbolic length is not asked whether it is within the window."""
    model, graphs = trunk(config(causal=True, window=WINDOW)), []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for length in (2, 3, 9):
        x = torch.randn(2, length, 32)
        torch._dynamo.mark_dynamic(x, 1)
        assert_near(compiled(x).x, model(x).x)
    assert len(graphs) == 1


def test_a_window_needs_causality() -> None:
    x = torch.randn(1, 5, 32)
    for model, causal in ((trunk(config(window=4)), None), (trunk(config(window=4, causal=True)), False)):
        with pytest.raises(TrunklineError, match=r"window=4 is for a causal trunk, but .*; leave it out"):
            model(x, causal=causal)
    assert trunk(config(window=4))(x, causal=True).x.shape == x.shape
    with pytest.raises(TrunklineError, match="window must be at least 1, not 0"):
        config(window=0)
