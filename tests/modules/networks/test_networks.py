"""One contract for every network, saving and loading, and the ViT's own promises."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trunkline import TrunklineError
from trunkline.modules.backbone import Transformer, TransformerConfig
from trunkline.modules.networks import (
    AST,
    BERT,
    GPT,
    ASTConfig,
    BERTConfig,
    EncoderDecoder,
    EncoderDecoderConfig,
    GPTConfig,
    Network,
    SpeechEncoder,
    SpeechEncoderConfig,
    ViT,
    ViTConfig,
    Whisper,
    WhisperConfig,
)
from trunkline.modules.networks.conditional import ConditionalNetwork
from trunkline.modules.networks.patches import sincos_positions_2d


def vit(trunk: dict[str, Any] | None = None, **changes: Any) -> ViTConfig:
    backbone = TransformerConfig(**{"dim": 32, "depth": 2, "num_heads": 4, **(trunk or {})})
    return ViTConfig(**{"image_size": 16, "patch_size": 4, "num_classes": 6, "backbone": backbone, **changes})


def gpt(trunk: dict[str, Any] | None = None, **changes: Any) -> GPTConfig:
    backbone = TransformerConfig(**{"dim": 32, "depth": 2, "num_heads": 4, **(trunk or {})})
    return GPTConfig(**{"vocab_size": 19, "max_length": 9, "backbone": backbone, **changes})


def bert(trunk: dict[str, Any] | None = None, **changes: Any) -> BERTConfig:
    post_norm = {"dim": 32, "depth": 2, "num_heads": 4, "norm_first": False, "final_norm": False}
    backbone = TransformerConfig(**{**post_norm, **(trunk or {})})
    return BERTConfig(**{"vocab_size": 19, "max_length": 9, "backbone": backbone, **changes})


def pair(trunk: dict[str, Any] | None = None, **changes: Any) -> EncoderDecoderConfig:
    both = TransformerConfig(**{"dim": 32, "depth": 2, "num_heads": 4, **(trunk or {})})
    return EncoderDecoderConfig(**{"vocab_size": 19, "max_length": 9, "encoder": both, "decoder": both, **changes})


def speech(trunk: dict[str, Any] | None = None, **changes: Any) -> SpeechEncoderConfig:
    backbone = TransformerConfig(**{"dim": 32, "depth": 2, "num_heads": 4, **(trunk or {})})
    return SpeechEncoderConfig(**{"vocab_size": 18, "num_mels": 8, "max_frames": 24, "backbone": backbone, **changes})


def spectrogram(trunk: dict[str, Any] | None = None, **changes: Any) -> ASTConfig:
    backbone = TransformerConfig(**{"dim": 32, "depth": 2, "num_heads": 4, **(trunk or {})})
    sizes = {"num_mels": 10, "max_frames": 24, "patch_size": 4, "stride": 3, "num_classes": 6}
    return ASTConfig(**{**sizes, "backbone": backbone, **changes})


def whisper(trunk: dict[str, Any] | None = None, **changes: Any) -> WhisperConfig:
    both = TransformerConfig(**{"dim": 32, "depth": 2, "num_heads": 4, **(trunk or {})})
    sizes = {"vocab_size": 19, "num_mels": 8, "max_frames": 24, "max_target_length": 9}
    return WhisperConfig(**{**sizes, "encoder": both, "decoder": both, **changes})


POST_NORM = {"norm_first": False, "final_norm": False, "mlp": "relu"}
T5 = {"norm": "rmsnorm", "bias": False, "mlp": "geglu", "head_dim": 6, "attn_scale": 1.0}
NETWORKS: dict[str, tuple[type[Network], Any, list[int], list[int]]] = {  # class, config, shapes of input and output
    "vit-cls": (ViT, vit(), [2, 3, 16, 16], [2, 6]),
    "vit-mean": (ViT, vit(pool="mean"), [2, 3, 16, 16], [2, 6]),
    "vit-map": (ViT, vit(pool="map"), [2, 3, 16, 16], [2, 6]),
    "vit-registers": (ViT, vit(num_registers=3), [2, 3, 16, 16], [2, 6]),
    "vit-mean-registers": (ViT, vit(pool="mean", num_registers=2), [2, 3, 16, 16], [2, 6]),
    "vit-sincos2d": (ViT, vit(positions="sincos2d"), [2, 3, 16, 16], [2, 6]),
    "vit-rotary": (ViT, vit({"rope_theta": 100.0}, positions="none"), [2, 3, 16, 16], [2, 6]),
    "vit-grey-wide": (ViT, vit(in_chans=1, image_size=(8, 20)), [2, 1, 8, 20], [2, 6]),
    "vit-5-channels": (ViT, vit(in_chans=5, positions="sincos2d", image_size=(20, 8)), [2, 5, 20, 8], [2, 6]),
    "vit-dinov2": (
        ViT,
        vit({"layer_scale": 0.5}, pool="cls_mean", num_registers=2, prefix_positions=1, fc_norm=True),
        [2, 3, 16, 16],
        [2, 6],
    ),
    "vit-pooler": (ViT, vit(num_classes=0, pooler=True, prefix_positions=1), [2, 3, 16, 16], [2, 32]),
    "vit-features": (ViT, vit(num_classes=0), [2, 3, 16, 16], [2, 32]),
    "vit-modern": (
        ViT,
        vit({"mlp": "swiglu", "norm": "rmsnorm", "num_kv_heads": 2, "qk_norm": True, "bias": False}, pool="map"),
        [2, 3, 16, 16],
        [2, 6],
    ),
    "gpt-2": (GPT, gpt({"mlp": "gelu_tanh"}), [2, 9], [2, 9, 19]),
    "gpt-free-head": (GPT, gpt(tie_embeddings=False), [2, 7], [2, 7, 19]),
    "gpt-window": (GPT, gpt({"num_kv_heads": 2, "window": 3}), [2, 9], [2, 9, 19]),
    "gpt-modern": (
        GPT,
        gpt(
            {"mlp": "relu2", "norm": "rmsnorm", "num_kv_heads": 2, "qk_norm": True, "bias": False, "rope_theta": 1e4},
            positions="none",
        ),
        [2, 9],
        [2, 9, 19],
    ),
    "bert": (BERT, bert(), [2, 9], [2, 9, 19]),
    "bert-modern": (
        BERT,
        bert(
            {"norm_first": True, "final_norm": True, "norm": "rmsnorm", "mlp": "swiglu", "rope_theta": 1e4},
            positions="none",
            num_segments=0,
        ),
        [2, 7],
        [2, 7, 19],
    ),
    "transformer-2017": (EncoderDecoder, pair(POST_NORM, scale_embeddings=True), [2, 9], [2, 5, 19]),
    "t5": (EncoderDecoder, pair(T5, positions="relative", scale_output=True), [2, 9], [2, 5, 19]),
    "bart": (
        EncoderDecoder,
        pair(POST_NORM, positions="learned", embed_norm=True, output_bias=True),
        [2, 9],
        [2, 5, 19],
    ),
    "marian-tables": (EncoderDecoder, pair(POST_NORM, positions="fixed", scale_embeddings=True), [2, 9], [2, 5, 19]),
    "two-vocabularies": (
        EncoderDecoder,
        pair({"rope_theta": 1e4}, positions="none", target_vocab_size=23, tie_embeddings=False, vocab_size=27),
        [2, 9],
        [2, 5, 23],
    ),
    "speech-conv": (SpeechEncoder, speech(), [2, 21, 8], [2, 6, 19]),
    "speech-modern": (
        SpeechEncoder,
        speech(
            {"mlp": "relu2", "norm": "rmsnorm", "num_kv_heads": 2, "qk_norm": True, "bias": False, "rope_theta": 1e4},
            positions="none",
            conv_dim=24,
        ),
        [2, 24, 8],
        [2, 6, 19],
    ),
    "speech-patches": (SpeechEncoder, speech(front="patches", positions="learned"), [2, 21, 8], [2, 6, 19]),
    "ast": (AST, spectrogram(), [2, 24, 10], [2, 6]),
    "ast-shorter": (AST, spectrogram(pool="cls", stride=(4, 2)), [2, 17, 10], [2, 6]),
    "ast-positions": (AST, spectrogram(prefix_positions=1), [2, 24, 10], [2, 6]),
    "ast-modern": (
        AST,
        spectrogram(
            {"mlp": "swiglu", "norm": "rmsnorm", "num_kv_heads": 2, "qk_norm": True, "bias": False},
            pool="mean",
            head_norm=False,
        ),
        [2, 24, 10],
        [2, 6],
    ),
    "whisper": (Whisper, whisper(), [2, 21, 8], [2, 5, 19]),
    "whisper-table": (Whisper, whisper(positions="fixed"), [2, 21, 8], [2, 5, 19]),
    "whisper-modern": (
        Whisper,
        whisper(
            {"mlp": "swiglu", "norm": "rmsnorm", "num_kv_heads": 2, "qk_norm": True, "bias": False, "rope_theta": 1e4},
            **{"positions": "none", "target_positions": "none", "tie_embeddings": False},
        ),
        [2, 24, 8],
        [2, 5, 19],
    ),
}
every_network = pytest.mark.parametrize("name", NETWORKS)


def randomise(network: nn.Module) -> Any:
    """Away from the start, where heads are zero and branches nearly so."""
    with torch.no_grad():
        for p in network.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    return network


def build(name: str) -> tuple[Any, Tensor]:
    network_class, config, shape, _ = NETWORKS[name]
    tokens = len(shape) == 2
    return randomise(network_class(config)), torch.randint(0, 19, shape) if tokens else torch.randn(shape)


def build_with_inputs(name: str) -> tuple[Any, list[Tensor]]:
    """A network and its inputs: an encoder-decoder needs targets too."""
    network, x = build(name)
    return network, [x, torch.randint(0, 19, (2, 5))] if isinstance(network, ConditionalNetwork) else [x]


def loss_of(out: Tensor) -> Tensor:
    return (out * torch.linspace(-1, 1, out.numel()).reshape(out.shape)).sum()


def gradients_of(network: nn.Module, inputs: list[Tensor]) -> dict[str, Tensor]:
    network.zero_grad()
    loss_of(network(*inputs)).backward()
    return {name: p.grad for name, p in network.named_parameters() if p.grad is not None}


def assert_near(got: Tensor, want: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def assert_same_weights(one: nn.Module, other: nn.Module) -> None:
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


# --- the contract ---


@every_network
def test_shape_and_every_parameter_learns(name: str) -> None:
    network, inputs = build_with_inputs(name)
    out = network(*inputs)
    assert list(out.shape) == NETWORKS[name][3]
    assert out.isfinite().all()
    gradients = gradients_of(network, inputs)
    for key, p in network.named_parameters():
        assert gradients[key].isfinite().all(), key
        assert gradients[key].abs().max() > 1e-5, key
        assert p.requires_grad


@every_network
def test_samples_of_a_batch_do_not_meet(name: str) -> None:
    network, inputs = build_with_inputs(name)
    out = network(*inputs)
    assert_near(network(*(x[1:] for x in inputs)), out[1:])
    assert (out[0] - out[1]).abs().max() > 1e-3


@every_network
def test_checkpointing_gives_the_same_gradients(name: str) -> None:
    network, inputs = build_with_inputs(name)
    want = gradients_of(network, inputs)
    begun: list[int] = []
    trunks = [m for m in network.modules() if isinstance(m, Transformer)]
    for trunk in trunks:
        trunk.config = replace(trunk.config, activation_checkpointing=True)
        trunk.blocks[0].register_forward_pre_hook(lambda *_: begun.append(1))
    got = gradients_of(network, inputs)
    assert len(begun) == 2 * len(trunks)
    assert got.keys() == want.keys()
    assert all(torch.equal(got[key], want[key]) for key in want)


@pytest.mark.parametrize("name", [name for name in NETWORKS if name.startswith(("gpt", "bert"))])
def test_attention_path_of_text(name: str) -> None:
    network, x = build(name)
    out = network.forward_features(x, return_attention=True)
    assert_near(network.head(network.masked_head(out.x) if "bert" in name else out.x), network(x))
    assert network.forward_features(x).attention is None
    tokens = x.shape[1]
    assert [layer.shape for layer in out.attention] == [(2, 4, tokens, tokens)] * 2
    assert_near(torch.stack(out.attention).sum(-1), torch.ones(2, 2, 4, tokens))
    future = torch.stack(out.attention).triu(1).abs().max()
    assert future > 0 if "bert" in name else future == 0


@pytest.mark.parametrize("name", [name for name in NETWORKS if name.startswith(("vit", "ast"))])
def test_attention_path(name: str) -> None:
    network, x = build(name)
    features = network.forward_features(x, return_attention=True)
    assert_near(network.forward_head(features), network(x))
    assert network.forward_features(x).attention is None
    tokens = features.prefix.shape[1] + features.patches.shape[1]
    assert [layer.shape for layer in features.attention] == [(2, 4, tokens, tokens)] * 2
    assert_near(torch.stack(features.attention).sum(-1), torch.ones(2, 2, 4, tokens))


@every_network
def test_compile_keeps_the_state_dict(name: str) -> None:
    network, _ = build(name)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    network.compile()
    assert list(before) == list(network.state_dict())
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


@every_network
def test_bfloat16(name: str) -> None:
    network, inputs = build_with_inputs(name)
    want = network(*inputs)
    got = network.bfloat16()(*(x.bfloat16() if x.is_floating_point() else x for x in inputs))
    assert got.dtype == torch.bfloat16
    assert ((got.float() - want).norm() / want.norm()).item() < 0.05


@every_network
def test_save_and_load_is_bit_identical(name: str, tmp_path: Path) -> None:
    network, inputs = build_with_inputs(name)
    network.save_pretrained(tmp_path / "new" / "folder")
    assert {file.name for file in (tmp_path / "new" / "folder").iterdir()} == {
        "README.md",
        "config.json",
        "model.safetensors",
    }
    again = type(network).from_pretrained(tmp_path / "new" / "folder")
    assert again.config == network.config
    assert_same_weights(again, network)
    assert torch.equal(again.eval()(*inputs), network.eval()(*inputs))


# --- loading: what can go wrong ---


def edit_config(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(content | changes))

    return edit


def truncate(file: str) -> Callable[[Path], None]:
    def cut(folder: Path) -> None:
        content = (folder / file).read_bytes()
        (folder / file).write_bytes(content[: len(content) // 2])

    return cut


def test_config_file_is_plain(tmp_path: Path) -> None:
    ViT(vit(image_size=(8, 12))).save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    assert (content["network"], content["image_size"]) == ("ViT", [8, 12])
    assert content["backbone"]["dim"] == 32
    assert content["backbone"]["rope_theta"] is None


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), r"cannot load a ViT from .*config\.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), r"cannot load a ViT from .*model\.safetensors"),
        (truncate("model.safetensors"), "cannot load a ViT from"),
        (truncate("config.json"), "cannot load a ViT from"),
        (edit_config(network="GPT"), r"describes a GPT, not a ViT; load it with GPT\.from_pretrained"),
        (edit_config(patchsize=4), r"ViTConfig has no field 'patchsize'; did you mean 'patch_size'\?"),
        (
            edit_config(backbone={"num_head": 4}),
            r"TransformerConfig has no field 'num_head'; .* 'num_heads'\?",
        ),
        (edit_config(backbone={"zzz": 4}), r"TransformerConfig has no field 'zzz'$"),
        (edit_config(num_classes=7), r"cannot load a ViT from .*(?s:.)*head\.weight"),
        (edit_config(num_registers=2), r"cannot load a ViT from .*(?s:.)*reg_token"),
        (edit_config(patch_size=5), "patch_size=5 does not divide image_size=16x16"),
    ],
)
def test_damaged_folders(damage: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    ViT(vit()).save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(TrunklineError, match=message):
        ViT.from_pretrained(tmp_path)


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(TrunklineError, match="nowhere' is no folder; fix the path"):
        ViT.from_pretrained(tmp_path / "nowhere")


def test_hub_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = randomise(ViT(vit()))
    network.save_pretrained(tmp_path)

    def snapshot_download(repo: str, allow_patterns: list[str]) -> str:
        if repo != "someone/vit":
            raise ConnectionError("offline")
        assert {"config.json", "model.safetensors"} <= {*allow_patterns}
        assert not [name for name in allow_patterns if name.endswith(".bin")]  # the same weights again, as a pickle
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert_same_weights(ViT.from_pretrained("someone/vit"), network)
    with pytest.raises(TrunklineError, match=r"'someone/else' is no folder, and the hub .*: offline"):
        ViT.from_pretrained("someone/else")


# --- the ViT's own promises ---


def test_vit_starts_at_a_uniform_guess() -> None:
    assert (ViT(vit())(torch.randn(2, 3, 16, 16)) == 0).all()


@pytest.mark.parametrize(("pool", "registers", "prefix"), [("cls", 2, 3), ("cls", 0, 1), ("mean", 2, 2), ("map", 0, 0)])
def test_vit_pools_what_it_says(pool: Any, registers: int, prefix: int) -> None:
    network = randomise(ViT(vit(pool=pool, num_registers=registers)))
    features = network.forward_features(torch.randn(2, 3, 16, 16))
    assert features.prefix.shape == (2, prefix, 32)
    assert features.patches.shape == (2, 16, 32)
    assert network.num_prefix_tokens == prefix
    pooled = network.forward_head(features, pre_logits=True)
    if pool == "map":
        assert_near(pooled, network.attn_pool(features.patches))
    else:
        assert_near(pooled, features.prefix[:, 0] if pool == "cls" else features.patches.sum(1) / 16)
    want = pooled @ network.head.weight.T + network.head.bias
    assert_near(network.forward_head(features), want)
    assert network.output_modules() == ([network.attn_pool] if pool == "map" else []) + [network.head]


@pytest.mark.parametrize("positions", ["learned", "sincos2d", "none"])
@pytest.mark.parametrize("size", [24, (8, 20), 16])
def test_resize(positions: Any, size: int | tuple[int, int], tmp_path: Path) -> None:
    config = vit(positions=positions, image_size=(16, 16))
    network = randomise(ViT(config)).eval()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    network.resize(size)
    height, width = (size, size) if isinstance(size, int) else size
    grid = (height // 4, width // 4)
    fresh = ViT(replace(config, image_size=size)).eval()
    if positions == "learned":
        old = before["pos_embed"].reshape(4, 4, 32).permute(2, 0, 1)[None]
        new = F.interpolate(old, grid, mode="bicubic", antialias=True) if grid != (4, 4) else old
        before["pos_embed"] = new[0].permute(1, 2, 0).reshape(1, math.prod(grid), 32)
        assert isinstance(network.pos_embed, nn.Parameter)
    elif positions == "sincos2d":
        assert torch.equal(network.pos_embed[0], sincos_positions_2d(grid, 32))
    fresh.load_state_dict(before)
    image = torch.randn(2, 3, height, width)
    assert_near(network(image), fresh(image), 1e-6)
    assert config.image_size == (16, 16)  # it may belong to another network
    assert network.config.image_size == size
    network.save_pretrained(tmp_path)
    assert torch.equal(ViT.from_pretrained(tmp_path).eval()(image), network(image))


def test_adapt_gives_the_source_our_size() -> None:
    network, source = ViT(vit(image_size=(8, 20))), ViT(vit())
    network.adapt(source)
    network.load_state_dict(source.state_dict())
    assert source(torch.zeros(1, 3, 8, 20)).shape == (1, 6)


@pytest.mark.parametrize("positions", ["learned", "sincos2d"])
def test_resize_keeps_dtype_and_frozen_state(positions: Any) -> None:
    network = ViT(vit(positions=positions)).bfloat16().requires_grad_(False)
    network.resize(24)
    assert network(torch.randn(1, 3, 24, 24, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert not any(p.requires_grad for p in network.parameters())


@pytest.mark.parametrize(("size", "shown"), [(18, "18x18"), ((16, 6), "16x6"), (2, "2x2"), ((0, 16), "0x16")])
def test_patches_that_do_not_tile(size: Any, shown: str) -> None:
    message = f"patch_size=4 does not divide image_size={shown}"
    with pytest.raises(TrunklineError, match=message):
        ViT(vit(image_size=size))
    network, image = build("vit-cls")
    want = network(image)
    with pytest.raises(TrunklineError, match=message):
        network.resize(size)
    assert torch.equal(network(image), want)  # and nothing has changed
    assert network.config.image_size == 16


@pytest.mark.parametrize("shape", [(2, 1, 16, 16), (2, 3, 16, 20), (2, 3, 32, 32), (3, 16, 16), (2, 3, 256)])
def test_wrong_images(shape: tuple[int, ...]) -> None:
    network, _ = build("vit-cls")
    got = ", ".join(map(str, shape))
    with pytest.raises(TrunklineError, match=rf"takes images of shape \(B, 3, 16, 16\), but got \({got}\)"):
        network(torch.zeros(shape))
