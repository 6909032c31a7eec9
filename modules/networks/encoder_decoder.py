"""Encoder and decoder: the Transformer of 2017, T5, BART and Marian, by configuration.

Papers: Vaswani et al., 2017 (arXiv:1706.03762), T5 (arXiv:1910.10683), BART (arXiv:1910.13461).
"""

import math
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn

from trunkline.modules.backbone import Transformer, TransformerConfig, TransformerOutput
from trunkline.modules.backbone.attention import Attention, make_norm
from trunkline.modules.backbone.transformer import init_linear
from trunkline.modules.networks.base import trunk_for
from trunkline.modules.networks.conditional import ConditionalNetwork, check_length, check_widths
from trunkline.modules.networks.graphs import Axis, Input, token_input
from trunkline.modules.networks.positions import RelativeBias, absolute_positions, real_positions
from trunkline.ranges import check_ranges


def transformer_base() -> TransformerConfig:
    """A trunk of the base model in arXiv:1706.03762."""
    return TransformerConfig(
        dim=512,
        depth=6,
        num_heads=8,
        mlp="relu",
        norm_eps=1e-5,
        norm_first=False,
        final_norm=False,
        dropout=0.1,
    )


@dataclass
class EncoderDecoderConfig:
    """Shape of an encoder-decoder.

    Raises:
        TrunklineError: if the two trunks do not fit each other.
    """

    vocab_size: int = 32128
    """Number of tokens in the source's vocabulary; may be larger than the tokenizer's."""
    target_vocab_size: int | None = None
    """Number V of tokens in the target's vocabulary; None means that of the source."""
    max_length: int = 512
    """Largest number of tokens of a source."""
    max_target_length: int = 512
    """Largest number of tokens of a target, including the start token."""
    positions: Literal["learned", "sinusoidal", "fixed", "relative", "none"] = "sinusoidal"
    """Absolute positions, T5's relative bias in self-attention, or none (for rotary trunks). `fixed` are sinusoidal
    ones in a table that is kept with the weights, as in files of Marian."""
    first_position: int = 0
    """Row of the tables of learned positions for the first token; BART's is the third."""
    relative_buckets: int = 32
    """Number of distances that the relative bias tells apart."""
    relative_distance: int = 128
    """Distance in tokens from which on the relative bias is the same."""
    share_embeddings: bool = True
    """One token embedding for both sides, if they have the same vocabulary."""
    tie_embeddings: bool = True
    """The output layer is the target's token embedding transposed (arXiv:1608.05859)."""
    scale_embeddings: bool = False
    """Multiply token embeddings by sqrt(D), as in 2017 and in Marian."""
    scale_output: bool = False
    """Divide the inputs of the output layer by sqrt(D), as in T5 1.0."""
    embed_norm: bool = False
    """A norm after the embeddings, as in BART."""
    output_bias: bool = False
    """The output layer has a bias, as in BART and Marian."""
    encoder: TransformerConfig = field(default_factory=transformer_base)
    """Trunk over the source; `causal` and `cross_attention` are always set to false."""
    decoder: TransformerConfig = field(default_factory=transformer_base)
    """Trunk over the target; `causal` and `cross_attention` are always set to true."""

    def __post_init__(self) -> None:
        names = ("vocab_size", "target_vocab_size", "max_length", "max_target_length")
        check_ranges("model.network", self, **dict.fromkeys(names, "[1, inf)"), first_position="[0, inf)")
        self.encoder = replace(self.encoder, causal=False, cross_attention=False)
        self.decoder = replace(self.decoder, causal=True, cross_attention=True)
        check_widths(self.encoder, self.decoder)

    @property
    def target_vocabulary(self) -> int:
        """Number V of tokens in the target's vocabulary."""
        return self.vocab_size if self.target_vocab_size is None else self.target_vocab_size

    @property
    def one_embedding(self) -> bool:
        """Whether both sides have one token embedding."""
        return self.share_embeddings and self.target_vocabulary == self.vocab_size


