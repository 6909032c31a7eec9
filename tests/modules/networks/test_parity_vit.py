"""Parity of the ViT with timm."""

import math
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from parity import assert_near, randomise
from torch import Tensor, nn

from trunkline.modules.backbone import TransformerConfig
from trunkline.modules.networks import ViT, ViTConfig
from trunkline.modules.networks.convert import vit_from_timm

VITS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # timm's arguments, and ours
    "cls": ({}, {}),
    "registers": ({"reg_tokens": 4}, {"num_registers": 4}),
    "no_embed_class": ({"no_embed_class": True}, {}),
    "no_embed_class-registers": ({"no_embed_class": True, "reg_tokens": 4}, {"num_registers": 4}),
    "map": ({"global_pool": "map", "class_token": False}, {"pool": "map"}),
    "wide": ({"img_size": (32, 80)}, {"image_size": (32, 80)}),
    "features": ({"num_classes": 0, "in_chans": 1}, {"num_classes": 0, "in_chans": 1}),
    "qk_norm": ({"qk_norm": True}, {"qk_norm": True}),
}


def vit_pair(name: str, image_size: int | tuple[int, int] = 64, depth: int = 2) -> tuple[nn.Module, ViT, Tensor]:
    """ViT-Ti/16 of timm with random weights and biases, ours after conversion, and two images."""
    theirs, ours = (dict(changes) for changes in VITS[name])
    theirs = {"img_size": image_size, "num_classes": 10, "depth": depth, **theirs}
    peer = timm.create_model("vit_tiny_patch16_224", pretrained=False, **theirs).eval()
    randomise(peer, 0.05)
    trunk = TransformerConfig(192, depth, 3, qk_norm=ours.pop("qk_norm", False))
    vit = ViT(ViTConfig(**{"image_size": image_size, "num_classes": 10, "backbone": trunk, **ours})).eval()
    vit.load_state_dict(vit_from_timm(peer.state_dict(), math.prod(vit.patch_embed.grid)))
    return peer, vit, torch.randn(2, vit.config.in_chans, *vit.config.size)


@pytest.mark.parametrize("name", VITS)
@torch.no_grad()
def test_vit_against_timm(name: str) -> None:
    peer, vit, image = vit_pair(name)
    want = peer(image)
    assert 0.2 < want.std() < 20
    assert_near(vit(image), want)


@torch.no_grad()
def test_vit_tiny_in_full_against_timm() -> None:
    peer, vit, image = vit_pair("cls", image_size=224, depth=12)
    assert sum(p.numel() for p in vit.parameters()) == sum(p.numel() for p in peer.parameters()) - 192  # cls position
    assert_near(vit(image), peer(image))


def test_vit_gradients_against_timm() -> None:
    peer, vit, image = vit_pair("cls")
    images = [image.clone().requires_grad_() for _ in range(2)]
    for model, x in zip((peer, vit), images, strict=True):
        F.cross_entropy(model(x), torch.tensor([3, 7])).backward()
    assert images[0].grad is not None
    assert images[1].grad is not None
    assert_near(images[1].grad, images[0].grad)
    gradients = {name: p.grad for name, p in peer.named_parameters()}
    want = vit_from_timm(gradients, math.prod(vit.patch_embed.grid))
    want["cls_token"] = gradients["cls_token"]  # the converter adds its position
    for name, p in vit.named_parameters():
        assert p.grad is not None
        assert_near(p.grad, want[name])
