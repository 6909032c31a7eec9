"""Labelled sounds, each with one label or with several."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from trunkline import TrunklineError
from trunkline.contract import DataFacts
from trunkline.datamodules.audio.audio_input import AudioClips, Clip, Mix
from trunkline.datamodules.audio.audio_manifests import AudioColumns
from trunkline.datamodules.audio.audio_rows import AudioRows, AudioSubset
from trunkline.datamodules.audio.recording_data import RecordingData
from trunkline.datamodules.splits import rows_by_class
from trunkline.datamodules.text_tasks.task_text import Ragged, in_order


@dataclass
class AudioMixup:
    """Training clips are mixed with other ones, and so are their labels (arXiv:1710.09412; for sounds as in AST)."""

    probability: float = 0.5
    """Share of the clips that are mixed."""
    alpha: float = 10.0
    """The share of a clip in a mixture is drawn from Beta(alpha, alpha): the larger, the nearer to one half."""

    def __post_init__(self) -> None:
        if not 0 <= self.probability <= 1:
            raise TrunklineError(f"mixup: probability={self.probability} must be from 0 to 1", "data.mixup.probability")
        if not self.alpha > 0:
            raise TrunklineError(f"mixup: alpha={self.alpha} must be above 0", "data.mixup.alpha")


class LabelledClips(AudioClips):
    """Items of an `AudioBatch`: `label`, or for several labels `target`; with mixup also `target`.

    Args:
        rows: the recordings.
        classes: class numbers of each row.
        num_classes: K.
        multi_label: whether a clip can have several labels.
        mixup: mixes training clips; None does not.
        **options: as for `AudioClips`.
    """

    def __init__(
        self,
        rows: AudioRows,
        classes: Ragged,
        num_classes: int,
        multi_label: bool,
        mixup: AudioMixup | None = None,
        **options: Any,
    ) -> None:
        super().__init__(rows, **options)
        self.classes, self.num_classes, self.multi_label, self.mixup = classes, num_classes, multi_label, mixup

    def mix(self, samples: np.ndarray, generator: np.random.Generator) -> tuple[np.ndarray, Mix | None]:
        if self.mixup is None or generator.random() >= self.mixup.probability:
            return samples, None
        share = float(generator.beta(self.mixup.alpha, self.mixup.alpha))
        other, row = self.drawn(generator)
        mixed = np.float32(share) * samples
        length = min(len(samples), len(other))
        mixed[:length] += np.float32(1 - share) * other[:length]
        return mixed, Mix(row, share)

    def labels(self, clips: Sequence[Clip], valid: Sequence[bool]) -> dict[str, Tensor]:
        columns = {}
        if not self.multi_label:
            columns["label"] = torch.tensor([int(self.classes[clip.row][0]) for clip in clips])
        if self.multi_label or self.mixup is not None:
            columns["target"] = torch.from_numpy(np.stack([self.target(clip) for clip in clips]))
        return columns

    def target(self, clip: Clip) -> np.ndarray:
        """(K,) float32, share of each class in a clip."""
        target = np.zeros(self.num_classes, np.float32)
        share = 1.0 if clip.mix is None else clip.mix.share
        target[self.classes[clip.row]] = share
        if clip.mix is not None:
            target[self.classes[clip.mix.row]] += 1 - share
        return target


@dataclass(kw_only=True, eq=False, repr=False)
class AudioData(RecordingData):
    """Labelled sounds, as `AudioBatch`es, from folders of classes, tables, a hub name or the offline digits.

    Rows with one label are set aside for a split with the same proportion of each class; of rows with several labels
    the number of a row alone decides its split.
    """

    source: str = field(kw_only=False)
    """A folder with one sub-folder for each class, optionally below train/, val/, test/; a .jsonl, .csv or .parquet
    table of recordings, or a folder of Parquet files; `spoken_digits:single` (one digit a clip, by synthetic voices) or
    another set of single digits; else a Hugging Face hub name (a split can follow after a colon)."""
    too_long: Literal["cut", "skip", "window"] = "cut"
    """What happens to clips that are longer than `log_mel.max_seconds`: `cut` takes their ends off; `skip` leaves them
    out of training, while evaluation still cuts them; `window` makes several rows of such a clip, which overlap evenly
    and are counted one by one."""
    label_column: str = "label"
    """Column of a table that holds the label, a name or a whole number, or a list of labels."""
    label_separator: str | None = None
    """Stands between several labels in one text, such as a comma."""
    multi_label: bool | None = None
    """Whether a clip can have several labels, or none; None: if a training row has."""
    mixup: AudioMixup | None = None
    """Mixes training clips with others, and their labels; None does not."""
    split_seed: int = 0
    """Seed that decides which rows are set aside for validation and testing."""

    @property
    def columns(self) -> AudioColumns:
        return AudioColumns(audio=self.audio_column, label=self.label_column, separator=self.label_separator)

    def set_aside(self, rows: AudioRows, fractions: Mapping[str, float]) -> dict[str, AudioRows]:
        labels = labels_of(rows)
        if self.multi_label or any(len(names) != 1 for names in labels):
            return super().set_aside(rows, fractions)
        numbers = np.unique([names[0] for names in labels], return_inverse=True)[1]
        chosen = rows_by_class(numbers, {split: fractions[split] for split in sorted(fractions)}, self.split_seed)
        return {split: AudioSubset(rows, indices) for split, indices in chosen.items()}

    @cached_property
    def several(self) -> bool:
        """`multi_label`, or if it is None whether a training row has several labels or none."""
        if self.multi_label is not None:
            return self.multi_label
        return any(len(names) != 1 for names in labels_of(self.splits["train"]))

    @cached_property
    def class_names(self) -> list[str]:
        """The different labels of the training rows, in the order of the class numbers.

        Raises:
            TrunklineError: if there is only one, and a clip has exactly one.
        """
        names = in_order({name for names in labels_of(self.splits["train"]) for name in names})
        if len(names) < 1 + (not self.several):
            raise TrunklineError(
                f"the training rows have {'one class only, ' + names[0] if names else 'no labels'}; set label_column, "
                "or give rows of other classes",
                field="data.label_column",
            )
        return names

    def classes(self, split: str) -> Ragged:
        """Class numbers of each row of a split.

        Raises:
            TrunklineError: for a label that no training row has, or for another number of labels than one.
        """
        numbers = {name: number for number, name in enumerate(self.class_names)}
        rows = self.splits[split]
        labels = labels_of(rows)
        for row, names in enumerate(labels):
            unknown = [name for name in names if name not in numbers]
            if unknown:
                raise TrunklineError(
                    f"{rows.name(row)} ({split} split): no training row has the label '{unknown[0]}', but "
                    f"{', '.join(self.class_names[:5])}{', …' if len(numbers) > 5 else ''}; fix the row, or give "
                    "training rows with this label",
                    field="data.label_column",
                )
            if not self.several and len(names) != 1:
                raise TrunklineError(
                    f"{rows.name(row)} ({split} split) has {len(names)} labels, but training rows have one each; fix "
                    "the row, or set multi_label=true",
                    field="data.multi_label",
                )
        return Ragged([[numbers[name] for name in names] for names in labels], np.int64)

    def clips(self, split: str, rows: AudioRows, **options: Any) -> LabelledClips:
        mixup = self.mixup if split == "train" else None
        return LabelledClips(rows, self.classes(split), len(self.class_names), self.several, mixup, **options)

    @property
    def facts(self) -> DataFacts:
        return replace(super().facts, class_names=self.class_names, multi_label=self.several)

    def state_dict(self) -> dict[str, Any]:
        own = {"class_names": self.class_names, "multi_label": self.several, "split_seed": self.split_seed}
        return {**super().state_dict(), **own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Check that the checkpoint has the same classes.

        Raises:
            TrunklineError: if not, because then the numbers mean other classes.
        """
        if state_dict["class_names"] != self.class_names:
            raise TrunklineError(
                f"the checkpoint knows the classes {', '.join(state_dict['class_names'])}, but the data has "
                f"{', '.join(self.class_names)}; give the data of that run",
                field="data.source",
            )


def labels_of(rows: AudioRows) -> list[list[str]]:
    """Labels of each row.

    Raises:
        TrunklineError: if the source has none.
    """
    if rows.labels is None:
        raise TrunklineError(
            f"{rows.name(0)} has no label, nor do the others; give a source with labels, such as spoken_digits:single",
            field="data.source",
        )
    return rows.labels
