"""LoRA adapters in the files of peft: it loads ours, and we load its own, with equal outputs."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from parity import assert_near, randomise
from peft_peers import PEERS, SHAPE, TEXT, calls, make_peer, spread
from safetensors.torch import load_file, save_file
from torch import Tensor
from travels import arrive

import trunkline
from trunkline import TrunklineError
from trunkline.modules.networks import (
    CLIP,
    GPT,
    TextHead,
    ViT,
    pretrained,
)
from trunkline.modules.networks.base import Network
from trunkline.modules.networks.convert.families import save_foreign
from trunkline.modules.networks.convert.peft_adapters import load_adapter, save_adapter
from trunkline.modules.networks.lora import Adapter, LoRAConfig, LoRALinear, add_lora, merge_lora
from trunkline.modules.training.warm_start import TrainedWeights

every_peer = pytest.mark.parametrize("name", PEERS)


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


@pytest.mark.parametrize(
    ("name", "whole", "own"),
    [
        ("llama", ["embed_tokens"], "token_embed"),
        ("llama", ["norm"], "backbone.norm"),  # of each block too
        ("llama", ["down_proj"], "backbone.blocks.0.mlp.fc2"),
        ("llama", ["k_proj"], None),  # the same layer as the adapted queries in ours
        ("qwen2", ["embed_tokens"], "token_embed"),
        ("qwen2", ["down_proj", "q_proj"], None),
        ("gpt2", ["mlp.c_fc"], "backbone.blocks.1.mlp.fc1"),
        ("gpt2-untied", ["wte", "ln_f"], "token_embed"),
        ("bert-body", ["embeddings.LayerNorm"], "embed_norm"),
        ("bert", ["decoder"], None),
        ("vit", ["vit.layernorm", "layernorm_after"], "backbone.blocks.0.norm2"),
        ("t5", ["final_layer_norm"], "encoder.norm"),
        ("bart", ["encoder.layernorm_embedding", "fc1"], "embed_norm"),
        ("marian", ["encoder_attn_layer_norm"], "decoder.blocks.1.norm_cross"),
        ("whisper", ["conv2", "decoder.embed_positions"], "front.convs.1"),
        ("ast", ["projection", "layernorm_before"], "patch_embed.proj"),
        ("ast-body", ["q_proj"], None),
    ],
)
def test_layers_trained_whole(name: str, whole: list[str], own: str | None, tmp_path: Path) -> None:
    """Other layers than heads, beside the adapters: they learn here too, and go back, or what cannot is refused."""
    peer, (theirs, ours) = make_peer(name), calls(name)
    network = arrive(peer, PEERS[name][2], tmp_path)
    options = {"modules_to_save": whole, "ensure_weight_tying": name == "qwen2"}
    tuned = peft.get_peft_model(peer, peft.LoraConfig(r=2, target_modules=PEERS[name][3], **options)).eval()
    spread(tuned, ("lora_", "modules_to_save"))
    tuned.save_pretrained(tmp_path / "adapter")
    if name == "bert":
        with pytest.raises(
            TrunklineError, match=r"'head\.weight' trained apart from 'token_embed\.weight'.*_weight_tying"
        ):
            load_adapter(network, tmp_path / "adapter")
        return
    with torch.no_grad():
        want = theirs(tuned)
        assert_near(ours(load_adapter(network, tmp_path / "adapter").eval()), want)
        if own is None:
            with pytest.raises(TrunklineError, match=r"attn\.qkv\.weight has learned, .*write the merged network"):
                save_adapter(network, tmp_path / "again")
            return
        assert all(p.requires_grad for p in network.get_submodule(own).parameters())
        save_adapter(network, tmp_path / "again")
        assert_near(theirs(peft.PeftModel.from_pretrained(make_peer(name), tmp_path / "again").eval()), want)


@pytest.mark.parametrize("name", ["llama", "vit", "distilbert-tags"])
def test_a_folder_of_peft_stands_for_its_merged_base(name: str, tmp_path: Path) -> None:
    """Its weights are of half the precision, but not those of the network."""
    peer, (theirs, ours) = make_peer(name), calls(name)
    _, _, kind, targets, heads = PEERS[name]
    before = arrive(peer, kind, tmp_path)
    peer.config._name_or_path = peer.name_or_path = str(tmp_path / "theirs")
    tuned = peft.get_peft_model(peer, peft.LoraConfig(r=2, target_modules=targets, modules_to_save=heads)).eval()
    spread(tuned, ("lora_", "modules_to_save"))
    tuned.bfloat16().float().save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter/adapter_model.safetensors"
    save_file({name: value.bfloat16() for name, value in load_file(file).items()}, file)
    with torch.no_grad():
        tuned = peft.PeftModel.from_pretrained(make_peer(name), tmp_path / "adapter").eval()
        want = theirs(tuned)
        for network in (trunkline.load(tmp_path / "adapter"), start(name, kind, tmp_path)):
            assert {p.dtype for p in network.parameters()} == {torch.float32}
            assert network.state_dict().keys() == before.state_dict().keys()
            assert_near(ours(network.eval()), want)
    assert (ours(before) - want).abs().max() > 0.1
    options = tmp_path / "adapter/adapter_config.json"
    for base in (None, str(tmp_path / "adapter")):
        options.write_text(json.dumps({**json.loads(options.read_text()), "base_model_name_or_path": base}))
        with pytest.raises(
            TrunklineError, match=rf"base_model_name_or_path={base}, which is no model without adapters"
        ):
            trunkline.load(tmp_path / "adapter")


def test_a_base_on_the_hub_with_adapters_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even if the two name each other; the inner adapters must not be left out without a word."""
    for name, base in (("inner", "me/outer"), ("outer", "me/inner")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    found = {"me/inner": tmp_path / "inner", "me/outer": tmp_path / "outer"}
    monkeypatch.setattr(pretrained, "pretrained_place", lambda name: found.get(name, name))
    with pytest.raises(TrunklineError, match="base_model_name_or_path=me/inner, which is no model without adapters"):
        trunkline.load(tmp_path / "outer")


def start(name: str, kind: type[Network], folder: Path) -> Any:
    """As `init_from` reads it."""
    return TrainedWeights.read(str(folder / "adapter"), "init_from", (kind,)).network()


@pytest.mark.parametrize("name", ["roberta-classes", "distilbert-tags", "bert-answers"])
def test_a_task_of_peft_with_a_frozen_head(name: str, tmp_path: Path) -> None:
    """Its classes for tasks want the head in the file."""
    theirs, ours = calls(name)
    own = add_lora(arrive(make_peer(name), TextHead, tmp_path), LoRAConfig(2))
    own.head.requires_grad_(False)
    spread(own, ("lora_",))
    save_adapter(own, tmp_path / "adapter", str(tmp_path / "theirs"))
    kind = {"roberta": "SequenceClassification", "distilbert": "TokenClassification", "bert": "QuestionAnswering"}
    auto = getattr(peft, f"AutoPeftModelFor{kind[name.partition('-')[0]]}")
    with torch.no_grad():
        assert_near(
            theirs(auto.from_pretrained(tmp_path / "adapter", num_labels=own.config.num_outputs).eval()), ours(own)
        )


def test_layers_of_different_ranks_become_one(tmp_path: Path) -> None:
    """Of a GPT-2 that has learned its queries and values alone, with different scales."""
    peer, (theirs, ours) = make_peer("gpt2"), calls("gpt2")
    own = add_lora(arrive(peer, GPT, tmp_path), LoRAConfig(2, targets="attention"))
    for block in own.backbone.blocks:
        del block.attn.qkv.adapters["1"]
        block.attn.qkv.adapters["2"] = Adapter(block.attn.qkv.weight, 16, 3, 0.7)
    spread(own, ("lora_",))
    save_adapter(own, tmp_path / "adapter")
    options = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert (options["r"], options["rank_pattern"]) == (5, {f"transformer.h.{n}.attn.c_proj": 2 for n in range(2)})
    with torch.no_grad():
        want = ours(own)
        assert_near(theirs(peft.PeftModel.from_pretrained(peer, tmp_path / "adapter").eval()), want)
        assert_near(ours(load_adapter(arrive(make_peer("gpt2"), GPT, tmp_path), tmp_path / "adapter").eval()), want)


def test_files_of_before_version_5(tmp_path: Path) -> None:
    """In which the layers of a ViT have other names."""
    peer, (_, ours) = make_peer("vit"), calls("vit")
    own = add_lora(arrive(peer, ViT, tmp_path), LoRAConfig(2))
    spread(own, ("lora_", "head."))
    save_adapter(own, tmp_path / "adapter")
    file = tmp_path / "adapter/adapter_model.safetensors"
    names = {"q_proj": "attention.query", "k_proj": "attention.key", "v_proj": "attention.value"}
    names = {f"attention.{new}": f"attention.{old}" for new, old in {**names, "o_proj": "output.dense"}.items()}
    names |= {"mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense", "vit.layers": "vit.encoder.layer"}
    renamed = load_file(file)
    for new, old in names.items():
        assert any(new in name for name in renamed)
        renamed = {name.replace(new, old): value for name, value in renamed.items()}
    save_file(renamed, file)
    again = load_adapter(ViT.from_pretrained(tmp_path / "theirs"), tmp_path / "adapter").eval()
    assert torch.equal(ours(again), ours(own))


def test_rank_stabilised_scale(tmp_path: Path) -> None:
    peer, (theirs, ours) = make_peer("llama"), calls("llama")
    own = arrive(peer, GPT, tmp_path)
    config = peft.LoraConfig(r=4, lora_alpha=3, target_modules=["q_proj", "up_proj"], use_rslora=True)
    tuned = peft.get_peft_model(peer, config).eval()
    spread(tuned, ("lora_",))
    tuned.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        assert_near(ours(load_adapter(own, tmp_path / "adapter").eval()), theirs(tuned))


CLIPS = {
    "clip": (
        hf.CLIPModel,
        {"eos_token_id": 29},
        ["q_proj", "fc1", "out_proj"],
        ["visual_projection", "text_projection"],
    ),
    "siglip": (hf.SiglipModel, {"pad_token_id": 1}, ["k_proj", "fc2"], ["text_model.head"]),
}


@pytest.mark.parametrize("name", CLIPS)
def test_clip(name: str, tmp_path: Path) -> None:
    """Both towers, in both directions. What its scale learns has no place in an adapter."""
    kind, special, targets, heads = CLIPS[name]
    sizes = {"text_config": {**TEXT, **special}, "vision_config": {**SHAPE, "image_size": 8, "patch_size": 4}}
    drawn = torch.Generator().manual_seed(1)
    tokens, image = torch.randint(3, 29, (2, 12), generator=drawn), torch.randn(2, 3, 8, 8, generator=drawn)
    tokens[:, -1] = 29

    def peer() -> Any:
        torch.manual_seed(0)
        return randomise(kind(kind.config_class(**sizes)).eval(), 0.2)

    def embeddings(model: Any) -> Tensor:
        if isinstance(model, CLIP):
            return torch.cat(model(image, tokens))
        out = model(input_ids=tokens, pixel_values=image)
        return F.normalize(torch.cat((out.image_embeds, out.text_embeds)), dim=-1)

    own, first = arrive(peer(), CLIP, tmp_path), peer()
    options = peft.LoraConfig(r=2, target_modules=rf".*encoder.*({'|'.join(targets)})", modules_to_save=heads)
    tuned = peft.get_peft_model(first, options).eval()
    spread(tuned, ("lora_", "modules_to_save"))
    tuned.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        want, before = embeddings(tuned), embeddings(own)
        assert_near(embeddings(load_adapter(own, tmp_path / "adapter").eval()), want)
        assert (want - before).abs().max() > 0.1
        with pytest.raises(TrunklineError, match=r"has learned, .*write the merged network"):
            save_adapter(own, tmp_path / "again")
        own.scale.requires_grad_(False)
        if own.image.attn_pool is not None:
            own.image.attn_pool.requires_grad_(False)
        save_adapter(own, tmp_path / "again")
        assert_near(embeddings(peft.PeftModel.from_pretrained(peer(), tmp_path / "again").eval()), want)
        assert_near(embeddings(merge_lora(own)), want)


def test_merged_for_others(tmp_path: Path) -> None:
    """A network with adapters is written with the weights that it computes with, and keeps its adapters."""
    own = add_lora(arrive(make_peer("gpt2"), GPT, tmp_path), LoRAConfig(2))
    spread(own, ("lora_",))
    theirs, ours = calls("gpt2")
    with torch.no_grad():
        want = ours(own)
        save_foreign(own, tmp_path / "merged", "transformers", {"eos_token_id": 1})
        assert_near(theirs(hf.GPT2LMHeadModel.from_pretrained(tmp_path / "merged").eval()), want)
        own.save_pretrained(tmp_path / "ours")
        assert_near(ours(GPT.from_pretrained(tmp_path / "ours").eval()), want)
        assert torch.equal(ours(own), want)
