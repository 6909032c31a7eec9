"""CLIP and SigLIP of transformers become a CLIP and go back, bit for bit."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from parity import assert_near, randomise
from test_clip import shared_trunk, two_towers
from test_pretrained import edit, edit_weights
from torch import Tensor
from travels import arrive, go_back, gradients

from trunkline import TrunklineError
from trunkline.modules.networks import CLIP, CLIPConfig
from trunkline.modules.networks.convert.families import foreign_family, save_foreign

END = 49
TOWER = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {**TOWER, "vocab_size": 50, "max_position_embeddings": 9, "eos_token_id": END, "bos_token_id": 48}
IMAGE = {**TOWER, "hidden_size": 48, "image_size": 16, "patch_size": 8}
EQUAL = {**IMAGE, "hidden_size": 32}
PEERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "clip": (hf.CLIPModel, {"text_config": TEXT, "vision_config": IMAGE, "projection_dim": 20}),
    "gelu": (
        hf.CLIPModel,
        {
            "text_config": {**TEXT, "hidden_act": "gelu", "layer_norm_eps": 1e-3},
            "vision_config": {**IMAGE, "hidden_act": "gelu", "num_channels": 1},
            "projection_dim": 20,
            "logit_scale_init_value": 2.0,
        },
    ),
    "older": (  # its end of text stands for the largest id
        hf.CLIPModel,
        {"text_config": TEXT | {"eos_token_id": 2}, "vision_config": IMAGE | {"patch_size": 4}, "projection_dim": 20},
    ),
    "siglip": (hf.SiglipModel, {"text_config": TEXT, "vision_config": EQUAL}),
    "siglip_gelu": (
        hf.SiglipModel,
        {
            "text_config": {**TEXT, "hidden_act": "gelu", "pad_token_id": 0, "projection_size": 48},
            "vision_config": {**IMAGE, "hidden_act": "gelu", "layer_norm_eps": 1e-3, "num_channels": 1},
        },
    ),
}


@torch.random.fork_rng()
def make_peer(name: str) -> Any:
    torch.manual_seed(0)
    model, config = PEERS[name]
    peer = randomise(model(model.config_class(**config)).eval(), 0.1)
    with torch.no_grad():
        peer.logit_scale += 1.5 * (model is hf.SiglipModel)  # it begins at 0 there
    return peer


def pairs(peer: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    """Three images, and three texts as their tokenizers write them, with the mask of padding."""
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(3, peer.config.vision_config.num_channels, 16, 16, generator=generator)
    tokens = torch.randint(3, 48, (3, 9), generator=generator)
    if isinstance(peer, hf.SiglipModel):
        return image, tokens, None  # all texts have the full length there, and padding is read
    lengths = torch.tensor([[4], [9], [6]])
    tokens.scatter_(1, lengths - 1, END)
    mask = torch.arange(9) < lengths
    return image, tokens.where(mask, END), mask  # padding is the end-of-text token again


def assert_same_results(peer: Any, clip: CLIP) -> None:
    image, tokens, mask = pairs(peer)
    with torch.no_grad():
        options = {} if mask is None else {"attention_mask": mask.long()}
        theirs, ours = peer(input_ids=tokens, pixel_values=image, **options), clip(image, tokens, mask)
        assert_near(ours.image, F.normalize(theirs.image_embeds, dim=-1))
        assert_near(ours.text, F.normalize(theirs.text_embeds, dim=-1))
        assert_near(clip.scale(ours.image @ ours.text.T), theirs.logits_per_image)
        assert theirs.logits_per_image.std() > 0.1
        if mask is not None:  # a text ends at its first end token, whatever is hidden after it
            assert_near(clip.encode_text(tokens), ours.text)


@pytest.mark.parametrize("name", PEERS)
def test_there_and_back_again(name: str, tmp_path: Path) -> None:
    peer = make_peer(name)
    clip = arrive(peer, CLIP, tmp_path)
    assert_same_results(peer, clip)
    assert_same_results(go_back(clip, peer, tmp_path), clip)


@pytest.mark.parametrize("name", ["siglip", "siglip_gelu"])
def test_padding_that_is_seen(name: str, tmp_path: Path) -> None:
    """Commands give short rows and a mask; a SigLIP fills them up with its own padding, and sees that."""
    peer = make_peer(name)
    clip = arrive(peer, CLIP, tmp_path)
    image, tokens, _ = pairs(peer)
    mask = torch.arange(9) < torch.tensor([[4], [7], [6]])
    padded = tokens.where(mask, peer.config.text_config.pad_token_id)
    with torch.no_grad():
        want = peer(input_ids=padded, pixel_values=image).text_embeds
        assert_near(clip.encode_text(tokens[:, :7], mask[:, :7]), want)
        assert_near(clip.encode_text(padded[:, :7]), want)
        assert not torch.allclose(clip.encode_text(tokens), want, atol=0.01)


@pytest.mark.parametrize("place", ["tokenizer_config.json", "tokenizer.json"])
def test_padding_of_the_tokenizer(place: str, tmp_path: Path) -> None:
    """The files of SigLIP 2 do not state it, or state that of SigLIP."""
    peer = make_peer("siglip")
    peer.save_pretrained(tmp_path)
    added = {"4": {"content": "<pad>"}} if place == "tokenizer_config.json" else {}
    settings = {"pad_token": "<pad>" if added else {"content": "<pad>"}, "added_tokens_decoder": added}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": [{"content": "<pad>", "id": 4}]}))
    clip = CLIP.from_pretrained(tmp_path).eval()
    assert clip.config.text_padding == 4
    image, tokens, _ = pairs(peer)
    tokens[:, 5:] = 4
    with torch.no_grad():
        assert_near(clip.encode_text(tokens[:, :5]), peer(input_ids=tokens, pixel_values=image).text_embeds)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(TrunklineError, match=r"tokenizer_config\.json does not say which token fills texts up"):
        CLIP.from_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert CLIP.from_pretrained(tmp_path).config.text_padding == 1


def test_settings_that_a_siglip_does_not_read(tmp_path: Path) -> None:
    peer = make_peer("siglip")
    peer.save_pretrained(tmp_path)
    edit(text_config_dict={"layer_norm_eps": 0.1}, vision_config_dict={"hidden_act": "gelu"})(tmp_path)
    assert_same_results(peer, CLIP.from_pretrained(tmp_path).eval())


def test_texts_without_an_end_token(tmp_path: Path) -> None:
    """A text of another tokenizer is read at its last token, not at its first."""
    clip = arrive(make_peer("clip"), CLIP, tmp_path)
    tokens = torch.randint(3, 48, (2, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(6) < torch.tensor([[4], [6]])
    with torch.no_grad():
        found = clip.encode_text(tokens, mask)
        assert_near(found[:1], clip.encode_text(tokens[:1, :4]))
        assert_near(found[1:], clip.encode_text(tokens[1:]))
        assert not torch.allclose(found[1:], clip.encode_text(tokens[1:, :1]), atol=0.01)


def test_settings_and_buffers_of_older_files(tmp_path: Path) -> None:
    """Sizes in `text_config_dict`, and numbers of positions among the weights, as in OpenAI's folders."""
    peer = make_peer("clip")
    peer.save_pretrained(tmp_path)
    edit(text_config_dict=TEXT, vision_config_dict=IMAGE, text_config={"hidden_size": 99}, vision_config=None)(tmp_path)
    numbers = {f"{tower}_model.embeddings.position_ids": torch.arange(9)[None] for tower in ("text", "vision")}
    edit_weights(lambda weights: weights.update(numbers))(tmp_path)
    assert_same_results(peer, CLIP.from_pretrained(tmp_path).eval())


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_gradients(name: str, tmp_path: Path) -> None:
    peer = make_peer(name)
    clip = arrive(peer, CLIP, tmp_path)
    image, tokens, mask = pairs(peer)
    options = {} if mask is None else {"attention_mask": mask.long()}
    theirs, ours = peer(input_ids=tokens, pixel_values=image, **options), clip(image, tokens, mask)
    labels = torch.arange(3)
    gradients(peer, F.cross_entropy(theirs.logits_per_image, labels))
    got = gradients(clip, F.cross_entropy(clip.scale(ours.image @ ours.text.T), labels))
    assert len(got) == len(list(clip.parameters()))
    with torch.no_grad():
        for p in peer.parameters():
            p.copy_(torch.zeros_like(p) if p.grad is None else p.grad)
    want = arrive(peer, CLIP, tmp_path / "gradients").state_dict()
    for key, value in got.items():
        assert_near(value, want[key], 1e-4)


