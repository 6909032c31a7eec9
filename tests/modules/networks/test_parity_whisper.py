"""Parity with the Whisper of transformers: results, weights in both directions, text."""

from dataclasses import replace
from functools import cache
from itertools import takewhile
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
import transformers
from parity import assert_near, memorise, randomise
from torch import Tensor

from trunkline import TrunklineError
from trunkline.modules.generation.beams import beam_search
from trunkline.modules.generation.decoding import GenerationConfig
from trunkline.modules.generation.sampling import generate
from trunkline.modules.networks import Whisper, WhisperConfig
from trunkline.modules.networks.convert.families import from_foreign
from trunkline.modules.networks.convert.transformers_whisper import (
    whisper_config_from_transformers,
    whisper_config_to_transformers,
    whisper_from_transformers,
    whisper_to_transformers,
)

START, END, PAD = 1, 2, 0
IDS = {
    **{"pad_token_id": PAD, "bos_token_id": START, "eos_token_id": END, "decoder_start_token_id": START},
    **{"suppress_tokens": None, "begin_suppress_tokens": None},
}
OPTIONS: dict[str, Any] = {
    **{"vocab_size": 40, "num_mel_bins": 10, "d_model": 32, "encoder_layers": 2, "decoder_layers": 3, "dropout": 0.0},
    **{"encoder_attention_heads": 4, "decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 40},
    **{"max_source_positions": 12, "max_target_positions": 20, **IDS},
}
FRAMES = 24


class Pair(NamedTuple):
    theirs: Any
    ours: Whisper


def load(content: dict[str, Any], weights: dict[str, Tensor]) -> Any:
    """The model of transformers with these weights, in evaluation mode."""
    config = transformers.WhisperConfig(**{key: value for key, value in content.items() if key != "model_type"})
    model = transformers.WhisperForConditionalGeneration(config)
    absent = model.load_state_dict(weights, strict=False)
    assert absent == (["proj_out.weight"], [])  # which is tied
    return model.eval()


@cache
@torch.random.fork_rng()
def pair() -> Pair:
    """A small model of transformers with random biases and norms, and ours, which has learnt texts, in float64."""
    torch.manual_seed(1)
    ours = Whisper(whisper_config_from_transformers(transformers.WhisperConfig(**OPTIONS).to_dict()))
    memorise(randomise(ours, 0.1), 40, torch.randn(16, FRAMES, 10))
    theirs = load(OPTIONS, whisper_to_transformers(ours.state_dict(), ours.config))
    ours = from_foreign(theirs.config.to_dict(), theirs.state_dict())  # without biases of keys
    return Pair(theirs.double(), ours.double().eval())


def clips(rows: int = 3) -> Tensor:
    return torch.randn(rows, FRAMES, 10, dtype=torch.float64)


def their_inputs(features: Tensor) -> Tensor:
    """(B, T, M) -> (B, M, T), as theirs takes them."""
    return features.mT


# --- results


@torch.no_grad()
def test_logits() -> None:
    theirs, ours = pair()
    features, given = clips(), torch.randint(3, 40, (3, 7))
    want = theirs(input_features=their_inputs(features), decoder_input_ids=given).logits
    assert 0.5 < want.std() < 20
    assert_near(ours(features, given), want)


@torch.no_grad()
def test_states_and_attention() -> None:
    theirs, ours = pair()
    theirs.set_attn_implementation("eager")
    features, given = clips(), torch.randint(3, 40, (3, 7))
    out = theirs(input_features=their_inputs(features), decoder_input_ids=given, output_attentions=True)
    theirs.set_attn_implementation("sdpa")
    context = ours.encode(features, return_attention=True)
    assert_near(context.x, out.encoder_last_hidden_state)
    decoded = ours.decode(given, context.x, return_attention=True)
    for mine, other in (
        (context.attention, out.encoder_attentions),
        (decoded.attention, out.decoder_attentions),
        (decoded.cross_attention, out.cross_attentions),
    ):
        assert mine is not None
        assert_near(torch.stack(mine), torch.stack(other))


def test_gradients() -> None:
    theirs, ours = pair()
    features, given, wanted = clips(), torch.randint(3, 40, (3, 7)), torch.randint(3, 40, (3, 7))
    logits = theirs(input_features=their_inputs(features), decoder_input_ids=given).logits
    for model, out in ((theirs, logits), (ours, ours(features, given))):
        model.zero_grad()
        F.cross_entropy(out.flatten(0, 1), wanted.flatten()).backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    want = whisper_from_transformers(gradients)
    got = {name: p.grad for name, p in ours.named_parameters()}
    assert set(want) == set(got)
    for name, gradient in got.items():
        assert gradient is not None
        assert_near(gradient, want[name])  # also of the bias of the keys: zero


@torch.no_grad()
def test_weights_there_and_back() -> None:
    theirs, ours = pair()
    back = whisper_to_transformers(ours.state_dict(), ours.config)
    want = theirs.state_dict()
    assert back.keys() == want.keys() - {"proj_out.weight"}
    assert all(torch.equal(value, want[name]) for name, value in back.items())


@torch.no_grad()
def test_computed_positions_become_a_table() -> None:
    """As a network of ours has them: the same numbers as theirs, and after the way back it keeps the table."""
    ours = randomise(Whisper(replace(pair().ours.config, positions="sinusoidal")), 0.1).double().eval()
    content = whisper_config_to_transformers(ours.config)
    theirs = load({**content, **IDS}, whisper_to_transformers(ours.state_dict(), ours.config)).double()
    features, given = clips(), torch.randint(3, 40, (3, 7))
    assert_near(ours(features, given), theirs(input_features=their_inputs(features), decoder_input_ids=given).logits)
    again = from_foreign(theirs.config.to_dict(), theirs.state_dict(), torch.float64).eval()
    assert again.config == replace(ours.config, positions="fixed")
    assert_near(again(features, given), ours(features, given))


@torch.no_grad()
def test_only_padding_stands_after_the_last_position() -> None:
    """A batch is longer than the longest clip, since its length is a multiple of 8."""
    ours = Whisper(replace(pair().ours.config, max_frames=18)).eval()
    features, mask = torch.randn(2, 24, 10), torch.arange(24) < torch.tensor([[18], [11]])
    alone = ours.encode(features[:, :18], mask[:, :18]).x
    together = ours.encode(features, mask).x
    assert_near(together[0, :9], alone[0])
    assert_near(together[1, :6], alone[1, :6])


@torch.no_grad()
def test_our_trained_biases_of_keys_can_go() -> None:
    """Theirs has none; no attention changes."""
    _, ours = pair()
    own = Whisper(ours.config)
    own.load_state_dict(ours.state_dict())
    randomise(own).double().eval()
    assert own.encoder.blocks[0].attn.qkv.bias[32:64].abs().min() > 0
    content = whisper_config_to_transformers(own.config)
    theirs = load({**content, **IDS}, whisper_to_transformers(own.state_dict(), own.config)).double()
    features, given = clips(), torch.randint(3, 40, (3, 7))
    want = own(features, given)
    assert_near(theirs(input_features=their_inputs(features), decoder_input_ids=given).logits, want)


def test_weights_in_a_file() -> None:
    """Files of half precision, in which the tied output layer is absent."""
    theirs, ours = pair()
    weights = {name: value.half() for name, value in theirs.state_dict().items() if name != "proj_out.weight"}
    got = from_foreign(theirs.config.to_dict(), weights).state_dict()
    for name, value in ours.state_dict().items():
        assert_near(got[name].double(), value, 2e-3)


def test_configuration_there_and_back() -> None:
    theirs, ours = pair()
    content = whisper_config_to_transformers(ours.config)
    content |= IDS | {"architectures": None}  # this version writes the second only when it saves a model
    found = theirs.config.to_dict()
    assert {name: found.get(name) for name in content} == content
    assert whisper_config_from_transformers(content) == ours.config
    tiny = whisper_config_from_transformers({**transformers.WhisperConfig().to_dict(), "dropout": 0.0})
    assert tiny == WhisperConfig(positions="fixed", encoder=tiny.encoder, decoder=tiny.decoder)
    assert (tiny.encoder.dim, tiny.encoder.depth, tiny.max_frames) == (384, 4, 3000)


def test_positions_of_frames() -> None:
    """Also those of a clip's end, where rounding of the frequencies shows."""
    theirs = transformers.models.whisper.modeling_whisper.sinusoids(1500, 384)
    ours = Whisper(WhisperConfig()).pos_embed
    assert ours is not None
    assert_near(ours(torch.arange(1500)), theirs)


# --- what cannot be converted


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("is_encoder_decoder", False),
        ("tie_word_embeddings", False),
        ("scale_embedding", True),
        ("activation_function", "gelu_fast"),
    ],
)
def test_options_that_the_network_lacks(name: str, value: Any) -> None:
    with pytest.raises(
        TrunklineError, match=f"with {name}={value} cannot be converted: our Whisper has no such option"
    ):
        whisper_config_from_transformers({**pair().theirs.config.to_dict(), name: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("positions", "learned"),
        ("positions", "none"),
        ("target_positions", "none"),
        ("tie_embeddings", False),
        ("max_frames", 25),
        ("encoder.qk_norm", True),
        ("encoder.norm", "rmsnorm"),
        ("decoder.mlp", "swiglu"),
        ("decoder.rope_theta", 1e4),
        ("decoder.norm_eps", 1e-6),
    ],
)
def test_networks_that_theirs_lacks(field: str, value: Any) -> None:
    config = pair().ours.config
    side, _, name = field.rpartition(".")
    change = {side: replace(getattr(config, side), **{name: value})} if side else {field: value}
    with pytest.raises(TrunklineError, match=rf"our Whisper with {field}=\S+ cannot become a Whisper of transformers"):
        whisper_config_to_transformers(replace(config, **change))


