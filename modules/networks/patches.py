"""Image patches as embeddings (B, T, D), and their positions."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trunkline import TrunklineError
from trunkline.modules.backbone.transformer import init_linear
from trunkline.modules.networks.positions import sincos


class PatchEmbed(nn.Module):
    """Cuts an image into square patches and projects each to a token (ViT, arXiv:2010.11929).

    This is the same as a convolution whose stride is its kernel size; its flattened weight is the weight of `proj`.

    Args:
        image_size: (height, width) in pixels.
        patch_size: side of a patch in pixels; must divide both, but for `drop_remainder`.
        in_chans: channels C of the image.
        dim: width D of a token.
        bias: whether the projection has a bias.
        drop_remainder: leave out the last rows and columns of pixels that fill no patch.

    Raises:
        TrunklineError: if the patch does not tile the image.
    """

    def __init__(
        self,
        image_size: tuple[int, int],
        patch_size: int,
        in_chans: int,
        dim: int,
        bias: bool = True,
        drop_remainder: bool = False,
    ) -> None:
        super().__init__()
        if any((side % patch_size and not drop_remainder) or side < patch_size for side in image_size):
            raise TrunklineError(
                f"patch_size={patch_size} does not divide image_size={image_size[0]}x{image_size[1]}; "
                "set patch_size to a divisor of both sides, or image_size to a multiple of patch_size"
            )
        self.image_size, self.patch_size, self.in_chans = image_size, patch_size, in_chans
        self.grid = (image_size[0] // patch_size, image_size[1] // patch_size)
        self.proj = nn.Linear(in_chans * patch_size**2, dim, bias=bias)
        init_linear(self.proj)

    def forward(self, image: Tensor) -> Tensor:
        """(B, C, height, width) -> (B, T, D), row by row.

        Raises:
            TrunklineError: if the images do not have the network's size or channels.
        """
        shape = (self.in_chans, *self.image_size)
        if image.shape[1:] != shape:
            raise TrunklineError(
                f"the network takes images of shape (B, {', '.join(map(str, shape))}), but got {tuple(image.shape)}; "
                "make image_size and in_chans of the network and of the data the same"
            )
        batch, p = image.shape[0], self.patch_size
        image = image[..., : self.grid[0] * p, : self.grid[1] * p]
        tiles = image.reshape(batch, self.in_chans, self.grid[0], p, self.grid[1], p)
        tiles = tiles.permute(0, 2, 4, 1, 3, 5)  # (B, rows, columns, C, p, p)
        return self.proj(tiles.reshape(batch, self.grid[0] * self.grid[1], -1))


def resize_patches(weight: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """The weight of a patch embedding for patches of another size or images of other channels.

    Another size follows FlexiViT (arXiv:2212.08013): a patch that is enlarged (bicubic, antialiased) gives the token
    that it gave before. For one channel the weights of all channels are added up; for more, they are repeated and
    scaled, so that an image whose channels are equal gives the token that it gave before.

    Args:
        weight: (D, channels * side * side).
        old: (channels, side) of the weight.
        new: (channels, side) wanted.

    Returns:
        (D, channels * side * side).
    """
    (channels, side), (new_channels, new_side) = old, new
    kernel = weight.float().reshape(-1, channels, side**2)
    if new_channels == 1:
        kernel = kernel.sum(dim=1, keepdim=True)
    elif new_channels != channels:
        kernel = kernel[:, torch.arange(new_channels) % channels] * (channels / new_channels)
    if new_side != side:
        unit = torch.eye(side**2, device=weight.device).reshape(side**2, 1, side, side)
        enlarged = F.interpolate(unit, size=(new_side, new_side), mode="bicubic", antialias=True).flatten(1)
        kernel = kernel @ torch.linalg.pinv(enlarged).mT
    return kernel.flatten(1).to(weight.dtype)


def sincos_positions_2d(grid: tuple[int, int], dim: int, theta: float = 10_000.0) -> Tensor:
    """Positions (rows * columns, dim) of a grid, half of the width for x and half for y (arXiv:2205.01580).

    Raises:
        TrunklineError: if `dim` is not a multiple of 4.
    """
    if dim % 4:
        raise TrunklineError(f"2-D sin-cos positions need a dim that is a multiple of 4, not {dim}")
    # On the CPU also where a network is built without memory, on PyTorch's meta device: they are values, not weights.
    frequency = theta ** -torch.linspace(0, 1, dim // 4, device="cpu")
    y, x = torch.meshgrid(*(torch.arange(n, dtype=torch.float32, device="cpu") for n in grid), indexing="ij")
    return torch.cat((sincos(x.flatten(), frequency), sincos(y.flatten(), frequency)), dim=1)


def resize_positions(positions: Tensor, old: tuple[int, int], new: tuple[int, int], antialias: bool = True) -> Tensor:
    """Interpolate positions (1, rows * columns, D) from one patch grid to another (bicubic, usually antialiased)."""
    if old == new:
        return positions
    dim, dtype = positions.shape[-1], positions.dtype
    image = positions.float().reshape(1, *old, dim).permute(0, 3, 1, 2)  # (1, D, rows, columns)
    image = F.interpolate(image, size=new, mode="bicubic", antialias=antialias)
    return image.permute(0, 2, 3, 1).reshape(1, math.prod(new), dim).to(dtype)
