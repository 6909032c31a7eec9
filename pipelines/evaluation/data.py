"""The evaluation data of a trained network: their class, and the settings that they take over from its training."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, asdict, fields, is_dataclass, replace
from typing import Any, TypeVar

from trunkline import TrunklineError
from trunkline.datamodules.audio.audio_data import AudioData
from trunkline.datamodules.audio.recording_data import RecordingData
from trunkline.datamodules.audio.speech_data import SpeechData
from trunkline.datamodules.base import TrunklineDataModule
from trunkline.datamodules.images.image_data import ImageData
from trunkline.datamodules.images.preprocessing import Preprocessing
from trunkline.datamodules.pairs.emoji_pictures import OPENMOJI, TWEMOJI
from trunkline.datamodules.pairs.image_text_data import ImageTextData
from trunkline.datamodules.splits import shares_of
from trunkline.datamodules.translation.parallel_sources import offline_names
from trunkline.datamodules.translation.translation_data import TranslationData
from trunkline.pipelines.errors import config_files, flags, plain, read_entries
from trunkline.pipelines.objectives import PREDICT_AUDIO
from trunkline.pipelines.trained import Trained

Images = TypeVar("Images", bound=ImageData | ImageTextData)
Data = TypeVar("Data", bound=TrunklineDataModule)
Sourced = TypeVar("Sourced", bound=TranslationData | RecordingData)

FROM_TRAINING = {
    **dict.fromkeys([field.name for field in fields(Preprocessing)], "images are prepared"),
    **dict.fromkeys(["tokenizer", "vocab_size", "max_length"], "texts are prepared"),
    **dict.fromkeys(["target_tokenizer", "target_vocab_size", "max_target_length"], "texts are prepared"),
    **dict.fromkeys(["prefix", "languages", "start_token"], "texts are prepared"),
    **dict.fromkeys(["normalization", "form", "start_tokens"], "transcripts are prepared"),
    **dict.fromkeys(["log_mel", "multi_label"], "sounds are prepared"),
}
"""Fields that always come from the training -> what they decide, for the error message."""
DATA_OF_TASKS = {
    "retrieval": ImageTextData.__name__,
    "translation": TranslationData.__name__,
    "transcription": SpeechData.__name__,
    "classification": AudioData.__name__,
}
"""Task -> class of the data that it is measured on."""
DATA_OF_COMMANDS = {
    "translate": TranslationData.__name__,
    "transcribe": SpeechData.__name__,
    PREDICT_AUDIO: AudioData.__name__,
}
"""Command -> class of the data that its networks read or hear."""


def with_data_class(arguments: list[str]) -> list[str]:
    """Add `--data CLASS` to the arguments of `evaluate`, if it is left out and the other arguments imply it.

    The class is TranslationData for `--what translation`, for offline pairs of texts such as `dates`, and for a
    checkpoint of an encoder-decoder. It is SpeechData for a checkpoint of a recogniser of speech, and AudioData for one
    of a classifier of sounds. It is ImageTextData for the sources `twemoji` and `openmoji`, for `--what retrieval`, and
    for a flag that only ImageTextData has, such as `--data.caption_column`. Otherwise it is ImageData.
    """
    given = {entry.key: entry.value for config in config_files(arguments) for entry in read_entries(config)}
    given |= {plain(name): value for name, value in flags(arguments)}
    chosen = {name.removeprefix("data.") for name in given if name.startswith("data.")} - {"help"}
    if not chosen or given.get("data") or "class_path" in chosen:
        return arguments
    source, what = given.get("data.source"), given.get("what") or "all"
    network = of_network(given.get("checkpoint")) if what == "all" else None
    if what in DATA_OF_TASKS:
        cls = DATA_OF_TASKS[what]
    elif source in offline_names():
        cls = TranslationData.__name__
    elif source in (TWEMOJI, OPENMOJI):
        cls = ImageTextData.__name__
    elif network is not None:
        cls = network
    else:
        of_pairs = by_name(ImageTextData).keys() - by_name(ImageData).keys() - by_name(TranslationData).keys()
        cls = (ImageTextData if chosen & of_pairs else ImageData).__name__
    # It goes first, because the parser must know the class before it reads other flags or configs of the data.
    return ["--data", cls, *arguments]


def of_network(checkpoint: str | None) -> str | None:
    """Name of the class whose data a network that reads or hears needs; a file that is broken is reported later."""
    try:
        trained = None if checkpoint is None else Trained.read(checkpoint)
    except TrunklineError:
        return None
    return next((cls for command, cls in DATA_OF_COMMANDS.items() if trained and trained.suits(command)), None)


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
        TrunklineError: as `refuse_other_preparation`.
    """
    refuse_other_preparation(data)
    return replace(with_shares(data, splits), **asdict(preprocessing))


