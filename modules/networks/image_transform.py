"""A picture as a network's input, as in the evaluation of its training; imports nothing but torch."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from trunkline import TrunklineError

RESAMPLING = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}
"""Interpolation -> its number in PIL."""
TORCH_MODES: dict[str, dict[str, Any]] = {
    "nearest": {"mode": "nearest-exact"},
    "bilinear": {"mode": "bilinear", "antialias": True},
    "bicubic": {"mode": "bicubic", "antialias": True},
}
"""Interpolations that torch has -> its arguments."""
GREY = (0.299, 0.587, 0.114)
"""Shares of red, green and blue in the brightness, as PIL takes them."""


@dataclass(frozen=True)
class ImageTransform:
    """Picture -> (C, height, width) float32: resize, cut out the centre, normalise.

    A PIL image is resized by PIL, and becomes exactly what evaluation in training makes of it, except that evaluation
    decodes a JPEG of four times the size or more reduced. That, and resizing arrays and tensors by torch, differs by
    about a grey level of 255; no PIL is needed for them.

    Raises:
        TrunklineError: for a value that it cannot have.
    """

    image_size: tuple[int, int]
    """(height, width) of the result."""
    channels: int
    """1 (grey) or 3 (RGB)."""
    mean: tuple[float, ...]
    """Of each channel, of values from 0 to 1."""
    std: tuple[float, ...]
    interpolation: str
    """bilinear, bicubic, nearest, lanczos, box or hamming."""
    resize: tuple[int, int]
    """(height, width) to which the picture is resized before the centre is cut out: both sides at least, in the
    picture's own ratio."""
    squash: bool = False
    """Resize to exactly these sides, whatever the picture's ratio."""

    def __post_init__(self) -> None:
        for name in ("image_size", "resize", "mean", "std"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # lists in files
        if self.interpolation not in RESAMPLING:
            raise TrunklineError(f"interpolation={self.interpolation} is none of {', '.join(RESAMPLING)}")
        if self.channels not in (1, 3) or not len(self.mean) == len(self.std) == self.channels or not all(self.std):
            raise TrunklineError(
                f"pictures of {self.channels} channels with mean {self.mean} and deviation {self.std} cannot be made; "
                "there are 1 or 3, each with a mean, and a deviation that is not 0"
            )
        if len(self.image_size) != 2 or len(self.resize) != 2 or min(*self.image_size, *self.resize) < 1:
            raise TrunklineError(f"{self.image_size} and {self.resize} are no (height, width) of pictures")

    @classmethod
    def of_preprocessing(cls, settings: Mapping[str, Any]) -> Self:
        """The transform of evaluation, from what a checkpoint says about the pictures of its training.

        Args:
            settings: `image_size`, `channels`, `mean`, `std`, `interpolation` and `crop_pct`, as in a recipe's data.
        """
        size = settings["image_size"]
        sides = (size, size) if isinstance(size, int) else tuple(size)
        channels = settings["channels"]
        mean, std = (tuple(settings[name]) * (channels // len(settings[name])) for name in ("mean", "std"))
        resize = tuple(math.floor(side / settings["crop_pct"]) for side in sides)
        return cls(sides, channels, mean, std, settings["interpolation"], resize)

    def __call__(self, picture: Any) -> Tensor:
        """Prepare one picture.

        Args:
            picture: a PIL image of any mode; or an array (H, W) or (H, W, C) of 8-bit values; or a tensor (H, W) or
                (C, H, W) of 8-bit values, or of floats from 0 to 1. C is 1 or 3.

        Raises:
            TrunklineError: if it is nothing of these.
        """
        pixels = self._of_pil(picture) if hasattr(picture, "convert") else self._of_values(picture)
        pixels = centre(pixels, self.image_size)
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (pixels - 255 * mean) / (255 * std)

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) that a picture of this size is resized to."""
        if self.squash:
            return self.resize
        if self.resize[0] == self.resize[1]:  # the shorter side is exact, the longer is rounded down
            short = self.resize[0]
            return (short, int(short * width / height)) if height <= width else (int(short * height / width), short)
        ratio = min(height / self.resize[0], width / self.resize[1])
        return round(height / ratio), round(width / ratio)

    def _of_pil(self, picture: Any) -> Tensor:
        """(C, H, W) float32 from 0 to 255, resized."""
        picture = eight_bits(picture).convert("L" if self.channels == 1 else "RGB")
        height, width = self.resized(picture.height, picture.width)
        picture = picture.resize((width, height), RESAMPLING[self.interpolation])
        values = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
        return values.reshape(height, width, self.channels).permute(2, 0, 1).float()

    def _of_values(self, picture: Any) -> Tensor:
        """As `_of_pil`, of an array or a tensor."""
        values = picture if isinstance(picture, Tensor) else torch.tensor(picture)
        if values.ndim == 2:
            values = values[None]
        elif values.ndim == 3 and not isinstance(picture, Tensor):
            values = values.permute(2, 0, 1)
        known = values.dtype == torch.uint8 or (values.is_floating_point() and isinstance(picture, Tensor))
        if values.ndim != 3 or values.shape[0] not in (1, 3) or not known:
            raise TrunklineError(
                f"{tuple(values.shape)} values of type {values.dtype} are no picture; give a PIL image, an array "
                "(H, W) or (H, W, C) of uint8, or a tensor (C, H, W) of uint8 or of floats from 0 to 1"
            )
        if self.interpolation not in TORCH_MODES:
            raise TrunklineError(
                f"torch has no interpolation={self.interpolation}, which this network was trained with; give a PIL "
                "image"
            )
        whole = values.dtype == torch.uint8
        pixels = values.float() if whole else values.float() * 255
        if len(pixels) != self.channels:
            grey = (pixels * torch.tensor(GREY)[:, None, None]).sum(0, keepdim=True) if len(pixels) == 3 else pixels
            pixels = grey.expand(self.channels, -1, -1)
        size = self.resized(*pixels.shape[1:])
        if size != pixels.shape[1:]:
            pixels = F.interpolate(pixels[None], size, **TORCH_MODES[self.interpolation])[0].clamp(0, 255)
        return pixels.round() if whole else pixels


def eight_bits(picture: Any) -> Any:
    """A PIL image with 8 bits a channel: 16-bit grey is scaled, transparent pictures are drawn on white."""
    if picture.mode.startswith("I"):  # `convert` would clip it at 255
        values = torch.frombuffer(bytearray(picture.convert("I").tobytes()), dtype=torch.int32)
        scaled = (values.clamp(0, 65535).double() / 257).round().to(torch.uint8)
        picture = picture.convert("L")
        picture.frombytes(bytes(scaled.tolist()))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = picture.copy()
        white.paste((255, 255, 255, 255), (0, 0, *picture.size))
        white.alpha_composite(picture)
        return white
    return picture


def centre(pixels: Tensor, size: Sequence[int]) -> Tensor:
    """The centre (C, *size) of a picture (C, H, W); what lies outside of it is black."""
    for axis, side in ((1, size[0]), (2, size[1])):
        missing = max(0, side - pixels.shape[axis])
        padding = [missing // 2, (missing + 1) // 2]
        pixels = F.pad(pixels, padding if axis == 2 else [0, 0, *padding])
        pixels = pixels.narrow(axis, round((pixels.shape[axis] - side) / 2), side)
    return pixels
