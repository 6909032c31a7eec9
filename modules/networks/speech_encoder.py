"""Speech recogniser: frames, convolutions, trunk, and logits for CTC (Graves et al., 2006)."""

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from trunkline import TrunklineError
from trunkline.modules.backbone import Transformer, TransformerConfig, TransformerOutput
from trunkline.modules.backbone.transformer import init_linear
from trunkline.modules.networks.base import Network, trunk_for
from trunkline.modules.networks.frames import (
    FrameConvolutions,
    FramePatches,
    check_frames,
    frame_axis,
    frame_limit,
    subsampled_lengths,
    subsampled_mask,
)
from trunkline.modules.networks.graphs import Graph, mask_input, number_input
from trunkline.modules.networks.positions import absolute_positions


@dataclass
class SpeechEncoderConfig:
    """Shape of a speech recogniser.

    Raises:
        TrunklineError: for a value that cannot work.
    """

    vocab_size: int = 32
    """Number V of tokens; the network adds one output for CTC's blank."""
    num_mels: int = 80
    """Mel bins M of a frame."""
    max_frames: int = 3000
    """Frames of the longest clip."""
    front: Literal["conv", "patches"] = "conv"
    """What turns frames into embeddings: convolutions with strides, or groups of frames (arXiv:2104.01778)."""
    kernel_size: int = 3
    """Frames that a convolution sees, an odd number."""
    strides: tuple[int, ...] = (2, 2)
    """Stride of each convolution; their product is the number of frames for one state."""
    conv_dim: int | None = None
    """Channels between the convolutions; None means the width of the trunk."""
    patch_frames: int = 4
    """Frames in a group, with `front="patches"`."""
    positions: Literal["learned", "sinusoidal", "none"] = "sinusoidal"
    """Absolute positions; `none` is for a rotary trunk."""
    backbone: TransformerConfig = field(default_factory=TransformerConfig)
    """The trunk."""

    def __post_init__(self) -> None:
        sizes = {name: getattr(self, name) for name in ("vocab_size", "num_mels", "max_frames", "patch_frames")}
        for name, value in sizes.items():
            if value < 1:
                raise TrunklineError(f"{name}={value} must be at least 1", f"model.network.{name}")
        if self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise TrunklineError(
                f"kernel_size={self.kernel_size} must be odd, so that every state stands at a frame",
                "model.network.kernel_size",
            )
        if not self.strides or min(self.strides) < 1:
            raise TrunklineError(
                f"strides={list(self.strides)} needs a number of at least 1 for each convolution",
                "model.network.strides",
            )
        if self.backbone.causal:
            raise TrunklineError(
                "the trunk of a SpeechEncoder cannot be causal, because every frame sees every other; leave causal out",
                "model.network.backbone.causal",
            )

    @property
    def subsampling(self) -> int:
        """Frames for one state."""
        return math.prod(self.strides) if self.front == "conv" else self.patch_frames


class SpeechEncoder(Network):
    """Recogniser of speech: convolutions or patches, trunk, a linear head over the tokens and CTC's blank.

    Shape legend: B batch, T frames, M mel bins, T' states, D width, V tokens. Padding is on the right.

    Args:
        config: shape of the network.
        trunk: an existing trunk to use. It always runs without a causal mask here, whatever its configuration says.

    Raises:
        TrunklineError: if the given trunk does not fit `config.backbone`.
    """

    config_class = SpeechEncoderConfig

    def __init__(self, config: SpeechEncoderConfig, trunk: Transformer | None = None) -> None:
        super().__init__()
        self.config = config
        dim = config.backbone.dim
        self.front: nn.Module
        if config.front == "conv":
            dims = [config.conv_dim or dim] * (len(config.strides) - 1) + [dim]
            self.front = FrameConvolutions(config.num_mels, dims, config.kernel_size, config.strides)
        else:
            self.front = FramePatches(config.num_mels, dim, config.patch_frames)
        states = -(-frame_limit(config.max_frames) // config.subsampling)
        self.pos_embed = absolute_positions(config.positions, states, dim)
        self.dropout = nn.Dropout(config.backbone.dropout)
        self.backbone = trunk_for(config.backbone, trunk)
        self.head = nn.Linear(dim, config.vocab_size + 1)
        init_linear(self.head)

    @property
    def blank(self) -> int:
        """Output of CTC's blank, the last one."""
        return self.config.vocab_size

    @property
    def subsampling(self) -> int:
        """Frames for one state."""
        return self.config.subsampling

    extra_words = 1  # the blank

    def output_modules(self) -> list[nn.Module]:
        return [self.head]

    def word_weights(self) -> dict[str, str]:
        return dict.fromkeys(("head.weight", "head.bias"), "tokenizer")

    def text_positions(self) -> dict[str, tuple[nn.Embedding, int]]:
        return {"pos_embed": (self.pos_embed, 0)} if isinstance(self.pos_embed, nn.Embedding) else {}

    def output_lengths(self, lengths: Tensor) -> Tensor:
        """Number of frames -> number of states; any shape."""
        return subsampled_lengths(lengths, self.subsampling)

    def output_mask(self, mask: Tensor | None) -> Tensor | None:
        """Mask of frames (B, T) -> mask of states (B, T')."""
        return subsampled_mask(mask, self.subsampling)

    def graphs(self) -> list[Graph]:
        frames = frame_axis(self.config.max_frames, self.subsampling)
        inputs = {"features": number_input(frames, self.config.num_mels), "mask": mask_input(frames)}
        return [Graph(self.outputs, inputs)]

    def outputs(self, features: Tensor, mask: Tensor) -> dict[str, Any]:
        """Log-probabilities (B, T', V + 1) for a decoder of CTC, and which states are real, (B, T')."""
        log_probs = self(features, mask).log_softmax(dim=-1)
        return {"log_probs": log_probs, "state_mask": self.output_mask(mask)}

    def read_trunk(self) -> tuple[Transformer, Callable[..., TransformerOutput]]:
        return self.backbone, self.encode

    def encode(
        self,
        features: Tensor,
        mask: Tensor | None = None,
        return_attention: bool = False,
        layers: Collection[int] = (),
    ) -> TransformerOutput:
        """States of the trunk.

        Args:
            features: (B, T, M) log-mel frames.
            mask: (B, T) bool, False for padding, which is on the right.
            return_attention: also return the attention weights.
            layers: blocks after which the states are also returned.

        Returns:
            States, (B, T', D), and on request the attention weights. States of padding are arbitrary.

        Raises:
            TrunklineError: if the features have another number of mel bins, or more frames than `max_frames`.
        """
        check_frames(features, self.config.num_mels, self.config.max_frames)
        x = self.front(features, mask)
        if self.pos_embed is not None:
            x = x + self.pos_embed(torch.arange(x.shape[1], device=x.device)).to(x.dtype)
        x, mask = self.dropout(x), self.output_mask(mask)
        return self.backbone(x, causal=False, mask=mask, return_attention=return_attention, layers=layers)

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits (B, T', V + 1) of the tokens and, at the end, of CTC's blank; arguments as for `encode`."""
        return self.head(self.encode(features, mask).x)
