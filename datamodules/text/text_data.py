"""Text for language models: tokenised once, read from disk."""

from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from tokenizers import Tokenizer
from torch.utils.data import Dataset

from trunkline import TrunklineError
from trunkline.datamodules.base import TrunklineDataModule
from trunkline.datamodules.splits import check_fractions, shares_of
from trunkline.datamodules.text.packing import Blocks, Documents, PackedRows
from trunkline.datamodules.text.preparation import Preparation, default_cache
from trunkline.datamodules.text.text_sources import TextSource, open_text
from trunkline.datamodules.text.token_shards import TokenStream
from trunkline.datamodules.tokenizers import TokenizerState, check_vocab_size


class TextData(TokenizerState, TrunklineDataModule):
    """Text from offline books, local files or a hub name, in rows of tokens.

    Batches: `tokens` (B, T) int64; `targets` (B, T) int64, the ids that follow, -100 where nothing is to be
    predicted; `document` (B, T) int64, only of packed documents: the number of each token's document in its
    row from 1 on, 0 for padding; `index` (B,) row numbers; `valid` (B,) bool. See `Blocks` and `Documents`.

    A text file, and each of fewer than 100 in a folder, is one document and cut by position: its end goes
    to the test split, what comes before to the validation split. Rows, chapters and the files of
    larger folders go whole to a split, by their number alone.

    Args:
        path: `kjv`, `asv`, `pydoc`, `wordnet`, `emoji`; a file (.txt and the like: one document; .jsonl, .json, .csv,
            .parquet: a row is a document) or a folder of files of one kind; else a Hugging Face hub name.
        text_column: of tables.
        tokenizer: `chars`, `bpe` (byte-level), `masked_bpe` (the same with `[MASK]` and its like) or `wordpiece`,
            trained on the training split; else a tokenizer.json, a training checkpoint or a hub name.
        vocab_size: what the network gets; None takes the tokenizer's own. All but `chars` are
            trained to it (None: 8192), other tokenizers are padded to it.
        max_length: T, tokens of a row.
        packing: `block` (running text) or `documents` (whole ones, which do not see each other).
        val_fraction: share of the text set aside for validation.
        test_fraction: the same for testing.
        val_path: a source of its own instead of `val_fraction`.
        test_path: the same for testing.
        hub_config: configuration of a hub dataset.
        hub_split: its split that is read.
        revision: its commit; without one a prepared text is kept when the hub's changes.
        cache_dir: where the tokens go; None takes $TRUNKLINE_CACHE, else ~/.cache/trunkline.
        batch_size: see `TrunklineDataModule`, as the next three.
        eval_batch_size: see there.
        num_workers: see there.
        seed: see there.
    """

    in_memory = True  # reading from mapped files costs less than sending

    def __init__(
        self,
        path: str = "kjv",
        text_column: str = "text",
        tokenizer: str = "bpe",
        vocab_size: int | None = None,
        max_length: int = 256,
        packing: Literal["block", "documents"] = "block",
        val_fraction: float = 0.1,
        test_fraction: float = 0.0,
        val_path: str | None = None,
        test_path: str | None = None,
        hub_config: str | None = None,
        hub_split: str = "train",
        revision: str | None = None,
        batch_size: int = 32,
        eval_batch_size: int | None = None,
        num_workers: int | None = None,
        cache_dir: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, num_workers, seed)
        if max_length < 1:
            raise TrunklineError(f"--data.max_length must be at least 1, not {max_length}")
        check_vocab_size(tokenizer, vocab_size)
        self.paths = {"path": path, "val_path": val_path, "test_path": test_path}
        self.columns_and_hub = (text_column, hub_config, hub_split, revision)
        self.fractions = {"val": 0.0 if val_path else val_fraction, "test": 0.0 if test_path else test_fraction}
        check_fractions(self.fractions)
        self.tokenizer_name, self.declared_size = tokenizer, vocab_size
        self.max_length, self.packing, self.cache_dir = max_length, packing, cache_dir
        self.bytes_per_token: dict[str, float] = {}
        """UTF-8 bytes of text per token of each split, after `setup`: turns nats per token into bits per byte."""

    @cached_property
    def preparation(self) -> Preparation:
        """The corpus on disk.

        Raises:
            TrunklineError: if a source is missing.
        """
        shares = shares_of(self.fractions)
        sources: list[tuple[TextSource, dict[str, float]]] = [(self._open("path"), shares)]
        sources += [(self._open(f"{s}_path"), {s: 1.0}) for s in ("val", "test") if self.paths[f"{s}_path"]]
        cache = Path(self.cache_dir).expanduser() if self.cache_dir else default_cache()
        return Preparation(sources, self.tokenizer_name, self.declared_size, cache)

    def _open(self, flag: str) -> TextSource:
        column, hub_config, hub_split, revision = self.columns_and_hub
        return open_text(str(self.paths[flag]), column, hub_config, hub_split, revision, flag)

    @property
    def tokenizer(self) -> Tokenizer:
        """Read, or trained at the first use.

        Raises:
            TrunklineError: if the text or tokenizer cannot be read.
        """
        return self.preparation.tokenizer

    def prepare_data(self) -> None:
        """Tokenise once, before the other processes look."""
        self.check_size()
        self.preparation.prepare()

    def setup(self, stage: str) -> None:
        """Open what is prepared.

        Raises:
            TrunklineError: if a split is too short for one row.
        """
        if self.datasets:
            return
        self.prepare_data()  # done already, unless `setup` is called by hand
        for split, entry in self.preparation.prepare()["splits"].items():
            train = split == "train"
            stream = self.preparation.stream(split)
            needed = self.max_length + 1 if train and self.packing == "block" else 2
            if len(stream) < needed:
                raise TrunklineError(
                    f"the {split} split of {self.paths['path']} has {len(stream)} tokens, fewer than one row needs "
                    f"({needed}); give more text, or lower --data.max_length"
                )
            self.datasets[split] = self.make_rows(stream, train)
            self.bytes_per_token[split] = entry["bytes"] / entry["tokens"]

    def make_rows(self, stream: TokenStream, train: bool) -> Dataset[Any]:
        """Rows of one split."""
        if self.packing == "documents":
            return PackedRows(Documents(stream, self.max_length))
        return PackedRows(Blocks(stream, self.max_length, self.seed if train else None))

    def tokenizer_origin(self) -> str:
        """See `TokenizerState`; a trained one depends on the text too."""
        return f"{super().tokenizer_origin()} on --data.path {self.paths['path']}"
