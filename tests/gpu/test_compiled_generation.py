"""On a GPU the compiled step is one CUDA graph, and writes what the network writes without it."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from trunkline.modules.backbone import TransformerConfig
from trunkline.modules.generation.compiled import CompiledDecoder, _step
from trunkline.modules.generation.decoding import GenerationConfig
from trunkline.modules.generation.low_precision import FEW_ROWS, to_bfloat16, to_int8
from trunkline.modules.generation.sampling import generate
from trunkline.modules.networks import GPT, GPTConfig
from trunkline.modules.networks.encoder_decoder import EncoderDecoder, EncoderDecoderConfig

TRUNKS: dict[str, dict[str, Any]] = {"learned": {}, "none": {"rope_theta": 1e4, "num_kv_heads": 2, "norm": "rmsnorm"}}
OPTIONS: tuple[dict[str, Any], ...] = ({"temperature": 0.0}, {"top_k": 9})
LOW = {"bfloat16": to_bfloat16, "int8": to_int8}


@pytest.fixture(autouse=True)
def _no_graphs() -> None:
    torch._dynamo.reset()
    counters.clear()


def one_cuda_graph(device: torch.device) -> bool:
    """Always true in a rehearsal, which compiles nothing."""
    return device.type == "cpu" or (
        counters["stats"]["unique_graphs"] == 1 and not counters["inductor"]["cudagraph_skips"]
    )


def compiled(decoder: Any, device: torch.device) -> CompiledDecoder:
    made = CompiledDecoder(decoder)
    if device.type == "cpu":
        made._compile = lambda *_: _step  # type: ignore[assignment]
    return made


def random(network: Any, device: torch.device) -> Any:
    """The network with weights large enough that its texts are no repetitions."""
    with torch.no_grad():
        for p in network.parameters():
            p.add_(torch.randn_like(p), alpha=0.3)
    return network.to(device).eval()


def gpt(positions: Any, device: torch.device) -> GPT:
    trunk = TransformerConfig(dim=64, depth=2, num_heads=4, causal=True, **TRUNKS[positions])
    return random(GPT(GPTConfig(101, 48, positions, backbone=trunk)), device)


def encoder_decoder(positions: Any, device: torch.device) -> EncoderDecoder:
    trunk = TransformerConfig(dim=64, depth=2, num_heads=4)
    return random(
        EncoderDecoder(EncoderDecoderConfig(101, None, 30, 48, positions, encoder=trunk, decoder=trunk)), device
    )


def sources(rows: int, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Random sources, the first of them padded, and their mask."""
    mask = torch.ones(rows, length, dtype=torch.bool, device=device)
    mask[0, length - 2 :] = False
    return torch.randint(101, (rows, length), device=device), mask


@pytest.mark.parametrize("positions", TRUNKS)
@pytest.mark.parametrize("rows", [1, 5])
def test_compiled_text_is_eager_text(positions: Any, rows: int, device: torch.device) -> None:
    network = gpt(positions, device)
    decoder = compiled(network, device)
    for length in (3, 11):
        tokens = torch.randint(101, (rows, length), device=device)
        for options in OPTIONS:
            config = GenerationConfig(60, **options)  # past the context
            assert generate(decoder, tokens, config=config) == generate(network, tokens, config=config)
    assert one_cuda_graph(device)


@pytest.mark.parametrize("positions", ["learned", "relative"])
@pytest.mark.parametrize("rows", [1, 5])
def test_compiled_text_of_a_source_is_eager_text(positions: Any, rows: int, device: torch.device) -> None:
    """Sources of two lengths, by one object, which keeps its memory."""
    network, start = encoder_decoder(positions, device), torch.zeros(rows, 1, dtype=torch.int64, device=device)
    made = compiled(network.decoder_of(*sources(rows, 4, device)), device)
    for length in (4, 9):
        made.decoder = network.decoder_of(*sources(rows, length, device))
        for options in OPTIONS:
            config = GenerationConfig(60, **options)
            assert generate(made, start, config=config) == generate(made.decoder, start, config=config)
    assert one_cuda_graph(device)


@pytest.mark.parametrize("kind", ["gpt", "encoder_decoder"])
@pytest.mark.parametrize("precision", LOW)
@pytest.mark.parametrize("rows", [1, FEW_ROWS + 1])
def test_compiled_low_precision_is_as_near(rows: int, precision: str, kind: str, device: torch.device) -> None:
    """To the same weights in float64, as the eager step is: what the compiler joins it rounds less often."""
    if device.type == "cpu":
        rows = FEW_ROWS + 1  # so that it multiplies as a GPU does
    given = sources(rows, 9, device)
    forced = torch.randint(101, (6, rows), device=device)

    def logits(network: nn.Module, compile_step: bool = False) -> Tensor:
        decoder: Any = network if kind == "gpt" else network.decoder_of(*given)  # type: ignore[operator]
        decoder = compiled(decoder, device) if compile_step else decoder
        first, state = decoder.prefill(forced[:1].T, None, len(forced))
        steps = [first, *(decoder.step(tokens, state).clone() for tokens in forced[1:])]
        return torch.stack(steps).double()

    network = gpt("learned", device) if kind == "gpt" else encoder_decoder("learned", device)
    low: nn.Module = LOW[precision](network)
    with torch.no_grad():
        exact, eager, got = logits(copy.deepcopy(low).double()), logits(low), logits(low, compile_step=True)
    assert (got - exact).norm() <= 1.5 * (eager - exact).norm() + 1e-3 * exact.norm()
    assert (eager - exact).norm() > 0
    assert one_cuda_graph(device)
