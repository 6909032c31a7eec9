"""A compiled step over a cache of fixed shapes: the same texts as without, from one graph."""

from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from device_reads import no_reads
from test_generation import gpt, padded, prompts
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode

from trunkline import TrunklineError
from trunkline.modules.backbone import TransformerConfig
from trunkline.modules.generation.beams import beam_search
from trunkline.modules.generation.compiled import CompiledDecoder, _step, cache_slots, compiled_step
from trunkline.modules.generation.decoding import STEPS_AT_ONCE, Decoder, GenerationConfig
from trunkline.modules.generation.fixed_cache import FixedCache
from trunkline.modules.generation.low_precision import to_bfloat16, to_int8
from trunkline.modules.generation.sampling import generate, stream
from trunkline.modules.networks.encoder_decoder import EncoderDecoder, EncoderDecoderConfig

GREEDY = GenerationConfig(20, temperature=0)
SAMPLED = GenerationConfig(20, top_k=12, repetition_penalty=1.2)


@pytest.fixture
def graphs() -> Iterator[dict[str, Any]]:
    """Counts of the compiler during the test."""
    torch._dynamo.reset()
    compiled_step.cache_clear()
    counters.clear()
    yield counters
    torch._dynamo.reset()
    compiled_step.cache_clear()


@pytest.fixture
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What makes code of the graphs."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=request.param))


def one_graph(graphs: dict[str, Any]) -> bool:
    return graphs["stats"]["unique_graphs"] == 1 and not graphs["graph_break"]


def encoder_decoder(positions: Any) -> EncoderDecoder:
    trunk = TransformerConfig(dim=32, depth=2, num_heads=4)
    network = EncoderDecoder(EncoderDecoderConfig(40, None, 30, 24, positions, encoder=trunk, decoder=trunk)).eval()
    with torch.no_grad():
        for p in network.parameters():
            p.add_(torch.randn_like(p), alpha=0.3)
    return network


def eager(decoder: Any) -> Decoder:
    """The decoder with the fixed cache, not compiled: its arithmetic in a fraction of the time."""
    fixed = CompiledDecoder(decoder)
    fixed._compile = lambda *_: _step  # type: ignore[assignment]
    return fixed


BACKENDS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
"""Half a minute for each network that a C++ compiler compiles; without one, only the graph is captured."""


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("kind", ["learned", "window", "gqa"])
def test_texts_of_all_lengths_from_one_graph(kind: str, graphs: dict[str, Any]) -> None:
    """Prompts of other lengths, with and without padding, greedy and sampled, and past the context."""
    network = gpt(kind)
    compiled = CompiledDecoder(network)
    for lengths in ((3, 7), (11, 2), (5, 5)):
        tokens, mask = padded(prompts(*lengths))
        for config in (GREEDY, SAMPLED):
            assert generate(compiled, tokens, mask, config) == generate(network, tokens, mask, config)
    assert one_graph(graphs)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("positions", ["learned", "relative"])
def test_sources_of_all_lengths_from_one_graph(positions: Any, graphs: dict[str, Any]) -> None:
    network, start = encoder_decoder(positions), torch.zeros(2, 1, dtype=torch.int64)
    for length in (4, 9):
        source = torch.randint(40, (2, length))
        mask = torch.ones_like(source, dtype=torch.bool)
        mask[0, length - 2 :] = length < 9
        want = generate(network.decoder_of(source, mask), start, config=GREEDY)
        assert generate(CompiledDecoder(network.decoder_of(source, mask)), start, config=GREEDY) == want
    assert one_graph(graphs)


@pytest.mark.parametrize("positions", ["learned", "sinusoidal", "relative"])
@pytest.mark.parametrize(
    "config", [GREEDY, SAMPLED, GenerationConfig(20, num_beams=3)], ids=["greedy", "draws", "beams"]
)
def test_a_cache_of_fixed_shapes_with_sources(positions: Any, config: GenerationConfig) -> None:
    """Also when the window of 24 tokens slides."""
    network, source = encoder_decoder(positions), torch.randint(40, (3, 7))
    for prompt in (torch.zeros(3, 1, dtype=torch.int64), torch.randint(40, (3, 9))):
        want = generate(network.decoder_of(source), prompt, config=config)
        assert generate(eager(network.decoder_of(source)), prompt, config=config) == want


