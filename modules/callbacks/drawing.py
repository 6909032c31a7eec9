"""Helpers of the TensorBoard callbacks. Pictures are drawn with Pillow, which is fast enough for every validation."""

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import lightning as L
import numpy as np
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image, ImageDraw
from torch import Tensor

from trunkline import TrunklineError
from trunkline.contract import DataFacts
from trunkline.modules.objectives.checks import facts_of

if TYPE_CHECKING:  # these take most of a second to import, and a run that draws nothing yet starts without them
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure
    from torch.utils.tensorboard import SummaryWriter

GREEN, RED, GREY = (0, 150, 60), (220, 30, 30), (90, 90, 90)
LINE, LETTER = 14, 6
"""Pixels: height of a line, and average width of a letter."""


def tensorboard(trainer: L.Trainer) -> "SummaryWriter | None":
    """TensorBoard's writer; None if TensorBoard is off, or in all processes but the first."""
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
            return logger.experiment
    return None


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure of matplotlib's, in inches; it belongs to no window."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def colour_map(name: str) -> "Colormap":
    """A map of matplotlib's from numbers between 0 and 1 to colours."""
    import matplotlib

    return matplotlib.colormaps[name]


def tokenizer_of(trainer: L.Trainer, callback: Callback) -> Any:
    """The data's tokenizer.

    Raises:
        TrunklineError: if the data has none.
    """
    tokenizer = facts_of(trainer).tokenizer
    if tokenizer is None:
        raise TrunklineError(f"{type(callback).__name__} needs a datamodule with a tokenizer, such as TextData")
    return tokenizer


def to_pictures(images: Tensor, trainer: L.Trainer, side: int) -> list[Image.Image]:
    """Normalised (B, C, height, width) images -> RGB pictures whose longer side is `side` pixels."""
    facts, images = facts_of(trainer), images.detach().float().cpu()
    if facts.mean is not None and facts.std is not None:
        mean, std = (images.new_tensor(v).reshape(-1, 1, 1) for v in (facts.mean, facts.std))
        images = images * std + mean
    pixels = (images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    if pixels.shape[-1] != 3:  # show the first channel in grey
        pixels = np.repeat(pixels[..., :1], 3, axis=-1)
    scale = side / max(pixels.shape[1:3])
    size = (round(pixels.shape[2] * scale), round(pixels.shape[1] * scale))
    filters = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.BOX
    return [Image.fromarray(p).resize(size, filters) for p in pixels]


def wrapped(text: str, width: int, lines: int) -> str:
    """Wrap a text to exactly `lines` lines of about `width` pixels; what does not fit is cut off."""
    found = textwrap.wrap(text, max(width // LETTER, 2), max_lines=lines, placeholder="…")
    return "\n".join([*found, *[""] * (lines - len(found))])


def written(text: str, size: tuple[int, int]) -> Image.Image:
    """Draw a text on a white picture of `size`, (width, height) in pixels."""
    picture = Image.new("RGB", size, "white")
    ImageDraw.Draw(picture).text((2, 2), wrapped(text, size[0] - 4, size[1] // LINE), fill="black")
    return picture


def captioned(picture: Image.Image, caption: str, colour: tuple[int, int, int]) -> Image.Image:
    """Put a picture into a coloured frame, with the lines of the caption below."""
    frame, text = 3, LINE * (1 + caption.count("\n"))
    tile = Image.new("RGB", (picture.width + 2 * frame, picture.height + 2 * frame + text), "white")
    draw = ImageDraw.Draw(tile)
    draw.rectangle((0, 0, tile.width - 1, picture.height + 2 * frame - 1), fill=colour)
    tile.paste(picture, (frame, frame))
    draw.text((frame, picture.height + 2 * frame + 1), caption, fill=colour)
    return tile


def grid(tiles: Sequence[Image.Image], columns: int) -> np.ndarray:
    """Arrange pictures of equal size in rows, as an array (height, width, 3) of bytes."""
    width, height = tiles[0].size
    sheet = Image.new("RGB", (columns * width, -(-len(tiles) // columns) * height), "white")
    for i, tile in enumerate(tiles):
        sheet.paste(tile, (i % columns * width, i // columns * height))
    return np.asarray(sheet)


def play(writer: "SummaryWriter", rows: Sequence[int], facts: DataFacts, step: int) -> None:
    """Write the sound of some rows of the validation split (`val/audio/<row>`), if the data tells it."""
    if facts.waveform is None or facts.sample_rate is None:
        return
    for row in rows:
        writer.add_audio(f"val/audio/{row}", facts.waveform("val", row).clamp(-1, 1), step, facts.sample_rate)
