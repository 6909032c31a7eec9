"""Reads recordings from files: WAV, FLAC, OGG, MP3 and whatever else libsndfile knows."""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from trunkline import TrunklineError
from trunkline.datamodules.folders import FileNames, files_below

if TYPE_CHECKING:
    from soundfile import SoundFile
    from torchaudio.transforms import Resample

AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".au", ".caf", ".sph", ".w64")
MAX_HOURS = 1
"""The longest part of a recording that is read at once: 230 MB at 16 kHz."""
UNKNOWN_SIZE = 2_000_000_000
"""Programs that write a WAV file into a pipe state a size of about this or more."""

MP3_LEAD = 16 * 1152
"""Samples that are decoded before a part of an MP3 file: a block needs bits of the blocks before it."""
OGG_HEADER, OGG_PAGE = 27, 65_307
"""Bytes of an Ogg page (RFC 3533) before its segment table, and of the largest page."""


class AudioHeader(NamedTuple):
    """What a file says about its sound."""

    rate: int
    """Samples per second."""
    channels: int
    seconds: float


def audio_paths(folder: str | Path, field: str) -> FileNames:
    """All audio files below a folder, sorted.

    Args:
        folder: the folder.
        field: the field that named the folder, for messages.

    Raises:
        TrunklineError: if the folder does not exist, or holds no audio file.
    """
    return files_below(folder, AUDIO_SUFFIXES, "sound", field)


def audio_header(file: bytes | str | Path | None, name: str) -> AudioHeader:
    """Read what a file says about its sound, without decoding it.

    Args:
        file: content or path of the file; None is an empty cell of a table.
        name: name of the recording, for messages.

    Raises:
        TrunklineError: if the file is missing, of an unknown format, empty or cut short. Some files that are cut short
            are only found by `read_audio`.
    """
    with _opened(file, name) as sound:
        return AudioHeader(sound.samplerate, sound.channels, sound.frames / sound.samplerate)


def read_audio(
    file: bytes | str | Path | None,
    name: str,
    rate: int,
    start: float | None = None,
    end: float | None = None,
    stated_rate: int | None = None,
) -> np.ndarray:
    """Read a recording, or a part of it, as one channel: the mean of all channels.

    Args:
        file: content or path of the file; None is an empty cell of a table.
        name: name of the recording, for messages.
        rate: samples per second of the result; a recording of another rate is resampled.
        start: seconds from the beginning of the file to the first sample; None is its beginning.
        end: the same to the end of the last sample; None, or a time after the end of the file, is its end.
        stated_rate: the rate that a manifest says the file has.

    Returns:
        (S,) float32, S > 0; samples of integers are scaled to -1..1.

    Raises:
        TrunklineError: as `audio_header`; and if the file has another rate than stated, if there is nothing between
            `start` and `end` or more than `MAX_HOURS`, if samples are not finite numbers, or if the whole file is
            silent. (A silent part of a recording is none of its faults.)
    """
    with _opened(file, name) as sound:
        if stated_rate not in (None, sound.samplerate):
            raise ValueError(f"it has {sound.samplerate} samples per second, but is said to have {stated_rate}")
        total = sound.frames / sound.samplerate
        first = round((start or 0.0) * sound.samplerate)
        last = sound.frames if end is None else min(round(end * sound.samplerate), sound.frames)
        if not 0 <= first < last:
            raise ValueError(
                f"it lasts {total:.3f} s, and has no part from {start or 0} s to {total if end is None else end} s"
            )
        if last - first > MAX_HOURS * 3600 * sound.samplerate:
            raise ValueError(
                f"{(last - first) / sound.samplerate / 3600:.1f} hours are more than the {MAX_HOURS} that can be read "
                "at once; cut it up, or give the start and end of its parts"
            )
        lead = min(first, MP3_LEAD) if sound.format == "MP3" else 0
        sound.seek(first - lead)
        channels = sound.read(lead + last - first, dtype="float32", always_2d=True)[lead:]
        if len(channels) < last - first - sound.samplerate // 10:  # decoders may drop a block at the end
            raise ValueError(
                f"it is cut short: {(first + len(channels)) / sound.samplerate:.1f} of {total:.1f} s are left"
            )
        samples = channels[:, 0] if channels.shape[1] == 1 else channels.mean(axis=1)
        if not np.isfinite(samples).all():
            raise ValueError(f"sample {first + int(np.isfinite(samples).argmin())} is not a finite number")
        if start is None and end is None and samples.min() == samples.max():
            raise ValueError(f"it is silent: all of its samples are {samples[0]:g}")
        return resample(np.ascontiguousarray(samples), sound.samplerate, rate)


