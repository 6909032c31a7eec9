"""States between the blocks: images against timm, texts and sounds against the blocks run one by one."""

from typing import Any

import pytest
import timm
import torch
from parity import assert_near, randomise
from torch import nn

from trunkline import TrunklineError
from trunkline.modules.backbone import TransformerConfig
from trunkline.modules.networks import (
    AST,
    BERT,
    CLIP,
    GPT,
    ASTConfig,
    BERTConfig,
    CLIPConfig,
    EncoderDecoder,
    EncoderDecoderConfig,
    GPTConfig,
    SpeechEncoder,
    SpeechEncoderConfig,
    TextHead,
    TextHeadConfig,
    ViT,
    ViTConfig,
    Whisper,
    WhisperConfig,
)
from trunkline.modules.networks.convert.families import FOREIGN_FAMILIES

TRUNK: dict[str, Any] = {"dim": 16, "depth": 3, "num_heads": 2}
TOKENS = torch.arange(10).reshape(2, 5)
SOUND = torch.arange(2 * 16 * 8).reshape(2, 16, 8) / 100


def trunk(**changes: Any) -> TransformerConfig:
    return TransformerConfig(**{**TRUNK, **changes})


@pytest.fixture(scope="module")
def twins() -> tuple[nn.Module, ViT]:
    """A ViT of timm, with registers and images that are not square, and ours with its weights."""
    torch.manual_seed(0)
    shape = {"img_size": (8, 12), "patch_size": 4, "embed_dim": 16, "depth": 3, "num_heads": 2, "num_classes": 3}
    peer = timm.create_model("vit_tiny_patch16_224", reg_tokens=2, no_embed_class=True, **shape)
    config = ViTConfig((8, 12), 4, num_classes=3, num_registers=2, backbone=trunk(norm_eps=1e-6))
    family = next(f for f in FOREIGN_FAMILIES if f.origin == "timm" and f.network is ViT)
    own = ViT(config).eval()
    own.load_state_dict(family.weights_from(randomise(peer).eval().state_dict(), config))
    return peer.eval(), own


@pytest.mark.parametrize("indices", [None, 2, [0, -1], [2, 0, 0]])
@pytest.mark.parametrize("options", [{}, {"norm": True, "return_prefix_tokens": True}, {"output_fmt": "NLC"}])
def test_images_as_timm_has_them(twins: Any, indices: Any, options: dict[str, Any]) -> None:
    peer, own = twins
    image = torch.randn(2, 3, 8, 12, generator=torch.Generator().manual_seed(1))
    want_last, want = peer.forward_intermediates(image, indices, **options)
    last, found = own.forward_intermediates(image, indices, **options)
    assert_near(last, want_last)
    assert len(found) == len(want)
    for got, other in zip(found, want, strict=True):
        if "return_prefix_tokens" in options:
            assert got[0].shape == (2, 16, 2, 3)
            assert got[1].shape == (2, 3, 16)
            assert_near(got[1], other[1])
            got, other = got[0], other[0]
        assert got.shape == other.shape
        assert_near(got, other)
    only = own.forward_intermediates(image, indices, intermediates_only=True, output_fmt="NLC")
    assert [x.shape for x in only] == [(2, 6, 16)] * len(want)


def networks() -> dict[str, tuple[Any, Any, str, dict[str, Any]]]:
    """Name -> network, inputs, the name of the trunk that reads them, and a mask."""
    padding = {"mask": torch.tensor([[True] * 5, [True] * 3 + [False] * 2])}
    frames = {"mask": torch.arange(16).expand(2, 16) < torch.tensor([[16], [12]])}
    both = {"encoder": trunk(), "decoder": trunk(cross_attention=True)}
    sizes = {"num_mels": 8, "max_frames": 16}
    return {
        "bert": (
            BERT(BERTConfig(11, 8, backbone=trunk(norm_first=False, final_norm=False))),
            TOKENS,
            "backbone",
            padding,
        ),
        "gpt": (GPT(GPTConfig(11, 8, backbone=trunk(causal=True, rope_theta=100.0))), TOKENS, "backbone", {}),
        "head": (TextHead(TextHeadConfig(bert=BERTConfig(11, 8, backbone=trunk()))), TOKENS, "body.backbone", padding),
        "t5": (
            EncoderDecoder(EncoderDecoderConfig(11, positions="relative", max_length=8, **both)),
            TOKENS,
            "encoder",
            padding,
        ),
        "whisper": (Whisper(WhisperConfig(11, **sizes, **both)), SOUND, "encoder", frames),
        "speech": (SpeechEncoder(SpeechEncoderConfig(11, **sizes, backbone=trunk())), SOUND, "backbone", frames),
    }


