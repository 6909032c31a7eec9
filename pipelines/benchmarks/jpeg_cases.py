"""Case of `trunkline benchmark`: large JPEG files as input of a network, decoded no larger than their crops need."""

import io
import random
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image

from trunkline.datamodules.images.image_decoding import open_image
from trunkline.datamodules.images.preprocessing import Augmentation, Preprocessing
from trunkline.pipelines.benchmarks.timing import Side, compare

JPEG_SIZES = ((500, 375), (2000, 1500), (4000, 3000))
"""(width, height): usual in ImageNet, and of cameras."""
INPUT = 224
CROPS = 4
"""Crops of a picture in one measurement."""


def picture(width: int, height: int) -> bytes:
    """A JPEG whose frequencies fall off as in photographs, so that it is as large a file as these."""
    draw = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = np.inf
    spectrum = draw.standard_normal((3, *frequency.shape)) + 1j * draw.standard_normal((3, *frequency.shape))
    values = np.fft.irfft2(spectrum / frequency, (height, width))
    pixels = (128 + 50 * values / values.std()).clip(0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels.transpose(1, 2, 0)).save(file, "JPEG", quality=90)
    return file.getvalue()


def decoded_whole(file: bytes, name: str) -> Image.Image:
    """The picture, decoded at its full size."""
    image = open_image(file, name)
    image.load()
    return image


def inputs(opened: Callable[[bytes, str], Image.Image], file: bytes, transform: Any, count: int) -> Side:
    """Prepare the picture `count` times, with the same crops in each measurement."""

    def run() -> float:
        random.seed(0)
        torch.manual_seed(0)
        start = time.perf_counter()
        for _ in range(count):
            transform(opened(file, "the picture"))
        return (time.perf_counter() - start) / count

    return run


def jpeg_input(rounds: int, batch_size: int | None) -> list[dict[str, Any]]:
    """From a JPEG file to the input of a network, in training (random crops) and in evaluation."""
    usual = Preprocessing(INPUT, 3, mean=(0.5,), std=(0.5,), interpolation="bicubic", crop_pct=0.9)
    transforms = {"training": usual.training(Augmentation()), "evaluation": usual.evaluation()}
    rows = []
    for width, height in JPEG_SIZES:
        file = picture(width, height)
        for name, transform in transforms.items():
            ours, theirs = (
                inputs(opened, file, transform, batch_size or CROPS) for opened in (open_image, decoded_whole)
            )
            rows.append(compare(f"JPEG of {width} x {height}, {name}", "decoded whole", ours, theirs, rounds))
    return rows
