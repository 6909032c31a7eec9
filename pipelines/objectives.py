"""The table of objectives: paths of their classes, which are imported when needed, and the commands that use them."""

import sys
from importlib import import_module
from typing import Any, NamedTuple


class Kind(NamedTuple):
    """The classes of an objective's runs, and the commands that can use its checkpoints."""

    objective: str
    """Path of the objective's class."""
    network: str
    """Path of the network's class."""
    data: str
    """Path of the usual datamodule's class."""
    commands: tuple[str, ...]
    """Commands besides those that train and test."""


_OBJECTIVES, _NETWORKS, _DATA = "trunkline.modules.objectives", "trunkline.modules.networks", "trunkline.datamodules"
PREDICT_IMAGES, PREDICT_TEXTS, PREDICT_AUDIO = "predict --images", "predict --texts", "predict --audio"

KINDS = {
    "AudioClassifier": Kind(
        f"{_OBJECTIVES}.audio_classifier.AudioClassifier",
        f"{_NETWORKS}.AST",
        f"{_DATA}.AudioData",
        (PREDICT_AUDIO, "embed"),
    ),
    "CausalLM": Kind(
        f"{_OBJECTIVES}.causal_lm.CausalLM",
        f"{_NETWORKS}.GPT",
        f"{_DATA}.TextData",
        ("generate", "embed"),
    ),
    "ContrastiveImageText": Kind(
        f"{_OBJECTIVES}.contrastive_image_text.ContrastiveImageText",
        f"{_NETWORKS}.CLIP",
        f"{_DATA}.ImageTextData",
        ("embed", "search", "evaluate"),
    ),
    "ImageClassifier": Kind(
        f"{_OBJECTIVES}.image_classifier.ImageClassifier",
        f"{_NETWORKS}.ViT",
        f"{_DATA}.ImageData",
        (PREDICT_IMAGES, "embed", "evaluate"),
    ),
    "MaskedLM": Kind(
        f"{_OBJECTIVES}.masked_lm.MaskedLM",
        f"{_NETWORKS}.BERT",
        f"{_DATA}.MaskedTextData",
        ("fill-mask", "embed"),
    ),
    "QuestionAnswering": Kind(
        f"{_OBJECTIVES}.question_answering.QuestionAnswering",
        f"{_NETWORKS}.TextHead",
        f"{_DATA}.SquadData",
        (PREDICT_TEXTS,),
    ),
    "Seq2Seq": Kind(
        f"{_OBJECTIVES}.seq2seq.Seq2Seq",
        f"{_NETWORKS}.EncoderDecoder",
        f"{_DATA}.TranslationData",
        ("translate",),
    ),
    "SpeechRecognizer": Kind(
        f"{_OBJECTIVES}.speech_recognizer.SpeechRecognizer",
        f"{_NETWORKS}.SpeechEncoder",
        f"{_DATA}.SpeechData",
        ("transcribe", "embed"),
    ),
    "SpeechToText": Kind(
        f"{_OBJECTIVES}.speech_to_text.SpeechToText",
        f"{_NETWORKS}.Whisper",
        f"{_DATA}.SpeechData",
        ("transcribe", "embed"),
    ),
    "TextClassifier": Kind(
        f"{_OBJECTIVES}.text_classifier.TextClassifier",
        f"{_NETWORKS}.TextHead",
        f"{_DATA}.LabelledTextData",
        (PREDICT_TEXTS,),
    ),
    "TokenClassifier": Kind(
        f"{_OBJECTIVES}.token_classifier.TokenClassifier",
        f"{_NETWORKS}.TextHead",
        f"{_DATA}.TaggedTextData",
        (PREDICT_TEXTS,),
    ),
}
"""The table, by the name of the objective."""

PROBES = "trunkline.pipelines.evaluation.probe_callback.ImageProbes"
"""A callback whose import is slow; it is imported only if a recipe names it."""


def short(path: str) -> str:
    """The name of a class, from its path."""
    return path.rpartition(".")[2]


def import_class(path: str) -> Any:
    """Import the class with this path."""
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)


def known_class(path: str) -> Any:
    """The class that a checkpoint or config names, or None if it is not known.

    Only Trunkline's own modules are imported for it: a file must not decide what other code runs.
    """
    if path.startswith("trunkline."):
        try:
            return import_class(path)
        except (ImportError, AttributeError):
            return None
    module, _, name = path.rpartition(".")
    return getattr(sys.modules.get(module), name, None)


def able(command: str) -> list[str]:
    """The objectives whose checkpoints a command can use."""
    return [name for name, kind in KINDS.items() if command in kind.commands]


def objective_classes() -> list[type]:
    """Classes of all objectives."""
    return [import_class(kind.objective) for kind in KINDS.values()]


def data_classes() -> list[type]:
    """Classes of all datamodules."""
    return [import_class(kind.data) for kind in KINDS.values()]
