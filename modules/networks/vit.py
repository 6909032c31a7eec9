"""Vision Transformer (Dosovitskiy et al., 2021, arXiv:2010.11929)."""

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from trunkline import TrunklineError
from trunkline.modules.backbone import Transformer, TransformerConfig
from trunkline.modules.backbone.attention import make_norm
from trunkline.modules.backbone.transformer import init_linear
from trunkline.modules.networks.attention_pool import AttentionPool
from trunkline.modules.networks.base import Network, trunk_for
from trunkline.modules.networks.graphs import Graph, number_input
from trunkline.modules.networks.intermediates import Indices, patch_intermediates, states_of
from trunkline.modules.networks.patches import PatchEmbed, resize_patches, resize_positions, sincos_positions_2d
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
    pool: Literal["cls", "mean", "map", "cls_mean"] = "cls"
    """A class token, the mean over patches (arXiv:2205.01580), attention pooling (arXiv:2106.04560), or class token and
    mean side by side, 2 D numbers, as in DINOv2's classifier (arXiv:2304.07193)."""
    positions: Literal["learned", "sincos2d", "none"] = "learned"
    """Absolute positions of the patches; `none` is for a rotary trunk."""
    num_registers: int = 0
    """Number of extra tokens that no head reads (arXiv:2309.16588)."""
    embed_norm: bool = False
    """Normalise the tokens before the trunk, as CLIP does."""
    prefix_positions: int = 0
    """Number of the tokens before the patches, from the first, that have a learned position of their own. It could be
    part of the token; separate, it lets weights of other libraries go back to them bit for bit."""
    patch_bias: bool = True
    """Whether the projection of the patches has a bias; CLIP's has none."""
    head_bias: bool = True
    """Whether the head has a bias."""
    fc_norm: bool = False
    """Normalise the pooled features, usually instead of the trunk's `final_norm`."""
    pooler: bool = False
    """A dense layer and tanh over the pooled features, as in transformers' `ViTModel`."""
    drop_remainder: bool = False
    """Leave out the last rows and columns of pixels that fill no patch, as SigLIP SO400M does (384 pixels, patches of
    14); otherwise the patches must tile the image."""
    mask_token: bool = False
    """Keep the token that hides patches in DINOv2's pre-training, so that a file of it goes back whole; unused here."""
    backbone: TransformerConfig = field(default_factory=TransformerConfig)
    """The trunk."""

    def __post_init__(self) -> None:
        sizes = dict.fromkeys(("patch_size", "in_chans"), "[1, inf)")
        check_ranges("model.network*", self, **sizes, num_classes="[0, inf)", num_registers="[0, inf)")
        tokens = ("cls" in self.pool) + self.num_registers
        if not 0 <= self.prefix_positions <= tokens:
            raise TrunklineError(
                f"prefix_positions={self.prefix_positions} is out of range; set it to at most {tokens}, the number of "
                "class token and registers",
                "model.network.prefix_positions",
            )
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
    states: list[Tensor] | None = None
    """On request, the states (B, T, D) after chosen blocks."""


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
        self.patch_embed = PatchEmbed(
            config.size, config.patch_size, config.in_chans, dim, config.patch_bias, config.drop_remainder
        )
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim)) if "cls" in config.pool else None
        self.reg_token = nn.Parameter(torch.empty(1, config.num_registers, dim)) if config.num_registers else None
        positions = config.prefix_positions
        self.prefix_pos = nn.Parameter(torch.empty(1, positions, dim)) if positions else None
        if config.mask_token:  # a buffer, because it gets no gradient
            self.register_buffer("mask_token", torch.zeros(1, dim))
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
        pooled = 2 * dim if config.pool == "cls_mean" else dim
        self.fc_norm = make_norm(config.backbone, pooled) if config.fc_norm else None
        self.pooler = nn.Linear(pooled, pooled) if config.pooler else None
        bias = config.head_bias
        self.head = nn.Linear(pooled, config.num_classes, bias) if config.num_classes else nn.Identity()
        for token in (self.cls_token, self.reg_token, self.prefix_pos, self.pos_embed):
            if isinstance(token, nn.Parameter):
                nn.init.trunc_normal_(token, std=0.02)
        if isinstance(self.head, nn.Linear):  # a zero head starts at the loss of a uniform guess
            nn.init.zeros_(self.head.weight)
            if self.head.bias is not None:
                nn.init.zeros_(self.head.bias)
        if self.pooler is not None:
            init_linear(self.pooler)

    def graphs(self) -> list[Graph]:
        name = "logits" if self.config.num_classes else "features"
        image = number_input(self.config.in_chans, *self.config.size)
        return [Graph(lambda image: {name: self(image)}, {"image": image})]

    @property
    def num_prefix_tokens(self) -> int:
        """Number P of tokens before the patches."""
        return (self.cls_token is not None) + self.config.num_registers

    def output_modules(self) -> list[nn.Module]:
        modules = (self.attn_pool, self.fc_norm, self.pooler, self.head)
        return [module for module in modules if module is not None]

    def adapt(self, source: "ViT") -> list[str]:
        """Fit the source's positions and patches to this network's images and patch size."""
        old, own = source.config, self.config
        grids = [source.patch_embed.grid, self.patch_embed.grid] if isinstance(source.pos_embed, nn.Parameter) else []
        source.resize(own.image_size, own.patch_size, own.in_chans)
        changed = {
            "positions": [f"{rows}x{columns}" for rows, columns in grids],
            "patches": [old.patch_size, own.patch_size],
            "channels": [old.in_chans, own.in_chans],
        }
        return [f"{name} {pair[0]} to {pair[1]}" for name, pair in changed.items() if len({*pair}) == 2]

    @torch.no_grad()
    def resize(
        self,
        image_size: int | tuple[int, int],
        patch_size: int | None = None,
        in_chans: int | None = None,
        antialias: bool = True,
    ) -> None:
        """Change the images that the network takes, in place; learned positions are interpolated.

        Args:
            image_size: pixels: one side, or (height, width).
            patch_size: side of a patch, as `resize_patches` changes it; None keeps it.
            in_chans: channels of an image, likewise.
            antialias: smooth the positions where there are fewer afterwards, as timm does; most models of transformers
                do not.

        Raises:
            TrunklineError: if the patch does not divide the new size.
        """
        old, old_embed = self.patch_embed.grid, self.patch_embed
        config = self.config
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        side, channels = patch_size or config.patch_size, in_chans or config.in_chans
        self.patch_embed = PatchEmbed(
            (height, width), side, channels, config.backbone.dim, drop_remainder=config.drop_remainder
        )
        self.patch_embed.proj = proj = old_embed.proj
        if (channels, side) != (config.in_chans, config.patch_size):
            weight = resize_patches(proj.weight, (config.in_chans, config.patch_size), (channels, side))
            proj.weight = nn.Parameter(weight, requires_grad=proj.weight.requires_grad)
            proj.in_features = weight.shape[1]
        # Other networks may share the old configuration.
        self.config = replace(config, image_size=image_size, patch_size=side, in_chans=channels)
        before = self.pos_embed
        if isinstance(before, nn.Parameter):
            positions = resize_positions(before, old, self.patch_embed.grid, antialias)
            self.pos_embed = nn.Parameter(positions, requires_grad=before.requires_grad)
        elif before is not None:
            self.pos_embed = sincos_positions_2d(self.patch_embed.grid, config.backbone.dim)[None].to(before)

    def embed(self, image: Tensor) -> Tensor:
        """(B, C, height, width) -> (B, P + rows * columns, D) embeddings for the trunk."""
        x = self.patch_embed(image)
        if self.pos_embed is not None:
            x = x + self.pos_embed
        tokens: list[Tensor] = [t for t in (self.cls_token, self.reg_token) if t is not None]
        if self.prefix_pos is not None:
            prefix, count = torch.cat(tokens, dim=1), self.config.prefix_positions
            tokens = [prefix[:, :count] + self.prefix_pos, prefix[:, count:]]
        tokens = [t.expand(x.shape[0], -1, -1) for t in tokens]
        return self.dropout(self.embed_norm(torch.cat((*tokens, x), dim=1) if tokens else x))

    def forward_features(
        self, image: Tensor, return_attention: bool = False, layers: Collection[int] = ()
    ) -> ViTFeatures:
        """(B, C, height, width) -> states after the trunk, and after the blocks `layers`."""
        out = self.backbone(self.embed(image), causal=False, return_attention=return_attention, layers=layers)
        split = self.num_prefix_tokens
        return ViTFeatures(out.x[:, :split], out.x[:, split:], out.attention, out.states)

    def forward_intermediates(  # type: ignore[override]
        self,
        image: Tensor,
        indices: Indices = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        output_fmt: Literal["NCHW", "NLC"] = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """States between the blocks, as timm's method of this name gives them.

        Args:
            image: (B, C, height, width).
            indices: the last n blocks, a list of numbers, or None for all; see `Network.forward_intermediates`.
            return_prefix_tokens: give each state as a tuple with that of the P tokens before the patches, (B, P, D).
            norm: apply the trunk's final norm to the states.
            output_fmt: `NCHW` for states (B, D, rows, columns) of the patches, or `NLC` for (B, rows * columns, D).
            intermediates_only: leave out the final states (B, P + rows * columns, D).

        Returns:
            (final states, [states of each chosen block]), or only the list.

        Raises:
            TrunklineError: for a block that the trunk does not have, or another format.
        """
        out, states = states_of(self.backbone, partial(self.forward_features, image), indices, norm)
        rows = self.patch_embed.grid[0]
        return patch_intermediates(out, states, rows, output_fmt, return_prefix_tokens, intermediates_only)

    def forward_head(self, features: ViTFeatures, pre_logits: bool = False) -> Tensor:
        """States -> (B, num_classes) logits, or with `pre_logits` the pooled (B, D) or (B, 2 D) features."""
        pool = self.config.pool
        if self.attn_pool is not None:
            pooled = self.attn_pool(features.patches)
        elif pool == "cls":
            pooled = features.prefix[:, 0]
        else:
            pooled = features.patches.mean(dim=1)
            pooled = torch.cat((features.prefix[:, 0], pooled), dim=1) if pool == "cls_mean" else pooled
        return self.classify(pooled, pre_logits)

    def classify(self, pooled: Tensor, pre_logits: bool = False) -> Tensor:
        """The layers after pooling: (B, D) -> (B, num_classes), or with `pre_logits` what the head reads."""
        pooled = pooled if self.fc_norm is None else self.fc_norm(pooled)
        pooled = pooled if self.pooler is None else torch.tanh(self.pooler(pooled))
        return pooled if pre_logits else self.head(pooled)

    def forward(self, image: Tensor) -> Tensor:
        """(B, C, height, width) -> (B, num_classes) logits."""
        if self.config.pool == "cls":  # the last block computes only the token that the head reads
            return self.classify(self.backbone(self.embed(image), causal=False, keep=slice(0, 1)).x[:, 0])
        return self.forward_head(self.forward_features(image))
