"""Repeated n-grams that are excluded, and a first token that is given: against transformers, and made by hand."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from test_generation import before_end, gpt, gpt2, padded, prompts, theirs_generate
from torch import Tensor
from transformers.generation import logits_process

from trunkline import TrunklineError
from trunkline.modules.generation.beams import beam_search
from trunkline.modules.generation.decoding import GenerationConfig, Window, filter_logits
from trunkline.modules.generation.sampling import generate, stream
from trunkline.modules.networks import GPT


class Constant:
    """After every token, the same logits; so greedy search repeats one token."""

    max_length = 16

    def __init__(self, *logits: float) -> None:
        self.logits, self.vocab_size = torch.tensor(logits), len(logits)

    def prefill(self, tokens: Tensor, mask: Tensor | None, room: int, state: Any = None) -> tuple[Tensor, None]:
        return self.step(tokens[:, -1], None), None

    def step(self, tokens: Tensor, state: None) -> Tensor:
        return self.logits.expand(len(tokens), -1)

    def reorder(self, state: None, rows: Tensor) -> None:
        return None


def window(text: list[list[int]], vocabulary: int) -> Window:
    return Window(Constant(*[0.0] * vocabulary), *padded(text), 0)


@pytest.fixture(scope="module")
def pair() -> tuple[Any, GPT]:
    return gpt2()


# --- by hand


@pytest.mark.parametrize(
    ("length", "want"),
    [
        (1, [3, 1, 0, 2, 2, 2]),  # each token once; then none is left, and the rule has no meaning
        (2, [2, 2, 3, 3, 0, 2]),  # the prompt has (3, 1) and (1, 3)
        (3, [2, 2, 2, 3, 2, 3]),  # 3, 2, 2 is there already
        (6, [2, 2, 2, 2, 2, 2]),
        (None, [2, 2, 2, 2, 2, 2]),
    ],
)
def test_greedy_text_that_may_not_repeat_itself(length: int | None, want: list[int]) -> None:
    prompt = [3, 1, 3] if length != 1 else [2]
    config = GenerationConfig(6, no_repeat_ngram=length, temperature=0)
    assert generate(Constant(0.0, 1.0, 3.0, 2.0), torch.tensor([prompt]), config=config) == [want]


def test_tokens_that_would_repeat() -> None:
    """Rows of unequal length: padding, whose id is 0, is no part of an n-gram."""
    given = window([[0, 1, 0, 1, 0, 2, 0], [5, 5], [0, 0, 3]], 7)

    def excluded(length: int) -> list[list[int]]:
        repeated = given.repeats(length)
        assert repeated is not None
        return [row.nonzero()[:, 0].tolist() for row in repeated]

    assert excluded(1) == [[0, 1, 2], [5], [0, 3]]
    assert excluded(2) == [[1, 2], [5], []]
    assert excluded(3) == [[], [], []]
    assert given.repeats(None) is None
    assert given.repeats(8) is None
    given.take(torch.tensor([2, 0, 0]))
    assert excluded(2) == [[], [1, 2], [1, 2]]


def test_a_window_that_slides_has_forgotten_what_it_may_not_repeat() -> None:
    given = Constant(0.0, 1.0, 5.0, 3.0, 2.0)
    given.max_length = 4
    config = GenerationConfig(8, no_repeat_ngram=1, temperature=0)
    # 1 comes to the newer half of 0, 2, 3, 4, so that 2 may come again.
    assert generate(given, torch.tensor([[0]]), config=config) == [[2, 3, 4, 1, 2, 0, 3, 4]]


def test_the_first_token_is_given_in_any_way_of_choosing() -> None:
    network, rows = gpt(), padded(prompts(4, 7, 2))
    for options in ({"temperature": 0}, {"seed": 3, "top_k": 5, "top_p": 0.5, "min_p": 0.1}, {"num_beams": 3}):
        got = generate(network, *rows, GenerationConfig(6, first_token=17, **options))
        assert [row[0] for row in got] == [17, 17, 17]
        follow = [(*row, 17) for row in prompts(4, 7, 2)]
        want = generate(network, *padded(list(map(list, follow))), GenerationConfig(5, **options))
        if "seed" not in options:
            assert [row[1:] for row in got] == want
    assert generate(network, *rows, GenerationConfig(6, first_token=17, temperature=0), end_ids=[17]) == [[], [], []]
    (beams,) = beam_search(network, torch.tensor([[1, 2]]), None, GenerationConfig(1, num_beams=2, first_token=17))
    assert beams[0] == ([17], 0.0)  # what is given costs nothing


@pytest.mark.parametrize("method", [stream, generate, beam_search])
def test_a_first_token_that_the_network_does_not_know(method: Any) -> None:
    message = "first_token is 40, but the network knows the tokens 0 to 39; take the id from the tokenizer"
    with pytest.raises(TrunklineError, match=message):
        method(gpt(), torch.tensor([[1]]), config=GenerationConfig(first_token=40))


# --- transformers


@pytest.mark.parametrize("length", [1, 2, 3, 5])
def test_logits_against_transformers(length: int) -> None:
    text, logits = torch.randint(0, 5, (64, 12)), torch.randn(64, 30)
    penalty = logits_process.RepetitionPenaltyLogitsProcessor(1.4)
    want = logits_process.NoRepeatNGramLogitsProcessor(length)(text, penalty(text, logits))
    seen = torch.zeros(64, 30, dtype=torch.bool).scatter_(1, text, True)
    config = GenerationConfig(repetition_penalty=1.4, no_repeat_ngram=length, temperature=0)
    got = filter_logits(logits, config, seen, window(text.tolist(), 30).repeats(length))
    assert torch.equal(got, want)
    assert got.isinf().any()


@pytest.mark.parametrize("length", [None, 1, 2, 3])
@pytest.mark.parametrize(("first", "beams"), [(None, 1), (9, 1), (None, 3), (9, 3), (9, 4)])
@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_texts_against_transformers(
    pair: tuple[Any, GPT], length: int | None, first: int | None, beams: int, penalty: float
) -> None:
    """A prompt of one token, because transformers gives no first token after a longer one."""
    theirs, ours = pair
    options: dict[str, Any] = {"num_beams": beams, "repetition_penalty": penalty}
    config = GenerationConfig(20, no_repeat_ngram=length, first_token=first, temperature=float(beams > 1), **options)
    free = generate(ours, torch.tensor([[3]]), config=config)
    ends = [free[0][9]]
    options |= {"no_repeat_ngram_size": length, "forced_bos_token_id": first, "num_return_sequences": beams}
    peer = theirs_generate(theirs, [[3]], ends, **options, max_new_tokens=20)
    want = [before_end(row, ends) for row in peer.sequences[:, 1:].tolist()]
    if beams == 1:
        assert generate(ours, torch.tensor([[3]]), config=config, end_ids=ends) == want
        return
    (got,) = beam_search(ours, torch.tensor([[3]]), None, config, ends)
    assert [beam.tokens for beam in got] == want
    assert [beam.score for beam in got] == pytest.approx(peer.sequences_scores.tolist(), rel=1e-5)


def test_a_longer_prompt_against_transformers(pair: tuple[Any, GPT]) -> None:
    theirs, ours = pair
    row = [4, 5, 6, 4, 5, 7, 4]
    for beams in (1, 3):
        peer = theirs_generate(theirs, [row], [], no_repeat_ngram_size=2, num_beams=beams, max_new_tokens=40)
        config = GenerationConfig(40, no_repeat_ngram=2, num_beams=beams, temperature=float(beams > 1))
        got = generate(ours, torch.tensor([row]), config=config)
        assert got == [peer.sequences[0, len(row) :].tolist()]
        whole = row + got[0]
        pairs = list(pairwise(whole))
        assert len({*pairs[2:]}) == len(pairs) - 2  # (4, 5) alone is there twice, in the prompt


# --- rows


@pytest.mark.parametrize("max_length", [8, 64])
@pytest.mark.parametrize("options", [{"temperature": 0}, {"num_beams": 3}, {"temperature": 0, "first_token": 9}])
def test_rows_of_a_batch_are_as_alone(max_length: int, options: dict[str, Any]) -> None:
    """They end at different times, fill their windows, and beams change places."""
    network, rows = gpt("rotary", max_length), prompts(3, 8, 1, 6)
    config = GenerationConfig(20, no_repeat_ngram=2, **options)
    ends = [generate(network, torch.tensor(rows[:1]), config=config)[0][5]]
    alone = [generate(network, torch.tensor([row]), config=config, end_ids=ends)[0] for row in rows]
    for filler in (0, 39):
        assert generate(network, *padded(rows, filler, extra=2), config, ends) == alone


def test_samples_do_not_repeat() -> None:
    network = gpt(scale=1.0)
    config = GenerationConfig(25, no_repeat_ngram=1, seed=3)
    (row,) = generate(network, torch.tensor([[5]]), config=config)
    assert len({5, *row}) == 26
    (other,) = generate(network, torch.tensor([[5]]), config=GenerationConfig(25, seed=3))
    assert len({5, *other}) < 26
