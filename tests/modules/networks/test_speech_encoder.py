"""The speech recogniser: a clip is recognised alone as in a batch, and states stand where they say."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_networks import assert_near, randomise
from torch import Tensor, nn

from trunkline import TrunklineError
from trunkline.modules.backbone import Transformer, TransformerConfig
from trunkline.modules.networks import SpeechEncoder, SpeechEncoderConfig
from trunkline.modules.networks.frames import FrameConvolutions, FramePatches

LENGTHS = (29, 1, 2, 3, 4, 5, 16, 21)


def recogniser(trunk: dict[str, Any] | None = None, **changes: Any) -> SpeechEncoder:
    backbone = TransformerConfig(**{"dim": 32, "depth": 2, "num_heads": 4, **(trunk or {})})
    config = {"vocab_size": 10, "num_mels": 12, "max_frames": 40, "backbone": backbone, **changes}
    return randomise(SpeechEncoder(SpeechEncoderConfig(**config)))


KINDS: dict[str, dict[str, Any]] = {
    "conv": {},
    "conv-rotary": {"positions": "none", "trunk": {"rope_theta": 100.0, "norm": "rmsnorm", "mlp": "relu2"}},
    "conv-learned": {"positions": "learned", "strides": (2, 2, 2), "kernel_size": 5, "conv_dim": 24},
    "conv-like-whisper": {"strides": (1, 2)},
    "conv-single": {"strides": (3,), "kernel_size": 1},
    "patches": {"front": "patches"},
    "patches-of-one": {"front": "patches", "patch_frames": 1, "positions": "learned"},
    "post-norm": {"trunk": {"norm_first": False, "final_norm": False}},
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def ragged(num_mels: int = 12) -> tuple[Tensor, Tensor]:
    """Clips of different lengths, with junk in their padding."""
    mask = torch.arange(max(LENGTHS))[None] < torch.tensor(LENGTHS)[:, None]
    features = torch.randn(len(LENGTHS), max(LENGTHS), num_mels)
    return torch.where(mask[..., None], features, torch.nan), mask


@every_kind
def test_a_clip_alone_and_in_a_batch(kind: str) -> None:
    network = recogniser(**KINDS[kind]).eval()
    features, mask = ragged()
    states, together = network.encode(features, mask).x, network(features, mask)
    lengths = network.output_lengths(mask.sum(dim=1))
    for row, (length, n) in enumerate(zip(LENGTHS, lengths.tolist(), strict=True)):
        clip = features[row : row + 1, :length]
        alone = network(clip)
        assert alone.shape == (1, n, 11)
        assert_near(together[row : row + 1, :n], alone)
        assert_near(states[row : row + 1, :n], network.encode(clip).x)


@every_kind
def test_padding_gets_no_gradient(kind: str) -> None:
    network = recogniser(**KINDS[kind])
    features, mask = ragged()
    features = features.nan_to_num().requires_grad_()
    states = network(features, mask)[network.output_mask(mask)]
    (states * torch.linspace(-1, 1, states.numel()).reshape(states.shape)).sum().backward()
    assert features.grad is not None
    assert (features.grad[~mask] == 0).all()
    heard = features.grad.abs().sum(dim=2)
    if kind != "conv-single":  # whose convolution skips frames
        assert (heard[mask] > 0).all()


@every_kind
def test_lengths_and_mask_agree(kind: str) -> None:
    network = recogniser(**KINDS[kind])
    features, mask = ragged()
    states = network(features, mask)
    expected = [math.ceil(length / network.subsampling) for length in LENGTHS]
    assert network.output_lengths(torch.tensor(LENGTHS)).tolist() == expected
    output_mask = network.output_mask(mask)
    assert output_mask is not None
    assert output_mask.shape == states.shape[:2]
    want = torch.arange(states.shape[1])[None] < torch.tensor(expected)[:, None]
    assert torch.equal(output_mask, want)
    assert network.output_mask(None) is None


@pytest.mark.parametrize(("changes", "frames"), [({}, 4), ({"strides": (3, 1, 2)}, 6), ({"front": "patches"}, 4)])
def test_subsampling(changes: dict[str, Any], frames: int) -> None:
    network = recogniser(**changes)
    assert network.subsampling == frames
    for length in range(1, 41):
        states = network.encode(torch.randn(1, length, 12)).x.shape[1]
        assert states == math.ceil(length / frames) == int(network.output_lengths(torch.tensor(length)))


def test_the_blank_is_the_last_output() -> None:
    network = recogniser()
    assert network.blank == 10
    assert network.head.out_features == 11
    assert network.output_modules() == [network.head]


def test_convolutions_against_a_loop() -> None:
    front = FrameConvolutions(6, (5, 7), kernel_size=3, strides=(2, 1)).double()
    x = torch.randn(2, 9, 6, dtype=torch.float64)
    first, second = front.convs
    got = front(x)
    for layer, stride in ((first, 2), (second, 1)):
        padded = F.pad(x, (0, 0, 1, 1))
        windows = [padded[:, t : t + 3] for t in range(0, x.shape[1], stride)]
        x = torch.stack([torch.einsum("bkc,dck->bd", w, layer.weight) + layer.bias for w in windows], dim=1)
        x = x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
    assert_near(got, x, 1e-12)


def test_patches_against_a_loop() -> None:
    front = FramePatches(6, 5, patch_frames=4)
    x = torch.randn(2, 10, 6)
    filled = torch.cat((x, torch.zeros(2, 2, 6)), dim=1)
    for t in range(3):
        assert_near(front(x)[:, t], front.proj(filled[:, 4 * t : 4 * t + 4].reshape(2, 24)))


def test_attention_on_request() -> None:
    network = recogniser().eval()
    features, mask = ragged()
    out = network.encode(features, mask, return_attention=True)
    assert_near(network.head(out.x), network(features, mask))
    assert out.attention is not None
    assert [weights.shape for weights in out.attention] == [(8, 4, 8, 8)] * 2
    padding = ~network.output_mask(mask)
    assert (out.attention[0].masked_select(padding[:, None, None, :]) == 0).all()
    assert network.encode(features, mask).attention is None


def test_positions_matter() -> None:
    """Without them, and without overlap, the order of the groups does not count."""
    features = torch.randn(1, 16, 12)
    swapped = features.roll(4, dims=1)
    for positions, same in (("none", True), ("sinusoidal", False), ("learned", False)):
        network = recogniser(front="patches", positions=positions).eval()
        near = torch.allclose(network(features).roll(1, dims=1), network(swapped), atol=1e-5)
        assert near is same


@pytest.mark.parametrize("front", ["conv", "patches"])
def test_a_padded_batch_may_be_longer_than_the_longest_clip(front: Any) -> None:
    """The data pads to a multiple of 8 frames."""
    network = recogniser(front=front, max_frames=33, positions="learned")
    assert network(torch.randn(1, 40, 12)).shape == (1, 10, 11)
    with pytest.raises(TrunklineError, match=r"41 frames does not fit into a network that hears 1 to 33; .*max_frames"):
        network(torch.randn(1, 41, 12))


@pytest.mark.parametrize("shape", [(2, 8, 13), (2, 12, 8), (8, 12), (1, 2, 8, 12)])
def test_wrong_features(shape: tuple[int, ...]) -> None:
    got = ", ".join(map(str, shape))
    with pytest.raises(TrunklineError, match=rf"of shape \(B, frames, 12\), but got \({got}\); make num_mels") as error:
        recogniser()(torch.zeros(shape))
    assert error.value.field == "model.network.num_mels"


def test_no_frames() -> None:
    with pytest.raises(TrunklineError, match="a clip of 0 frames"):
        recogniser()(torch.zeros(1, 0, 12))


@pytest.mark.parametrize(
    ("changes", "message", "field"),
    [
        ({"vocab_size": 0}, "vocab_size=0 must be at least 1", "vocab_size"),
        ({"num_mels": 0}, "num_mels=0 must be at least 1", "num_mels"),
        ({"max_frames": -1}, "max_frames=-1 must be at least 1", "max_frames"),
        ({"patch_frames": 0}, "patch_frames=0 must be at least 1", "patch_frames"),
        ({"kernel_size": 4}, "kernel_size=4 must be odd", "kernel_size"),
        ({"kernel_size": -1}, "kernel_size=-1 must be odd", "kernel_size"),
        ({"strides": ()}, r"strides=\[\] needs a number", "strides"),
        ({"strides": (2, 0)}, r"strides=\[2, 0\] needs a number of at least 1", "strides"),
        ({"trunk": {"causal": True}}, "cannot be causal", "backbone.causal"),
    ],
)
def test_values_that_cannot_work(changes: dict[str, Any], message: str, field: str) -> None:
    with pytest.raises(TrunklineError, match=message) as error:
        recogniser(**changes)
    assert error.value.field == f"model.network.{field}"


def test_on_a_given_trunk() -> None:
    """Also on one that is causal elsewhere."""
    config = TransformerConfig(dim=32, depth=2, num_heads=4)
    trunk = Transformer(TransformerConfig(dim=32, depth=2, num_heads=4, causal=True))
    network = SpeechEncoder(SpeechEncoderConfig(vocab_size=10, num_mels=12, max_frames=40, backbone=config), trunk)
    assert network.backbone is trunk
    features = torch.randn(1, 16, 12)
    changed = features.clone()
    changed[:, -1] += 10.0
    assert (network(features) - network(changed))[0, 0].abs().max() > 1e-5
    with pytest.raises(TrunklineError, match=r"the given trunk has depth=1.* backbone\.depth=2"):
        SpeechEncoder(network.config, Transformer(TransformerConfig(dim=32, depth=1, num_heads=4)))


def test_dropout_of_the_embeddings() -> None:
    network = recogniser({"dropout": 0.5})
    assert isinstance(network.dropout, nn.Dropout)
    assert network.dropout.p == 0.5
