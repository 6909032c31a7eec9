"""Generation with other decoders than a GPT alone: embeddings before the prompt, encoder states, and no network."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from test_generation import GREEDY, TRUNKS, gpt, padded, prompts
from torch import Tensor, nn

from trunkline.modules.backbone import KVCache, Transformer, TransformerConfig
from trunkline.modules.generation.beams import beam_search
from trunkline.modules.generation.decoding import Decoder, GenerationConfig
from trunkline.modules.generation.sampling import generate, stream
from trunkline.modules.networks import GPT

OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "penalised": {"temperature": 0, "repetition_penalty": 1.5},
    "sampled": {"seed": 4, "top_k": 9},
    "beams": {"num_beams": 3},
}


@dataclass
class State:
    cache: KVCache
    mask: Tensor
    given: Tensor
    """What the rows depend on besides their tokens."""

    def seen(self, count: int) -> Tensor:
        return self.mask[:, : self.cache.length + count]


class Reordering(nn.Module):
    """The part of `Decoder` that all decoders with a cache share."""

    vocab_size = 40

    def reorder(self, state: State, rows: Tensor) -> State:
        state.cache.reorder(rows)
        return State(state.cache, state.mask[rows], state.given[rows])


class Prompted(Reordering):
    """A GPT whose rows begin with given embeddings (B, P, D), such as those of an image."""

    def __init__(self, gpt: GPT, prefix: Tensor) -> None:
        super().__init__()
        self.gpt, self.prefix, self.max_length = gpt, prefix, gpt.max_length - prefix.shape[1]

    def prefill(self, tokens: Tensor, mask: Tensor | None, room: int, state: State | None = None) -> Any:
        prefix = self.prefix if state is None else state.given
        rows, before = prefix.shape[:2]
        end = before + tokens.shape[1]
        whole = torch.ones(rows, end + room, dtype=torch.bool)
        if mask is not None:
            whole[:, before:end] = mask
        state = State(self.gpt.make_cache(rows, end + room), whole, prefix)
        x = torch.cat([prefix, self.gpt.embed(tokens, mask=whole[:, :end], start=before)], dim=1)
        out = self.gpt.run(x, mask=whole[:, :end], cache=state.cache, keep=slice(-1, None))
        return self.gpt.head(out.x)[:, -1], state

    def step(self, tokens: Tensor, state: State) -> Tensor:
        mask = state.seen(1)
        x = self.gpt.embed(tokens[:, None], mask=mask, start=state.cache.length)
        return self.gpt.head(self.gpt.run(x, mask=mask, cache=state.cache).x)[:, -1]


class Translator(Reordering):
    """A causal trunk over words that also attends to encoder states (B, S, D)."""

    def __init__(self, context: Tensor, max_length: int) -> None:
        super().__init__()
        shape = {"dim": 32, "depth": 2, "num_heads": 4, "cross_attention": True, "rope_theta": 100.0}
        self.backbone = Transformer(TransformerConfig(**shape, causal=True, dropout=0.5))  # type: ignore[arg-type]
        self.words, self.head = nn.Embedding(40, 32), nn.Linear(32, 40)
        self.context, self.max_length = context, max_length
        with torch.no_grad():
            for p in self.parameters():
                p.add_(torch.randn_like(p), alpha=0.3)

    def prefill(self, tokens: Tensor, mask: Tensor | None, room: int, state: State | None = None) -> Any:
        rows, end = tokens.shape
        if state is None:
            state = State(KVCache(self.backbone.config, rows, end + room), torch.ones(0), self.context)
        state.mask = torch.ones(rows, end + room, dtype=torch.bool)
        state.cache.length = 0  # keys and values of the encoder states stay
        if mask is not None:
            state.mask[:, :end] = mask
        return self.logits(tokens, state), state

    def step(self, tokens: Tensor, state: State) -> Tensor:
        return self.logits(tokens[:, None], state)

    def logits(self, tokens: Tensor, state: State) -> Tensor:
        out = self.backbone(
            self.words(tokens), context=state.given, mask=state.seen(tokens.shape[1]), cache=state.cache
        )
        return self.head(out.x[:, -1])

    def plainly(self, tokens: Tensor, row: int) -> Tensor:
        """(V,) logits of the token after (T,) ones, without a cache."""
        return self.head(self.backbone(self.words(tokens[None]), context=self.context[row : row + 1]).x[0, -1])


class Counting:
    """No network and no module: after n comes n + 1."""

    vocab_size, max_length = 10, 4

    def prefill(self, tokens: Tensor, mask: Tensor | None, room: int, state: Any = None) -> tuple[Tensor, None]:
        return self.step(tokens[:, -1], None), None

    def step(self, tokens: Tensor, state: None) -> Tensor:
        return torch.nn.functional.one_hot((tokens + 1) % 10, 10).float() * 50

    def reorder(self, state: None, rows: Tensor) -> None:
        return None


# --- embeddings before the prompt


def with_prefix(network: GPT, words: Tensor) -> Prompted:
    return Prompted(network, network.embed(words).detach())


@pytest.mark.parametrize("kind", TRUNKS)
@pytest.mark.parametrize("options", OPTIONS)
def test_words_as_embeddings_are_as_words(kind: str, options: str) -> None:
    """The prefix is made of word embeddings, so the GPT itself tells what must follow."""
    network, rows = gpt(kind), prompts(5, 5)
    config = GenerationConfig(12, **OPTIONS[options])
    if options == "penalised":  # which counts tokens of the prompt, not embeddings
        config = GenerationConfig(12, temperature=0)
    want = generate(network, torch.tensor(rows), config=config)
    ends = [want[0][4]]
    want = generate(network, torch.tensor(rows), config=config, end_ids=ends)
    decoder = with_prefix(network, torch.tensor(rows)[:, :3])
    assert generate(decoder, torch.tensor(rows)[:, 3:], config=config, end_ids=ends) == want


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("max_length", [9, 32])
def test_rows_with_a_prefix_are_as_alone(options: str, max_length: int) -> None:
    """Rows of unequal length with different prefixes, which end early and fill their windows."""
    network, rows, prefix = gpt("learned", max_length), prompts(3, 6, 1), torch.randn(3, 2, 32)
    config = GenerationConfig(14, **OPTIONS[options])
    ends = [generate(Prompted(network, prefix[:1]), torch.tensor(rows[:1]), config=config)[0][5]]
    alone = []
    for n, row in enumerate(rows):
        tokens = torch.tensor([row] * (n + 1)) if options == "sampled" else torch.tensor([row])  # row n has its draws
        alone.append(generate(Prompted(network, prefix[n].expand(len(tokens), 2, 32)), tokens, None, config, ends)[-1])
    assert generate(Prompted(network, prefix), *padded(rows), config, ends) == alone
    assert len({tuple(row) for row in alone}) == 3


def test_a_full_window_keeps_the_prefix() -> None:
    network, prefix, row = gpt("rotary", 9), torch.randn(1, 2, 32), prompts(3)[0]
    window, want = list(row), []
    with torch.no_grad():
        for _ in range(20):
            x = torch.cat([prefix, network.embed(torch.tensor([window]), start=2)], dim=1)
            want.append(int(network.head(network.run(x).x)[0, -1].argmax()))
            window = [*(window[-3:] if len(window) == 7 else window), want[-1]]
    config = GenerationConfig(20, temperature=0)
    assert generate(Prompted(network, prefix), torch.tensor([row]), config=config) == [want]
    assert generate(Prompted(network, -prefix), torch.tensor([row]), config=config) != [want]


# --- encoder states


@pytest.mark.parametrize("max_length", [6, 32])
def test_encoder_states_are_read_once_and_stay_with_their_rows(max_length: int) -> None:
    """Also when rows leave early and when windows slide."""
    decoder, rows, calls = Translator(torch.randn(3, 5, 32), max_length).eval(), prompts(1, 4, 2), []
    config = GenerationConfig(16, temperature=0)
    want = []
    with torch.no_grad():
        for n, row in enumerate(rows):
            window, new = list(row), []
            for _ in range(16):
                new.append(int(decoder.plainly(torch.tensor(window), n).argmax()))
                window = [*(window[-(max_length // 2) :] if len(window) == max_length else window), new[-1]]
            want.append(new)
    end = want[0][3]
    for block in decoder.backbone.blocks:
        block.cross_attn.kv.register_forward_hook(lambda *_: calls.append(1))
    got = generate(decoder.train(), *padded(rows), config, [end])  # and no dropout while it writes
    assert got == [row[: row.index(end)] if end in row else row for row in want]
    assert decoder.training
    assert len(calls) == 2


def test_beams_carry_encoder_states_along() -> None:
    context, rows = torch.randn(3, 5, 32), prompts(2, 4, 1)
    decoder, config = Translator(context, 32).eval(), GenerationConfig(10, num_beams=3)
    whole = beam_search(decoder, *padded(rows), config, [7, 8])
    for n, row in enumerate(rows):
        decoder.context = context[n : n + 1]
        (alone,) = beam_search(decoder, torch.tensor([row]), None, config, [7, 8])
        assert [beam.tokens for beam in whole[n]] == [beam.tokens for beam in alone]
        assert [beam.score for beam in whole[n]] == pytest.approx([beam.score for beam in alone], rel=1e-5)
        with torch.no_grad():  # the score of the best one is that of its text
            tokens, best = list(row), alone[0].tokens
            ended = len(best) < 10
            total = 0.0
            for token in best:
                total += decoder.plainly(torch.tensor(tokens), 0).log_softmax(0)[token].item()
                tokens.append(token)
            if ended:
                total += decoder.plainly(torch.tensor(tokens), 0).log_softmax(0)[[7, 8]].amax().item()
        assert alone[0].score == pytest.approx(total / (len(best) + ended), rel=1e-4)


# --- no network


@pytest.mark.parametrize("options", OPTIONS)
def test_a_decoder_need_not_be_a_module(options: str) -> None:
    decoder: Decoder = Counting()
    config = GenerationConfig(6, **{**OPTIONS[options], "repetition_penalty": 1.0})
    assert generate(decoder, torch.tensor([[3], [8]]), None, config, [0]) == [[4, 5, 6, 7, 8, 9], [9]]
    first = next(stream(decoder, torch.tensor([[3], [9]]), config=GREEDY))
    assert first.tolist() == [4, 0]
