"""Which path a batch takes through attention, and flex attention against masks and loops."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from device_reads import no_reads
from pretended_gpu import pretend_gpu
from test_backbone import assert_near, config, scalar, trunk
from torch import Tensor
from torch.nn.attention import flex_attention

from trunkline.modules.attention_kernels import attention_path, block_attention, block_mask, mask_kind, product_dtype
from trunkline.modules.backbone import KVCache, Transformer, TransformerConfig
from trunkline.modules.networks import EncoderDecoder, EncoderDecoderConfig
from trunkline.modules.training.compiling import let_sizes_vary

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
LENGTH = 300
"""Three blocks of 128 tokens, of which the last is not full."""
DOCUMENT = torch.stack([torch.arange(LENGTH) // 130 + 1, torch.arange(LENGTH) // 37 + 1])
DOCUMENT[1, 290:] = 0
"""Long and short documents, and padding at the end of a row."""
RIGHT = torch.arange(LENGTH) < torch.tensor([[LENGTH], [110]])
"""A full row, and one whose last blocks are padding."""

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


@pytest.mark.parametrize(
    ("change", "path"),
    [
        ({}, "flex"),
        ({"dtype": torch.float16}, "flex"),
        ({"kind": "none"}, "unmasked"),
        ({"kind": "none", "compiled": False, "dropout": 0.1, "device": CPU}, "unmasked"),
        ({"kind": "scores"}, "masked"),
        ({"device": CPU}, "masked"),
        ({"device": torch.device("mps")}, "masked"),
        ({"dtype": torch.float32}, "masked"),
        ({"dtype": torch.float64}, "masked"),
        ({"dropout": 0.1}, "masked"),
        ({"compiled": False}, "masked"),
        ({"whole": False}, "masked"),
        ({"head_width": 8}, "masked"),
        ({"length": 128}, "masked"),
    ],
)
def test_the_path_of_a_batch(change: dict[str, Any], path: str) -> None:
    batch = {"kind": "tokens", "device": CUDA, "dtype": torch.bfloat16, "head_width": 64, "dropout": 0.0, "length": 129}
    assert attention_path(**{**batch, "compiled": True, "whole": True, **change}) == path


def test_kinds_of_masks() -> None:
    assert mask_kind(None, None) == "none"
    assert mask_kind(None, DOCUMENT) == mask_kind(RIGHT, None) == mask_kind(RIGHT, DOCUMENT) == "tokens"
    assert mask_kind(None, None, 5) == mask_kind(RIGHT, None, 5) == "tokens"
    for mask in (RIGHT[:, None, None], RIGHT.float()):
        assert mask_kind(mask, None) == mask_kind(mask, DOCUMENT) == "scores"


def test_the_type_of_products() -> None:
    """Autocast decides it, for layers of float32 weights too."""
    assert product_dtype(torch.zeros(1)) == product_dtype(torch.zeros(1, device="meta")) == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert product_dtype(torch.zeros(1)) == torch.bfloat16
        assert product_dtype(torch.zeros(1, dtype=torch.float64)) == torch.bfloat16


def allowed(
    mask: Tensor | None, document: Tensor | None, causal: bool, window: int | None, row: int, query: int
) -> list[int]:
    """The keys that a query may attend to."""
    return [
        key
        for key in range(LENGTH)
        if not (causal and key > query)
        and (window is None or key > query - window)
        and (document is None or document[row, key] == document[row, query])
        and (mask is None or mask[row, key])
    ]


TOKENS = [(None, DOCUMENT), (RIGHT, None), (RIGHT, DOCUMENT), (~RIGHT, None)]


@pytest.mark.parametrize(
    ("mask", "document", "causal", "window"),
    [(*tokens, causal, None) for tokens in TOKENS for causal in (False, True)]
    + [(*tokens, True, window) for tokens, window in [((None, None), 1), *((both, 40) for both in TOKENS)]],
)
def test_flex_attention_is_a_loop(
    mask: Tensor | None, document: Tensor | None, causal: bool, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each query against the keys that it may see, in float64; padding on the left leaves queries without any."""
    pretend_gpu(monkeypatch)
    q, k, v = (torch.randn(2, heads, LENGTH, 16, requires_grad=True) for heads in (2, 1, 1))
    got = block_attention(q, k, v, block_mask(torch.empty(2, LENGTH, 32), mask, document, causal, window), 0.3)
    wide = [t.detach().double().requires_grad_() for t in (q, k, v)]
    rows = []
    for row in range(2):
        for query in range(0, LENGTH, 7):
            keys = allowed(mask, document, causal, window, row, query)
            weights = (wide[0][row, :, query] @ wide[1][row, 0, keys].mT * 0.3).softmax(dim=-1)
            rows.append(weights @ wide[2][row, 0, keys])  # (heads, E)
    want = torch.stack(rows).unflatten(0, (2, -1)).transpose(1, 2)
    assert_near(got[:, :, ::7].double(), want)
    for found, wanted in zip(
        torch.autograd.grad(scalar(got[:, :, ::7]), (q, k, v)), torch.autograd.grad(scalar(want), wide), strict=True
    ):
        assert_near(found.double(), wanted, 1e-4)


