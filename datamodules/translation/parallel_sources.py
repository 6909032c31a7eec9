"""Where pairs of texts come from: offline names, tables, two parallel text files, TMX, or the Hugging Face hub."""

import gzip
import zlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import chain
from pathlib import Path

from trunkline import TrunklineError
from trunkline.datamodules.hub import NamedSource
from trunkline.datamodules.tables import PIECE, TABLES, PlacedRows, opened, read_lines, read_table, reader_of
from trunkline.datamodules.text_tasks.task_text import Row, text_cell
from trunkline.datamodules.translation.text_pairs import Pair, PairColumns, PairSource
from trunkline.datamodules.translation.tmx import find_language, read_tmx

TRANSLATION = "translation"
"""Column of a hub table that holds {language: text}."""
SUMMARY = ("document", "summary")
"""Columns that are found without being named, beside `source` and `target`."""
FORMATS = ".jsonl, .jsonl.gz, .json, .csv, .parquet or .tmx"


def open_pairs(source: NamedSource, target: NamedSource | None, columns: PairColumns) -> PairSource:
    """The pairs of a source; nothing is read yet.

    Args:
        source: `dates`, `phrases` or one of their sets (`dates:years`); a table (.jsonl, .jsonl.gz, .json, .csv,
            .parquet), a TMX file (.tmx, .tmx.gz) or a folder with files of one of these two kinds; the first of two
            text files; else a hub name.
        target: the second of two text files, which has the targets line by line.
        columns: the columns of tables; the languages in TMX files and `translation` columns. With `pairs`, its first
            direction says the languages of two text files.

    Raises:
        TrunklineError: if a file is missing or of another kind, if there is no second text file, or one that is not
            needed, or if a split was given that the source cannot have.
    """
    path, at = Path(source.name), f"data.{source.field}"
    offline = offline_pairs(source)
    if target is not None:
        check_text_files(source, target, offline is not None)
    if offline is not None or path.exists():
        source.refuse_split()
    if offline is not None:
        return offline
    if target is not None:
        return text_files(source, target, columns)
    if path.exists():
        return local_pairs(source, columns)
    if not source.is_hub_name((*TABLES, ".tmx", ".gz", ".txt")):
        raise TrunklineError(
            f"{source.field}={path}: there is no such file or folder here, and it is not the name of a hub dataset "
            "(`owner/name`); fix the path",
            at,
        )
    key = ["hub", source.hub_name, source.hub_config, source.hub_split, source.revision, *columns.key]
    return PairSource([], key, partial(table_pairs, partial(source.hub_rows, offline_names()), columns, at))


def offline_names() -> list[str]:
    """Names of the pairs that are made in code."""
    from trunkline.datamodules.translation import dates

    return list(dates.DATE_SETS)


def offline_pairs(source: NamedSource) -> PairSource | None:
    """The pairs that are made in code, if the source is the name of some.

    Raises:
        TrunklineError: if the name is that of some, but has an unknown set after its colon.
    """
    from trunkline.datamodules.translation import dates

    names = offline_names()
    if source.name in names:
        return dates.open_dates(source.name)
    if source.hub_name in names:
        raise TrunklineError(
            f"{source.field}={source.name}: there is no such set; choose among {', '.join(names)}",
            f"data.{source.field}",
        )
    return None


# --- two text files


def check_text_files(source: NamedSource, target: NamedSource, offline: bool) -> None:
    """Check that source and target are two text files.

    Raises:
        TrunklineError: if not.
    """
    first, second = Path(source.name), Path(target.name)
    if offline or is_table(first) or is_tmx(first):
        raise TrunklineError(
            f"{target.field}={second} names a second text file, but {source.field}={first} has both sides; leave it "
            "out",
            f"data.{target.field}",
        )
    for field, file in ((source.field, first), (target.field, second)):
        if not file.is_file():
            fault = "this is no file" if file.exists() else "there is no such file"
            raise TrunklineError(
                f"{field}={file}: {fault}; {source.field} and {target.field} must be two text files, the second with "
                "the targets line by line; fix the path",
                f"data.{field}",
            )
    if is_table(second) or is_tmx(second):
        raise TrunklineError(
            f"{target.field}={second} is not a text file, as {source.field}={first} is; give one that has a target in "
            "each line",
            f"data.{target.field}",
        )


