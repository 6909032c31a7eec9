"""Text for language models: tokenised once, read from disk."""

from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from tokenizers import Tokenizer
from torch.utils.data import Dataset

from trunkline import TrunklineError
from trunkline.contract import DataFacts
from trunkline.datamodules.base import TrunklineDataModule
from trunkline.datamodules.hub import TextSplits
from trunkline.datamodules.splits import check_fractions, shares_of
from trunkline.datamodules.text.packing import Blocks, Documents, PackedRows
from trunkline.datamodules.text.preparation import Preparation, default_cache
from trunkline.datamodules.text.text_sources import first_documents, open_text
from trunkline.datamodules.text.token_shards import TokenStream
from trunkline.datamodules.tokenizers import Vocabulary, check_vocab_size


@dataclass(kw_only=True, eq=False, repr=False)
class TokenisedText(Vocabulary, TextSplits, TrunklineDataModule):
    """Base of text for language models, from offline books, local files or a hub name; subclasses make the rows.

    A text file is one document. Alone, or in a folder with fewer than 100 files, it is cut by position: its end goes to
    the test split, the part before that to the validation split. Rows of tables, chapters of books, and the files of
    larger folders go to one split as a whole, by their number alone.
    """

    source: str = field(default="kjv", kw_only=False)
    """`kjv`, `asv`, `pydoc`, `wordnet` or `emoji`; a file (in .jsonl, .json, .csv and .parquet each row is a document;
    any other text file is one document) or a folder with files of one kind; else a Hugging Face hub name."""
    text_column: str = "text"
    """Column of a table that holds the text."""
    max_documents: int | None = None
    """Read only this many documents of `source`, the first ones; for tables and hub datasets that are too large."""
    cache_dir: str | None = None
    """Folder where Trunkline keeps tokens and learnt tokenizers; None is $TRUNKLINE_CACHE, else ~/.cache/trunkline. The
    `datasets` library does not use it: texts of a hub are streamed. A hub dataset without a `revision` is not prepared
    again when it changes on the hub."""
    batch_size: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_length < 1:
            raise TrunklineError(f"max_length must be at least 1, not {self.max_length}", field="data.max_length")
        check_vocab_size(self.tokenizer, self.vocab_size)
        check_fractions(self.fractions)
        self.bytes_per_token: dict[str, float] = {}
        """UTF-8 bytes of text per token in each split, after `setup`: converts nats per token to bits per byte."""

    @property
    def in_memory(self) -> bool:
        return True  # memory-mapped files are read faster than samples are sent between processes

    @cached_property
    def preparation(self) -> Preparation:
        """The prepared corpus on disk.

        Raises:
            TrunklineError: if a source is missing.
        """
        named = self.named_sources
        shares = {split: {split: 1.0} for split in named} | {"train": shares_of(self.fractions)}
        opened = {split: open_text(source, self.text_column) for split, source in named.items()}
        if self.max_documents is not None:
            opened["train"] = first_documents(opened["train"], self.max_documents, self.source)
        sources = [(source, shares[split]) for split, source in opened.items()]
        cache = Path(self.cache_dir).expanduser() if self.cache_dir else default_cache()
        return Preparation(sources, self.tokenizer, self.vocab_size, cache)

    @property
    def vocabulary(self) -> Tokenizer:
        """The tokenizer, loaded or learnt at the first use.

        Raises:
            TrunklineError: if the text or the tokenizer cannot be read.
        """
        return self.preparation.tokenizer

    @property
    def facts(self) -> DataFacts:
        """The tokenizer and its sizes; after `setup` also the bytes per token."""
        return replace(self.token_facts, bytes_per_token=self.bytes_per_token)

    def prepare_data(self) -> None:
        """Tokenise the text in one process, while the others wait."""
        self.check_size()
        self.preparation.prepare()

    def setup(self, stage: str) -> None:
        """Open the prepared splits.

        Raises:
            TrunklineError: if a split is too short for one row.
        """
        if self.datasets:
            return
        self.prepare_data()  # done already, unless `setup` is called by hand
        for split, entry in self.preparation.prepare()["splits"].items():
            train = split == "train"
            stream = self.preparation.stream(split)
            needed = self.shortest_stream(train)
            if len(stream) < needed:
                raise TrunklineError(
                    f"the {split} split of {self.source} has {len(stream)} tokens, fewer than one row needs "
                    f"({needed}); give more text, or lower max_length",
                    field="data.max_length",
                )
            self.datasets[split] = self.make_rows(stream, train)
            self.bytes_per_token[split] = entry["bytes"] / entry["tokens"]
        self.compare_tokenizers()

    def data_key(self) -> dict[str, Any]:
        prepared = {split: self.preparation.stream(split).digest() for split in self.datasets}
        return {"texts": self.preparation.text_key, **prepared}

    def shortest_stream(self, train: bool) -> int:
        """Minimum number of tokens that a split needs to make one row."""
        return self.max_length + 1 if train else 2

    def make_rows(self, stream: TokenStream, train: bool) -> Dataset[Any]:
        """Rows of one split."""
        raise NotImplementedError

    def tokenizer_origin(self) -> str:
        return f"{super().tokenizer_origin()} on source={self.source}"  # a tokenizer that is learnt depends on the text


@dataclass(kw_only=True, eq=False, repr=False)
class TextData(TokenisedText):
    """Text for causal language models, as `TokenBatch`es. `Blocks` and `Documents` make the rows."""

    tokenizer: str = "bpe"
    max_length: int = 256
    packing: Literal["block", "documents"] = "block"
    """`block` (rows of running text) or `documents` (whole documents packed into rows, which do not see each other)."""

    def shortest_stream(self, train: bool) -> int:
        if self.packing == "documents":
            return 2  # rows of documents can be padded
        return super().shortest_stream(train)

    def make_rows(self, stream: TokenStream, train: bool) -> Dataset[Any]:
        if self.packing == "documents":
            return PackedRows(Documents(stream, self.max_length))
        return PackedRows(Blocks(stream, self.max_length, self.seed if train else None))
