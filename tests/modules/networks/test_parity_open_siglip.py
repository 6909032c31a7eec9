"""SigLIPs of open_clip, with an image tower of timm, become a CLIP and go back, bit for bit."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from open_clip.model import CustomTextCLIP
from parity import assert_near, randomise
from safetensors.torch import save_file
from test_clip import two_towers
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from travels import assert_same_bits

from trunkline import TrunklineError
from trunkline.modules.networks import CLIP
from trunkline.modules.networks.convert import open_clip_siglip
from trunkline.modules.networks.convert.families import foreign_family, save_foreign, to_foreign
from trunkline.modules.networks.convert.family import Library
from trunkline.modules.networks.convert.open_clip_siglip import named_towers, siglip_config_from
from trunkline.modules.networks.weights import unfilled

TOWERS = {  # names like those of timm; the second leaves pixels out, and has the other activation
    "vit_base_patch8_siglip_32": {"patch_size": 8, "embed_dim": 48, "num_heads": 12, "depth": 2, "mlp_ratio": 2.0},
    "vit_giantopt_patch14_siglip_32": {
        **{"patch_size": 14, "embed_dim": 64, "num_heads": 16, "depth": 2, "mlp_ratio": 1.7},
        "act_layer": "gelu_tanh",
    },
}
TEXT: dict[str, Any] = {
    **{"context_length": 9, "vocab_size": 50, "width": 32, "heads": 4, "layers": 2},
    **{"no_causal_mask": True, "proj_bias": True, "pool_type": "last", "norm_kwargs": {"eps": 1e-6}},
    "hf_tokenizer_name": "timm/ViT-B-16-SigLIP",
    "tokenizer_kwargs": {"clean": "canonicalize"},
}
SIGLIP2 = {"hf_tokenizer_name": "timm/ViT-B-16-SigLIP2", "act_kwargs": {"approximate": "tanh"}, "mlp_ratio": 3.7362}


def model_config(name: str, **text: Any) -> dict[str, Any]:
    vision = {"image_size": 32, "timm_model_name": name, "timm_pool": "map", "timm_proj": "none"}
    return {
        "embed_dim": TOWERS[name]["embed_dim"],
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": vision | {"timm_model_pretrained": False},
        "text_cfg": {**TEXT, **text},
    }


CONFIGS = {
    "siglip": model_config("vit_base_patch8_siglip_32"),
    "siglip2": model_config("vit_giantopt_patch14_siglip_32", **SIGLIP2),
}
PADDING = {"siglip": 1, "siglip2": 0}


@pytest.fixture(autouse=True)
def tiny_towers(monkeypatch: pytest.MonkeyPatch) -> None:
    """timm, and our list of its names, have the tiny architectures."""

    def build(name: str) -> Any:
        options = {"class_token": False, "global_pool": "map", "img_size": 32, "num_classes": 0, **TOWERS[name]}
        return lambda pretrained=False, **given: VisionTransformer(
            **{**options, **{key: given[key] for key in ("num_classes", "global_pool") if key in given}}
        )

    for name in TOWERS:
        monkeypatch.setitem(timm.models._registry._model_entrypoints, name, build(name))
    monkeypatch.setattr(open_clip_siglip, "SIGLIP_SIZES", {"base": (48, 2, 96), "giantopt": (64, 2, 108)})
    monkeypatch.setattr(open_clip_siglip, "SIGLIP_IMAGES", {("base", 8): (32,), ("giantopt", 14): (32,)})


@torch.random.fork_rng()
def make_peer(config: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    options = {key: value for key, value in config.items() if key != "custom_text"}
    return randomise(CustomTextCLIP(**json.loads(json.dumps(options))).eval(), 0.1)


def write(peer: Any, config: dict[str, Any], folder: Path) -> None:
    """As open_clip writes a folder for the hub."""
    folder.mkdir(exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    save_file(peer.state_dict(), folder / "open_clip_model.safetensors")


def pairs(clip: CLIP) -> tuple[Tensor, Tensor, Tensor]:
    """Three images; three texts that are filled up as open_clip's tokenizer does, and what of them is text."""
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(3, 3, 32, 32, generator=generator)
    tokens = torch.randint(3, 50, (3, 9), generator=generator)
    mask = torch.arange(9) < torch.tensor([[4], [9], [6]])
    assert clip.config.text_padding is not None
    return image, tokens.where(mask, clip.config.text_padding), mask


@torch.no_grad()
def assert_same_results(peer: Any, clip: CLIP) -> None:
    image, tokens, mask = pairs(clip)
    want = peer.encode_image(image, normalize=True), peer.encode_text(tokens, normalize=True)
    found = clip(image, tokens, mask)
    assert_near(found.image, want[0])
    assert_near(found.text, want[1])
    assert_near(clip.encode_text(tokens.masked_fill(~mask, 7), mask), want[1])  # whatever is hidden
    assert_near(clip.encode_text(tokens[:1, :4]), want[1][:1])  # our texts are as long as they are
    logits = peer.logit_scale.exp() * want[0] @ want[1].T + peer.logit_bias
    assert_near(clip.scale(found.image @ found.text.T), logits)


