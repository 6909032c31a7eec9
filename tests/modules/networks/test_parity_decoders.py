"""Decoders of transformers that are built like LLaMA, and GPT-2, become a GPT and go back, bit for bit."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from parity import assert_near, random_peer
from safetensors.torch import load_file
from test_pretrained import edit, edit_weights
from torch import Tensor
from travels import arrive, go_back, gradients

from trunkline import TrunklineError
from trunkline.modules.backbone import TransformerConfig
from trunkline.modules.generation.decoding import GenerationConfig
from trunkline.modules.generation.sampling import generate
from trunkline.modules.networks import GPT, GPTConfig
from trunkline.modules.networks.convert.families import foreign_family, save_foreign

SIZES = {
    **{"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"intermediate_size": 40, "max_position_embeddings": 24, "bos_token_id": None, "eos_token_id": None},
}
WINDOW = {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 0}
ONE_OF_TWO = ["full_attention", "sliding_attention"]
SMALL = {"vocab_size": 50, "n_positions": 24, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": None}
NO_DROPOUT = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
PEERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "gpt2": (hf.GPT2LMHeadModel, {**SMALL, **NO_DROPOUT, "eos_token_id": None}),
    "gpt2-wide": (
        hf.GPT2LMHeadModel,
        {**SMALL, **NO_DROPOUT, "n_inner": 40, "activation_function": "relu", "layer_norm_epsilon": 1e-3},
    ),
    "gpt2-untied": (hf.GPT2LMHeadModel, {**SMALL, **NO_DROPOUT, "eos_token_id": None, "tie_word_embeddings": False}),
    "llama": (hf.LlamaForCausalLM, SIZES),
    "llama-grouped": (hf.LlamaForCausalLM, {**SIZES, "num_key_value_heads": 2, "tie_word_embeddings": True}),
    "llama-biases": (hf.LlamaForCausalLM, {**SIZES, "attention_bias": True, "mlp_bias": True}),
    "llama-theta": (
        hf.LlamaForCausalLM,
        {**SIZES, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, "head_dim": 6},
    ),
    "smollm": (
        hf.LlamaForCausalLM,
        {
            **{**SIZES, "hidden_size": 36, "num_attention_heads": 9, "num_key_value_heads": 3, "rms_norm_eps": 1e-5},
            **{"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 100_000.0}},
        },
    ),
    "mistral": (hf.MistralForCausalLM, {**SIZES, "num_key_value_heads": 1, "sliding_window": None}),
    "mistral-window": (hf.MistralForCausalLM, {**SIZES, "num_key_value_heads": 2, "sliding_window": 4}),
    "qwen2": (hf.Qwen2ForCausalLM, {**SIZES, "num_key_value_heads": 2}),
    "qwen2-tied": (hf.Qwen2ForCausalLM, {**SIZES, "num_key_value_heads": 4, "tie_word_embeddings": True}),
    "qwen2-window": (hf.Qwen2ForCausalLM, {**SIZES, "num_key_value_heads": 2, **WINDOW}),
    "qwen3": (hf.Qwen3ForCausalLM, {**SIZES, "num_key_value_heads": 2, "head_dim": 10}),
    "qwen3-window": (hf.Qwen3ForCausalLM, {**SIZES, "num_key_value_heads": 2, "head_dim": 10, **WINDOW}),
}
every_peer = pytest.mark.parametrize("name", PEERS)


def make_peer(name: str) -> Any:
    return random_peer(*PEERS[name])


def texts(length: int = 9) -> tuple[Tensor, Tensor, Tensor]:
    """Two texts, the mask of padding on the left of the second, and positions that do not count padding."""
    tokens = torch.randint(0, 50, (2, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[1, :4] = False
    return tokens, mask, (mask.cumsum(1) - 1).clamp(min=0)


@every_peer
def test_there_and_back_again(name: str, tmp_path: Path) -> None:
    peer = make_peer(name)
    gpt = arrive(peer, GPT, tmp_path)
    again = go_back(gpt, peer, tmp_path)
    tokens, mask, positions = texts()
    with torch.no_grad():
        want = peer(tokens).logits
        assert 0.1 < want.std() < 20
        assert_near(gpt(tokens), want)
        assert torch.equal(again(tokens).logits, want)
        want = peer(tokens, attention_mask=mask.long(), position_ids=positions).logits
        assert_near(gpt(tokens, mask=mask)[mask], want[mask])


@pytest.mark.parametrize("name", ["gpt2", "llama-grouped", "mistral-window", "qwen2", "qwen3"])
def test_gradients(name: str, tmp_path: Path) -> None:
    peer = make_peer(name)
    gpt = arrive(peer, GPT, tmp_path)
    tokens, _, _ = texts()

    def loss(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())

    theirs = gradients(peer, loss(peer(tokens).logits))
    family = foreign_family(peer.config.to_dict(), "")
    want, got = family.weights_from(theirs, gpt.config), gradients(gpt, loss(gpt(tokens)))
    assert got.keys() <= want.keys()
    assert len(got) == len(list(gpt.parameters()))
    for key, value in got.items():
        assert_near(value, want[key], 1e-4)


def test_files_without_an_output_layer(tmp_path: Path) -> None:
    peer = make_peer("llama-grouped")
    tokens, _, _ = texts()
    want = peer(tokens).logits
    peer.model.save_pretrained(tmp_path)
    assert_near(GPT.from_pretrained(tmp_path).eval()(tokens), want)
    make_peer("llama").model.save_pretrained(tmp_path / "untied")
    with pytest.raises(TrunklineError, match=r"do not fit a GPT: 'head\.weight' is missing$"):
        GPT.from_pretrained(tmp_path / "untied")


def test_a_published_smollm(tmp_path: Path) -> None:
    """Its config.json as of SmolLM2-135M, but for the sizes, with weights of half the precision."""
    peer = make_peer("smollm").bfloat16()
    peer.save_pretrained(tmp_path)
    sizes = {name: PEERS["smollm"][1][name] for name in SIZES if name not in ("bos_token_id", "eos_token_id")}
    content = {
        **{"architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 1},
        **{"eos_token_id": 2, "hidden_act": "silu", **sizes, "initializer_range": 0.041666666666666664},
        **{"is_llama_config": True, "model_type": "llama", "num_key_value_heads": 3, "pad_token_id": 2},
        **{"pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_interleaved": False, "rope_scaling": None},
        **{"rope_theta": 100000, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "use_cache": True},
        "transformers_js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
    }
    (tmp_path / "config.json").write_text(json.dumps(content))
    tokens, _, _ = texts()
    with torch.no_grad():
        assert_near(GPT.from_pretrained(tmp_path).eval()(tokens), peer.float()(tokens).logits)


@pytest.mark.parametrize(
    ("kind", "inside", "written"),
    [
        (hf.GPT2Model, "transformer.", "GPT2LMHeadModel"),
        (hf.LlamaModel, "model.", "LlamaForCausalLM"),
        (hf.Qwen2Model, "model.", "Qwen2ForCausalLM"),
        (hf.MistralForCausalLM, "", "LlamaForCausalLM"),
    ],
)
def test_names_that_the_way_back_changes(kind: Any, inside: str, written: str, tmp_path: Path) -> None:
    """As docs/reuse.md says; the bits stay."""
    sizes = SMALL if kind is hf.GPT2Model else {**SIZES, "num_key_value_heads": 2, "sliding_window": None}
    peer = random_peer(kind, {**sizes, "eos_token_id": None, "tie_word_embeddings": True})
    save_foreign(arrive(peer, GPT, tmp_path), tmp_path / "back", "transformers")
    before, after = load_file(tmp_path / "theirs/model.safetensors"), load_file(tmp_path / "back/model.safetensors")
    assert {f"{inside}{name}" for name in before} == after.keys()
    assert all(torch.equal(value, after[f"{inside}{name}"]) for name, value in before.items())
    assert json.loads((tmp_path / "back/config.json").read_text())["architectures"] == [written]


def test_files_of_gpt2_of_old(tmp_path: Path) -> None:
    """The published files of GPT-2 have no prefix, no tied output layer, but causal masks."""
    peer = make_peer("gpt2")
    peer.transformer.save_pretrained(tmp_path)
    mask = torch.ones(1, 1, 24, 24).tril()
    edit_weights(lambda w: w.update({"h.0.attn.bias": mask, "h.0.attn.masked_bias": torch.tensor(-1e4)}))(tmp_path)
    tokens, _, _ = texts()
    assert_near(GPT.from_pretrained(tmp_path).eval()(tokens), peer(tokens).logits)


@pytest.mark.parametrize(
    ("name", "option", "message"),
    [
        ("llama", {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "rope_parameters of type llama3"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling of type linear"),
        ("llama", {"attention_bias": True}, "attention_bias=True and mlp_bias=False"),
        ("llama", {"hidden_act": "gelu"}, "a LLaMA with hidden_act=gelu"),
        ("llama", {"model_type": "mixtral"}, r"a kind that cannot be converted \(mixtral\)"),
        ("mistral", {"sliding_window": 8, "layer_types": ONE_OF_TWO}, "a Mistral with sliding_window=8 in 1 of its 2"),
        (
            "qwen2",
            {**WINDOW, "layer_types": None, "max_window_layers": 1},
            "a Qwen2 with sliding_window=3 in 1 of its 2",
        ),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True cannot"),
        ("gpt2", {"activation_function": "tanh"}, "a GPT-2 with activation_function=tanh cannot"),
        ("gpt2", {"scale_attn_weights": False}, "a GPT-2 with scale_attn_weights=False cannot"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention=True cannot"),
    ],
)
def test_options_that_we_have_not(name: str, option: dict[str, Any], message: str, tmp_path: Path) -> None:
    make_peer(name).save_pretrained(tmp_path)
    edit(**option)(tmp_path)
    with pytest.raises(TrunklineError, match=message):
        GPT.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("mistral", {"sliding_window": 24}),
        ("qwen2", {**WINDOW, "use_sliding_window": False}),
        ("qwen2", {**WINDOW, "layer_types": None, "max_window_layers": 2}),
    ],
)
def test_windows_that_leave_nothing_out(name: str, option: dict[str, Any], tmp_path: Path) -> None:
    make_peer(name).save_pretrained(tmp_path)
    edit(**option)(tmp_path)
    assert GPT.from_pretrained(tmp_path).config.backbone.window is None


@pytest.mark.parametrize("name", ["mistral-window", "qwen2-window"])
def test_a_window_in_generated_text(name: str, tmp_path: Path) -> None:
    """Greedy, over caches on both sides, far past the window."""
    peer = make_peer(name)
    gpt, (tokens, _, _) = arrive(peer, GPT, tmp_path), texts(5)
    assert gpt.config.backbone.window == peer.config.sliding_window
    options = {"do_sample": False, "max_new_tokens": 18, "pad_token_id": 0}
    want = peer.generate(tokens, attention_mask=torch.ones_like(tokens), **options)
    assert generate(gpt, tokens, config=GenerationConfig(18, temperature=0)) == want[:, 5:].tolist()


def test_a_network_that_no_decoder_can_be(tmp_path: Path) -> None:
    trunk = TransformerConfig(dim=32, depth=1, num_heads=4, mlp="relu2")
    with pytest.raises(TrunklineError, match=r"mlp=relu2 cannot become a GPT-2.*cannot become a LLaMA"):
        save_foreign(GPT(GPTConfig(50, 24, backbone=trunk)), tmp_path, "transformers")
    assert list(tmp_path.iterdir()) == []
