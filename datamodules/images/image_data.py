"""Labelled images for classification."""

import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import Compose, v2

from trunkline import TrunklineError
from trunkline.datamodules.base import TrunklineDataModule, preserved_generators, seed_generators
from trunkline.datamodules.images.image_sources import (
    ImageRows,
    ImageTable,
    Subset,
    load_image_table,
    open_image,
    to_channels,
)
from trunkline.datamodules.samplers import SampleKey
from trunkline.datamodules.splits import rows_by_class

Transform = Callable[[Any], Tensor]


@dataclass
class Augmentation:
    """Random changes to a training image, in the order listed; the defaults change nothing but the crop."""

    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Share of the area that a random crop takes ("Inception crop"); (1, 1) resizes the whole image."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Aspect ratio of the crop."""
    hflip: float = 0.0
    """Probability of a mirror image."""
    rotate: float = 0.0
    """Largest rotation in degrees."""
    translate: float = 0.0
    """Largest shift as a share of each side."""
    zoom: float = 0.0
    """Largest change of size as a share."""
    fill: float = 0.0
    """Brightness, from 0 black to 1 white, of what the last three move into the picture."""
    colour: float = 0.0
    """Largest change of brightness, contrast and saturation as a share."""
    rand_augment: str | None = None
    """timm's policy string for RandAugment, such as `rand-m10-n2-inc1`."""
    erasing: float = 0.0
    """Probability of erasing a random rectangle (arXiv:1708.04896), after normalisation."""


