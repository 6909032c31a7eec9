"""Embeddings of many pictures and texts, by the network of an image classifier or of a CLIP."""

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
from trunkline.datamodules.images.image_sources import FileRows, image_files, to_channels
from trunkline.datamodules.images.preprocessing import Preprocessing, TransformedImages
from trunkline.datamodules.pairs.captions import CaptionEncoder
from trunkline.datamodules.pairs.emoji_pictures import OPENMOJI, TWEMOJI, EmojiPictures
from trunkline.datamodules.samplers import SampleKey, plain_errors
from trunkline.modules.networks import CLIP, ViT
from trunkline.pipelines.trained import Trained


class PictureRows(Protocol):
    """What all rows with a picture have."""

    def image(self, row: int) -> Image.Image:
        """The decoded picture of a row, upright, in its file's own mode."""

    def name(self, row: int) -> str:
        """File or row."""


class ImageNetwork(NamedTuple):
    """A network that sees images, and how its inputs are prepared."""

    trunk: ViT
    """In evaluation mode."""
    preprocessing: Preprocessing
    clip: CLIP | None = None
    """With `trunk` inside; None: a classifier, which knows no texts."""
    encoder: CaptionEncoder | None = None
    """Of the texts, if `clip` is there."""


def image_network(trained: Trained, device: torch.device) -> ImageNetwork:
    """The network of a checkpoint that suits `evaluate`, on a device.

    Raises:
        TrunklineError: if the checkpoint is of another objective, or does not say how its inputs were prepared.
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
        TrunklineError: see `image_network`; for a classifier too.
    """
    found = image_network(trained, device)
    if found.clip is None or found.encoder is None:
        raise TrunklineError(
            f"{trained.file} is of {trained.objective}, which knows no texts; give a checkpoint of ContrastiveImageText"
        )
    return found.clip, found.preprocessing, found.encoder


class Pictures(TransformedImages):
    """Pictures of any rows as a network sees them in evaluation; items as in the base class.

    Args:
        rows: have the pictures.
        length: how many.
        preprocessing: of the network.
        skip_corrupt: mark those that cannot be read as not valid, instead of stopping.
    """

    def __init__(self, rows: PictureRows, length: int, preprocessing: Preprocessing, skip_corrupt: bool) -> None:
        super().__init__(length, preprocessing, None, 0, skip_corrupt)
        self.rows = rows

    def read(self, row: int) -> dict[str, Any]:
        """An item without its transform."""
        return {"image": to_channels(self.rows.image(row), self.preprocessing.channels)}


def open_pictures(images: str) -> tuple[PictureRows, int]:
    """All pictures below a folder, or of `twemoji` or `openmoji`, and how many they are.

    Raises:
        TrunklineError: if the folder is missing or holds none.
    """
    if images in (TWEMOJI, OPENMOJI):
        emoji = EmojiPictures(images, flags=False)  # as in training
        return emoji, len(emoji)
    files = image_files(images)
    return FileRows(files, np.zeros(len(files), np.int64)), len(files)


def progress_bar(batches: Any, description: str) -> Any:
    """The batches, with a bar where a person looks on."""
    return track(batches, description, transient=True, disable=not sys.stdout.isatty())


@torch.inference_mode()
def embed_images(
    encode: Callable[[Tensor], Tensor], pictures: Pictures, batch_size: int, device: torch.device, num_workers: int = 0
) -> tuple[Tensor, list[int]]:
    """What a network makes of pictures.

    Args:
        encode: (B, C, height, width) -> (B, E).
        pictures: those.
        batch_size: pictures at a time.
        device: of the network.
        num_workers: processes that read pictures.

    Returns:
        (N, E) float32 on the CPU, and the row of each: all but those that are skipped, which are counted in print.

    Raises:
        TrunklineError: for a picture that cannot be read.
    """
    keys: Any = [SampleKey(0, n) for n in range(len(pictures))]
    loader = DataLoader(pictures, batch_size, sampler=keys, num_workers=num_workers)
    found, rows = [], []
    with plain_errors(num_workers):
        for batch in progress_bar(loader, "looking at pictures"):
            valid = batch["valid"]
            found.append(encode(batch["image"].to(device))[valid.to(device)].float().cpu())
            rows += batch["index"][valid].tolist()
    if len(rows) < len(pictures):
        print(f"skipped {len(pictures) - len(rows)} of {len(pictures)} pictures, which cannot be read")
    return torch.cat(found), rows


@torch.inference_mode()
def embed_texts(
    network: CLIP, encoder: CaptionEncoder, texts: list[str], batch_size: int, device: torch.device
) -> Tensor:
    """(M, E) float32 of length 1 on the CPU; texts that lose their end are counted in print."""
    found, cut = [], 0
    for start in progress_bar(range(0, len(texts), batch_size), "reading texts"):
        tokens, mask, truncated = encoder.encode(texts[start : start + batch_size])
        found.append(network.encode_text(tokens.to(device), mask.to(device)).float().cpu())
        cut += int(truncated.sum())
    if cut:
        print(f"{cut} of {len(texts)} texts were cut to {encoder.max_length} tokens, as in training")
    return torch.cat(found)


def pooled(trunk: ViT) -> Callable[[Tensor], Tensor]:
    """Images -> the (B, D) features that the head of a ViT reads."""
    return lambda image: trunk.forward_head(trunk.forward_features(image), pre_logits=True)
