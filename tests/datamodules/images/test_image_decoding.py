"""What an image file becomes: its mode, its orientation, the size at which a JPEG is decoded, and broken files."""

import io
import json
import pickle
import random
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from PIL.JpegImagePlugin import JpegImageFile
from small_data import encoded

from trunkline import TrunklineError
from trunkline.datamodules import Augmentation, ImageData, ImageTextData
from trunkline.datamodules.images.image_decoding import open_image, to_channels
from trunkline.datamodules.images.preprocessing import Preprocessing
from trunkline.datamodules.samplers import SampleKey

# --- pictures


def with_palette(**options: Any) -> bytes:
    picture = Image.new("P", (2, 2), 1)
    picture.putpalette([0, 0, 0, 10, 200, 30])
    return encoded(picture, **options)


def grey(red: int, green: int, blue: int) -> int:
    """Luma of ITU-R 601."""
    return round(0.299 * red + 0.587 * green + 0.114 * blue)


PICTURES = {
    "grey": (encoded(Image.new("L", (2, 2), 77)), (77, 77, 77)),
    "grey_jpeg": (encoded(Image.new("L", (2, 2), 77), "jpeg"), (77, 77, 77)),
    "rgb": (encoded(Image.new("RGB", (2, 2), (10, 200, 30))), (10, 200, 30)),
    "one_bit_white": (encoded(Image.new("1", (2, 2), 1)), (255, 255, 255)),
    "one_bit_black": (encoded(Image.new("1", (2, 2), 0)), (0, 0, 0)),
    "palette": (with_palette(), (10, 200, 30)),
    "palette_opaque_there": (with_palette(transparency=0), (10, 200, 30)),
    "palette_transparent": (with_palette(transparency=1), (255, 255, 255)),
    "palette_half_transparent": (with_palette(transparency=bytes([255, 51])), (206, 244, 210)),  # 20 % of the colour
    "rgb_transparent_colour": (encoded(Image.new("RGB", (2, 2), (1, 2, 3)), transparency=(1, 2, 3)), (255, 255, 255)),
    "rgba": (encoded(Image.new("RGBA", (2, 2), (255, 0, 0, 51))), (255, 204, 204)),
    "rgba_transparent": (encoded(Image.new("RGBA", (2, 2), (9, 9, 9, 0))), (255, 255, 255)),
    "grey_alpha": (encoded(Image.new("LA", (2, 2), (0, 51))), (204, 204, 204)),
    "grey_16_bit": (encoded(Image.fromarray(np.full((2, 2), 200 * 257, np.uint16))), (200, 200, 200)),
    "grey_16_bit_white": (encoded(Image.fromarray(np.full((2, 2), 65535, np.uint16))), (255, 255, 255)),
    "cmyk_jpeg": (encoded(Image.new("CMYK", (8, 8), (255, 0, 0, 0)), "jpeg", quality=100), (0, 255, 255)),
    "cmyk_jpeg_black": (encoded(Image.new("CMYK", (8, 8), (0, 0, 0, 255)), "jpeg", quality=100), (0, 0, 0)),
}


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_of_all_modes_become_grey_or_rgb(name: str) -> None:
    data, colour = PICTURES[name]
    picture = open_image(data, name)
    rgb, luma = to_channels(picture, 3), to_channels(picture, 1)
    assert (rgb.mode, luma.mode) == ("RGB", "L")
    assert rgb.size == luma.size == picture.size
    np.testing.assert_allclose(rgb.getpixel((1, 1)), colour, atol=1)
    np.testing.assert_allclose(luma.getpixel((1, 1)), grey(*colour), atol=1)


# EXIF's own words: the visual side at which the stored row 0 and column 0 lie
SIDES = {1: "top left", 2: "top right", 3: "bottom right", 4: "bottom left"}
SIDES |= {5: "left top", 6: "right top", 7: "right bottom", 8: "left bottom"}


