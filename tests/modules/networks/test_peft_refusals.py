"""Files of peft that no adapter of ours is, and networks whose adapters peft cannot hold, are refused by name."""

from pathlib import Path
from typing import Any

import peft
import pytest
import transformers as hf
from peft_peers import T5, make_peer
from travels import arrive

from trunkline import TrunklineError
from trunkline.modules.backbone import TransformerConfig
from trunkline.modules.networks import (
    GPT,
    EncoderDecoder,
    GPTConfig,
    SpeechEncoder,
    SpeechEncoderConfig,
    TextHead,
    TextHeadConfig,
    ViT,
)
from trunkline.modules.networks.convert.peft_adapters import load_adapter, save_adapter
from trunkline.modules.networks.lora import LoRAConfig, add_lora


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"use_dora": True}, "use_dora=True"),
        ({"bias": "all"}, "bias=all"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights=pissa"),
        ({"target_modules": ["wte", "c_attn"]}, "lora_embedding_A"),
        ({"target_modules": ["c_attn", "lm_head"]}, "lm_head"),
    ],
)
def test_what_is_no_lora_of_ours_is_refused(options: dict[str, Any], named: str, tmp_path: Path) -> None:
    plain = arrive(make_peer("gpt2"), GPT, tmp_path)
    config = peft.LoraConfig(**{"r": 2, "target_modules": ["c_attn"], **options})
    peft.get_peft_model(make_peer("gpt2"), config).save_pretrained(tmp_path / "adapter")
    before = {name: value.clone() for name, value in plain.state_dict().items()}
    with pytest.raises(TrunklineError, match=named):
        load_adapter(plain, tmp_path / "adapter")
    assert before.keys() == plain.state_dict().keys()
    assert all(p.requires_grad for p in plain.parameters())


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    own = add_lora(arrive(make_peer("gpt2"), GPT, tmp_path), LoRAConfig(2))
    save_adapter(own, tmp_path / "adapter")
    with pytest.raises(TrunklineError, match="merge_lora"):
        load_adapter(own, tmp_path / "adapter")
    small = GPT(GPTConfig(30, 12, backbone=TransformerConfig(8, 2, 2, mlp="gelu_tanh", causal=True)))
    with pytest.raises(TrunklineError, match=r"attn\.qkv in .* is \(6, 16\) where .* \(6, 8\)"):
        load_adapter(small, tmp_path / "adapter")
    with pytest.raises(TrunklineError, match="has no place in a LLaMA"):
        load_adapter(GPT.from_pretrained(llama(tmp_path)), tmp_path / "adapter")
    (tmp_path / "adapter/adapter_model.safetensors").write_bytes(b"cut")
    with pytest.raises(TrunklineError, match="cannot read weights"):
        load_adapter(GPT.from_pretrained(tmp_path / "theirs"), tmp_path / "adapter")
    with pytest.raises(TrunklineError, match=r"cannot read .*adapter_config\.json"):
        load_adapter(GPT.from_pretrained(tmp_path / "theirs"), tmp_path / "nothing")


def llama(folder: Path) -> Path:
    make_peer("llama").save_pretrained(folder / "llama")
    return folder / "llama"


def test_what_no_adapter_expresses_is_refused(tmp_path: Path) -> None:
    gpt = arrive(make_peer("gpt2"), GPT, tmp_path)
    with pytest.raises(TrunklineError, match="has no adapters"):
        save_adapter(gpt, tmp_path / "adapter")
    add_lora(gpt, LoRAConfig(2))
    head = add_lora(TextHead(TextHeadConfig(gpt=gpt.config, pool="last")), LoRAConfig(2))
    with pytest.raises(TrunklineError, match="a TextHead on a GPT cannot become a DistilBertForSequenceClassification"):
        save_adapter(head, tmp_path / "adapter")
    vit = add_lora(arrive(make_peer("vit"), ViT, tmp_path / "vit"), LoRAConfig(2))
    vit.cls_token.requires_grad_(True)
    with pytest.raises(TrunklineError, match=r"cls_token has learned, .* ViT of transformers has no place"):
        save_adapter(vit, tmp_path / "adapter")
    untied = hf.T5ForConditionalGeneration(hf.T5Config(**T5, tie_word_embeddings=False))
    t5 = add_lora(arrive(untied, EncoderDecoder, tmp_path / "t5"), LoRAConfig(2))
    with pytest.raises(TrunklineError, match=r"head\.weight has learned, .* a T5 has no place"):
        save_adapter(t5, tmp_path / "adapter")
    rotary = TransformerConfig(16, 1, 2, mlp="relu2", rope_theta=100.0, causal=True)
    other = add_lora(GPT(GPTConfig(30, 12, positions="none", backbone=rotary)), LoRAConfig(2))
    with pytest.raises(TrunklineError, match="cannot become a GPT-2"):
        save_adapter(other, tmp_path / "adapter")
    recogniser = SpeechEncoder(SpeechEncoderConfig(vocab_size=9, backbone=TransformerConfig(16, 1, 2)))
    with pytest.raises(TrunklineError, match="a SpeechEncoder, because transformers has no such model; save_pret"):
        save_adapter(add_lora(recogniser, LoRAConfig(2)), tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
