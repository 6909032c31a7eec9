"""Tokenises a corpus once, into shards on disk: an interrupted run is resumed, and only one process does the work."""

import hashlib
import io
import json
import os
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from filelock import Timeout
from rich.console import Console
from rich.progress import Progress, TextColumn, TimeElapsedColumn
from tokenizers import Tokenizer

from trunkline import TrunklineError
from trunkline.datamodules.text.text_sources import Piece, TextSource
from trunkline.datamodules.text.token_shards import (
    INDEX,
    DocumentTexts,
    TokenStream,
    ends_name,
    text_ends_name,
    texts_name,
    token_type,
)
from trunkline.datamodules.text_encoder import TextEncoder
from trunkline.datamodules.tokenizers import (
    DEFAULT_VOCAB_SIZE,
    TRAINED,
    end_of_text_id,
    load_tokenizer,
    size_of,
    train_tokenizer,
)
from trunkline.files import atomic_write, digests, file_state, lock, read_json, write_json

CORPUS_FORMAT = 1
"""Version of the file format; with a new number, all corpora are prepared again."""
GROUP_BYTES = 64_000_000
"""Bytes of text that are tokenised between two save points. They make a group: at most one shard for each split."""
BATCH_BYTES = 2_000_000
"""Amount of text that is encoded at once."""


def default_cache() -> Path:
    """$TRUNKLINE_CACHE or ~/.cache/trunkline."""
    return Path(os.environ.get("TRUNKLINE_CACHE") or Path.home() / ".cache" / "trunkline")


@dataclass
class Group:
    """Tokens that will be written together."""

    bytes: int = 0
    tokens: dict[str, list[np.ndarray]] = field(default_factory=dict)
    ends: dict[str, list[np.ndarray]] = field(default_factory=dict)
    text_bytes: dict[str, int] = field(default_factory=dict)
    texts: dict[str, list[str]] = field(default_factory=dict)
    """Of the splits whose texts are kept: one entry for each document."""


