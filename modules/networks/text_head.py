"""An output layer for a task on a language model: classes of texts, classes of tokens, start and end of answers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trunkline import TrunklineError
from trunkline.modules.backbone import Transformer, TransformerOutput
from trunkline.modules.backbone.attention import Keep
from trunkline.modules.backbone.transformer import init_linear
from trunkline.modules.networks.base import Network, config_from_dict
from trunkline.modules.networks.bert import BERT, BERTConfig
from trunkline.modules.networks.gpt import GPT, GPTConfig
from trunkline.modules.networks.graphs import Axis, Graph, mask_input, token_input


@dataclass
class TextHeadConfig:
    """Shape of a body, which is a BERT or a GPT, and of the output layer.

    Raises:
        TrunklineError: if there is not exactly one body, or for a value that cannot work.
    """

    bert: BERTConfig | None = None
    """The body, if it is a BERT."""
    gpt: GPTConfig | None = None
    """The body, if it is a GPT."""
    num_outputs: int = 2
    """Number K of outputs: classes of a text or of a token, or 2 for the start and the end of an answer. With 0
    there is no output layer: the outputs are its inputs, such as embeddings of texts."""
    pool: Literal["cls", "mean", "last", "none"] = "cls"
    """Input of the output layer: the first token, the mean over all, the last token before padding, or each token."""
    hidden: Literal["none", "tanh", "relu"] = "none"
    """A layer as wide as the body between it and the output layer, with this activation: tanh as in the classifiers of
    BERT and RoBERTa in transformers, relu as in that of DistilBERT."""
    dropout: float = 0.1
    """Probability of dropout before the output layer."""
    normalise: bool = False
    """Scale the outputs to length 1, as embeddings of texts often are."""
    head_bias: bool = True
    """Whether the output layer has a bias."""
    end_token: int | None = None
    """Id of the token that ends a text, for `pool="last"`: a row is read at its first one, whatever follows. None, or a
    row without it: at the last token before padding."""

    def __post_init__(self) -> None:
        if isinstance(self.bert, Mapping):  # in checkpoints and config.json
            self.bert = config_from_dict(BERTConfig, self.bert)
        if isinstance(self.gpt, Mapping):
            self.gpt = config_from_dict(GPTConfig, self.gpt)
        if (self.bert is None) == (self.gpt is None):
            count = "none" if self.bert is None else "two"
            raise TrunklineError(
                f"the network needs one body, not {count}; set either bert or gpt", "model.network.bert"
            )
        if self.gpt is not None and self.pool == "cls":
            raise TrunklineError(
                "pool=cls reads a GPT's first token, which sees no other token; set pool to last or mean",
                "model.network.pool",
            )
        if self.num_outputs < 0:
            raise TrunklineError(
                f"num_outputs={self.num_outputs} is below 0; set it to the number of classes, or to 0 for embeddings",
                "model.network.num_outputs",
            )
        if not 0 <= self.dropout < 1:
            raise TrunklineError(
                f"dropout={self.dropout} is not a probability; set it to at least 0 and below 1",
                "model.network.dropout",
            )

    @property
    def body(self) -> BERTConfig | GPTConfig:
        """The configuration of the body."""
        body = self.bert or self.gpt
        assert body is not None
        return body


class TextHead(Network):
    """A BERT or GPT without its own output layers, pooling, dropout, and a linear layer.

    Shape legend: B batch, T tokens, D width, K outputs.

    Args:
        config: shape of the network.
        trunk: an existing trunk for the body.

    Raises:
        TrunklineError: if the given trunk does not fit the body's configuration.
    """

    config_class = TextHeadConfig

    def __init__(self, config: TextHeadConfig, trunk: Transformer | None = None) -> None:
        super().__init__()
        self.config = config
        body = BERT(config.bert, trunk) if config.bert is not None else GPT(config.body, trunk)  # type: ignore[arg-type]
        self.body = without_heads(body)
        width = config.body.backbone.dim
        self.hidden = nn.Linear(width, width) if config.hidden != "none" else None
        if self.hidden is not None:
            init_linear(self.hidden)
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Linear(width, config.num_outputs, config.head_bias) if config.num_outputs else nn.Identity()
        if isinstance(self.head, nn.Linear):
            init_linear(self.head)

    def output_modules(self) -> list[nn.Module]:
        return [module for module in (self.hidden, self.dropout, self.head) if module is not None]

    def word_weights(self) -> dict[str, str]:
        return {f"body.{name}": whose for name, whose in self.body.word_weights().items()}

    def text_positions(self) -> dict[str, tuple[nn.Embedding, int]]:
        return self.body.text_positions()

    def rotary_length(self) -> int:
        return self.body.rotary_length()

    def read_trunk(self) -> tuple[Transformer, Callable[..., TransformerOutput]]:
        return self.body.read_trunk()

    def graphs(self) -> list[Graph]:
        """A mask only where something reads it: no token of a GPT sees padding on its right."""
        body, length = self.config.body, Axis("length", high=self.config.body.max_length)
        inputs = {"tokens": token_input(body.vocab_size, length)}
        if isinstance(self.body, BERT) or self.config.pool != "none":
            inputs["mask"] = mask_input(length)
        if isinstance(body, BERTConfig) and body.num_segments:
            inputs["segment"] = token_input(body.num_segments, length)
        name = "logits" if self.config.num_outputs else "embeddings"
        return [Graph(lambda **given: {name: self(**given)}, inputs)]

    def states(self, tokens: Tensor, segment: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Inputs of the output layer, (B, D), or (B, T, D) with `pool="none"`; arguments as for `forward`."""
        x = self.pooled(tokens, segment, mask)
        if self.hidden is None:
            return x
        return torch.tanh(self.hidden(x)) if self.config.hidden == "tanh" else torch.relu(self.hidden(x))

    def pooled(self, tokens: Tensor, segment: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """States of the body, (B, D), or (B, T, D) with `pool="none"`; arguments as for `forward`.

        The last block computes only the tokens that are used.
        """
        pool = self.config.pool
        keep: Keep | None = None
        if pool == "cls":
            keep = slice(0, 1)
        elif pool == "last":
            keep = slice(-1, None) if mask is None else last_position(mask)
            if self.config.end_token is not None:
                keep = first_position(tokens == self.config.end_token, keep)
        if isinstance(self.body, BERT):
            x = self.body(tokens, segment, mask=mask, keep=keep, return_logits=False)
        else:  # padding is on the right, which no token of a GPT sees
            x = self.body(tokens, keep=keep, return_logits=False)
        if pool == "none":
            return x
        if pool == "mean" and mask is not None:
            weight = mask[..., None].to(x.dtype)  # (B, T, 1)
            return (x * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1)
        return x.mean(dim=1)  # over the one kept token, or over all

    def forward(self, tokens: Tensor, segment: Tensor | None = None, *, mask: Tensor | None = None) -> Tensor:
        """Outputs for each text, or with `pool="none"` for each token.

        Args:
            tokens: (B, T) token ids.
            segment: (B, T) number of the text within the row, 0 or 1 for a pair; a GPT ignores it.
            mask: (B, T) bool, False for padding, which is on the right.

        Returns:
            (B, K), or (B, T, K); of width D if K is 0.

        Raises:
            TrunklineError: if there are more tokens than positions.
        """
        x = self.head(self.dropout(self.states(tokens, segment, mask)))
        return F.normalize(x, dim=-1) if self.config.normalise else x


def without_heads(body: BERT | GPT) -> BERT | GPT:
    """Remove a language model's own output layers, in place; DDP fails if parameters get no gradient."""
    body.head = nn.Identity()
    if isinstance(body, BERT):
        body.masked_head = nn.Identity()
        body.pooler = body.next_head = None
    return body


def last_position(mask: Tensor) -> Tensor:
    """(B, T) bool -> (B, 1) position of each row's last True."""
    places = torch.arange(mask.shape[1], device=mask.device)
    return (mask * places).amax(dim=1, keepdim=True)


def first_position(found: Tensor, otherwise: Keep) -> Tensor:
    """(B, T) bool -> (B, 1) position of each row's first True; in a row without one, `otherwise`."""
    places = torch.arange(found.shape[1], device=found.device).expand_as(found)
    last = places[:, otherwise] if isinstance(otherwise, slice) else otherwise
    return torch.where(found.any(dim=1, keepdim=True), found.int().argmax(dim=1, keepdim=True), last)
