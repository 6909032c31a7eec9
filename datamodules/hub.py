"""Sources that are given by name: a local path, or a dataset on the Hugging Face hub."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trunkline import TrunklineError
from trunkline.datamodules.splits import Splits
from trunkline.names import check_regular, hub_access, looks_like_path

HUB_NAME = re.compile(r"\w[\w.-]*(/[\w.-]+)?")


@dataclass(kw_only=True, eq=False, repr=False)
class HubSource:
    """Settings of a hub dataset; local sources ignore them."""

    hub_config: str | None = None
    """Configuration of a hub dataset."""
    revision: str | None = None
    """Commit or branch of a hub dataset."""


def split_in_name(name: str) -> tuple[str, str]:
    """A hub name without its split, and that split, or "" if it has none; the name of a local path has none."""
    plain, _, split = name.partition(":")
    return (plain, split) if HUB_NAME.fullmatch(plain) and not Path(name).exists() else (name, "")


@dataclass
class NamedSource:
    """A source of texts, given by its name.

    Args:
        name: a local path, or a hub name. A hub name can end with a colon and a split (`owner/name:validation`).
            That split is of this source alone.
        field: the field that gave the name: source, val_source or test_source.
        split: split of a hub dataset; None means that none was given, and `train` is used.
        split_field: the field that gave the split.
        hub_config: configuration of a hub dataset.
        revision: commit or branch of a hub dataset.

    Raises:
        TrunklineError: if the name ends with another split than `split`, or if it is that of a pipe or a device.
    """

    name: str
    field: str = "source"
    split: str | None = None
    split_field: str = "train_split"
    hub_config: str | None = None
    revision: str | None = None

    def __post_init__(self) -> None:
        check_regular(self.name, f"data.{self.field}")
        named = split_in_name(self.name)[1]
        if named and self.split not in (None, named):
            raise TrunklineError(
                f"{self.split_field}={self.split}, but {self.field}={self.name} names the split {named}; leave out one "
                "of them",
                field=f"data.{self.split_field}",
            )

    @property
    def hub_name(self) -> str:
        """The name without a split."""
        return split_in_name(self.name)[0]

    @property
    def hub_split(self) -> str:
        """The split in the name, else `split`, else `train`."""
        return split_in_name(self.name)[1] or self.split or "train"

    def is_hub_name(self, suffixes: Sequence[str]) -> bool:
        """Whether the name can be a hub name: it is no existing path, and does not end with one of `suffixes`."""
        path = Path(self.name)
        return (
            not path.exists()
            and path.suffix not in suffixes
            and bool(HUB_NAME.fullmatch(self.hub_name))
            and not looks_like_path(self.hub_name)
        )

    def refuse_split(self) -> None:
        """Check that no split was given, for a source that is not on the hub.

        Raises:
            TrunklineError: if one was given.
        """
        if self.split is not None:
            raise TrunklineError(
                f"{self.split_field}={self.split} names a split of a hub dataset, but {self.field}={self.name} is not "
                "one; leave it out, or set it to null",
                field=f"data.{self.split_field}",
            )

    def hub_rows(self, offers: Sequence[str] = ()) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """(place, cells) of each row of a hub dataset, streamed; class numbers are replaced by class names.

        Args:
            offers: other sources to propose in the message.

        Raises:
            TrunklineError: if the dataset cannot be reached, or if the stream breaks; names the last row that was read.
        """
        name, split, place = self.hub_name, self.hub_split, ""
        try:
            import datasets

            with hub_access():
                options = {"split": split, "revision": self.revision, "streaming": True}
                data = datasets.load_dataset(name, self.hub_config, **options)
            features = getattr(data, "features", None) or {}
            for number, row in enumerate(data):
                place = f"{name} ({split}), row {number}"
                yield place, {column: with_class_names(value, features.get(column)) for column, value in row.items()}
        except Exception as error:  # `datasets` raises many kinds for missing, broken and unreachable data
            cause = error.__cause__ or error
            reason = f"{type(cause).__name__}: {cause}"
            field = f"data.{self.field}"
            if place:
                raise TrunklineError(
                    f"{self.field}={name} broke off after {place}: {reason}; try again, or name a copy on disk", field
                ) from error
            raise TrunklineError(
                f"cannot read {self.field}={name}: there is no such file or folder here, and as a hub name: {reason}; "
                f"give {', '.join([*offers, 'a local path'])}, or the name of a hub dataset that can be reached",
                field,
            ) from error


def with_class_names(value: Any, feature: Any) -> Any:
    """Replace a class number of a hub dataset, or a list of them, by class names; other values stay as they are."""
    if isinstance(value, list):
        return [with_class_names(v, getattr(feature, "feature", None)) for v in value]
    names = getattr(feature, "names", None)
    return names[value] if names and isinstance(value, int) and 0 <= value < len(names) else value


@dataclass(kw_only=True, eq=False, repr=False)
class TextSplits(Splits, HubSource):
    """Splits of a source of texts. Validation and testing can have separate sources.

    Only hub datasets have splits with names; local files have none. A hub name can end with a colon and a split. In
    `source` that is the split of the training rows: `val_split` and `test_split` name others of the same dataset.
    """

    source: str
    """Where the rows come from: a local path or a hub name."""
    val_source: str | None = None
    """Separate source for validation, instead of `val_fraction`."""
    test_source: str | None = None
    """Separate source for testing, instead of `test_fraction`."""

    @property
    def fractions(self) -> dict[str, float]:
        """Split -> share of the rows to set aside for it; 0 if it has a separate source or a named split."""
        return {split: 0.0 if split in self.named_sources else share for split, share in super().fractions.items()}

    @property
    def named_sources(self) -> dict[str, NamedSource]:
        """The source of `train`, and of each split that is not set aside from it.

        Raises:
            TrunklineError: if a name and `train_split`, `val_split` or `test_split` disagree about the split.
        """
        names = {"train": ("source", self.source)}
        for split, source in (("val", self.val_source), ("test", self.test_source)):
            if source:
                names[split] = f"{split}_source", source
            elif self.split_names[split]:
                names[split] = "source", split_in_name(self.source)[0]
        hub = {"hub_config": self.hub_config, "revision": self.revision}
        return {
            split: NamedSource(name, field, self.split_names[split], f"{split}_split", **hub)
            for split, (field, name) in names.items()
        }
