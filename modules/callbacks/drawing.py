"""Pictures for TensorBoard, drawn with Pillow: cheap enough for every validation."""

from collections.abc import Sequence

import lightning as L
import numpy as np
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image, ImageDraw
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

GREEN, RED = (0, 150, 60), (220, 30, 30)


def tensorboard(trainer: L.Trainer) -> SummaryWriter | None:
    """The writer of this process, or None where TensorBoard is off or another process writes."""
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
            return logger.experiment
    return None


def to_pictures(images: Tensor, trainer: L.Trainer, side: int) -> list[Image.Image]:
    """Normalised (B, C, height, width) images -> RGB pictures whose longer side is `side` pixels."""
    preprocessing = getattr(getattr(trainer, "datamodule", None), "preprocessing", None)
    images = images.detach().float().cpu()
    if preprocessing is not None:
        mean, std = (images.new_tensor(v).reshape(-1, 1, 1) for v in (preprocessing.mean, preprocessing.std))
        images = images * std + mean
    pixels = (images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    if pixels.shape[-1] != 3:  # grey, or more channels than a screen has: the first one
        pixels = np.repeat(pixels[..., :1], 3, axis=-1)
    scale = side / max(pixels.shape[1:3])
    size = (round(pixels.shape[2] * scale), round(pixels.shape[1] * scale))
    return [Image.fromarray(p).resize(size, Image.Resampling.NEAREST) for p in pixels]


def captioned(picture: Image.Image, caption: str, colour: tuple[int, int, int]) -> Image.Image:
    """The picture in a coloured frame, with a line of text below it."""
    frame, line = 3, 14
    tile = Image.new("RGB", (picture.width + 2 * frame, picture.height + 2 * frame + line), "white")
    draw = ImageDraw.Draw(tile)
    draw.rectangle((0, 0, tile.width - 1, picture.height + 2 * frame - 1), fill=colour)
    tile.paste(picture, (frame, frame))
    draw.text((frame, picture.height + 2 * frame + 1), caption, fill=colour)
    return tile


def grid(tiles: Sequence[Image.Image], columns: int) -> np.ndarray:
    """Pictures of one size in rows, as (height, width, 3) bytes."""
    width, height = tiles[0].size
    sheet = Image.new("RGB", (columns * width, -(-len(tiles) // columns) * height), "white")
    for i, tile in enumerate(tiles):
        sheet.paste(tile, (i % columns * width, i // columns * height))
    return np.asarray(sheet)
