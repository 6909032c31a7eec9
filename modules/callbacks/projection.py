"""What TensorBoard's projector shows, as a picture: embeddings in a plane, where like ones stand together."""

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from trunkline.modules.callbacks.drawing import LINE, colour_map
from trunkline.modules.callbacks.spectrograms import BLACK, COLUMN, letter_font

SIDE, MARGIN, DOT, FRAME = 900, 24, 8, 2
"""Pixels: side of the picture, its margin, side of a point without a thumbnail, and width of a thumbnail's frame."""
COVERED = 0.35
"""Share of the picture that thumbnails cover."""
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


def to_cells(places: np.ndarray, side: int) -> np.ndarray:
    """The cells (N, 2) of a board of `side` by `side` that are next to the places (N, 2) from 0 to 1.

    Each cell is used once, so that no thumbnail hides another one: whoever comes later gets the nearest that is free.
    """
    cells = np.stack(np.meshgrid(np.arange(side), np.arange(side)), axis=-1).reshape(-1, 2)
    free, found = np.ones(len(cells), bool), []
    for place in places * (side - 1):
        distances = np.where(free, ((cells - place) ** 2).sum(axis=1), np.inf)
        found.append(int(distances.argmin()))
        free[found[-1]] = False
    chosen: np.ndarray = cells[found]
    return chosen


def draw_projection(places: np.ndarray, labels: Sequence[str], thumbnails: Sequence[Image.Image]) -> Image.Image:
    """Draw thumbnails near their places, or points; a few labels have colours, and are listed below.

    Args:
        places: (N, 2) from 0 to 1.
        labels: of each row, or none.
        thumbnails: of each row, or none.
    """
    kinds = sorted(set(labels))
    colours = dict.fromkeys(kinds, BLACK)
    if len(kinds) <= MOST_COLOURS:
        shades = colour_map("tab20" if len(kinds) > 10 else "tab10")(range(len(kinds)), bytes=True)
        colours = {kind: (int(r), int(g), int(b)) for kind, (r, g, b, _) in zip(kinds, shades, strict=True)}
    legend = list(colours.items()) if 1 < len(kinds) <= MOST_COLOURS else []
    width = COLUMN * (3 + max((len(kind) for kind, _ in legend), default=0))
    across = max(1, (SIDE - 2 * MARGIN) // width)
    picture = Image.new("RGB", (SIDE, SIDE + (LINE + 4) * -(-len(legend) // across)), "white")
    draw = ImageDraw.Draw(picture)
    own = [colours[label] for label in labels] or [BLACK] * len(places)
    if thumbnails:
        side = math.ceil(math.sqrt(len(thumbnails) / COVERED))
        cell = SIDE // side
        for (column, row), tile, colour in zip(to_cells(places, side).tolist(), thumbnails, own, strict=True):
            left, top = column * cell, row * cell
            if legend:
                draw.rectangle((left, top, left + cell - 1, top + cell - 1), fill=colour)
            inside = ImageOps.contain(tile, (cell - 2 * FRAME, cell - 2 * FRAME))
            picture.paste(inside, (left + (cell - inside.width) // 2, top + (cell - inside.height) // 2))
    else:
        for (x, y), colour in zip((MARGIN + places * (SIDE - 2 * MARGIN)).tolist(), own, strict=True):
            draw.rectangle((x - DOT // 2, y - DOT // 2, x + DOT // 2 - 1, y + DOT // 2 - 1), fill=colour)
    for number, (kind, colour) in enumerate(legend):
        left, top = MARGIN + number % across * width, SIDE + (LINE + 4) * (number // across)
        draw.rectangle((left, top + 2, left + LINE - 4, top + LINE - 2), fill=colour)
        draw.text((left + LINE, top), kind, fill=BLACK, font=letter_font())
    return picture
