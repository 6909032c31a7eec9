"""Parity of the encoder-decoder with T5, BART and Marian in transformers: results, weights in both directions, text."""

from dataclasses import replace
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
import transformers
from parity import assert_near, memorise, randomise
from torch import Tensor
from transformers.models.t5.modeling_t5 import T5Attention

import trunkline
from trunkline import TrunklineError
from trunkline.modules.generation.beams import beam_search
from trunkline.modules.generation.decoding import GenerationConfig
from trunkline.modules.generation.sampling import generate
from trunkline.modules.networks import EncoderDecoder, EncoderDecoderConfig
from trunkline.modules.networks.convert.families import foreign_family, from_foreign
from trunkline.modules.networks.convert.family import ForeignFamily
from trunkline.modules.networks.convert.transformers_t5 import t5_config_from_transformers
from trunkline.modules.networks.positions import RelativeBias

START, PAD, END = 0, 1, 2
IDS = {"pad_token_id": PAD, "eos_token_id": END, "decoder_start_token_id": START, "forced_eos_token_id": None}
T5 = {
    **{
        "vocab_size": 40,
        "d_model": 32,
        "d_kv": 6,
        "d_ff": 48,
        "num_layers": 2,
        "num_decoder_layers": 3,
        "num_heads": 4,
    },
    **{"relative_attention_num_buckets": 8, "relative_attention_max_distance": 12, "dropout_rate": 0.0, **IDS},
}
BART = {
    **{"vocab_size": 40, "d_model": 32, "max_position_embeddings": 20, "encoder_layers": 2, "decoder_layers": 3},
    **{"encoder_attention_heads": 4, "decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 40},
    **{"dropout": 0.0, "bos_token_id": None, **IDS},
}
MARIAN = {**BART, "scale_embedding": True, "activation_function": "swish"}
PEERS: dict[str, tuple[str, dict[str, Any]]] = {  # name -> family, options
    "t5-1.0": ("t5", T5),
    "t5-1.1": ("t5", {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "t5-others": ("t5", {**T5, "feed_forward_proj": "gated-silu", "layer_norm_epsilon": 1e-3, "num_decoder_layers": 3}),
    "bart": ("bart", BART),
    "bart-scaled": ("bart", {**BART, "scale_embedding": True, "activation_function": "gelu_new"}),
    "marian": ("marian", MARIAN),
    "marian-two": ("marian", {**MARIAN, "share_encoder_decoder_embeddings": False, "decoder_vocab_size": 30}),
}
every_peer = pytest.mark.parametrize("name", PEERS)
CLASSES: dict[str, tuple[Any, Any]] = {
    "t5": (transformers.T5ForConditionalGeneration, transformers.T5Config),
    "bart": (transformers.BartForConditionalGeneration, transformers.BartConfig),
    "marian": (transformers.MarianMTModel, transformers.MarianConfig),
}


def family_of(name: str) -> ForeignFamily:
    return foreign_family({"model_type": PEERS[name][0]}, name)


def load(name: str, content: dict[str, Any], weights: dict[str, Tensor]) -> Any:
    """The model of transformers with these weights, in evaluation mode."""
    model_class, config_class = CLASSES[PEERS[name][0]]
    content = {key: value for key, value in content.items() if key != "model_type"}
    return model_class.from_pretrained(None, config=config_class(**content), state_dict=weights).eval()


class Pair(NamedTuple):
    theirs: Any
    ours: EncoderDecoder


@cache
@torch.random.fork_rng()
def pair(name: str) -> Pair:
    """A small model of transformers with random biases and norms, and ours, which has learnt texts, in float64."""
    torch.manual_seed(1)
    family, options = PEERS[name]
    model_class, config_class = CLASSES[family]
    theirs = model_class(config_class(**options))
    ours = from_foreign(theirs.config.to_dict(), theirs.state_dict())
    memorise(randomise(ours, 0.1), vocabulary(name))
    theirs = load(name, theirs.config.to_dict(), family_of(name).weights_to(ours.state_dict(), ours.config))
    return Pair(theirs.double(), ours.double().eval())


def vocabulary(name: str) -> int:
    """Tokens of the target."""
    return 30 if name == "marian-two" else 40


def sources(*lengths: int) -> list[list[int]]:
    """Texts without special tokens."""
    return [torch.randint(3, 40, (length,)).tolist() for length in lengths]


def padded(rows: list[list[int]], side: str = "right", extra: int = 0) -> tuple[Tensor, Tensor]:
    """Token ids and mask, both (B, S)."""
    width = max(map(len, rows)) + extra
    fill = [[PAD] * (width - len(row)) for row in rows]
    tokens = [row + pad if side == "right" else pad + row for row, pad in zip(rows, fill, strict=True)]
    real = [[1] * len(row) + [0] * len(pad) for row, pad in zip(rows, fill, strict=True)]
    return torch.tensor(tokens), torch.tensor([r if side == "right" else r[::-1] for r in real], dtype=torch.bool)


def targets(name: str, rows: int, length: int) -> Tensor:
    return torch.cat([torch.full((rows, 1), START), torch.randint(3, vocabulary(name), (rows, length - 1))], dim=1)


# --- results


@every_peer
@torch.no_grad()
def test_logits(name: str) -> None:
    theirs, ours = pair(name)
    rows, given = sources(9, 5, 1), targets(name, 3, 7)
    for side in ("right", "left"):
        tokens, mask = padded(rows, side, extra=2)
        if side == "right" or name.startswith("t5"):
            want = theirs(input_ids=tokens, attention_mask=mask.long(), decoder_input_ids=given).logits
        else:  # theirs counts padding on the left as positions
            alone = [
                theirs(input_ids=torch.tensor([row]), decoder_input_ids=t[None])
                for row, t in zip(rows, given, strict=True)
            ]
            want = torch.cat([out.logits for out in alone])
        assert 0.5 < want.std() < 10
        assert_near(ours(tokens, given, mask), want)


@every_peer
def test_gradients(name: str) -> None:
    theirs, ours = pair(name)
    (tokens, mask), given = padded(sources(9, 5, 1)), targets(name, 3, 7)
    wanted = torch.randint(3, vocabulary(name), (3, 7))
    logits = theirs(input_ids=tokens, attention_mask=mask.long(), decoder_input_ids=given).logits
    logits.retain_grad()
    for model, out in ((theirs, logits), (ours, ours(tokens, given, mask))):
        model.zero_grad()
        F.cross_entropy(out.flatten(0, 1), wanted.flatten()).backward()
    gradients = {key: p.grad for key, p in theirs.named_parameters() if p.grad is not None}
    if not name.startswith("t5"):  # where it is a buffer
        gradients["final_logits_bias"] = logits.grad.sum((0, 1))[None]
    want = family_of(name).weights_from(gradients, ours.config)
    assert {key for key, _ in ours.named_parameters()} <= set(want)
    for key, p in ours.named_parameters():
        assert p.grad is not None
        assert_near(p.grad, want[key], 1e-4)
        assert p.grad.abs().max() > 0


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("buckets", "distance"), [(32, 128), (8, 12), (4, 3), (32, 1000)])
def test_buckets_of_distances(causal: bool, buckets: int, distance: int) -> None:
    offsets = torch.arange(-1500, 1500)
    want = T5Attention._relative_position_bucket(offsets, not causal, buckets, distance)
    assert torch.equal(RelativeBias(4, buckets, distance, causal).bucket(offsets), want)


# --- weights and configurations in both directions


@every_peer
@torch.no_grad()
def test_their_model_loads_ours(name: str) -> None:
    theirs, ours = pair(name)
    written = family_of(name).config_to(ours.config)
    content = {key: value for key, value in written.items() if not key.endswith("_token_id")}
    weights = family_of(name).weights_to(ours.state_dict(), ours.config)
    model = load(name, {**theirs.config.to_dict(), **content}, weights).double()
    (tokens, mask), given = padded(sources(9, 5, 1)), targets(name, 3, 7)
    inputs = {"input_ids": tokens, "attention_mask": mask.long(), "decoder_input_ids": given}
    assert_near(model(**inputs).logits, theirs(**inputs).logits, 1e-6)
    # This version does not read the first, and writes the second only when it saves a model.
    assert content.get("architectures", [type(theirs).__name__]) == [type(theirs).__name__]
    for key in content.keys() - {"n_positions", "architectures"}:
        assert getattr(model.config, key) == getattr(theirs.config, key), key


def test_defaults_are_those_of_the_families() -> None:
    small = {"d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 6, "num_heads": 8, "vocab_size": 32128}
    config = t5_config_from_transformers(small)  # the file of t5-small says little more
    assert (config.encoder.mlp, config.encoder.norm_eps, config.relative_buckets) == ("relu", 1e-6, 32)
    assert config.tie_embeddings
    assert config.scale_output
    assert (config.encoder.head_width, config.encoder.attn_scale) == (64, 1.0)


# --- what cannot be converted


def test_an_encoder_alone(tmp_path: Path) -> None:
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 1, "num_heads": 4, "vocab_size": 40}
    transformers.T5EncoderModel(transformers.T5Config(**sizes)).save_pretrained(tmp_path)
    with pytest.raises(
        TrunklineError, match=r"a T5EncoderModel .* cannot be converted.*; give the folder of the T5For"
    ):
        trunkline.load(tmp_path)


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("t5-1.0", {"feed_forward_proj": "gated-relu"}),
        ("t5-1.0", {"is_encoder_decoder": False}),
        ("t5-1.0", {"dense_act_fn": "silu"}),
        ("bart", {"activation_function": "gelu_fast"}),
        ("bart", {"tie_word_embeddings": False}),
        ("bart", {"normalize_embedding": False}),
        ("marian", {"normalize_before": True}),
        ("marian", {"normalize_embedding": True}),
        ("marian", {"add_final_layer_norm": True}),
    ],
)
def test_options_that_the_network_lacks(name: str, option: dict[str, Any]) -> None:
    ((key, value),) = option.items()
    with pytest.raises(TrunklineError, match=f"{key}={value} cannot be converted: an EncoderDecoder has no such"):
        family_of(name).config_from({**pair(name).theirs.config.to_dict(), **option}, {})


