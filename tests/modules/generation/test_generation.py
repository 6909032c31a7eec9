"""Text generation: equal to transformers, to recomputing everything, and to each row alone."""

import copy
import math
from typing import Any

import pytest
import torch
from meta_device import BlockingCopy, no_copies
from torch import Tensor
from torch._inductor import decomposition
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.generation import logits_process

from trunkline import TrunklineError
from trunkline.modules.backbone import TransformerConfig
from trunkline.modules.generation import low_precision
from trunkline.modules.generation.beams import beam_search
from trunkline.modules.generation.compiled import CompiledDecoder, _step
from trunkline.modules.generation.decoding import (
    STEPS_AT_ONCE,
    Draws,
    GenerationConfig,
    choose,
    filter_logits,
    row_generator,
)
from trunkline.modules.generation.low_precision import Int8Linear, RowLinear, round_rows, to_bfloat16, to_int8
from trunkline.modules.generation.sampling import generate, stream
from trunkline.modules.networks import GPT, GPTConfig
from trunkline.modules.networks.convert.families import from_foreign

TRUNKS: dict[str, dict[str, Any]] = {
    "learned": {},
    "rotary": {"rope_theta": 100.0},
    "window": {"rope_theta": 100.0, "window": 4},
    "gqa": {"rope_theta": 100.0, "num_kv_heads": 2, "qk_norm": True, "norm": "rmsnorm", "mlp": "swiglu", "bias": False},
}
GREEDY = GenerationConfig(12, temperature=0)


def gpt(kind: str = "learned", max_length: int = 32, scale: float = 0.3, **options: Any) -> GPT:
    trunk = TransformerConfig(dim=32, depth=2, num_heads=4, causal=True, **TRUNKS[kind])
    positions: Any = "learned" if kind == "learned" else "none"
    network = GPT(GPTConfig(40, max_length, positions, backbone=trunk, **options)).eval()
    with torch.no_grad():
        for p in network.parameters():
            p.add_(torch.randn_like(p), alpha=scale)
    return network


def prompts(*lengths: int, seed: int = 1) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 40, (length,), generator=generator).tolist() for length in lengths]


def padded(rows: list[list[int]], filler: int = 0, extra: int = 0) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows)) + extra
    tokens = torch.tensor([[filler] * (width - len(row)) + row for row in rows])
    return tokens, torch.tensor([[n >= width - len(row) for n in range(width)] for row in rows])


