"""Recordings that a source lists, in files or in cells of a table; their headers are read before a training begins."""

import json
import math
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np

from trunkline import TrunklineError
from trunkline.datamodules.audio.audio_files import AudioHeader, audio_header, read_audio
from trunkline.datamodules.folders import FileNames, packed
from trunkline.files import file_state, read_json, write_json

HEADER_THREADS = 8
"""Files whose headers are read at once: on a network disk this is a matter of waiting."""
ROWS_AT_ONCE = 10_000
"""Recordings that are tuples at a time, before they become columns."""
ROUNDING = 0.05
"""Seconds that a stated end may lie behind the end of its file: lists round."""


class Listed(NamedTuple):
    """A recording as a source lists it."""

    content: int
    """Number of the file or cell that holds it."""
    name: str
    """File and row, for messages."""
    text: str | None = None
    labels: list[str] | None = None
    start: float = 0.0
    """Seconds from the beginning of the file to that of the recording."""
    end: float | None = None
    """The same to its end; None is the end of the file."""
    rate: int | None = None
    """Samples per second, as the list states them."""


class ListedRows(Sequence[Listed]):
    """Recordings as columns of Arrow. With the paths of their files, half a million take 72 MiB; as tuples and `Path`s
    they took 348 MiB, and were copied into each worker process.
    """

    def __init__(self, rows: Iterable[Listed]) -> None:
        import pyarrow as pa

        types = pa.int64(), pa.binary(), pa.binary(), pa.list_(pa.binary()), pa.float64(), pa.float64(), pa.int64()
        schema = pa.schema(list(zip(Listed._fields, types, strict=True)))
        waiting, batches = iter(rows), []
        while some := list(islice(waiting, ROWS_AT_ONCE)):
            columns = [list(map(text_as_bytes, column)) for column in zip(*some, strict=True)]
            batches.append(pa.RecordBatch.from_arrays([*map(pa.array, columns, types)], schema=schema))
        self.table = pa.Table.from_batches(batches, schema).combine_chunks()

    def __len__(self) -> int:
        return len(self.table)

    @overload
    def __getitem__(self, number: int) -> Listed: ...
    @overload
    def __getitem__(self, number: slice) -> list[Listed]: ...
    def __getitem__(self, number: int | slice) -> Listed | list[Listed]:
        if isinstance(number, slice):
            return [self[n] for n in range(*number.indices(len(self)))]
        number = range(len(self))[number]
        return Listed(*(text_of_bytes(column[number].as_py()) for column in self.table.columns))

    def column(self, name: str) -> list[Any]:
        """The values of one field."""
        return [text_of_bytes(value) for value in self.table[name].to_pylist()]


def text_as_bytes(value: Any) -> Any:
    """Texts as bytes: the name of a file can hold what is no Unicode."""
    if isinstance(value, list):
        return [text_as_bytes(part) for part in value]
    return value.encode("utf-8", "surrogatepass") if isinstance(value, str) else value


def text_of_bytes(value: Any) -> Any:
    """Texts from the bytes that `text_as_bytes` made."""
    if isinstance(value, list):
        return [text_of_bytes(part) for part in value]
    return value.decode("utf-8", "surrogatepass") if isinstance(value, bytes) else value


@dataclass
class AudioListing:
    """What a source lists; no file has been opened yet. Paths and rows that are given as lists are packed."""

    contents: Sequence[bytes | str | Path]
    """Audio files: their contents or paths."""
    rows: Sequence[Listed]
    fingerprint: str | None = None
    """Identifies the contents if they stand in a table; None for files, which their states identify."""

    def __post_init__(self) -> None:
        if isinstance(self.contents, list):
            self.contents = FileNames(Path(), *packed([str(path) for path in self.contents]))
        self.rows = ListedRows(self.rows)

    def key(self, numbers: Iterable[int]) -> str:
        """A hash that changes when the contents of these numbers change.

        Raises:
            OSError: if one of these files is missing.
        """
        identity: Any = self.fingerprint
        if identity is None:
            found = (self.contents[number] for number in sorted(set(numbers)))
            paths = [Path(file) for file in found if not isinstance(file, bytes)]
            identity = [[str(path), *file_state(path)] for path in paths]
        return blake2b(json.dumps(identity).encode(), digest_size=12).hexdigest()


