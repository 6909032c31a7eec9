"""Causal language model: GPT-2 (Radford et al., 2019) and its successors, by configuration."""

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from trunkline import TrunklineError
from trunkline.modules.backbone import KVCache, Transformer, TransformerConfig, TransformerOutput
from trunkline.modules.backbone.attention import Keep
from trunkline.modules.networks.base import Network, trunk_for
from trunkline.modules.networks.graphs import Axis, Graph, token_input
from trunkline.modules.networks.positions import real_positions
from trunkline.ranges import check_ranges


def gpt2_trunk() -> TransformerConfig:
    """The trunk of GPT-2 124M."""
    return TransformerConfig(dim=768, depth=12, num_heads=12, mlp="gelu_tanh", norm_eps=1e-5, causal=True)


@dataclass
class GPTConfig:
    """Shape of a causal language model; the defaults are GPT-2 124M."""

    vocab_size: int = 50257
    """Number V of tokens; may be larger than the tokenizer's (multiples of 64 are faster on a GPU)."""
    max_length: int = 1024
    """Largest number of tokens that the network can see at once."""
    positions: Literal["learned", "none"] = "learned"
    """Absolute positions; `none` is for a rotary trunk."""
    tie_embeddings: bool = True
    """The output layer is the token embedding transposed (arXiv:1608.05859)."""
    backbone: TransformerConfig = field(default_factory=gpt2_trunk)
    """The trunk; `causal` is always set to true."""

    def __post_init__(self) -> None:
        check_ranges("model.network*", self, vocab_size="[1, inf)", max_length="[1, inf)")
        if not self.backbone.causal:
            self.backbone = replace(self.backbone, causal=True)


@dataclass
class GPTState:
    """What `prefill` and `step` keep between calls."""

    cache: KVCache
    mask: Tensor | None
    """(B, length of the cache) bool, False for padding; None without padding."""


