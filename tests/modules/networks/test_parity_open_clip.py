"""Models of open_clip with Vision Transformers become a CLIP and go back, bit for bit."""

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip.model import CLIP as TheirCLIP
from open_clip.model import CustomTextCLIP
from parity import assert_near, randomise
from safetensors.torch import load_file, save_file
from test_clip import two_towers
from torch import Tensor
from travels import assert_same_bits

from trunkline import TrunklineError
from trunkline.modules.networks import CLIP
from trunkline.modules.networks.convert.families import save_foreign
from trunkline.modules.networks.convert.open_clip_vit import open_clip_config_from

SIZES: dict[str, Any] = {
    "embed_dim": 20,
    "vision_cfg": {"image_size": 16, "layers": 2, "width": 48, "head_width": 12, "patch_size": 8},
    "text_cfg": {"context_length": 9, "vocab_size": 50, "width": 32, "heads": 4, "layers": 2},
}
SCALED: dict[str, Any] = {
    **SIZES,
    "init_logit_bias": -8.0,
    "vision_cfg": {**SIZES["vision_cfg"], "ls_init_value": 0.3, "mlp_ratio": 2.0, "norm_kwargs": {"eps": 1e-3}},
    "text_cfg": {**SIZES["text_cfg"], "ls_init_value": 0.5, "norm_kwargs": {"eps": 1e-3}},
}
PEERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "usual": (TheirCLIP, SIZES),
    "quick_gelu": (TheirCLIP, {**SIZES, "quick_gelu": True}),
    "scaled": (TheirCLIP, SCALED),
    "tanh": (  # wide images, widths that no simple ratio gives, and an end token in the middle of the vocabulary
        TheirCLIP,
        {
            **SIZES,
            "vision_cfg": {
                **SIZES["vision_cfg"],
                **{"image_size": [16, 24], "mlp_ratio": 1.17, "act_kwargs": {"approximate": "tanh"}, "no_ln_pre": True},
                "final_ln_after_pool": True,
            },
            "text_cfg": {**SIZES["text_cfg"], "pool_type": "eos", "eos_id": 20, "act_kwargs": {"approximate": "tanh"}},
        },
    ),
    "custom_text": (CustomTextCLIP, {**SIZES, "custom_text": True}),
}


@torch.random.fork_rng()
def make_peer(name: str) -> Any:
    torch.manual_seed(0)
    model, config = PEERS[name]
    options = {key: value for key, value in config.items() if key != "custom_text"}
    return randomise(model(**options).eval(), 0.1)


