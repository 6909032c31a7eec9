"""Image files as upright pictures with the channels of a network; a JPEG is decoded no larger than it is needed."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from math import ceil, floor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

from trunkline import TrunklineError

REDUCING_GAP = 2.0
"""A reduced picture keeps so many times the pixels of the result on each side, as in Pillow's `thumbnail`. With 2, few
grey levels differ from resizing the full picture; with 1, up to 45 of 255."""
TURNED = (5, 6, 7, 8)
"""EXIF orientations in which the stored rows are columns of the upright picture."""
MIRRORED = (2, 3, 6, 7), (3, 4, 7, 8)
"""Those whose upright picture begins, from the left and from the top, with the last pixels stored."""


class UndecodedJpeg(Image.Image):
    """An upright JPEG that is decoded when its pixels are asked for, and by `resize` no larger than the result needs.

    libjpeg can decode to a half, quarter or eighth of each side, in a fraction of the time. `crop` and `convert` are
    noted until then, so that torchvision's transforms draw their crops from the full size, as of any picture. Whatever
    else is done decodes the full size.

    Args:
        file: content or path of the file.
        name: name of the image, for messages.
        opened: the file as Pillow opened it, not decoded.

    Raises:
        TrunklineError: where it is decoded, if the file is cut short or unreadable.
    """

    file: bytes | str | Path | None = None
    """None once it is decoded."""

    def __init__(self, file: bytes | str | Path, name: str, opened: JpegImageFile) -> None:
        super().__init__()
        self.file, self.name = file, name
        self.orientation = opened.getexif().get(ExifTags.Base.Orientation, 1)
        self.full_size = opened.size[::-1] if self.orientation in TURNED else opened.size
        """(width, height), upright."""
        self._mode, self._size = opened.mode, self.full_size
        self.box: tuple[int, int, int, int] = (0, 0, *self.full_size)
        self.conversions: tuple[str, ...] = ()

    def load(self) -> Any:
        if self.file is not None:
            self._take(self._decode(self.full_size)[0])
        return super().load()

    def crop(self, box: tuple[float, float, float, float] | None = None) -> Image.Image:
        left, top, right, bottom = map(round, box or (0, 0, *self.size))
        if self.file is None or not (0 <= left < right <= self.width and 0 <= top < bottom <= self.height):
            return super().crop(box)
        x, y = self.box[:2]
        return self._noted(_size=(right - left, bottom - top), box=(x + left, y + top, x + right, y + bottom))

    def convert(self, mode: str | None = None, *args: Any, **kwargs: Any) -> Image.Image:
        if self.file is None or mode not in ("L", "RGB") or args or kwargs:
            return super().convert(mode, *args, **kwargs)
        return self._noted(_mode=mode, conversions=(*self.conversions, mode))

    def resize(self, size: Any, resample: int | None = None, *args: Any, **kwargs: Any) -> Image.Image:
        # the nearest pixel of a reduced picture would be a mean of several
        if self.file is None or resample == Image.Resampling.NEAREST or args or kwargs:
            return super().resize(size, resample, *args, **kwargs)
        width, height = (
            ceil(REDUCING_GAP * new * full / old)
            for new, full, old in zip(size, self.full_size, self.size, strict=True)
        )
        picture, reduction = self._decode((width, height))
        if reduction == 1:
            self._take(picture)
            return super().resize(size, resample)
        # sides are rounded up: of 2001 pixels, halved, the last is only half a pixel, or if mirrored the first
        starts = [
            small - full / reduction if self.orientation in mirrored else 0
            for small, full, mirrored in zip(picture.size, self.full_size, MIRRORED, strict=True)
        ]
        left, top, right, bottom = (start + edge / reduction for start, edge in zip(2 * starts, self.box, strict=True))
        x, y = floor(left), floor(top)
        part = picture.crop((x, y, ceil(right), ceil(bottom)))
        return part.resize(size, resample, (left - x, top - y, right - x, bottom - y))

    def _noted(self, **changes: Any) -> Image.Image:
        """The same file with other notes."""
        other = UndecodedJpeg.__new__(UndecodedJpeg)
        vars(other).update(vars(self), info={}, **changes)
        return other

    def _take(self, full: Image.Image) -> None:
        """Become what is noted of the decoded picture."""
        self.im, self.file = (full if self.size == full.size else full.crop(self.box)).im, None

    def _decode(self, least: tuple[int, int]) -> tuple[Image.Image, float]:
        """The whole picture of this (width, height) at least, upright and converted; and by how much it is reduced."""
        assert self.file is not None
        with readable(self.name), Image.open(readable_stream(self.file)) as image:
            width = image.width
            drafted = image.draft(None, least[::-1] if self.orientation in TURNED else least)
            reduction = width / drafted[1][2] if drafted else 1
            ImageOps.exif_transpose(image, in_place=True)
            picture: Image.Image = image
            for mode in self.conversions:
                picture = picture.convert(mode)
        return picture, reduction


@contextmanager
def readable(name: str) -> Iterator[None]:
    """Say which image cannot be read; decoders raise many kinds of errors for broken files."""
    try:
        yield
    except Exception as error:
        reason = "its format is unknown" if isinstance(error, UnidentifiedImageError) else error
        raise TrunklineError(
            f"cannot read the image {name}: {reason}; replace or remove it, or set skip_corrupt=true",
            field="data.skip_corrupt",
        ) from error


def readable_stream(file: bytes | str | Path) -> Any:
    """What Pillow opens: a path, or a file of this content."""
    return io.BytesIO(file) if isinstance(file, bytes) else file


def open_image(file: bytes | str | Path | None, name: str) -> Image.Image:
    """Open an image file, turned upright by its EXIF orientation; all but a JPEG is decoded.

    Args:
        file: content or path of the file; None is an empty cell of a table.
        name: name of the image, for the message.

    Raises:
        TrunklineError: if the file is missing, unreadable or cut short, or if the range of its pixel values is unknown;
            of a JPEG that is cut short only when its pixels are asked for.
    """
    with readable(name):
        if file is None:
            raise ValueError("the cell is empty")
        with Image.open(readable_stream(file)) as image:
            if isinstance(image, JpegImageFile):
                return UndecodedJpeg(file, name, image)
            image.load()
            if image.mode in ("F", "LAB"):
                raise ValueError(f"pixels of mode {image.mode} cannot be scaled to 8 bits")
            return ImageOps.exif_transpose(image)


def to_channels(image: Image.Image, channels: int) -> Image.Image:
    """Convert a picture to 8 bits and 1 (grey) or 3 (RGB) channels.

    Transparent pictures (with an alpha channel or a palette) are drawn on white; 16-bit grey is scaled to 8 bits.
    """
    if image.mode.startswith("I"):  # 16-bit grey: `convert` would clip it at 255
        image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    mode = "L" if channels == 1 else "RGB"
    return image if image.mode == mode else image.convert(mode)
