"""Reads text and tables from local files as a stream; errors name the broken byte or row."""

import codecs
import csv
import gzip
import json
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

from trunkline import TrunklineError
from trunkline.names import check_regular

PIECE = 1 << 16
"""Bytes of a text file that are read at once."""
LONGEST_LINE = 1 << 26
"""Maximum bytes in a line of JSON or a cell of CSV; a longer one is another format, and would fill the memory."""
# Matches up to the last place where whitespace follows another character: no byte-level BPE token crosses that place.
# All libraries agree that these four characters are whitespace; they differ on others.
LAST_GAP = re.compile(r".*\S(?=[ \t\n\r])", re.DOTALL)


def spans(file: Path, shares: dict[str, float]) -> list[tuple[str, int, int]]:
    """Cut a text file by position, between characters: (split, start, stop) of each part, in bytes.

    Of n bytes, `shares` of 0.9 and 0.1 make `[: int(0.9 * n)]` and the rest.

    Raises:
        TrunklineError: if the file is empty.
    """
    with opened(file) as stream:
        begin = 3 if stream.read(3) == codecs.BOM_UTF8 else 0
        size = os.fstat(stream.fileno()).st_size - begin
        if size < 1:
            raise TrunklineError(f"{file} is empty; give a file with text, or remove it")
        borders = [begin]
        for share in accumulate(shares.values()):
            border = begin + int(size * min(round(share, 12), 1))
            while border < begin + size:
                stream.seek(border)
                if stream.read(1)[0] & 0xC0 != 0x80:  # the first byte of a character
                    break
                border -= 1
            borders.append(border)
    borders[-1] = begin + size
    return list(zip(shares, borders[:-1], borders[1:], strict=True))


def read_span(file: Path, start: int, stop: int) -> Iterator[str]:
    """Text between two positions (in bytes) of a file, in pieces that end before whitespace.

    Raises:
        TrunklineError: if the bytes are not UTF-8 text.
    """
    decoder, pending, position = codecs.getincrementaldecoder("utf-8")(), "", start
    with opened(file) as stream:
        stream.seek(start)
        while position < stop:
            block = stream.read(min(PIECE, stop - position))
            position = position + len(block) if block else stop
            try:
                pending += decoder.decode(block, final=position == stop)
            except UnicodeDecodeError as error:
                raise broken_text(file) from error
            if b"\0" in block:
                raise broken_text(file)
            gap = LAST_GAP.match(pending) if position < stop else None
            cut = gap.end() if gap else len(pending)
            if gap or position == stop or len(pending) > 256 * PIECE:  # rather cut one token than fill the memory
                yield pending[:cut]
                pending = pending[cut:]


def broken_text(file: Path) -> TrunklineError:
    """The error for a file that is not text; it names the first wrong byte."""
    decoder, position = codecs.getincrementaldecoder("utf-8")(), 0
    with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as stream:
        while block := stream.read(PIECE):
            pending = len(decoder.getstate()[0])
            faults = [(block.find(b"\0"), "a zero byte, as binary files have")] if b"\0" in block else []
            try:
                decoder.decode(block)
            except UnicodeDecodeError as error:
                faults.append((error.start - pending, f"not UTF-8 ({error.reason})"))
            if faults:
                place, what = min(faults)
                return TrunklineError(
                    f"{file}, byte {position + place}: {what}; text must be UTF-8: convert it (such as with "
                    f"`iconv -f latin1 -t utf-8`), or leave this file out"
                )
            position += len(block)
    return TrunklineError(f"{file} ends in the middle of a UTF-8 character; fix its end, or leave this file out")


def opened(file: Path) -> Any:
    """Open a file as a stream of bytes, unpacked if it is a .gz file.

    Raises:
        TrunklineError: if it cannot be opened, or is no regular file.
    """
    check_regular(file)
    try:
        return gzip.open(file) if file.suffix == ".gz" else file.open("rb")
    except OSError as error:
        raise TrunklineError(f"cannot read {file}: {error.strerror}; check the path and its permissions") from error


PlacedRows = Iterator[tuple[str, Mapping[str, Any]]]
"""(place, cells) of each row of a table; the place is for messages."""


STANDARD = "-"
"""The name of a file that stands for the standard input."""


def read_lines(file: Path, column: str) -> PlacedRows:
    """The lines of a text file, or of the standard input (`-`), as a table with one column.

    Raises:
        TrunklineError: if they are not UTF-8 text.
    """
    standard = str(file) == STANDARD
    with nullcontext(sys.stdin.buffer) if standard else opened(file) as stream:
        for number, line in enumerate(stream, start=1):
            place = f"{'standard input' if standard else file}:{number}"
            try:
                yield place, {column: line.decode("utf-8-sig").rstrip("\r\n")}
            except UnicodeDecodeError as error:
                if standard:
                    mend = "convert it, such as with iconv"
                    raise TrunklineError(f"{place} is not UTF-8 ({error.reason}); {mend}") from error
                raise broken_text(file) from error