@pytest.mark.parametrize(
    ("name", "part", "option", "message"),
    [
        ("clip", "text_config", {"hidden_act": "mish"}, "a CLIP of transformers with hidden_act=mish cannot"),
        ("clip", "text_config", {"eos_token_id": 50}, "eos_token_id=50 and vocab_size=50 cannot be converted"),
        ("clip", "text_config", {"eos_token_id": [3, 4]}, r"eos_token_id=\[3, 4\] and vocab_size=50 cannot"),
        ("siglip", "text_config", {"pad_token_id": None}, "pad_token_id=None and vocab_size=50 cannot be converted"),
        ("siglip", "vision_config", {"vision_use_head": False}, "a SigLIP of transformers with vision_use_head=False"),
        ("siglip", "text_config", {"projection_size": 7}, "gives texts 7 numbers, but images 32"),
    ],
)
def test_options_that_we_have_not(name: str, part: str, option: dict[str, Any], message: str, tmp_path: Path) -> None:
    peer = make_peer(name)
    peer.save_pretrained(tmp_path)
    edit(**{part: getattr(peer.config, part).to_dict() | option})(tmp_path)
    with pytest.raises(TrunklineError, match=message):
        CLIP.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("model", "config", "whole"),
    [
        (hf.CLIPVisionModelWithProjection, hf.CLIPVisionConfig(**IMAGE), "CLIPModel"),
        (hf.CLIPTextModelWithProjection, hf.CLIPTextConfig(**TEXT), "CLIPModel"),
        (hf.CLIPForImageClassification, hf.CLIPConfig(text_config=TEXT, vision_config=IMAGE), "CLIPModel"),
        (hf.SiglipVisionModel, hf.SiglipVisionConfig(**IMAGE), "SiglipModel"),
    ],
)
def test_one_tower_is_not_a_clip(model: Any, config: Any, whole: str, tmp_path: Path) -> None:
    model(config).save_pretrained(tmp_path)
    message = rf"a {model.__name__} of transformers cannot be converted \({config.model_type}\).*folder of a {whole}"
    with pytest.raises(TrunklineError, match=message):
        CLIP.from_pretrained(tmp_path)