def changed(config: EncoderDecoderConfig, name: str, value: Any) -> EncoderDecoderConfig:
    side, _, field = name.rpartition(".")
    return replace(config, **({side: replace(getattr(config, side), **{field: value})} if side else {field: value}))


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("t5-1.0", "positions", "none"),
        ("t5-1.0", "tie_embeddings", False),
        ("t5-1.0", "output_bias", True),
        ("t5-1.0", "share_embeddings", False),
        ("t5-1.0", "encoder.num_kv_heads", 2),
        ("t5-1.0", "encoder.mlp", "relu2"),
        ("t5-1.0", "decoder.attn_scale", None),
        ("t5-1.0", "decoder.num_heads", 2),
        ("bart", "positions", "sinusoidal"),
        ("bart", "scale_output", True),
        ("bart", "max_target_length", 19),
        ("bart", "decoder.norm_first", True),
        ("bart", "encoder.qk_norm", True),
        ("bart", "target_vocab_size", 41),
        ("marian", "embed_norm", True),
        ("bart", "first_position", 1),
        ("marian", "encoder.mlp", "swiglu"),
        ("marian", "encoder.head_dim", 4),
        ("marian", "decoder.rope_theta", 1e4),
    ],
)
def test_networks_that_the_family_lacks(name: str, field: str, value: Any) -> None:
    config = changed(pair(name).ours.config, field, value)
    with pytest.raises(
        TrunklineError, match=rf"an EncoderDecoder with {field}=\S+ cannot become a \w+, which has {field}="
    ):
        family_of(name).config_to(config)


