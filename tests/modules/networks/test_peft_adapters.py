"""LoRA adapters in the files of peft: it loads ours, and we load its own, with equal outputs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from parity import assert_near, randomise
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from travels import arrive

from trunkline import TrunklineError
from trunkline.modules.networks import BERT, CLIP, GPT, EncoderDecoder, TextHead, TextHeadConfig, ViT
from trunkline.modules.networks.base import Network
from trunkline.modules.networks.convert.peft_adapters import load_adapter, save_adapter
from trunkline.modules.networks.lora import LoRAConfig, LoRALinear, add_lora, merge_lora

SHAPE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
TEXT = {**SHAPE, "vocab_size": 30, "max_position_embeddings": 12}
IDS = {"bos_token_id": None, "eos_token_id": None}
GPT2 = {"vocab_size": 30, "n_positions": 12, "n_embd": 16, "n_layer": 2, "n_head": 2, **IDS}
T5 = {"vocab_size": 30, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
IMAGE = {**SHAPE, "image_size": 8, "patch_size": 4, "num_channels": 1, "num_labels": 3}
PEERS: dict[str, tuple[Any, dict[str, Any], type[Network], list[str], list[str]]] = {
    "gpt2": (hf.GPT2LMHeadModel, GPT2, GPT, ["c_attn", "mlp.c_proj"], []),
    "gpt2-untied": (hf.GPT2LMHeadModel, {**GPT2, "tie_word_embeddings": False}, GPT, ["c_attn"], ["lm_head"]),
    "gpt2-body": (hf.GPT2Model, GPT2, GPT, ["c_attn", "c_fc"], []),
    "llama": (hf.LlamaForCausalLM, {**TEXT, **IDS, "num_key_value_heads": 1}, GPT, ["q_proj", "v_proj"], ["lm_head"]),
    "qwen2": (
        hf.Qwen2ForCausalLM,
        {**TEXT, **IDS, "num_key_value_heads": 2, "tie_word_embeddings": True},
        GPT,
        ["k_proj", "up_proj"],
        [],
    ),
    "bert": (hf.BertForMaskedLM, TEXT, BERT, ["query", "value", "output.dense"], []),
    "bert-body": (hf.BertModel, TEXT, BERT, ["query", "intermediate.dense"], ["pooler"]),
    "roberta": (hf.RobertaForMaskedLM, {**TEXT, "pad_token_id": 1}, BERT, ["key"], ["lm_head.dense"]),
    "distilbert": (
        hf.DistilBertForMaskedLM,
        {"vocab_size": 30, "max_position_embeddings": 12, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24},
        BERT,
        ["q_lin", "out_lin"],
        ["vocab_transform"],
    ),
    "vit": (hf.ViTForImageClassification, IMAGE, ViT, ["q_proj", "v_proj"], ["classifier"]),
    "dinov2-swiglu": (
        hf.Dinov2ForImageClassification,
        {**IMAGE, "mlp_ratio": 2, "use_swiglu_ffn": True},
        ViT,
        ["k_proj", "up_proj"],
        ["classifier"],
    ),
    "t5": (hf.T5ForConditionalGeneration, {**T5, "feed_forward_proj": "gated-gelu"}, EncoderDecoder, ["q", "wi_1"], []),
}
every_peer = pytest.mark.parametrize("name", PEERS)
Outputs = Callable[[Any], Tensor]


@torch.random.fork_rng()
def make_peer(name: str) -> Any:
    torch.manual_seed(0)
    kind, config, *_ = PEERS[name]
    return randomise(kind(kind.config_class(**config)).eval(), 0.2)


def calls(name: str) -> tuple[Outputs, Outputs]:
    """What gives the outputs of theirs, and of ours."""
    draw = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, 30, (2, 9), generator=draw)
    if PEERS[name][2] is ViT:
        image = torch.randn(2, 1, 8, 8, generator=draw)
        return lambda peer: peer(image).logits, lambda own: own(image)
    if name == "t5":
        return lambda peer: peer(tokens, decoder_input_ids=tokens).logits, lambda own: own(tokens, tokens)
    if name.endswith("body"):
        return lambda peer: peer(tokens).last_hidden_state, lambda own: own(tokens, return_logits=False)
    return lambda peer: peer(tokens).logits, lambda own: own(tokens)


def spread(module: nn.Module, names: tuple[str, ...]) -> None:
    """Random values for the parameters whose names contain one of these."""
    torch.manual_seed(3)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if any(part in name for part in names):
                p.normal_(0, 0.3)


@every_peer
def test_their_file_in_ours(name: str, tmp_path: Path) -> None:
    """With a layer of another rank and scale, and with trained output layers."""
    peer, (theirs, ours) = make_peer(name), calls(name)
    _, _, kind, targets, heads = PEERS[name]
    plain = arrive(peer, kind, tmp_path)
    patterns = {"rank_pattern": {targets[0]: 3}, "alpha_pattern": {targets[-1]: 5}}
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=targets, modules_to_save=heads or None, **patterns)
    tuned = peft.get_peft_model(peer, config).eval()
    spread(tuned, ("lora_", "modules_to_save"))
    tuned.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        before = ours(plain)
        assert load_adapter(plain, tmp_path / "adapter") is plain
        got, want = ours(plain.eval()), theirs(tuned)
        assert_near(got, want)
        assert (want - before).abs().max() > 0.1
        assert_near(ours(merge_lora(plain)), want)
    assert not any(isinstance(module, LoRALinear) for module in plain.modules())


@pytest.mark.parametrize("name", [name for name in PEERS if name != "gpt2-body"])
@pytest.mark.parametrize("targets", ["all", "attention"])
def test_our_file_in_theirs_and_back(name: str, targets: Any, tmp_path: Path) -> None:
    peer, (theirs, ours) = make_peer(name), calls(name)
    own = add_lora(arrive(peer, PEERS[name][2], tmp_path), LoRAConfig(2, alpha=3.0, dropout=0.1, targets=targets))
    learning = {n for n, p in own.named_parameters() if p.requires_grad}
    with torch.no_grad():
        torch.manual_seed(3)
        for p in own.parameters():
            if p.requires_grad:
                p.normal_(0, 0.3)
    with torch.no_grad():
        before, want = theirs(peer), ours(own)
        save_adapter(own, tmp_path / "adapter", "theirs")
        tuned = peft.PeftModel.from_pretrained(peer, tmp_path / "adapter").eval()
        got = theirs(tuned)
        assert_near(got, want)
        assert (before - want).abs().max() > 0.1
        adapters = sum(p.numel() for n, p in tuned.named_parameters() if "lora_" in n)
        again = load_adapter(PEERS[name][2].from_pretrained(tmp_path / "theirs"), tmp_path / "adapter").eval()
        assert_near(ours(again), want)
    one_in_theirs = name.startswith("gpt2")  # where ours has several adapters
    here = sum(p.numel() for n, p in own.named_parameters() if "lora_" in n)
    assert (adapters > here) if one_in_theirs else (adapters == here)
    if not one_in_theirs:
        assert {n for n, p in again.named_parameters() if p.requires_grad} == learning
        for (n, p), q in zip(own.named_parameters(), again.parameters(), strict=True):
            assert torch.equal(p, q), n