def text_files(source: NamedSource, target: NamedSource, columns: PairColumns) -> PairSource:
    """Pairs from two text files.

    Raises:
        TrunklineError: if a direction has a language that is in neither file.
    """
    ours, theirs = Path(source.name), Path(target.name)
    first, second = columns.directions[0]
    for direction in columns.directions:
        if not {*direction} <= {first, second}:
            raise TrunklineError(
                f"pairs={', '.join(columns.pairs or [])}: its first direction says that {ours} is in '{first}' and "
                f"{theirs} in '{second}', so that they do not have {'-'.join(direction)}; leave it out",
                "data.pairs",
            )
    pairs = partial(line_pairs, ours, theirs, columns, f"data.{target.field}")
    return PairSource([ours, theirs], ["lines", *columns.key], pairs)


def line_pairs(source: Path, target: Path, columns: PairColumns, field: str) -> Iterator[Pair]:
    """The lines of two text files, side by side.

    Args:
        source: the first file.
        target: the second file.
        columns: the directions.
        field: the field that gave the second file.

    Raises:
        TrunklineError: if the files have different numbers of lines, or if a line is empty.
    """
    counts = [count_lines(file) for file in (source, target)]
    if counts[0] != counts[1]:  # said before the hours that tokenising can take
        raise TrunklineError(
            f"{source} has {counts[0]:,} lines, but {target} has {counts[1]:,}; line n of the second must be the "
            "target of line n of the first",
            field,
        )
    if not counts[0]:
        raise TrunklineError(f"{source} and {target} are empty; give files with text", field)
    directions = columns.directions
    first, second = directions[0]
    for number, lines in enumerate(zip(read_lines(source, first), read_lines(target, second), strict=True)):
        for place, cells in lines:
            if not "".join(cells.values()).strip():
                raise TrunklineError(f"{place} is empty; leave this line out of {source} and {target}", field)
        (place, ours), (_, theirs) = lines
        texts = {**ours, **theirs}
        for names in directions:
            yield Pair(number, place, texts[names[0]], texts[names[1]], names[1] if columns.pairs else None)


def count_lines(file: Path) -> int:
    """Number of lines of a text file; the last one may lack its end.

    Raises:
        TrunklineError: if it is a broken gzip file.
    """
    lines, last = 0, b"\n"
    try:
        with opened(file) as stream:
            while block := stream.read(PIECE):
                lines, last = lines + block.count(b"\n"), block
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise TrunklineError(f"{file} is not a gzip file, or it is broken: {error}; compress it again") from error
    return lines + (not last.endswith(b"\n"))


# --- tables and TMX


def is_table(file: Path) -> bool:
    """Whether a file is a table by its suffix, or by the suffix before `.gz`.

    Raises:
        TrunklineError: for a compressed table other than JSON lines.
    """
    return plain_suffix(file) in TABLES and reader_of(file) is not None


def is_tmx(file: Path) -> bool:
    """Whether a file is TMX by its suffix, or by the suffix before `.gz`."""
    return plain_suffix(file) == ".tmx"


def plain_suffix(file: Path) -> str:
    """The suffix of a file when it is unpacked, in lower case."""
    return (file.with_suffix("") if file.suffix == ".gz" else file).suffix.lower()


def local_pairs(source: NamedSource, columns: PairColumns) -> PairSource:
    """Pairs from a table or a TMX file, or from a folder with files of one of these kinds.

    Raises:
        TrunklineError: if the folder is empty or mixed, or if a file is of another kind.
    """
    path, at = Path(source.name), f"data.{source.field}"
    other = source.field.replace("source", "target_source")
    files = [path]
    if path.is_dir():
        found = [f for f in path.rglob("*") if not any(p.startswith(".") for p in f.relative_to(path).parts)]
        files = sorted(f for f in found if f.is_file())
    if not files:
        raise TrunklineError(f"{source.field}={path}: the folder is empty; give one with {FORMATS} files", at)
    for file in files:
        if not is_table(file) and not is_tmx(file):
            raise TrunklineError(
                f"{file} is a text file, which has one side only; name it with {source.field}, and the file with its "
                f"targets, line by line, with {other}; or give {FORMATS} files",
                f"data.{other}",
            )
        if is_tmx(file) != is_tmx(files[0]):
            raise TrunklineError(
                f"{path} holds files of two kinds, such as {files[0].name} and {file.name}; keep one kind in a folder",
                at,
            )
    if is_tmx(files[0]):
        return PairSource(files, ["tmx", *columns.key], partial(tmx_pairs, files, columns, at))
    rows = partial(table_rows_of, files)
    return PairSource(files, ["table", *columns.key], partial(table_pairs, rows, columns, at))


