"""The evaluation data of a trained network: their class, and the settings that they take over from its training."""

from collections.abc import Mapping
from dataclasses import Field, asdict, fields, replace
from typing import Any, TypeVar

from trunkline import TrunklineError
from trunkline.datamodules.images.image_data import ImageData
from trunkline.datamodules.images.preprocessing import Preprocessing
from trunkline.datamodules.pairs.emoji_pictures import OPENMOJI, TWEMOJI
from trunkline.datamodules.pairs.image_text_data import ImageTextData
from trunkline.pipelines.errors import config_files, flags, plain, read_entries

Images = TypeVar("Images", bound=ImageData | ImageTextData)

FROM_TRAINING = {
    **dict.fromkeys([field.name for field in fields(Preprocessing)], "images are prepared"),
    **dict.fromkeys(["tokenizer", "vocab_size", "max_length"], "texts are prepared"),
}
"""Fields that always come from the training -> what they decide, for the error message."""


def with_data_class(arguments: list[str]) -> list[str]:
    """Add `--data CLASS` to the arguments of `evaluate`, if it is left out and the other arguments imply it.

    The class is ImageTextData for the sources `twemoji` and `openmoji`, for `--what retrieval`, and for a flag that
    only ImageTextData has, such as `--data.caption_column`. Otherwise it is ImageData.
    """
    given = {entry.key: entry.value for config in config_files(arguments) for entry in read_entries(config)}
    given |= {plain(name): value for name, value in flags(arguments)}
    chosen = {name.removeprefix("data.") for name in given if name.startswith("data.")} - {"help"}
    if not chosen or given.get("data") or "class_path" in chosen:
        return arguments
    paired = (
        given.get("data.source") in (TWEMOJI, OPENMOJI)
        or given.get("what") == "retrieval"
        or chosen & (by_name(ImageTextData).keys() - by_name(ImageData).keys())
    )
    # It goes first, because the parser must know the class before it reads other flags or configs of the data.
    return ["--data", ImageTextData.__name__ if paired else ImageData.__name__, *arguments]


def by_name(cls: Any) -> dict[str, Field[Any]]:
    """The fields of a dataclass, by their names."""
    return {field.name: field for field in fields(cls)}


def as_trained(data: Images, preprocessing: Preprocessing, splits: Mapping[str, Any]) -> Images:
    """A copy of the data that prepares and splits images as in the network's training.

    Args:
        data: the data that the user gave.
        preprocessing: that of the training.
        splits: `fractions` and `split_seed` of the training, if they are known. They are used for the fields that
            `data` leaves at their defaults.

    Raises:
        TrunklineError: if `data` sets a field that prepares images or texts, or a batch size below 1.
    """
    known = by_name(type(data))
    for name, what in FROM_TRAINING.items():
        if name in known and getattr(data, name) != known[name].default:
            raise TrunklineError(
                f"{name}={getattr(data, name)} does not apply: {what} as in the network's training; leave it out",
                f"data.{name}",
            )
    for name in ("batch_size", "eval_batch_size"):
        if getattr(data, name) is not None and getattr(data, name) < 1:
            raise TrunklineError(f"{name} must be 1 or more, not {getattr(data, name)}", f"data.{name}")
    decided = {f"{split}_fraction": share for split, share in splits.get("fractions", {}).items()}
    decided |= {name: splits[name] for name in ("split_seed",) if name in splits}
    left_out = {name: value for name, value in decided.items() if getattr(data, name) == known[name].default}
    return replace(data, **asdict(preprocessing), **left_out)
