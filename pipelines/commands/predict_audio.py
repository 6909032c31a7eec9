"""`trunkline predict --audio`: classes of sounds, of any length."""

import sys

import pandas as pd
import torch

from trunkline import TrunklineError
from trunkline.pipelines.commands.predict_text import Run
from trunkline.pipelines.objectives import PREDICT_AUDIO
from trunkline.pipelines.recordings import AudioWindows, Windowing, open_recordings
from trunkline.pipelines.sounds import mean_of_windows
from trunkline.pipelines.trained import Trained


def predict_audio(trained: Trained, audio: str, threshold: float | None, skip_corrupt: bool, run: Run) -> pd.DataFrame:
    """A table with `path`, `label` and `probability` of recordings.

    Of a recording that is longer than the clips of training, the probabilities are the mean of its windows. If clips
    can have several labels, there is a row for each label that is likely enough, the likeliest first, or one row
    without a label.

    Args:
        trained: the checkpoint.
        audio: a file, or a folder with files.
        threshold: smallest probability of a label, where clips can have several; None is 0.5.
        skip_corrupt: leave label and probability of recordings that cannot be read empty, instead of stopping.
        run: makes the predictions.

    Raises:
        TrunklineError: if the checkpoint cannot be used, or if a recording cannot be read, unless `skip_corrupt`.
    """
    trained.require(PREDICT_AUDIO)
    class_names, several, log_mel = trained.class_names, trained.data_state("multi_label"), trained.log_mel
    check_threshold(threshold, several, trained.file)
    model = trained.module()
    recordings, paths = open_recordings([audio], "audio", skip_corrupt)
    windowing = Windowing.of(log_mel, model.network.config.max_frames)
    windows = AudioWindows(recordings, log_mel, windowing, skip_corrupt)
    batches = run(model, windows)
    numbers, found = (torch.cat([batch[name] for batch in batches]) for name in ("index", "probability"))
    probability, heard = mean_of_windows(windows, numbers, found)
    names = {recordings.name(n): own for n, own in enumerate(probability) if heard[n]}
    rows: list[tuple[str, str | None, float | None]] = []
    for path in paths:
        own = names.get(path)
        if own is None:
            rows.append((path, None, None))
            continue
        best = own.sort(descending=True, stable=True)
        count = int((own >= (threshold or 0.5)).sum()) if several else 1
        labels = [class_names[n] for n in best.indices[:count].tolist()]
        chosen = [*zip(labels, best.values.tolist(), strict=False)] or [(None, None)]
        rows += [(path, label, value) for label, value in chosen]
    if len(names) < len(paths):
        missing = len(paths) - len(names)
        print(f"{missing} recordings cannot be read; their labels are empty", file=sys.stderr)
    return pd.DataFrame(rows, columns=["path", "label", "probability"])


def check_threshold(threshold: float | None, several: bool, file: str) -> None:
    """Refuse a threshold that is no probability, or that would have no effect."""
    if threshold is not None and not several:
        raise TrunklineError(
            f"--threshold {threshold:g} is for clips with several labels, but {file} gives each clip one; leave it out"
        )
    if threshold is not None and not 0 < threshold <= 1:
        raise TrunklineError(f"--threshold must be above 0 and at most 1, not {threshold:g}")
