"""Pairs of images and texts."""

import random
from collections.abc import Iterator
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from trunkline import TrunklineError
from trunkline.datamodules.base import TrunklineDataModule
from trunkline.datamodules.images.image_data import Augmentation, Preprocessing, TransformedImages
from trunkline.datamodules.images.image_sources import to_channels
from trunkline.datamodules.pairs.captions import CaptionEncoder, caption_key
from trunkline.datamodules.pairs.emoji_pictures import OPENMOJI, TWEMOJI
from trunkline.datamodules.pairs.pair_sources import PairRows, PairSubset, load_pairs
from trunkline.datamodules.samplers import SampleKey
from trunkline.datamodules.splits import check_fractions, rows_by_number, shares_of
from trunkline.datamodules.text.preparation import Preparation, default_cache
from trunkline.datamodules.text.text_sources import Piece
from trunkline.datamodules.tokenizers import TRAINED, TokenizerState, check_vocab_size, load_tokenizer


class ImageTextPairs(TransformedImages):
    """Items of `ImageTextData`: in training one of a row's captions, drawn anew each epoch, else the first."""

    def __init__(self, rows: PairRows, encoder: CaptionEncoder, first_caption: float | None, *options: Any) -> None:
        super().__init__(len(rows), *options)
        self.rows, self.encoder, self.first_caption = rows, encoder, first_caption

    def read(self, row: int) -> dict[str, Any]:
        """See `TransformedImages`; the caption is not yet tokens."""
        image = to_channels(self.rows.image(row), self.preprocessing.channels)
        captions = self.rows.captions(row)
        return {"image": image, "caption": captions[0 if self.seed is None else self.choice(len(captions))]}

    def choice(self, count: int) -> int:
        """Which of so many captions; one draw, however many: the augmentation draws after it."""
        drawn, first = random.random(), self.first_caption
        if first is None or count == 1:
            return int(drawn * count)
        return 0 if drawn < first else 1 + int((drawn - first) / (1 - first) * (count - 1))

    def __getitems__(self, keys: list[SampleKey]) -> list[dict[str, Any]]:
        """The items of a batch."""
        items = super().__getitems__(keys)
        captions = [item.pop("caption") for item in items]
        tokens, mask, truncated = self.encoder.encode(captions)
        for n, (item, caption) in enumerate(zip(items, captions, strict=True)):
            item |= {
                "tokens": tokens[n],
                "mask": mask[n],
                "caption_key": caption_key(caption),
                "truncated": int(truncated[n] and keys[n].valid),
            }
        return items

    def order(self, generator: np.random.Generator) -> np.ndarray:
        """See `ResumableBatchSampler`."""
        return self.rows.order(generator)


class Captions:
    """The captions of rows as a text to learn a tokenizer from: a `TextSource`."""

    def __init__(self, rows: PairRows, skip_corrupt: bool) -> None:
        self.rows, self.skip_corrupt = rows, skip_corrupt
        # No file's content is hashed: images are large, and the key of the rows tells a change.
        self.files: list[Path] = []
        self.key = ["captions", rows.key, skip_corrupt]

    def pieces(self, shares: dict[str, float]) -> Iterator[Piece]:
        """See `TextSource`; all are of the training split."""
        for row in range(len(self.rows)):
            try:
                captions = self.rows.captions(row)
            except TrunklineError:
                if not self.skip_corrupt:
                    raise
                continue
            for caption in captions:
                yield Piece("train", caption, True)