@dataclass
class Preprocessing:
    """How a picture becomes the network's input; a checkpoint keeps it, so that `predict` does the same.

    Raises:
        TrunklineError: for channels other than 1 and 3, or means and deviations of another number; one counts for all.
    """

    image_size: int | tuple[int, int]
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop_pct: float

    def __post_init__(self) -> None:
        if self.channels not in (1, 3):
            raise TrunklineError(f"--data.channels must be 1 (grey) or 3 (RGB), not {self.channels}")
        for flag, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, self.channels):
                raise TrunklineError(f"--data.{flag} has {len(values)} values for {self.channels} channel(s)")
            setattr(self, flag, tuple(values) * (self.channels // len(values)))

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)."""
        return (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size

    def evaluation(self) -> Transform:
        """Resize, centre crop, normalise."""
        from timm.data import create_transform

        resize_and_crop = create_transform(**self._common(), is_training=False, crop_pct=self.crop_pct).transforms[:-2]
        return Compose([*resize_and_crop, self.normalise])

    def training(self, augmentation: Augmentation) -> Transform:
        """Random crop and the other augmentations, normalise."""
        from timm.data import create_transform

        crop_and_flip, policy, (_, _, *erasing) = (
            stage.transforms
            for stage in create_transform(
                **self._common(),
                is_training=True,
                scale=augmentation.crop_scale,
                ratio=augmentation.crop_ratio,
                hflip=augmentation.hflip,
                color_jitter=augmentation.colour or None,  # type: ignore[arg-type]
                auto_augment=augmentation.rand_augment,
                re_prob=augmentation.erasing,
                re_mode="pixel",
                separate=True,
            )
        )
        if augmentation.crop_scale == (1.0, 1.0):  # timm's crop would still choose a ratio
            crop_and_flip[0] = v2.Resize(self.size, v2.InterpolationMode(self.interpolation))
        if augmentation.rotate or augmentation.translate or augmentation.zoom:
            affine = v2.RandomAffine(
                augmentation.rotate,
                translate=(augmentation.translate,) * 2,
                scale=(1 - augmentation.zoom, 1 + augmentation.zoom),
                interpolation=v2.InterpolationMode.BILINEAR,
                fill=round(255 * augmentation.fill),
            )
            crop_and_flip.append(affine)
        return Compose([*crop_and_flip, *policy, self.normalise, *erasing])

    def normalise(self, image: Image.Image) -> Tensor:
        """8-bit picture -> (C, height, width) float32: what timm's two last steps do, at a tenth of their time."""
        pixels = np.asarray(image).reshape(image.height, image.width, self.channels).transpose(2, 0, 1)
        result = pixels.astype(np.float32, order="C")
        result -= self._mean
        result /= self._std
        return torch.from_numpy(result)

    @cached_property
    def _mean(self) -> np.ndarray:
        """(C, 1, 1) float32 of 0..255."""
        return 255 * np.asarray(self.mean, dtype=np.float32)[:, None, None]

    @cached_property
    def _std(self) -> np.ndarray:
        return 255 * np.asarray(self.std, dtype=np.float32)[:, None, None]

    def _common(self) -> dict[str, Any]:
        return {
            "input_size": (self.channels, *self.size),
            "interpolation": self.interpolation,
            "mean": self.mean,
            "std": self.std,
        }


class TransformedImages(Dataset[dict[str, Any]]):
    """Base of rows with a picture. An item is a pure function of (seed, epoch, index).

    Items: what `read` returns, its `image` transformed to (C, height, width) float32; `index`, `valid` (False: a filler
    or a skipped row, not to be counted), `skipped` (1 if the row could not be read).

    Args:
        length: number of rows.
        preprocessing: of the pictures.
        augmentation: random changes in training; None is evaluation.
        seed: of everything random in training.
        skip_corrupt: replace rows that cannot be read by the next one, instead of stopping.
    """

    def __init__(
        self,
        length: int,
        preprocessing: Preprocessing,
        augmentation: Augmentation | None,
        seed: int,
        skip_corrupt: bool,
    ) -> None:
        self.length, self.preprocessing, self.skip_corrupt = length, preprocessing, skip_corrupt
        self.seed = None if augmentation is None else seed
        self.transform = preprocessing.training(augmentation) if augmentation else preprocessing.evaluation()

    def __len__(self) -> int:
        """Number of rows."""
        return self.length

    def read(self, row: int) -> dict[str, Any]:
        """`image`, the picture in the network's channels, and what else there is.

        In training the global generators are seeded for the item.

        Raises:
            TrunklineError: if the row cannot be read.
        """
        raise NotImplementedError

    def __getitem__(self, key: SampleKey) -> dict[str, Any]:
        """The item of a key.

        Raises:
            TrunklineError: if the row cannot be read and `skip_corrupt` is off.
        """
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: list[SampleKey]) -> list[dict[str, Any]]:
        """The items of a batch, which is what a DataLoader asks for."""
        with preserved_generators():
            return [self._item(key) for key in keys]

    def _item(self, key: SampleKey) -> dict[str, Any]:
        row, skipped = key.index, 0
        if self.seed is not None:
            seed_generators(self.seed, key.epoch, key.index)
        while True:
            try:
                item = self.read(row)
                break
            except TrunklineError as error:
                if not self.skip_corrupt or skipped >= len(self):
                    raise
                # The next row stands in, so that every process keeps its batch size.
                warnings.warn(f"skipped: {error}", stacklevel=2)
                row, skipped = (row + 1) % len(self), skipped + 1
        return item | {
            "image": self.transform(item["image"]),
            "index": key.index,
            # A stand-in is fine to learn from, but counting it twice would bend a metric.
            "valid": key.valid and not (skipped and self.seed is None),
            "skipped": int(skipped > 0 and key.valid),
        }


class LabelledImages(TransformedImages):
    """Transformed rows with their `label`."""

    def __init__(self, rows: ImageRows, *options: Any) -> None:
        super().__init__(len(rows.labels), *options)
        self.rows = rows

    def read(self, row: int) -> dict[str, Any]:
        """See `TransformedImages`."""
        image = to_channels(self.rows.image(row), self.preprocessing.channels)
        return {"image": image, "label": int(self.rows.labels[row])}


class ImageFiles(Dataset[dict[str, Any]]):
    """Image files without labels, in the given order. Items: `image`, `index`, `valid`."""

    def __init__(self, files: list[Path], preprocessing: Preprocessing) -> None:
        self.files, self.preprocessing, self.transform = files, preprocessing, preprocessing.evaluation()

    def __len__(self) -> int:
        """Number of files."""
        return len(self.files)

    def __getitem__(self, key: SampleKey) -> dict[str, Any]:
        """The item of a key."""
        file = self.files[key.index]
        image = to_channels(open_image(file, str(file)), self.preprocessing.channels)
        return {"image": self.transform(image), "index": key.index, "valid": key.valid}


