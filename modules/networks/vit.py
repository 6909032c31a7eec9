"""Vision Transformer (Dosovitskiy et al., 2021, arXiv:2010.11929)."""

from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from trunkline import TrunklineError
from trunkline.modules.backbone import Transformer, TransformerConfig
from trunkline.modules.backbone.attention import make_norm
from trunkline.modules.networks.attention_pool import AttentionPool
from trunkline.modules.networks.base import Network, trunk_for
from trunkline.modules.networks.patches import PatchEmbed, resize_positions, sincos_positions_2d
from trunkline.ranges import check_ranges


@dataclass
class ViTConfig:
    """Shape of a Vision Transformer; the defaults are ViT-Ti/16 at 224 pixels.

    Raises:
        TrunklineError: for a causal trunk, or a size out of its range.
    """

    image_size: int | tuple[int, int] = 224
    """Pixels: one side, or (height, width)."""
    patch_size: int = 16
    """Side of a patch in pixels; must divide the image."""
    in_chans: int = 3
    """Channels of an image: 1 for grey, 3 for RGB, or any other number."""
    num_classes: int = 1000
    """Outputs of the head; 0 leaves the head out, and the network returns pooled features."""
    pool: Literal["cls", "mean", "map"] = "cls"
    """A class token, the mean over patches (arXiv:2205.01580), or attention pooling (arXiv:2106.04560)."""
    positions: Literal["learned", "sincos2d", "none"] = "learned"
    """Absolute positions of the patches; `none` is for a rotary trunk."""
    num_registers: int = 0
    """Number of extra tokens that no head reads (arXiv:2309.16588)."""
    embed_norm: bool = False
    """Normalise the tokens before the trunk, as CLIP does."""
    backbone: TransformerConfig = field(default_factory=TransformerConfig)
    """The trunk."""

    def __post_init__(self) -> None:
        sizes = dict.fromkeys(("patch_size", "in_chans"), "[1, inf)")
        check_ranges("model.network*", self, **sizes, num_classes="[0, inf)", num_registers="[0, inf)")
        if self.backbone.causal:
            raise TrunklineError(
                "the trunk of a ViT cannot be causal, because every patch sees every other; leave causal out"
            )

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size


class ViTFeatures(NamedTuple):
    """Final states of the trunk for images."""

    prefix: Tensor
    """(B, P, D) states of the class token, if any, and of the registers."""
    patches: Tensor
    """(B, rows * columns, D) states of the patches."""
    attention: list[Tensor] | None
    """On request, the attention weights (B, H, T, T) of each block, with T = P + rows * columns tokens."""


class ViT(Network):
    """Image classifier: patch embedding, trunk, pooling, linear head.

    Args:
        config: shape of the network.
        trunk: an existing trunk to use. It always runs without a causal mask here, whatever its configuration says.

    Raises:
        TrunklineError: if the patches do not tile the image, or if the given trunk does not fit `config.backbone`.
    """

    config_class = ViTConfig

    def __init__(self, config: ViTConfig, trunk: Transformer | None = None) -> None:
        super().__init__()
        self.config = config
        dim = config.backbone.dim
        self.patch_embed = PatchEmbed(config.size, config.patch_size, config.in_chans, dim)
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim)) if config.pool == "cls" else None
        self.reg_token = nn.Parameter(torch.empty(1, config.num_registers, dim)) if config.num_registers else None
        self.pos_embed: Tensor | None
        grid = self.patch_embed.grid
        if config.positions == "learned":
            self.pos_embed = nn.Parameter(torch.empty(1, grid[0] * grid[1], dim))
        elif config.positions == "sincos2d":
            # Computed, so it is not saved with the weights and fits any grid.
            self.register_buffer("pos_embed", sincos_positions_2d(grid, dim)[None], persistent=False)
        else:
            self.pos_embed = None
        self.embed_norm = make_norm(config.backbone, dim) if config.embed_norm else nn.Identity()
        self.dropout = nn.Dropout(config.backbone.dropout)
        self.backbone = trunk_for(config.backbone, trunk)
        self.attn_pool = AttentionPool(config.backbone) if config.pool == "map" else None
        self.head = nn.Linear(dim, config.num_classes) if config.num_classes else nn.Identity()
        for token in (self.cls_token, self.reg_token, self.pos_embed):
            if isinstance(token, nn.Parameter):
                nn.init.trunc_normal_(token, std=0.02)
        if isinstance(self.head, nn.Linear):  # a zero head starts at the loss of a uniform guess
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)

    @property
    def num_prefix_tokens(self) -> int:
        """Number P of tokens before the patches."""
        return (self.cls_token is not None) + self.config.num_registers

    def output_modules(self) -> list[nn.Module]:
        return [module for module in (self.attn_pool, self.head) if module is not None]

    def adapt(self, source: "ViT") -> None:
        """Interpolate the source's positions to this network's image size."""
        source.resize(self.config.image_size)

    @torch.no_grad()
    def resize(self, image_size: int | tuple[int, int]) -> None:
        """Change the size of the images, in place; learned positions are interpolated.

        Raises:
            TrunklineError: if the patch does not divide the new size.
        """
        old, old_embed = self.patch_embed.grid, self.patch_embed
        config = self.config
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        self.patch_embed = PatchEmbed((height, width), config.patch_size, config.in_chans, config.backbone.dim)
        self.patch_embed.proj = old_embed.proj
        self.config = replace(config, image_size=image_size)  # other networks may share the old one
        before = self.pos_embed
        if isinstance(before, nn.Parameter):
            positions = resize_positions(before, old, self.patch_embed.grid)
            self.pos_embed = nn.Parameter(positions, requires_grad=before.requires_grad)
        elif before is not None:
            self.pos_embed = sincos_positions_2d(self.patch_embed.grid, config.backbone.dim)[None].to(before)

    def embed(self, image: Tensor) -> Tensor:
        """(B, C, height, width) -> (B, P + rows * columns, D) embeddings for the trunk."""
        x = self.patch_embed(image)
        if self.pos_embed is not None:
            x = x + self.pos_embed
        tokens = [t.expand(x.shape[0], -1, -1) for t in (self.cls_token, self.reg_token) if t is not None]
        return self.dropout(self.embed_norm(torch.cat((*tokens, x), dim=1) if tokens else x))

    def forward_features(self, image: Tensor, return_attention: bool = False) -> ViTFeatures:
        """(B, C, height, width) -> states after the trunk."""
        out = self.backbone(self.embed(image), causal=False, return_attention=return_attention)
        split = self.num_prefix_tokens
        return ViTFeatures(out.x[:, :split], out.x[:, split:], out.attention)

    def forward_head(self, features: ViTFeatures, pre_logits: bool = False) -> Tensor:
        """States -> (B, num_classes) logits, or with `pre_logits` the pooled (B, D) features."""
        if self.attn_pool is not None:
            pooled = self.attn_pool(features.patches)
        else:
            pooled = features.prefix[:, 0] if self.config.pool == "cls" else features.patches.mean(dim=1)
        return pooled if pre_logits else self.head(pooled)

    def forward(self, image: Tensor) -> Tensor:
        """(B, C, height, width) -> (B, num_classes) logits."""
        if self.config.pool == "cls":  # the last block computes only the token that the head reads
            return self.head(self.backbone(self.embed(image), causal=False, keep=slice(0, 1)).x[:, 0])
        return self.forward_head(self.forward_features(image))
