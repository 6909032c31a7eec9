"""What networks that write a text about a source have in common: a decoder over tokens that reads an encoder's states.

The source may be a text or sounds. Shape legend: B batch, S tokens or frames of the source, later its states, T tokens
of the target, D width, V vocabulary of the target.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from trunkline import TrunklineError
from trunkline.modules.attention_kernels import product_dtype
from trunkline.modules.backbone import KVCache, Transformer, TransformerConfig, TransformerOutput
from trunkline.modules.backbone.attention import Keep
from trunkline.modules.networks.base import Network
from trunkline.modules.networks.graphs import Axis, Graph, Input, mask_input, number_input, token_input
from trunkline.modules.networks.positions import RelativeBias, real_positions


class ConditionalNetwork(Network):
    """Base of encoder-decoders. A subclass makes the parts below and has `encode`.

    Its configuration has `max_target_length` and `tie_embeddings`.
    """

    config: Any
    pos_embed: nn.Module | None
    target_embed: nn.Embedding
    target_pos_embed: nn.Module | None
    target_embed_norm: nn.Module
    target_dropout: nn.Module
    target_relative_bias: RelativeBias | None
    encoder: Transformer
    decoder: Transformer
    head: nn.Linear

    def output_modules(self) -> list[nn.Module]:
        return [] if self.config.tie_embeddings else [self.head]

    def word_weights(self) -> dict[str, str]:
        return self.target_words("tokenizer")

    def target_words(self, whose: str) -> dict[str, str]:
        """The `word_weights` of the decoder."""
        bias = [] if self.head.bias is None else ["head.bias"]
        return dict.fromkeys(["target_embed.weight", "head.weight", *bias], whose)

    def text_positions(self) -> dict[str, tuple[nn.Embedding, int]]:
        tables = {"pos_embed": self.pos_embed, "target_pos_embed": self.target_pos_embed}
        return {name: (table, 0) for name, table in tables.items() if isinstance(table, nn.Embedding)}

    def source_input(self) -> tuple[str, Input]:
        """What `encode` calls the sources, and what they are: an input (B, S, ...)."""
        raise NotImplementedError

    def graphs(self) -> list[Graph]:
        """The encoder, to be run once, and the decoder, for each token; one's outputs are the other's inputs.

        Only its last logits are new at each token: for long texts, the caches of `trunkline translate` are faster.
        """
        (name, source), states = self.source_input(), Axis("states")
        target = Axis("target_length", high=self.config.max_target_length)
        read = {
            "target_tokens": token_input(self.target_embed.num_embeddings, target),
            "context": number_input(states, self.config.decoder.dim),
            "context_mask": mask_input(states),
        }

        def encoder(mask: Tensor, **sources: Tensor) -> dict[str, Any]:
            context = self.encode(sources[name], mask).x
            return {"context": context, "context_mask": self.context_mask(mask)}

        def decoder(target_tokens: Tensor, context: Tensor, context_mask: Tensor) -> dict[str, Any]:
            return {"logits": self.head(self.head_inputs(self.decode(target_tokens, context, context_mask).x))}

        steps = source.shape[1]
        assert isinstance(steps, Axis)
        return [
            Graph(encoder, {name: source, "mask": mask_input(steps)}, "encoder"),
            Graph(decoder, read, "decoder"),
        ]

    def read_trunk(self) -> tuple[Transformer, Callable[..., TransformerOutput]]:
        return self.encoder, self.encode

    def encode(
        self,
        source: Tensor,
        mask: Tensor | None = None,
        return_attention: bool = False,
        layers: Collection[int] = (),
    ) -> TransformerOutput:
        """States of the sources (B, S, ...), whose padding is False in the mask (B, S)."""
        raise NotImplementedError

    def context_mask(self, mask: Tensor | None) -> Tensor | None:
        """Mask of the sources (B, S) -> mask of their states, which may be fewer."""
        return mask

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
        layers: Collection[int] = (),
    ) -> TransformerOutput:
        """States of the decoder, which `head_inputs` and `head` turn into logits of each next token.

        Args:
            target_tokens: (B, T) token ids, beginning with the start token.
            context: (B, S, D) states of the sources, from `encode`.
            context_mask: (B, S) bool, False for states of padding, from `context_mask`.
            target_mask: (B, cached tokens + T) bool, False for padding on the left. Padding on the right needs no mask,
                since no token sees it.
            cache: keys and values of the tokens before these, and of `context`.
            keep: compute these positions only; T becomes their number.
            return_attention: also return the weights of self-attention and cross-attention.
            layers: blocks after which the states are also returned.

        Returns:
            States, (B, T, D), and on request the weights.

        Raises:
            TrunklineError: if there are more tokens than `max_target_length`.
        """
        start = 0 if cache is None else cache.length
        count = target_tokens.shape[1]
        check_length("a target", start + count, self.config.max_target_length, "max_target_length")
        x = self.scaled(self.target_embed(target_tokens))
        if self.target_pos_embed is not None:
            x = x + self.target_pos_embed(real_positions(target_mask, start, count, x.device)).to(x.dtype)
        if self.target_relative_bias is not None:
            target_mask = self.target_relative_bias(count, start, target_mask)
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
            layers=layers,
        )

    def scaled(self, embeddings: Tensor) -> Tensor:
        """Embeddings of the target's tokens (B, T, D) as they enter the decoder."""
        return embeddings

    def head_inputs(self, states: Tensor) -> Tensor:
        """States of the decoder (B, T, D) -> inputs of `head` (B, T, D)."""
        return states

    def forward(
        self, source: Tensor, target_tokens: Tensor, mask: Tensor | None = None, *, return_logits: bool = True
    ) -> Tensor:
        """Logits of each next token of the targets.

        Args:
            source: (B, S, ...) sources, as `encode` takes them.
            target_tokens: (B, T) token ids, beginning with the start token; padding is on the right.
            mask: (B, S) bool, False for padding of the sources, on the sides that `encode` allows.
            return_logits: False returns the inputs of `head` instead, for a loss that never holds all logits.

        Returns:
            (B, T, V) logits, or (B, T, D) inputs of `head`.

        Raises:
            TrunklineError: if source or target is longer than the network can see.
        """
        context = self.encode(source, mask).x
        x = self.head_inputs(self.decode(target_tokens, context, self.context_mask(mask)).x)
        return self.head(x) if return_logits else x

    def decoder_of(self, source: Tensor, mask: Tensor | None = None) -> "ConditionalDecoder":
        """A decoder of these sources for text generation; arguments as for `encode`."""
        return ConditionalDecoder(self, source, mask)


