"""Vision Transformers of timm become a ViT and go back, bit for bit."""

import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from parity import assert_near, randomise
from safetensors.torch import save_file
from timm.models import save_for_hf
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from travels import assert_same_bits, gradients

from trunkline import TrunklineError
from trunkline.modules.backbone import TransformerConfig
from trunkline.modules.networks import ViT, ViTConfig
from trunkline.modules.networks.convert.families import save_foreign
from trunkline.modules.networks.convert.timm_vit import HEADS_OF_TIMM, TIMM_NAMES, timm_config_from
from trunkline.modules.networks.weights import unfilled

TINY = {"depth": 2, "embed_dim": 48, "img_size": 32, "patch_size": 8, "num_classes": 5, "num_heads": 4}
PEERS: dict[str, tuple[str, dict[str, Any]]] = {  # timm's architecture, and options
    "cls": ("vit_tiny_patch16_224", {}),
    "wide": ("vit_tiny_patch16_224", {"img_size": (32, 80), "in_chans": 1}),
    "body": ("vit_tiny_patch16_224", {"num_classes": 0}),
    "registers": ("vit_base_patch16_224", {"reg_tokens": 3}),
    "deit": ("deit_small_patch16_224", {}),
    "deit3": ("deit3_small_patch16_224", {"reg_tokens": 2}),
    "mean": ("vit_medium_patch16_reg4_gap_256", {}),
    "mean-before": ("vit_medium_patch16_gap_256", {}),
    "narrow": ("vit_tiny_patch16_224", {"embed_dim": 88, "mlp_ratio": 1.3637}),  # 120 / 88 * 88 is less than 120
    "map": ("vit_base_patch32_siglip_256", {}),
    "clip": ("vit_base_patch16_clip_quickgelu_224", {}),
    "dinov2": ("vit_giant_patch14_reg4_dinov2", {"mlp_ratio": 2}),
    "qk_norm": ("vit_small_patch16_224", {"qk_norm": True, "qkv_bias": False}),
}
ONE_WAY = {"dinov2"}
"""timm has no option in a file for a gated MLP."""


@torch.random.fork_rng()
def make_peer(name: str) -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    architecture, options = PEERS[name]
    options = {**TINY, **options}
    return randomise(timm.create_model(architecture, pretrained=False, **options).eval(), 0.1), options


def images(options: dict[str, Any]) -> Tensor:
    sides = options["img_size"] if isinstance(options["img_size"], tuple) else [options["img_size"]] * 2
    return torch.randn(2, options.get("in_chans", 3), *sides, generator=torch.Generator().manual_seed(1))


def write(peer: nn.Module, options: dict[str, Any], folder: Path) -> None:
    """As timm writes a folder for the hub."""
    save_for_hf(peer, str(folder), model_args=options, safe_serialization=True)