@pytest.mark.parametrize("kind", ["learned", "rotary", "window", "gqa"])
@pytest.mark.parametrize("max_length", [9, 32, 600])
def test_a_cache_of_fixed_shapes(kind: str, max_length: int) -> None:
    """Rows that end early, windows that slide, beams; and the memory of a finished text is used again."""
    network, (tokens, mask) = gpt(kind, max_length), padded(prompts(3, 6, 1))
    fixed = eager(network)
    ends = [generate(network, tokens, mask, GREEDY)[0][5]]
    for config in (GREEDY, SAMPLED, GenerationConfig(20, temperature=0, no_repeat_ngram=2)):
        assert generate(fixed, tokens, mask, config, ends) == generate(network, tokens, mask, config, ends)
    beams = GenerationConfig(14, num_beams=3)
    for found, want in zip(
        beam_search(fixed, tokens, mask, beams, ends), beam_search(network, tokens, mask, beams, ends), strict=True
    ):
        assert [beam.tokens for beam in found] == [beam.tokens for beam in want]


def test_texts_at_the_same_time_have_their_own_memory() -> None:
    network, rows = gpt(), torch.tensor(prompts(5, 5))
    fixed = eager(network)
    pairs = zip(*(stream(fixed, row[None], config=GREEDY) for row in rows), strict=True)
    got = [[int(token) for token in text] for text in zip(*pairs, strict=True)]
    assert got == [generate(network, row[None], config=GREEDY)[0] for row in rows]
    assert got[0] != got[1]
    spare = [kept for _, kept in fixed._spare]  # type: ignore[attr-defined]
    assert len(spare) == 2
    generate(fixed, rows[:1], config=GREEDY)
    assert {id(kept) for _, kept in fixed._spare} == {id(kept) for kept in spare}  # type: ignore[attr-defined]


def test_the_memory_of_the_last_two_texts_is_kept() -> None:
    network = gpt()
    fixed: Any = eager(network)
    for rows in (1, 2, 3, 4):
        generate(fixed, torch.tensor(prompts(*[5] * rows)), config=GREEDY)
    newest = [kept for _, kept in fixed._spare]
    assert [kept[0].keys[0].shape[0] for kept in newest] == [3, 4]
    tokens = torch.tensor(prompts(2, 2, 2))
    assert generate(fixed, tokens, config=GREEDY) == generate(network, tokens, config=GREEDY)
    assert [kept[0].keys[0].shape[0] for _, kept in fixed._spare] == [4, 3]
    assert fixed._spare[1][1] is newest[0]


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("backend", ["eager"], indirect=True)
def test_each_of_many_batch_sizes_is_compiled(graphs: dict[str, Any]) -> None:
    """Also more than the compiler makes graphs of one function."""
    network, most = gpt(), 4
    compiled, config = CompiledDecoder(network), GenerationConfig(3, temperature=0)
    with torch._dynamo.config.patch(recompile_limit=most - 2):
        for rows in [*range(1, most + 1), 1, most]:
            tokens = torch.tensor(prompts(*[4] * rows))
            assert generate(compiled, tokens, config=config) == generate(network, tokens, config=config)
    assert graphs["stats"]["unique_graphs"] == most
    assert not graphs["graph_break"]