def read_json_lines(file: Path, column: str | None = None) -> PlacedRows:
    """The rows of a file of JSON lines; `read_table` says more."""
    with opened(file) as stream:
        try:
            for number, line in enumerate(iter(partial(stream.readline, LONGEST_LINE), b""), start=1):
                if line.strip():
                    yield f"{file}:{number}", json_object(file, number, line)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise TrunklineError(f"{file} is not a gzip file, or it is broken: {error}; compress it again") from error


def json_object(file: Path, number: int, line: bytes) -> dict[str, Any]:
    """The object in one line of JSON."""
    place = f"{file}:{number}"
    try:
        cells = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise broken_text(file) from error
    except ValueError as error:
        raise TrunklineError(f"{place} is not JSON ({error}); each line must be one JSON object") from error
    if not isinstance(cells, dict):
        raise TrunklineError(f"{place} is not a JSON object but {kind(cells)}; each line must be one")
    return cells


EXTRA: Any = object()
"""Key of the cells of a CSV row that have no column."""
LACKING: Any = object()
"""Value of the columns for which a CSV row has no cell."""


def read_csv(file: Path, column: str | None = None) -> PlacedRows:
    """The rows of a CSV file; `read_table` says more."""
    csv.field_size_limit(LONGEST_LINE)
    opened(file).close()
    with file.open(encoding="utf-8-sig", newline="") as stream:
        table = csv.DictReader(stream, restkey=EXTRA, restval=LACKING, strict=True)
        try:
            names = table.fieldnames or []
            double = next((name for name in names if names.count(name) > 1), None)
            if double is not None:
                raise TrunklineError(f"{file} has two columns named '{double}'; rename or remove one of them")
            if column is not None and column not in (table.fieldnames or []):
                raise no_column(file, column, table.fieldnames or [])
            for cells in table:
                place = f"{file}:{table.line_num}"
                count = len(names) + len(cells.get(EXTRA, ())) - sum(cell is LACKING for cell in cells.values())
                if count != len(names):
                    raise TrunklineError(
                        f"{place} has {count} cell{'' if count == 1 else 's'}, but the header names {len(names)}; put "
                        "texts that hold commas between quotes, or complete the row"
                    )
                yield place, cells
        except UnicodeDecodeError as error:
            raise broken_text(file) from error
        except csv.Error as error:
            raise TrunklineError(f"{file}:{table.line_num} is not CSV ({error}); fix this line") from error


def read_parquet(file: Path, column: str | None = None) -> PlacedRows:
    """The rows of a Parquet file; `read_table` says more."""
    import pyarrow
    from pyarrow import parquet

    opened(file).close()
    number = 0
    try:
        with parquet.ParquetFile(file) as table:
            if column is not None and column not in table.schema_arrow.names:
                raise no_column(file, column, table.schema_arrow.names)
            for batch in table.iter_batches(batch_size=256, columns=None if column is None else [column]):
                for cells in batch.to_pylist():
                    yield f"{file}, row {number}", cells
                    number += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise TrunklineError(f"{file} is not a Parquet file, or it is broken: {error}; write it again") from error


def read_table(file: Path, column: str | None = None) -> PlacedRows:
    """The rows of a table, in bounded memory.

    Args:
        file: JSON lines (also as .gz), CSV or Parquet.
        column: the only column that the caller needs; of a Parquet file no other column is read.

    Raises:
        TrunklineError: naming the broken file and row, the missing column, or the file without rows.
    """
    reader = reader_of(file)
    assert reader is not None
    empty = True
    for row in reader(file, column):
        empty = False
        yield row
    if empty:
        raise TrunklineError(f"{file} has no row; give a file with rows, or remove it")


def read_column(files: list[Path], column: str) -> Iterator[str]:
    """The texts in one column of several tables."""
    for file in files:
        for place, cells in read_table(file, column):
            if column not in cells:
                raise no_column(place, column, cells)
            yield checked(cells[column], place, column)


def no_column(place: Path | str, column: str, columns: Any) -> TrunklineError:
    """The error for a table without the column of texts."""
    return TrunklineError(
        f"{place} has no column '{column}'; it has {', '.join(columns)}; set text_column", field="data.text_column"
    )


def kind(value: Any) -> str:
    """Name of a value's type, for messages."""
    return "null" if value is None else type(value).__name__


def checked(value: Any, place: str, column: str) -> str:
    """The value of a cell, which must be a string."""
    if not isinstance(value, str):
        raise TrunklineError(
            f"{place}: '{column}' is not a text but {kind(value)}; fix the row or set text_column",
            field="data.text_column",
        )
    return value


Reader = Callable[[Path, str | None], PlacedRows]
TABLES: dict[str, Reader] = {
    ".jsonl": read_json_lines,
    ".json": read_json_lines,
    ".csv": read_csv,
    ".parquet": read_parquet,
}


def reader_of(file: Path) -> Reader | None:
    """The function that reads a table's rows; None for plain text.

    Raises:
        TrunklineError: for compressed files other than JSON lines.
    """
    if file.suffix == ".gz":
        if file.with_suffix("").suffix not in (".jsonl", ".json"):
            raise TrunklineError(
                f"{file} is compressed; only .jsonl.gz files can be read compressed: unpack it with gunzip"
            )
        return read_json_lines
    return TABLES.get(file.suffix.lower())
