"""What the datamodules of recordings share: sources, splits, batches of like length, and what a checkpoint keeps."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from trunkline import TrunklineError
from trunkline.contract import DataFacts
from trunkline.datamodules.audio.audio_augmentation import AudioAugmentation
from trunkline.datamodules.audio.audio_files import MAX_HOURS
from trunkline.datamodules.audio.audio_input import AudioClips, too_long
from trunkline.datamodules.audio.audio_listing import ListedAudio
from trunkline.datamodules.audio.audio_manifests import AudioColumns
from trunkline.datamodules.audio.audio_rows import AudioRows, AudioSubset, windows
from trunkline.datamodules.audio.audio_sources import open_audio
from trunkline.datamodules.audio.log_mel import LogMel
from trunkline.datamodules.audio.waveform_cache import CachedAudio
from trunkline.datamodules.base import TrunklineDataModule
from trunkline.datamodules.content_digest import plain_digest, sampled_digest, short_digest
from trunkline.datamodules.hub import TextSplits
from trunkline.datamodules.skipping import MOST_NAMES
from trunkline.datamodules.splits import check_fractions, rows_by_number, shares_of
from trunkline.datamodules.text.preparation import default_cache
from trunkline.datamodules.token_batches import TokenBatches
from trunkline.ranges import check_ranges


@dataclass(kw_only=True, eq=False, repr=False)
class RecordingData(TextSplits, TrunklineDataModule):
    """Base of the datamodules of recordings.

    A subclass names the columns that it reads, and makes the dataset of a split in `clips`.
    """

    source: str = field(kw_only=False)
    """Where the recordings come from."""
    audio_column: str | None = None
    """Column of a table that holds the recordings, or their paths; None is the first of audio, path, file and
    audio_filepath that there is. A table can also have the columns start and end, in seconds, of a recording that is a
    part of its file, and sample_rate, which the file must then have."""
    audio_folder: str | None = None
    """Folder that paths are relative to; None is that of the list."""
    log_mel: LogMel = field(default_factory=LogMel)
    """How waveforms become features."""
    too_long: str
    """What happens to clips that are longer than `log_mel.max_seconds`."""
    augmentation: AudioAugmentation | None = None
    """Random changes to training clips; None for none."""
    skip_corrupt: bool = False
    """Leave out rows that cannot be used, such as broken files, and count them, instead of stopping with an error. A
    file that proves to be broken only when it is decoded is replaced by the next row."""
    max_skipped: float = 0.1
    """With `skip_corrupt`, rows of an epoch that training may replace before the run stops: below 1 a share of the
    training rows, else a number."""
    batch_seconds: float | None = None
    """Maximum of clips times longest clip in a step, in seconds, over all processes; clips of like length stand
    together. It replaces `batch_size`, and in evaluation too if `eval_batch_size` is not set. None: by `batch_size`."""
    cache_waveforms: bool = False
    """Decode and resample all recordings once, before the training, into a file of 230 MB an hour (at 16 kHz)."""
    cache_dir: str | None = None
    """Folder where Trunkline keeps what it prepares; None is $TRUNKLINE_CACHE, else ~/.cache/trunkline."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.left_out: dict[str, dict[str, int]] = {}
        """Split -> reason -> number of rows that were left out, known after `setup`."""
        check_ranges("data", self, max_skipped="[0, inf)")
        check_fractions(self.fractions)
        _ = self.named_sources  # raises its error now
        if self.batch_seconds is not None and self.batch_frames < self.log_mel.max_frames:
            raise TrunklineError(
                f"batch_seconds={self.batch_seconds} is less than the longest clip, with padding "
                f"{self.log_mel.max_frames * self.log_mel.frame_seconds:g} s; raise it, or lower max_seconds",
                field="data.batch_seconds",
            )

    @property
    def cache(self) -> Path:
        """Folder of what is prepared."""
        return Path(self.cache_dir).expanduser() if self.cache_dir else default_cache()

    @property
    def columns(self) -> AudioColumns:
        """Which columns of a table say what."""
        raise NotImplementedError

    def clips(self, split: str, rows: AudioRows, **options: Any) -> AudioClips:
        """The dataset of a split; `options` are the arguments of `AudioClips` beside the rows."""
        raise NotImplementedError

    # --- rows

    @cached_property
    def opened(self) -> dict[str, AudioRows]:
        """All recordings of each split whose files can be opened.

        Raises:
            TrunklineError: if a source cannot be read, or if a split is empty.
        """
        splits: dict[str, AudioRows] = {}
        for split, source in self.named_sources.items():
            found, faults = open_audio(
                source,
                self.columns,
                audio_folder=None if self.audio_folder is None else Path(self.audio_folder),
                skip_corrupt=self.skip_corrupt,
                longest=math.inf if self.too_long == "window" else MAX_HOURS * 3600,
                cache=self.cache,
            )
            found = {name: self.cached(rows) for name, rows in found.items()}
            splits |= found if split == "train" else {split: found["train"]}
            if faults:
                self.left_out.setdefault(split, {})["unreadable"] = len(faults)
                what = f"{len(faults)} recordings of source={source.name} are left out"
                rank_zero_warn(f"{what}; the first: {'; '.join(map(str, faults[:MOST_NAMES]))}")
        missing = {split: share for split, share in self.fractions.items() if share and split not in splits}
        if missing:
            splits |= self.set_aside(splits["train"], missing)
        for split, rows in splits.items():
            if not len(rows):
                share = "val" if split == "train" else split
                raise TrunklineError(
                    f"the {split} split of source={self.source} is empty; give more rows, set {share}_fraction to "
                    f"another share, or name a separate source with {share}_source",
                    field=f"data.{share}_fraction",
                )
        return splits

    def cached(self, rows: AudioRows) -> AudioRows:
        """The recordings, decoded once if `cache_waveforms` is on; what is made in code is stored anyway."""
        if not self.cache_waveforms or not isinstance(rows, ListedAudio):
            return rows
        return CachedAudio(rows, self.log_mel.sample_rate, self.cache, self.skip_corrupt)

    def set_aside(self, rows: AudioRows, fractions: Mapping[str, float]) -> dict[str, AudioRows]:
        """The rows of training and of the splits in `fractions`; the number of a row alone decides its split."""
        chosen = rows_by_number(len(rows), shares_of(fractions))
        return {split: AudioSubset(rows, indices) for split, indices in chosen.items()}

    def unwanted(self, split: str, rows: AudioRows) -> dict[str, np.ndarray]:
        """Reason -> (N,) bool, which rows are left out for it.

        Raises:
            TrunklineError: if a row cannot be used, and `skip_corrupt` is off.
        """
        skips = self.too_long == "skip" and split == "train"
        return {"too long": self.is_long(rows)} if skips else {}

    def is_long(self, rows: AudioRows) -> np.ndarray:
        """(N,) bool, which rows are longer than `max_seconds`."""
        return too_long(rows.seconds, self.log_mel)

    @cached_property
    def kept(self) -> dict[str, np.ndarray]:
        """Numbers of the rows of each split, among the `opened` ones, that are not left out.

        Raises:
            TrunklineError: the errors of `opened` and `unwanted`; if all rows of a split are left out.
        """
        kept = {}
        for split, rows in self.opened.items():
            keep = np.ones(len(rows), bool)
            for reason, rows_of_it in self.unwanted(split, rows).items():
                count = int((keep & rows_of_it).sum())
                if count:
                    self.left_out.setdefault(split, {})[reason] = count
                keep &= ~rows_of_it
            if not keep.any():
                raise TrunklineError(
                    f"all {len(rows)} recordings of the {split} split are left out ({self.reasons(split)}); raise "
                    f"max_seconds={self.log_mel.max_seconds:g}, or correct the source",
                    field="data.log_mel.max_seconds",
                )
            kept[split] = np.flatnonzero(keep)
        return kept

    @cached_property
    def splits(self) -> dict[str, AudioRows]:
        """The rows of each split.

        Raises:
            TrunklineError: the errors of `kept`.
        """
        splits = {split: AudioSubset(rows, self.kept[split]) for split, rows in self.opened.items()}
        if self.too_long != "window":
            return dict(splits)
        longest, slack = self.log_mel.max_seconds, self.log_mel.frame_seconds
        return {split: windows(rows, longest, slack) for split, rows in splits.items()}

    def prepare_data(self) -> None:
        """Open the sources in one process, while the others wait: what has to be prepared is prepared once.

        Raises:
            TrunklineError: the errors of `splits`.
        """
        _ = self.splits

    def setup(self, stage: str) -> None:
        if self.datasets:
            return
        for split, rows in self.splits.items():
            training = split == "train"
            self.datasets[split] = self.clips(
                split,
                rows,
                log_mel=self.log_mel,
                augmentation=self.augmentation if training else None,
                seed=self.seed,
                skip_corrupt=self.skip_corrupt,
                training=training,
            )
        rank_zero_info(f"training: {self.summary('train')}")
        self.compare_tokenizers()

    def data_key(self) -> dict[str, Any]:
        return {
            split: [
                short_digest(rows.seconds.tobytes()),
                plain_digest([rows.texts, rows.labels]),
                sampled_digest(len(rows), rows.stored),
            ]
            for split, rows in self.splits.items()
        }

    def summary(self, split: str) -> str:
        """How many clips and hours a split has, and what is left out or cut."""
        rows = self.splits[split]
        long = int(self.is_long(rows).sum())
        parts = [f"{len(rows):,} clips, {rows.seconds.sum() / 3600:.2f} hours"]
        parts += [f"{long:,} too long and cut"] if long else []
        parts += [f"left out: {self.reasons(split)}"] if self.left_out.get(split) else []
        return "; ".join(parts)

    def reasons(self, split: str) -> str:
        """What is left out of a split, and why."""
        return ", ".join(f"{count:,} {reason}" for reason, count in self.left_out.get(split, {}).items())

    @property
    def batch_frames(self) -> int:
        """`batch_seconds` in frames."""
        return round((self.batch_seconds or 0) / self.log_mel.frame_seconds)

    @property
    def limits_tokens(self) -> bool:
        return self.batch_seconds is not None

    def token_batches(self, split: str) -> TokenBatches | None:
        if self.batch_seconds is None or (split != "train" and self.eval_batch_size is not None):
            return None
        rows: Any = self.datasets[split]
        return TokenBatches(rows.lengths, self.batch_frames)

    # --- facts

    @property
    def facts(self) -> DataFacts:
        settings = self.log_mel
        return DataFacts(
            sample_rate=settings.sample_rate,
            num_mels=settings.num_mels,
            max_frames=settings.max_frames,
            frame_seconds=settings.frame_seconds,
            ragged=settings.padding == "batch",
            row_name=self.row_name,
            waveform=self.waveform,
            max_skipped=self.max_skipped if self.skip_corrupt else None,
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
        return {
            **super().state_dict(),
            "log_mel": asdict(self.log_mel),
            "fractions": self.fractions,
            "left_out": self.left_out,
        }