@pytest.mark.parametrize("kind", ["jpeg", "png", "tiff", "webp"])
@pytest.mark.parametrize("orientation", SIDES)
def test_pictures_are_turned_upright(orientation: int, kind: str) -> None:
    upright = np.kron(np.array([[0, 50, 100], [150, 200, 250]]), np.ones((16, 16))).astype(np.uint8)
    row, column = SIDES[orientation].split()
    stored = upright.T if row in ("left", "right") else upright
    stored = stored[::-1] if row in ("bottom", "right") else stored
    stored = stored[:, ::-1] if column in ("bottom", "right") else stored
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(np.ascontiguousarray(stored)).convert("RGB"), kind, exif=exif)
    picture = to_channels(open_image(data, "x"), 1)
    np.testing.assert_allclose(np.asarray(picture)[8::16, 8::16], upright[8::16, 8::16], atol=5)
    assert picture.size == (48, 32)


# --- the size at which a JPEG is decoded


@cache
def photograph(width: int, height: int, colours: int = 3, seed: int = 0) -> np.ndarray:
    """Noise whose amplitude falls with its frequency, as in photographs, as (height, width, colours) 8-bit values."""
    chance = np.random.default_rng(seed)
    waves = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    waves[0, 0] = np.inf
    spectrum = chance.standard_normal((colours, *waves.shape, 2)) @ np.array([1, 1j]) / waves
    values = np.fft.irfft2(spectrum, (height, width))
    return (128 + 50 * values / values.std()).clip(0, 255).astype(np.uint8).transpose(1, 2, 0)


def stored(mode: str, orientation: int, kind: str, width: int = 507, height: int = 379) -> bytes:
    """A photograph as a JPEG, or in the format of phones, MPO."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    colours = {"L": 1, "RGB": 3, "CMYK": 4}[mode]
    picture = Image.fromarray(photograph(width, height, colours).squeeze(), mode if mode == "CMYK" else None)
    return encoded(picture, kind, exif=exif, quality=90)


def upright(content: bytes, channels: int) -> Image.Image:
    """The whole picture by Pillow alone."""
    with Image.open(io.BytesIO(content)) as image:
        return ImageOps.exif_transpose(image).convert("L" if channels == 1 else "RGB")


def differences(got: Any, want: Any) -> tuple[float, float]:
    """Mean and largest difference, in grey levels."""
    off = np.abs(np.asarray(got, np.float64) - np.asarray(want, np.float64))
    return float(off.mean()), float(off.max())


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The size of each picture that libjpeg decodes, as it is stored."""
    sizes: list[tuple[int, int]] = []
    load_prepare = JpegImageFile.load_prepare
    monkeypatch.setattr(JpegImageFile, "load_prepare", lambda image: (sizes.append(image.size), load_prepare(image))[1])
    return sizes


