"""How a picture becomes a network's input: augmentation in training, resizing and normalising."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from trunkline import TrunklineError
from trunkline.contract import DataFacts
from trunkline.datamodules.base import preserved_generators, seed_generators
from trunkline.datamodules.samplers import SampleKey
from trunkline.datamodules.skipping import Skipped
from trunkline.ranges import check_ranges, check_rising

Transform = Callable[[Any], Tensor]
INTERPOLATIONS = ("bilinear", "bicubic", "nearest", "lanczos", "box", "hamming")


POLICY_PART = re.compile(r"(m|n|w|p|d|b|inc|mstd|mmax)\d[\d.]*|mstdinf|t\w*")
"""A setting in timm's policy strings."""
AUGMENTATION = "data.augmentation"
"""Where a recipe has the augmentation, for messages."""


@dataclass
class Augmentation:
    """Random changes to a training image, in this order; by default only the random crop is on.

    Raises:
        TrunklineError: if a value is out of its range.
    """

    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Smallest and largest share of the area that a random crop ("Inception crop") keeps; (1, 1) resizes the whole
    image."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Smallest and largest aspect ratio of the crop."""
    hflip: float = 0.0
    """Probability of mirroring the image left to right."""
    rotate: float = 0.0
    """Largest rotation, in degrees."""
    translate: float = 0.0
    """Largest shift, as a share of each side."""
    zoom: float = 0.0
    """Largest change of size, as a share."""
    fill: float = 0.0
    """Brightness, from 0 (black) to 1 (white), of the areas that rotate, translate and zoom leave empty."""
    colour: float = 0.0
    """Largest change of brightness, contrast and saturation, as a share."""
    rand_augment: str | None = None
    """timm's policy string for RandAugment, such as `rand-m10-n2-inc1`."""
    erasing: float = 0.0
    """Probability of erasing a random rectangle (arXiv:1708.04896), after normalisation."""

    def __post_init__(self) -> None:
        shares = dict.fromkeys(("hflip", "translate", "fill", "colour", "erasing"), "[0, 1]")
        check_ranges(AUGMENTATION, self, crop_scale="(0, 1]", crop_ratio="(0, inf)", **shares)
        check_ranges(AUGMENTATION, self, rotate="[0, 180]", zoom="[0, 1)")
        check_rising(AUGMENTATION, self, "crop_scale", "crop_ratio")
        if self.rand_augment is not None:
            check_policy(self.rand_augment)


def check_policy(policy: str) -> None:
    """Check that timm knows a policy of RandAugment, AugMix or AutoAugment.

    Raises:
        TrunklineError: if not.
    """
    from timm.data.auto_augment import augment_and_mix_transform, auto_augment_transform, rand_augment_transform

    kind = policy.partition("-")[0]
    known = {"rand": rand_augment_transform, "augmix": augment_and_mix_transform}
    unread = [part for part in policy.split("-")[1:] if kind in known and not POLICY_PART.fullmatch(part)]
    try:
        known.get(kind, auto_augment_transform)(policy, {})
        if unread:  # timm passes over what it does not know
            raise ValueError(f"'{unread[0]}' is no setting")
    except Exception as error:  # a policy is read with assertions, conversions to numbers and look-ups in tables
        reason = f": {error}" if str(error) else ""
        raise TrunklineError(
            f"rand_augment={policy} is no policy that timm knows{reason}; give one such as rand-m9-mstd0.5",
            f"{AUGMENTATION}.rand_augment",
        ) from error