def from_peer(name: str, **changes: Any) -> CLIPConfig:
    """The configuration of a peer as ours, changed."""
    model, config = PEERS[name]
    found = foreign_family(model.config_class(**config).to_dict(), "a test").config_from(
        model.config_class(**config).to_dict(), {}
    )
    return replace(found, **changes)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (two_towers(), "the image tower of a CLIP with pool=mean cannot become a CLIP of transformers"),
        (shared_trunk(), "text tower is a BERT cannot become a CLIP of transformers"),
        (from_peer("clip", end_token=2), "end_token=2 cannot become a CLIP of transformers"),
        (from_peer("clip", end_token=None), "reads a text at its eos_token_id, which the network does not know"),
        (from_peer("clip", text_padding=0), "text_padding=0 cannot become a CLIP of transformers"),
        (from_peer("clip", projection_bias=True), "head_bias=True cannot become a CLIP of transformers"),
        (from_peer("clip", text_pool="mean"), "pool=mean cannot become a CLIP of transformers"),
        (
            from_peer("clip", image=replace(from_peer("clip").image, image_size=(16, 24))),
            r"image_size=\(16, 24\) cannot become a CLIP of transformers",
        ),
        (from_peer("siglip", text_padding=None), "text_padding=None cannot become a SigLIP"),
        (from_peer("siglip", init_logit_bias=None), "init_logit_bias=None cannot become a SigLIP"),
    ],
)
def test_networks_that_no_other_can_be(config: CLIPConfig, message: str, tmp_path: Path) -> None:
    with pytest.raises(TrunklineError, match=message):
        save_foreign(CLIP(config), tmp_path, "transformers")
    assert not list(tmp_path.iterdir())


def test_an_end_token_that_only_the_caller_knows(tmp_path: Path) -> None:
    network = randomise(CLIP(from_peer("clip", end_token=None))).eval()
    save_foreign(network, tmp_path, "transformers", {"eos_token_id": END})
    assert_same_texts(hf.CLIPModel.from_pretrained(tmp_path).eval(), network)


@torch.no_grad()
def assert_same_texts(peer: Any, clip: CLIP) -> None:
    image, tokens, mask = pairs(peer)
    want = peer(input_ids=tokens, pixel_values=image, attention_mask=mask.long()).text_embeds
    assert_near(clip.encode_text(tokens, mask), want)
