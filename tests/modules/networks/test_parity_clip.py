"""CLIP and SigLIP of transformers become a CLIP and go back, bit for bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from parity import assert_near, randomise
from test_clip import shared_trunk, two_towers
from test_pretrained import edit
from torch import Tensor
from travels import arrive, go_back, gradients

from trunkline import TrunklineError
from trunkline.modules.networks import CLIP
from trunkline.modules.networks.convert.families import save_foreign

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
    "siglip": (hf.SiglipModel, {"text_config": TEXT, "vision_config": EQUAL}),
}


@torch.random.fork_rng()
def make_peer(name: str) -> Any:
    torch.manual_seed(0)
    model, config = PEERS[name]
    return randomise(model(model.config_class(**config)).eval(), 0.1)


def pairs(peer: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    """Three images, and three texts as their tokenizers write them, with the mask of padding."""
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(3, peer.config.vision_config.num_channels, 16, 16, generator=generator)
    tokens = torch.randint(1, 48, (3, 9), generator=generator)
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


@pytest.mark.parametrize("name", PEERS)
def test_there_and_back_again(name: str, tmp_path: Path) -> None:
    peer = make_peer(name)
    clip = arrive(peer, CLIP, tmp_path)
    assert_same_results(peer, clip)
    assert_same_results(go_back(clip, peer, tmp_path, eos_token_id=END), clip)


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


def test_one_tower_is_not_a_clip(tmp_path: Path) -> None:
    hf.CLIPVisionModelWithProjection(hf.CLIPVisionConfig(**IMAGE)).save_pretrained(tmp_path)
    with pytest.raises(TrunklineError, match=r"cannot be converted \(clip_vision_model\)"):
        CLIP.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (CLIP(two_towers()), "image tower has with pool=mean cannot become a CLIP of transformers"),
        (CLIP(shared_trunk()), "text tower is a BERT cannot become a CLIP of transformers"),
    ],
)
def test_networks_that_no_other_can_be(network: CLIP, message: str, tmp_path: Path) -> None:
    with pytest.raises(TrunklineError, match=message):
        save_foreign(network, tmp_path, "transformers")