class ListedAudio:
    """Recordings that a source lists (`AudioRows`).

    Args:
        listing: what it lists.
        rows: those of its recordings that can be read.
        seconds: (N,) their lengths.
    """

    def __init__(self, listing: AudioListing, rows: ListedRows, seconds: np.ndarray) -> None:
        self.listing, self.rows, self.seconds = listing, rows, seconds
        texts, labels = rows.column("text"), rows.column("labels")
        self.texts: list[str] | None = None if None in texts else texts
        same: dict[tuple[str, ...], list[str]] = {}  # rows with the same labels share one list
        self.labels: list[list[str]] | None = None
        if None not in labels:
            self.labels = [same.setdefault(tuple(names), names) for names in labels]

    def __len__(self) -> int:
        return len(self.rows)

    def waveform(self, row: int, rate: int, start: float = 0.0, end: float | None = None) -> np.ndarray:
        listed = self.rows[row]
        first = listed.start + start
        last = listed.end if end is None else listed.start + end
        if last is not None and listed.end is not None:
            last = min(last, listed.end)
        content = self.listing.contents[listed.content]
        # a file that is read as a whole may not be silent
        return read_audio(content, listed.name, rate, first or None, last, stated_rate=listed.rate)

    def name(self, row: int) -> str:
        return self.rows[row].name

    def stored(self, row: int) -> list[bytes | Path]:
        content = self.listing.contents[self.rows[row].content]
        return [content if isinstance(content, bytes) else Path(content)]


def read_listing(
    listing: AudioListing, cache: Path, skip_corrupt: bool, longest: float = math.inf
) -> tuple[ListedAudio, list[TrunklineError]]:
    """Read the header of each file of a listing, so that a broken file is found before the training.

    Args:
        listing: what the source lists.
        cache: folder of what is prepared; headers without a fault are kept there.
        skip_corrupt: leave out the recordings that cannot be read.
        longest: seconds; a longer recording is refused, because it is more likely a mistake.

    Returns:
        the recordings, and the faults of those that are left out.

    Raises:
        TrunklineError: for the first recording that cannot be read, if `skip_corrupt` is off; if none can be read.
    """
    headers = read_headers(listing, cache)
    good, seconds, faults = [], [], []
    for number, row in enumerate(listing.rows):
        try:
            seconds.append(listed_seconds(row, headers[row.content], longest))
            good.append(number)
        except TrunklineError as error:
            if not skip_corrupt:
                raise
            faults.append(error)
    if not good and faults:
        raise TrunklineError(f"no recording can be used; the first fault: {faults[0]}", faults[0].field)
    return ListedAudio(listing, ListedRows(listing.rows[number] for number in good), np.array(seconds)), faults


def read_headers(listing: AudioListing, cache: Path) -> dict[int, AudioHeader | TrunklineError]:
    """Number of a file -> its header, or why it cannot be read."""
    names: dict[int, str] = {}
    for row in listing.rows:
        names.setdefault(row.content, row.name)
    kept = None
    with suppress(OSError):  # a missing file is an error of its header
        kept = cache / f"headers-{listing.key(names)}.json"
        known = {int(number): AudioHeader(*header) for number, header in (read_json(kept) or {}).items()}
        if known.keys() >= names.keys():
            return dict(known)

    def header(content: int) -> AudioHeader | TrunklineError:
        try:
            return audio_header(listing.contents[content], names[content])
        except TrunklineError as error:
            return error

    with ThreadPoolExecutor(HEADER_THREADS) as pool:
        headers = dict(zip(names, pool.map(header, names), strict=True))
    if kept is not None and not any(isinstance(found, TrunklineError) for found in headers.values()):
        write_json(kept, headers)
    return headers


def listed_seconds(row: Listed, header: AudioHeader | TrunklineError, longest: float) -> float:
    """Length of a recording.

    Raises:
        TrunklineError: if its file cannot be read, has another rate than listed, or is shorter than listed; or if the
            recording is longer than `longest` seconds.
    """
    if isinstance(header, TrunklineError):
        raise header
    end = header.seconds if row.end is None else row.end
    fault = None
    if row.rate is not None and row.rate != header.rate:
        fault = f"has {header.rate} samples per second, but the list says {row.rate}; correct it"
    elif not 0 <= row.start < end or end > header.seconds + ROUNDING:
        fault = f"lasts {header.seconds:.2f} s, and has no part from {row.start:g} s to {end:g} s; correct the list"
    elif end - row.start > longest:
        fault = (
            f"lasts {(end - row.start) / 3600:.1f} hours, and can be read only in parts of at most "
            f"{longest / 3600:g}; list its parts with start and end, or set too_long=window for labelled sounds"
        )
    if fault is not None:
        raise TrunklineError(f"{row.name} {fault}, or set skip_corrupt=true", "data.skip_corrupt")
    return min(end, header.seconds) - row.start
