"""Text from an encoder-decoder: against computing everything again, each row alone, and long texts."""

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from parity import memorise
from test_encoder_decoder import KINDS, every_kind, network, ragged, words
from torch import Tensor

from trunkline import TrunklineError
from trunkline.modules.generation.beams import beam_search
from trunkline.modules.generation.decoding import Decoder, GenerationConfig
from trunkline.modules.generation.sampling import generate
from trunkline.modules.networks import EncoderDecoder


@cache
@torch.random.fork_rng()
def learnt(kind: str) -> dict[str, Tensor]:
    """Weights with which the network writes texts that depend on the source."""
    torch.manual_seed(0)
    return memorise(EncoderDecoder(replace(KINDS[kind], max_target_length=12)), 19).state_dict()


def writer(kind: str, length: int = 12) -> Any:
    """A network that has learnt texts, and sees `length` tokens of a target."""
    model = EncoderDecoder(replace(KINDS[kind], max_target_length=length))
    weights = dict(learnt(kind))
    if kind == "bart":
        weights["target_pos_embed.weight"] = weights["target_pos_embed.weight"][:length]
    model.load_state_dict(weights)
    return model.double().eval()


def slowly(model: Any, tokens: Tensor, mask: Tensor, prompt: list[int], count: int, end: int) -> list[int]:
    """Greedy text of one source, computing everything again for each token."""
    text = list(prompt)
    source = tokens[mask][None]
    for _ in range(count):
        text.append(int(model(source, torch.tensor([text]))[0, -1].argmax()))
        if text[-1] == end:
            break
    return [token for token in text[len(prompt) :] if token != end]


@every_kind
@pytest.mark.parametrize("side", ["right", "left"])
@torch.no_grad()
def test_greedy_text(kind: str, side: str) -> None:
    """Unequal sources that end at different times, among them one of a single token, and unequal prompts."""
    model, (tokens, mask) = writer(kind), ragged(side)
    prompts = [[0], [0, 5, 7], [0, 3], [0]]
    end = slowly(model, tokens[0], mask[0], [0], 9, -1)[3]
    want = [slowly(model, tokens[row], mask[row], prompts[row], 9, end) for row in range(4)]
    given = torch.tensor([[18] * (3 - len(prompt)) + prompt for prompt in prompts])
    seen = torch.arange(3) >= torch.tensor([3 - len(prompt) for prompt in prompts])[:, None]
    decoder = model.decoder_of(tokens, mask)
    assert isinstance(decoder, Decoder)
    assert generate(decoder, given, seen, GenerationConfig(9, temperature=0), [end]) == want
    one = beam_search(decoder, given, seen, GenerationConfig(9, num_beams=1), [end])
    assert [beams[0].tokens for beams in one] == want


@every_kind
@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 4, "no_repeat_ngram": 2}, {"seed": 3}])
def test_text_of_a_row_is_as_alone(kind: str, options: dict[str, Any]) -> None:
    model, (tokens, mask) = writer(kind), ragged("left")
    config, start = GenerationConfig(8, **options), torch.zeros(4, 1, dtype=torch.long)
    texts = generate(model.decoder_of(tokens, mask), start, config=config)
    end = texts[0][2]
    texts = generate(model.decoder_of(tokens, mask), start, config=config, end_ids=[end])
    if "num_beams" in options:  # random numbers belong to a row's number
        for row in range(4):
            alone = model.decoder_of(tokens[row][mask[row]][None])
            assert generate(alone, start[:1], config=config, end_ids=[end]) == [texts[row]]
    else:
        assert generate(model.decoder_of(tokens[:2], mask[:2]), start[:2], config=config, end_ids=[end]) == texts[:2]


@every_kind
@pytest.mark.parametrize("options", [{"temperature": 0}, {"num_beams": 3}])
def test_text_longer_than_the_window(kind: str, options: dict[str, Any]) -> None:
    """The older half is forgotten, the source is not: it is encoded once, and so are its keys and values."""
    model, (tokens, mask) = writer(kind, 6), ragged("right")
    calls: list[str] = []
    model.encoder.register_forward_hook(lambda *_: calls.append("encoder"))
    for block in model.decoder.blocks:
        block.cross_attn.kv.register_forward_hook(lambda *_: calls.append("kv"))
    start, config = torch.zeros(4, 1, dtype=torch.long), GenerationConfig(12, **options)
    texts = generate(model.decoder_of(tokens, mask), start, config=config)
    assert sorted(calls) == ["encoder", "kv", "kv"]
    for row in range(4):
        source = tokens[row][mask[row]][None]
        if "num_beams" in options:
            assert generate(model.decoder_of(source), start[:1], config=config) == [texts[row]]
            continue
        seen = [0]
        for token in texts[row]:
            assert token == int(model(source, torch.tensor([seen]))[0, -1].argmax())
            seen = [*(seen[3:] if len(seen) == 6 else seen), token]


def test_beams_never_copy_their_source() -> None:
    model, (tokens, mask) = network("2017"), ragged("right")
    decoder = model.decoder_of(tokens, mask)
    _, state = decoder.prefill(torch.zeros(4, 1, dtype=torch.long), None, 5)
    state = decoder.reorder(state, torch.arange(4).repeat_interleave(3))
    held = state.cache.cross[0][0]
    assert len(held) == 4
    for _ in range(3):
        decoder.step(torch.zeros(12, dtype=torch.long), state)
        state = decoder.reorder(state, torch.arange(12).view(4, 3).flip(1).flatten())
        assert state.cache.cross[0][0] is held


def test_generation_turns_dropout_off() -> None:
    both = replace(KINDS["t5"].encoder, dropout=0.5)
    model = network("t5", encoder=both, decoder=both).train()
    tokens, start, config = words(3, 7), torch.zeros(3, 1, dtype=torch.long), GenerationConfig(8, temperature=0)
    text = generate(model.decoder_of(tokens), start, config=config)
    assert all(module.training for module in model.modules())
    assert generate(model.eval().decoder_of(tokens), start, config=config) == text


def test_generation_under_autocast() -> None:
    model, tokens, start = network("t5").float(), words(3, 7), torch.zeros(3, 1, dtype=torch.long)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        decoder = model.decoder_of(tokens)
        logits, state = decoder.prefill(start, None, 3)
        assert state.cache.keys.dtype == torch.bfloat16
        after = decoder.step(words(3), state)
    assert logits.isfinite().all()
    assert after.isfinite().all()
    assert logits.shape == after.shape == (3, 19)


def test_prompts_and_sources_that_differ_in_number() -> None:
    with pytest.raises(TrunklineError, match="3 prompts for 2 sources; give one prompt for each source"):
        generate(network("2017").decoder_of(words(2, 5)), torch.zeros(3, 1, dtype=torch.long))
