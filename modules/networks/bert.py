"""Masked language model: BERT (Devlin et al., 2019, arXiv:1810.04805) and its descendants, by configuration."""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trunkline import TrunklineError
from trunkline.modules.backbone import Transformer, TransformerConfig, TransformerOutput
from trunkline.modules.backbone.attention import Keep, make_norm
from trunkline.modules.backbone.transformer import init_linear
from trunkline.modules.networks.base import Network, trunk_for
from trunkline.modules.networks.graphs import Axis, Graph, mask_input, token_input
from trunkline.ranges import check_ranges


def bert_trunk() -> TransformerConfig:
    """The trunk of BERT-base."""
    return TransformerConfig(
        dim=768, depth=12, num_heads=12, norm_eps=1e-12, norm_first=False, final_norm=False, dropout=0.1
    )


@dataclass
class BERTConfig:
    """Shape of a masked language model; the defaults are BERT-base, uncased.

    Raises:
        TrunklineError: for a causal trunk.
    """

    vocab_size: int = 30522
    """Number V of tokens; may be larger than the tokenizer's."""
    max_length: int = 512
    """Largest number of tokens that the network can see at once."""
    positions: Literal["learned", "none"] = "learned"
    """Absolute positions; `none` is for a rotary trunk."""
    num_segments: int = 2
    """Number of segment embeddings: 2 for the texts of a pair, 0 for none."""
    next_sentence: bool = False
    """A second output, read from the first token: does the second text follow the first?"""
    predicts_tokens: bool = True
    """Without it the network is a body: it has no output layer over the vocabulary, and returns states."""
    pooler: bool = False
    """A dense layer and tanh over the first token's state, also without `next_sentence`: see `BERT.pool`."""
    first_position: int = 0
    """Row of the table of positions for the first token. In a RoBERTa (arXiv:1907.11692) it is the number of the
    padding's token + 1, and then only tokens are counted: those of the mask, or without one all others than padding."""
    backbone: TransformerConfig = field(default_factory=bert_trunk)
    """The trunk."""

    def __post_init__(self) -> None:
        check_ranges("model.network*", self, vocab_size="[1, inf)", max_length="[1, inf)", num_segments="[0, inf)")
        check_ranges("model.network*", self, first_position="[0, inf)")
        if self.backbone.causal:
            raise TrunklineError(
                "the trunk of a BERT cannot be causal, because tokens see both sides; leave causal out, or train a GPT"
            )


class MaskedHead(nn.Module):
    """A dense layer, GELU and a norm between the trunk's states and the tied output layer."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.dim, config.dim)
        self.norm = make_norm(config, config.dim)
        init_linear(self.dense)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return self.norm(F.gelu(self.dense(x)))


class Pooler(nn.Module):
    """A dense layer and tanh over the first token's state, (B, D)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dense = nn.Linear(dim, dim)
        init_linear(self.dense)

    def forward(self, x: Tensor) -> Tensor:
        """(B, D) -> (B, D)."""
        return torch.tanh(self.dense(x))


