"""Lists of recordings: tables with paths or with the audio itself, and the lists of Kaldi."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trunkline import TrunklineError
from trunkline.datamodules.audio.audio_listing import AudioListing, Listed
from trunkline.datamodules.hub import with_class_names
from trunkline.datamodules.tables import kind, read_lines
from trunkline.datamodules.text_tasks.task_text import Row, cell, class_name, text_cell

USUAL_COLUMNS = ("audio", "path", "file", "audio_filepath")
"""Columns that are searched for recordings if none is named."""


PARTS = ("start", "end", "sample_rate")
"""Columns that a table can have beside the others."""


@dataclass(frozen=True)
class AudioColumns:
    """Which columns of a table say what.

    A table can also have the columns `start` and `end`, in seconds, of a recording that is a part of its file, and
    `sample_rate`, which the file must then have.
    """

    audio: str | None = None
    """The recordings, or their paths; None is the first of `USUAL_COLUMNS` that there is."""
    text: str | None = None
    """What is said; None if that does not matter."""
    label: str | None = None
    """The label, a name or a whole number, or a list of them; None if there are none."""
    separator: str | None = None
    """Stands between several labels in one text."""

    def audio_in(self, names: Iterable[str], place: str) -> str:
        """The column of the recordings among the columns of a table.

        Raises:
            TrunklineError: if there is none.
        """
        names = list(names)
        searched = USUAL_COLUMNS if self.audio is None else (self.audio,)
        for column in searched:
            if column in names:
                return column
        raise TrunklineError(
            f"{place} has no column '{' or '.join(searched)}' of recordings; it has {', '.join(names)}; set "
            "audio_column",
            field="data.audio_column",
        )

    def listed(self, row: Row, content: int, name: str) -> Listed:
        """A row of a table.

        Args:
            row: the row.
            content: number of its file.
            name: name of the recording, for messages.

        Raises:
            TrunklineError: if a column is missing, or a value of the wrong kind.
        """
        text, labels = None, None
        if self.text is not None:
            missing = cell(row, self.text, "text_column") is None
            text = "" if missing else text_cell(row, self.text, "text_column")
        if self.label is not None:
            labels = self.labels(cell(row, self.label, "label_column"), row.place, self.label)
        start, end, rate = (number_cell(row, column) for column in PARTS)
        return Listed(content, name, text, labels, start or 0.0, end, None if rate is None else int(rate))

    def labels(self, value: Any, place: str, column: str) -> list[str]:
        """The labels in a cell, each once."""
        if self.separator is not None and isinstance(value, str):
            value = [name.strip() for name in value.split(self.separator) if name.strip()]
        values = value if isinstance(value, list) else [value]
        return list(dict.fromkeys(class_name(v, place, column, "label_column") for v in values))


def number_cell(row: Row, column: str) -> float | None:
    """The value of a row in a column of numbers; None if it is empty, or if there is no such column.

    Raises:
        TrunklineError: if it is anything else.
    """
    value = row.cells.get(column)
    if value is None or value == "":
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(value, bool) or not 0 <= number < math.inf:
        raise TrunklineError(f"{row.place}: '{column}' is not a number from 0 up but {value!r}; fix the row")
    return number


# --- tables


def list_table(rows: Iterable[Row], columns: AudioColumns, folder: Path) -> AudioListing:
    """The recordings of a table of paths.

    Args:
        rows: the rows of the table.
        columns: its columns.
        folder: folder that paths are relative to.

    Raises:
        TrunklineError: naming the row at fault.
    """
    numbers: dict[str, int] = {}
    listed = []
    for row in rows:
        column = columns.audio_in(row.cells, row.place)
        path = row.cells[column]
        if not isinstance(path, str) or not path:
            what = "empty" if path == "" else f"not a path but {kind(path)}"
            raise TrunklineError(
                f"{row.place}: '{column}' is {what}; fix the row or set audio_column", "data.audio_column"
            )
        file = str(folder / path)
        listed.append(columns.listed(row, numbers.setdefault(file, len(numbers)), f"{row.place} ({file})"))
    return AudioListing(list(numbers), listed)


class AudioCells(Sequence[bytes | str]):
    """The recordings in a column of a `datasets.Dataset`: contents of files, or paths.

    Args:
        table: the table; its column must hold undecoded audio.
        column: the column.
        folder: folder that paths are relative to.
    """

    def __init__(self, table: Any, column: str, folder: Path) -> None:
        self.table, self.column, self.folder = table, column, folder

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, row: Any) -> Any:
        value = self.table[row][self.column] or {"bytes": b"", "path": None}
        if value["bytes"] is None and value["path"] is not None:
            return str(self.folder / value["path"])
        return value["bytes"] or b""


def list_dataset(table: Any, columns: AudioColumns, folder: Path, title: str) -> AudioListing:
    """The recordings of a `datasets.Dataset`.

    Args:
        table: the table.
        columns: its columns.
        folder: folder that paths are relative to.
        title: its name, for messages.

    Raises:
        TrunklineError: if a column is missing or holds values of another kind.
    """
    import datasets

    column = columns.audio_in(table.column_names, title)
    for field, name in (("text_column", columns.text), ("label_column", columns.label)):
        if name is not None and name not in table.column_names:
            raise TrunklineError(
                f"{title} has no column '{name}'; it has {', '.join(table.column_names)}; set {field}", f"data.{field}"
            )
    try:
        audio = table.cast_column(column, datasets.Audio(decode=False)).select_columns([column])
    except Exception as error:  # pyarrow raises different errors for different types of columns
        raise TrunklineError(
            f"{title}: column '{column}' holds neither recordings nor paths but {table.features[column]}; set "
            "audio_column",
            field="data.audio_column",
        ) from error
    names = [columns.text, columns.label, *PARTS]
    others = table.select_columns([name for name in names if name in table.column_names])
    rows = []
    for number, cells in enumerate(named_cells(others)):
        place = f"{title}, row {number}"
        rows.append(columns.listed(Row(number, place, cells), number, place))
    return AudioListing(AudioCells(audio, column, folder), rows, audio._fingerprint)


def named_cells(table: Any) -> Iterator[dict[str, Any]]:
    """The rows of a `datasets.Dataset`, with the names of classes instead of their numbers."""
    for batch in table.iter(1000):
        for values in zip(*batch.values(), strict=True):
            cells = dict(zip(batch, values, strict=True))
            yield {name: with_class_names(value, table.features[name]) for name, value in cells.items()}


# --- Kaldi


def list_kaldi(folder: Path, audio_folder: Path | None, with_texts: bool) -> AudioListing:
    """The recordings of a folder with Kaldi's `wav.scp`, `text` and, if recordings are cut into parts, `segments`.

    Args:
        folder: the folder.
        audio_folder: folder that paths are relative to; None is `folder`.
        with_texts: whether transcripts are needed.

    Raises:
        TrunklineError: naming the line at fault, such as a command instead of a path.
    """
    files = kaldi_lines(folder / "wav.scp")
    numbers = {name: number for number, name in enumerate(files)}
    contents = [kaldi_path(value, place, audio_folder or folder) for place, value in files.values()]
    segments = folder / "segments"
    parts = kaldi_lines(segments) if segments.exists() else {name: (place, name) for name, (place, _) in files.items()}
    texts = kaldi_lines(folder / "text", empty=True) if with_texts else None
    rows = []
    for name, (place, value) in parts.items():
        recording, start, end = kaldi_segment(value, place) if segments.exists() else (value, 0.0, None)
        if recording not in numbers:
            raise TrunklineError(f"{place}: wav.scp has no recording '{recording}'; add it, or remove this line")
        number = numbers[recording]
        text = None if texts is None else texts.get(name, ("", ""))[1]
        rows.append(Listed(number, f"{place} ({name}, {contents[number]})", text, None, start, end))
    return AudioListing(contents, rows)


def kaldi_lines(file: Path, empty: bool = False) -> dict[str, tuple[str, str]]:
    """Name -> (place, rest of the line) of a list of Kaldi; the rest may be `empty`.

    Raises:
        TrunklineError: if the file is missing or not UTF-8, or if a line has no rest or a name that was there before.
    """
    found: dict[str, tuple[str, str]] = {}
    for place, cells in read_lines(file, "line"):
        name, *rest = cells["line"].split(maxsplit=1) or [""]
        if not name:
            continue
        if not rest and not empty:
            raise TrunklineError(f"{place} has only the name '{name}'; add what belongs to it, or remove the line")
        if name in found:
            raise TrunklineError(f"{place}: '{name}' stands already at {found[name][0]}; remove one of the two lines")
        found[name] = place, rest[0].strip() if rest else ""
    if not found:
        raise TrunklineError(f"{file} has no line; give a file with lines, or remove its folder")
    return found


def kaldi_path(value: str, place: str, folder: Path) -> str:
    """The path in a line of `wav.scp`.

    Raises:
        TrunklineError: if it is a command.
    """
    if value.endswith("|") or value.startswith("|"):
        raise TrunklineError(
            f"{place} is a command, which is not run; write its output to a file, and name that file instead"
        )
    return str(folder / value)


def kaldi_segment(value: str, place: str) -> tuple[str, float, float | None]:
    """Recording, start and end of a line of `segments`; an end of -1 is that of the recording.

    Raises:
        TrunklineError: if the line is anything else.
    """
    parts = value.split()
    try:
        recording, start, end = parts[0], float(parts[1]), float(parts[2])
    except (IndexError, ValueError) as error:
        raise TrunklineError(f"{place} is not `name recording start end` with seconds; fix the line") from error
    return recording, start, None if end == -1 else end


# --- LibriSpeech


def list_librispeech(folder: Path) -> AudioListing:
    """The recordings of a folder as LibriSpeech has them: `1-2.trans.txt` names `1-2-0000.flac`, and says its text.

    Raises:
        TrunklineError: naming the line at fault.
    """
    contents: list[Path] = []
    rows = []
    for file in sorted(folder.rglob("*.trans.txt")):
        for name, (place, text) in kaldi_lines(file).items():
            rows.append(Listed(len(contents), f"{place} ({name})", text))
            contents.append(file.with_name(f"{name}.flac"))
    return AudioListing(contents, rows)
