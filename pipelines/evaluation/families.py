"""The kinds of data on which `trunkline evaluate` measures, and what it measures on each."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from trunkline import TrunklineError
from trunkline.datamodules.audio.audio_data import AudioData
from trunkline.datamodules.audio.speech_data import SpeechData
from trunkline.datamodules.base import TrunklineDataModule
from trunkline.datamodules.images.image_data import ImageData
from trunkline.datamodules.pairs.image_text_data import ImageTextData
from trunkline.datamodules.translation.translation_data import TranslationData
from trunkline.pipelines.evaluation.audio import (
    CLASSIFICATION,
    TRANSCRIPTION,
    ClassificationOptions,
    TranscriptionOptions,
    evaluate_sounds,
    evaluate_speech,
)
from trunkline.pipelines.evaluation.images import LABELLED, ImageOptions, evaluate_images
from trunkline.pipelines.evaluation.results import Evaluation, check_task_options
from trunkline.pipelines.evaluation.translation import TRANSLATION_TASK, TranslationOptions, evaluate_translation


class Family(NamedTuple):
    """A kind of data, and what can be measured on it."""

    data: type[TrunklineDataModule]
    tasks: tuple[str, ...]
    options: Any
    """Class of its options, a NamedTuple."""
    evaluate: Callable[..., Evaluation]
    """(checkpoint, data, split, options, device) -> what was measured."""
    whole: bool = True
    """Whether all rows of a source can be measured at once, with the split `all`."""

    def chosen(self, given: Mapping[str, Any]) -> Any:
        """Its own options among all that are given."""
        return self.options(**{name: given[name] for name in self.options._fields})


FAMILIES = (
    Family(ImageData, LABELLED, ImageOptions, evaluate_images, whole=False),
    Family(ImageTextData, ("retrieval",), ImageOptions, evaluate_images, whole=False),
    Family(TranslationData, (TRANSLATION_TASK,), TranslationOptions, evaluate_translation),
    Family(SpeechData, (TRANSCRIPTION,), TranscriptionOptions, evaluate_speech),
    Family(AudioData, (CLASSIFICATION,), ClassificationOptions, evaluate_sounds),
)


def family_of_data(data: TrunklineDataModule, what: str, split: str | None, given: Mapping[str, Any]) -> Family:
    """The family of the data.

    Args:
        data: the data that the user gave.
        what: the task, or `all`.
        split: the split.
        given: options of tasks; None if they are left out.

    Raises:
        TrunklineError: if the data are of another kind, or if task, split or an option are for other data.
    """
    name, found = type(data).__name__, [family for family in FAMILIES if isinstance(data, family.data)]
    if not found:
        raise TrunklineError(
            f"{name} cannot be evaluated; give {names_of(FAMILIES)}, whichever has the inputs of the network", "data"
        )
    family, source = found[0], getattr(data, "source", name)
    for option, wanted, suited in (
        ("what", what, [own for own in FAMILIES if what in ("all", *own.tasks)]),
        ("split", split, [own for own in FAMILIES if own.whole or split != "all"]),
    ):
        if family not in suited:
            raise TrunklineError(
                f"--{option} {wanted} is for {names_of(suited)}, but {source} is read as {name}, which is measured by "
                f"{', '.join(family.tasks)}; choose another --{option}, or name the class of the data with --data"
            )
    check_task_options(
        {n: value for n, value in given.items() if n not in family.options._fields}, family.tasks, source
    )
    return family


def names_of(families: Sequence[Family]) -> str:
    """Names of classes of data, for messages."""
    *others, last = [family.data.__name__ for family in families]
    return f"{', '.join(others)} or {last}" if others else last