@torch.no_grad()
def greedy_by_hand(network: GPT, row: list[int], count: int) -> list[int]:
    """No cache: all is computed anew for each token, and a full window keeps its newest half."""
    limit, window, new = network.config.max_length, list(row), []
    for _ in range(count):
        new.append(int(network(torch.tensor([window]))[0, -1].argmax()))
        if len(window) == limit:
            window = window[-(limit // 2) :]
        window.append(new[-1])
    return new


# --- greedy


@pytest.mark.parametrize("kind", TRUNKS)
def test_greedy_with_cache_equals_greedy_without(kind: str) -> None:
    network, rows = gpt(kind), prompts(5, 5)
    want = [greedy_by_hand(network, row, 12) for row in rows]
    assert len({tuple(row) for row in want}) == 2
    assert len(set(want[0])) > 2
    assert generate(network, torch.tensor(rows), config=GREEDY) == want


@pytest.mark.parametrize("kind", TRUNKS)
@pytest.mark.parametrize("max_length", [6, 7])
def test_past_the_context_the_newest_half_is_kept(kind: str, max_length: int) -> None:
    """Rows of unequal length, which fill their windows at different times."""
    network, rows = gpt(kind, max_length), prompts(1, 4, max_length)
    want = [greedy_by_hand(network, row, 40) for row in rows]
    assert generate(network, *padded(rows), GenerationConfig(40, temperature=0)) == want


def test_a_context_of_one_token() -> None:
    network = gpt(max_length=1)
    want, window = [], [[3]]
    for _ in range(5):
        window = [[int(network(torch.tensor(window))[0, -1].argmax())]]
        want += window[0]
    assert generate(network, torch.tensor([[3]]), config=GenerationConfig(5, temperature=0)) == [want]


@pytest.mark.parametrize("kind", TRUNKS)
@pytest.mark.parametrize("filler", [0, 39])
def test_rows_of_a_batch_are_as_alone(kind: str, filler: int) -> None:
    network, rows = gpt(kind), prompts(3, 9, 1, 6)
    ends = [generate(network, torch.tensor(rows[:1]), config=GREEDY)[0][4]]  # one row at least ends early
    for options in ({"temperature": 0}, {"temperature": 0, "repetition_penalty": 1.5}, {"num_beams": 3}):
        config = GenerationConfig(12, **options)
        alone = [generate(network, torch.tensor([row]), config=config, end_ids=ends)[0] for row in rows]
        assert generate(network, *padded(rows, filler, extra=2), config, ends) == alone


def test_sampled_rows_do_not_depend_on_each_other() -> None:
    network, rows = gpt(), prompts(4, 4, 4)
    config = GenerationConfig(12, seed=5)
    whole = generate(network, torch.tensor(rows), config=config)
    assert generate(network, torch.tensor(rows[:2]), config=config) == whole[:2]
    changed = torch.tensor([rows[1], rows[1], rows[1]])
    again = generate(network, changed, config=config)
    assert again[1] == whole[1]
    assert len({tuple(row) for row in again}) == 3  # each row has draws of its own
    assert generate(network, torch.tensor(rows), config=GenerationConfig(12, seed=6)) != whole
    torch.manual_seed(99)  # the global generator has no part in it
    assert generate(network, torch.tensor(rows), config=config) == whole
    last = generate(network, torch.tensor([rows[2], rows[0]]), config=config, numbers=[2, 0])
    assert last == [whole[2], whole[0]]  # rows keep their draws in any batch


def test_a_row_ends_alone_and_the_caller_may_end_one() -> None:
    network, rows = gpt(), torch.tensor(prompts(4, 4, 4))
    free = generate(network, rows, config=GREEDY)
    end = next(t for t in free[0] if t not in free[1][:6] + free[2][:6])
    ended = torch.zeros(3, dtype=torch.bool)
    steps = []
    for number, given in enumerate(stream(network, rows, None, GREEDY, [end, 38], ended)):
        steps.append(given.tolist())
        ended[2] |= number == 3
    got = [list(row) for row in zip(*steps, strict=True)]
    first = free[0].index(end)
    assert got[0] == free[0][: first + 1] + [end] * (len(steps) - first - 1)
    assert got[2] == free[2][:4] + [end] * (len(steps) - 4)
    assert got[1][:6] == free[1][:6]
    assert generate(network, rows, config=GREEDY, end_ids=[end, 38])[0] == free[0][:first]


def test_modes_and_gradients_are_left_as_they_were() -> None:
    network = gpt().train()
    network.backbone.blocks[0].eval()
    modes = [module.training for module in network.modules()]
    steps = stream(network, torch.tensor([[1, 2]]), config=GREEDY)
    next(steps)
    assert not network.training
    assert not torch.is_inference_mode_enabled()
    steps.close()  # type: ignore[attr-defined]
    assert [module.training for module in network.modules()] == modes
    network(torch.tensor([[1, 2]])).sum().backward()


# --- transformers


def gpt2() -> tuple[Any, GPT]:
    """The same network in transformers and here."""
    torch.manual_seed(3)
    ids = {"bos_token_id": None, "eos_token_id": None}
    theirs = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=32, n_layer=2, n_head=4, n_positions=64, **ids)).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(torch.randn_like(p), alpha=0.2)
    ours = from_foreign(theirs.config.to_dict(), theirs.state_dict()).eval()
    return theirs, ours


@pytest.fixture(scope="module")
def pair() -> tuple[Any, GPT]:
    return gpt2()


def theirs_generate(model: Any, rows: list[list[int]], ends: list[int], **options: Any) -> Any:
    tokens, mask = padded(rows)
    options = {"eos_token_id": ends or None, "pad_token_id": 0, "do_sample": False, "max_new_tokens": 12, **options}
    return model.generate(
        tokens, attention_mask=mask.long(), return_dict_in_generate=True, output_scores=True, **options
    )


def before_end(row: list[int], ends: list[int]) -> list[int]:
    return row[: next((n for n, token in enumerate(row) if token in ends), len(row))]


@pytest.mark.parametrize("penalty", [1.0, 1.4, 0.8])
def test_greedy_against_transformers(pair: tuple[Any, GPT], penalty: float) -> None:
    theirs, ours = pair
    for row in prompts(6, 2, 11):
        ends = [generate(ours, torch.tensor([row]), config=GREEDY)[0][6]]
        want = theirs_generate(theirs, [row], ends, repetition_penalty=penalty).sequences[0, len(row) :].tolist()
        config = GenerationConfig(12, penalty, temperature=0)
        assert generate(ours, torch.tensor([row]), config=config, end_ids=ends) == [before_end(want, ends)]


