"""`trunkline transcribe`: write what is said in recordings, with a checkpoint."""

import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from trunkline import TrunklineError
from trunkline.files import atomic_write
from trunkline.pipelines.commands.output import check_output
from trunkline.pipelines.devices import find_device
from trunkline.pipelines.generating import NumberFormat, readers_may_leave, write
from trunkline.pipelines.recordings import open_recordings
from trunkline.pipelines.trained import Trained
from trunkline.pipelines.transcribing import SpeechOptions, Transcript, transcribe_recordings, transcriber_of
from trunkline.pipelines.translating import check_batch

TRANSCRIPT_SUFFIXES = (".txt", ".jsonl", ".csv", ".parquet")


def transcribe(
    checkpoint: str,
    audio: list[str] | str | None = None,
    output: str | None = None,
    timestamps: bool = False,
    window: float | None = None,
    num_beams: int | None = None,
    language_model: str | None = None,
    lm_weight: float | None = None,
    length_bonus: float | None = None,
    skip_corrupt: bool = False,
    batch_size: int = 16,
    num_workers: int = 0,
    dtype: NumberFormat = "float32",
    compile: bool = False,
    device: str = "auto",
) -> None:
    """Write what is said in recordings (`trunkline transcribe one.wav two.flac --checkpoint FILE`).

    For one file its text is printed; for several files or a folder, a line for each recording: path, tab, text. A
    recording that is longer than those of training, even by hours, is heard in windows that overlap.

    Args:
        checkpoint: a checkpoint of a recogniser of speech, from `trunkline fit` with SpeechData.
        audio: files and folders of any format, rate and number of channels; they can also follow the command without
            the flag. Below a folder, all audio files are taken.
        output: a file for the texts, which is written completely or not at all: .txt as printed, or a table with the
            columns path and text (.csv, .jsonl, .parquet). None is the standard output.
        timestamps: write each word with its start and end in seconds, as a recogniser with CTC aligns them: a line or
            row for each word; in .jsonl and .parquet a list `words` for each recording.
        window: seconds that are heard at once; None is the longest clip of training.
        num_beams: above 1, use beam search with this many beams. None and the next three options: as in training's
            validation.
        language_model: for CTC: a checkpoint of a causal language model, trained with the recogniser's checkpoint as
            its tokenizer, which helps to choose among the beams.
        lm_weight: factor of its log-probability.
        length_bonus: of beam search with CTC: added to the score of a text for each token.
        skip_corrupt: name and count recordings that cannot be read, and leave them out, instead of stopping.
        batch_size: number of windows at a time.
        num_workers: number of processes that read recordings.
        dtype: number format of the weights; float32 is exact.
        compile: not for CTC: compile the step that makes a token, on a GPU into a CUDA graph. The first token then
            takes up to a minute, so this is for many recordings. Greedy texts in float32 stay the same.
        device: auto, cpu, cuda, cuda:1, mps, …

    Raises:
        TrunklineError: for wrong options, a recording that cannot be read, or a checkpoint that cannot be used, before
            anything is written.
    """
    given = [audio] if isinstance(audio, str) else audio or []
    if not given:
        raise TrunklineError("there is nothing to transcribe; give audio files or folders", "audio")
    if output is not None:
        check_output(output, TRANSCRIPT_SUFFIXES)
    check_batch(batch_size, num_workers)
    place, trained = find_device(device), Trained.read(checkpoint, "transcribe")
    options = SpeechOptions(window, num_beams, language_model, lm_weight, length_bonus, timestamps, compile)
    transcriber = transcriber_of(trained, place, dtype, options)
    recordings, names = open_recordings(given, "audio", skip_corrupt)
    found = transcribe_recordings(transcriber, recordings, batch_size, num_workers, skip_corrupt)
    spoken = [Spoken(recordings.name(n), own) for n, own in enumerate(found) if own is not None]
    if len(spoken) < len(names):
        missing = len(names) - len(spoken)
        print(f"{missing} of {len(names)} recordings cannot be read and are left out", file=sys.stderr)
    single = len(given) == 1 and not Path(given[0]).is_dir()
    write_transcripts(spoken, output, named=not single)


class Spoken(NamedTuple):
    """A recording and its transcript."""

    path: str
    transcript: Transcript

    def rows(self) -> list[dict[str, Any]]:
        """Rows of a flat table: one for each word if their times are known, else one."""
        words = self.transcript.words
        if words is None:
            return [{"path": self.path, "text": self.transcript.text}]
        return [{"path": self.path, "start": own.start, "end": own.end, "word": own.word} for own in words]

    def record(self) -> dict[str, Any]:
        """The same as one row, with a list of words."""
        record: dict[str, Any] = {"path": self.path, "text": self.transcript.text}
        if self.transcript.words is not None:
            record["words"] = [own._asdict() for own in self.transcript.words]
        return record


def write_transcripts(spoken: Sequence[Spoken], output: str | None, named: bool) -> None:
    """Write transcripts to a file, completely or not at all, or to the standard output.

    Args:
        spoken: the transcripts.
        output: the file; its suffix is the format. None is the standard output.
        named: write paths in front of plain text.

    Raises:
        TrunklineError: if the file cannot be written.
    """
    if output is None:
        with readers_may_leave():
            write(plain_text(spoken, named))
        return
    suffix = Path(output).suffix.lower()
    content = plain_text(spoken, named).encode() if suffix == ".txt" else table(spoken, suffix)
    atomic_write(Path(output), [content], field="output")
    print(f"wrote {len(spoken)} transcripts to {output}")


def plain_text(spoken: Sequence[Spoken], named: bool) -> str:
    """Lines of cells with tabs between them."""
    lines = []
    for row in (row for own in spoken for row in own.rows()):
        cells = [f"{cell:.2f}" if isinstance(cell, float) else " ".join(cell.split()) for cell in row.values()]
        lines.append("\t".join(cells if named else cells[1:]) + "\n")
    return "".join(lines)


def table(spoken: Sequence[Spoken], suffix: str) -> bytes:
    """The content of a .csv, .jsonl or .parquet file."""
    if suffix == ".csv":
        columns = ["path", "start", "end", "word"] if spoken and spoken[0].transcript.words is not None else None
        rows = pd.DataFrame([row for own in spoken for row in own.rows()], columns=columns)
        return rows.to_csv(index=False).encode()
    records = [own.record() for own in spoken]
    if suffix == ".jsonl":
        return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()
    buffer = io.BytesIO()
    pd.DataFrame(records).to_parquet(buffer, index=False)
    return buffer.getvalue()