@pytest.mark.parametrize("name", CONFIGS)
def test_there_and_back_again(name: str, tmp_path: Path) -> None:
    peer = make_peer(CONFIGS[name])
    write(peer, CONFIGS[name], tmp_path / "theirs")
    clip = CLIP.from_pretrained(tmp_path / "theirs").eval()
    assert clip.config.text_padding == PADDING[name]
    assert_same_results(peer, clip)
    save_foreign(clip, tmp_path / "back", "open_clip")
    assert_same_bits(*(tmp_path / side / "open_clip_model.safetensors" for side in ("theirs", "back")))
    again = open_clip.create_model(f"local-dir:{tmp_path / 'back'}").eval()
    assert_same_results(again, clip)
    assert CLIP.from_pretrained(tmp_path / "back").config == clip.config


def test_gradients(tmp_path: Path) -> None:
    config = CONFIGS["siglip2"]
    peer = make_peer(config)
    write(peer, config, tmp_path)
    clip = CLIP.from_pretrained(tmp_path).eval()
    image, tokens, mask = pairs(clip)
    signs = 2 * torch.eye(3) - 1
    images, texts = peer.encode_image(image, normalize=True), peer.encode_text(tokens, normalize=True)
    (-F.logsigmoid(signs * (peer.logit_scale.exp() * images @ texts.T + peer.logit_bias)).sum()).backward()
    found = clip(image, tokens, mask)
    (-F.logsigmoid(signs * clip.scale(found.image @ found.text.T)).sum()).backward()
    save_file({key: p.grad for key, p in peer.named_parameters()}, tmp_path / "open_clip_model.safetensors")
    want = CLIP.from_pretrained(tmp_path).state_dict()
    for key, p in clip.named_parameters():
        assert p.grad is not None
        assert_near(p.grad, want[key], 1e-4)


def test_from_open_clip_to_transformers(tmp_path: Path) -> None:
    """The same network goes to both libraries."""
    peer = make_peer(CONFIGS["siglip"])
    write(peer, CONFIGS["siglip"], tmp_path / "theirs")
    clip = CLIP.from_pretrained(tmp_path / "theirs").eval()
    save_foreign(clip, tmp_path / "hf", "transformers")
    other = transformers.AutoModel.from_pretrained(tmp_path / "hf").eval()
    image, tokens, _ = pairs(clip)
    with torch.no_grad():
        found = other(input_ids=tokens, pixel_values=image)
        assert_near(found.image_embeds, peer.encode_image(image, normalize=True))
        assert_near(found.text_embeds, peer.encode_text(tokens, normalize=True))
    again = CLIP.from_pretrained(tmp_path / "hf")
    save_foreign(again, tmp_path / "back", "open_clip")
    assert_same_bits(*(tmp_path / side / "open_clip_model.safetensors" for side in ("theirs", "back")))


