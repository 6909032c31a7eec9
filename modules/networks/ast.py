"""Audio Spectrogram Transformer (Gong et al., 2021, arXiv:2104.01778): a Vision Transformer that hears.

Shape legend: B batch, T frames, M mel bins, D width, K classes. Patches stand in a grid: a row for each range of mel
bins, a column for each range of frames.
"""

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trunkline import TrunklineError
from trunkline.modules.backbone import Transformer, TransformerConfig
from trunkline.modules.backbone.attention import make_norm
from trunkline.modules.backbone.transformer import init_linear
from trunkline.modules.networks.base import Network, trunk_for
from trunkline.modules.networks.frames import check_frames, frame_axis, zero_padding
from trunkline.modules.networks.graphs import Graph, mask_input, number_input
from trunkline.modules.networks.intermediates import Indices, patch_intermediates, states_of
from trunkline.modules.networks.patches import resize_positions
from trunkline.modules.networks.vit import ViT


@dataclass
class ASTConfig:
    """Shape of an Audio Spectrogram Transformer; the defaults are the paper's but for the trunk, which is small.

    Raises:
        TrunklineError: for a value that cannot work.
    """

    num_mels: int = 128
    """Mel bins M of a frame."""
    max_frames: int = 1024
    """Frames of the longest clip."""
    patch_size: int = 16
    """Side of a patch, in frames and in mel bins."""
    stride: int | tuple[int, int] = 10
    """Step from one patch to the next: one number, or (frames, mel bins). Smaller than a patch, patches overlap."""
    num_classes: int = 527
    """Outputs K of the head; 0 leaves the head out, and the network returns pooled features."""
    pool: Literal["cls", "distilled", "mean"] = "distilled"
    """A class token, the mean of a class token and a distillation token (arXiv:2012.12877), or the mean of patches."""
    prefix_positions: int = 0
    """Number of the tokens before the patches, from the first, that have a learned position of their own. It could be
    part of the token; separate, it lets weights of other libraries go back to them bit for bit."""
    head_norm: bool = True
    """A norm of the pooled features before the head."""
    backbone: TransformerConfig = field(default_factory=TransformerConfig)
    """The trunk."""

    def __post_init__(self) -> None:
        if self.backbone.causal:
            raise TrunklineError(
                "the trunk of an AST cannot be causal, because every patch sees every other; leave causal out",
                "model.network.backbone.causal",
            )
        if not 0 <= self.prefix_positions <= self.prefix_tokens:
            raise TrunklineError(
                f"prefix_positions={self.prefix_positions} is out of range; set it to at most {self.prefix_tokens}, "
                f"the number of tokens before the patches with pool={self.pool}",
                "model.network.prefix_positions",
            )
        if self.max_frames < 1:
            raise TrunklineError(f"max_frames={self.max_frames} must be at least 1", "model.network.max_frames")
        if not 1 <= self.patch_size <= self.num_mels:
            raise TrunklineError(
                f"patch_size={self.patch_size} must be between 1 and num_mels={self.num_mels}",
                "model.network.patch_size",
            )
        if not 1 <= min(self.steps) <= max(self.steps) <= self.patch_size:
            raise TrunklineError(
                f"stride={self.stride} must be between 1 and patch_size={self.patch_size}, so that patches leave out "
                "nothing",
                "model.network.stride",
            )

    @property
    def prefix_tokens(self) -> int:
        """Number of tokens before the patches."""
        return {"cls": 1, "distilled": 2, "mean": 0}[self.pool]

    @property
    def steps(self) -> tuple[int, int]:
        """(frames, mel bins) from one patch to the next."""
        return (self.stride, self.stride) if isinstance(self.stride, int) else self.stride

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of the patches of the longest clip. What fills no patch at the end is left out."""
        time, mel = self.steps
        return (self.num_mels - self.patch_size) // mel + 1, max(self.max_frames - self.patch_size, 0) // time + 1


class ASTFeatures(NamedTuple):
    """Final states of the trunk for sounds."""

    prefix: Tensor
    """(B, P, D) states of the class token and the distillation token, if any."""
    patches: Tensor
    """(B, rows * columns, D) states of the patches."""
    mask: Tensor | None
    """(B, rows * columns) bool, False for patches after the end of a clip; None if there are none."""
    attention: list[Tensor] | None
    """On request, the attention weights (B, H, N, N) of each block, with N = P + rows * columns tokens."""
    states: list[Tensor] | None = None
    """On request, the states (B, N, D) after chosen blocks."""


class SpectrogramPatches(nn.Module):
    """Cuts frames into overlapping square patches and projects each to a token; the weight is that of a convolution.

    Args:
        config: shape of the network.
    """

    def __init__(self, config: ASTConfig) -> None:
        super().__init__()
        self.size, self.steps = config.patch_size, config.steps
        self.proj = nn.Linear(config.patch_size**2, config.backbone.dim)
        init_linear(self.proj)

    def forward(self, features: Tensor, columns: int) -> Tensor:
        """(B, T, M) -> (B, rows * columns, D), row by row. Missing frames are zeros; what is too much is left out."""
        time, mel = self.steps
        frames = (columns - 1) * time + self.size
        x = F.pad(features, (0, 0, 0, frames - features.shape[1])).mT  # (B, M, frames)
        tiles = x.unfold(1, self.size, mel).unfold(2, self.size, time)  # (B, rows, columns, patch, patch)
        return self.proj(tiles.flatten(3).flatten(1, 2))


class AST(Network):
    """Classifier of sounds: patches of a spectrogram, trunk, pooling, linear head.

    A clip has as many columns of patches as it takes to see all its frames; the same ones, with the same positions,
    alone and in a batch with longer clips. Padding of the frames is on the right.

    Args:
        config: shape of the network.
        trunk: an existing trunk to use. It always runs without a causal mask here, whatever its configuration says.

    Raises:
        TrunklineError: if the given trunk does not fit `config.backbone`.
    """

    config_class = ASTConfig

    def __init__(self, config: ASTConfig, trunk: Transformer | None = None) -> None:
        super().__init__()
        self.config = config
        dim, (rows, columns) = config.backbone.dim, config.grid
        self.patch_embed = SpectrogramPatches(config)
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim)) if config.pool != "mean" else None
        self.dist_token = nn.Parameter(torch.empty(1, 1, dim)) if config.pool == "distilled" else None
        positions = config.prefix_positions
        self.prefix_pos = nn.Parameter(torch.empty(1, positions, dim)) if positions else None
        self.pos_embed = nn.Parameter(torch.empty(1, rows * columns, dim))
        self.dropout = nn.Dropout(config.backbone.dropout)
        self.backbone = trunk_for(config.backbone, trunk)
        self.head_norm = make_norm(config.backbone, dim) if config.head_norm else nn.Identity()
        self.head = nn.Linear(dim, config.num_classes) if config.num_classes else nn.Identity()
        for token in (self.cls_token, self.dist_token, self.prefix_pos, self.pos_embed):
            if token is not None:
                nn.init.trunc_normal_(token, std=0.02)
        if isinstance(self.head, nn.Linear):  # a zero head starts at the loss of a uniform guess
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)

    @property
    def num_prefix_tokens(self) -> int:
        """Number P of tokens before the patches."""
        return self.config.prefix_tokens

    def output_modules(self) -> list[nn.Module]:
        return [self.head_norm, self.head]

    def graphs(self) -> list[Graph]:
        """Clips have two columns of patches at least: a graph of one would be another one."""
        config = self.config
        name, frames = "logits" if config.num_classes else "features", frame_axis(config.max_frames, config.patch_size)
        inputs = {"features": number_input(frames, config.num_mels), "mask": mask_input(frames)}
        return [Graph(lambda features, mask: {name: self(features, mask)}, inputs)]

    # --- sizes

    def columns(self, frames: int) -> int:
        """Columns of patches in a clip of this many frames."""
        time, size = self.config.steps[0], self.config.patch_size
        return min(max((frames - size + time - 1) // time + 1, 1), self.config.grid[1])

    def output_lengths(self, lengths: Tensor) -> Tensor:
        """Number of frames -> number of columns of patches; any shape."""
        time, size = self.config.steps[0], self.config.patch_size
        return ((lengths - size + time - 1) // time + 1).clamp(min=1, max=self.config.grid[1])

    def output_mask(self, mask: Tensor | None) -> Tensor | None:
        """Mask of frames (B, T) -> of patches (B, rows * columns)."""
        if mask is None:
            return None
        columns = torch.arange(self.columns(mask.shape[1]), device=mask.device)
        return (columns < self.output_lengths(mask.sum(dim=1))[:, None]).repeat(1, self.config.grid[0])

    def adapt(self, source: "AST") -> list[str]:
        """Interpolate the source's positions to this network's clips and mel bins."""
        (rows, columns), old, new = source.config.grid, source.config, self.config
        source.resize(new)
        changed = [] if (rows, columns) == new.grid else [f"positions {rows}x{columns} to {new.grid[0]}x{new.grid[1]}"]
        return changed + ([] if old.steps == new.steps else [f"stride {old.steps} to {new.steps}"])

    @torch.no_grad()
    def resize(self, size: ASTConfig) -> None:
        """Take the frames, mel bins and stride of another configuration, in place.

        Positions keep their time: for shorter clips the first ones stay. Longer clips and other mel bins get
        interpolated ones.
        """
        config = replace(self.config, num_mels=size.num_mels, max_frames=size.max_frames, stride=size.stride)
        same_time = replace(config, max_frames=self.config.max_frames).grid
        rows, columns = config.grid
        positions = resize_positions(self.pos_embed, self.config.grid, (rows, max(columns, same_time[1])))
        positions = positions.unflatten(1, (rows, -1))[:, :, :columns].flatten(1, 2)
        self.pos_embed = nn.Parameter(positions, requires_grad=self.pos_embed.requires_grad)
        self.patch_embed.steps = config.steps
        self.config = config

    @classmethod
    @torch.no_grad()
    def from_images(cls, source: ViT, config: ASTConfig) -> Self:
        """An AST that begins with the weights of a network for images, as in arXiv:2104.01778.

        A spectrogram is seen as a grey image: the weights of the patches' channels are added up. Positions are
        interpolated, and the distillation token begins as the class token. The head stays untrained.

        Args:
            source: a trained network.
            config: shape of the AST; its trunk becomes that of the source.

        Raises:
            TrunklineError: if the source has patches of another size, or norms its tokens.
        """
        images = source.config
        if images.patch_size != config.patch_size or images.embed_norm:
            what = "norms its tokens" if images.embed_norm else f"has patch_size={images.patch_size}"
            raise TrunklineError(
                f"an AST with patch_size={config.patch_size} cannot start from a ViT that {what}; give a ViT without "
                "embed_norm, and make the sizes of the patches equal",
                "model.network.patch_size",
            )
        network = cls(replace(config, backbone=images.backbone))
        network.backbone.load_state_dict(source.backbone.state_dict())
        projection = source.patch_embed.proj
        network.patch_embed.proj.weight.copy_(projection.weight.unflatten(1, (images.in_chans, -1)).sum(dim=1))
        if projection.bias is None:
            network.patch_embed.proj.bias.zero_()
        else:
            network.patch_embed.proj.bias.copy_(projection.bias)
        for token in (network.cls_token, network.dist_token):
            if token is not None and source.cls_token is not None:
                token.copy_(source.cls_token)
                if source.prefix_pos is not None:  # the class token is the first; here its position is part of it
                    token.add_(source.prefix_pos[:, :1])
        if network.prefix_pos is not None:
            network.prefix_pos.zero_()
        if source.pos_embed is None:
            network.pos_embed.zero_()
        else:
            network.pos_embed.copy_(resize_positions(source.pos_embed, source.patch_embed.grid, config.grid))
        return network

    # --- from frames to classes

    def embed(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, T, M) and a mask (B, T) -> (B, P + rows * columns, D) embeddings for the trunk.

        Raises:
            TrunklineError: if the features have another number of mel bins, or more frames than `max_frames`.
        """
        check_frames(features, self.config.num_mels, self.config.max_frames)
        columns = self.columns(features.shape[1])
        seen = torch.arange(columns, device=features.device)  # an export would take the end of a slice for fixed
        positions = self.pos_embed.unflatten(1, self.config.grid).index_select(2, seen).flatten(1, 2)
        x = self.patch_embed(zero_padding(features, mask), columns) + positions
        tokens: list[Tensor] = [t for t in (self.cls_token, self.dist_token) if t is not None]
        if self.prefix_pos is not None:
            prefix, count = torch.cat(tokens, dim=1), self.config.prefix_positions
            tokens = [prefix[:, :count] + self.prefix_pos, prefix[:, count:]]
        tokens = [t.expand(x.shape[0], -1, -1) for t in tokens]
        return self.dropout(torch.cat((*tokens, x), dim=1) if tokens else x)

    def token_mask(self, mask: Tensor | None) -> Tensor | None:
        """Mask of frames (B, T) -> of all tokens (B, P + rows * columns)."""
        patches = self.output_mask(mask)
        return None if patches is None else F.pad(patches, (self.num_prefix_tokens, 0), value=True)

    def forward_features(
        self,
        features: Tensor,
        mask: Tensor | None = None,
        return_attention: bool = False,
        layers: Collection[int] = (),
    ) -> ASTFeatures:
        """States after the trunk.

        Args:
            features: (B, T, M) log-mel frames.
            mask: (B, T) bool, False for padding, which is on the right; None also where the network is to hear the
                padding, as it was trained in the paper.
            return_attention: also return the attention weights.
            layers: blocks after which the states are also returned.

        Raises:
            TrunklineError: if the features have another number of mel bins, or more frames than `max_frames`.
        """
        x = self.embed(features, mask)
        options: dict[str, Any] = {"return_attention": return_attention, "layers": layers}
        out = self.backbone(x, causal=False, mask=self.token_mask(mask), **options)
        split = self.num_prefix_tokens
        return ASTFeatures(out.x[:, :split], out.x[:, split:], self.output_mask(mask), out.attention, out.states)

    def forward_intermediates(  # type: ignore[override]
        self,
        features: Tensor,
        mask: Tensor | None = None,
        indices: Indices = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        output_fmt: Literal["NCHW", "NLC"] = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """As `ViT.forward_intermediates`, for sounds; `features` and `mask` are those of `forward_features`."""
        out, states = states_of(self.backbone, partial(self.forward_features, features, mask), indices, norm)
        rows = self.config.grid[0]
        return patch_intermediates(out, states, rows, output_fmt, return_prefix_tokens, intermediates_only)

    def forward_head(self, features: ASTFeatures, pre_logits: bool = False) -> Tensor:
        """States -> (B, K) logits, or with `pre_logits` the pooled (B, D) features."""
        if self.config.pool != "mean":
            pooled = features.prefix.mean(dim=1)
        elif features.mask is None:
            pooled = features.patches.mean(dim=1)
        else:
            total = zero_padding(features.patches, features.mask).sum(dim=1)
            pooled = total / features.mask.sum(dim=1, keepdim=True)
        return pooled if pre_logits else self.head(self.head_norm(pooled))

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, T, M) -> (B, K) logits; arguments as for `forward_features`."""
        if self.config.pool == "mean":
            return self.forward_head(self.forward_features(features, mask))
        keep = slice(0, self.num_prefix_tokens)  # the last block computes only the tokens that the head reads
        x = self.backbone(self.embed(features, mask), causal=False, mask=self.token_mask(mask), keep=keep).x
        return self.head(self.head_norm(x.mean(dim=1)))