def table_rows_of(files: list[Path]) -> PlacedRows:
    """The rows of several tables.

    Raises:
        TrunklineError: naming the broken row.
    """
    for place, cells in chain.from_iterable(map(read_table, files)):
        if None in cells:  # as Python's csv calls them; a comma in a text would cut it, and pair the wrong parts
            raise TrunklineError(f"{place} has more cells than there are columns; put texts that have commas in quotes")
        yield place, cells


def table_pairs(rows: Callable[[], PlacedRows], columns: PairColumns, field: str) -> Iterator[Pair]:
    """The pairs of a table's rows.

    Args:
        rows: returns the rows.
        columns: the columns.
        field: the field that gave the source.

    Raises:
        TrunklineError: naming the row, and the column at fault.
    """
    for number, (place, cells) in enumerate(rows()):
        row = Row(number, place, cells)
        language = None
        if columns.language is not None:
            language = full(text_cell(row, columns.language, "language_column"), place, columns.language, field)
        directions, by_language = columns.directions, columns.pairs is not None
        inner = cells.get(TRANSLATION)
        if any(name not in cells for direction in directions for name in direction):
            if isinstance(inner, Mapping):
                row, by_language = Row(number, f"{place}, '{TRANSLATION}'", inner), True
                check_languages(row, directions)
            elif columns.usual and all(name in cells for name in SUMMARY):
                directions = [SUMMARY]
        for names in directions:
            fields = ("pairs", "pairs") if columns.pairs else ("source_column", "target_column")
            texts = [
                full(text_cell(row, name, at), row.place, name, field) for name, at in zip(names, fields, strict=True)
            ]
            yield Pair(number, place, texts[0], texts[1], names[1] if by_language and language is None else language)


def full(text: str, place: str, column: str, field: str) -> str:
    """The text of a cell, which must not be blank.

    Raises:
        TrunklineError: if it is.
    """
    if not text.strip():
        raise TrunklineError(f"{place}: '{column}' is empty; fix this row or leave it out", field)
    return text


def check_languages(row: Row, directions: list[tuple[str, str]]) -> None:
    """Check that a `translation` cell has all languages.

    Raises:
        TrunklineError: if not; names those that are there.
    """
    for name in (name for direction in directions for name in direction):
        if name not in row.cells:
            raise TrunklineError(
                f"{row.place} has no language '{name}'; it has {', '.join(row.cells)}; {name_direction(row.cells)}",
                "data.pairs",
            )


def name_direction(languages: Mapping[str, object]) -> str:
    """What to do if a language is missing, with an example of two languages that are there."""
    names = list(dict.fromkeys(language.replace("_", "-").partition("-")[0] for language in languages))
    return f"name the direction with pairs, such as {'-'.join(names[:2] if len(names) > 1 else ('en', 'de'))}"


def tmx_pairs(files: list[Path], columns: PairColumns, field: str) -> Iterator[Pair]:
    """The pairs of TMX files. A unit that lacks one of the languages is not counted as an error, it has no such pair.

    Raises:
        TrunklineError: if a text is empty, or if no unit has both languages of a direction; names the languages that
            are there.
    """
    languages: dict[str, None] = {}
    missing = dict.fromkeys(columns.directions)
    for number, unit in enumerate(chain.from_iterable(map(read_tmx, files))):
        languages |= dict.fromkeys(unit.texts)
        for direction in columns.directions:
            found = [find_language(language, unit.texts) for language in direction]
            if found[0] is None or found[1] is None:
                continue
            missing.pop(direction, None)
            source, target = (full(unit.texts[name], unit.place, name, field) for name in found if name is not None)
            yield Pair(number, unit.place, source, target, direction[1])
    for source, target in missing:
        raise TrunklineError(
            f"{files[0] if len(files) == 1 else files[0].parent}: no unit has both languages '{source}' and "
            f"'{target}'; the languages are {', '.join(languages)}; {name_direction(languages)}",
            "data.pairs",
        )