@pytest.mark.parametrize("name", PEERS)
def test_there_and_back_again(name: str, tmp_path: Path) -> None:
    peer, options = make_peer(name)
    write(peer, options, tmp_path / "theirs")
    vit = ViT.from_pretrained(tmp_path / "theirs").eval()
    image = images(options)
    with torch.no_grad():
        want = peer(image)
        assert 0.1 < want.std() < 20
        assert_near(vit(image), want)
        assert_near(vit.forward_head(vit.forward_features(image)), want)
    if name in ONE_WAY:
        with pytest.raises(TrunklineError, match="mlp=swiglu cannot become a Vision Transformer of timm"):
            save_foreign(vit, tmp_path / "back", "timm")
        return
    save_foreign(vit, tmp_path / "back", "timm")
    assert_same_bits(tmp_path / "theirs/model.safetensors", tmp_path / "back/model.safetensors")
    again = timm.create_model(f"local-dir:{tmp_path / 'back'}", pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(again(image), want)


def test_a_checkpoint_of_ours_in_an_architecture_of_theirs(tmp_path: Path) -> None:
    """`checkpoint_path` takes the file of weights alone, for an architecture that the user names."""
    trunk = TransformerConfig(192, 12, 3)
    vit = randomise(ViT(ViTConfig(num_classes=10, prefix_positions=1, backbone=trunk)).eval(), 0.02)
    save_foreign(vit, tmp_path, "timm")
    path = str(tmp_path / "model.safetensors")
    peer = timm.create_model("vit_tiny_patch16_224", num_classes=10, checkpoint_path=path).eval()
    image = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert_near(vit(image), peer(image))


TRUNK = TransformerConfig(48, 2, 4, drop_path=0.1)


@pytest.mark.parametrize(
    "config",
    [
        ViTConfig(32, 8, num_classes=5, backbone=TRUNK),
        ViTConfig((32, 80), 8, num_classes=5, pool="mean", positions="sincos2d", backbone=TRUNK),
        ViTConfig(32, 8, num_classes=5, num_registers=2, prefix_positions=1, backbone=TRUNK),
    ],
    ids=["no-positions-before", "computed-positions", "some-positions-before"],
)
def test_ours_with_other_positions(config: ViTConfig, tmp_path: Path) -> None:
    """Positions that are computed, or that tokens lack, are written as learned ones with the same results."""
    vit = randomise(ViT(config).eval(), 0.1)
    save_foreign(vit, tmp_path, "timm")
    peer = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    image = images({"img_size": config.size})
    with torch.no_grad():
        want = vit(image)
        assert want.std() > 0.1
        assert_near(peer(image), want)
        assert_near(ViT.from_pretrained(tmp_path).eval()(image), want)
    assert peer.blocks[1].drop_path1.drop_prob == pytest.approx(0.1)
    assert ViT.from_pretrained(tmp_path).config.backbone.drop_path == 0.1


@pytest.mark.parametrize("name", ["cls", "deit3", "mean", "map"])
def test_gradients(name: str, tmp_path: Path) -> None:
    peer, options = make_peer(name)
    write(peer, options, tmp_path)
    vit = ViT.from_pretrained(tmp_path).eval()
    image, label = images(options), torch.tensor([3, 1])
    theirs = gradients(peer, F.cross_entropy(peer(image), label))
    got = gradients(vit, F.cross_entropy(vit(image), label))
    save_file({name: value.contiguous() for name, value in theirs.items()}, tmp_path / "model.safetensors")
    want = ViT.from_pretrained(tmp_path).state_dict()
    assert len(got) == len(list(vit.parameters()))
    for key, value in got.items():
        assert_near(value, want[key], 1e-4)


def test_a_file_of_weights_and_a_name(tmp_path: Path) -> None:
    peer = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=5).eval()
    torch.save({"state_dict": peer.state_dict()}, tmp_path / "tiny.pth")
    vit = ViT.from_pretrained(tmp_path / "tiny.pth", config={"architecture": "vit_tiny_patch16_224"}).eval()
    image = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert_near(vit(image), peer(image))


def expressed(name: str, network: VisionTransformer) -> str:
    """What is wrong with our configuration of a timm network; empty if nothing is, or why it is refused."""
    try:
        config = timm_config_from({"architecture": name}, network.state_dict())
    except TrunklineError as error:
        return f"refused: {error}"
    weights = TIMM_NAMES.weights_from(network.state_dict(), config)
    own = unfilled(ViT, config).state_dict()
    block: Any = network.blocks[0]
    norm = next((m for m in network.modules() if isinstance(m, nn.LayerNorm)), None)
    kinds = {"gelu": "GELU", "gelu_tanh": "GELUTanh", "quick_gelu": "QuickGELU", "swiglu": "SiLU"}
    wrong = {
        "weights": {key: value.shape for key, value in weights.items()}
        != {key: value.shape for key, value in own.items()},
        "gate": getattr(block.mlp, "gate_last", False),
        "prefix in the pool": network.pool_include_prefix,
        "heads": config.backbone.num_heads != block.attn.num_heads,
        "activation": kinds[config.backbone.mlp] != type(block.mlp.act).__name__,
        "eps": norm is None or config.backbone.norm_eps != norm.eps,
        "pool": {"cls": "token", "mean": "avg", "map": "map"}[config.pool] != network.global_pool,
        "image": config.size != tuple(network.patch_embed.img_size),
        "prefix": config.prefix_positions != (0 if network.no_embed_class else network.num_prefix_tokens),
    }
    return ", ".join(name for name, is_wrong in wrong.items() if is_wrong)