@pytest.mark.parametrize("library", ["open_clip", "transformers"])
def test_texts_are_filled_up_with_the_token_that_the_network_has_seen(library: Library, tmp_path: Path) -> None:
    """SigLIP's is the end of a text, although its tokenizer has a token for padding."""
    write(make_peer(CONFIGS["siglip"]), CONFIGS["siglip"], tmp_path / "theirs")
    known = {"<pad>": 0, "</s>": 1, "<unk>": 2, "red": 3, "apple": 4}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(known, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.add_special_tokens(["<pad>", "</s>", "<unk>"])
    words.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    words.save(str(tmp_path / "theirs/tokenizer.json"))
    clip = CLIP.from_pretrained(tmp_path / "theirs").eval()
    folder = tmp_path / "back"
    save_foreign(clip, folder, library)
    if library == "open_clip":
        numbers = open_clip.get_tokenizer(f"local-dir:{folder}")(["red apple"])
    else:
        reader = transformers.AutoTokenizer.from_pretrained(folder)
        numbers = reader(["red apple"], padding="max_length", return_tensors="pt").input_ids
    assert numbers.tolist() == [[3, 4, 1, 1, 1, 1, 1, 1, 1]]
    assert CLIP.from_pretrained(folder).config.text_padding == 1


@pytest.mark.parametrize(
    ("part", "options", "message"),
    [
        ("vision_cfg", {"timm_proj": "mlp"}, "a SigLIP of open_clip with timm_proj=mlp cannot"),
        ("vision_cfg", {"timm_model_name": "vit_pe_core_base_patch16_224"}, "vit_pe_core_base_patch16_224 cannot"),
        ("vision_cfg", {"timm_pool": "avg"}, "a CLIP of open_clip with timm_model_name=vit_base_patch8"),
        ("text_cfg", {"hf_model_name": "roberta-base"}, "hf_model_name=roberta-base cannot"),
        ("text_cfg", {"no_causal_mask": False}, "no_causal_mask=False cannot"),
        ("text_cfg", {"pool_type": "first"}, "pool_type=first cannot"),
        ("text_cfg", {"use_pad_mask": True}, "with use_pad_mask=True in text_cfg cannot"),
        ("text_cfg", {"width": 40}, r"'text\.body\.token_embed\.weight' is \(50, 32\) there and \(50, 40\) here"),
        ("vision_cfg", {"image_size": 64}, r"'image\.pos_embed' is \(1, 16, 48\) there and \(1, 64, 48\) here"),
    ],
)
def test_options_that_we_have_not(part: str, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    config = CONFIGS["siglip"]
    write(make_peer(config), {**config, part: {**config[part], **options}}, tmp_path)
    with pytest.raises(TrunklineError, match=message):
        CLIP.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size": 4}, "patch_size=4, dim=48, depth=2 cannot become a SigLIP of open_clip, which has only"),
        ({"mlp": "gelu_tanh"}, r"image tower of a CLIP with backbone\.mlp=gelu_tanh cannot become a SigLIP of"),
    ],
)
def test_a_tower_without_a_name(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    write(make_peer(CONFIGS["siglip"]), CONFIGS["siglip"], tmp_path)
    config = CLIP.from_pretrained(tmp_path).config
    own = {key: value for key, value in changes.items() if key != "mlp"}
    trunk = replace(config.image.backbone, **{key: value for key, value in changes.items() if key == "mlp"})
    clip = CLIP(replace(config, image=replace(config.image, backbone=trunk, **own)))
    with pytest.raises(TrunklineError, match=message):
        save_foreign(clip, tmp_path / "back", "open_clip")
    with pytest.raises(TrunklineError, match="text_padding=None cannot become a SigLIP of open_clip"):
        save_foreign(CLIP(two_towers()), tmp_path / "back", "open_clip")


@pytest.mark.parametrize("pattern", ["ViT-B-32-SigLIP2", pytest.param("ViT-.*SigLIP", marks=pytest.mark.slow)])
def test_published_models(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All SigLIPs of open_clip, without memory: heads, activation and sizes are those of its own networks, and back."""
    monkeypatch.undo()
    names = [name for name in open_clip.list_models() if re.match(pattern, name)]
    assert len(names) >= (26 if "*" in pattern else 1)
    towers = named_towers()
    built: dict[str, Any] = {}
    texts, count = [], 0
    for name in names:
        config = open_clip.get_model_config(name)
        tower = config["vision_cfg"]["timm_model_name"]
        if tower not in built:
            with torch.device("meta"):
                built[tower] = timm.create_model(tower, num_classes=0)
        vision = built[tower]
        shapes = {f"visual.trunk.{key}": value for key, value in vision.state_dict().items()}
        assert foreign_family(config, name).name == "a SigLIP of open_clip"
        if "proj_type" in config["text_cfg"]:  # one of them has no projection of texts
            with pytest.raises(TrunklineError, match="proj_type=none cannot be converted"):
                siglip_config_from(config, shapes)
            continue
        own = siglip_config_from(config, shapes)
        assert own.image == towers[tower]
        block = vision.blocks[0]
        assert own.image.backbone.num_heads == block.attn.num_heads == vision.attn_pool.num_heads
        assert own.image.backbone.mlp == {"GELU": "gelu", "GELUTanh": "gelu_tanh"}[type(block.mlp.act).__name__]
        assert own.image.backbone.norm_eps == block.norm1.eps
        assert own.image.size == vision.patch_embed.img_size
        assert own.text_padding == (0 if "SigLIP2" in name else 1)
        count += 1
        if config["text_cfg"] in texts:
            continue
        texts.append(config["text_cfg"])
        with torch.device("meta"):
            options = {key: value for key, value in config["text_cfg"].items() if "tokenizer" not in key}
            text = open_clip.model._build_text_tower(config["embed_dim"], open_clip.model.CLIPTextCfg(**options))
        want = shapes | {f"text.{key}": value for key, value in text.state_dict().items()}
        family, content, weights = to_foreign(unfilled(CLIP, own), "open_clip")
        assert family.name == "a SigLIP of open_clip"
        assert content["model_cfg"]["vision_cfg"]["timm_model_name"] == tower
        found = {key: value.shape for key, value in weights.items() if not key.startswith("logit_")}
        assert found == {key: value.shape for key, value in want.items()}
    assert count == len(names) - ("*" in pattern)
