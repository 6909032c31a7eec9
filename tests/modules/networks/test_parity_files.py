"""Encoder-decoders and networks that hear become ours and go back through files of transformers, bit for bit."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from parity import assert_near, random_peer, randomise
from safetensors.torch import load_file
from test_parity_ast import PEERS as SIZES_OF_AST
from test_parity_seq2seq import BART, IDS, MARIAN, PEERS, T5
from test_parity_whisper import OPTIONS
from test_pretrained import edit, edit_weights, to_pickles
from torch import Tensor
from travels import arrive, assert_same_bits, go_back

import trunkline
from trunkline import TrunklineError
from trunkline.modules.networks import AST, EncoderDecoder, Whisper
from trunkline.modules.networks.base import Network
from trunkline.modules.networks.convert.families import save_foreign

TWO_VOCABULARIES = PEERS["marian-two"][1]
MODELS: dict[str, tuple[Any, dict[str, Any], type[Network]]] = {
    "t5": (hf.T5ForConditionalGeneration, T5, EncoderDecoder),
    "bart": (hf.BartForConditionalGeneration, BART, EncoderDecoder),
    "bart-body": (hf.BartModel, BART, EncoderDecoder),
    "marian": (hf.MarianMTModel, MARIAN, EncoderDecoder),
    "marian-two": (hf.MarianMTModel, TWO_VOCABULARIES, EncoderDecoder),
    "whisper": (hf.WhisperForConditionalGeneration, OPTIONS, Whisper),
    "ast": (hf.ASTForAudioClassification, SIZES_OF_AST["usual"], AST),
    "ast-others": (hf.ASTForAudioClassification, SIZES_OF_AST["others"], AST),
    "ast-body": (hf.ASTModel, SIZES_OF_AST["usual"], AST),
}
KNOWN_IDS = {name: value for name, value in IDS.items() if value is not None}


@torch.random.fork_rng()
def make_peer(name: str) -> Any:
    """Nothing is zero: neither biases, nor the rows of a table that nothing reads. Marian's files have no positions."""
    torch.manual_seed(0)
    model, config, _ = MODELS[name]
    peer = model(model.config_class(**config)).eval()
    kept = {key: value.clone() for key, value in peer.state_dict().items() if "marian" in name and "positions" in key}
    randomise(peer, 0.1)
    with torch.no_grad():
        for values in (*peer.parameters(), *peer.buffers()):
            if values.is_floating_point():
                values[values == 0] = 0.1
    peer.load_state_dict(kept, strict=False)
    return peer


