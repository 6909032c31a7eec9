"""Pictures of sounds: spectrograms, what is said at which frames, and where a transcript is wrong.

Time goes to the right. Drawn with Pillow, in a few milliseconds a clip. Shape legend: T frames, M mel bins, N tokens.
"""

from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from trunkline.modules.callbacks.drawing import GREY, LINE, RED, colour_map

BLACK, PALE, PINK = (0, 0, 0), (225, 230, 235), (255, 205, 205)
COLUMN = 7
"""Pixels: width of a letter in the font of transcripts, in which all letters are equally wide."""
HEIGHT = 90
"""Pixels: about the height of a spectrogram."""
STEPS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
"""Seconds between two marks of a time axis: the smallest that leaves room for the numbers."""


class Mark(NamedTuple):
    """A token at its frames."""

    text: str
    start: int
    """First frame."""
    end: int
    """The frame after the last one."""
    wrong: bool = False


@cache
def letter_font() -> ImageFont.FreeTypeFont:
    """A font for transcripts, which comes with matplotlib and has the European alphabets."""
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSansMono.ttf", 11)


def heard_frames(features: Tensor, mask: Tensor | None) -> Tensor:
    """The frames (t, M) of a clip without its padding.

    Args:
        features: (T, M).
        mask: (T,) bool, False for padding; without it, padding is what equals the last frame, of which one is kept.
    """
    if mask is not None:
        return features[mask]
    different = (features != features[-1]).any(dim=1).nonzero()
    return features[: int(different.max()) + 2 if len(different) else 1]


def coloured(values: Tensor, size: tuple[int, int], colours: str = "magma") -> Image.Image:
    """Draw a table (rows, columns) of numbers from 0 to 1, (width, height) pixels large, in a map of matplotlib's."""
    pixels = colour_map(colours)(values.numpy(), bytes=True)[..., :3]
    return Image.fromarray(np.ascontiguousarray(pixels)).resize(size, Image.Resampling.NEAREST)


def spectrogram(features: Tensor, scale: int = 1) -> Image.Image:
    """Draw frames (T, M), each `scale` pixels wide: low frequencies at the bottom, loud ones bright.

    The height is the multiple of M that is next to `HEIGHT`. The lowest twentieth of the numbers is black,
    because the logarithm of silence can be anywhere.
    """
    values = features.detach().float().cpu().T.flip(0)  # (M, T)
    low, high = values.quantile(0.05), values.max()
    values = (values - low) / (high - low).clamp(min=1e-6)
    bins, frames = values.shape
    return coloured(values.clamp(0, 1), (frames * scale, bins * max(1, round(HEIGHT / bins))))


def sound_picture(features: Tensor, mask: Tensor | None, size: tuple[int, int]) -> Image.Image:
    """The spectrogram of a clip (T, M) without its padding, (width, height) pixels large."""
    return spectrogram(heard_frames(features, mask)).resize(size, Image.Resampling.BOX)


def with_starts(picture: Image.Image, marks: Sequence[Mark], scale: int) -> Image.Image:
    """The picture with a white line at the first frame of each mark."""
    picture = picture.copy()
    draw = ImageDraw.Draw(picture)
    for mark in marks:
        draw.line((mark.start * scale, 0, mark.start * scale, picture.height), fill="white")
    return picture


def lane(marks: Sequence[Mark], width: int, scale: int) -> Image.Image:
    """Draw tokens at their frames, wrong ones in red; a text is cut off where the next one begins."""
    picture = Image.new("RGB", (width, LINE), "white")
    draw = ImageDraw.Draw(picture)
    starts = [mark.start * scale for mark in marks] + [width]
    for mark in marks:
        draw.rectangle((mark.start * scale, 0, mark.end * scale - 1, LINE - 1), fill=PINK if mark.wrong else PALE)
    for mark, (start, end) in zip(marks, pairwise(starts), strict=True):
        text = mark.text[: max(1, (end - start) // COLUMN)]
        draw.text((start, 0), text, fill=RED if mark.wrong else BLACK, font=letter_font())
    return picture


def time_axis(frames: int, frame_seconds: float, scale: int) -> Image.Image:
    """Draw a scale of seconds."""
    second, width = scale / frame_seconds, frames * scale
    step = next((step for step in STEPS if step * second >= 6 * COLUMN), STEPS[-1])
    picture = Image.new("RGB", (width, LINE), "white")
    draw = ImageDraw.Draw(picture)
    for number in range(int(width / (step * second)) + 1):
        at = round(number * step * second)
        draw.line((at, 0, at, 3), fill=GREY)
        text = f"{number * step:g} s"
        if at + 2 + COLUMN * len(text) <= width:
            draw.text((at + 2, 0), text, fill=GREY, font=letter_font())
    return picture


def compared(pairs: Sequence[tuple[str | None, str | None]], width: int, most: int = 3) -> Image.Image:
    """Draw a reference and, below it, a hypothesis, letter under letter; what differs is red.

    Args:
        pairs: letters of (hypothesis, reference); None is a gap, drawn as a dot.
        width: pixels of a line; longer texts are wrapped.
        most: number of wrapped lines of each text; the rest is cut off.
    """
    room = max(1, width // COLUMN - 4)
    parts = [pairs[start : start + room] for start in range(0, len(pairs), room)][:most] or [pairs]
    picture = Image.new("RGB", (width, 2 * LINE * len(parts)), "white")
    draw = ImageDraw.Draw(picture)
    for number, part in enumerate(parts):
        for side, title in ((1, "ref"), (0, "hyp")):
            top = LINE * (2 * number + 1 - side)
            draw.text((0, top), title, fill=GREY, font=letter_font())
            for place, pair in enumerate(part):
                colour = BLACK if pair[0] == pair[1] else RED
                draw.text((COLUMN * (4 + place), top), pair[side] or "·", fill=colour, font=letter_font())
    return picture


def attended(weights: Tensor, names: Sequence[str], width: int, margin: int) -> Image.Image:
    """Draw weights over time (N, T), a line of pixels for each token, its name to the left; each line has a maximum.

    Args:
        weights: of each token, 0 or more.
        names: of the tokens.
        width: pixels of the time axis.
        margin: pixels of the names.
    """
    picture = Image.new("RGB", (margin + width, LINE * len(names)), "white")
    draw = ImageDraw.Draw(picture)
    for number, name in enumerate(names):
        draw.text((0, LINE * number), name[: margin // COLUMN], fill=BLACK, font=letter_font())
    shares = weights / weights.amax(dim=1, keepdim=True).clamp(min=1e-12)
    picture.paste(coloured(shares, (width, picture.height), "viridis"), (margin, 0))
    return picture


def stacked(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures below each other, on white; all begin at the left."""
    sheet = Image.new("RGB", (max(p.width for p in pictures), sum(p.height for p in pictures)), "white")
    top = 0
    for picture in pictures:
        sheet.paste(picture, (0, top))
        top += picture.height
    return sheet