class ImageTextData(TokenizerState, TrunklineDataModule):
    """Images with captions from the offline emoji, local files or a hub name.

    Batches: `image` (B, C, height, width) float32; `tokens` (B, T) int64, see `CaptionEncoder`; `mask` (B, T) bool,
    False for padding; `caption_key` (B,) int64, the same for the same text; `index` (B,) row numbers in the split;
    `valid` (B,) bool and `skipped` (B,) int64, see `TransformedImages`; `truncated` (B,) int64, 1 if the caption lost
    its end.

    Rows go to a split by their number alone. `twemoji` and `openmoji` have the same rows: what was trained on the one
    with the same fractions can be tested on the other.

    Args:
        source: `twemoji` or `openmoji`, pictures of emoji with names and keywords; else see `load_pairs`.
        image_column: column of a table that holds the images, or paths below `image_folder`.
        caption_column: column of the captions, texts or lists of texts; in tar shards the field of a .json.
        image_folder: where paths in a table begin; None is the folder of the table.
        train_split: the source's name of the training split; None finds `train`.
        val_split: the same for validation; None finds the usual names, else takes `val_fraction`.
        test_split: the same for testing; None finds the usual names, else takes `test_fraction`.
        val_fraction: share of the training rows set aside, if the source has no such split.
        test_fraction: the same for testing.
        flags: whether flags of countries are among the emoji: many of them hardly differ.
        tokenizer: chars, bpe, masked_bpe or wordpiece, learnt from the training captions (100 MB of them at most); a
            tokenizer.json, a checkpoint (.ckpt) or a hub name.
        vocab_size: of a tokenizer learnt here at most; what the network gets. None takes 8192 and the tokenizer's own.
        max_length: T, tokens of a row with the special ones.
        first_caption: probability that training draws a row's first caption; None draws each equally often.
        image_size: pixels that the network takes: one side, or (height, width).
        channels: 1 (grey) or 3 (RGB).
        mean: of each channel, subtracted after scaling to 0..1.
        std: of each channel, divided by.
        interpolation: bilinear, bicubic, nearest or lanczos.
        crop_pct: side of the centre crop in evaluation, as a share of the resized image.
        augmentation: random changes to training images; None crops mildly, for captions are of the whole.
        skip_corrupt: replace rows without a readable image and caption by the next and count them, instead of stopping.
        shard_window: see `TarPairs`.
        cache_dir: of tokenizers and indices, and what `datasets` converts; None is $TRUNKLINE_CACHE or
            ~/.cache/trunkline, and the folder of `datasets`.
        batch_size: see `TrunklineDataModule`, as the next three.
        eval_batch_size: see there.
        num_workers: see there.
        seed: see there.
    """

    def __init__(
        self,
        source: str = TWEMOJI,
        image_column: str = "image",
        caption_column: str = "caption",
        image_folder: str | None = None,
        train_split: str | None = None,
        val_split: str | None = None,
        test_split: str | None = None,
        val_fraction: float = 0.1,
        test_fraction: float = 0.0,
        flags: bool = False,
        tokenizer: str = "masked_bpe",
        vocab_size: int | None = None,
        max_length: int = 32,
        first_caption: float | None = None,
        image_size: int | tuple[int, int] = 224,
        channels: int = 3,
        mean: tuple[float, ...] = (0.5,),
        std: tuple[float, ...] = (0.5,),
        interpolation: str = "bicubic",
        crop_pct: float = 1.0,
        augmentation: Augmentation | None = None,
        skip_corrupt: bool = False,
        shard_window: int = 16,
        cache_dir: str | None = None,
        batch_size: int = 64,
        eval_batch_size: int | None = None,
        num_workers: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, num_workers, seed)
        check_vocab_size(tokenizer, vocab_size)
        fractions = {"val": val_fraction, "test": test_fraction}
        check_fractions(fractions)
        if first_caption is not None and not 0 <= first_caption < 1:
            raise TrunklineError(f"--data.first_caption {first_caption} must be from 0 up to below 1, or null")
        if shard_window < 1:
            raise TrunklineError(f"--data.shard_window must be 1 or more, not {shard_window}")
        self.preprocessing = Preprocessing(image_size, channels, mean, std, interpolation, crop_pct)
        self.augmentation = augmentation or Augmentation(crop_scale=(0.6, 1.0))
        self.source, self.columns, self.fractions = source, (image_column, caption_column), fractions
        self.split_names = {"train": train_split, "val": val_split, "test": test_split}
        self.first_caption = first_caption
        self.skip_corrupt, self.cache_dir = skip_corrupt, cache_dir
        self.source_options: dict[str, Any] = {
            "image_folder": image_folder,
            "shard_window": shard_window,
            "skip_corrupt": skip_corrupt,
            "flags": flags,
        }
        self.tokenizer_name, self.declared_size, self.max_length = tokenizer, vocab_size, max_length
        self.in_memory = source in (TWEMOJI, OPENMOJI)

    @property
    def cache(self) -> Path:
        """Our own folder."""
        return Path(self.cache_dir).expanduser() if self.cache_dir else default_cache()

    @cached_property
    def rows(self) -> dict[str, PairRows]:
        """Those of each split.

        Raises:
            TrunklineError: if the source cannot be read, or a split comes out empty.
        """
        options = {**self.source_options, "cache": self.cache, "cache_dir": self.cache_dir}
        return set_aside(load_pairs(self.source, *self.columns, self.split_names, **options), self.fractions)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Read, or learnt at the first use and kept: once among all processes."""
        if self.tokenizer_name not in TRAINED:
            return load_tokenizer(self.tokenizer_name)
        captions = Captions(self.rows["train"], self.skip_corrupt)
        return Preparation([(captions, {"train": 1.0})], self.tokenizer_name, self.declared_size, self.cache).tokenizer

    def prepare_data(self) -> None:
        """Download, index and learn once, before the other processes look.

        Raises:
            TrunklineError: if the source or the tokenizer cannot be read, or `vocab_size` is declared too small.
        """
        _ = self.rows
        self.check_size()

    def setup(self, stage: str) -> None:
        """Make the splits.

        Raises:
            TrunklineError: as `prepare_data` has it.
        """
        if self.datasets:
            return
        self.prepare_data()  # done already, unless `setup` is called by hand
        encoder = CaptionEncoder(self.tokenizer, self.max_length)
        for split, rows in self.rows.items():
            augmentation = self.augmentation if split == "train" else None
            options = (self.preprocessing, augmentation, self.seed, self.skip_corrupt)
            self.datasets[split] = ImageTextPairs(rows, encoder, self.first_caption, *options)

    def caption(self, split: str, row: int) -> str:
        """The main caption of a row, for whoever shows it."""
        return self.rows[split].captions(row)[0]

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs to know of the data to be used by itself, as plain values."""
        return {
            **super().state_dict(),
            "preprocessing": asdict(self.preprocessing),
            "max_length": self.max_length,
            "fractions": dict(self.fractions),
        }


def set_aside(splits: dict[str, PairRows], fractions: dict[str, float]) -> dict[str, PairRows]:
    """Take shares of the training rows for splits that the source does not have, each row by its number, as `split_of`.

    Raises:
        TrunklineError: if a split comes out empty.
    """
    missing = {split: share for split, share in fractions.items() if share and split not in splits}
    if missing:
        rows = splits["train"]
        taken = rows_by_number(len(rows), shares_of(missing))
        splits = splits | {split: PairSubset(rows, indices) for split, indices in taken.items()}
    for split, rows in splits.items():
        if not len(rows):
            raise TrunklineError(
                f"the {split} split comes out empty; give more rows, name a split with --data.{split}_split, or set "
                f"--data.{'val' if split == 'train' else split}_fraction to another share"
            )
    return splits
