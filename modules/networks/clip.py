"""CLIP (Radford et al., 2021, arXiv:2103.00020): an image tower and a text tower with embeddings in one space."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trunkline import TrunklineError
from trunkline.modules.backbone import Transformer
from trunkline.modules.networks.base import Network, config_from_dict
from trunkline.modules.networks.bert import BERTConfig
from trunkline.modules.networks.gpt import GPTConfig
from trunkline.modules.networks.graphs import Graph
from trunkline.modules.networks.text_head import TextHead, TextHeadConfig
from trunkline.modules.networks.vit import ViT, ViTConfig

MAX_LOGIT_SCALE = math.log(100)
"""The limit that the paper uses, because training was unstable above it."""


@dataclass
class CLIPConfig:
    """Shape of the two towers and of the space that they share.

    Raises:
        TrunklineError: if there is not exactly one text tower, for a value out of range, or if `share_trunk` is set and
            the towers' trunks differ.
    """

    image: ViTConfig = field(default_factory=ViTConfig)
    """The image tower; its head is the projection into the shared space, so `num_classes` and `head_bias` are
    ignored."""
    bert: BERTConfig | None = None
    """The text tower, if it is bidirectional."""
    gpt: GPTConfig | None = None
    """The text tower, if it is causal, as in the paper."""
    text_pool: Literal["last", "mean", "cls"] = "last"
    """Source of a text's embedding: its last token (end of text), the mean over all tokens, or the first token."""
    end_token: int | None = None
    """Id of the token that ends a text, for `text_pool="last"`: a text is read at its first one, whatever follows.
    None, or a text without it: at its last token before padding."""
    text_padding: int | None = None
    """Id of the token that fills each text up to the full length, and that the network sees as any other (SigLIP, which
    reads the last place of a full row); None for padding that nothing sees."""
    dim: int = 512
    """Size E of an embedding."""
    projection_bias: bool = True
    """Whether the projections into the shared space have biases; those of the paper have none."""
    image_projection: bool = True
    """Without it the pooled features of the image tower are its embedding, as in SigLIP (arXiv:2303.15343)."""
    share_trunk: bool = False
    """Both towers run through the same blocks, whose weights exist once."""
    init_logit_scale: float = math.log(1 / 0.07)
    """Initial logarithm of the factor that multiplies the cosines."""
    init_logit_bias: float | None = None
    """Initial bias that is added to the logits; None for no bias. SigLIP's loss (arXiv:2303.15343) needs one, such as
    -10."""

    def __post_init__(self) -> None:
        if isinstance(self.bert, Mapping):  # in checkpoints and config.json
            self.bert = config_from_dict(BERTConfig, self.bert)
        if isinstance(self.gpt, Mapping):
            self.gpt = config_from_dict(GPTConfig, self.gpt)
        if self.gpt is not None and self.text_pool == "cls":
            raise TrunklineError(
                "text_pool=cls reads a GPT's first token, which sees no other token; set text_pool to last or mean",
                "model.network.text_pool",
            )
        if self.dim < 1:
            raise TrunklineError(f"dim={self.dim} is below 1; set it to the size of an embedding", "model.network.dim")
        if not 0 <= self.init_logit_scale <= MAX_LOGIT_SCALE:
            raise TrunklineError(
                f"init_logit_scale={self.init_logit_scale} is out of range; set it to at least 0 and at most "
                f"{MAX_LOGIT_SCALE:.3f}, the logarithm of 100",
                "model.network.init_logit_scale",
            )
        if not self.image_projection and self.dim != self.image.backbone.dim:
            raise TrunklineError(
                f"without image_projection an embedding is as wide as the image tower, but dim={self.dim}; set dim to "
                f"{self.image.backbone.dim}, or image_projection to true",
                "model.network.dim",
            )
        words = self.text.body.vocab_size
        for name in ("end_token", "text_padding"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < words:
                raise TrunklineError(
                    f"{name}={value} is no token of the text tower, whose vocab_size is {words}; set it to the id of a "
                    "token, or to null",
                    f"model.network.{name}",
                )
        own, other = self.image.backbone, self.text.body.backbone
        names = [f.name for f in fields(own) if f.name != "causal"]  # each tower passes this in each call
        different = [name for name in names if getattr(own, name) != getattr(other, name)]
        if self.share_trunk and different:
            raise TrunklineError(
                f"share_trunk needs the same trunk twice, but they differ in {', '.join(different)}; make "
                f"image.backbone and {'gpt' if self.bert is None else 'bert'}.backbone equal",
                "model.network.share_trunk",
            )

    @property
    def vision(self) -> ViTConfig:
        """The image tower with a head of `dim` outputs, or none."""
        outputs = self.dim if self.image_projection else 0
        return replace(self.image, num_classes=outputs, head_bias=self.projection_bias)

    @property
    def text(self) -> TextHeadConfig:
        """The text tower with a head of `dim` outputs."""
        return TextHeadConfig(
            self.bert,
            self.gpt,
            num_outputs=self.dim,
            pool=self.text_pool,
            dropout=0.0,
            head_bias=self.projection_bias,
            end_token=self.end_token,
        )


class Embeddings(NamedTuple):
    """Embeddings of pairs of image and text."""

    image: Tensor
    """(B, E), of length 1."""
    text: Tensor
    """(B, E), of length 1."""


class LogitScale(nn.Module):
    """Turns cosines into logits by a learned factor and, for a sigmoid loss, a learned bias."""

    def __init__(self, scale: float, bias: float | None) -> None:
        super().__init__()
        # Vectors, not scalars, which PyTorch's FSDP cannot shard.
        self.logit_scale = nn.Parameter(torch.tensor([float(scale)]))
        self.logit_bias = nn.Parameter(torch.tensor([float(bias)])) if bias is not None else None

    @property
    def factor(self) -> Tensor:
        """The inverse temperature, a scalar."""
        return self.logit_scale.exp().squeeze(0)

    @torch.no_grad()
    def clamp(self) -> None:
        """Limit the factor to the range from 1 to 100; to be called after each optimiser step."""
        self.logit_scale.clamp_(0, MAX_LOGIT_SCALE)

    def forward(self, cosines: Tensor) -> Tensor:
        """Any shape -> the same."""
        logits = self.factor * cosines
        return logits if self.logit_bias is None else logits + self.logit_bias


class CLIP(Network):
    """A ViT and a text trunk, each with a linear projection into the shared space.

    Shape legend: B batch, T tokens, E size of an embedding.

    Args:
        config: shape of the network.
        trunk: an existing trunk for both towers; needs `config.share_trunk`.

    Raises:
        TrunklineError: if a trunk is given without `share_trunk`, or if it does not fit the configuration.
    """

    config_class = CLIPConfig

    def __init__(self, config: CLIPConfig, trunk: Transformer | None = None) -> None:
        super().__init__()
        if trunk is not None and not config.share_trunk:
            raise TrunklineError("the towers of this CLIP share no trunk, so none can be given; set share_trunk=True")
        self.config = config
        self.image = ViT(config.vision, trunk)
        self.text = TextHead(config.text, trunk)
        if config.share_trunk:
            # The text tower's own trunk is made and then dropped: making it draws random numbers before the heads do,
            # and runs with a seed must keep their initial weights.
            self.text.body.backbone = self.image.backbone
        self.scale = LogitScale(config.init_logit_scale, config.init_logit_bias)
        for head in (self.image.head, self.text.head):
            if isinstance(head, nn.Linear):
                nn.init.normal_(head.weight, std=head.in_features**-0.5)

    def output_modules(self) -> list[nn.Module]:
        return [*self.image.output_modules(), *self.text.output_modules(), self.scale]

    def word_weights(self) -> dict[str, str]:
        return {f"text.{name}": whose for name, whose in self.text.word_weights().items()}

    def adapt(self, source: "CLIP") -> list[str]:
        """Fit the towers of the source to this network's images and the length of its texts."""
        texts = [f"{each} of texts" for each in self.text.adapt(source.text)]
        return [*self.image.adapt(source.image), *texts]

    def graphs(self) -> list[Graph]:
        """One for each tower, because most uses embed pictures and texts at different times."""
        text = self.text.graphs()[0].inputs
        inputs = {name: text[name] for name in ("tokens", "mask")}
        scale = {"logit_scale": float(self.scale.factor)}
        if self.scale.logit_bias is not None:
            scale["logit_bias"] = float(self.scale.logit_bias)
        return [
            Graph(
                lambda image: {"embeddings": self.encode_image(image)}, self.image.graphs()[0].inputs, "image", scale
            ),
            Graph(lambda tokens, mask: {"embeddings": self.encode_text(tokens, mask)}, inputs, "text", scale),
        ]

    def encode_image(self, image: Tensor) -> Tensor:
        """(B, C, height, width) -> (B, E) of length 1, in float32 or wider."""
        return unit(self.image(image))

    def encode_text(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Token ids (B, T) and mask (B, T), False for padding -> (B, E) of length 1, in float32 or wider.

        Raises:
            TrunklineError: if there are more tokens than positions.
        """
        padding = self.config.text_padding
        if padding is not None:
            tokens = tokens if mask is None else tokens.masked_fill(~mask, padding)
            room = max(self.config.text.body.max_length - tokens.shape[1], 0)
            tokens, mask = F.pad(tokens, (0, room), value=padding), None
        return unit(self.text(tokens, mask=mask))

    def forward(self, image: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Embeddings:
        """Embeddings of images (B, C, height, width), and of texts as for `encode_text`."""
        return Embeddings(self.encode_image(image), self.encode_text(tokens, mask))


def unit(x: Tensor) -> Tensor:
    """Scale rows to length 1, in float32 or wider, because the cosines are then multiplied by up to 100."""
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)
