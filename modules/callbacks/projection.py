"""What TensorBoard's projector shows, as a picture: embeddings in a plane, where like ones stand together."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from PIL import Image, ImageDraw

from trunkline.modules.callbacks.drawing import LINE
from trunkline.modules.callbacks.spectrograms import BLACK, COLUMN, letter_font

SIDE, MARGIN, DOT, FRAME = 900, 24, 8, 3
"""Pixels: side of the picture, its margin, side of a point without a thumbnail, and width of a thumbnail's frame."""
MOST_COLOURS = 20
"""With more labels than this, labels have no colours."""
CONFIG = "projector_config.pbtxt"


class Projected(NamedTuple):
    """Embeddings in TensorBoard's projector."""

    vectors: np.ndarray
    """(N, D)."""
    labels: list[str]
    """Of each row; empty without metadata."""
    thumbnails: list[Image.Image]
    """Of each row; empty without pictures."""


def read_projections(folder: Path) -> dict[str, Projected]:
    """All embeddings in a run's folder by their tag; of a tag with several steps, the last."""
    if not (folder / CONFIG).is_file():
        return {}
    from google.protobuf import text_format
    from tensorboard.plugins.projector.projector_config_pb2 import ProjectorConfig

    config = text_format.Parse((folder / CONFIG).read_text(encoding="utf-8"), ProjectorConfig())
    found = {}
    for part in config.embeddings:
        vectors = np.loadtxt(folder / part.tensor_path, delimiter="\t", ndmin=2)
        labels, thumbnails = [], []
        if part.metadata_path:
            with (folder / part.metadata_path).open(encoding="utf-8", newline="") as stream:
                rows = list(csv.reader(stream, delimiter="\t", quoting=csv.QUOTE_NONE))
            labels = [row[0] for row in rows[len(rows) - len(vectors) :]]  # without a header
        if part.sprite.image_path:
            width, height = part.sprite.single_image_dim
            with Image.open(folder / part.sprite.image_path) as sheet:
                columns = sheet.width // width
                corners = [(n % columns * width, n // columns * height) for n in range(len(vectors))]
                thumbnails = [sheet.convert("RGB").crop((x, y, x + width, y + height)) for x, y in corners]
        found[part.tensor_name.rpartition(":")[0]] = Projected(vectors, labels, thumbnails)
    return found


def in_plane(vectors: np.ndarray) -> np.ndarray:
    """Places (N, 2) from 0 to 1 of vectors (N, D), by t-SNE with the cosine distance, the same each time."""
    if len(vectors) < 3:
        return np.linspace(0, 1, len(vectors))[:, None].repeat(2, axis=1)
    from sklearn.manifold import TSNE

    perplexity = min(30, (len(vectors) - 1) / 3)
    places = TSNE(perplexity=perplexity, metric="cosine", init="random", random_state=0).fit_transform(vectors)
    low, high = places.min(axis=0), places.max(axis=0)
    found: np.ndarray = (places - low) / np.maximum(high - low, 1e-12)
    return found


def draw_projection(places: np.ndarray, labels: Sequence[str], thumbnails: Sequence[Image.Image]) -> Image.Image:
    """Draw thumbnails, or points, at their places; a few labels have colours, and are listed below.

    Args:
        places: (N, 2) from 0 to 1.
        labels: of each row, or none.
        thumbnails: of each row, or none.
    """
    kinds = sorted(set(labels))
    colours = dict.fromkeys(kinds, BLACK)
    if len(kinds) <= MOST_COLOURS:
        shades = matplotlib.colormaps["tab20" if len(kinds) > 10 else "tab10"](range(len(kinds)), bytes=True)
        colours = {kind: (int(r), int(g), int(b)) for kind, (r, g, b, _) in zip(kinds, shades, strict=True)}
    legend = list(colours.items()) if 1 < len(kinds) <= MOST_COLOURS else []
    cell = COLUMN * (3 + max((len(kind) for kind, _ in legend), default=0))
    across = max(1, (SIDE - 2 * MARGIN) // cell)
    picture = Image.new("RGB", (SIDE, SIDE + (LINE + 4) * -(-len(legend) // across)), "white")
    draw = ImageDraw.Draw(picture)
    for number, (x, y) in enumerate((MARGIN + places * (SIDE - 2 * MARGIN)).round().astype(int).tolist()):
        colour = colours[labels[number]] if labels else BLACK
        tile = thumbnails[number] if thumbnails else Image.new("RGB", (DOT, DOT), colour)
        left, top = x - tile.width // 2, y - tile.height // 2
        if thumbnails and legend:
            box = (left - FRAME, top - FRAME, left + tile.width + FRAME - 1, top + tile.height + FRAME - 1)
            draw.rectangle(box, fill=colour)
        picture.paste(tile, (left, top))
    for number, (kind, colour) in enumerate(legend):
        left, top = MARGIN + number % across * cell, SIDE + (LINE + 4) * (number // across)
        draw.rectangle((left, top + 2, left + LINE - 4, top + LINE - 2), fill=colour)
        draw.text((left + LINE, top), kind, fill=BLACK, font=letter_font())
    return picture
