"""On a CUDA device the compiled step is one CUDA graph, and writes what the network writes without it."""

from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from trunkline.modules.backbone import TransformerConfig
from trunkline.modules.generation.compiled import CompiledDecoder
from trunkline.modules.generation.decoding import GenerationConfig
from trunkline.modules.generation.sampling import generate
from trunkline.modules.networks import GPT, GPTConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
TRUNKS: dict[str, dict[str, Any]] = {"learned": {}, "none": {"rope_theta": 1e4, "num_kv_heads": 2, "norm": "rmsnorm"}}


@pytest.mark.parametrize("positions", TRUNKS)
@pytest.mark.parametrize("rows", [1, 5])
def test_compiled_text_is_eager_text(positions: Any, rows: int) -> None:
    torch._dynamo.reset()
    counters.clear()
    trunk = TransformerConfig(dim=64, depth=2, num_heads=4, causal=True, **TRUNKS[positions])
    network = GPT(GPTConfig(101, 48, positions, backbone=trunk)).cuda().eval()
    with torch.no_grad():
        for p in network.parameters():
            p.add_(torch.randn_like(p), alpha=0.3)
    compiled = CompiledDecoder(network)
    for length in (3, 11):
        tokens = torch.randint(101, (rows, length), device="cuda")
        for options in ({"temperature": 0.0}, {"top_k": 9}):
            config = GenerationConfig(60, **options)  # past the context
            assert generate(compiled, tokens, config=config) == generate(network, tokens, config=config)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["inductor"]["cudagraph_skips"]