@dataclass
class Preprocessing:
    """How a picture becomes the network's input; a checkpoint keeps it, so that `predict` does the same.

    `mean` and `std` have one value for each channel, or one value for all channels.

    Raises:
        TrunklineError: if a value is out of its range, or if `mean` or `std` has a wrong number of values.
    """

    image_size: int | tuple[int, int]
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop_pct: float

    def __post_init__(self) -> None:
        check_ranges("data", self, image_size="[1, inf)", std="(0, inf)", crop_pct="(0, 1]")
        if self.interpolation not in INTERPOLATIONS:
            raise TrunklineError(
                f"interpolation={self.interpolation} is none of {', '.join(INTERPOLATIONS)}", field="data.interpolation"
            )
        if self.channels not in (1, 3):
            raise TrunklineError(f"channels must be 1 (grey) or 3 (RGB), not {self.channels}", field="data.channels")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, self.channels):
                raise TrunklineError(
                    f"{name} has {len(values)} values for {self.channels} channel(s)", field=f"data.{name}"
                )
            setattr(self, name, tuple(values) * (self.channels // len(values)))

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)."""
        return (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size

    def evaluation(self) -> Transform:
        """Transform for evaluation: resize, centre crop, normalise."""
        from timm.data import create_transform  # here, because timm and torchvision take a second to import
        from torchvision.transforms import Compose

        resize_and_crop = create_transform(**self._common(), is_training=False, crop_pct=self.crop_pct).transforms[:-2]
        return Compose([*resize_and_crop, self.normalise])

    def training(self, augmentation: Augmentation) -> Transform:
        """Transform for training: random crop, the other augmentations, normalise."""
        from timm.data import create_transform
        from torchvision.transforms import Compose, v2

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
        if augmentation.crop_scale == (1.0, 1.0):  # timm's crop would still change the aspect ratio
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
        """8-bit picture -> (C, height, width) float32: the same as timm's last two steps, in a tenth of the time."""
        pixels = np.asarray(image).reshape(image.height, image.width, self.channels).transpose(2, 0, 1)
        result = pixels.astype(np.float32, order="C")
        result -= self._mean
        result /= self._std
        return torch.from_numpy(result)

    @cached_property
    def _mean(self) -> np.ndarray:
        """(C, 1, 1) float32, for pixel values from 0 to 255."""
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


@dataclass(kw_only=True, eq=False, repr=False)
class ImageInput:
    """How pictures are prepared. A mixin of datamodules."""

    image_size: int | tuple[int, int] = 224
    """Size of the network's input in pixels: one side of a square, or (height, width)."""
    channels: int = 3
    """Channels of the network's input: 1 (grey) or 3 (RGB)."""
    mean: tuple[float, ...] = (0.5,)
    """Mean of each channel, or one for all, subtracted after scaling pixels to 0..1."""
    std: tuple[float, ...] = (0.5,)
    """Standard deviation of each channel, or one for all; pixels are divided by it after subtracting the mean."""
    interpolation: str = "bicubic"
    """How images are resized: bilinear, bicubic, nearest or lanczos."""
    crop_pct: float = 1.0
    """Side of the centre crop in evaluation, as a share of the resized image."""
    augmentation: Augmentation | None = None
    """Random changes to training images. None is only a random crop; of images with captions it keeps at least 60% of
    the area, because a caption describes the whole image."""
    skip_corrupt: bool = False
    """Replace a row that cannot be read by the next one and count it, instead of stopping with an error."""
    max_skipped: float = 0.1
    """With `skip_corrupt`, rows of an epoch that training may replace before the run stops: below 1 a share of the
    training rows, else a number."""

    usual_augmentation: ClassVar[Augmentation] = Augmentation()
    """The augmentation that is used for None."""

    @cached_property
    def preprocessing(self) -> Preprocessing:
        """Settings shared by training and evaluation; checkpoints keep them.

        Raises:
            TrunklineError: if the settings do not fit together.
        """
        return Preprocessing(self.image_size, self.channels, self.mean, self.std, self.interpolation, self.crop_pct)

    def image_options(self, split: str, seed: int) -> tuple[Preprocessing, Augmentation | None, int, bool]:
        """Arguments of `TransformedImages` for a split, except the length."""
        augmentation = (self.augmentation or self.usual_augmentation) if split == "train" else None
        return self.preprocessing, augmentation, seed, self.skip_corrupt

    def image_facts(self) -> DataFacts:
        """Size, channels, mean and deviation of the images."""
        settings = self.preprocessing
        return DataFacts(
            image_size=self.image_size,
            channels=self.channels,
            mean=settings.mean,
            std=settings.std,
            max_skipped=self.max_skipped if self.skip_corrupt else None,
        )


class TransformedImages(Dataset[dict[str, Any]]):
    """Base of datasets with pictures. An item is a pure function of (seed, epoch, index).

    Items: what `read` returns, with `image` transformed to (C, height, width) float32; `index`; `valid` (False if the
    row is not counted: a filler, or in evaluation a skipped row); `skipped` (1 if the row could not be read).

    Args:
        length: number of rows.
        preprocessing: how pictures are prepared.
        augmentation: random changes in training; None for evaluation.
        seed: seed of everything random in training.
        skip_corrupt: replace a row that cannot be read by the next one, instead of stopping.
    """

    def __init__(
        self,
        length: int,
        preprocessing: Preprocessing,
        augmentation: Augmentation | None,
        seed: int,
        skip_corrupt: bool,
    ) -> None:
        self.skipped = Skipped()
        self.length, self.preprocessing, self.skip_corrupt = length, preprocessing, skip_corrupt
        self.seed = None if augmentation is None else seed
        self.transform = preprocessing.training(augmentation) if augmentation else preprocessing.evaluation()

    def __len__(self) -> int:
        return self.length

    def read(self, row: int) -> dict[str, Any]:
        """The fields of a row. `image` is a picture with the channels of the network's input.

        In training the global generators are seeded for the item before this is called.

        Raises:
            TrunklineError: if the row cannot be read.
        """
        raise NotImplementedError

    def __getitem__(self, key: SampleKey) -> dict[str, Any]:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: list[SampleKey]) -> list[dict[str, Any]]:
        """The items of a batch, as a DataLoader asks for them.

        Raises:
            TrunklineError: if a row cannot be read and `skip_corrupt` is off.
        """
        with preserved_generators():
            return [self._item(key) for key in keys]

    def _transformed(self, key: SampleKey, row: int) -> dict[str, Any]:
        """A row, as the item of `key`; seeded here, because a JPEG can turn out broken after numbers were drawn."""
        if self.seed is not None:
            seed_generators(self.seed, key.epoch, key.index)
        item = self.read(row)
        return item | {"image": self.transform(item["image"])}

    def _item(self, key: SampleKey) -> dict[str, Any]:
        rows = len(self) if self.skip_corrupt else 1
        item, skipped = self.skipped.first_readable(partial(self._transformed, key), key.index, rows)
        return item | {
            "index": key.index,
            # Training can use the other row, but counting it twice would distort a metric.
            "valid": key.valid and not (skipped and self.seed is None),
            "skipped": int(skipped > 0 and key.valid),
        }