@pytest.mark.parametrize(("beams", "length_penalty"), [(2, 1.0), (3, 0.0), (4, 2.0), (3, -1.0)])
@pytest.mark.parametrize("count", [0, 1, 3])
@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_beam_search_against_transformers(
    pair: tuple[Any, GPT], beams: int, length_penalty: float, count: int, penalty: float
) -> None:
    """All texts of all rows, with their scores; ends are tokens that the beams do meet."""
    theirs, ours = pair
    rows = prompts(6, 6, 3)
    config = GenerationConfig(12, penalty, num_beams=beams, length_penalty=length_penalty)
    met = sorted({token for row in beam_search(ours, *padded(rows), config) for beam in row for token in beam.tokens})
    ends = met[: 2 * count : 2]
    for batch in ([rows[0]], rows[:2], rows) if penalty == 1 else ([rows[0]], rows[:2]):  # theirs penalises padding
        options = {"num_beams": beams, "num_return_sequences": beams, "length_penalty": length_penalty}
        peer = theirs_generate(theirs, batch, ends, repetition_penalty=penalty, **options)
        width = max(map(len, batch))
        got = [beam for row in beam_search(ours, *padded(batch), config, ends) for beam in row]
        assert [beam.tokens for beam in got] == [before_end(row, ends) for row in peer.sequences[:, width:].tolist()]
        assert [beam.score for beam in got] == pytest.approx(peer.sequences_scores.tolist(), rel=1e-5)
    if count == 3:
        assert min(len(beam.tokens) for beam in got) < 12