@pytest.mark.parametrize(
    ("side", "size"),
    [(600, (800, 600)), (152, (800, 600)), (150, (400, 300)), (75, (200, 150)), (38, (200, 150)), (37, (100, 75))],
)
@pytest.mark.parametrize("turned", [False, True])
def test_a_jpeg_is_decoded_once_at_twice_the_size_needed_or_more(
    turned: bool, side: int, size: tuple[int, int], decoded: list[tuple[int, int]]
) -> None:
    content = stored("RGB", 6 if turned else 1, "jpeg", 800, 600)
    for channels in (1, 3):
        evaluation = Preprocessing(side, channels, (0.5,), (0.5,), "bicubic", 1.0).evaluation()
        assert evaluation(to_channels(open_image(content, "x"), channels)).shape == (channels, side, side)
        assert decoded == [size]
        decoded.clear()
    # a crop of half of each side needs twice as large a picture
    open_image(content, "x").crop((100, 100, *((400, 500) if turned else (500, 400)))).resize((side // 2,) * 2)
    assert decoded == [size]


@pytest.mark.parametrize(("mode", "kind"), [("L", "jpeg"), ("RGB", "jpeg"), ("CMYK", "jpeg"), ("RGB", "mpo")])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_reduced_jpeg_is_what_the_whole_one_becomes(
    orientation: int, mode: str, kind: str, decoded: list[tuple[int, int]]
) -> None:
    content = stored(mode, orientation, kind)
    chance = random.Random(orientation)
    for channels in (1, 3):
        whole = upright(content, channels)
        for reduction in (2, 4, 8):
            wide, high = (chance.randint(3 * side // 4, side) for side in whole.size)
            x, y = chance.choice([0, whole.width - wide]), chance.choice([0, whole.height - high])
            box = (x, y, x + wide, y + high)
            size = (int(wide / (2.1 * reduction)), int(high / (2.1 * reduction)))
            decoded.clear()
            cut = to_channels(open_image(content, "x"), channels).crop(box)
            assert cut.size == (wide, high)
            got = cut.resize(size, Image.Resampling.BICUBIC)
            assert max(decoded[0]) == -(-507 // reduction)
            want = whole.crop(box).resize(size, Image.Resampling.BICUBIC)
            assert (got.mode, got.size) == (want.mode, want.size)
            mean, most = differences(got, want)
            assert mean < 2
            assert most < 20


def test_smaller_jpegs_and_other_files_become_the_same_as_ever() -> None:
    options = Preprocessing((48, 64), 3, (0.5,), (0.5,), "bilinear", 0.9)
    training = options.training(Augmentation(crop_scale=(0.3, 1.0), hflip=0.5, colour=0.2))
    for content in (
        stored("RGB", 1, "jpeg", 120, 150),
        stored("L", 6, "jpeg", 120, 150),
        stored("CMYK", 2, "jpeg", 120, 150),
        stored("RGB", 8, "png"),
        stored("RGB", 3, "webp"),
    ):
        for transform in (options.evaluation(), training):
            random.seed(1), torch.manual_seed(1)
            want = transform(upright(content, 3))
            random.seed(1), torch.manual_seed(1)
            assert torch.equal(transform(to_channels(open_image(content, "x"), 3)), want)


def test_whatever_else_is_done_with_a_jpeg_decodes_all_of_it() -> None:
    content = stored("RGB", 6, "jpeg")
    whole = upright(content, 3)
    assert whole.size == (379, 507)

    def opened() -> Image.Image:
        return open_image(content, "x")

    for act in (
        lambda picture: picture,
        lambda picture: picture.resize((40, 40), Image.Resampling.NEAREST),  # of a reduced one it would be a mean
        lambda picture: picture.resize((40, 40), Image.Resampling.BILINEAR, (5, 6, 300, 400)),
        lambda picture: picture.resize((40, 40), reducing_gap=3.0),
        lambda picture: picture.crop((10, 20, 300, 400)).crop((30, 40, 50, 70)),
        lambda picture: picture.crop((-5, -6, 20, 20)),  # black outside
        lambda picture: picture.crop((0, 0, 5, 6)).convert("L"),
        lambda picture: picture.convert("L").convert("RGB"),
        lambda picture: picture.convert("HSV"),
        lambda picture: picture.rotate(30),
        lambda picture: ImageOps.pad(picture, (2000, 1000)),
        lambda picture: pickle.loads(pickle.dumps(picture)),
        lambda picture: (picture.getpixel((0, 0)), picture.crop((1, 1, 9, 9)))[1],
        lambda picture: (picture.load(), picture.resize((50, 50)))[1],
        lambda picture: (picture.resize((50, 50)), picture)[1],
    ):
        got, want = act(opened()), act(whole)
        assert (got.mode, got.size) == (want.mode, want.size)
        assert np.array_equal(np.asarray(got), np.asarray(want))


def write_twins(folder: Path, count: int = 4) -> None:
    """Large JPEGs in classes, and in a list with captions; and the same pictures, decoded, as PNG."""
    for kind in ("jpeg", "png"):
        rows = []
        for number in range(count):
            content = encoded(Image.fromarray(photograph(500, 400, seed=number)), "jpeg", quality=90)
            file = folder / kind / "ab"[number % 2] / f"{number}.{kind}"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content if kind == "jpeg" else encoded(upright(content, 3)))
            rows.append(json.dumps({"image": str(file), "caption": [f"{letter} {number}" for letter in "abcdefgh"]}))
        (folder / f"{kind}.jsonl").write_text("\n".join(rows))


def test_crops_flips_and_captions_are_drawn_as_of_any_picture(tmp_path: Path) -> None:
    write_twins(tmp_path)
    drawn = Augmentation(crop_scale=(0.3, 1.0), hflip=0.5, rotate=20.0, colour=0.2, erasing=0.5)
    options: dict[str, Any] = {"image_size": 32, "batch_size": 4, "num_workers": 0, "augmentation": drawn}
    unsplit = {"val_fraction": 0, "test_fraction": 0}
    for make in (
        lambda kind: ImageData(str(tmp_path / kind), channels=3, **options, **unsplit),
        lambda kind: ImageTextData(
            str(tmp_path / f"{kind}.jsonl"), tokenizer="chars", cache_dir=str(tmp_path / "cache"), **options, **unsplit
        ),
    ):
        twins = [make(kind) for kind in ("jpeg", "png")]
        for data in twins:
            data.setup("fit")
        for epoch in range(3):
            keys = [SampleKey(epoch, number) for number in range(4)]
            for got, want in zip(*(data.datasets["train"].__getitems__(keys) for data in twins), strict=True):
                assert differences(got["image"] * 127.5, want["image"] * 127.5)[0] < 2
                assert "tokens" not in got or torch.equal(got["tokens"], want["tokens"])


def test_a_jpeg_found_broken_after_a_draw_is_replaced_as_one_found_broken_before(tmp_path: Path) -> None:
    drawn = Augmentation(crop_scale=(0.3, 1.0), hflip=0.5)
    items = []
    for name, broken in (("late", lambda content: content[:-2000]), ("at once", lambda content: b"hello")):
        write_twins(tmp_path / name)
        file = tmp_path / name / "jpeg" / "a" / "0.jpeg"
        file.write_bytes(broken(file.read_bytes()))
        options: dict[str, Any] = {"val_fraction": 0, "test_fraction": 0, "num_workers": 0, "skip_corrupt": True}
        data = ImageData(str(tmp_path / name / "jpeg"), image_size=32, channels=3, augmentation=drawn, **options)
        data.setup("fit")
        with pytest.warns(UserWarning, match=r"skipped: cannot read the image .*0\.jpeg"):
            items.append([data.datasets["train"][SampleKey(epoch, 0)] for epoch in range(3)])
    for late, at_once in zip(*items, strict=True):
        assert late["skipped"] == at_once["skipped"] == 1
        assert torch.equal(late["image"], at_once["image"])


# --- errors

NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
BROKEN = {
    "no_image": b"hello",
    "empty": b"",
    "missing": None,
    "short_jpeg": encoded(NOISE, "jpeg")[:1000],
    "short_png": encoded(NOISE, "png")[:1000],
    "flipped_png": encoded(NOISE, "png")[:500] + b"?" * 20 + encoded(NOISE, "png")[520:],
    "short_avif": encoded(NOISE, "avif")[:-500],
    "floats": encoded(Image.fromarray(np.ones((2, 2), np.float32)), "tiff"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_pictures_name_their_file(name: str, tmp_path: Path) -> None:
    file = tmp_path / f"{name}.png"
    if BROKEN[name] is not None:
        file.write_bytes(BROKEN[name])
    for given in (BROKEN[name], file):
        with pytest.raises(TrunklineError) as caught:
            open_image(given, str(file)).load()
        assert str(caught.value).startswith(f"cannot read the image {file}: ")
        assert "replace or remove it, or set skip_corrupt=true" in str(caught.value)
        assert " at 0x" not in str(caught.value)