@pytest.mark.parametrize("name", ["bert", "gpt", "head", "t5", "whisper", "speech"])
@torch.no_grad()
def test_states_are_those_that_the_blocks_give(name: str) -> None:
    torch.manual_seed(0)
    network, inputs, place, mask = networks()[name]
    randomise(network).eval()
    reader = network.get_submodule(place)
    seen: list[Any] = []
    hooks = [block.register_forward_hook(lambda _m, _i, out: seen.append(out[0])) for block in reader.blocks]
    last, states = network.forward_intermediates(inputs, **mask)
    assert len(seen) == len(states) == 3
    assert all(torch.equal(a, b) for a, b in zip(states, seen, strict=True))
    assert torch.equal(reader.norm(states[-1]), last)
    for hook in hooks:
        hook.remove()
    (second,) = network.forward_intermediates(inputs, indices=[-2], norm=True, intermediates_only=True, **mask)
    assert torch.equal(second, reader.norm(states[1]))
    assert second.shape[::2] == (2, 16)


@torch.no_grad()
def test_sounds_and_their_padding() -> None:
    torch.manual_seed(0)
    own = randomise(AST(ASTConfig(8, 16, 4, 4, num_classes=3, backbone=trunk()))).eval()
    last, (first, final) = own.forward_intermediates(SOUND, indices=[0, 2])
    assert first.shape == final.shape == (2, 16, 2, 4)
    split = own.num_prefix_tokens
    assert_near(own.backbone.norm(final.flatten(2).mT), last[:, split:])
    mask = torch.arange(16).expand(2, 16) < torch.tensor([[16], [8]])
    masked = own.forward_intermediates(SOUND, mask, indices=1, intermediates_only=True)[0]
    louder = own.forward_intermediates(SOUND + ~mask[..., None] * 5.0, mask, indices=1, intermediates_only=True)[0]
    assert_near(masked[1, :, :, :2], louder[1, :, :, :2])


def test_states_of_a_decoder() -> None:
    torch.manual_seed(0)
    network = networks()["t5"][0].eval()
    context = network.encode(TOKENS).x
    out = network.decode(TOKENS, context, layers=[0, 2])
    assert torch.equal(network.decoder.norm(out.states[1]), out.x)
    assert len(out.states) == 2
    assert network.decode(TOKENS, context).states is None


def test_checkpointing_and_compilation_change_nothing() -> None:
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        own = BERT(BERTConfig(11, 8, backbone=trunk(activation_checkpointing=checkpointing)))
        states = own.forward_intermediates(TOKENS, indices=[0, 1], intermediates_only=True)
        assert len(states) == 2
        sum(x.square().sum() for x in states).backward()
        assert own.backbone.blocks[2].mlp.fc1.weight.grad is None
        gradients.append(own.backbone.blocks[0].mlp.fc1.weight.grad)
    assert_near(gradients[0], gradients[1])
    own.eval()
    compiled = torch.compile(own.forward_intermediates, backend="eager", fullgraph=True)
    for got, want in zip(compiled(TOKENS)[1], own.forward_intermediates(TOKENS)[1], strict=True):
        assert_near(got, want)


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        (4, r"indices=4: a trunk of 3 blocks has the last 1 to 3"),
        (0, r"indices=0: a trunk of 3 blocks has the last 1 to 3"),
        ([1, 3], r"indices=\[1, 3\]: a trunk of 3 blocks has the numbers -3 to 2"),
        ([-4], r"indices=\[-4\]: a trunk of 3 blocks"),
        ([], r"indices=\[\]: .*at least one"),
    ],
)
def test_blocks_that_are_not_there(indices: Any, message: str) -> None:
    with pytest.raises(TrunklineError, match=message):
        BERT(BERTConfig(11, 8, backbone=trunk())).forward_intermediates(TOKENS, indices=indices)


def test_what_cannot_be_asked(twins: Any) -> None:
    with pytest.raises(TrunklineError, match="output_fmt=NHWC is neither NCHW nor NLC"):
        twins[1].forward_intermediates(torch.zeros(1, 3, 8, 12), output_fmt="NHWC")
    vision = ViTConfig(8, 4, num_classes=0, backbone=trunk())
    towers = CLIP(CLIPConfig(image=vision, gpt=GPTConfig(11, 8, backbone=trunk(causal=True))))
    with pytest.raises(TrunklineError, match="a CLIP has several parts; take the states of one of them"):
        towers.forward_intermediates(TOKENS)
    assert len(towers.text.forward_intermediates(TOKENS, intermediates_only=True)) == 3