def test_weights_without_a_place() -> None:
    theirs, ours = pair()
    weights = theirs.state_dict()
    with pytest.raises(TrunklineError, match=r"of a Whisper of .* no place in our Whisper: 'model\.extra\.weight'"):
        whisper_from_transformers({**weights, "model.extra.weight": torch.zeros(1)})
    with pytest.raises(TrunklineError, match=r"of our Whisper have no place in a Whisper of .*: 'extra\.weight'"):
        whisper_to_transformers({**ours.state_dict(), "extra.weight": torch.zeros(12, 32)}, ours.config)


# --- text


def their_text(
    model: Any, features: Tensor, prompts: Tensor, ends: list[int], options: dict[str, Any]
) -> list[list[int]]:
    """Without Whisper's own rules about time and language."""
    options = {"do_sample": False, "max_new_tokens": 10, "eos_token_id": ends, "pad_token_id": PAD, **options}
    plain = transformers.GenerationMixin.generate
    rows = plain(model, their_inputs(features), decoder_input_ids=prompts, **options)[:, prompts.shape[1] :].tolist()
    return [list(takewhile(lambda token: token not in ends, row)) for row in rows]


@pytest.mark.parametrize("prompt", [[START], [START, 7, 9]])
@pytest.mark.parametrize("options", [{}, {"num_beams": 4}, {"no_repeat_ngram_size": 2}])
@torch.no_grad()
def test_text(prompt: list[int], options: dict[str, Any]) -> None:
    theirs, ours = pair()
    features, prompts = clips(4), torch.tensor([prompt] * 4)
    config = GenerationConfig(
        10,
        temperature=0,
        num_beams=options.get("num_beams", 1),
        no_repeat_ngram=options.get("no_repeat_ngram_size"),
    )
    free = generate(ours.decoder_of(features), prompts, config=config)
    ends = sorted({token for row in free for token in row[4:8]})[:1]
    want = their_text(theirs, features, prompts, ends, options)
    assert generate(ours.decoder_of(features), prompts, config=config, end_ids=ends) == want
    assert any(len(row) < 10 for row in want)
    assert any(len(set(row)) > 2 for row in free), free  # not one word for ever


@torch.no_grad()
def test_scores_of_beams() -> None:
    theirs, ours = pair()
    features, prompts = clips(), torch.full((3, 1), START)
    options = {"num_beams": 4, "num_return_sequences": 4, "max_new_tokens": 8, "eos_token_id": END}
    plain = transformers.GenerationMixin.generate
    want = plain(
        theirs,
        their_inputs(features),
        decoder_input_ids=prompts,
        return_dict_in_generate=True,
        output_scores=True,
        **options,
    )
    found = beam_search(ours.decoder_of(features), prompts, None, GenerationConfig(8, num_beams=4), [END])
    scores = [beam.score for row in found for beam in row]
    assert scores == pytest.approx(want.sequences_scores.tolist(), rel=1e-5)