def refuse_other_preparation(data: TrunklineDataModule, trained: Mapping[str, Any] | None = None) -> None:
    """Check that the data's fields do not contradict the training.

    Args:
        data: the data that the user gave.
        trained: fields of the training, which may be repeated.

    Raises:
        TrunklineError: if `data` sets another field that prepares images or texts.
    """
    known, trained = by_name(type(data)), trained or {}
    for name, what in FROM_TRAINING.items():
        if name not in known:
            continue
        usual = known[name].default_factory
        default = known[name].default if usual is MISSING else usual()
        for place, value in differing(name, getattr(data, name), [default, trained.get(name, default)]):
            given = ", ".join(value) if isinstance(value, list) else value
            raise TrunklineError(
                f"{place}={given} does not apply: {what} as in the network's training; leave it out", f"data.{place}"
            )


def differing(name: str, value: Any, allowed: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    """The value with its name, if it is not allowed; of a dataclass, each field that is not."""
    if value in allowed:
        return
    if not is_dataclass(value):
        yield name, value
        return
    for field in fields(value):
        others = [getattr(other, field.name) for other in allowed if isinstance(other, type(value))]
        yield from differing(f"{name}.{field.name}", getattr(value, field.name), others)


def with_shares(data: Data, splits: Mapping[str, Any]) -> Data:
    """A copy of the data that is split as in the network's training.

    Args:
        data: the data that the user gave.
        splits: `fractions` and `split_seed` of the training, if they are known. They are used for the fields that
            `data` leaves at their defaults.
    """
    known = by_name(type(data))
    decided = {f"{split}_fraction": share for split, share in splits.get("fractions", {}).items()}
    decided |= {name: splits[name] for name in ("split_seed",) if name in splits}
    left_out = {name: value for name, value in decided.items() if getattr(data, name) == known[name].default}
    return replace(data, **left_out)


def chosen_split(data: Sourced, split: str | None, trained: Trained, what: str) -> tuple[Sourced, str]:
    """The data with the shares of training, if it is of the same source; and the split to evaluate on.

    Args:
        data: the data that the user gave.
        split: the split, or `all` rows of the source. None is the test split if there is one, else the validation split
            of the source that the network was trained on, or all rows of any other source.
        trained: the checkpoint.
        what: what the rows are called in messages.

    Raises:
        TrunklineError: if there is no such split, or if the network was trained on all rows and `split` is None.
    """
    known = trained.data or {}
    same = known.get("source") == data.source
    data = with_shares(data, known) if same else data
    splits = [*dict.fromkeys([*data.named_sources, *shares_of(data.fractions)])]
    if split is None:
        split = next((own for own in ("test", "val") if own in splits and (own == "test" or same)), "all")
        if split == "all" and same:
            raise TrunklineError(
                f"{trained.file} was trained on all {what} of {data.source}; give {what} that it has not seen, or set "
                "split to train",
                "split",
            )
    if split not in ("all", *splits):
        raise TrunklineError(
            f"{data.source} has no {split} split, only {', '.join(splits)}; set {split}_fraction, name a "
            f"{split}_source, or set split to all",
            "split",
        )
    return data, split
