"""Labelled images for classification."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from torch.utils.data import Dataset

from trunkline.contract import DataFacts
from trunkline.datamodules.base import TrunklineDataModule
from trunkline.datamodules.content_digest import sampled_digest, short_digest
from trunkline.datamodules.folders import FileNames
from trunkline.datamodules.hub import HubSource
from trunkline.datamodules.images.image_decoding import open_image, to_channels
from trunkline.datamodules.images.image_sources import (
    FileRows,
    ImageRows,
    ImageTable,
    Subset,
    load_image_table,
)
from trunkline.datamodules.images.preprocessing import ImageInput, Preprocessing, TransformedImages
from trunkline.datamodules.samplers import SampleKey
from trunkline.datamodules.splits import Splits, check_fractions, rows_by_class
from trunkline.datamodules.text.preparation import default_cache
from trunkline.ranges import check_ranges


class LabelledImages(TransformedImages):
    """Transformed images with their `label`."""

    def __init__(self, rows: ImageRows, *options: Any) -> None:
        super().__init__(len(rows.labels), *options)
        self.rows = rows

    def read(self, row: int) -> dict[str, Any]:
        image = to_channels(self.rows.image(row), self.preprocessing.channels)
        return {"image": image, "label": int(self.rows.labels[row])}


class ImageFiles(Dataset[dict[str, Any]]):
    """Image files without labels, in the given order. Items: `image`, `index`, `valid`."""

    def __init__(self, files: Sequence[Path], preprocessing: Preprocessing) -> None:
        self.files, self.preprocessing, self.transform = files, preprocessing, preprocessing.evaluation()

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, key: SampleKey) -> dict[str, Any]:
        file = self.files[key.index]
        image = to_channels(open_image(file, str(file)), self.preprocessing.channels)
        return {"image": self.transform(image), "index": key.index, "valid": key.valid}


@dataclass(kw_only=True, eq=False, repr=False)
class ImageData(Splits, HubSource, ImageInput, TrunklineDataModule):
    """Labelled images from the offline digits, local files or a hub name, as `ImageBatch`es.

    Rows are set aside for a split with the same proportion of each class.
    """

    source: str = field(default="digits", kw_only=False)
    """`digits`, an image folder (one sub-folder per class, optionally below train/ val/ test/), a Parquet or Arrow file
    or a folder of them, or a Hugging Face hub name."""
    image_column: str = "image"
    """Column of a table that holds the images."""
    label_column: str = "label"
    """Column of a table that holds class numbers or class names."""
    split_seed: int = 0
    """Seed that decides which rows are set aside for validation and testing."""
    cache_dir: str | None = None
    """Folder for two things: what the `datasets` library downloads and converts (None is its own cache), and the names
    of the files in large image folders (None is $TRUNKLINE_CACHE, else ~/.cache/trunkline)."""

    usual_fractions: ClassVar[dict[str, float]] = {"test": 0.2, "val": 0.1}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges("data", self, max_skipped="[0, inf)")
        # usual shares are not checked with them: a source that has the split needs none
        given = {"val": self.val_fraction, "test": self.test_fraction}
        check_fractions({split: share for split, share in given.items() if share is not None})
        _ = self.preprocessing  # raises an error now if the settings do not fit together

    @property
    def in_memory(self) -> bool:
        return self.source == "digits"

    @cached_property
    def table(self) -> ImageTable:
        """The source, read once.

        Raises:
            TrunklineError: if it cannot be read.
        """
        columns = self.image_column, self.label_column
        return load_image_table(
            self.source,
            *columns,
            self.split_names,
            Path(self.cache_dir).expanduser() if self.cache_dir else default_cache(),
            self.cache_dir,
            hub_config=self.hub_config,
            revision=self.revision,
        )

    @cached_property
    def split_rows(self) -> dict[str, ImageRows]:
        """The rows of each split.

        Raises:
            TrunklineError: the errors of `table` and of `carve_splits`.
        """
        return carve_splits(self.table.splits, self.fractions, self.split_seed)

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, in the order of the class numbers."""
        return self.table.class_names

    @property
    def facts(self) -> DataFacts:
        return replace(self.image_facts(), class_names=self.class_names)

    def prepare_data(self) -> None:
        """Download or convert the data in one process, while the others wait."""
        _ = self.table

    def setup(self, stage: str) -> None:
        if self.datasets:
            return
        for split, rows in self.split_rows.items():
            self.datasets[split] = LabelledImages(rows, *self.image_options(split, self.seed))

    def data_key(self) -> dict[str, Any]:
        names: Any = {}
        for split, rows in self.table.splits.items():
            if isinstance(rows, FileRows) and isinstance(rows.files, FileNames):
                names[split] = rows.files.digest()
        found = {
            split: [short_digest(rows.labels.tobytes()), sampled_digest(len(rows.labels), rows.stored)]
            for split, rows in self.split_rows.items()
        }
        return {"class names": self.class_names, "file names": names, **found}

    def state_dict(self) -> dict[str, Any]:
        """What `predict` and `evaluate` need to know about the data, as plain values."""
        return {
            **super().state_dict(),
            "preprocessing": asdict(self.preprocessing),
            "class_names": self.class_names,
            "fractions": self.fractions,
            "split_seed": self.split_seed,
        }


def carve_splits(splits: dict[str, ImageRows], fractions: dict[str, float], seed: int) -> dict[str, ImageRows]:
    """Set shares of the training rows aside for splits that the source does not have, with `rows_by_class`.

    Raises:
        TrunklineError: if a class is too small to be in both parts.
    """
    missing = {split: share for split, share in fractions.items() if share and split not in splits}
    if not missing:
        return splits
    rows = splits["train"]
    chosen = rows_by_class(rows.labels, missing, seed)
    return splits | {split: Subset(rows, numbers) for split, numbers in chosen.items()}