def test_weights_without_a_place() -> None:
    theirs, ours = pair("t5-1.0")
    weights, t5 = theirs.state_dict(), family_of("t5-1.0")
    with pytest.raises(TrunklineError, match=r"of a T5 have no place in .*: 'encoder\.block\.0\.extra\.weight'"):
        t5.weights_from({**weights, "encoder.block.0.extra.weight": torch.zeros(1)}, ours.config)
    del weights["decoder.block.1.layer.0.SelfAttention.k.weight"]
    with pytest.raises(TrunklineError, match=r"have 'decoder\.block\.1\.\S+\.q\.weight' but no '\S+\.k\.weight'"):
        t5.weights_from(weights, ours.config)
    with pytest.raises(TrunklineError, match=r"of an EncoderDecoder have no place in a T5: 'head\.bias'"):
        t5.weights_to({**ours.state_dict(), "head.bias": torch.zeros(40)}, ours.config)


# --- text


def caches(model: Any) -> bool:
    """The cache of transformers 5.23 fails in a T5 whose decoder is deeper than its encoder."""
    return getattr(model.config, "num_decoder_layers", 0) <= model.config.num_hidden_layers


GENERATED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # ours, theirs
    "greedy": ({"temperature": 0}, {}),
    "greedy-penalty": ({"temperature": 0, "repetition_penalty": 1.4}, {"repetition_penalty": 1.4}),
    "greedy-ngram": ({"temperature": 0, "no_repeat_ngram": 2}, {"no_repeat_ngram_size": 2}),
    "greedy-first": ({"temperature": 0, "first_token": 7}, {"forced_bos_token_id": 7}),
    "beams": ({"num_beams": 4}, {"num_beams": 4}),
    "beams-short": ({"num_beams": 4, "length_penalty": 0.3}, {"num_beams": 4, "length_penalty": 0.3}),
    "beams-ngram": ({"num_beams": 4, "no_repeat_ngram": 2}, {"num_beams": 4, "no_repeat_ngram_size": 2}),
    "beams-first": ({"num_beams": 4, "first_token": 7}, {"num_beams": 4, "forced_bos_token_id": 7}),
}


