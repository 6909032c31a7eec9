"""Which of PyTorch's attention kernels each recipe gets on a GPU, and that flex attention computes the same there."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import yaml
from recipe_paths import BIASED, PADDED, PATHS, PLAIN
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from trunkline.modules.backbone import KVCache, Transformer, TransformerConfig
from trunkline.modules.networks import BERTConfig
from trunkline.pipelines.configs import config_names, find_config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
DEVICE = "cuda"
KERNELS = {"unmasked": SDPBackend.FLASH_ATTENTION, "masked": SDPBackend.EFFICIENT_ATTENTION}
RECIPES = [name for name in config_names() if not name.startswith("trainer/")]
LENGTH = 300


def trunks_in(content: Any) -> Iterator[TransformerConfig]:
    """All trunks that a recipe states, two blocks each; where it takes a BERT as it is, that of BERT-base."""
    if isinstance(content, dict):
        if "num_heads" in content:
            yield TransformerConfig(**{**content, "depth": 2})
        elif content.get("bert") == {}:
            yield BERTConfig().backbone
        for value in content.values():
            yield from trunks_in(value)


def inputs(cfg: TransformerConfig) -> tuple[Tensor, Tensor]:
    """(2, LENGTH, D) embeddings, and a mask of one full and one padded row."""
    mask = torch.arange(LENGTH, device=DEVICE) < torch.tensor([[LENGTH], [110]], device=DEVICE)
    return torch.randn(2, LENGTH, cfg.dim, device=DEVICE), mask


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_kernel_of_a_recipe(recipe: str) -> None:
    """Forward and backward with only that kernel allowed: PyTorch raises if it does not take these arguments."""
    trunks = list(trunks_in(yaml.safe_load(find_config(recipe).read_text())["model"]))
    assert trunks
    for kind, path in sorted(set(PATHS.get(recipe, [PLAIN]))):
        for cfg in trunks:
            x, mask = inputs(cfg)
            bias = torch.randn(1, cfg.num_heads, LENGTH, LENGTH, device=DEVICE, requires_grad=True)
            given = {PLAIN: None, PADDED: mask, BIASED: bias}[kind, path]
            for causal in (False, True):
                model = Transformer(cfg).to(DEVICE).train()
                with torch.autocast(DEVICE, torch.bfloat16), sdpa_kernel([KERNELS[path]]):
                    model(x, mask=given, causal=causal).x.float().square().sum().backward()


@pytest.mark.parametrize("width", [36, 64])
def test_the_kernel_of_a_step_of_generation(width: int) -> None:
    """Grouped queries and a mask over the slots of a cache, as with a compiled step."""
    cfg = TransformerConfig(256, 2, 4, 2, causal=True, head_dim=width)
    model, (x, mask) = Transformer(cfg).to(DEVICE).eval(), inputs(cfg)
    cache = KVCache(cfg, 2, LENGTH, torch.bfloat16, DEVICE)
    with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16):
        model(x[:, :-1], cache=cache)
        with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION]):
            model(x[:, -1:], mask=mask, cache=cache)


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("what", ["document", "window", "mask"])
def test_flex_attention_is_the_mask(what: str, dtype: torch.dtype, kv_heads: int) -> None:
    """A compiled trunk against the same in float64 with the mask, where it is no further off than eager attention."""
    window = 90 if what == "window" else None
    cfg = TransformerConfig(256, 2, 4, kv_heads, causal=what != "mask", window=window)
    model = Transformer(cfg).to(DEVICE)
    x, mask = inputs(cfg)
    documents = torch.arange(LENGTH, device=DEVICE).expand(2, -1) // 130
    given: dict[str, Any] = {"document": {"document": documents}, "mask": {"mask": mask}, "window": {}}[what]
    real = (mask if what == "mask" else torch.ones_like(mask))[..., None]
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, examples: list[Any]) -> Any:
        graphs.append(graph)
        return torch._dynamo.lookup_backend("inductor")(graph, examples)  # type: ignore[arg-type]

    def step(network: Any, x: Tensor) -> list[Tensor]:
        model.zero_grad()
        with torch.autocast(DEVICE, dtype, enabled=x.dtype == torch.float32):
            out = network(x, **given).x * real
        (out * torch.linspace(-1, 1, cfg.dim, device=DEVICE)).sum().backward()
        return [out.detach().double(), *(p.grad.double() for p in model.parameters() if p.grad is not None)]

    torch._dynamo.reset()
    eager = step(model, x)
    flex = step(torch.compile(model, backend=backend, fullgraph=True), x)
    assert sum(str(node.target) == "flex_attention" for node in graphs[0].graph.nodes) == cfg.depth
    exact = step(model.double(), x.double())
    for got, other, want in zip(flex, eager, exact, strict=True):
        assert (got - want).norm() <= 1.5 * (other - want).norm() + 1e-3 * want.norm()