def write(peer: Any, config: dict[str, Any], folder: Path, pickled: bool = False) -> None:
    """As open_clip writes a folder for the hub."""
    folder.mkdir(exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    if pickled:
        torch.save(peer.state_dict(), folder / "open_clip_pytorch_model.bin")
    else:
        save_file(peer.state_dict(), folder / "open_clip_model.safetensors")


def pairs(clip: CLIP) -> tuple[Tensor, Tensor, Tensor]:
    """Three images, and three texts that are padded with 0, with their mask."""
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(3, 3, *clip.config.image.size, generator=generator)
    tokens = torch.randint(21, 48, (3, 9), generator=generator)
    lengths = torch.tensor([[4], [9], [6]])
    assert clip.config.end_token is not None
    tokens.scatter_(1, lengths - 1, clip.config.end_token)
    mask = torch.arange(9) < lengths
    return image, tokens.where(mask, 0), mask


@torch.no_grad()
def assert_same_results(peer: Any, clip: CLIP) -> None:
    image, tokens, mask = pairs(clip)
    found = clip(image, tokens, mask)
    want = peer.encode_image(image, normalize=True), peer.encode_text(tokens, normalize=True)
    assert_near(found.image, want[0])
    assert_near(found.text, want[1])
    assert_near(clip.encode_text(tokens), want[1])  # a text ends at its end token, whatever is hidden after it
    logits = peer.logit_scale.exp() * want[0] @ want[1].T
    bias = getattr(peer, "logit_bias", None)
    assert_near(clip.scale(found.image @ found.text.T), logits if bias is None else logits + bias)


@pytest.mark.parametrize("name", PEERS)
def test_there_and_back_again(name: str, tmp_path: Path) -> None:
    peer = make_peer(name)
    write(peer, PEERS[name][1], tmp_path / "theirs", pickled=name == "quick_gelu")
    clip = CLIP.from_pretrained(tmp_path / "theirs").eval()
    assert_same_results(peer, clip)
    save_foreign(clip, tmp_path / "back", "open_clip")
    if name in ("usual", "scaled", "tanh"):
        assert_same_bits(*(tmp_path / side / "open_clip_model.safetensors" for side in ("theirs", "back")))
    written = load_file(tmp_path / "back/open_clip_model.safetensors")
    assert written.keys() == {key.removeprefix("text.") for key in peer.state_dict()}
    assert all(torch.equal(written[key.removeprefix("text.")], value) for key, value in peer.state_dict().items())
    again = open_clip.create_model(f"local-dir:{tmp_path / 'back'}").eval()
    assert_same_results(again, clip)


def test_gradients(tmp_path: Path) -> None:
    peer = make_peer("usual")
    write(peer, SIZES, tmp_path)
    clip = CLIP.from_pretrained(tmp_path).eval()
    image, tokens, mask = pairs(clip)
    labels = torch.arange(3)
    images, texts = peer.encode_image(image, normalize=True), peer.encode_text(tokens, normalize=True)
    F.cross_entropy(peer.logit_scale.exp() * images @ texts.T, labels).backward()
    found = clip(image, tokens, mask)
    F.cross_entropy(clip.scale(found.image @ found.text.T), labels).backward()
    save_file({key: p.grad for key, p in peer.named_parameters()}, tmp_path / "open_clip_model.safetensors")
    want = CLIP.from_pretrained(tmp_path).state_dict()
    for key, p in clip.named_parameters():
        assert p.grad is not None
        assert_near(p.grad, want[key], 1e-4)


def changed(part: str, **options: Any) -> dict[str, Any]:
    return {**SIZES, part: {**SIZES[part], **options}}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (changed("vision_cfg", timm_model_name="vit_base"), "a CLIP of open_clip with timm_model_name=vit_base cannot"),
        (changed("vision_cfg", layers=[3, 4, 6, 3]), "with a ResNet"),
        (changed("vision_cfg", pool_type="avg"), "pool_type=avg cannot"),
        (changed("vision_cfg", act_kwargs={"inplace": True}), r"act_kwargs=\{'inplace': True\} cannot"),
        ({**changed("text_cfg", act_kwargs={"approximate": "tanh"}), "quick_gelu": True}, "cannot have quick_gelu"),
        (changed("vision_cfg", rope=1), "with rope=1 in vision_cfg cannot be converted"),
        ({**SIZES, "nonscalar_logit_scale": True}, "with nonscalar_logit_scale=True in model_cfg cannot"),
        (changed("text_cfg", hf_model_name="roberta-base"), "hf_model_name=roberta-base cannot"),
        (changed("text_cfg", no_causal_mask=True), "no_causal_mask=True cannot"),
        ({**SIZES, "multimodal_cfg": {}}, "with a text decoder"),
    ],
)
def test_options_that_we_have_not(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    write(make_peer("usual"), config, tmp_path)
    with pytest.raises(TrunklineError, match=message):
        CLIP.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"end_token": 98}, "the image tower of a CLIP with pool=mean cannot become a CLIP of open_clip"),
        ({}, "end_token=None cannot become a CLIP of open_clip.*; set end_token in its configuration"),
    ],
)
def test_a_network_that_no_other_can_be(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(TrunklineError, match=message):
        save_foreign(CLIP(two_towers(**changes)), tmp_path, "open_clip")


@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-B-32-quickgelu", "ViT-L-14", "ViT-H-14"])
def test_published_configurations_are_expressed(name: str) -> None:
    """Sizes of the published models, compared with open_clip's own networks without memory."""
    config = open_clip.get_model_config(name)
    with torch.device("meta"):
        peer = TheirCLIP(**config)
        ours = CLIP(open_clip_config_from(config))
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in peer.parameters())
    assert ours.config.image.backbone.num_heads == peer.visual.transformer.resblocks[0].attn.num_heads


def test_every_model_of_open_clip_is_expressed_or_refused() -> None:
    """All with a Vision Transformer and a text tower of open_clip's own, but those that average over patches.

    Those with an image tower of timm are in test_parity_open_siglip.
    """
    expressed, reasons = set(), set()
    for name in open_clip.list_models():
        try:
            open_clip_config_from(open_clip.get_model_config(name))
            expressed.add(name)
        except TrunklineError as error:
            reasons.add(next(reason for reason in REASONS if reason in str(error)))
    own = {name for name in open_clip.list_models() if name.startswith("ViT-")}
    assert expressed == {name for name in own if "SigLIP" not in name and "CLIPA" not in name}
    assert len(expressed) >= 39
    assert reasons == set(REASONS)


REASONS = ("timm_model_name=", "hf_model_name=", "pool_type=avg", "with a ResNet", "with a text decoder")
