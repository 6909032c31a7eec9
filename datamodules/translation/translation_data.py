"""Pairs of texts for an encoder-decoder: translations, summaries, questions and answers."""

from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from lightning.pytorch.utilities import rank_zero_info
from tokenizers import Tokenizer

from trunkline import TrunklineError
from trunkline.contract import DataFacts
from trunkline.datamodules.base import TrunklineDataModule
from trunkline.datamodules.hub import NamedSource, TextSplits
from trunkline.datamodules.splits import check_fractions, shares_of
from trunkline.datamodules.text.preparation import Preparation, default_cache
from trunkline.datamodules.text.text_sources import TextSource
from trunkline.datamodules.token_batches import TokenBatches
from trunkline.datamodules.tokenizers import Vocabulary, check_room, check_vocab_size, embedding_rows, end_of_text_id
from trunkline.datamodules.translation.pair_texts import PairTexts
from trunkline.datamodules.translation.parallel_sources import open_pairs
from trunkline.datamodules.translation.source_encoder import SourceEncoder
from trunkline.datamodules.translation.text_pairs import PairColumns, PairSource, language_token
from trunkline.datamodules.translation.translation_rows import SideTokens, TranslationRows


@dataclass(kw_only=True, eq=False, repr=False)
class TranslationData(Vocabulary, TextSplits, TrunklineDataModule):
    """Pairs of texts, as `SequencePairBatch`es, from tables, two parallel files, TMX, a hub name or offline sources.

    A source is `[<2de>] prefix text <end>`, a target `text <end>`; the decoder reads a start token, then the target
    without its end. Texts are tokenised once, and read from disk. The number of a row alone decides its split.
    """

    source: str = field(kw_only=False)
    """A table (.jsonl, .csv, .parquet), a TMX file or a folder of such files; the first of two text files that have the
    same number of lines; `dates` or `phrases`; else a Hugging Face hub name (a split can follow after a colon)."""
    target_source: str | None = None
    """The second of two text files: the translation of each line of `source`."""
    val_target_source: str | None = None
    """The second of two text files for validation; the first is `val_source`."""
    test_target_source: str | None = None
    """The second of two text files for testing; the first is `test_source`."""
    source_column: str = "source"
    """Column of the sources; of a `translation` column or a TMX file the sources' language."""
    target_column: str = "target"
    """Column of the targets; of a `translation` column or a TMX file the targets' language."""
    language_column: str | None = None
    """Column with the language of each row's target."""
    pairs: list[str] | None = None
    """Directions such as [en-de, de-en], instead of the three columns: a row has one pair for each direction."""
    languages: list[str] | None = None
    """Target languages of the model; each source begins with a token for the language of its target, such as `<2de>`
    (arXiv:1611.04558). None: the model is told no language."""
    prefix: str = ""
    """Text before every source, such as `translate English to German: `."""
    tokenizer: str = "bpe"
    target_tokenizer: str | None = None
    """Tokenizer of the targets, with the same choices as `tokenizer`; None: one tokenizer, learnt from both sides."""
    target_vocab_size: int | None = None
    """The `vocab_size` of `target_tokenizer`."""
    max_length: int = 128
    """Maximum number of tokens in a source, special tokens included."""
    max_target_length: int = 128
    """Maximum number of tokens in a target, its end included."""
    too_long: Literal["cut", "skip"] = "cut"
    """What happens to longer pairs: `cut` takes the end of a text off; `skip` leaves the pair out of training, while
    evaluation still cuts it, so that scores are of all pairs."""
    batch_tokens: int | None = None
    """Maximum of rows times longest row in a step, over all processes and for each side; rows of like length stand
    together. It replaces `batch_size`, and in evaluation too if `eval_batch_size` is not set. None: by `batch_size`."""
    start_token: str | None = None
    """Token that the decoder reads before a target; None is the token that ends a text."""
    cache_dir: str | None = None
    """Folder where Trunkline keeps tokens and learnt tokenizers; None is $TRUNKLINE_CACHE, else ~/.cache/trunkline. A
    hub dataset without a `revision` is not prepared again when it changes on the hub."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.overlong: dict[str, int] = {}
        """Number of pairs of each split that are too long, known after `setup`."""
        special = len(self.languages or ())
        check_room(self.max_length, 2 + bool(special))
        check_room(self.max_target_length, 2, "data.max_target_length")
        check_vocab_size(self.tokenizer, self.vocab_size, special)
        check_fractions(self.fractions)
        if self.target_tokenizer is not None:
            check_vocab_size(self.target_tokenizer, self.target_vocab_size, field="data.target_vocab_size")
        elif self.target_vocab_size is not None:
            raise TrunklineError(
                f"target_vocab_size={self.target_vocab_size} is of a target_tokenizer, but source and target share "
                "one; leave it out, or set target_tokenizer",
                field="data.target_vocab_size",
            )
        if self.batch_tokens is not None and self.batch_tokens < 1:
            raise TrunklineError(f"batch_tokens must be 1 or more, not {self.batch_tokens}", field="data.batch_tokens")
        self._check_languages()
        _ = self.columns, self.named_targets  # raise their errors now

    def _check_languages(self) -> None:
        if self.languages is not None and (not self.languages or len(set(self.languages)) < len(self.languages)):
            raise TrunklineError(
                f"languages={', '.join(self.languages)} must be different names, at least one; or leave it out",
                field="data.languages",
            )
        if self.languages is None and self.language_column is not None:
            raise TrunklineError(
                f"language_column={self.language_column} is of no use without languages; list the target languages",
                field="data.languages",
            )

    # --- sources and tokenizers

    @property
    def in_memory(self) -> bool:
        return True  # memory-mapped files are read faster than samples are sent between processes

    @property
    def columns(self) -> PairColumns:
        """Where a table has source and target."""
        return PairColumns(self.source_column, self.target_column, self.language_column, self.pairs)

    @property
    def named_targets(self) -> dict[str, NamedSource]:
        """The second of two text files, for each split that has one.

        Raises:
            TrunklineError: if the first one is missing.
        """
        given = {"train": self.target_source, "val": self.val_target_source, "test": self.test_target_source}
        firsts = {"train": self.source, "val": self.val_source, "test": self.test_source}
        targets = {}
        for split, name in given.items():
            if name is None:
                continue
            prefix = "" if split == "train" else f"{split}_"
            if firsts[split] is None:
                raise TrunklineError(
                    f"{prefix}target_source={name} needs {prefix}source, the file with the sources of its lines",
                    field=f"data.{prefix}source",
                )
            targets[split] = NamedSource(name, f"{prefix}target_source")
        return targets

    @cached_property
    def opened_pairs(self) -> list[tuple[PairSource, dict[str, float]]]:
        """The sources of pairs, each with the share of it that goes to each split.

        Raises:
            TrunklineError: if a source is missing.
        """
        named, targets = self.named_sources, self.named_targets
        shares = {split: {split: 1.0} for split in named} | {"train": shares_of(self.fractions)}
        return [(open_pairs(named[split], targets.get(split), self.columns), shares[split]) for split in named]

    @cached_property
    def preparations(self) -> list[Preparation]:
        """The prepared corpora: one with the documents of both sides in turn, or one for each side.

        Raises:
            TrunklineError: if a source is missing.
        """
        if self.target_tokenizer is None:
            return [self._preparation(["source", "target"], self.tokenizer, self.vocab_size, "data.tokenizer")]
        return [
            self._preparation(["source"], self.tokenizer, self.vocab_size, "data.tokenizer"),
            self._preparation(["target"], self.target_tokenizer, self.target_vocab_size, "data.target_tokenizer"),
        ]

    def _preparation(self, sides: list[str], tokenizer: str, vocab_size: int | None, field: str) -> Preparation:
        prefix, languages = (self.prefix, self.languages) if "source" in sides else ("", None)
        texts: list[tuple[TextSource, dict[str, float]]] = [
            (PairTexts(pairs, sides, prefix, languages), shares) for pairs, shares in self.opened_pairs
        ]
        return Preparation(
            texts,
            tokenizer,
            vocab_size,
            Path(self.cache_dir).expanduser() if self.cache_dir else default_cache(),
            special=[language_token(language) for language in languages or ()],
            texts={split for _, shares in texts for split in shares} - {"train"},
            field=field,
        )

    @property
    def vocabulary(self) -> Tokenizer:
        """The tokenizer of the sources, loaded or learnt at the first use."""
        return self.preparations[0].tokenizer

    @property
    def target_vocabulary(self) -> Tokenizer:
        """The tokenizer of the targets; the same one if they share it."""
        return self.preparations[-1].tokenizer

    @property
    def end_id(self) -> int:
        """Id of the token that ends a target."""
        return end_of_text_id(self.target_vocabulary, self.preparations[-1].field)

    @property
    def start_id(self) -> int:
        """Id of the token that the decoder reads before a target.

        Raises:
            TrunklineError: if the tokenizer does not have `start_token`.
        """
        if self.start_token is None:
            return self.end_id
        number = self.target_vocabulary.token_to_id(self.start_token)
        if number is None:
            raise TrunklineError(
                f"the tokenizer of the targets has no token start_token={self.start_token}; name one that it has, or "
                "leave it out for the token that ends a text",
                field="data.start_token",
            )
        return number

    @cached_property
    def encoder(self) -> SourceEncoder:
        """Turns sources into the token ids that they have in training."""
        return SourceEncoder(self.vocabulary, prefix=self.prefix, languages=self.languages, max_length=self.max_length)

    def check_size(self) -> None:
        super().check_size()
        if self.target_tokenizer is not None:
            embedding_rows(*self._target_size)

    @property
    def _target_size(self) -> tuple[Tokenizer, int | None, str, str]:
        return self.target_vocabulary, self.target_vocab_size, str(self.target_tokenizer), "data.target_vocab_size"

    @property
    def facts(self) -> DataFacts:
        """Tokenizers, sizes, special tokens and texts; the texts are known after `setup`."""
        own = self.target_tokenizer is not None
        return replace(
            self.token_facts,
            target_tokenizer=self.target_vocabulary if own else None,
            target_vocab_size=embedding_rows(*self._target_size) if own else None,
            max_target_length=self.max_target_length,
            start_token=self.start_id,
            end_token=self.end_id,
            pair=self.pair,
            source_tokens=self.source_tokens,
            encode_source=self.encoder.encode,
            ragged=True,
        )

    # --- rows

    def prepare_data(self) -> None:
        """Tokenise the texts in one process, while the others wait.

        Raises:
            TrunklineError: if a source or tokenizer cannot be read or does not fit, or if a split is empty.
        """
        self.check_size()
        self._check_prefix()
        _ = self.start_id
        for preparation in self.preparations:
            preparation.prepare()

    def _check_prefix(self) -> None:
        used = len(self.encoder.encode(["."], None if self.languages is None else self.languages[0])[0])
        if used >= self.max_length:
            raise TrunklineError(
                f"max_length={self.max_length} leaves no room for text beside the special tokens and the prefix "
                f"'{self.prefix}'; raise it, or shorten the prefix",
                field="data.max_length",
            )

    def setup(self, stage: str) -> None:
        """Open the prepared splits.

        Raises:
            TrunklineError: if all pairs of training are left out.
        """
        if self.datasets:
            return
        self.prepare_data()  # done already, unless `setup` is called by hand
        for split in self.preparations[0].prepare()["splits"]:
            source, target = self.sides(split)
            long = (source.lengths > source.limit) | (target.lengths > target.limit)
            self.overlong[split] = int(long.sum())
            skips = self.too_long == "skip" and split == "train"
            if skips and long.all():
                raise TrunklineError(
                    f"all {len(long)} pairs of training are too long for max_length={self.max_length} and "
                    f"max_target_length={self.max_target_length}; raise them, or set too_long=cut",
                    field="data.max_length",
                )
            self.datasets[split] = TranslationRows(
                source, target, self.start_id, np.flatnonzero(~long) if skips else None
            )
        if self.overlong["train"]:
            rank_zero_info(f"training: {self.summary('train')}")
        self.compare_tokenizers()

    def data_key(self) -> dict[str, Any]:
        prepared = {split: [one.stream(split).digest() for one in self.preparations] for split in self.datasets}
        return {"texts": [preparation.text_key for preparation in self.preparations], **prepared}

    def sides(self, split: str) -> tuple[SideTokens, SideTokens]:
        """The tokens of the sources and of the targets of a prepared split."""
        corpora = []
        for preparation in self.preparations:
            stream = preparation.stream(split)
            texts = None if split == "train" else preparation.texts(split)
            corpora.append((stream, np.concatenate([[0], stream.document_ends()]), texts))
        step = 2 if len(corpora) == 1 else 1  # documents of both sides in turn, or each side alone
        return (
            SideTokens(*corpora[0], first=0, step=step, limit=self.max_length),
            SideTokens(*corpora[-1], first=step - 1, step=step, limit=self.max_target_length),
        )

    @property
    def limits_tokens(self) -> bool:
        return self.batch_tokens is not None

    def token_batches(self, split: str) -> TokenBatches | None:
        if self.batch_tokens is None or (split != "train" and self.eval_batch_size is not None):
            return None
        rows: Any = self.datasets[split]
        return TokenBatches(rows.lengths, self.batch_tokens)

    def pair(self, split: str, row: int) -> tuple[str, str]:
        """Source (without the prefix) and target of a row as text, after `setup`.

        Texts of training are decoded from their tokens; those of evaluation are kept as they are.
        """
        rows: Any = self.datasets[split]
        number, texts = int(rows.pairs[row]), []
        for side, tokenizer in ((rows.source, self.vocabulary), (rows.target, self.target_vocabulary)):
            text = side.text(number)
            texts.append(tokenizer.decode(side.read(number)[0].tolist()) if text is None else text)
        return texts[0].removeprefix(self.prefix), texts[1]

    def source_tokens(self, split: str, row: int) -> list[int]:
        """Token ids of the source of a row, after `setup`."""
        rows: Any = self.datasets[split]
        return rows.source.read(int(rows.pairs[row]))[0].tolist()

    def summary(self, split: str) -> str:
        """How many pairs a split has, and how many are too long; known after `setup`."""
        rows: Any = self.datasets[split]
        count, long = len(rows.source), self.overlong[split]
        left_out = len(rows) < count
        return f"{count:,} pairs, {long:,} of them too long and {'left out' if left_out else 'cut'}"

    # --- checkpoints

    def tokenizer_origin(self) -> str:
        return f"{super().tokenizer_origin()} on source={self.source}"  # a tokenizer that is learnt depends on the text

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to use a checkpoint without the data, as plain values."""
        settings = {
            "prefix": self.prefix,
            "languages": self.languages,
            "max_length": self.max_length,
            "max_target_length": self.max_target_length,
            "start_token": self.target_vocabulary.id_to_token(self.start_id),
        }
        target = None if self.target_tokenizer is None else self.target_vocabulary.to_str()
        return {
            **super().state_dict(),
            "target_tokenizer": target,
            "settings": settings,
            "fractions": self.fractions,
            "overlong": self.overlong,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Check that the checkpoint has the same tokenizers.

        Raises:
            TrunklineError: if not, because then the ids mean other words.
        """
        super().load_state_dict(state_dict)
        if state_dict["target_tokenizer"] != self.state_dict()["target_tokenizer"]:
            raise TrunklineError(
                f"the checkpoint was trained with another tokenizer of the targets than "
                f"target_tokenizer={self.target_tokenizer} on source={self.source}; give that checkpoint as "
                "target_tokenizer",
                field="data.target_tokenizer",
            )