def their_text(model: Any, tokens: Tensor, mask: Tensor, ends: list[int], options: dict[str, Any]) -> list[list[int]]:
    options = {"do_sample": False, "max_new_tokens": 10, "eos_token_id": ends, "pad_token_id": PAD, **options}
    options["use_cache"] = caches(model)
    rows = model.generate(tokens, attention_mask=mask.long(), **options)[:, 1:].tolist()
    return [list(takewhile(lambda token: token not in ends, row)) for row in rows]


@every_peer
@pytest.mark.parametrize("options", GENERATED)
@torch.no_grad()
def test_text(name: str, options: str) -> None:
    """Sources of unequal length, one of a single token; padding on either side."""
    theirs, ours = pair(name)
    rows = sources(9, 1, 5, 7)
    mine, other = GENERATED[options]
    config, starts = GenerationConfig(10, **mine), torch.full((4, 1), START)
    free = generate(ours.decoder_of(*padded(rows)), starts, config=config)
    ends = sorted({token for row in free for token in row[2:8]})[::3]
    for side in ("right", "left"):
        tokens, mask = padded(rows, side)
        if side == "right" or name.startswith("t5"):
            want = their_text(theirs, tokens, mask, ends, other)
        else:  # theirs counts padding on the left as positions
            want = [their_text(theirs, *padded([row]), ends, other)[0] for row in rows]
        assert generate(ours.decoder_of(tokens, mask), starts, config=config, end_ids=ends) == want
    assert any(len(row) < 10 for row in want)
    assert any(len(set(row)) > 2 for row in free), free  # not one word for ever


@every_peer
@torch.no_grad()
def test_scores_of_beams(name: str) -> None:
    theirs, ours = pair(name)
    tokens, mask = padded(sources(9, 1, 5))
    options = {"num_beams": 4, "num_return_sequences": 4, "max_new_tokens": 8, "eos_token_id": END}
    options["use_cache"] = caches(theirs)
    want = theirs.generate(
        tokens, attention_mask=mask.long(), return_dict_in_generate=True, output_scores=True, **options
    )
    found = beam_search(
        ours.decoder_of(tokens, mask), torch.full((3, 1), START), None, GenerationConfig(8, num_beams=4), [END]
    )
    scores = [beam.score for row in found for beam in row]
    assert scores == pytest.approx(want.sequences_scores.tolist(), rel=1e-5)
