"""What the datamodules of recordings share: sources, splits, batches of like length, and what a checkpoint keeps."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from trunkline import TrunklineError
from trunkline.contract import DataFacts
from trunkline.datamodules.audio.audio_input import AudioClips
from trunkline.datamodules.audio.audio_rows import AudioRows, AudioSubset
from trunkline.datamodules.audio.audio_sources import open_audio
from trunkline.datamodules.audio.log_mel import LogMel
from trunkline.datamodules.base import TrunklineDataModule
from trunkline.datamodules.hub import TextSplits
from trunkline.datamodules.splits import check_fractions, rows_by_number, shares_of
from trunkline.datamodules.text.preparation import default_cache
from trunkline.datamodules.token_batches import TokenBatches


@dataclass(kw_only=True, eq=False, repr=False)
class RecordingData(TextSplits, TrunklineDataModule):
    """Base of the datamodules of recordings.

    A subclass says in `usable` which rows it cannot use, and makes a dataset of a split in `clips`.
    """

    source: str = field(kw_only=False)
    """Where the recordings come from."""
    log_mel: LogMel = field(default_factory=LogMel)
    """How waveforms become features."""
    too_long: Literal["cut", "skip"] = "cut"
    """What happens to clips that are longer than `log_mel.max_seconds`: `cut` takes their ends off; `skip` leaves them
    out of training, while evaluation still cuts them."""
    augmentation: Any = None
    """Random changes to training clips; None for none."""
    skip_corrupt: bool = False
    """Leave out rows that cannot be used, such as broken files, and count them, instead of stopping with an error. A
    file that proves to be broken only when it is read is replaced by the next row."""
    batch_seconds: float | None = None
    """Maximum of clips times longest clip in a step, in seconds, over all processes; clips of like length stand
    together. It replaces `batch_size`, and in evaluation too if `eval_batch_size` is not set. None: by `batch_size`."""
    cache_dir: str | None = None
    """Folder where Trunkline keeps what it prepares; None is $TRUNKLINE_CACHE, else ~/.cache/trunkline."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.left_out: dict[str, Counter[str]] = {}
        """Split -> reason -> number of rows that were left out, known after `setup`."""
        check_fractions(self.fractions)
        if self.batch_seconds is not None and self.batch_seconds < self.log_mel.max_seconds:
            raise TrunklineError(
                f"batch_seconds={self.batch_seconds} is less than the longest clip (max_seconds="
                f"{self.log_mel.max_seconds}); raise it, or lower max_seconds",
                field="data.batch_seconds",
            )
        _ = self.named_sources  # raises its error now

    @property
    def cache(self) -> Path:
        """Folder of what is prepared."""
        return Path(self.cache_dir).expanduser() if self.cache_dir else default_cache()

    @cached_property
    def splits(self) -> dict[str, AudioRows]:
        """The recordings of each split.

        Raises:
            TrunklineError: if a source cannot be read, or if a split is empty.
        """
        splits = {split: open_audio(source) for split, source in self.named_sources.items()}
        missing = {split: share for split, share in self.fractions.items() if share and split not in splits}
        if missing:
            rows = splits["train"]
            chosen = rows_by_number(len(rows), shares_of(missing))
            splits |= {split: AudioSubset(rows, indices) for split, indices in chosen.items()}
        return splits

    def clips(self, split: str, rows: AudioRows, options: Mapping[str, Any]) -> AudioClips:
        """The dataset of a split; `options` are the arguments of `AudioClips` beside the rows."""
        raise NotImplementedError

    def prepare_data(self) -> None:
        _ = self.splits

    def setup(self, stage: str) -> None:
        if self.datasets:
            return
        for split, rows in self.splits.items():
            training = split == "train"
            options = {
                "log_mel": self.log_mel,
                "augmentation": self.augmentation if training else None,
                "seed": self.seed,
                "skip_corrupt": self.skip_corrupt,
                "training": training,
            }
            self.datasets[split] = self.clips(split, rows, options)

    def token_batches(self, split: str) -> TokenBatches | None:
        if self.batch_seconds is None or (split != "train" and self.eval_batch_size is not None):
            return None
        rows: Any = self.datasets[split]
        return TokenBatches(rows.lengths, int(self.batch_seconds / self.log_mel.frame_seconds))

    # --- facts

    @property
    def facts(self) -> DataFacts:
        settings = self.log_mel
        return DataFacts(
            sample_rate=settings.sample_rate,
            num_mels=settings.num_mels,
            max_frames=settings.max_frames,
            frame_seconds=settings.frame_seconds,
            row_name=self.row_name,
            waveform=self.waveform,
        )

    def row_name(self, split: str, row: int) -> str:
        """The file or row, for messages."""
        return self.splits[split].name(row)

    def waveform(self, split: str, row: int) -> Tensor:
        """The samples (S,) of a row as the network hears it, without augmentation."""
        samples = self.splits[split].waveform(row, self.log_mel.sample_rate)
        return torch.from_numpy(samples[: self.log_mel.max_samples])

    def state_dict(self) -> dict[str, Any]:
        """What is needed to use a checkpoint without the data, as plain values."""
        return {"log_mel": asdict(self.log_mel), "fractions": self.fractions}