class Preparation:
    """A corpus, and the folder with its tokens.

    Args:
        sources: the sources of text, each with the share of it that goes to each split.
        tokenizer: chars, bpe, masked_bpe or wordpiece, learnt from the training split; else a name for
            `load_tokenizer`.
        vocab_size: size of a tokenizer that is learnt.
        cache: folder of all prepared corpora.
        special: special tokens that pieces can begin with; a tokenizer that is learnt gets them, one that is loaded
            must have them.
        texts: splits whose texts are kept as they are, beside their tokens; each of their pieces is a whole document.
        field: the field that gave `tokenizer`, for messages.
    """

    def __init__(
        self,
        sources: list[tuple[TextSource, dict[str, float]]],
        tokenizer: str,
        vocab_size: int | None,
        cache: Path,
        *,
        special: Sequence[str] = (),
        texts: Collection[str] = (),
        field: str = "data.tokenizer",
    ) -> None:
        self.sources, self.name, self.vocab_size, self.cache = sources, tokenizer, vocab_size, cache
        self.special, self.kept, self.field = list(special), sorted(texts), field

    @cached_property
    def folder(self) -> Path:
        """Folder of this corpus; its name is a hash of everything that decides the tokens, the text included.

        Raises:
            TrunklineError: if the text or tokenizer cannot be read.
        """
        if self.name in TRAINED:
            size = (self.vocab_size or DEFAULT_VOCAB_SIZE) if self.name != "chars" else None
            tokenizer: Any = [self.name, size]
        else:
            tokenizer = self._loaded.to_str()
        self._states = [file_state(file) for source, _ in self.sources for file in source.files]
        settings = [CORPUS_FORMAT, GROUP_BYTES, tokenizers.__version__, tokenizer, self.text_key]
        if self.special or self.kept:
            settings += [self.special, self.kept]
        return self.cache / hashlib.blake2b(json.dumps(settings).encode(), digest_size=12).hexdigest()

    @cached_property
    def text_key(self) -> list[Any]:
        """What decides the text, as plain data: of each source its key, digests of all of its files, and its shares.

        Raises:
            TrunklineError: if a file cannot be read.
        """
        return [[source.key, digests(source.files, self.cache), shares] for source, shares in self.sources]

    @cached_property
    def _loaded(self) -> Tokenizer:
        tokenizer = load_tokenizer(self.name, self.field)
        missing = [token for token in self.special if tokenizer.token_to_id(token) is None]
        if missing:
            raise TrunklineError(
                f"the tokenizer {self.name} has no token {missing[0]}, which this data puts before its texts; add it "
                "as a special token, or choose a tokenizer that is learnt from the data",
                self.field,
            )
        return tokenizer

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer; it is learnt now if that was not done before.

        Raises:
            TrunklineError: if a source or the tokenizer cannot be read, if the tokenizer lacks a special token, or if
                the folder cannot be written.
        """
        if self.name not in TRAINED:
            return self._loaded
        if not self._tokenizer_file.exists():
            with self._alone():
                self._keep_tokenizer()
        return load_tokenizer(str(self._tokenizer_file))

    @property
    def _tokenizer_file(self) -> Path:
        return self.folder / "tokenizer.json"

    def _keep_tokenizer(self) -> None:
        """Write the tokenizer, learnt or loaded, into the folder. The caller must hold the lock."""
        if self._tokenizer_file.exists():
            return
        if self.name in TRAINED:
            texts = (piece.text for piece in self.pieces() if piece.split == "train")
            tokenizer = train_tokenizer(self.name, texts, self.vocab_size, self.special)
        else:
            tokenizer = self._loaded
        atomic_write(self._tokenizer_file, [tokenizer.to_str().encode()])

    def pieces(self) -> Iterator[Piece]:
        """The text of all sources, once."""
        for source, shares in self.sources:
            yield from source.pieces(shares)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold the lock of the folder; if another process holds it, tell the user and wait."""
        folder_lock = lock(self.folder.with_suffix(".lock"))
        try:
            folder_lock.acquire(timeout=0)
        except Timeout:
            print(f"waiting for another process that prepares {self.folder}", file=sys.stderr)
            folder_lock.acquire()
        try:
            yield
        finally:
            folder_lock.release()

    def index(self) -> dict[str, Any] | None:
        """The index that `prepare` wrote (`splits`, `dtype`, `vocab_size`); None if it or a shard is missing."""
        index = read_json(self.folder / INDEX)
        if index and all(self._whole(name, size, index["dtype"]) for name, size in shards_of(index)):
            return index
        return None

    def _whole(self, name: str, size: int, dtype: str) -> bool:
        path = self.folder / name
        beside = [ends_name(name)]
        if name.rpartition("-")[0] in self.kept:
            beside += [texts_name(name), text_ends_name(name)]
        return (
            path.exists()
            and path.stat().st_size == size * np.dtype(dtype).itemsize
            and all((self.folder / other).exists() for other in beside)
        )

    def prepare(self) -> dict[str, Any]:
        """Tokenise the text that is not yet tokenised; only one process does it, the others wait.

        Returns:
            the index.

        Raises:
            TrunklineError: if a source cannot be read, the folder cannot be written, or a split has no text.
        """
        index = self.index()
        if index is None:
            with self._alone():
                index = self.index() or self._tokenise()
        return index

    def stream(self, split: str) -> TokenStream:
        """The tokens of a prepared split."""
        index = self.prepare()
        return TokenStream(self.folder, index["splits"][split]["shards"], index["dtype"])

    def texts(self, split: str) -> DocumentTexts:
        """The texts of a prepared split that keeps them."""
        return DocumentTexts(self.folder, [name for name, _ in self.prepare()["splits"][split]["shards"]])

    def _tokenise(self) -> dict[str, Any]:
        """Continue after the last complete group."""
        self._keep_tokenizer()
        tokenizer = self.tokenizer
        for leftover in self.folder.glob(".*.tmp"):
            leftover.unlink()
        vocab_size, encoder, ender = size_of(tokenizer), TextEncoder(tokenizer), end_of_text_id(tokenizer, self.field)
        dtype = np.dtype(token_type(vocab_size))
        done = self._whole_groups(dtype.name)
        group, pieces_done = Group(), done[-1]["pieces"] if done else 0
        size = sum(split["bytes"] for entry in done for split in entry["splits"].values())
        with tokenising_progress() as advance:
            advance(size)
            for batch in batches(islice(self.pieces(), pieces_done, None)):
                size += add(group, batch, encoder, ender, dtype, self.kept)
                pieces_done += len(batch)
                advance(size)
                if group.bytes >= GROUP_BYTES:
                    done.append(self._write(group, len(done), pieces_done))
                    group = Group()
        if group.bytes:
            done.append(self._write(group, len(done), pieces_done))
        index = self._join(done)
        self._check_unchanged()
        index |= {"format": CORPUS_FORMAT, "dtype": dtype.name, "vocab_size": vocab_size}
        write_json(self.folder / INDEX, index)
        return index

    def _whole_groups(self, dtype: str) -> list[dict[str, Any]]:
        """Save points up to the first missing or damaged one."""
        done: list[dict[str, Any]] = []
        while entry := read_json(self.folder / f"group-{len(done):05d}.json"):
            if not all(self._whole(name, size, dtype) for name, size in shards_of(entry)):
                break
            done.append(entry)
        return done

    def _write(self, group: Group, number: int, pieces: int) -> dict[str, Any]:
        """Write the shards of a group, then the save point: if it exists, the shards are complete."""
        splits = {}
        for split, parts in group.tokens.items():
            name = f"{split}-{number:05d}.bin"
            ends = np.concatenate(group.ends[split])
            atomic_write(self.folder / name, [part.data for part in parts])
            write_array(self.folder / ends_name(name), ends)
            if split in self.kept:
                texts = [text.encode() for text in group.texts[split]]
                atomic_write(self.folder / texts_name(name), texts)
                write_array(self.folder / text_ends_name(name), np.cumsum([*map(len, texts)]))
            tokens = sum(map(len, parts))
            splits[split] = {
                "shards": [[name, tokens]],
                "tokens": tokens,
                "bytes": group.text_bytes[split],
                "documents": len(ends),
            }
        entry = {"pieces": pieces, "splits": splits}
        write_json(self.folder / f"group-{number:05d}.json", entry)
        return entry

    def _join(self, done: list[dict[str, Any]]) -> dict[str, Any]:
        """The index: the splits of all groups added up."""
        splits: dict[str, Any] = {}
        for name in dict.fromkeys(name for _, shares in self.sources for name in shares):
            entries = [entry["splits"][name] for entry in done if name in entry["splits"]]
            if not entries:
                short = "val" if name == "train" else name
                raise TrunklineError(
                    f"the {name} split is empty, because the source has too little text or too few documents; "
                    f"give more, "
                    f"{'lower' if name == 'train' else 'raise'} {short}_fraction, or name a separate file with "
                    f"{short}_source",
                    field=f"data.{short}_fraction",
                )
            splits[name] = {
                "shards": [shard for entry in entries for shard in entry["shards"]],
                **{key: sum(entry[key] for entry in entries) for key in ("tokens", "bytes", "documents")},
            }
        return {"splits": splits}

    def _check_unchanged(self) -> None:
        files = [file for source, _ in self.sources for file in source.files]
        for file, state in zip(files, self._states, strict=True):
            if not file.exists() or file_state(file) != state:
                raise TrunklineError(f"{file} changed while it was read; start again when it is complete")


