"""`trunkline evaluate` on recordings: error rates of speech, and scores of classes."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torchmetrics.functional.classification import multiclass_accuracy

from trunkline import TrunklineError
from trunkline.datamodules.audio.audio_data import AudioData, labels_of
from trunkline.datamodules.audio.audio_rows import AudioRows
from trunkline.datamodules.audio.recording_data import RecordingData
from trunkline.datamodules.audio.speech_data import SpeechData
from trunkline.modules.metrics.sounds import MeanPrecision
from trunkline.modules.metrics.translation import translation_scores
from trunkline.pipelines.evaluation.data import chosen_split, refuse_other_preparation
from trunkline.pipelines.evaluation.results import Evaluation, Result
from trunkline.pipelines.objectives import PREDICT_AUDIO
from trunkline.pipelines.recordings import AudioWindows, Windowing
from trunkline.pipelines.sounds import vectors_of
from trunkline.pipelines.trained import Trained
from trunkline.pipelines.transcribing import SpeechOptions, transcribe_recordings, transcriber_of

TRANSCRIPTION, CLASSIFICATION = "transcription", "classification"


class TranscriptionOptions(NamedTuple):
    """Options of `evaluate` that apply to speech; None if they are left out."""

    num_beams: int | None = None
    language_model: str | None = None
    lm_weight: float | None = None
    length_bonus: float | None = None


class ClassificationOptions(NamedTuple):
    """Options of `evaluate` that apply to classes of sounds: none."""


def evaluate_speech(
    trained: Trained, data: SpeechData, split: str | None, options: TranscriptionOptions, device: torch.device
) -> Evaluation:
    """Let the network of a checkpoint transcribe recordings, and compare its texts with the transcripts.

    `trunkline evaluate` says what the arguments mean. Transcripts are normalised as in training.

    Raises:
        TrunklineError: as `evaluate`.
    """
    transcriber = transcriber_of(trained, device, options=SpeechOptions(**options._asdict()))
    settings = {"form": trained.data_state("form"), **trained.data_state("settings")}
    data = as_in_training(data, trained, {"normalization": trained.normalization, **settings})
    source, tested, rows = choose_recordings(data, split, trained)
    texts = [trained.normalization(text) for text in rows.texts or ()]
    size, workers = data.eval_batch_size or data.batch_size, data.worker_count()
    found = transcribe_recordings(transcriber, rows, size, workers, data.skip_corrupt)
    pairs = [(own.text, right) for own, right in zip(found, texts, strict=True) if own is not None]
    check_heard(len(pairs), source)
    predictions, references = [own for own, _ in pairs], [right for _, right in pairs]
    scores = translation_scores(predictions, references, ["wer", "cer", "exact"])
    results = [Result(TRANSCRIPTION, name, value) for name, value in scores.items()]
    return Evaluation(source, tested, results, len(pairs), "recordings")


def evaluate_sounds(
    trained: Trained, data: AudioData, split: str | None, options: ClassificationOptions, device: torch.device
) -> Evaluation:
    """Measure how well the network of a checkpoint classifies recordings; arguments and errors as `evaluate_speech`."""
    trained.require(PREDICT_AUDIO)
    several, names, module = trained.data_state("multi_label"), trained.class_names, trained.module().to(device).eval()
    data = as_in_training(data, trained, {"multi_label": several})
    source, tested, rows = choose_recordings(data, split, trained)
    target = label_numbers(rows, names, several)
    windowing = Windowing.of(trained.log_mel, module.network.config.max_frames)
    windows = AudioWindows(rows, trained.log_mel, windowing, data.skip_corrupt)

    def probabilities(batch: dict[str, Tensor]) -> Tensor:
        found: Tensor = module.predict_step({**batch, "valid": torch.ones_like(batch["valid"])}, 0)["probability"]
        return found

    size, workers = data.eval_batch_size or data.batch_size, data.worker_count()
    probability, heard = vectors_of(probabilities, windows, size, workers, device, f"classifying {source}")
    check_heard(int(heard.sum()), source)
    measure = several_labels if several else one_label
    results = [Result(CLASSIFICATION, *found) for found in measure(probability[heard], target[heard])]
    return Evaluation(source, tested, results, int(heard.sum()), "recordings")


def check_heard(count: int, source: str) -> None:
    """Refuse to measure on nothing."""
    if not count:
        raise TrunklineError(f"none of the recordings of {source} can be read; give others", "data.source")


def one_label(probability: Tensor, target: Tensor) -> list[tuple[str, float, float]]:
    """(name, value, chance) of the accuracy, given probabilities and labels (N, K)."""
    classes, label = target.shape[1], target.long().argmax(dim=1)
    tops = [n for n in (1, 5) if n < classes]
    return [
        (
            "acc" if top == 1 else f"acc_top{top}",
            float(multiclass_accuracy(probability, label, num_classes=classes, top_k=top, average="micro")),
            top / classes,
        )
        for top in tops
    ]


def several_labels(probability: Tensor, target: Tensor) -> list[tuple[str, float, float]]:
    """(name, value, chance) of the mean average precision, over the classes that occur; arguments as `one_label`."""
    occurs = target.any(dim=0)
    if not occurs.any():
        raise TrunklineError("none of the recordings has a label; give some that have", "data.source")
    probability, target = probability[:, occurs], target[:, occurs].long()
    metric = MeanPrecision(target.shape[1])
    metric.update(probability, target)
    return [("mAP", float(metric.compute()), float(target.float().mean()))]


def label_numbers(rows: AudioRows, names: list[str], several: bool) -> Tensor:
    """(N, K) bool, the labels of each row, in the order of the training's classes.

    Args:
        rows: the recordings.
        names: the classes of the training.
        several: whether a recording can have several labels.

    Raises:
        TrunklineError: for a row without a label where it needs one, with too many, or with one that is not known.
    """
    numbers, found = {name: n for n, name in enumerate(names)}, torch.zeros(len(rows), len(names), dtype=torch.bool)
    for row, labels in enumerate(labels_of(rows)):
        for label in labels:
            if label not in numbers:
                raise TrunklineError(
                    f"{rows.name(row)} has the label '{label}', which the network does not know; it knows "
                    f"{', '.join(names)}; correct the label, or leave this row out"
                )
            found[row, numbers[label]] = True
        if not several and len(labels) != 1:
            raise TrunklineError(
                f"{rows.name(row)} has {len(labels)} labels, but the network gives each recording one; leave this row "
                "out"
            )
    return found


Recorded = TypeVar("Recorded", bound=RecordingData)


def as_in_training(data: Recorded, trained: Trained, settings: Mapping[str, Any]) -> Recorded:
    """A copy of the data that prepares recordings as in the network's training, but cuts none.

    Args:
        data: the data that the user gave.
        trained: the checkpoint.
        settings: fields of the training besides `log_mel`.

    Raises:
        TrunklineError: as `refuse_other_preparation`.
    """
    known = {"log_mel": trained.log_mel, **settings}
    refuse_other_preparation(data, known)
    return replace(data, **known, too_long="cut", augmentation=None, batch_seconds=None)


def choose_recordings(data: RecordingData, split: str | None, trained: Trained) -> tuple[str, str, AudioRows]:
    """The recordings to evaluate on.

    Args:
        data: the data that the user gave.
        split: the split, or `all` rows of the source. None is the test split if there is one, else the validation split
            of the source that the network was trained on, or all rows of any other source.
        trained: the checkpoint.

    Returns:
        Name of the source, split or `all`, and the rows.

    Raises:
        TrunklineError: if there is no such split, or a recording cannot be read.
    """
    data, split = chosen_split(data, split, trained, "recordings")
    named = data.named_sources
    if split == "all":
        data = replace(data, val_source=None, test_source=None, val_fraction=0.0, test_fraction=0.0)
    rows = data.splits["train" if split == "all" else split]
    return named[split if split in named else "train"].name, split, rows
