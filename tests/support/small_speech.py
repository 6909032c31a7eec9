"""Small speech: letters as tones, as `SpeechData` reads them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from sound_files import RATE, write_sound

from trunkline.datamodules import SpeechData
from trunkline.datamodules.audio.log_mel import LogMel
from trunkline.datamodules.samplers import SampleKey

SPOKEN = 40
"""Recordings in the usual source."""
Make = Callable[..., SpeechData]
"""Makes speech of the usual source, or of another one, with any options."""


def log_mel(**options: Any) -> LogMel:
    return LogMel(**{"sample_rate": RATE, "num_mels": 12, "max_seconds": 0.4, **options})


def listed(folder: Path, clips: list[tuple[str, np.ndarray]]) -> str:
    """A table of transcripts and samples."""
    rows = []
    for number, (text, samples) in enumerate(clips):
        file = write_sound(folder / f"{number}.wav", samples)
        rows.append({"audio": file.name, "text": text})
    (folder / "listed.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(folder / "listed.jsonl")


def prepared(data: SpeechData) -> SpeechData:
    data.prepare_data()
    data.setup("fit")
    return data


def items(data: SpeechData, split: str, *keys: SampleKey) -> list[dict[str, Any]]:
    dataset: Any = data.datasets[split]
    return dataset.__getitems__(list(keys))