def shards_of(entry: dict[str, Any]) -> list[tuple[str, int]]:
    """(name, tokens) of all shards of an index or save point."""
    return [shard for split in entry["splits"].values() for shard in split["shards"]]


def batches(pieces: Iterator[Piece]) -> Iterator[list[Piece]]:
    """Pieces in lists of about `BATCH_BYTES`."""
    batch: list[Piece] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.text)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def write_array(path: Path, values: np.ndarray) -> None:
    """Write an .npy file completely or not at all."""
    buffer = io.BytesIO()
    np.save(buffer, values)
    atomic_write(path, [buffer.getbuffer()])


def add(
    group: Group,
    batch: list[Piece],
    encoder: TextEncoder,
    ender: int,
    dtype: np.dtype[Any],
    kept: Collection[str] = (),
) -> int:
    """Encode a batch of pieces into a group, with `ender` after each document. Returns the bytes of text.

    The texts of the splits in `kept` are put there too.
    """
    ids, counts = encoder.encode([piece.text for piece in batch])
    total = 0
    for split in dict.fromkeys(piece.split for piece in batch):
        selected = np.array([piece.split == split for piece in batch])
        pieces = [piece for piece in batch if piece.split == split]
        tokens, ends = framed(pieces, ids[np.repeat(selected, counts)], counts[selected], encoder, ender)
        size = sum(len(piece.text.encode()) for piece in pieces)
        before = sum(map(len, group.tokens.setdefault(split, [])))
        group.tokens[split].append(tokens.astype(dtype))
        group.ends.setdefault(split, []).append(ends + before)
        group.text_bytes[split] = group.text_bytes.get(split, 0) + size
        if split in kept:
            group.texts.setdefault(split, []).extend(piece.text for piece in pieces)
        total += size
    group.bytes += total
    return total


def framed(
    pieces: list[Piece], ids: np.ndarray, counts: np.ndarray, encoder: TextEncoder, ender: int
) -> tuple[np.ndarray, np.ndarray]:
    """Insert the special tokens before pieces, and `ender` after each document.

    Args:
        pieces: the pieces.
        ids: the ids of their texts, one after the other.
        counts: (pieces,) number of ids of each.
        encoder: knows the ids of special tokens.
        ender: id of the token that ends a document.

    Returns:
        all ids, and (documents,) the position after the end of each document.
    """
    stops = counts.cumsum()
    # (pieces, 2): what is inserted before and after each piece, -1 for nothing, and where.
    numbers = [None if piece.special is None else encoder.tokenizer.token_to_id(piece.special) for piece in pieces]
    inserted = np.array(
        [[-1 if n is None else n, ender if p.ends else -1] for n, p in zip(numbers, pieces, strict=True)]
    )
    places, present = np.stack([stops - counts, stops], axis=1), inserted >= 0
    ending = present[:, 1]
    ends = stops[ending] + present.ravel().cumsum()[1::2][ending]
    return np.insert(ids, places[present], inserted[present]), ends


@contextmanager
def tokenising_progress() -> Iterator[Any]:
    """A progress line on a terminal, nothing elsewhere; yields a function that takes the number of bytes done."""
    console = Console(stderr=True)
    columns = TextColumn("tokenising: {task.fields[size]:,.0f} MB of text"), TimeElapsedColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("", total=None, size=0.0)
        yield lambda size: bar.update(task, size=size / 1e6)
