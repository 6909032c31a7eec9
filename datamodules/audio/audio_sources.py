"""Where recordings come from: offline names, folders, tables, the lists of Kaldi and LibriSpeech, the hub."""

from collections.abc import Callable
from functools import partial
from glob import escape
from pathlib import Path
from typing import Any

from trunkline import TrunklineError
from trunkline.datamodules.audio.audio_files import AUDIO_SUFFIXES, MAX_HOURS, audio_paths
from trunkline.datamodules.audio.audio_listing import AudioListing, Listed, read_listing
from trunkline.datamodules.audio.audio_manifests import (
    AudioColumns,
    list_dataset,
    list_kaldi,
    list_librispeech,
    list_table,
)
from trunkline.datamodules.audio.audio_rows import AudioRows
from trunkline.datamodules.hub import NamedSource
from trunkline.datamodules.images.image_sources import SPLIT_NAMES
from trunkline.datamodules.tables import read_table
from trunkline.datamodules.text_tasks.task_text import Row
from trunkline.names import hub_access

SPOKEN_DIGITS = "spoken_digits"
MANIFESTS = (".jsonl", ".json", ".csv", ".gz")
ARROW = (".parquet", ".arrow")


def open_audio(
    source: NamedSource,
    columns: AudioColumns,
    *,
    audio_folder: Path | None = None,
    skip_corrupt: bool = False,
    longest: float = MAX_HOURS * 3600,
    cache: Path,
) -> tuple[dict[str, AudioRows], list[TrunklineError]]:
    """The recordings of a source; the header of each file is checked.

    Args:
        source: `spoken_digits` or one of its sets (`spoken_digits:val`); a manifest (.jsonl, .jsonl.gz, .json, .csv,
            .parquet, .arrow) or a folder of Parquet files; a folder with Kaldi's `wav.scp` or LibriSpeech's
            `*.trans.txt`; a folder with one sub-folder for each class, optionally below train/, val/, test/; else a hub
            name.
        columns: the columns of tables.
        audio_folder: folder that paths are relative to; None is that of the list.
        skip_corrupt: leave out the recordings that cannot be read.
        longest: seconds; longer recordings are refused.
        cache: folder of what is prepared.

    Returns:
        the recordings of each split that the source has, `train` for one without splits; and the faults of those that
        are left out.

    Raises:
        TrunklineError: naming file and row.
    """
    if source.name.partition(":")[0] == SPOKEN_DIGITS:
        from trunkline.datamodules.audio.spoken_digits import open_spoken_digits

        source.refuse_split()
        return {"train": open_spoken_digits(source.name, cache)}, []
    splits: dict[str, AudioRows] = {}
    faults = []
    for split, listing in list_audio(source, columns, audio_folder).items():
        splits[split], found = read_listing(listing, cache, skip_corrupt, longest)
        faults += found
    return splits, faults


def list_audio(source: NamedSource, columns: AudioColumns, audio_folder: Path | None) -> dict[str, AudioListing]:
    """What a source on disk or on the hub lists, by split; no audio file is opened yet.

    Raises:
        TrunklineError: if the source is missing, broken or of another kind.
    """
    path, at = Path(source.name), f"data.{source.field}"
    if not path.exists():
        if source.is_hub_name((*MANIFESTS, *ARROW, *AUDIO_SUFFIXES)):
            title = f"{source.hub_name} ({source.hub_split})"
            return {"train": list_dataset(hub_table(source), columns, audio_folder or Path(), title)}
        raise TrunklineError(
            f"{source.field}={path}: there is no such file or folder here, and it is not the name of a hub dataset "
            "(`owner/name`); fix the path",
            at,
        )
    if path.suffix in ARROW or (path.is_dir() and holds_tables(path)):
        folder = audio_folder or (path if path.is_dir() else path.parent)
        return {"train": list_dataset(local_table(source), columns, folder, source.name)}
    if path.is_dir():
        return list_folder(source, columns, audio_folder)
    source.refuse_split()
    if path.suffix not in MANIFESTS:
        raise TrunklineError(
            f"{source.field}={path} is no list of recordings; give a {', '.join((*MANIFESTS[:-1], *ARROW))} file, or a "
            "folder",
            at,
        )
    rows = (Row(number, place, cells) for number, (place, cells) in enumerate(read_table(path)))
    return {"train": list_table(rows, columns, audio_folder or path.parent)}


# --- folders


