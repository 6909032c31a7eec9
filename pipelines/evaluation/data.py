"""Data that a trained network is judged on: of which class they are, and what they take from the network's training."""

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
"""Fields that are not chosen here, and what they are about."""


def with_data_class(arguments: list[str]) -> list[str]:
    """Arguments of `evaluate` with the `--data CLASS` that the others tell, if it is left out.

    It is ImageTextData for `twemoji` and `openmoji`, with `--what retrieval`, and with a flag that it alone has, such
    as `--data.caption_column`; else ImageData.
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
    # In front: a flag or config that says something about the data must find their class.
    return ["--data", ImageTextData.__name__ if paired else ImageData.__name__, *arguments]


def by_name(cls: Any) -> dict[str, Field[Any]]:
    """The fields of a dataclass."""
    return {field.name: field for field in fields(cls)}


def as_trained(data: Images, preprocessing: Preprocessing, splits: Mapping[str, Any]) -> Images:
    """The same data with images prepared as in a network's training, and split as there.

    Args:
        data: as they were given.
        preprocessing: of the training.
        splits: `fractions` and `split_seed` of the training, as far as they are known; they count where `data` leaves
            them out.

    Raises:
        TrunklineError: if `data` prepares images or texts in a way of their own, or has no batch size.
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