def check_widths(encoder: TransformerConfig, decoder: TransformerConfig) -> None:
    """Refuse two trunks of different widths."""
    if encoder.dim != decoder.dim:
        raise TrunklineError(
            f"encoder.dim={encoder.dim} and decoder.dim={decoder.dim} differ, but the decoder reads the encoder's "
            "states; make them equal",
            "model.network.decoder.dim",
        )


def check_length(what: str, length: int, limit: int, name: str) -> None:
    """Refuse more tokens than positions."""
    if not isinstance(length, Tensor) and length > limit:  # a `FixedCache` is not longer
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
    """(B, S) bool, False for states of padding."""


class ConditionalDecoder(nn.Module):
    """The decoder of a batch of sources: the protocol `Decoder` of `trunkline.modules.generation.decoding`.

    The sources are encoded when the prompts are read, and their keys and values are computed once.

    Args:
        network: encodes the sources and decodes the texts.
        source: (B, S, ...) sources, as `encode` takes them.
        mask: (B, S) bool, False for padding of the sources.
    """

    def __init__(self, network: ConditionalNetwork, source: Tensor, mask: Tensor | None = None) -> None:
        super().__init__()
        self.network, self.source, self.mask = network, source, mask

    @property
    def vocab_size(self) -> int:
        """Number V of tokens of the target."""
        return self.network.head.out_features

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
            if rows != len(self.source):
                raise TrunklineError(f"{rows} prompts for {len(self.source)} sources; give one prompt for each source")
            source_mask = None if self.mask is None or bool(self.mask.all()) else self.mask
            context = self.network.encode(self.source, source_mask).x
            context_mask = self.network.context_mask(source_mask)
            state = ConditionalState(self.make_cache(rows, length + room), None, context, context_mask)
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
        mask = state.cache.seen(state.mask, tokens.shape[1])
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
        return KVCache(self.network.decoder.config, rows, length, dtype=product_dtype(weight), device=weight.device)
