"""Encoder and decoder: the Transformer of 2017, T5, BART and Marian, by configuration.

Papers: Vaswani et al., 2017 (arXiv:1706.03762), T5 (arXiv:1910.10683), BART (arXiv:1910.13461).
"""

import math
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn

from trunkline import TrunklineError
from trunkline.modules.backbone import (
    KVCache,
    Transformer,
    TransformerConfig,
    TransformerOutput,
)
from trunkline.modules.backbone.attention import Attention, Keep, make_norm
from trunkline.modules.backbone.transformer import init_linear
from trunkline.modules.networks.base import Network, trunk_for
from trunkline.modules.networks.positions import RelativeBias, absolute_positions, real_positions


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
    positions: Literal["learned", "sinusoidal", "relative", "none"] = "sinusoidal"
    """Absolute positions, T5's relative bias in self-attention, or none (for rotary trunks)."""
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
        self.encoder = replace(self.encoder, causal=False, cross_attention=False)
        self.decoder = replace(self.decoder, causal=True, cross_attention=True)
        if self.encoder.dim != self.decoder.dim:
            raise TrunklineError(
                f"encoder.dim={self.encoder.dim} and decoder.dim={self.decoder.dim} differ, but the decoder reads the "
                "encoder's states; make them equal",
                "model.network.decoder.dim",
            )

    @property
    def target_vocabulary(self) -> int:
        """Number V of tokens in the target's vocabulary."""
        return self.vocab_size if self.target_vocab_size is None else self.target_vocab_size

    @property
    def one_embedding(self) -> bool:
        """Whether both sides have one token embedding."""
        return self.share_embeddings and self.target_vocabulary == self.vocab_size