class GPT(Network):
    """Token embedding, positions, causal trunk, output layer.

    Shape legend: B batch, T given tokens, S given and cached tokens together, D width, V vocabulary.

    Args:
        config: shape of the network.
        trunk: an existing trunk to use. It always runs causally here, whatever its configuration says.

    Raises:
        TrunklineError: if the given trunk does not fit `config.backbone`.
    """

    config_class = GPTConfig

    def __init__(self, config: GPTConfig, trunk: Transformer | None = None) -> None:
        super().__init__()
        self.config = config
        dim = config.backbone.dim
        self.token_embed = nn.Embedding(config.vocab_size, dim)
        self.pos_embed = nn.Embedding(config.max_length, dim) if config.positions == "learned" else None
        self.dropout = nn.Dropout(config.backbone.dropout)
        self.backbone = trunk_for(config.backbone, trunk)
        self.head = nn.Linear(dim, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.token_embed.weight
        for module in (self.token_embed, self.pos_embed, self.head):
            if module is not None:
                nn.init.trunc_normal_(module.weight, std=0.02)
        if not config.tie_embeddings:
            # Because of the norms, outputs do not depend on the embedding's scale. AdamW moves each weight by about the
            # learning rate, so larger rows keep their direction in the first updates: it learns visibly faster.
            nn.init.normal_(self.token_embed.weight, std=0.5)
        if trunk is None:
            self._scale_residual_branches()

    @torch.no_grad()
    def _scale_residual_branches(self) -> None:
        """Scale down what blocks add to the residual stream, as in GPT-2: its variance grows with depth."""
        for block in self.backbone.blocks:
            for linear in (block.get_submodule("attn.proj"), block.get_submodule("mlp.fc2")):
                linear.get_parameter("weight").div_(math.sqrt(2 * self.config.backbone.depth))

    def output_modules(self) -> list[nn.Module]:
        return [] if self.config.tie_embeddings else [self.head]

    def word_weights(self) -> dict[str, str]:
        heads = ["head.weight"] if isinstance(self.head, nn.Linear) else []
        return dict.fromkeys(["token_embed.weight", *heads], "tokenizer")

    def text_positions(self) -> dict[str, tuple[nn.Embedding, int]]:
        return {} if self.pos_embed is None else {"pos_embed": (self.pos_embed, 0)}

    def rotary_length(self) -> int:
        return 0 if self.config.backbone.rope_theta is None else self.config.max_length

    def embed(
        self, tokens: Tensor, document: Tensor | None = None, mask: Tensor | None = None, start: int = 0
    ) -> Tensor:
        """First step of `forward`: token ids become embeddings with positions.

        Args:
            tokens: (B, T) token ids.
            document: (B, T) number of the document within a packed row; positions begin at 0 in each document.
            mask: (B, start + T) bool, False for padding on the left; positions do not count padding.
            start: number of tokens before these.

        Returns:
            (B, T, D) embeddings for `run`.

        Raises:
            TrunklineError: if there are more tokens than positions.
        """
        self._check_length(start + tokens.shape[1])
        x = self.token_embed(tokens)
        if self.pos_embed is not None:
            if document is not None:
                positions = positions_in_document(document)
            else:
                positions = real_positions(mask, start, tokens.shape[1], tokens.device)
            x = x + self.pos_embed(positions)
        return self.dropout(x)

    def run(
        self,
        x: Tensor,
        *,
        document: Tensor | None = None,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
        keep: Keep | None = None,
        return_attention: bool = False,
        layers: Collection[int] = (),
    ) -> TransformerOutput:
        """Second step of `forward`: embeddings become states, which `head` turns into logits.

        Args:
            x: (B, T, D) embeddings from `embed`. Other embeddings of the same width, such as those of an image, may
                stand before or among them; with learned positions, the caller adds positions to these itself.
            document: (B, T) number of the document within a packed row; a token sees only its own document.
            mask: which tokens may be attended to, as in `Transformer.forward`.
            cache: keys and values of the tokens before these.
            keep: compute these positions only; T becomes their number.
            return_attention: also return the attention weights.
            layers: blocks after which the states are also returned.

        Returns:
            States after the trunk, (B, T, D), and on request the attention weights.

        Raises:
            TrunklineError: if there are more tokens than positions.
        """
        self._check_length(x.shape[1] + (0 if cache is None else cache.length))
        options: dict[str, Any] = {"return_attention": return_attention, "layers": layers}
        return self.backbone(x, causal=True, mask=mask, document=document, cache=cache, keep=keep, **options)

    def _check_length(self, length: int) -> None:
        if not isinstance(length, Tensor) and length > self.config.max_length:  # a `FixedCache` is not longer
            raise TrunklineError(
                f"{length} tokens are more than the {self.config.max_length} the network can see; "
                "shorten the text, or train with a larger max_length"
            )

    def graphs(self) -> list[Graph]:
        """No mask: of padding on the right no token before it sees anything."""
        tokens = token_input(self.config.vocab_size, Axis("length", high=self.config.max_length))
        return [Graph(lambda tokens: {"logits": self(tokens)}, {"tokens": tokens})]

    def read_trunk(self) -> tuple[Transformer, Callable[..., TransformerOutput]]:
        return self.backbone, self.forward_features

    def forward_features(
        self,
        tokens: Tensor,
        document: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
        keep: Keep | None = None,
        return_attention: bool = False,
        layers: Collection[int] = (),
    ) -> TransformerOutput:
        """States after the trunk, (B, T, D), and on request the attention weights; arguments as for `forward`."""
        x = self.embed(tokens, document, mask, 0 if cache is None else cache.length)
        options: dict[str, Any] = {"return_attention": return_attention, "layers": layers}
        return self.run(x, document=document, mask=mask, cache=cache, keep=keep, **options)

    def forward(
        self,
        tokens: Tensor,
        document: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
        keep: Keep | None = None,
        return_logits: bool = True,
    ) -> Any:
        """Logits of each next token.

        Args:
            tokens: (B, T) token ids.
            document: (B, T) number of the document within a packed row. A token sees only its own document, and
                positions begin at 0 in each document.
            mask: (B, S) bool, False for padding on the left.
            cache: keys and values of the tokens before these.
            keep: compute these positions only, such as `slice(-1, None)`; T becomes their number.
            return_logits: False returns the states instead, for a loss that never holds all logits.

        Returns:
            (B, T, V) logits, or (B, T, D) states.

        Raises:
            TrunklineError: if there are more tokens than positions.
        """
        x = self.forward_features(tokens, document, mask=mask, cache=cache, keep=keep).x
        return self.head(x) if return_logits else x

    def make_cache(self, batch_size: int, max_length: int | None = None) -> KVCache:
        """An empty cache for sequences of up to `max_length` tokens (default: all that the network can see)."""
        weight = next(self.backbone.parameters())  # the embedding may have another type
        length = max_length or self.config.max_length
        return KVCache(self.config.backbone, batch_size, length, dtype=weight.dtype, device=weight.device)

    # --- the protocol `Decoder` of `trunkline.modules.generation.decoding`

    @property
    def vocab_size(self) -> int:
        """Number V of tokens."""
        return self.config.vocab_size

    @property
    def max_length(self) -> int:
        """Largest number of tokens that the network can see at once."""
        return self.config.max_length

    def prefill(
        self, tokens: Tensor, mask: Tensor | None, room: int, state: GPTState | None = None
    ) -> tuple[Tensor, GPTState]:
        """Read prompts.

        Args:
            tokens: (B, T) token ids.
            mask: (B, T) bool, False for padding on the left; None without padding.
            room: number of tokens that will follow.
            state: an old state of the same rows; its tokens are discarded and its memory is used again.

        Returns:
            (B, V) logits of the next token, and the state for `step`.
        """
        rows, length = tokens.shape
        if state is None or state.cache.max_length < length + room:
            state = GPTState(self.make_cache(rows, length + room), None)
        state.cache.length, state.mask = 0, None
        if mask is not None:
            state.mask = mask.new_ones(rows, state.cache.max_length)
            state.mask[:, :length] = mask
        keep = slice(-1, None) if length > 1 else None
        return self(tokens, mask=mask, cache=state.cache, keep=keep)[:, -1], state

    def step(self, tokens: Tensor, state: GPTState) -> Tensor:
        """Add one token (B,) to each row -> (B, V) logits of the next."""
        return self(tokens[:, None], mask=state.cache.seen(state.mask), cache=state.cache)[:, -1]

    def reorder(self, state: GPTState, rows: Tensor) -> GPTState:
        """Make row b continue the old row `rows[b]`."""
        state.cache.reorder(rows)
        state.mask = None if state.mask is None else state.mask[rows]
        return state


def positions_in_document(document: Tensor) -> Tensor:
    """Numbers (B, T) of the documents in packed rows -> positions (B, T) within each document."""
    index = torch.arange(document.shape[1], device=document.device).expand_as(document)
    begins = torch.ones_like(document, dtype=torch.bool)
    begins[:, 1:] = document[:, 1:] != document[:, :-1]
    return index - torch.where(begins, index, 0).cummax(dim=1).values