@pytest.mark.slow
@pytest.mark.parametrize("size", ["tiny", "small", "base", "large", "[^tsbl]"])
def test_every_architecture_is_expressed_or_refused(size: str) -> None:
    """Of all names in timm, none becomes another network than timm's."""
    names = [name for kind in ("vit", "deit", "deit3") for name in timm.list_models(f"{kind}_*")]
    names = [name for name in names if re.match(f"(vit|deit3?)_{size}", name)]
    count = 0
    for name in names:
        with torch.device("meta"):
            network = timm.create_model(name)
        if isinstance(network, VisionTransformer) and type(network) is VisionTransformer:
            found = expressed(name, network)
            assert found == "" or found.startswith("refused: timm's"), f"{name}: {found}"
            count += found == ""
        else:
            with pytest.raises(TrunklineError, match=r"cannot be converted|lack"):
                timm_config_from({"architecture": name}, network.state_dict())
    assert count >= 2


@pytest.mark.parametrize(
    "name",
    ["vit_tiny_patch16_224", "vit_base_patch16_plus_240", "deit3_medium_patch16_224", "vit_base_patch16_siglip_512"],
)
def test_architectures_are_expressed(name: str) -> None:
    with torch.device("meta"):
        assert expressed(name, timm.create_model(name)) == ""


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"architecture": "vit_base_patch16_rope_224"}, "timm's vit_base_patch16_rope_224 cannot be converted"),
        ({"architecture": "vit_new_patch16_224"}, "timm's vit_new_patch16_224 cannot be converted"),
        ({"architecture": "vit_tiny_patch16_224", "global_pool": "max"}, "global_pool='max' cannot be converted"),
        (
            {"architecture": "vit_tiny_patch16_224", "global_pool": "avg"},
            "a class token and global_pool='avg' cannot be converted",
        ),
        (
            {"architecture": "vit_tiny_patch16_224", "model_args": {"act_layer": "mish"}},
            "act_layer=mish cannot be converted",
        ),
        (
            {"architecture": "vit_tiny_patch16_224", "model_args": {"norm_layer": "rmsnorm"}},
            "vit_tiny_patch16_224 with norm_layer=rmsnorm cannot be converted",
        ),
        (
            {"architecture": "vit_tiny_patch16_224", "model_args": {"pool_include_prefix": True}},
            "pool_include_prefix=True cannot be converted",
        ),
        ({"architecture": "resnet50"}, r"a kind that cannot be converted \(resnet50\)"),
    ],
)
def test_what_we_have_not(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    peer, options = make_peer("cls")
    write(peer, options, tmp_path)
    with pytest.raises(TrunklineError, match=message):
        ViT.from_pretrained(tmp_path, config=config)
    assert HEADS_OF_TIMM["tiny"] == 3


def test_weights_of_another_network(tmp_path: Path) -> None:
    save_file({"conv1.weight": torch.zeros(3, 3)}, tmp_path / "model.safetensors")
    with pytest.raises(TrunklineError, match=r"the weights of timm's vit_tiny_patch16_224 lack 'patch_embed\.proj"):
        ViT.from_pretrained(tmp_path / "model.safetensors", config={"architecture": "vit_tiny_patch16_224"})


def test_pooling_with_and_without_biases(tmp_path: Path) -> None:
    trunk = TransformerConfig(dim=32, depth=1, num_heads=4, norm_eps=1e-6, qkv_bias=False)
    config = ViTConfig(24, 8, pool="map", backbone=trunk)
    with pytest.raises(TrunklineError, match="pool=map and qkv_bias=False cannot become a Vision Transformer of timm"):
        save_foreign(ViT(config), tmp_path, "timm")
