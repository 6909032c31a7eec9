"""How pictures become inputs, as image processors of transformers say it in preprocessor_config.json."""

from collections.abc import Mapping
from typing import Any

from trunkline.modules.networks.image_transform import RESAMPLING, ImageTransform

KEEPS_RATIO = {"resample": 3, "size": 224, "do_center_crop": True, "crop_size": 224, "default_to_square": False}
PROCESSOR_DEFAULTS: dict[str, dict[str, Any]] = {
    "ViT": {"resample": 2, "size": {"height": 224, "width": 224}},
    "DeiT": {"resample": 3, "size": {"height": 256, "width": 256}, "do_center_crop": True, "crop_size": 224},
    "CLIP": KEEPS_RATIO,
    "Bit": KEEPS_RATIO,
    "Siglip": {"resample": 3, "size": {"height": 224, "width": 224}, "default_to_square": False},
}
"""Image processor -> what its files may leave out. A size that is a number is that of a square, or else of the shorter
side."""
USUAL_PROCESSORS = {"vit": "ViT", "deit": "DeiT", "dinov2": "Bit", "clip": "CLIP", "siglip": "Siglip"}
"""`model_type` -> the image processor of a file that names none."""


def processor_transform(settings: Mapping[str, Any], model_type: str | None) -> ImageTransform | None:
    """Of a preprocessor_config.json; None if it is of no picture, or of a processor that may do something else with it.

    Args:
        settings: content of the file.
        model_type: of the configuration file beside it.
    """
    given = settings.get("image_processor_type") or settings.get("feature_extractor_type") or ""
    kind = given.removesuffix("Fast").removesuffix("Pil")
    kind = kind.removesuffix("ImageProcessor").removesuffix("FeatureExtractor")  # the latter in older files
    usual = PROCESSOR_DEFAULTS.get(kind or USUAL_PROCESSORS.get(model_type or "", ""))
    steps = all(settings.get(f"do_{step}", True) for step in ("resize", "rescale", "normalize"))
    if usual is None or "image_mean" not in settings or not steps:
        return None
    options = {"default_to_square": True, "do_center_crop": False, **usual, **settings}
    size, crop = options["size"], options.get("crop_size")
    if isinstance(size, int):
        resize, squash = two_sides(size), options["default_to_square"]
    elif size.keys() == {"shortest_edge"}:
        resize, squash = two_sides(size["shortest_edge"]), False
    elif size.keys() == {"height", "width"}:
        resize, squash = (size["height"], size["width"]), True
    else:
        return None
    if options["do_center_crop"]:
        crop = (crop["height"], crop["width"]) if isinstance(crop, dict) else two_sides(crop)
    elif squash:
        crop = resize
    else:
        return None
    names = {number: name for name, number in RESAMPLING.items()}
    # (pixel * factor - mean) / std, where a pixel is a number up to 255 and ours is divided by 255.
    scale = 255 * settings.get("rescale_factor", 1 / 255)
    mean, std = (tuple(value / scale for value in settings[f"image_{name}"]) for name in ("mean", "std"))
    return ImageTransform(crop, len(mean), mean, std, names[options["resample"]], resize, squash)


def processor_settings(transform: ImageTransform | None) -> dict[str, Any]:
    """Content of preprocessor_config.json, if transformers has an image processor that does the same."""
    if transform is None or transform.channels != 3:
        return {}
    resize, size = transform.resize, transform.image_size
    if resize[0] != resize[1] and not transform.squash:
        return {}
    sides: dict[str, int] = (
        {"height": resize[0], "width": resize[1]} if transform.squash else {"shortest_edge": resize[0]}
    )
    return {
        "image_processor_type": "CLIPImageProcessor",  # the one that keeps the ratio and cuts out the centre
        "do_convert_rgb": True,
        "do_resize": True,
        "size": sides,
        "resample": RESAMPLING[transform.interpolation],
        "do_center_crop": True,
        "crop_size": {"height": size[0], "width": size[1]},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(transform.mean),
        "image_std": list(transform.std),
    }


def two_sides(size: Any) -> tuple[int, int]:
    """(height, width) of a size that is one side of a square, or both."""
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
