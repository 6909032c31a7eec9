"""Sources by name: a local path, or a dataset of the Hugging Face hub."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trunkline import TrunklineError
from trunkline.datamodules.splits import Splits

HUB_NAME = re.compile(r"\w[\w.-]*(/[\w.-]+)?")


@dataclass(kw_only=True, eq=False, repr=False)
class HubSource:
    """What a hub dataset needs beside its name; a local source does not read it."""

    hub_config: str | None = None
    """Configuration of a hub dataset."""
    revision: str | None = None
    """Its commit or branch."""


@dataclass
class NamedSource:
    """A source of texts by its name.

    Args:
        name: a local path, or a hub name, with a split after a colon (`owner/name:validation`) or without.
        field: that gave it: source, val_source or test_source.
        split: of a hub dataset; None was not given and is `train`.
        split_field: that gave the split.
        hub_config: of a hub dataset.
        revision: of a hub dataset.
    """

    name: str
    field: str = "source"
    split: str | None = None
    split_field: str = "train_split"
    hub_config: str | None = None
    revision: str | None = None

    @property
    def hub_name(self) -> str:
        """The name without a split."""
        return self.name.partition(":")[0]

    @property
    def hub_split(self) -> str:
        """The split in the name, else the one that was given, else `train`."""
        return self.name.partition(":")[2] or self.split or "train"

    def is_hub_name(self, suffixes: Sequence[str]) -> bool:
        """Whether the name may be one of the hub, for it is neither a path that exists nor one that ends so."""
        path = Path(self.name)
        return not path.exists() and path.suffix not in suffixes and bool(HUB_NAME.fullmatch(self.hub_name))

    def refuse_split(self) -> None:
        """Say that a split was named which this source cannot have.

        Raises:
            TrunklineError: if so.
        """
        if self.split is not None:
            raise TrunklineError(
                f"{self.split_field}={self.split} is of a hub dataset, but {self.field}={self.name} is none; "
                "leave it out",
                field=f"data.{self.split_field}",
            )

    def hub_rows(self, offers: Sequence[str] = ()) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """(place, cells) of each row of a hub dataset, streamed, with names for its numbered classes.

        Args:
            offers: what else may be given, for messages.

        Raises:
            TrunklineError: if it cannot be reached, or breaks off; names the last row that was read.
        """
        name, split, place = self.hub_name, self.hub_split, ""
        try:
            import datasets

            data = datasets.load_dataset(name, self.hub_config, split=split, revision=self.revision, streaming=True)
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
    """A hub dataset's class, or list of classes, by name instead of number."""
    if isinstance(value, list):
        return [with_class_names(v, getattr(feature, "feature", None)) for v in value]
    names = getattr(feature, "names", None)
    return names[value] if names and isinstance(value, int) and 0 <= value < len(names) else value


@dataclass(kw_only=True, eq=False, repr=False)
class TextSplits(Splits, HubSource):
    """Splits of a source of texts, each of which may have a source of its own.

    The splits that are named are those of a hub dataset: local files have none.
    """

    source: str
    """Of the rows."""
    val_source: str | None = None
    """A source of its own for validation, instead of `val_fraction`."""
    test_source: str | None = None
    """The same for testing."""

    @property
    def fractions(self) -> dict[str, float]:
        """Split -> share of the rows that is set aside for it; 0 where it has a source or a hub's split of its own."""
        return {split: 0.0 if split in self.named_sources else share for split, share in super().fractions.items()}

    @property
    def named_sources(self) -> dict[str, NamedSource]:
        """Those of `train`, and of the splits that are not set aside from it."""
        names = {"train": ("source", self.source)}
        for split, own in (("val", self.val_source), ("test", self.test_source)):
            if own:
                names[split] = f"{split}_source", own
            elif self.split_names[split]:
                names[split] = "source", self.source
        hub = {"hub_config": self.hub_config, "revision": self.revision}
        return {
            split: NamedSource(name, field, self.split_names[split], f"{split}_split", **hub)
            for split, (field, name) in names.items()
        }