class BERT(Network):
    """Token, position and segment embeddings, trunk, and a head that predicts masked tokens.

    Shape legend: B batch, T tokens, N chosen tokens, D width, V vocabulary.

    Args:
        config: shape of the network.
        trunk: an existing trunk to use. It always runs without a causal mask here, whatever its configuration says.

    Raises:
        TrunklineError: if the given trunk does not fit `config.backbone`.
    """

    config_class = BERTConfig

    def __init__(self, config: BERTConfig, trunk: Transformer | None = None) -> None:
        super().__init__()
        self.config = config
        shape = config.backbone
        self.token_embed = nn.Embedding(config.vocab_size, shape.dim)
        rows = config.first_position + config.max_length
        self.pos_embed = nn.Embedding(rows, shape.dim) if config.positions == "learned" else None
        self.segment_embed = nn.Embedding(config.num_segments, shape.dim) if config.num_segments else None
        self.embed_norm = make_norm(shape, shape.dim) if not shape.norm_first else nn.Identity()
        self.dropout = nn.Dropout(shape.dropout)
        self.backbone = trunk_for(shape, trunk)
        self.masked_head: Any = MaskedHead(shape) if config.predicts_tokens else nn.Identity()
        self.head: Any = nn.Linear(shape.dim, config.vocab_size) if config.predicts_tokens else nn.Identity()
        self.pooler = Pooler(shape.dim) if config.next_sentence or config.pooler else None
        self.next_head = nn.Linear(shape.dim, 2) if config.next_sentence else None
        if isinstance(self.head, nn.Linear):
            self.head.weight = self.token_embed.weight
            nn.init.zeros_(self.head.bias)
        for embedding in (self.token_embed, self.pos_embed, self.segment_embed):
            if embedding is not None:
                nn.init.trunc_normal_(embedding.weight, std=0.02)
        if self.next_head is not None:
            init_linear(self.next_head)

    def output_modules(self) -> list[nn.Module]:
        return [m for m in (self.masked_head, self.head, self.pooler, self.next_head) if m is not None]

    def word_weights(self) -> dict[str, str]:
        heads = ["head.weight", "head.bias"] if isinstance(self.head, nn.Linear) else []
        return dict.fromkeys(["token_embed.weight", *heads], "tokenizer")

    def text_positions(self) -> dict[str, tuple[nn.Embedding, int]]:
        return {} if self.pos_embed is None else {"pos_embed": (self.pos_embed, self.config.first_position)}

    def rotary_length(self) -> int:
        return 0 if self.config.backbone.rope_theta is None else self.config.max_length

    def embed(self, tokens: Tensor, segment: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Token ids (B, T), segments (B, T), all 0 if None, and mask (B, T) -> embeddings (B, T, D).

        The mask matters only with a `first_position`; without it all tokens but padding count.

        Raises:
            TrunklineError: if there are more tokens than positions.
        """
        length = tokens.shape[1]
        if length > self.config.max_length:
            raise TrunklineError(
                f"{length} tokens are more than the {self.config.max_length} the network can see; "
                "shorten the text, or train with a larger max_length"
            )
        x = self.token_embed(tokens)
        if self.pos_embed is not None:
            first = self.config.first_position
            if first:
                real = tokens != first - 1 if mask is None else mask
                x = x + self.pos_embed(first - 1 + real.cumsum(dim=1) * real)
            else:
                x = x + self.pos_embed.weight[:length]
        if self.segment_embed is not None:
            x = x + (self.segment_embed.weight[0] if segment is None else self.segment_embed(segment))
        return self.dropout(self.embed_norm(x))

    def graphs(self) -> list[Graph]:
        config, length = self.config, Axis("length", high=self.config.max_length)
        inputs = {"tokens": token_input(config.vocab_size, length), "mask": mask_input(length)}
        if self.segment_embed is not None:
            inputs["segment"] = token_input(config.num_segments, length)
        return [Graph(self.outputs, inputs)]

    def outputs(self, tokens: Tensor, mask: Tensor, segment: Tensor | None = None) -> dict[str, Tensor]:
        """All that it computes, by name: states, and with the heads for them logits, pooled and follows."""
        found = {"states": self.forward_features(tokens, segment, mask=mask).x}
        if self.config.predicts_tokens:
            found["logits"] = self.head(self.masked_head(found["states"]))
        if self.pooler is not None:
            found["pooled"] = self.pool(found["states"])
        if self.next_head is not None:
            found["follows"] = self.next_head(found["pooled"])
        return found

    def read_trunk(self) -> tuple[Transformer, Callable[..., TransformerOutput]]:
        return self.backbone, self.forward_features

    def forward_features(
        self,
        tokens: Tensor,
        segment: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        keep: Keep | None = None,
        return_attention: bool = False,
        layers: Collection[int] = (),
    ) -> TransformerOutput:
        """States after the trunk, (B, T, D), and on request the attention weights; arguments as for `forward`."""
        x = self.embed(tokens, segment, mask)
        return self.backbone(x, causal=False, mask=mask, keep=keep, return_attention=return_attention, layers=layers)

    def pool(self, states: Tensor) -> Tensor:
        """(B, T, D) states -> (B, D), made by `pooler` from the first token's.

        Raises:
            TrunklineError: without a pooler.
        """
        if self.pooler is None:
            raise TrunklineError("this BERT has no pooler; make it with pooler=True, or use the first token's state")
        return self.pooler(states[:, 0])

    def forward(
        self,
        tokens: Tensor,
        segment: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        keep: Keep | None = None,
        return_logits: bool = True,
        return_next: bool = False,
    ) -> Any:
        """Logits of the token at each position, masked or not.

        Args:
            tokens: (B, T) token ids.
            segment: (B, T) number of the text within the row, 0 or 1 for a pair.
            mask: (B, T) bool, False for padding.
            keep: compute these positions only, such as the masked ones (B, N); T becomes their number.
            return_logits: False returns the inputs of the output layer `head` instead, for a chunked loss.
            return_next: also predict whether the second text follows the first, from the state of the first token,
                which is then computed in addition to those in `keep`.

        Returns:
            (B, T, V) logits, or (B, T, D) inputs of `head`. With `return_next`, a tuple of these and (B, 2) logits;
            class 1 means that the second text follows the first.

        Raises:
            TrunklineError: if there are more tokens than positions, or for `return_next` without
                `config.next_sentence`.
        """
        if not return_next:
            x = self.masked_head(self.forward_features(tokens, segment, mask=mask, keep=keep).x)
            return self.head(x) if return_logits else x
        if self.pooler is None or self.next_head is None:
            raise TrunklineError("this BERT has no output for the next sentence; make it with next_sentence=True")
        if keep is not None:
            keep = with_first(keep, tokens)
        states = self.forward_features(tokens, segment, mask=mask, keep=keep).x
        follows = self.next_head(self.pooler(states[:, 0]))
        x = self.masked_head(states if keep is None else states[:, 1:])
        return (self.head(x) if return_logits else x), follows


def with_first(keep: Keep, tokens: Tensor) -> Tensor:
    """Positions (B, 1 + N): that of the first token, then those in `keep`; `tokens` is (B, T)."""
    if isinstance(keep, slice):
        keep = torch.arange(tokens.shape[1], device=tokens.device)[keep].expand(len(tokens), -1)
    return torch.cat([keep.new_zeros(len(keep), 1), keep], dim=1)
