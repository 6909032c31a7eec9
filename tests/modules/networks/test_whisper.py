"""Whisper: a clip alone as in a ragged batch, text against computing everything again, and its limits."""

from typing import Any

import pytest
import torch
from test_networks import assert_near, randomise, whisper
from torch import Tensor

from trunkline import TrunklineError
from trunkline.modules.backbone import KVCache, Transformer, TransformerConfig
from trunkline.modules.generation.beams import beam_search
from trunkline.modules.generation.decoding import Decoder, GenerationConfig
from trunkline.modules.generation.sampling import generate
from trunkline.modules.networks import Whisper, WhisperConfig

LENGTHS = (21, 1, 2, 8)
KINDS = {
    "usual": whisper(max_target_length=12),
    "learned": whisper(positions="learned", target_positions="sinusoidal", max_target_length=12),
    "rotary": whisper(
        {"rope_theta": 100.0, "num_kv_heads": 2},
        **{"positions": "none", "target_positions": "none", "tie_embeddings": False, "max_target_length": 12},
    ),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def network(kind: str) -> Any:
    return randomise(Whisper(KINDS[kind])).eval()


def clips() -> tuple[Tensor, Tensor]:
    """Clips of different lengths, with junk in their padding."""
    mask = torch.arange(max(LENGTHS))[None] < torch.tensor(LENGTHS)[:, None]
    return torch.where(mask[..., None], torch.randn(4, 21, 8), torch.nan), mask


@every_kind
@torch.no_grad()
def test_a_clip_alone_and_in_a_batch(kind: str) -> None:
    model, (features, mask) = network(kind), clips()
    given = torch.randint(0, 19, (4, 7))
    together, states = model(features, given, mask), model.encode(features, mask).x
    assert states.shape == (4, 11, 32)
    for row, length in enumerate(LENGTHS):
        clip = features[row : row + 1, :length]
        assert_near(together[row : row + 1], model(clip, given[row : row + 1]))
        real = int(model.output_lengths(torch.tensor(length)))
        assert real == -(-length // 2)
        assert_near(states[row : row + 1, :real], model.encode(clip).x)
        assert model.context_mask(mask)[row].tolist() == [t < real for t in range(11)]


def slowly(model: Any, clip: Tensor, prompt: list[int], count: int) -> list[int]:
    """Greedy text about one clip, computing everything again for each token."""
    text = list(prompt)
    for _ in range(count):
        text.append(int(model(clip[None], torch.tensor([text]))[0, -1].argmax()))
    return text[len(prompt) :]


@every_kind
@torch.no_grad()
def test_text_after_several_start_tokens(kind: str) -> None:
    """Prompts of unequal length, about clips of unequal length."""
    model, (features, mask) = network(kind).double(), clips()
    features = features.double()
    prompts = [[1, 5, 7], [1, 3], [1], [1, 5, 7]]
    want = [slowly(model, features[row, : LENGTHS[row]], prompt, 8) for row, prompt in enumerate(prompts)]
    given = torch.tensor([[0] * (3 - len(prompt)) + prompt for prompt in prompts])
    seen = torch.arange(3) >= torch.tensor([3 - len(prompt) for prompt in prompts])[:, None]
    decoder = model.decoder_of(features, mask)
    assert isinstance(decoder, Decoder)
    assert (decoder.vocab_size, decoder.max_length) == (19, 12)
    assert generate(decoder, given, seen, GenerationConfig(8, temperature=0)) == want
    beams = beam_search(model.decoder_of(features, mask), given, seen, GenerationConfig(8, num_beams=1), [])
    assert [row[0].tokens for row in beams] == want
    assert len({tuple(text) for text in want}) > 1


@torch.no_grad()
def test_cache_gives_the_same_as_all_at_once() -> None:
    model, (features, mask) = network("usual"), clips()
    given = torch.randint(0, 19, (4, 7))
    want = model(features, given, mask)
    context, context_mask = model.encode(features, mask).x, model.context_mask(mask)
    cache = KVCache(model.decoder.config, 4, 7)
    parts = [model.decode(given[:, a:b], context, context_mask, cache=cache).x for a, b in ((0, 3), (3, 4), (4, 7))]
    assert_near(model.head(torch.cat(parts, dim=1)), want)


@torch.no_grad()
def test_the_decoder_is_causal() -> None:
    model, (features, mask) = network("usual"), clips()
    given = torch.randint(0, 19, (4, 7))
    changed = given.clone()
    changed[:, 4:] = (changed[:, 4:] + 1) % 19
    before, after = model(features, given, mask), model(features, changed, mask)
    assert_near(after[:, :4], before[:, :4])
    assert (after[:, 4] - before[:, 4]).abs().max() > 1e-3


@torch.no_grad()
def test_attention_over_the_clip() -> None:
    model, (features, mask) = network("usual"), clips()
    given = torch.randint(0, 19, (4, 7))
    context = model.encode(features, mask, return_attention=True)
    assert [weights.shape for weights in context.attention] == [(4, 4, 11, 11)] * 2
    out = model.decode(given, context.x, model.context_mask(mask), return_attention=True)
    assert_near(model.head(model.head_inputs(out.x)), model(features, given, mask))
    assert [weights.shape for weights in out.cross_attention] == [(4, 4, 7, 11)] * 2
    for row, length in enumerate(LENGTHS):
        assert (out.cross_attention[0][row, :, :, -(-length // 2) :] == 0).all()


def test_output_layer() -> None:
    tied, free = network("usual"), network("rotary")
    assert tied.head.weight is tied.target_embed.weight
    assert tied.output_modules() == []
    assert free.head.weight is not free.target_embed.weight
    assert free.output_modules() == [free.head]
    given = torch.randint(0, 19, (4, 7))
    features, mask = clips()
    states = free(features, given, mask, return_logits=False)
    assert torch.equal(free.head(states), free(features, given, mask))


def test_limits() -> None:
    model = network("usual")
    with pytest.raises(TrunklineError, match="a clip of 25 frames does not fit into a network that hears 1 to 24"):
        model.encode(torch.zeros(1, 25, 8))
    with pytest.raises(TrunklineError, match=r"features of shape \(B, frames, 8\), but got \(1, 8, 24\)"):
        model.encode(torch.zeros(1, 8, 24))
    with pytest.raises(TrunklineError, match="a target of 13 tokens is longer than the 12"):
        model(torch.zeros(1, 4, 8), torch.zeros(1, 13, dtype=torch.long))
    with pytest.raises(TrunklineError, match="2 prompts for 1 sources"):
        model.decoder_of(torch.zeros(1, 4, 8)).prefill(torch.zeros(2, 1, dtype=torch.long), None, 1)


@pytest.mark.parametrize("name", ["vocab_size", "num_mels", "max_frames", "max_target_length"])
def test_sizes_that_cannot_work(name: str) -> None:
    with pytest.raises(TrunklineError, match=f"{name}=0 must be at least 1") as error:
        WhisperConfig(**{name: 0})
    assert error.value.field == f"model.network.{name}"


def test_trunks_of_two_widths() -> None:
    with pytest.raises(TrunklineError, match=r"encoder\.dim=384 and decoder\.dim=64 differ"):
        WhisperConfig(decoder=TransformerConfig(dim=64, num_heads=2))


def test_on_given_trunks() -> None:
    config = KINDS["usual"]
    encoder, decoder = Transformer(config.encoder), Transformer(config.decoder)
    model = Whisper(config, encoder, decoder)
    assert model.encoder is encoder
    assert model.decoder is decoder
    with pytest.raises(TrunklineError, match=r"has cross_attention=False, .* decoder\.cross_attention=True"):
        Whisper(config, encoder, encoder)
