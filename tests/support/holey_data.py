"""The digits, of which some rows cannot be read."""

from typing import Any

from trunkline import TrunklineError
from trunkline.datamodules import ImageData
from trunkline.datamodules.images.preprocessing import Augmentation


class HoleyData(ImageData):
    """The digits, of which some rows cannot be read."""

    holes: frozenset[int] = frozenset(range(0, 1500, 15))

    def setup(self, stage: str) -> None:
        super().setup(stage)
        dataset: Any = self.datasets["train"]
        read, holes = type(dataset).read, self.holes

        def holey(row: int) -> dict[str, Any]:
            if row in holes:
                raise TrunklineError(f"cannot read row {row}")
            found: dict[str, Any] = read(dataset, row)
            return found

        dataset.read = holey


def holey(**options: Any) -> HoleyData:
    fields: dict[str, Any] = {"image_size": 8, "channels": 1, "batch_size": 60, "num_workers": 0, "val_fraction": 0.2}
    return HoleyData(**{**fields, "skip_corrupt": True, "augmentation": Augmentation(rotate=10), **options})