class EncoderDecoder(Network):
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
        self.pos_embed = absolute_positions(config.positions, config.max_length, dim)
        self.target_pos_embed = absolute_positions(config.positions, config.max_target_length, dim)
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

    def output_modules(self) -> list[nn.Module]:
        return [] if self.config.tie_embeddings else [self.head]

    def encode(self, tokens: Tensor, mask: Tensor | None = None, return_attention: bool = False) -> TransformerOutput:
        """Encode sources.

        Args:
            tokens: (B, S) token ids.
            mask: (B, S) bool, False for padding, which may be on either side.
            return_attention: also return the attention weights.

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
        return self.encoder(x, causal=False, mask=mask, return_attention=return_attention)

    def decode(
        self,
        target_tokens: Tensor,
        context: Tensor,
        context_mask: Tensor | None = None,
        *,
        target_mask: Tensor | None = None,
        cache: KVCache | None = None,
        keep: Keep | None = None,
        return_attention: bool = False,
    ) -> TransformerOutput:
        """States of the decoder, which `head_inputs` and `head` turn into logits of each next token.

        Args:
            target_tokens: (B, T) token ids, beginning with the start token.
            context: (B, S, D) states from `encode`.
            context_mask: (B, S) bool, False for padding of the sources.
            target_mask: (B, cached tokens + T) bool, False for padding on the left. Padding on the right needs no mask,
                since no token sees it.
            cache: keys and values of the tokens before these, and of `context`.
            keep: compute these positions only; T becomes their number.
            return_attention: also return the weights of self-attention and cross-attention.

        Returns:
            States, (B, T, D), and on request the weights.

        Raises:
            TrunklineError: if there are more tokens than `max_target_length`.
        """
        start = 0 if cache is None else cache.length
        end = start + target_tokens.shape[1]
        check_length("a target", end, self.config.max_target_length, "max_target_length")
        x = self.scaled(self.target_embed(target_tokens))
        if self.target_pos_embed is not None:
            x = x + self.target_pos_embed(real_positions(target_mask, start, end, x.device)).to(x.dtype)
        if self.target_relative_bias is not None:
            target_mask = self.target_relative_bias(end - start, start, target_mask)
        x = self.target_dropout(self.target_embed_norm(x))
        return self.decoder(
            x,
            causal=True,
            mask=target_mask,
            context=context,
            context_mask=context_mask,
            cache=cache,
            keep=keep,
            return_attention=return_attention,
        )

    def scaled(self, embeddings: Tensor) -> Tensor:
        """Token embeddings (B, T, D) as they enter the network."""
        return embeddings * math.sqrt(embeddings.shape[-1]) if self.config.scale_embeddings else embeddings

    def head_inputs(self, states: Tensor) -> Tensor:
        """States of the decoder (B, T, D) -> inputs of `head` (B, T, D)."""
        return states / math.sqrt(states.shape[-1]) if self.config.scale_output else states

    def forward(
        self, tokens: Tensor, target_tokens: Tensor, mask: Tensor | None = None, *, return_logits: bool = True
    ) -> Tensor:
        """Logits of each next token of the targets.

        Args:
            tokens: (B, S) token ids of the sources.
            target_tokens: (B, T) token ids, beginning with the start token; padding is on the right.
            mask: (B, S) bool, False for padding of the sources, which may be on either side.
            return_logits: False returns the inputs of `head` instead, for a loss that never holds all logits.

        Returns:
            (B, T, V) logits, or (B, T, D) inputs of `head`.

        Raises:
            TrunklineError: if there are more tokens than positions.
        """
        context = self.encode(tokens, mask).x
        x = self.head_inputs(self.decode(target_tokens, context, mask).x)
        return self.head(x) if return_logits else x

    def decoder_of(self, tokens: Tensor, mask: Tensor | None = None) -> "ConditionalDecoder":
        """A decoder of these sources for text generation; arguments as for `encode`."""
        return ConditionalDecoder(self, tokens, mask)


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


def check_length(what: str, length: int, limit: int, name: str) -> None:
    """Refuse more tokens than positions."""
    if length > limit:
        raise TrunklineError(
            f"{what} of {length} tokens is longer than the {limit} that the network can see; shorten the text, or "
            f"train with a larger {name}"
        )


@dataclass
class ConditionalState:
    """What `prefill` and `step` keep between calls."""

    cache: KVCache
    mask: Tensor | None
    """(B, length of the cache) bool, False for padding of the prompts; None without padding."""
    context: Tensor
    """States of the sources at first; later the cache has their keys and values, and these rows are not in order."""
    context_mask: Tensor | None
    """(B, S) bool, False for padding of the sources."""


class ConditionalDecoder(nn.Module):
    """The decoder of a batch of sources: the protocol `Decoder` of `trunkline.modules.generation.decoding`.

    The sources are encoded when the prompts are read, and their keys and values are computed once.

    Args:
        network: an encoder-decoder.
        tokens: (B, S) token ids of the sources.
        mask: (B, S) bool, False for padding, which may be on either side.
    """

    def __init__(self, network: EncoderDecoder, tokens: Tensor, mask: Tensor | None = None) -> None:
        super().__init__()
        self.network, self.tokens, self.mask = network, tokens, mask

    @property
    def vocab_size(self) -> int:
        """Number V of tokens of the target."""
        return self.network.config.target_vocabulary

    @property
    def max_length(self) -> int:
        """Largest number of tokens of a target."""
        return self.network.config.max_target_length

    def prefill(
        self, tokens: Tensor, mask: Tensor | None, room: int, state: ConditionalState | None = None
    ) -> tuple[Tensor, ConditionalState]:
        """Read prompts, row b for source b.

        Args:
            tokens: (B, T) token ids, each row beginning with the start token.
            mask: (B, T) bool, False for padding on the left; None without padding.
            room: number of tokens that will follow.
            state: an old state of the same rows; its tokens are discarded, and the sources stay.

        Returns:
            (B, V) logits of the next token, and the state for `step`.

        Raises:
            TrunklineError: if there are not as many prompts as sources.
        """
        rows, length = tokens.shape
        if state is None:
            if rows != len(self.tokens):
                raise TrunklineError(f"{rows} prompts for {len(self.tokens)} sources; give one prompt for each source")
            source_mask = None if self.mask is None or bool(self.mask.all()) else self.mask
            context = self.network.encode(self.tokens, source_mask).x
            state = ConditionalState(self.make_cache(rows, length + room), None, context, source_mask)
        if state.cache.max_length < length + room:
            cache, old = self.make_cache(rows, length + room), state.cache
            cache.cross, cache.source, state.cache = old.cross, old.source, cache
        state.cache.length, state.mask = 0, None
        if mask is not None:
            state.mask = mask.new_ones(rows, state.cache.max_length)
            state.mask[:, :length] = mask
        return self.logits(tokens, state, slice(-1, None) if length > 1 else None), state

    def step(self, tokens: Tensor, state: ConditionalState) -> Tensor:
        """Add one token (B,) to each row -> (B, V) logits of the next."""
        return self.logits(tokens[:, None], state, None)

    def logits(self, tokens: Tensor, state: ConditionalState, keep: Keep | None) -> Tensor:
        """Logits (B, V) after the last of the new tokens (B, T)."""
        mask = None if state.mask is None else state.mask[:, : state.cache.length + tokens.shape[1]]
        states = self.network.decode(
            tokens, state.context, state.context_mask, target_mask=mask, cache=state.cache, keep=keep
        ).x
        return self.network.head(self.network.head_inputs(states))[:, -1]

    def reorder(self, state: ConditionalState, rows: Tensor) -> ConditionalState:
        """Make row b continue the old row `rows[b]`."""
        state.cache.reorder(rows)
        state.mask = None if state.mask is None else state.mask[rows]
        state.context_mask = None if state.context_mask is None else state.context_mask[rows]
        return state

    def make_cache(self, rows: int, length: int) -> KVCache:
        """An empty cache of the type in which the network computes."""
        weight = next(self.network.decoder.parameters())
        autocast = torch.is_autocast_enabled(weight.device.type)
        dtype = torch.get_autocast_dtype(weight.device.type) if autocast else weight.dtype
        return KVCache(self.network.decoder.config, rows, length, dtype=dtype, device=weight.device)
