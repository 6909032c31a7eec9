"""The AST: its patches, a clip alone as in a ragged batch, other sizes, and a start from images."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_networks import assert_near, assert_same_weights, randomise, spectrogram, vit
from torch import Tensor

from trunkline import TrunklineError
from trunkline.modules.backbone import Transformer, TransformerConfig
from trunkline.modules.networks import AST, ViT
from trunkline.modules.networks.ast import SpectrogramPatches
from trunkline.modules.training.warm_start import load_matching

LENGTHS = (24, 1, 3, 4, 5, 8, 16, 23)
KINDS: dict[str, dict[str, Any]] = {
    "distilled": {},
    "cls": {"pool": "cls", "stride": (4, 2)},
    "mean": {"pool": "mean", "stride": 1, "head_norm": False},
    "post-norm": {"trunk": {"norm_first": False, "final_norm": False}, "stride": 4},
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def network(kind: str = "distilled", **changes: Any) -> Any:
    return randomise(AST(spectrogram(**{**KINDS[kind], **changes}))).eval()


def clips() -> tuple[Tensor, Tensor]:
    """Clips of different lengths, with junk in their padding."""
    mask = torch.arange(24)[None] < torch.tensor(LENGTHS)[:, None]
    return torch.where(mask[..., None], torch.randn(len(LENGTHS), 24, 10), torch.nan), mask


# --- patches


@pytest.mark.parametrize("stride", [3, (4, 2), (1, 4)])
def test_patches_are_a_convolution(stride: Any) -> None:
    config = spectrogram(stride=stride)
    patches, (rows, columns), (time, mel) = SpectrogramPatches(config), config.grid, config.steps
    features = torch.randn(2, 24, 10)
    weight = patches.proj.weight.unflatten(1, (1, 4, 4))
    want = F.conv2d(features.mT[:, None], weight, patches.proj.bias, stride=(mel, time))  # (B, D, rows, columns)
    assert want.shape[2:] == (rows, columns)
    assert_near(patches(features, columns), want.flatten(2).mT)


def test_grid_of_the_paper() -> None:
    config = spectrogram(num_mels=128, max_frames=1024, patch_size=16, stride=10)
    assert config.grid == (12, 101)
    assert replace(config, max_frames=512).grid == (12, 50)
    assert replace(config, stride=16).grid == (8, 64)


@every_kind
def test_columns_see_every_frame(kind: str) -> None:
    """As few as possible; only the last frames of the longest clips, which fill no patch, are left out."""
    model = network(kind)
    step, size, most = model.config.steps[0], 4, model.config.grid[1]
    for frames in range(1, 25):
        enough = next(n for n in range(1, 25) if (n - 1) * step + size >= frames)
        assert model.columns(frames) == min(enough, most)
        assert int(model.output_lengths(torch.tensor(frames))) == model.columns(frames)


# --- padding


@every_kind
@torch.no_grad()
def test_a_clip_alone_and_in_a_batch(kind: str) -> None:
    model, (features, mask) = network(kind), clips()
    together, inside = model(features, mask), model.forward_features(features, mask)
    rows, columns = model.config.grid
    assert inside.patches.shape == (8, rows * columns, 32)
    assert_near(model.forward_head(inside), together)
    for row, length in enumerate(LENGTHS):
        clip = features[row : row + 1, :length]
        assert_near(together[row : row + 1], model(clip))
        alone, real = model.forward_features(clip), model.columns(length)
        assert_near(inside.patches[row].unflatten(0, (rows, columns))[:, :real].flatten(0, 1), alone.patches[0])
        assert_near(inside.prefix[row], alone.prefix[0])
        assert inside.mask.unflatten(1, (rows, columns))[row].sum(dim=1).tolist() == [real] * rows


@torch.no_grad()
def test_padding_is_heard_without_a_mask() -> None:
    """As in the paper."""
    model = network()
    features = F.pad(torch.randn(1, 10, 10), (0, 0, 0, 14))
    mask = torch.arange(24)[None] < 10
    assert (model(features) - model(features, mask)).abs().max() > 1e-3


def test_a_row_of_padding_alone() -> None:
    """It may fill up a batch, and spoils no gradient."""
    model = network("mean")
    features, mask = clips()
    mask[1] = False
    out = model(features, mask)
    out.sum().backward()
    assert out.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters())


# --- pooling


def test_starts_at_a_uniform_guess() -> None:
    assert (AST(spectrogram())(torch.randn(2, 24, 10)) == 0).all()


@pytest.mark.parametrize(("pool", "prefix"), [("distilled", 2), ("cls", 1), ("mean", 0)])
def test_pools_what_it_says(pool: Any, prefix: int) -> None:
    model = network(pool=pool)
    features = model.forward_features(torch.randn(2, 24, 10))
    assert features.prefix.shape == (2, prefix, 32)
    assert features.mask is None
    assert model.num_prefix_tokens == prefix
    pooled = model.forward_head(features, pre_logits=True)
    tokens = features.prefix if prefix else features.patches
    assert_near(pooled, tokens.sum(dim=1) / tokens.shape[1])
    normed = F.layer_norm(pooled, (32,), model.head_norm.weight, model.head_norm.bias, 1e-6)
    assert_near(model.forward_head(features), normed @ model.head.weight.T + model.head.bias)
    assert model.output_modules() == [model.head_norm, model.head]


def test_without_a_head() -> None:
    model = network(num_classes=0, head_norm=False)
    features = torch.randn(2, 24, 10)
    assert_near(model(features), model.forward_head(model.forward_features(features), pre_logits=True))


# --- other sizes


def test_shorter_clips_keep_their_positions() -> None:
    model, shorter = network(), AST(spectrogram(max_frames=13))
    features = torch.randn(2, 13, 10)
    want = model(features)
    shorter.adapt(model)
    shorter.load_state_dict(model.state_dict())
    assert model.config == shorter.config
    assert_near(shorter.eval()(features), want)


def test_longer_clips_and_other_mel_bins_get_interpolated_positions() -> None:
    model, larger = network(), AST(spectrogram(max_frames=40, num_mels=16))
    before = model.pos_embed.detach().unflatten(1, (3, 7)).permute(0, 3, 1, 2)
    want = F.interpolate(before, (5, 13), mode="bicubic", antialias=True).permute(0, 2, 3, 1).flatten(1, 2)
    larger.adapt(model)
    larger.load_state_dict(model.state_dict())
    assert_near(larger.pos_embed, want)
    assert larger(torch.randn(1, 40, 16)).shape == (1, 6)
    assert model(torch.randn(1, 40, 16)).shape == (1, 6)


def test_another_stride_keeps_the_time() -> None:
    """Half the stride: the positions of the same frames, of which there are more, and then the first ones."""
    model = network(stride=4, num_mels=8)
    with torch.no_grad():  # a ramp in time
        model.pos_embed.copy_(torch.arange(6.0).repeat(2)[None, :, None].expand(1, 12, 32))
    model.resize(replace(model.config, stride=(2, 4), max_frames=16))
    after = model.pos_embed.detach().unflatten(1, (2, 7))[0, 0, :, 0]
    assert model.config.grid == (2, 7)
    ramp = (torch.arange(7.0) + 0.5) * 6 / 11 - 0.5  # the frames of the source fill 11 columns
    assert (after - ramp)[1:].abs().max() < 0.1
    assert model(torch.randn(1, 16, 8)).shape == (1, 6)


def test_resize_keeps_dtype_and_frozen_state() -> None:
    model = network().bfloat16().requires_grad_(False)
    model.resize(spectrogram(max_frames=40))
    assert model(torch.randn(1, 40, 10, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert not any(p.requires_grad for p in model.parameters())


def test_a_start_from_an_ast_of_another_size() -> None:
    """Through the function that all objectives use; the head for other classes stays."""
    own, trained = network(max_frames=40, num_classes=5), network()
    head, trunk = own.head.weight.clone(), {k: v.clone() for k, v in trained.backbone.state_dict().items()}
    load_matching(own, trained, "file")
    assert torch.equal(own.head.weight, head)
    assert all(torch.equal(value, trunk[key]) for key, value in own.backbone.state_dict().items())


# --- a start from images


@pytest.mark.parametrize("positions", ["learned", "sincos2d", "none"])
def test_weights_of_images(positions: Any) -> None:
    images = randomise(ViT(vit(positions=positions, image_size=16))).eval()
    model = AST.from_images(images, spectrogram({"depth": 1}))
    assert model.config == spectrogram()  # with the trunk of the images
    assert_same_weights(model.backbone, images.backbone)
    assert torch.equal(model.cls_token, images.cls_token)
    assert torch.equal(model.dist_token, images.cls_token)
    if positions == "none":
        assert (model.pos_embed == 0).all()
    else:
        table = images.pos_embed.detach().unflatten(1, (4, 4)).permute(0, 3, 1, 2)
        want = F.interpolate(table, (3, 7), mode="bicubic", antialias=True).permute(0, 2, 3, 1).flatten(1, 2)
        assert_near(model.pos_embed, want)
    assert (model.head.weight == 0).all()


@pytest.mark.parametrize("options", [{}, {"prefix_positions": 1}, {"patch_bias": False}], ids=str)
@torch.no_grad()
def test_a_spectrogram_is_seen_as_a_grey_image(options: dict[str, Any]) -> None:
    """Where nothing overlaps and the grids are equal, both networks compute the same."""
    images = randomise(ViT(vit(image_size=(8, 24), **options))).eval()
    model = AST.from_images(images, spectrogram(num_mels=8, stride=4, pool="cls", head_norm=False)).eval()
    model.head.load_state_dict(images.head.state_dict())
    features = torch.randn(2, 24, 8)
    assert_near(model(features), images(features.mT[:, None].expand(-1, 3, -1, -1)))


def test_images_without_a_class_token() -> None:
    images = randomise(ViT(vit(pool="mean", num_registers=2)))
    model = AST.from_images(images, spectrogram())
    assert model.cls_token is not None
    assert model.cls_token.std() > 0.01


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size": 8}, "patch_size=4 cannot start from a ViT that has patch_size=8"),
        ({"embed_norm": True}, "norms"),
    ],
)
def test_images_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TrunklineError, match=message):
        AST.from_images(ViT(vit(**changes)), spectrogram())


# --- limits


@pytest.mark.parametrize(
    ("changes", "message", "field"),
    [
        ({"max_frames": 0}, "max_frames=0 must be at least 1", "max_frames"),
        ({"patch_size": 11}, "patch_size=11 must be between 1 and num_mels=10", "patch_size"),
        ({"patch_size": 0}, "patch_size=0 must be between", "patch_size"),
        ({"stride": 5}, "stride=5 must be between 1 and patch_size=4", "stride"),
        ({"stride": (0, 4)}, r"stride=\(0, 4\) must be between", "stride"),
        ({"trunk": {"causal": True}}, "cannot be causal", "backbone.causal"),
    ],
)
def test_values_that_cannot_work(changes: dict[str, Any], message: str, field: str) -> None:
    with pytest.raises(TrunklineError, match=message) as error:
        spectrogram(**changes)
    assert error.value.field == f"model.network.{field}"


def test_wrong_features() -> None:
    model = network()
    with pytest.raises(TrunklineError, match=r"features of shape \(B, frames, 10\), but got \(2, 24, 9\)"):
        model(torch.zeros(2, 24, 9))
    with pytest.raises(TrunklineError, match="a clip of 25 frames does not fit into a network that hears 1 to 24"):
        model(torch.zeros(2, 25, 10))


def test_a_padded_batch_may_be_longer_than_the_longest_clip() -> None:
    model = network(max_frames=21)
    features = torch.randn(1, 24, 10)
    mask = torch.arange(24)[None] < 21
    assert_near(model(features, mask), model(features[:, :21]))


def test_on_a_given_trunk() -> None:
    config = spectrogram()
    trunk = Transformer(replace(config.backbone, causal=True))
    model = randomise(AST(config, trunk)).eval()
    assert model.backbone is trunk
    features = torch.randn(1, 24, 10)
    changed = features.clone()
    changed[:, 20:] += 10.0
    assert (model(features) - model(changed)).abs().max() > 1e-3  # the first tokens see the last patches
    with pytest.raises(TrunklineError, match="the given trunk has depth=1"):
        AST(config, Transformer(TransformerConfig(dim=32, depth=1, num_heads=4)))
