"""A run's folder with events, written by hand."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

CLASSES = {"red": (200, 0, 0), "green": (0, 200, 0), "blue": (0, 0, 200)}
EACH = 8
"""Embeddings of each class."""


def write_scalars(folder: Path, curves: Mapping[str, Mapping[int, float]], started: int = 1) -> None:
    """Write values by tag and step into a file of events of its own, whose name tells when it was started."""
    with SummaryWriter(str(folder), filename_suffix=".new") as writer:
        for tag, line in curves.items():
            for step, value in line.items():
                writer.add_scalar(tag, value, step)
    (file,) = folder.glob("*.new")
    file.rename(folder / f"events.out.tfevents.{started:010d}.host")


def write_pictures(folder: Path, tag: str, *colours: tuple[int, int, int]) -> None:
    """Pictures of one colour each, at the steps 0, 1 and so on."""
    with SummaryWriter(str(folder)) as writer:
        for step, colour in enumerate(colours):
            writer.add_image(tag, np.full((4, 6, 3), colour, np.uint8), step, dataformats="HWC")


def class_vectors(seed: int = 0) -> torch.Tensor:
    """(3 * EACH, 5): a class has a direction of its own."""
    noise = torch.randn(3 * EACH, 5, generator=torch.Generator().manual_seed(seed))
    return torch.eye(5)[:3].repeat_interleave(EACH, dim=0) + 0.02 * noise


def add_embeddings(writer: SummaryWriter, tag: str, step: int = 0, pictures: bool = True, header: bool = False) -> None:
    """Embeddings of the three classes, with their names and maybe a picture in their colour."""
    names = [name for name in CLASSES for _ in range(EACH)]
    colours = torch.tensor([CLASSES[name] for name in names]) / 255
    shown: dict[str, Any] = {"metadata": names}
    if header:
        shown = {
            "metadata": [(name, f"text {n}") for n, name in enumerate(names)],
            "metadata_header": ["label", "text"],
        }
    if pictures:
        shown["label_img"] = colours[:, :, None, None].expand(-1, 3, 16, 16)
    writer.add_embedding(class_vectors(step), **shown, global_step=step, tag=tag)


def opened(file: Path) -> np.ndarray:
    """(H, W, 3) uint8."""
    return np.asarray(Image.open(file).convert("RGB"))