def outcome(model: Transformer, x: Tensor, real: Tensor, **options: Any) -> tuple[Tensor, list[Tensor]]:
    """States of real tokens, and the gradients of a loss over them."""
    model.zero_grad()
    out = model(x, **options).x
    out = out.masked_fill(~real[..., None], 0) if options.get("keep") is None else out
    scalar(out).backward()
    return out.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


GROUPED = {"num_heads": 2, "num_kv_heads": 1, "qk_norm": True, "rope_theta": 1e4, "norm": "rmsnorm"}


@pytest.mark.parametrize(
    ("fields", "given"),
    [
        ({"causal": True}, {"document": DOCUMENT}),
        ({"causal": True, **GROUPED}, {"document": DOCUMENT, "keep": slice(-3, None)}),
        ({"causal": True, "activation_checkpointing": True}, {"document": DOCUMENT, "layers": [0]}),
        ({"causal": True, "window": 140}, {}),
        ({"causal": True, "window": 20, **GROUPED}, {"document": DOCUMENT, "keep": slice(-3, None)}),
        ({"causal": True, "window": 50}, {"mask": RIGHT, "document": DOCUMENT}),
        ({"causal": False}, {"mask": RIGHT}),
        ({"causal": False, **GROUPED}, {"mask": RIGHT, "keep": torch.tensor([[2, 290], [0, 109]])}),
        ({"causal": False, "cross_attention": True}, {"mask": RIGHT, "document": DOCUMENT}),
    ],
)
def test_flex_attention_is_the_mask(
    fields: dict[str, Any], given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In whole trunks: states at 1e-5, gradients at 1e-4 of their largest. The rule is made once for all blocks."""
    cfg = TransformerConfig(**{"dim": 32, "depth": 3, "num_heads": 2, **fields})
    model, x = Transformer(cfg).train(), torch.randn(2, LENGTH, 32)
    if cfg.cross_attention:
        given = {**given, "context": torch.randn(2, 5, 32), "context_mask": torch.rand(2, 5) < 0.7}
    real = given.get("mask", DOCUMENT > 0)
    want = outcome(model, x, real, **given)
    made: list[Any] = []
    make = flex_attention.create_block_mask
    monkeypatch.setattr(flex_attention, "create_block_mask", lambda *a, **kw: made.append(a) or make(*a, **kw))
    seen = pretend_gpu(monkeypatch)
    got = outcome(model, x, real, **given)
    assert seen == [("tokens", "flex")]
    assert len(made) == 1
    assert_near(got[0], want[0])
    for found, wanted in zip(got[1], want[1], strict=True):
        assert (found - wanted).abs().max() <= 1e-4 * max(wanted.abs().max().item(), 1)


def test_blocks_that_nobody_sees_are_left_out() -> None:
    """Padding at the end costs nothing, and neither do other documents."""
    x = torch.empty(2, LENGTH, 32)
    blocks = block_mask(x, RIGHT, None, causal=False)
    assert blocks.full_kv_num_blocks is not None
    assert (blocks.kv_num_blocks + blocks.full_kv_num_blocks)[:, 0].tolist() == [[3, 3, 3], [1, 1, 1]]
    document = torch.arange(LENGTH).expand(2, -1) // 128
    assert block_mask(x, None, document, causal=True).kv_num_blocks[:, 0].tolist() == [[1, 1, 1], [1, 1, 1]]
    narrow = block_mask(x, None, None, causal=True, window=100)
    assert narrow.kv_num_blocks[:, 0].tolist() == [[1, 2, 2], [1, 2, 2]]
    assert narrow.full_kv_num_blocks is None or not narrow.full_kv_num_blocks.any()


def test_a_rule_is_made_without_waiting_for_the_device() -> None:
    with no_reads():
        block_mask(torch.empty(2, LENGTH, 32), RIGHT, DOCUMENT, causal=True)


@pytest.mark.parametrize("recompute", [False, True])
def test_one_graph_for_all_batches(recompute: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled without breaks, and not again for other documents."""
    cfg = config(num_heads=2, causal=True, activation_checkpointing=recompute)
    model, x = trunk(cfg).train(), torch.randn(2, LENGTH, 32)
    batches = (DOCUMENT, DOCUMENT.flip(0))
    want = [model(x, document=document).x.detach() for document in batches]
    pretend_gpu(monkeypatch)
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for document, wanted in zip(batches, want, strict=True):
        got = compiled(x, document=document).x
        scalar(got).backward()
        assert_near(got, wanted)
    assert len(graphs) == 1
    nodes = [
        node for part in graphs[0].modules() if isinstance(part, torch.fx.GraphModule) for node in part.graph.nodes
    ]
    assert sum(str(node.target) == "flex_attention" for node in nodes) == cfg.depth


@pytest.mark.parametrize(("longest", "paths"), [(128, ["masked"]), (300, ["masked", "flex"])])
def test_sizes_that_vary(longest: int, paths: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """One graph if no row is longer than a block, as a network's limit says; else one for each path."""
    trunk_config = TransformerConfig(32, 1, 2)
    decoder = replace(trunk_config, causal=True, cross_attention=True)
    model = EncoderDecoder(
        EncoderDecoderConfig(40, None, longest, positions="none", encoder=trunk_config, decoder=decoder)
    )
    graphs: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        code = "".join(part.code for part in graph.modules() if isinstance(part, torch.fx.GraphModule))
        graphs.append("flex" if "flex_attention" in code else "masked")
        return graph

    pretend_gpu(monkeypatch)
    torch._dynamo.reset()
    compiled = torch.compile(lambda tokens, mask: model.encode(tokens, mask).x, backend=backend, fullgraph=True)
    for length in (40, 100, 127, 128, longest, 130 if longest > 130 else 3):
        batch = {"tokens": torch.randint(40, (2, length)), "mask": torch.rand(2, length) < 0.8}
        let_sizes_vary(batch)
        with torch.no_grad():
            compiled(**batch)
    assert graphs == paths


def test_caches_and_weights_keep_the_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = pretend_gpu(monkeypatch, length=LENGTH)
    model, x = trunk(config(num_heads=2, causal=True)), torch.randn(2, 7, 32)
    mask = torch.arange(7) >= torch.tensor([[0], [3]])
    want = model(x, mask=mask, return_attention=True)
    cache = KVCache(model.config, batch_size=2, max_length=7)
    got = torch.cat([model(x[:, a:b], mask=mask[:, :b], cache=cache).x for a, b in ((0, 4), (4, 7))], dim=1)
    assert [path for _, path in seen] == ["masked"] * 3
    assert_near(got[mask], want.x[mask])
    assert want.attention is not None
    assert want.attention[0][1, 0, 6, :3].eq(0).all()