class EncoderDecoder(ConditionalNetwork):
    """Embeddings of both sides, an encoder, a decoder that attends to the encoder's states, output layer.

    Shape legend: B batch, S tokens of the source, T tokens of the target, D width, V vocabulary of the target.

    Args:
        config: shape of the network.
        trunk: an existing trunk to use as the encoder; it runs without a causal mask here.
        decoder_trunk: an existing trunk to use as the decoder; it must have cross-attention, and runs causally here.

    Raises:
        TrunklineError: if a given trunk does not fit `config.encoder` or `config.decoder`.
    """

    config_class = EncoderDecoderConfig

    def __init__(
        self, config: EncoderDecoderConfig, trunk: Transformer | None = None, decoder_trunk: Transformer | None = None
    ) -> None:
        super().__init__()
        self.config = config
        dim = config.encoder.dim
        self.token_embed = nn.Embedding(config.vocab_size, dim)
        self.target_embed = self.token_embed if config.one_embedding else nn.Embedding(config.target_vocabulary, dim)
        kind, first = config.positions, config.first_position
        self.pos_embed = absolute_positions(kind, config.max_length, dim, first=first)
        self.target_pos_embed = absolute_positions(kind, config.max_target_length, dim, first=first)
        self.embed_norm = make_norm(config.encoder, dim) if config.embed_norm else nn.Identity()
        self.target_embed_norm = make_norm(config.decoder, dim) if config.embed_norm else nn.Identity()
        self.dropout = nn.Dropout(config.encoder.dropout)
        self.target_dropout = nn.Dropout(config.decoder.dropout)
        self.relative_bias = relative_bias(config, config.encoder)
        self.target_relative_bias = relative_bias(config, config.decoder)
        self.encoder = trunk_for(config.encoder, trunk, "encoder")
        self.decoder = trunk_for(config.decoder, decoder_trunk, "decoder")
        self.head = nn.Linear(dim, config.target_vocabulary, bias=config.output_bias)
        init_linear(self.head)
        if config.tie_embeddings:
            self.head.weight = self.target_embed.weight
        for embedding in (self.token_embed, self.target_embed):
            nn.init.normal_(embedding.weight, std=embedding_std(config))
        for given, made in ((trunk, self.encoder), (decoder_trunk, self.decoder)):
            if given is None:
                scale_queries(made)

    def source_input(self) -> tuple[str, Input]:
        return "tokens", token_input(self.config.vocab_size, Axis("length", high=self.config.max_length))

    def encode(
        self,
        tokens: Tensor,
        mask: Tensor | None = None,
        return_attention: bool = False,
        layers: Collection[int] = (),
    ) -> TransformerOutput:
        """Encode sources.

        Args:
            tokens: (B, S) token ids.
            mask: (B, S) bool, False for padding, which may be on either side.
            return_attention: also return the attention weights.
            layers: blocks after which the states are also returned.

        Returns:
            States of the encoder, (B, S, D), and on request the attention weights.

        Raises:
            TrunklineError: if there are more tokens than `max_length`.
        """
        length = tokens.shape[1]
        check_length("a source", length, self.config.max_length, "max_length")
        x = self.scaled(self.token_embed(tokens))
        if self.pos_embed is not None:
            x = x + self.pos_embed(real_positions(mask, 0, length, x.device)).to(x.dtype)
        if self.relative_bias is not None:
            mask = self.relative_bias(length, mask=mask)
        x = self.dropout(self.embed_norm(x))
        return self.encoder(x, causal=False, mask=mask, return_attention=return_attention, layers=layers)

    def word_weights(self) -> dict[str, str]:
        return {"token_embed.weight": "tokenizer", **self.target_words("target_tokenizer")}

    def scaled(self, embeddings: Tensor) -> Tensor:
        """Token embeddings (B, T, D) as they enter the network."""
        return embeddings * math.sqrt(embeddings.shape[-1]) if self.config.scale_embeddings else embeddings

    def head_inputs(self, states: Tensor) -> Tensor:
        """States of the decoder (B, T, D) -> inputs of `head` (B, T, D)."""
        return states / math.sqrt(states.shape[-1]) if self.config.scale_output else states


def relative_bias(config: EncoderDecoderConfig, trunk: TransformerConfig) -> RelativeBias | None:
    """The relative bias of one of the trunks; None if the network has none."""
    if config.positions != "relative":
        return None
    return RelativeBias(trunk.num_heads, config.relative_buckets, config.relative_distance, trunk.causal)


def embedding_std(config: EncoderDecoderConfig) -> float:
    """Standard deviation of the token embeddings at first; embeddings and logits are then of about unit size."""
    if config.scale_embeddings:
        return config.encoder.dim**-0.5
    if config.scale_output or not config.tie_embeddings:
        return 1.0
    return 0.02


@torch.no_grad()
def scale_queries(trunk: Transformer) -> None:
    """Where scores are not divided by sqrt(E), divide the weights of the queries instead, as T5 does at first."""
    config = trunk.config
    if config.attn_scale is None or config.attn_scale <= config.head_width**-0.5:
        return
    for module in trunk.modules():
        if isinstance(module, Attention):
            projection = module.q if hasattr(module, "q") else module.qkv
            projection.weight[: config.num_heads * config.head_width] *= config.head_width**-0.5 / config.attn_scale
