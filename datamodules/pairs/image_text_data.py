"""Images with captions, as batches for a network of images and texts."""

import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from tokenizers import Tokenizer

from trunkline import TrunklineError
from trunkline.contract import DataFacts
from trunkline.datamodules.base import TrunklineDataModule
from trunkline.datamodules.content_digest import sampled_digest
from trunkline.datamodules.folders import names_and_sizes
from trunkline.datamodules.hub import HubSource
from trunkline.datamodules.images.image_decoding import to_channels
from trunkline.datamodules.images.preprocessing import Augmentation, ImageInput, TransformedImages
from trunkline.datamodules.pairs.captions import CaptionEncoder, caption_key
from trunkline.datamodules.pairs.emoji_pictures import OPENMOJI, TWEMOJI
from trunkline.datamodules.pairs.pair_sources import LISTS, PairRows, PairSubset, load_pairs, local_files
from trunkline.datamodules.samplers import SampleKey
from trunkline.datamodules.splits import RowsOfSplit, Splits, check_fractions, shares_of
from trunkline.datamodules.text.preparation import Preparation, default_cache
from trunkline.datamodules.text.text_sources import Piece
from trunkline.datamodules.tokenizers import TRAINED, Vocabulary, check_vocab_size, load_tokenizer
from trunkline.files import digest
from trunkline.ranges import check_ranges


class ImageTextPairs(TransformedImages):
    """Items of `ImageTextData`. Training draws one of a row's captions in each epoch; evaluation uses the first."""

    def __init__(self, rows: PairRows, encoder: CaptionEncoder, first_caption: float | None, *options: Any) -> None:
        super().__init__(len(rows), *options)
        self.rows, self.encoder, self.first_caption = rows, encoder, first_caption

    def read(self, row: int) -> dict[str, Any]:
        """Image and caption. The caption is not tokenised yet, because that is faster for a whole batch."""
        image = to_channels(self.rows.image(row), self.preprocessing.channels)
        captions = self.rows.captions(row)
        return {"image": image, "caption": captions[0 if self.seed is None else self.choice(len(captions))]}

    def choice(self, count: int) -> int:
        """Index of the caption to use, from 0 to `count` - 1.

        It always draws exactly one random number, because the augmentation uses the same generator afterwards.
        """
        drawn, first = random.random(), self.first_caption
        if first is None or count == 1:
            return int(drawn * count)
        return 0 if drawn < first else 1 + int((drawn - first) / (1 - first) * (count - 1))

    def __getitems__(self, keys: list[SampleKey]) -> list[dict[str, Any]]:
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

    def order(self, generator: np.random.Generator) -> Iterator[np.ndarray]:
        return self.rows.order(generator)


class Captions:
    """A `TextSource` of the captions of rows, to learn a tokenizer from."""

    def __init__(self, rows: PairRows, skip_corrupt: bool) -> None:
        self.rows, self.skip_corrupt = rows, skip_corrupt
        # No files, so that their content is not hashed: images are large, and the key of the rows shows a change.
        self.files: list[Path] = []
        self.key = ["captions", rows.key, skip_corrupt]

    def pieces(self, shares: dict[str, float]) -> Iterator[Piece]:
        """All captions, as documents of the training split."""
        for row in range(len(self.rows)):
            try:
                captions = self.rows.captions(row)
            except TrunklineError:
                if not self.skip_corrupt:
                    raise
                continue
            for caption in captions:
                yield Piece("train", caption, True)


