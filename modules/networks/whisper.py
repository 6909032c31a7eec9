"""Whisper (Radford et al., 2022, arXiv:2212.04356): a text is written about the encoded frames of a clip."""

import math
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn

from trunkline import TrunklineError
from trunkline.modules.backbone import Transformer, TransformerConfig, TransformerOutput
from trunkline.modules.backbone.transformer import init_linear
from trunkline.modules.networks.base import trunk_for
from trunkline.modules.networks.conditional import ConditionalNetwork, check_widths
from trunkline.modules.networks.frames import (
    FrameConvolutions,
    check_frames,
    frame_axis,
    frame_limit,
    subsampled_lengths,
    subsampled_mask,
)
from trunkline.modules.networks.graphs import Input, number_input
from trunkline.modules.networks.positions import absolute_positions

STRIDES = (1, 2)
"""Of the two convolutions, so that there is one state for two frames."""


def whisper_tiny() -> TransformerConfig:
    """A trunk of the smallest model in arXiv:2212.04356."""
    return TransformerConfig(dim=384, depth=4, num_heads=6, norm_eps=1e-5)


@dataclass
class WhisperConfig:
    """Shape of a Whisper; the defaults are those of the smallest one for many languages.

    Raises:
        TrunklineError: for a value that cannot work.
    """

    vocab_size: int = 51865
    """Number V of tokens; may be larger than the tokenizer's."""
    num_mels: int = 80
    """Mel bins M of a frame."""
    max_frames: int = 3000
    """Frames of the longest clip."""
    max_target_length: int = 448
    """Largest number of tokens of a text, including the start tokens."""
    positions: Literal["learned", "sinusoidal", "fixed", "none"] = "sinusoidal"
    """Absolute positions of the encoder; `none` is for a rotary trunk. `fixed` are sinusoidal ones in a table that is
    kept with the weights, as in files of Whisper."""
    target_positions: Literal["learned", "sinusoidal", "none"] = "learned"
    """Absolute positions of the decoder."""
    tie_embeddings: bool = True
    """The output layer is the token embedding transposed (arXiv:1608.05859)."""
    encoder: TransformerConfig = field(default_factory=whisper_tiny)
    """Trunk over the sounds; `causal` and `cross_attention` are always set to false."""
    decoder: TransformerConfig = field(default_factory=whisper_tiny)
    """Trunk over the text; `causal` and `cross_attention` are always set to true."""

    def __post_init__(self) -> None:
        self.encoder = replace(self.encoder, causal=False, cross_attention=False)
        self.decoder = replace(self.decoder, causal=True, cross_attention=True)
        for name in ("vocab_size", "num_mels", "max_frames", "max_target_length"):
            if getattr(self, name) < 1:
                raise TrunklineError(f"{name}={getattr(self, name)} must be at least 1", f"model.network.{name}")
        check_widths(self.encoder, self.decoder)


class Whisper(ConditionalNetwork):
    """Two convolutions, an encoder, and a decoder of text that attends to the encoder's states.

    Shape legend: B batch, T frames, M mel bins, S states (one for two frames), N tokens of the text, D width, V
    vocabulary. A batch may have fewer frames than `max_frames`. Padding of the frames is on the right.

    Args:
        config: shape of the network.
        trunk: an existing trunk to use as the encoder; it runs without a causal mask here.
        decoder_trunk: an existing trunk to use as the decoder; it must have cross-attention, and runs causally here.

    Raises:
        TrunklineError: if a given trunk does not fit `config.encoder` or `config.decoder`.
    """

    config_class = WhisperConfig

    def __init__(
        self, config: WhisperConfig, trunk: Transformer | None = None, decoder_trunk: Transformer | None = None
    ) -> None:
        super().__init__()
        self.config = config
        dim = config.encoder.dim
        limit = config.max_frames if config.positions == "fixed" else frame_limit(config.max_frames)
        states = -(-limit // self.subsampling)
        self.front = FrameConvolutions(config.num_mels, (dim, dim), kernel_size=3, strides=STRIDES)
        self.pos_embed = absolute_positions(config.positions, states, dim, with_end=True)
        self.dropout = nn.Dropout(config.encoder.dropout)
        self.encoder = trunk_for(config.encoder, trunk, "encoder")
        self.target_embed = nn.Embedding(config.vocab_size, dim)
        self.target_pos_embed = absolute_positions(config.target_positions, config.max_target_length, dim)
        self.target_embed_norm = nn.Identity()
        self.target_dropout = nn.Dropout(config.decoder.dropout)
        self.target_relative_bias = None
        self.decoder = trunk_for(config.decoder, decoder_trunk, "decoder")
        self.head = nn.Linear(dim, config.vocab_size, bias=False)
        init_linear(self.head)
        if config.tie_embeddings:
            self.head.weight = self.target_embed.weight
        nn.init.normal_(self.target_embed.weight, std=0.02 if config.tie_embeddings else 1.0)

    @property
    def subsampling(self) -> int:
        """Frames for one state."""
        return math.prod(STRIDES)

    def output_lengths(self, lengths: Tensor) -> Tensor:
        """Number of frames -> number of states; any shape."""
        return subsampled_lengths(lengths, self.subsampling)

    def context_mask(self, mask: Tensor | None) -> Tensor | None:
        """Mask of frames (B, T) -> mask of states (B, S)."""
        return subsampled_mask(mask, self.subsampling)

    def source_input(self) -> tuple[str, Input]:
        return "features", number_input(frame_axis(self.config.max_frames, self.subsampling), self.config.num_mels)

    def encode(
        self,
        features: Tensor,
        mask: Tensor | None = None,
        return_attention: bool = False,
        layers: Collection[int] = (),
    ) -> TransformerOutput:
        """Encode sounds.

        Args:
            features: (B, T, M) log-mel frames.
            mask: (B, T) bool, False for padding, which is on the right; None also where the network is to hear the
                padding, as it was trained (arXiv:2212.04356).
            return_attention: also return the attention weights.
            layers: blocks after which the states are also returned.

        Returns:
            States of the encoder, (B, S, D), and on request the attention weights. States of padding are arbitrary.

        Raises:
            TrunklineError: if the features have another number of mel bins, or more frames than `max_frames`.
        """
        check_frames(features, self.config.num_mels, self.config.max_frames)
        x = self.front(features, mask)
        if self.pos_embed is not None:
            x = x + self.pos_embed(torch.arange(x.shape[1], device=x.device)).to(x.dtype)
        mask = self.context_mask(mask)
        x = self.dropout(x)
        return self.encoder(x, causal=False, mask=mask, return_attention=return_attention, layers=layers)
