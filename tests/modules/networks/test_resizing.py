"""Patches of another size and images of other channels, against timm."""

from typing import Any

import pytest
import torch
from parity import assert_near, randomise
from timm.layers import resample_patch_embed
from timm.models._manipulate import adapt_input_conv
from torch.nn.functional import interpolate

from trunkline.modules.backbone import TransformerConfig
from trunkline.modules.networks import ViT, ViTConfig
from trunkline.modules.networks.patches import resize_patches
from trunkline.modules.training.warm_start import load_matching


def vit(image_size: Any = 8, patch_size: int = 4, in_chans: int = 3, **options: Any) -> ViT:
    backbone = TransformerConfig(16, 2, 2)
    return ViT(ViTConfig(image_size, patch_size, in_chans, num_classes=3, backbone=backbone, **options))


@pytest.mark.parametrize("side", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("before", [1, 3])
def test_patches_are_resized_as_timm_does(side: int, channels: int, before: int) -> None:
    weight = torch.randn(5, before, 4, 4, generator=torch.Generator().manual_seed(0))
    want = resample_patch_embed(adapt_input_conv(channels, weight, before), [side, side])
    got = resize_patches(weight.flatten(1), (before, 4), (channels, side))
    assert got.shape == (5, channels * side**2)
    assert_near(got, want.flatten(1), 1e-4)


@torch.no_grad()
def test_larger_patches_see_the_same_in_larger_images() -> None:
    torch.manual_seed(0)
    source, own = randomise(vit((8, 12))).eval(), vit((16, 24), 8, 1).eval()
    grey = torch.randn(2, 1, 8, 12)
    tiles = grey.reshape(2, 1, 2, 4, 3, 4).permute(0, 2, 4, 1, 3, 5).reshape(12, 1, 4, 4)
    tiles = interpolate(tiles, size=(8, 8), mode="bicubic", antialias=True)  # each alone: patches do not mix
    large = tiles.reshape(2, 2, 3, 1, 8, 8).permute(0, 3, 1, 4, 2, 5).reshape(2, 1, 16, 24)
    want = source(grey.expand(-1, 3, -1, -1))
    load_matching(own, source, "weights")
    assert_near(own(large), want, 1e-4)
    assert (own.config.patch_size, own.config.in_chans, own.patch_embed.proj.in_features) == (8, 1, 64)


def test_what_needs_no_change_stays() -> None:
    source = randomise(vit())
    weight = source.patch_embed.proj.weight
    source.resize(16)
    assert source.patch_embed.proj.weight is weight
    source.resize((8, 4), 2)
    assert source.patch_embed.grid == (4, 2)
    assert source.patch_embed.proj.weight.shape == (16, 12)
