"""ViT, DeiT and DINOv2 of transformers become a ViT and go back, bit for bit."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from parity import assert_near, random_peer, randomise
from PIL import Image
from safetensors.torch import load_file, save_file
from test_pretrained import edit
from torch import Tensor
from travels import arrive, go_back, gradients

import trunkline
from trunkline import TrunklineError
from trunkline.modules.backbone import TransformerConfig
from trunkline.modules.networks import ViT, ViTConfig
from trunkline.modules.networks.convert.families import save_foreign
from trunkline.modules.networks.convert.transformers_vit import DEIT, DINOV2, DINOV2_REGISTERS, TRANSFORMERS_VIT

SIZES = {
    **{"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 24, "patch_size": 8},
    **{"num_labels": 5, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
}
OF_VIT = {**SIZES, "intermediate_size": 40}
WIDE = {**OF_VIT, "image_size": [16, 32], "num_channels": 1}
PEERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "vit": (hf.ViTForImageClassification, OF_VIT),
    "vit-wide": (hf.ViTForImageClassification, {**WIDE, "qkv_bias": False, "hidden_act": "quick_gelu"}),
    "vit-body": (hf.ViTModel, OF_VIT),
    "deit": (hf.DeiTForImageClassification, OF_VIT),
    "dinov2": (hf.Dinov2ForImageClassification, {**SIZES, "mlp_ratio": 2}),
    "dinov2-body": (hf.Dinov2Model, {**SIZES, "layerscale_value": 0.5}),
    "dinov2-gated": (hf.Dinov2ForImageClassification, {**SIZES, "use_swiglu_ffn": True}),
    "registers": (hf.Dinov2WithRegistersForImageClassification, {**SIZES, "num_register_tokens": 3, "patch_size": 4}),
}


def make_peer(name: str) -> Any:
    return random_peer(*PEERS[name])


def images(peer: Any) -> Tensor:
    """Two images, (2, C, height, width)."""
    config = peer.config
    sides = config.image_size if isinstance(config.image_size, list | tuple) else [config.image_size] * 2
    return torch.randn(2, config.num_channels, *sides, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", PEERS)
def test_there_and_back_again(name: str, tmp_path: Path) -> None:
    peer = make_peer(name)
    vit = arrive(peer, ViT, tmp_path)
    again = go_back(vit, peer, tmp_path)
    image = images(peer)
    with torch.no_grad():
        if "body" in name:
            theirs = peer(image)
            features = vit.forward_features(image)
            assert_near(torch.cat((features.prefix, features.patches), dim=1), theirs.last_hidden_state)
            assert_near(vit(image), theirs.pooler_output)
            assert torch.equal(again(image).last_hidden_state, theirs.last_hidden_state)
        else:
            want = peer(image).logits
            assert 0.1 < want.std() < 20
            assert_near(vit(image), want)
            assert_near(vit.forward_head(vit.forward_features(image)), want)
            assert torch.equal(again(image).logits, want)


@pytest.mark.parametrize(
    ("name", "pixels"),
    [("vit", 16), ("deit", 32), ("dinov2", 16), ("dinov2-body", 40), ("registers", 12), ("registers", 30)],
)
def test_pictures_of_another_size(name: str, pixels: int, tmp_path: Path) -> None:
    """As of a published DINOv2: the network takes what its transform makes, with positions interpolated as theirs."""
    peer = make_peer(name)
    peer.save_pretrained(tmp_path / "theirs")
    sides = {"height": pixels, "width": pixels}
    hf.BitImageProcessorPil(size={"shortest_edge": 40}, crop_size=sides).save_pretrained(tmp_path / "theirs")
    network = trunkline.load(tmp_path / "theirs")
    picture = np.random.default_rng(0).integers(0, 255, (48, 56, 3), dtype=np.uint8)
    image = network.transform(Image.fromarray(picture))[None]

    def output(model: Any, **options: Any) -> Tensor:
        out = model(image, **options)
        return out.pooler_output if "body" in name else out.logits

    always = name.startswith(("dinov2", "registers"))  # at each call; the others want to be told
    with torch.no_grad():
        want = output(peer) if always else output(peer, interpolate_pos_encoding=True)
        assert_near(network(image), want)
        save_foreign(network, tmp_path / "back", "transformers")
        again = type(peer).from_pretrained(tmp_path / "back").eval()
        assert again.config.image_size == network.config.image_size == pixels
        assert_near(output(again), want)
        assert_near(trunkline.load(tmp_path / "back")(image), want)
    assert ViT.from_pretrained(tmp_path / "theirs").config.image_size == 24


@pytest.mark.parametrize("name", ["vit", "deit", "registers"])
def test_gradients(name: str, tmp_path: Path) -> None:
    peer = make_peer(name)
    vit = arrive(peer, ViT, tmp_path)
    image, label = images(peer), torch.tensor([3, 1])
    gradients(peer, F.cross_entropy(peer(image).logits, label))
    got = gradients(vit, F.cross_entropy(vit(image), label))
    assert len(got) == len(list(vit.parameters()))
    with torch.no_grad():  # the names of files differ from those in memory, so the gradients travel as weights
        for p in peer.parameters():
            p.copy_(torch.zeros_like(p) if p.grad is None else p.grad)
    want = arrive(peer, ViT, tmp_path / "gradients").state_dict()
    for key, value in got.items():
        assert_near(value, want[key], 1e-4)


@pytest.mark.parametrize(
    ("name", "option", "message"),
    [
        ("vit", {"hidden_act": "mish"}, "a ViT of transformers with hidden_act=mish cannot"),
        ("vit", {"patch_size": [4, 8]}, r"patch_size=\[4, 8\] cannot be converted: the patches"),
        ("vit-body", {"pooler_act": "relu"}, "pooler_act=relu cannot"),
        ("vit", {"model_type": "swin"}, r"cannot be converted \(swin\)"),
        ("vit", {"image_size": 32}, r"'pos_embed' is \(1, 9, 32\) there and \(1, 16, 32\) here"),
    ],
)
def test_options_that_we_have_not(name: str, option: dict[str, Any], message: str, tmp_path: Path) -> None:
    make_peer(name).save_pretrained(tmp_path)
    edit(**option)(tmp_path)
    with pytest.raises(TrunklineError, match=message):
        ViT.from_pretrained(tmp_path)


def test_two_classifiers_are_refused(tmp_path: Path) -> None:
    hf.DeiTForImageClassificationWithTeacher(hf.DeiTConfig(**OF_VIT)).save_pretrained(tmp_path)
    with pytest.raises(TrunklineError, match=r"no place in a ViT: 'cls_classifier\.bias'"):
        ViT.from_pretrained(tmp_path)


def test_a_classifier_does_not_read_a_pooler(tmp_path: Path) -> None:
    """They leave it unread in transformers too; a head behind it would give other results without a word."""
    make_peer("vit").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    pooler = {"vit.pooler.dense.weight": torch.eye(32), "vit.pooler.dense.bias": torch.zeros(32)}
    save_file(load_file(file) | pooler, file)
    with pytest.raises(TrunklineError, match=r"'pooler\.weight' has no place in it"):
        ViT.from_pretrained(tmp_path)


TRUNK = TransformerConfig(dim=32, depth=1, num_heads=4)
SCALED = TransformerConfig(dim=32, depth=1, num_heads=4, layer_scale=0.1)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (ViTConfig(24, 8, pool="mean", backbone=TRUNK), "pool=mean cannot become a ViT of transformers"),
        (ViTConfig(24, 8, pooler=True, backbone=TRUNK), "pooler=True cannot become a ViT of transformers"),
        (ViTConfig(24, 8, num_classes=0, pooler=True, backbone=SCALED), "pooler=True cannot become a DINOv2"),
        (ViTConfig(24, 8, pool="cls_mean", backbone=TRUNK), "layer_scale=None cannot become a DINOv2"),
        (
            ViTConfig(24, 8, pool="cls_mean", backbone=replace(SCALED, mlp_dim=40)),
            "mlp_dim=40 cannot become a DINOv2, which has backbone.mlp_dim=32",
        ),
        (ViTConfig(24, 8, positions="none", backbone=TRUNK), "positions=none cannot become a ViT of transformers"),
        (
            ViTConfig((16, 32), 8, pool="cls_mean", backbone=SCALED),
            r"image_size=\(16, 32\) cannot become a DINOv2, which sees square images",
        ),
    ],
    ids=["pool", "pooler", "pooler-of-dinov2", "no-layer-scale", "part-of-a-ratio", "no-positions", "not-square"],
)
def test_a_network_that_no_other_can_be(network: ViTConfig, message: str, tmp_path: Path) -> None:
    with pytest.raises(TrunklineError, match=message):
        save_foreign(ViT(network), tmp_path, "transformers")


@pytest.mark.parametrize(
    "config",
    [
        ViTConfig(24, 8, num_classes=5, backbone=TRUNK),
        ViTConfig((16, 32), 8, num_classes=5, positions="sincos2d", num_registers=1, backbone=TRUNK),
        ViTConfig(24, 8, num_classes=5, pool="cls_mean", num_registers=2, backbone=SCALED),
    ],
    ids=["vit", "deit", "dinov2"],
)
def test_ours_with_other_positions(config: ViTConfig, tmp_path: Path) -> None:
    """Positions that are computed, or that tokens lack, are written as learned ones with the same results."""
    vit = randomise(ViT(config).eval(), 0.1)
    save_foreign(vit, tmp_path, "transformers")
    peer = hf.AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    image = torch.randn(2, 3, *config.size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want = vit(image)
        assert want.std() > 0.1
        assert_near(peer(image).logits, want)
        assert_near(ViT.from_pretrained(tmp_path).eval()(image), want)


def test_usual_values_that_a_file_leaves_out() -> None:
    """The same as those of transformers."""
    for config_class, family in ((hf.ViTConfig, TRANSFORMERS_VIT), (hf.DeiTConfig, DEIT), (hf.Dinov2Config, DINOV2)):
        usual = {"id2label": {0: "a"}}
        assert family.config_from(usual, {}) == family.config_from(config_class().to_dict() | usual, {})
    registers = {"hidden_size": 32, "num_attention_heads": 4}
    full = hf.Dinov2WithRegistersConfig(**registers).to_dict()
    assert DINOV2_REGISTERS.config_from(registers, {}) == DINOV2_REGISTERS.config_from(full, {})


def test_too_many_positions_before_the_patches() -> None:
    with pytest.raises(TrunklineError, match="prefix_positions=2 is out of range; set it to at most 1"):
        ViTConfig(24, 8, prefix_positions=2)