def inputs(name: str) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Of theirs, and of ours."""
    config, generator = MODELS[name][1], torch.Generator().manual_seed(1)
    if name.startswith("ast"):
        sounds = torch.randn(2, config["max_length"], config["num_mel_bins"], generator=generator)
        return {"input_values": sounds}, [sounds]
    given = torch.randint(3, 30, (2, 6), generator=generator)
    if name == "whisper":
        sounds = torch.randn(2, 24, 10, generator=generator)
        return {"input_features": sounds.mT, "decoder_input_ids": given}, [sounds, given]
    tokens = torch.randint(3, 30, (2, 9), generator=generator)
    return {"input_ids": tokens, "decoder_input_ids": given}, [tokens, given]


@torch.no_grad()
def results(network: Any, name: str) -> Tensor:
    """Logits, or states, of our network or of theirs; those of a body come through its embedding, as ours do."""
    theirs, ours = inputs(name)
    if isinstance(network, Network):
        return network(*ours)
    if name == "bart-body":
        return network(**theirs).last_hidden_state @ network.shared.weight.T
    out = network(**theirs)
    return out.pooler_output if name == "ast-body" else out.logits


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back_again(name: str, tmp_path: Path) -> None:
    peer = make_peer(name)
    network = arrive(peer, MODELS[name][2], tmp_path)
    again = go_back(network, peer, tmp_path, **({} if name.startswith("ast") else KNOWN_IDS))
    want = results(peer, name)
    assert 0.1 < want.std() < 20
    assert_near(results(network, name), want)
    assert torch.equal(results(again, name), want)


@pytest.mark.parametrize("name", ["bart", "marian", "whisper"])
def test_numbers_of_tokens_need_not_be_known(name: str, tmp_path: Path) -> None:
    """They are written as unknown: the usual ones may be outside of the vocabulary."""
    peer = make_peer(name)
    again = go_back(arrive(peer, MODELS[name][2], tmp_path), peer, tmp_path)
    assert again.config.pad_token_id is None
    assert again.config.decoder_start_token_id in (None, -1)
    assert torch.equal(results(again, name), results(peer, name))


@pytest.mark.parametrize("name", ["bart", "whisper", "ast"])
def test_parts_and_pickles(name: str, tmp_path: Path) -> None:
    peer = make_peer(name)
    peer.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    network = trunkline.load(tmp_path)
    assert isinstance(network, MODELS[name][2])
    assert_near(results(network, name), results(peer, name))
    to_pickles(tmp_path)
    assert torch.equal(results(trunkline.load(tmp_path), name), results(network, name))


@pytest.mark.parametrize("kept", [True, False], ids=["tied", "not-tied"])
def test_mt5(kept: bool, tmp_path: Path) -> None:
    """Its outputs are never scaled, whatever its files say of tied weights."""
    sizes = {name: value for name, value in T5.items() if name != "tie_word_embeddings"}
    peer = random_peer(hf.MT5ForConditionalGeneration, sizes)
    peer.save_pretrained(tmp_path / "theirs")
    edit(tie_word_embeddings=kept)(tmp_path / "theirs")
    network, want = trunkline.load(tmp_path / "theirs"), results(peer, "t5")
    assert_near(results(network, "t5"), want)
    save_foreign(network, tmp_path / "back", "transformers", KNOWN_IDS)
    assert_near(results(hf.T5ForConditionalGeneration.from_pretrained(tmp_path / "back").eval(), "t5"), want)


def fixed_tables(weights: dict[str, Tensor]) -> None:
    """As in files that older versions of transformers wrote for a Marian, here with tables that nobody computes."""
    for side in ("encoder", "decoder"):
        weights[f"model.{side}.embed_positions.weight"] = torch.randn(20, 32)


def test_tables_in_a_file_of_marian(tmp_path: Path) -> None:
    peer = make_peer("marian")
    peer.save_pretrained(tmp_path / "theirs")
    edit_weights(fixed_tables)(tmp_path / "theirs")
    network = EncoderDecoder.from_pretrained(tmp_path / "theirs").eval()
    assert network.config.positions == "fixed"
    assert not any("pos_embed" in name for name, _ in network.named_parameters())  # nothing trains them
    again = go_back(network, peer, tmp_path, **KNOWN_IDS)
    assert_near(results(network, "marian"), results(again, "marian"))
    assert not torch.allclose(results(network, "marian"), results(peer, "marian"), atol=1e-2)
    other = EncoderDecoder(replace(network.config, max_target_length=12))
    with pytest.raises(TrunklineError, match="max_target_length=12 cannot become a Marian"):
        save_foreign(other, tmp_path, "transformers")


def as_of_old(weights: dict[str, Tensor]) -> None:
    for side in ("encoder", "decoder"):
        weights[f"model.{side}.version"] = torch.tensor([3.0])
        weights[f"model.{side}.embed_tokens.weight"] = weights["model.shared.weight"].clone()
    weights["lm_head.weight"] = weights["model.shared.weight"].clone()


def test_files_of_old(tmp_path: Path) -> None:
    """The first files of BART have all copies of shared weights."""
    peer = make_peer("bart")
    network = arrive(peer, EncoderDecoder, tmp_path)
    want = load_file(tmp_path / "theirs/model.safetensors")
    edit_weights(as_of_old)(tmp_path / "theirs")
    again = EncoderDecoder.from_pretrained(tmp_path / "theirs").eval()
    assert torch.equal(results(again, "bart"), results(network, "bart"))
    save_foreign(again, tmp_path / "back", "transformers")
    assert load_file(tmp_path / "back/model.safetensors").keys() == want.keys()


def untied(weights: dict[str, Tensor]) -> None:
    weights["lm_head.weight"] = torch.randn(40, 32)


def test_an_output_layer_of_its_own(tmp_path: Path) -> None:
    """Files of T5 1.1 have one. Version 5 of transformers ties a T5 that has none in its file, and learns it as one."""
    peer = hf.T5ForConditionalGeneration(hf.T5Config(**PEERS["t5-1.1"][1]))
    peer.save_pretrained(tmp_path / "theirs")
    network = EncoderDecoder.from_pretrained(tmp_path / "theirs")
    assert torch.equal(network.head.weight, network.token_embed.weight)
    assert network.head.weight.data_ptr() != network.token_embed.weight.data_ptr()
    edit_weights(untied)(tmp_path / "theirs")
    network = EncoderDecoder.from_pretrained(tmp_path / "theirs")
    save_foreign(network, tmp_path / "back", "transformers")
    assert_same_bits(*(tmp_path / side / "model.safetensors" for side in ("theirs", "back")))


def other_copy(name: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda weights: weights.update({name: torch.zeros(40, 32)})


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        (
            "bart",
            edit_weights(other_copy("model.encoder.embed_tokens.weight")),
            "'.*encoder.*' and 'model.shared.weight'",
        ),
        ("bart", edit_weights(other_copy("lm_head.weight")), "'head.weight' and '.*' differ, but are one here"),
        ("bart", edit_weights(lambda w: w.pop("model.shared.weight")), "'token_embed.weight' is missing"),
        ("bart", edit(max_position_embeddings=24), r"'pos_embed.weight' is \(22, 32\) there and \(26, 32\) here"),
        ("bart", edit_weights(lambda w: w.update(qa=torch.zeros(1))), "of a BART have no place in .*: 'qa'"),
        ("bart", edit(model_type="mbart"), r"cannot be converted \(mbart\); known are .*BART"),
        ("t5", edit_weights(other_copy("decoder.embed_tokens.weight")), "of a T5 differ, but are one weight"),
        (
            "whisper",
            edit_weights(lambda w: w.pop("model.encoder.embed_positions.weight")),
            "'pos_embed.weight' is missing",
        ),
        (
            "whisper",
            edit_weights(lambda w: w["model.encoder.embed_positions.weight"].fill_(torch.nan)),
            "not finite, first in pos_embed.weight",
        ),
        ("ast", edit(max_length=90), r"'pos_embed' is \(1, \d+, 32\) there and \(1, \d+, 32\) here"),
        ("ast", edit_weights(lambda w: [w.pop(n) for n in list(w) if "cls" in n]), "'cls_token' is missing"),
    ],
)
def test_what_is_wrong_is_named(name: str, damage: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    make_peer(name).save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(TrunklineError, match=message):
        trunkline.load(tmp_path)