@dataclass(kw_only=True, eq=False, repr=False)
class ImageTextData(Vocabulary, Splits, HubSource, ImageInput, TrunklineDataModule):
    """Images with captions from the offline emoji, local files or a hub name, as `PairBatch`es.

    The number of a row alone decides its split. `twemoji` and `openmoji` have the same rows: a network that was trained
    on one of them can be tested on the other, with the same fractions.
    """

    source: str = field(default=TWEMOJI, kw_only=False)
    """`twemoji` or `openmoji` (pictures of emoji with names and keywords); a .jsonl, .jsonl.gz or .csv list of image
    files with captions, or a folder of lists; a .tar file, a folder of .tar files, or a pattern
    (`cc3m-{0000..0331}.tar`, `*`); a Parquet or Arrow file, a folder of them, or a folder that `datasets` saved; else a
    Hugging Face hub name."""
    image_column: str = "image"
    """Column of a table that holds the images, or their paths relative to `image_folder`."""
    caption_column: str = "caption"
    """Column that holds the captions, texts or lists of texts; in tar shards the key in a .json file."""
    image_folder: str | None = None
    """Folder that the image paths in a table are relative to; None is the folder of the table."""
    flags: bool = False
    """Include the flags of countries in the emoji; many of them look almost the same."""
    tokenizer: str = "masked_bpe"
    max_length: int = 32
    first_caption: float | None = None
    """Probability that training draws the first caption of a row; None draws each caption with equal probability."""
    shard_window: int = 16
    """Number of tar shards whose samples are shuffled together. An epoch reads the shards in random order, in windows
    of this size, so that a process reads from few files at once."""
    cache_dir: str | None = None
    """Folder for two things: Trunkline's learnt tokenizers and indices of tar shards (None is $TRUNKLINE_CACHE, else
    ~/.cache/trunkline), and what the `datasets` library downloads and converts (None is its own cache)."""

    usual_augmentation: ClassVar[Augmentation] = Augmentation(crop_scale=(0.6, 1.0))

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges("data", self, max_skipped="[0, inf)")
        check_vocab_size(self.tokenizer, self.vocab_size)
        check_fractions(self.fractions)
        if self.first_caption is not None and not 0 <= self.first_caption < 1:
            raise TrunklineError(
                f"first_caption={self.first_caption} must be from 0 up to below 1, or null", field="data.first_caption"
            )
        if self.shard_window < 1:
            raise TrunklineError(f"shard_window must be 1 or more, not {self.shard_window}", field="data.shard_window")
        _ = self.preprocessing  # raises an error now if the settings do not fit together

    @property
    def in_memory(self) -> bool:
        return self.source in (TWEMOJI, OPENMOJI)

    @property
    def cache(self) -> Path:
        """Folder of our tokenizers and indices."""
        return Path(self.cache_dir).expanduser() if self.cache_dir else default_cache()

    @cached_property
    def rows(self) -> dict[str, PairRows]:
        """The rows of each split.

        Raises:
            TrunklineError: if the source cannot be read, or if a split is empty.
        """
        splits = load_pairs(
            self.source,
            self.image_column,
            self.caption_column,
            self.split_names,
            cache=self.cache,
            image_folder=self.image_folder,
            cache_dir=self.cache_dir,
            hub_config=self.hub_config,
            revision=self.revision,
            shard_window=self.shard_window,
            skip_corrupt=self.skip_corrupt,
            flags=self.flags,
        )
        return set_aside(splits, self.fractions)

    @cached_property
    def vocabulary(self) -> Tokenizer:
        """The tokenizer, loaded, or learnt at the first use and stored in `cache`; only one process learns it."""
        if self.tokenizer not in TRAINED:
            return load_tokenizer(self.tokenizer)
        captions = Captions(self.rows["train"], self.skip_corrupt)
        return Preparation([(captions, {"train": 1.0})], self.tokenizer, self.vocab_size, self.cache).tokenizer

    @property
    def facts(self) -> DataFacts:
        images, words = self.image_facts(), self.token_facts
        return replace(
            images,
            tokenizer=words.tokenizer,
            vocab_size=words.vocab_size,
            max_length=words.max_length,
            caption=self.caption,
            equal_shares=True,
        )

    def prepare_data(self) -> None:
        """Download, index and learn the tokenizer in one process, while the others wait.

        Raises:
            TrunklineError: if the source or the tokenizer cannot be read, or if `vocab_size` is too small.
        """
        _ = self.rows
        self.check_size()

    def setup(self, stage: str) -> None:
        """Make the splits.

        Raises:
            TrunklineError: the errors of `prepare_data`.
        """
        if self.datasets:
            return
        self.prepare_data()  # done already, unless `setup` is called by hand
        encoder = CaptionEncoder(self.vocabulary, self.max_length)
        for split, rows in self.rows.items():
            options = self.image_options(split, self.seed)
            self.datasets[split] = ImageTextPairs(rows, encoder, self.first_caption, *options)
        self.compare_tokenizers()

    def data_key(self) -> dict[str, Any]:
        found = {split: sampled_digest(len(rows), rows.stored) for split, rows in self.rows.items()}
        if self.in_memory:
            return {split: [rows.key, found[split]] for split, rows in self.rows.items()}
        folder, files = local_files(self.source)
        tables = (file for suffix in ("parquet", "arrow") for file in folder.rglob(f"*.{suffix}"))
        lists = [digest(file) for file in files if file.name.endswith(LISTS)]  # all of them are read anyway
        return {"files": names_and_sizes(files or sorted(tables), folder), "lists": lists, **found}

    def caption(self, split: str, row: int) -> str:
        """The main caption of a row."""
        return self.rows[split].captions(row)[0]

    def state_dict(self) -> dict[str, Any]:
        """What is needed to use a checkpoint without the data, as plain values."""
        return {
            **super().state_dict(),
            "preprocessing": asdict(self.preprocessing),
            "max_length": self.max_length,
            "fractions": self.fractions,
        }


def set_aside(splits: dict[str, PairRows], fractions: dict[str, float]) -> dict[str, PairRows]:
    """Set shares of the training rows aside for splits that the source does not have, by row number as in `split_of`.

    Raises:
        TrunklineError: if a split is empty.
    """
    missing = {split: share for split, share in fractions.items() if share and split not in splits}
    if missing:
        rows = splits["train"]
        shares = shares_of(missing)
        splits = splits | {split: PairSubset(rows, RowsOfSplit(len(rows), shares, split)) for split in shares}
    for split, rows in splits.items():
        if not len(rows):
            share = "val" if split == "train" else split
            raise TrunklineError(
                f"the {split} split is empty; give more rows, name a split with {split}_split, or set "
                f"{share}_fraction to another share",
                field=f"data.{share}_fraction",
            )
    return splits