def resample(samples: np.ndarray, old_rate: int, new_rate: int) -> np.ndarray:
    """Samples (S,) float32 at another rate: (S * new_rate / old_rate, rounded up).

    The ratio of the rates is rounded to one that has at most 1000 in its denominator, an error of less than one in a
    million: a filter for 16000:44101 would need gigabytes.
    """
    ratio = Fraction(new_rate, old_rate).limit_denominator(1000)
    if ratio == 1:
        return samples
    return _resampler(ratio.denominator, ratio.numerator)(torch.from_numpy(samples)).numpy()


@lru_cache(maxsize=64)
def _resampler(old: int, new: int) -> "Resample":
    """Holds the filter, which takes longer to compute than to use."""
    from torchaudio.transforms import Resample

    return Resample(old, new)


@contextmanager
def _opened(file: bytes | str | Path | None, name: str) -> Iterator["SoundFile"]:
    """An audio file that is open for reading; errors in the block are raised with the name of the recording."""
    library = _library()
    try:
        if file is None:
            raise ValueError("the cell is empty")
        if not isinstance(file, bytes) and not Path(file).is_file():
            raise ValueError("there is no such file")
        if not (len(file) if isinstance(file, bytes) else Path(file).stat().st_size):
            raise ValueError("the file is empty")
        with library.SoundFile(io.BytesIO(file) if isinstance(file, bytes) else str(file)) as sound:
            _check(sound, file)
            yield sound
    except Exception as error:  # the library and the file system raise many kinds
        raise TrunklineError(
            f"cannot read the recording {name}: {_reason(error, library)}; replace or remove it, or set "
            "skip_corrupt=true",
            field="data.skip_corrupt",
        ) from error


def _check(sound: "SoundFile", file: bytes | str | Path) -> None:
    """Refuse a file without sound, and one that is shorter than it says.

    libsndfile reads what is left of a file. Only its log says that something is missing, and not for all Ogg files.
    """
    if not sound.frames:
        raise ValueError("it holds no sound")
    if sound.frames >= 1 << 62:  # libsndfile's number for an unknown length
        raise ValueError("it does not say how long it is; convert it")
    field, what = ("riff", "bytes") if sound.format == "W64" else ("(?:data|Data Size|SSND)", "bytes of sound")
    sizes = re.search(rf"{field} *: (\d+) \(should be (\d+)\)", sound.extra_info)
    if sizes and int(sizes[2]) < int(sizes[1]) < UNKNOWN_SIZE:
        raise ValueError(f"it is cut short: it says that it has {sizes[1]} {what}, and has {sizes[2]}")
    if sound.format == "OGG" and _ends_within_page(_last_bytes(file, OGG_PAGE)):
        raise ValueError("it is cut short in the middle of an Ogg page")


def _ends_within_page(ending: bytes) -> bool:
    """Whether the last page in the ending of an Ogg file is not complete; what follows a complete page is no fault."""
    page = ending[max(ending.rfind(b"OggS"), 0) :]
    segments = page[OGG_HEADER - 1] if len(page) >= OGG_HEADER else 0
    return len(page) < OGG_HEADER + segments + sum(page[OGG_HEADER : OGG_HEADER + segments])


def _last_bytes(file: bytes | str | Path, count: int) -> bytes:
    """At most `count` bytes at the end of a file."""
    if isinstance(file, bytes):
        return file[-count:]
    with Path(file).open("rb") as stream:
        stream.seek(max(Path(file).stat().st_size - count, 0))
        return stream.read()


def _reason(error: Exception, library: Any) -> object:
    """What is wrong with a file, in words."""
    if not isinstance(error, library.LibsndfileError):
        return error
    if error.error_string.startswith(("Format not recognised", "File contains data in an unimplemented format")):
        return (
            f"it is no audio, or of a format that libsndfile {library.__libsndfile_version__} cannot read (it reads "
            f"{', '.join(library.available_formats())}); convert it, to FLAC for example"
        )
    reason = error.error_string.strip().rstrip(".").removeprefix("Error : ")
    return reason if reason.startswith("System error") else f"it is damaged or cut short ({reason})"


def _library() -> Any:
    """The package soundfile.

    Raises:
        TrunklineError: if it cannot be imported.
    """
    try:
        import soundfile
    except (ImportError, OSError) as error:  # OSError: the package is there, but not the library libsndfile
        raise TrunklineError(f"cannot read audio files: {error}; install soundfile 0.13 or later") from error
    return soundfile
