"""Pictures for a loaded network: what the evaluation in training makes of them, without timm and torchvision."""

from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from trunkline import TrunklineError
from trunkline.datamodules.images.image_decoding import to_channels
from trunkline.datamodules.images.preprocessing import Preprocessing
from trunkline.modules.networks.image_transform import ImageTransform


def picture(height: int, width: int, mode: str = "RGB") -> Image.Image:
    """Smooth and noisy at once, so that wrong places and wrong filters both show."""
    draw = np.random.default_rng(height * width)
    rows, columns = np.mgrid[:height, :width]
    waves = [np.sin(rows / a + columns / b) for a, b in ((9, 7), (5, 11), (8, 3), (6, 6))]
    values = (100 * np.stack(waves, -1) + 128 + draw.normal(0, 8, (height, width, 4))).clip(0, 255).astype(np.uint8)
    if mode == "I;16":
        return Image.fromarray(values[..., 0].astype(np.uint16) * 257 + 5)
    if mode == "P":
        return Image.fromarray(values[..., :3]).quantize(16)
    return Image.fromarray(values).convert(mode)


def settings(size: int | tuple[int, int] = 16, **changes: Any) -> Preprocessing:
    usual: dict[str, Any] = {"channels": 3, "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.25), "crop_pct": 0.9}
    return Preprocessing(size, **{**usual, "interpolation": "bicubic", **changes})


def transform_of(preprocessing: Preprocessing) -> ImageTransform:
    return ImageTransform.of_preprocessing(asdict(preprocessing))


@pytest.mark.parametrize(
    ("preprocessing", "size", "mode"),
    [
        (settings(), (20, 31), "RGB"),
        (settings(), (41, 23), "RGBA"),
        (settings(crop_pct=1.0, interpolation="bilinear"), (9, 7), "P"),
        (settings((12, 20)), (33, 21), "RGB"),
        (settings((12, 20), interpolation="lanczos"), (21, 90), "L"),
        (settings(channels=1, mean=(0.3,), std=(0.5,), interpolation="nearest"), (30, 19), "I;16"),
        (settings(channels=1, mean=(0.3,), std=(0.5,), interpolation="box"), (30, 19), "LA"),
    ],
)
def test_equal_to_the_evaluation_in_training(preprocessing: Preprocessing, size: tuple[int, int], mode: str) -> None:
    source = picture(*size, mode)
    want = preprocessing.evaluation()(to_channels(source, preprocessing.channels))
    found = transform_of(preprocessing)(source)
    assert found.dtype == torch.float32
    assert found.std() > 0.1
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "nearest"])
def test_arrays_and_tensors(interpolation: str) -> None:
    """Resized by torch: within two grey levels of 255, that is 2 / (255 * 0.2)."""
    source, transform = picture(40, 29), transform_of(settings(interpolation=interpolation))
    want, values = transform(source), np.asarray(source)
    tensor = torch.from_numpy(values.copy()).permute(2, 0, 1)
    of_array = transform(values)
    torch.testing.assert_close(of_array, want, rtol=0, atol=2.1 / (255 * 0.2))
    assert torch.equal(transform(tensor), of_array)
    torch.testing.assert_close(transform(tensor / 255), want, rtol=0, atol=2.1 / (255 * 0.2))


def test_channels_of_arrays() -> None:
    grey = transform_of(settings(channels=1, mean=(0.0,), std=(1.0,), interpolation="bilinear"))
    colour = transform_of(settings(mean=(0.0,) * 3, std=(1.0,) * 3, interpolation="bilinear"))
    values = np.asarray(picture(30, 30))
    torch.testing.assert_close(grey(values), grey(picture(30, 30)), rtol=0, atol=2.1 / 255)
    one = np.asarray(picture(30, 30).convert("L"))
    assert torch.equal(colour(one), colour(one[..., None]))
    assert torch.equal(colour(one)[0], colour(one)[2])


def test_small_pictures_of_the_size_asked_for_stay() -> None:
    values = np.asarray(picture(16, 16))
    transform = transform_of(settings(crop_pct=1.0, mean=(0.0,) * 3, std=(1.0,) * 3))
    assert torch.equal((transform(values) * 255).round().byte().permute(1, 2, 0), torch.from_numpy(values.copy()))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (np.zeros((4, 4, 2), np.uint8), r"\(2, 4, 4\) values of type torch.uint8 are no picture; give a PIL"),
        (np.zeros((4, 4, 3)), "type torch.float64 are no picture"),
        (torch.zeros(2, 3, 4, 4), r"\(2, 3, 4, 4\) values"),
        (torch.zeros(3, 4, 4, dtype=torch.int64), "type torch.int64 are no picture"),
    ],
)
def test_what_is_no_picture(given: Any, message: str) -> None:
    with pytest.raises(TrunklineError, match=message):
        transform_of(settings())(given)
    with pytest.raises(TrunklineError, match="torch has no interpolation=lanczos"):
        transform_of(settings(interpolation="lanczos"))(np.zeros((4, 4, 3), np.uint8))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"interpolation": "cubic"}, "interpolation=cubic is none of nearest"),
        ({"channels": 2}, "pictures of 2 channels"),
        ({"std": (1.0, 0.0, 1.0)}, "a deviation that is not 0"),
        ({"resize": (0, 4)}, r"\(0, 4\) are no \(height, width\)"),
    ],
)
def test_settings_out_of_range(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TrunklineError, match=message):
        ImageTransform(**{**asdict(transform_of(settings())), **changes})
