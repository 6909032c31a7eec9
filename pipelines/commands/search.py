"""`trunkline search`: find the pictures that a text describes best."""

import io
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image, ImageOps
from torch import Tensor

from trunkline import TrunklineError
from trunkline.datamodules.images.image_decoding import to_channels
from trunkline.datamodules.images.image_sources import FileRows
from trunkline.files import atomic_write
from trunkline.modules.callbacks.drawing import GREY, captioned, grid, wrapped
from trunkline.pipelines.commands.output import check_output
from trunkline.pipelines.devices import find_device
from trunkline.pipelines.embedding import (
    PictureRows,
    Pictures,
    clip_network,
    embed_images,
    embed_texts,
    open_pictures,
)
from trunkline.pipelines.trained import Trained
from trunkline.pipelines.translating import check_batch

TILE, COLUMNS = 160, 5
"""Contact sheet: side of a picture in pixels, and pictures per row."""
PICTURE_FORMATS = {".png": "PNG", ".jpg": "JPEG"}
"""Suffix of a sheet of pictures -> its format, as Pillow names it."""


def search(
    query: str,
    checkpoint: str,
    images: str | None = None,
    embeddings: str | None = None,
    count: int = 10,
    output: str = "matches.png",
    batch_size: int = 64,
    num_workers: int = 0,
    skip_corrupt: bool = False,
    device: str = "auto",
) -> None:
    """Print rank, cosine and path of the pictures that are most similar to a text, and save a contact sheet of them.

    Args:
        query: the text.
        checkpoint: a checkpoint of a CLIP, from `trunkline fit`.
        images: a folder, `twemoji` or `openmoji`.
        embeddings: a table of the pictures that `trunkline embed` wrote with the same checkpoint, which saves time.
        count: number of pictures shown.
        output: a .png or .jpg file for the contact sheet.
        batch_size: number of pictures at a time.
        num_workers: number of processes that read pictures.
        skip_corrupt: leave out pictures that cannot be read, instead of stopping.
        device: auto, cpu, cuda, cuda:1, mps, …

    Raises:
        TrunklineError: for a missing or damaged file, or a checkpoint that cannot be used.
    """
    suffix = check_output(output, tuple(PICTURE_FORMATS))
    if not query.strip():
        raise TrunklineError("--query is empty; say what to look for")
    check_batch(batch_size, num_workers)
    if count < 1:
        raise TrunklineError(f"--count must be at least 1, not {count}")
    if images is None and embeddings is None:
        raise TrunklineError("there is nothing to search; give --images, or --embeddings that `trunkline embed` wrote")
    place = find_device(device)
    network, preprocessing, encoder = clip_network(Trained.read(checkpoint, "search"), place)
    wanted = embed_texts(network, encoder, [query], batch_size, place)[0]
    if embeddings is not None:
        rows, vectors, kept = read_embeddings(embeddings, images, len(wanted))
    else:
        assert images is not None
        rows, length = open_pictures(images)
        pictures = Pictures(rows, length, preprocessing, skip_corrupt)
        vectors, kept = embed_images(network.encode_image, pictures, batch_size, place, num_workers)
    cosines, places = (vectors @ wanted).topk(min(count, len(kept)))
    best = [kept[n] for n in places.tolist()]
    sheet = contact_sheet(rows, best, cosines.tolist())
    for rank, (row, cosine) in enumerate(zip(best, cosines.tolist(), strict=True), start=1):
        print(f"{rank:>4}  {cosine:.4f}  {rows.name(row)}")
    picture = io.BytesIO()
    sheet.save(picture, PICTURE_FORMATS[suffix])
    atomic_write(Path(output), [picture.getbuffer()], field="output")
    print(f"wrote the {len(best)} best of {len(kept)} pictures to {output}")


def read_embeddings(file: str, images: str | None, numbers: int) -> tuple[PictureRows, Tensor, list[int]]:
    """Read pictures, their embeddings (N, E), and the row of each embedding among the pictures.

    Args:
        file: table with the embeddings.
        images: where the pictures are; None takes the paths in the table.
        numbers: the size E of an embedding.

    Raises:
        TrunklineError: if the table does not fit the checkpoint or the pictures.
    """
    try:
        table = pd.read_parquet(file)
    except (OSError, ValueError) as error:  # pyarrow raises them if the file is not Parquet
        raise TrunklineError(f"cannot read --embeddings {file}: {error}; write it with `trunkline embed`") from error
    missing = {"path", "embedding"} - set(table.columns)
    if missing:
        raise TrunklineError(
            f"--embeddings {file} has no column '{min(missing)}'; write it with `trunkline embed --images`"
        )
    table = table[table["path"].notna()]
    if not len(table):
        raise TrunklineError(f"--embeddings {file} has no picture; write it with `trunkline embed --images`")
    sizes = sorted({np.size(vector) for vector in table["embedding"]})
    if sizes != [numbers]:
        raise TrunklineError(
            f"--embeddings {file} has {' or '.join(map(str, sizes[:3]))} numbers a picture, but the checkpoint's "
            f"network makes {numbers}; write it with the same --checkpoint"
        )
    found, paths = torch.from_numpy(np.stack(table["embedding"].to_list())).float(), table["path"].tolist()
    if images is None:
        return FileRows([Path(path) for path in paths], np.zeros(len(paths), np.int64)), found, list(range(len(paths)))
    rows, length = open_pictures(images)
    number = {rows.name(row): row for row in range(length)}
    for path in paths:
        if path not in number:
            raise TrunklineError(f"--embeddings {file}: {path} is not among --images {images}; write the table again")
    return rows, found, [number[path] for path in paths]


def contact_sheet(rows: PictureRows, best: list[int], cosines: list[float]) -> Image.Image:
    """Pictures with rank, cosine and name below each."""
    tiles = []
    for rank, (row, cosine) in enumerate(zip(best, cosines, strict=True), start=1):
        picture = ImageOps.pad(to_channels(rows.image(row), 3), (TILE, TILE), color="white")
        caption = f"{rank}. {cosine:.3f}\n" + wrapped(Path(rows.name(row)).name, TILE, lines=2)
        tiles.append(captioned(picture, caption, GREY))
    return Image.fromarray(grid(tiles, min(COLUMNS, len(tiles))))