class ImageData(TrunklineDataModule):
    """Labelled images from the offline digits, local files or a hub name.

    Batches: `image` (B, C, height, width) float32, `label` (B,) int64, `index` (B,) row numbers,
    `valid` (B,) bool, `skipped` (B,) int64; see `LabelledImages`.

    Args:
        source: `digits`, an image folder (a sub-folder a class, optionally below train/ val/ test/), a
            Parquet or Arrow file or folder, or a Hugging Face hub name.
        image_column: column of a table that holds the images.
        label_column: column that holds class numbers or names.
        train_split: the source's name of the training split; None finds `train`.
        val_split: the same for validation; None finds the usual names, else takes `val_fraction`.
        test_split: the same for testing; None finds the usual names, else takes `test_fraction`.
        val_fraction: share of the training rows set aside, stratified by class, if the source has no such split.
        test_fraction: the same for testing.
        split_seed: of those two.
        image_size: pixels that the network takes: one side, or (height, width).
        channels: 1 (grey) or 3 (RGB).
        mean: of each channel, subtracted after scaling to 0..1.
        std: of each channel, divided by.
        interpolation: bilinear, bicubic, nearest or lanczos.
        crop_pct: side of the centre crop in evaluation, as a share of the resized image.
        augmentation: random changes to training images.
        skip_corrupt: replace unreadable images by the next row and count them, instead of stopping.
        cache_dir: where `datasets` keeps what it converts.
        batch_size: see `TrunklineDataModule`, as the next three.
        eval_batch_size: see there.
        num_workers: see there.
        seed: see there.
    """

    def __init__(
        self,
        source: str = "digits",
        image_column: str = "image",
        label_column: str = "label",
        train_split: str | None = None,
        val_split: str | None = None,
        test_split: str | None = None,
        val_fraction: float = 0.1,
        test_fraction: float = 0.2,
        split_seed: int = 0,
        image_size: int | tuple[int, int] = 224,
        channels: int = 3,
        mean: tuple[float, ...] = (0.5,),
        std: tuple[float, ...] = (0.5,),
        interpolation: str = "bicubic",
        crop_pct: float = 1.0,
        augmentation: Augmentation | None = None,
        skip_corrupt: bool = False,
        cache_dir: str | None = None,
        batch_size: int = 64,
        eval_batch_size: int | None = None,
        num_workers: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, num_workers, seed)
        self.preprocessing = Preprocessing(image_size, channels, mean, std, interpolation, crop_pct)
        self.augmentation = augmentation or Augmentation()
        self.source, self.columns = source, (image_column, label_column)
        self.split_names = {"train": train_split, "val": val_split, "test": test_split}
        self.fractions = {"test": test_fraction, "val": val_fraction}
        self.split_seed, self.skip_corrupt, self.cache_dir = split_seed, skip_corrupt, cache_dir
        self.in_memory = source == "digits"
        self.class_names: list[str] = []
        """Known after `setup`."""

    def prepare_data(self) -> None:
        """Download or convert once, before the other processes look."""
        self._load()

    def setup(self, stage: str) -> None:
        """Read the source and make the splits."""
        if self.datasets:
            return
        table = self._load()
        self.class_names = table.class_names
        for split, rows in carve_splits(table.splits, self.fractions, self.split_seed).items():
            augmentation = self.augmentation if split == "train" else None
            self.datasets[split] = LabelledImages(rows, self.preprocessing, augmentation, self.seed, self.skip_corrupt)

    def _load(self) -> ImageTable:
        return load_image_table(self.source, *self.columns, self.split_names, self.cache_dir)

    def state_dict(self) -> dict[str, Any]:
        """What `predict` needs to know of the data, as plain values."""
        return {"preprocessing": asdict(self.preprocessing), "class_names": self.class_names}


def carve_splits(splits: dict[str, ImageRows], fractions: dict[str, float], seed: int) -> dict[str, ImageRows]:
    """Set stratified shares of the training rows aside for splits that the source does not have; see `rows_by_class`.

    Raises:
        TrunklineError: if a class is too small to be in both parts.
    """
    missing = {split: share for split, share in fractions.items() if share and split not in splits}
    if not missing:
        return splits
    rows = splits["train"]
    taken = rows_by_class(rows.labels, missing, seed)
    return splits | {split: Subset(rows, numbers) for split, numbers in taken.items()}