@pytest.mark.usefixtures("backend", "graphs")
@pytest.mark.parametrize("backend", ["eager"], indirect=True)
def test_a_step_that_cannot_be_one_graph_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler would go on without compiling it, in silence."""
    network, tokens = gpt(), torch.zeros(1, 2, dtype=torch.int64)
    compiled = CompiledDecoder(network)
    with torch._dynamo.config.patch(recompile_limit=1):
        generate(compiled, tokens, config=GenerationConfig(3))
        network.head.bias = torch.nn.Parameter(torch.zeros(40))  # another graph of the same form
        with pytest.raises(TrunklineError, match=r"cannot be compiled: .*recompile.*; generate without compiling"):
            generate(compiled, tokens, config=GenerationConfig(3))
    step = type(network).step
    monkeypatch.setattr(type(network), "step", lambda *given: (torch._dynamo.graph_break(), step(*given))[1])
    with pytest.raises(TrunklineError, match=r"the step of generation cannot be compiled: .*graph_break"):
        generate(CompiledDecoder(gpt(max_length=40)), tokens, config=GREEDY)


@pytest.mark.parametrize(
    ("device", "convert", "want"),
    [
        ("cpu", to_int8, None),
        ("cuda", to_bfloat16, {"triton.cudagraphs": True}),
        ("cuda", to_int8, {"triton.cudagraphs": True, "coordinate_descent_tuning": True}),
    ],
)
@pytest.mark.parametrize("kind", ["gpt", "encoder_decoder"])
def test_options_of_the_compiler(
    kind: str, device: str, convert: Any, want: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a pretended GPU; the compiler takes either options, which it must know, or a mode."""
    assert set(want or {}) <= set(torch._inductor.list_options())
    given: list[dict[str, Any]] = []
    monkeypatch.setattr(torch, "compile", lambda own, **options: given.append(options))
    network: Any = convert(gpt() if kind == "gpt" else encoder_decoder("learned"))
    decoder: Any = network if kind == "gpt" else network.decoder_of(torch.zeros(1, 3, dtype=torch.int64))
    with FakeTensorMode():
        decoder.first_weight = torch.nn.Parameter(torch.zeros(1, device=device))
    compiled = CompiledDecoder(decoder)
    compiled_step.__wrapped__(compiled._options, ())
    assert given == [{"dynamic": False, "fullgraph": True, "options": want}]


def test_rows_that_have_ended_wait_for_the_next_check() -> None:
    network, tokens = gpt(), torch.tensor(prompts(4))
    config = GenerationConfig(3 * STEPS_AT_ONCE, temperature=0)
    end = generate(network, tokens, config=config)[0][2]
    steps = torch.stack(list(stream(eager(network), tokens, config=config, end_ids=[end])))[:, 0].tolist()
    first = steps.index(end)
    assert len(steps) == STEPS_AT_ONCE
    assert steps[first:] == [end] * (STEPS_AT_ONCE - first)


@pytest.mark.parametrize("options", [{"temperature": 0}, {"top_k": 9, "top_p": 0.9, "min_p": 0.01}])
def test_the_host_reads_nothing_between_two_checks(options: Any) -> None:
    config = GenerationConfig(2 * STEPS_AT_ONCE + 5, repetition_penalty=1.2, no_repeat_ngram=3, **options)
    steps = stream(eager(gpt(max_length=64)), torch.tensor(prompts(4, 4)), config=config, end_ids=[1])
    next(steps)
    for number in range(1, config.max_new_tokens):
        with no_reads() if number % STEPS_AT_ONCE else nullcontext():
            next(steps)


def test_few_lengths_of_the_cache() -> None:
    assert {cache_slots(length, 1024) for length in range(1, 1025)} == {256, 512, 1024}
    assert cache_slots(30, 32) == 32
    assert all(cache_slots(length, 1000) >= length for length in range(1, 1001))


def test_only_decoders_with_a_cache() -> None:
    class Other(torch.nn.Linear):
        vocab_size, max_length = 4, 8

        def prefill(self, tokens: torch.Tensor, mask: Any, room: int, state: Any = None) -> Any:
            return torch.zeros(len(tokens), 4), object()

    with pytest.raises(TrunklineError, match="Other keeps no key/value cache in its state"):
        generate(CompiledDecoder(Other(2, 2)), torch.zeros(1, 2, dtype=torch.int64), config=GREEDY)


def test_without_a_compiler(graphs: dict[str, Any]) -> None:
    def broken(module: Any, inputs: Any) -> Any:
        raise torch._inductor.exc.InvalidCxxCompiler

    compiled = CompiledDecoder(gpt())
    compiled._compile = lambda *_: torch.compile(_step, backend=broken)  # type: ignore[assignment]
    with pytest.raises(TrunklineError, match=r"No working C.. compiler found.*; install a .* or generate without"):
        generate(compiled, torch.zeros(1, 2, dtype=torch.int64), config=GREEDY)


def test_slots_that_are_not_filled_are_never_read() -> None:
    cache = gpt().make_cache(2, 3)
    cache.length = 2
    fixed = FixedCache(cache, 5)
    assert fixed.seen(None).tolist() == [[True, True, True, False, False]]
    fixed.advance(1)
    mask = torch.tensor([[False, True, True, True, True]] * 2)
    assert fixed.seen(mask).tolist() == [[False, True, True, True, False]] * 2