def list_folder(source: NamedSource, columns: AudioColumns, audio_folder: Path | None) -> dict[str, AudioListing]:
    """What a folder lists: Kaldi's or LibriSpeech's transcripts, or one sub-folder for each class.

    Raises:
        TrunklineError: if it has none of these, or has no labels or no transcripts where they are needed.
    """
    path, at = Path(source.name), f"data.{source.field}"
    transcribed: Callable[[], AudioListing] | None = None
    if (path / "wav.scp").exists():
        transcribed = partial(list_kaldi, path, audio_folder, columns.text is not None)
    elif columns.label is None and next(path.rglob("*.trans.txt"), None):
        transcribed = partial(list_librispeech, path)
    if transcribed is not None:
        source.refuse_split()
        if columns.label is not None:
            raise TrunklineError(f"{source.field}={path} has no labels; give a table that has them", at)
        return {"train": transcribed()}
    if columns.text is not None:
        raise TrunklineError(
            f"{source.field}={path} has no transcripts: neither Kaldi's wav.scp and text, nor *.trans.txt as in "
            "LibriSpeech; give such a folder, or a table with the columns audio and text",
            at,
        )
    return {split: list_classes(folder, source.field) for split, folder in split_folders(source).items()}


def split_folders(source: NamedSource) -> dict[str, Path]:
    """The folder of each split: the sub-folder that is named, else those with usual names, else the folder itself.

    Raises:
        TrunklineError: if there is no such sub-folder.
    """
    path = Path(source.name)
    if source.split is not None:
        if not (path / source.split).is_dir():
            raise TrunklineError(
                f"{source.split_field}={source.split}: {path} has no such sub-folder; fix the name",
                f"data.{source.split_field}",
            )
        return {"train": path / source.split}
    if source.field != "source" or not (path / "train").is_dir():
        return {"train": path}
    return {
        split: path / name for split, names in SPLIT_NAMES.items() for name in reversed(names) if (path / name).is_dir()
    }


def list_classes(folder: Path, field: str) -> AudioListing:
    """The files of a folder with one sub-folder for each class, with files at any depth.

    Raises:
        TrunklineError: if it holds no audio file, or one that is in no sub-folder.
    """
    files = audio_paths(folder, f"data.{field}")
    rows = []
    for number, file in enumerate(files):
        label, *inside = file.relative_to(folder).parts
        if not inside:
            raise TrunklineError(
                f"{file} is in no class: {folder} must have one sub-folder for each class; move the file into one",
                f"data.{field}",
            )
        rows.append(Listed(number, str(file), labels=[label]))
    return AudioListing(files, rows)


# --- tables of the library `datasets`


def holds_tables(folder: Path) -> bool:
    """Whether a folder has Parquet or Arrow files, or was saved by `datasets`."""
    return any(next(folder.rglob(f"*{suffix}"), None) for suffix in ARROW)


def hub_table(source: NamedSource) -> Any:
    """A split of a hub dataset.

    Raises:
        TrunklineError: if it cannot be reached.
    """
    import datasets

    options = {"split": source.hub_split, "revision": source.revision}
    missing = "there is no such file or folder here, and as a hub name: "
    with hub_access():
        return loaded(source, missing, partial(datasets.load_dataset, source.hub_name, source.hub_config, **options))


def local_table(source: NamedSource) -> Any:
    """A Parquet or Arrow file, a folder of them, or a folder that `datasets` saved, with or without splits.

    Raises:
        TrunklineError: if it is broken, or if a split is named that it does not have.
    """
    import datasets

    path = Path(source.name)
    if (path / "dataset_dict.json").exists():
        return loaded(source, "", lambda: datasets.load_from_disk(source.name)[source.split or "train"])
    source.refuse_split()
    if (path / "state.json").exists():
        return loaded(source, "", partial(datasets.load_from_disk, source.name))
    files = [path] if path.is_file() else sorted(file for suffix in ARROW for file in path.rglob(f"*{suffix}"))
    kind = files[0].suffix.removeprefix(".")
    names = [escape(str(file)) for file in files if file.suffix == files[0].suffix]  # a path is read as a pattern
    return loaded(source, "", partial(datasets.load_dataset, kind, data_files=names, split="train"))


def loaded(source: NamedSource, missing: str, load: Callable[[], Any]) -> Any:
    """What `load` returns.

    Raises:
        TrunklineError: for any error; `missing` stands before its reason.
    """
    import datasets

    datasets.disable_progress_bars()
    try:
        return load()
    except Exception as error:  # `datasets` raises many kinds for missing, broken and unreachable data
        cause = error.__cause__ or error  # the message of `datasets` itself is often only "an error occurred"
        raise TrunklineError(
            f"cannot read {source.field}={source.name}: {missing}{type(cause).__name__}: {cause}; give "
            f"`{SPOKEN_DIGITS}`, a local path, or the name of a hub dataset that can be reached",
            f"data.{source.field}",
        ) from error
