"""What the image networks of other libraries have in common: patches as a convolution, one table of positions."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trunkline import TrunklineError
from trunkline.modules.networks.convert.key_tables import KeyTable, from_theirs, to_theirs
from trunkline.modules.networks.patches import sincos_positions_2d
from trunkline.modules.networks.vit import ViTConfig

OUR_VIT = "a ViT"


class VitNames(NamedTuple):
    """Where another library keeps the weights of a Vision Transformer; `place` stands before our names."""

    family: str
    """Name of the family, for messages."""
    table: KeyTable
    """Our names of the layers -> theirs."""
    patches: str
    """Their convolution over the patches."""
    positions: str
    """Their table of positions, of the tokens before the patches too."""
    tokens: Mapping[str, str]
    """Our names of single tensors, such as the class token -> theirs."""
    place: str = ""
    """What our names begin with, such as `image.` in a CLIP."""
    ours: str = OUR_VIT
    """Our network, for messages."""

    def weights_from(self, weights: dict[str, Tensor], config: ViTConfig) -> dict[str, Tensor]:
        """Their state dict -> ours. Weights are taken out of theirs, as by `from_theirs`.

        Raises:
            TrunklineError: for a weight that a `ViT` does not have.
        """
        projection = f"{self.patches}.weight"
        if projection in weights:
            weights[projection] = weights[projection].flatten(1)  # it is a convolution there
        single = {ours: weights.pop(theirs) for ours, theirs in self.tokens.items() if theirs in weights}
        positions = weights.pop(self.positions, None)
        converted = from_theirs(weights, self.table, self.family, self.ours)
        for ours, value in single.items():
            flat = ours.endswith("mask_token")
            converted[ours] = value if flat else value.reshape((1,) * (3 - value.ndim) + value.shape)
        if positions is not None and config.positions == "learned":
            positions = positions.reshape(1, *positions.shape[-2:])
            split = config.prefix_positions
            if split:
                converted[f"{self.place}prefix_pos"] = positions[:, :split]
            converted[f"{self.place}pos_embed"] = positions[:, split:]
        return converted

    def weights_to(
        self,
        weights: Mapping[str, Tensor],
        config: ViTConfig,
        shapes: Mapping[str, int] | None = None,
        prefix: int = 0,
    ) -> dict[str, Tensor]:
        """Our state dict -> theirs.

        Args:
            weights: our state dict.
            config: our configuration.
            shapes: number of dimensions of single tensors, by their name, where it is not 3.
            prefix: number of the tokens before the patches, from the first, that have a position there. Where ours have
                none, it is zero; computed positions of patches are written as learned ones.

        Raises:
            TrunklineError: for a weight that theirs does not have.
        """
        single = {*self.tokens, f"{self.place}prefix_pos", f"{self.place}pos_embed"}
        own = {name: value for name, value in weights.items() if name not in single}
        converted = to_theirs(own, self.table, self.family, self.ours, kinds=("weight", "bias", "gamma"))
        projection = f"{self.patches}.weight"
        side = config.patch_size
        converted[projection] = converted[projection].unflatten(1, (config.in_chans, side, side))
        for ours, theirs in self.tokens.items():
            if ours in weights:
                value = weights[ours]
                wanted = (shapes or {}).get(theirs, value.ndim)
                converted[theirs] = value.reshape(value.shape[value.ndim - wanted :]).clone()
        if config.positions != "none":
            dim, grid = config.backbone.dim, [pixels // side for pixels in config.size]
            of_patches = weights.get(f"{self.place}pos_embed")
            if of_patches is None:
                of_patches = sincos_positions_2d((grid[0], grid[1]), dim)[None].to(converted[projection])
            of_tokens = [weights[name] for name in (f"{self.place}prefix_pos",) if name in weights]
            zeros = of_patches.new_zeros(1, max(0, prefix - config.prefix_positions), dim)
            positions = torch.cat((*of_tokens, zeros, of_patches), dim=1)
            wanted = (shapes or {}).get(self.positions, 3)
            converted[self.positions] = positions.reshape(positions.shape[3 - wanted :]).clone()
        return converted


def with_learned_positions(config: ViTConfig, prefix: int) -> ViTConfig:
    """What `VitNames.weights_to` writes: a `ViT` with the same results whose positions are learned ones.

    Args:
        config: of the network.
        prefix: number of the tokens before the patches that have a position there.
    """
    kind = "learned" if config.positions == "sincos2d" else config.positions
    wanted = max(config.prefix_positions, min(prefix, tokens_before(config)))
    return replace(config, positions=kind, prefix_positions=wanted)


def tokens_before(config: ViTConfig) -> int:
    """Number of tokens before the patches: class token and registers."""
    return ("cls" in config.pool) + config.num_registers


def ratio_of(hidden: int, dim: int) -> float:
    """The `mlp_ratio` of which other libraries make this hidden width: they round its product with `dim` down."""
    ratio = hidden / dim
    return ratio if int(dim * ratio) == hidden else math.nextafter(ratio, math.inf)


def one_side(value: Any, what: str, family: str) -> int:
    """The side of a square that a configuration gives as one number or two.

    Raises:
        TrunklineError: if the two differ.
    """
    sides = {int(side) for side in (value if isinstance(value, list | tuple) else [value])}
    if len(sides) > 1:
        raise TrunklineError(f"{family} with {what}={value} cannot be converted: the patches of {OUR_VIT} are square")
    return sides.pop()


def image_size(value: Any) -> int | tuple[int, int]:
    """The size of the images, as one number if they are square."""
    sides = tuple(int(side) for side in (value if isinstance(value, list | tuple) else (value, value)))
    return sides[0] if sides[0] == sides[1] else (sides[0], sides[1])


def tiling(image: Any, patch: Any, family: str) -> dict[str, Any]:
    """Fields of a `ViT` for images and patches of theirs; pixels that fill no patch are left out there.

    Args:
        image: one number for a square, or (height, width) in pixels.
        patch: one number, or two equal ones.
        family: name of the family, for messages.

    Raises:
        TrunklineError: if patches are not square.
    """
    size, side = image_size(image), one_side(patch, "patch_size", family)
    rest = any(pixels % side for pixels in (size if isinstance(size, tuple) else (size,)))
    return {"image_size": size, "patch_size": side, "drop_remainder": rest}
