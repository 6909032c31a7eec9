"""Compute embeddings of many pictures and texts with an image classifier's network or a CLIP."""

import sys
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader

from trunkline import TrunklineError
from trunkline.datamodules.images.image_decoding import to_channels
from trunkline.datamodules.images.image_sources import FileRows, given_images
from trunkline.datamodules.images.preprocessing import Preprocessing, TransformedImages
from trunkline.datamodules.pairs.captions import CaptionEncoder
from trunkline.datamodules.pairs.emoji_pictures import OPENMOJI, TWEMOJI, EmojiPictures
from trunkline.datamodules.samplers import SampleKey, plain_errors
from trunkline.datamodules.skipping import first_names
from trunkline.modules.networks import CLIP, ViT
from trunkline.pipelines.trained import Trained


class PictureRows(Protocol):
    """Rows that have a picture each."""

    def image(self, row: int) -> Image.Image:
        """The decoded picture of a row, upright, in the mode of its file."""

    def name(self, row: int) -> str:
        """The row's file, or another name of the row."""


class ImageNetwork(NamedTuple):
    """A network for images, and how its inputs are prepared."""

    trunk: ViT
    """The image network, in evaluation mode."""
    preprocessing: Preprocessing
    clip: CLIP | None = None
    """The CLIP that contains `trunk`; None for a classifier, which cannot read texts."""
    encoder: CaptionEncoder | None = None
    """Prepares texts for `clip`; None for a classifier."""


def image_network(trained: Trained, device: torch.device) -> ImageNetwork:
    """The image network of a checkpoint, on a device.

    Raises:
        TrunklineError: if `evaluate` cannot use the checkpoint, or if it does not say how its inputs were prepared.
    """
    trained.require("evaluate")
    preprocessing = trained.preprocessing
    network: Any = trained.network.to(device)
    if not isinstance(network, CLIP):
        return ImageNetwork(network, preprocessing)
    return ImageNetwork(network.image, preprocessing, network, trained.encoder())


def clip_network(trained: Trained, device: torch.device) -> tuple[CLIP, Preprocessing, CaptionEncoder]:
    """The CLIP of a checkpoint in evaluation mode, and how its images and texts are prepared.

    Raises:
        TrunklineError: as in `image_network`, and also for a classifier.
    """
    found = image_network(trained, device)
    if found.clip is None or found.encoder is None:
        raise TrunklineError(
            f"{trained.file} is of {trained.objective}, which has no text tower; give a checkpoint of "
            "ContrastiveImageText"
        )
    return found.clip, found.preprocessing, found.encoder


class Pictures(TransformedImages):
    """The pictures of any rows, preprocessed as in evaluation; items as in the base class.

    Args:
        rows: the rows.
        length: number of rows.
        preprocessing: preprocessing of the network's inputs.
        skip_corrupt: give pictures that cannot be read `valid` False, instead of raising an error.
    """

    def __init__(self, rows: PictureRows, length: int, preprocessing: Preprocessing, skip_corrupt: bool) -> None:
        super().__init__(length, preprocessing, None, 0, skip_corrupt)
        self.rows = rows

    def read(self, row: int) -> dict[str, Any]:
        return {"image": to_channels(self.rows.image(row), self.preprocessing.channels)}


def open_pictures(images: str) -> tuple[PictureRows, int]:
    """One picture, all pictures below a folder, or all of `twemoji` or `openmoji`, and their number.

    Raises:
        TrunklineError: if the folder is missing or holds no pictures.
    """
    if images in (TWEMOJI, OPENMOJI):
        emoji = EmojiPictures(images, flags=False)  # as in training
        return emoji, len(emoji)
    files = given_images(images)
    return FileRows(files, np.zeros(len(files), np.int64)), len(files)


def progress_bar(batches: Any, description: str) -> Any:
    """Show a progress bar over the batches if the output is a terminal."""
    return track(batches, description, transient=True, disable=not sys.stdout.isatty())


@torch.inference_mode()
def embed_images(
    encode: Callable[[Tensor], Tensor], pictures: Pictures, batch_size: int, device: torch.device, num_workers: int = 0
) -> tuple[Tensor, list[int]]:
    """Embed pictures. Prints how many were skipped because they cannot be read.

    Args:
        encode: the network, (B, C, height, width) -> (B, E).
        pictures: the pictures.
        batch_size: number of pictures at a time.
        device: device of the network.
        num_workers: number of processes that read pictures.

    Returns:
        Embeddings (N, E) in float32 on the CPU, and the row of each picture; skipped pictures are left out.

    Raises:
        TrunklineError: for a picture that cannot be read.
    """
    keys: Any = [SampleKey(0, n) for n in range(len(pictures))]
    loader = DataLoader(pictures, batch_size, sampler=keys, num_workers=num_workers)
    found, rows = [], []
    with plain_errors(num_workers):
        for batch in progress_bar(loader, "embedding pictures"):
            valid = batch["valid"]
            found.append(encode(batch["image"].to(device))[valid.to(device)].float().cpu())
            rows += batch["index"][valid].tolist()
    if len(rows) < len(pictures):
        unread = [pictures.rows.name(row) for row in sorted(set(range(len(pictures))) - set(rows))]
        print(f"skipped {len(unread)} of {len(pictures)} pictures, which cannot be read: {first_names(unread)}")
    return torch.cat(found), rows


@torch.inference_mode()
def embed_texts(
    network: CLIP, encoder: CaptionEncoder, texts: list[str], batch_size: int, device: torch.device
) -> Tensor:
    """Embed texts: (M, E) float32 of length 1 on the CPU. Prints how many texts were cut."""
    found, cut = [], 0
    for start in progress_bar(range(0, len(texts), batch_size), "embedding texts"):
        tokens, mask, truncated = encoder.encode(texts[start : start + batch_size])
        found.append(network.encode_text(tokens.to(device), mask.to(device)).float().cpu())
        cut += int(truncated.sum())
    if cut:
        print(f"{cut} of {len(texts)} texts were cut to {encoder.max_length} tokens, as in training")
    return torch.cat(found)


def pooled(trunk: ViT) -> Callable[[Tensor], Tensor]:
    """A function from images to pooled features (B, D), which are the inputs of the ViT's head."""
    return lambda image: trunk.forward_head(trunk.forward_features(image), pre_logits=True)