PROCESSORS: dict[str, tuple[dict[str, Any], list[Any]]] = {
    "temperature": ({"temperature": 0.7}, [logits_process.TemperatureLogitsWarper(0.7)]),
    "top_k": ({"top_k": 5}, [logits_process.TopKLogitsWarper(5)]),
    "top_k-all": ({"top_k": 1000}, [logits_process.TopKLogitsWarper(1000)]),
    "top_p": ({"top_p": 0.8}, [logits_process.TopPLogitsWarper(0.8)]),
    "top_p-one": ({"top_p": 1e-6}, [logits_process.TopPLogitsWarper(1e-6)]),
    "min_p": ({"min_p": 0.1}, [logits_process.MinPLogitsWarper(0.1)]),
    "min_p-one": ({"min_p": 1.0}, [logits_process.MinPLogitsWarper(1.0)]),
    "penalty": ({"repetition_penalty": 1.7}, [logits_process.RepetitionPenaltyLogitsProcessor(1.7)]),
    "reward": ({"repetition_penalty": 0.6}, [logits_process.RepetitionPenaltyLogitsProcessor(0.6)]),
    "all": (
        {"repetition_penalty": 1.3, "temperature": 1.8, "top_k": 20, "top_p": 0.85, "min_p": 0.08},
        [
            logits_process.RepetitionPenaltyLogitsProcessor(1.3),
            logits_process.TemperatureLogitsWarper(1.8),
            logits_process.TopKLogitsWarper(20),
            logits_process.TopPLogitsWarper(0.85),
            logits_process.MinPLogitsWarper(0.08),
        ],
    ),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_filters_against_transformers(name: str) -> None:
    options, processors = PROCESSORS[name]
    logits, text = 3 * torch.randn(64, 50), torch.randint(0, 50, (64, 9))
    logits[:8] = logits[:8].round()  # ties
    want = logits
    for processor in processors:
        want = processor(text, want)
    seen = torch.zeros(64, 50, dtype=torch.bool).scatter_(1, text, True)
    got = filter_logits(logits, GenerationConfig(**options), seen)
    assert torch.equal(got, want)
    assert not torch.equal(got, logits) or name == "top_k-all"


# --- sampling


@pytest.mark.parametrize("fixed", [False, True], ids=["plain", "fixed"])
def test_each_token_of_a_row_takes_one_number_of_its_generator(fixed: bool) -> None:
    """Also with a cache of fixed shapes: numbers that are drawn for many steps at once are those of one at a time."""
    network, rows = gpt(max_length=64), prompts(4, 4)
    want: list[list[int]] = []
    for row, number in zip(rows, (3, 0), strict=True):
        generator, window = row_generator(5, number), list(row)
        for _ in range(40):
            with torch.no_grad():
                total = network(torch.tensor([window]))[0, -1].double().softmax(dim=0).cumsum(dim=0)
            drawn = float(torch.rand((), dtype=torch.float64, generator=generator))
            window.append(int((total <= drawn).sum()))
        want.append(window[4:])
    decoder: Any = CompiledDecoder(network) if fixed else network
    if fixed:
        decoder._compile = lambda *_: _step
    config = GenerationConfig(40, seed=5)
    assert generate(decoder, torch.tensor(rows), config=config, numbers=[3, 0]) == want


def test_numbers_of_several_steps_come_in_one_copy() -> None:
    draws = Draws(0, range(2), torch.device("meta"))
    for _ in range(2):
        with pytest.raises(BlockingCopy), no_copies():
            draws.next()
        draws.next()
        with no_copies():
            for _ in range(STEPS_AT_ONCE - 1):
                draws.next()


def test_samples_follow_the_softmax() -> None:
    """Pearson's chi-square over 19 degrees of freedom is below 43.8 in all but one of a thousand cases."""
    logits = filter_logits(2 * torch.randn(1, 30), GenerationConfig(top_k=20))
    count = 20_000
    numbers = Draws(7, range(count), torch.device("cpu")).next()
    found = choose(logits.expand(count, -1), numbers).bincount(minlength=30)
    expected = logits[0].double().softmax(0) * count
    assert found[expected == 0].sum() == 0
    kept = expected > 0
    assert ((found[kept] - expected[kept]) ** 2 / expected[kept]).sum() < 43.8


def test_a_sample_is_the_first_token_whose_running_sum_exceeds_the_draw() -> None:
    logits = torch.tensor([[0.0, 0.25, 0.0, 0.5, 0.25, 0.0]]).log()
    for number, token in [(0.0, 1), (0.2499, 1), (0.2501, 3), (0.7499, 3), (0.7501, 4), (1 - 2**-53, 4)]:
        assert choose(logits, torch.tensor([number], dtype=torch.float64)).item() == token


# --- bfloat16 and int8


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", TRUNKS)
@pytest.mark.parametrize("few", [0, 1000])
def test_int8_is_close_to_float(kind: str, tied: bool, few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By PyTorch's kernel and by restored matrices."""
    monkeypatch.setattr(low_precision, "FEW_ROWS", few)
    network = gpt(kind, tie_embeddings=tied)
    small = to_int8(copy.deepcopy(network))
    tokens = torch.tensor(prompts(9, 9))
    with torch.no_grad():
        want, got = network(tokens), small(tokens).float()
        last = small(tokens, keep=slice(-1, None))[:, -1].float()
    assert ((got - want).norm() / want.norm()).item() < 0.05
    assert ((last - want[:, -1]).norm() / want[:, -1].norm()).item() < 0.07
    for (name, module), old in zip(small.named_modules(), network.modules(), strict=True):
        if isinstance(module, Int8Linear):
            assert isinstance(old.weight, Tensor)
            values, scale = round_rows(old.weight)
            assert torch.equal(module.values, values), name
            assert ((values * scale[:, None] - old.weight).abs() <= scale[:, None] / 2 + 1e-7).all(), name
    rows = generate(small, tokens, config=GREEDY)
    assert [len(row) for row in rows] == [12, 12]


def test_int8_weighs_a_quarter() -> None:
    layer = torch.nn.Linear(256, 512)
    values, scale = round_rows(layer.weight)
    assert values.nbytes + scale.nbytes < 0.27 * layer.weight.nbytes


def test_the_compiler_gets_int8_weights_as_they_are() -> None:
    """Only their type changes before the product, which a compiler can do while reading; the scales come after."""
    layer, x = Int8Linear(torch.randn(24, 40), None).bfloat16(), torch.randn(16, 40).bfloat16()
    nodes = list(make_fx(layer)(x).graph.nodes)
    whole = [node for node in nodes if node.op == "call_function" and node.meta["val"].shape.numel() == 24 * 40]
    assert {str(node.target) for node in whole} == {"aten._to_copy.default", "aten.t.default"}
    (product,) = (node for node in nodes if str(node.target) == "aten.mm.default")
    assert [str(node.target) for node in product.users] == ["aten.mul.Tensor"]


@pytest.mark.parametrize(("rows", "tuned", "joined"), [(1, True, True), (1, False, False), (2, True, False)])
def test_the_compiler_joins_int8_weights_with_a_single_row(rows: int, tuned: bool, joined: bool) -> None:
    """On a GPU, which has no numbers here, if an option says so; else a library multiplies after a conversion."""
    with FakeTensorMode(), torch._inductor.config.patch(coordinate_descent_tuning=tuned):
        layer = Int8Linear(torch.empty(24, 40, device="cuda"), None).bfloat16()
        x = torch.empty(rows, 40, dtype=torch.bfloat16, device="cuda")
        table = decomposition.select_decomp_table()
        nodes = make_fx(layer, decomposition_table=table)(x).graph.nodes
    assert any("aten.mm" in str(node.target) for node in nodes) is not joined


@pytest.mark.parametrize("rows", [1, 9])
def test_bfloat16(rows: int) -> None:
    network = gpt(scale=0.1)
    tokens = torch.tensor(prompts(9))[:, :rows]
    small = to_bfloat16(copy.deepcopy(network))
    assert [len(row) for row in generate(small, tokens, config=GREEDY)] == [12]
    with torch.no_grad():
        want = network(tokens)
        assert ((small(tokens).float() - want).norm() / want.norm()).item() < 0.03
    layers = [m for m in small.modules() if isinstance(m, RowLinear)]
    assert len(layers) == sum(isinstance(m, torch.nn.Linear) for m in network.modules())
    assert all(layer.weight.dtype == torch.bfloat16 for layer in layers)


# --- errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, not 0"),
        ({"num_beams": 0}, "num_beams must be at least 1, not 0"),
        ({"top_k": 0}, "top_k must be at least 1, not 0; leave it out"),
        ({"no_repeat_ngram": 0}, "no_repeat_ngram must be at least 1, not 0; leave it out to allow repetitions"),
        ({"first_token": -1}, "first_token must be at least 0, not -1; leave it out"),
        ({"top_p": 0.0}, r"top_p must be above 0 and at most 1, not 0\.0; leave it out"),
        ({"top_p": 1.1}, "top_p must be above 0 and at most 1, not 1.1"),
        ({"min_p": -0.1}, r"min_p must be from 0 to 1, not -0\.1; leave it out"),
        ({"min_p": math.nan}, "min_p must be .*, not nan"),
        ({"temperature": -1.0}, r"temperature must be at least 0, not -1\.0; 0 is greedy"),
        ({"temperature": math.nan}, "temperature must be at least 0, not nan"),
        ({"repetition_penalty": 0.0}, r"repetition_penalty must be above 0, not 0\.0; 1 is none"),
        ({"length_penalty": math.inf}, "length_penalty must be from -10 to 10, not inf; 1 is the mean"),
        ({"seed": -1}, "seed must be at least 0 .*, not -1"),
        ({"num_beams": 2, "top_k": 3, "temperature": 0.5}, "num_beams=2 .* leave out top_k and temperature, or set"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TrunklineError, match=message):
        GenerationConfig(**options)


@pytest.mark.parametrize(
    ("tokens", "mask", "message"),
    [
        ([1, 2], None, r"are \(B, T\) token ids and a boolean mask of the same shape, but got tokens \(2,\)"),
        ([[1, 2]], [[True]], r"got tokens \(1, 2\) and a torch.bool mask \(1, 1\)"),
        ([[1, 2]], [[1, 1]], "got .* torch.int64 mask"),
        ([[1, 2], [1, 2]], [[True, True], [True, False]], "mask of prompts is False after True: pad .* on the left"),
        (
            [[1, 2], [1, 2]],
            [[True, True], [False, False]],
            "prompt 1 has no token; begin it with the end-of-text",
        ),
        ([[]], None, "prompt 0 has no token"),
        ([[1], [40]], None, "token ids from 1 to 40, but the network knows 0 to 39; use the tokenizer"),
        ([[1, -1]], None, "token ids from -1 to 1"),
        ([[0] * 33], None, "prompt 0 has 33 tokens, but the network can see 32; shorten it"),
    ],
)
@pytest.mark.parametrize("method", [stream, generate, beam_search])
def test_bad_prompts(tokens: Any, mask: Any, message: str, method: Any) -> None:
    with pytest.raises(TrunklineError, match=message):
        method(gpt(), torch.tensor(tokens).long(), None if mask is None else torch.tensor(mask))


def test_beams_do_not_stream() -> None:
    with pytest.raises(TrunklineError, match="num_beams=2 is beam search, which cannot stream; call beam_search"):
        stream(gpt(), torch.tensor([[1]]), config=GenerationConfig(num_beams=2))
