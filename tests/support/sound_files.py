"""Small recordings for tests: letters as tones, and lists of them."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

RATE = 8_000
LETTERS = "abcd"


def letter_tones(text: str, seconds: float = 0.08, rate: int = RATE) -> np.ndarray:
    """(S,) float32: each letter is a tone, with a short silence after it."""
    size = round(seconds * rate)
    time = np.arange(size) / rate
    tones = {letter: 0.3 * np.sin(2 * np.pi * (500 + 800 * n) * time) for n, letter in enumerate(LETTERS)}
    parts = [np.concatenate([tones[letter], np.zeros(size // 4)]) for letter in text]
    return np.concatenate(parts).astype(np.float32)


def write_sound(file: Path, samples: np.ndarray, rate: int = RATE, **options: Any) -> Path:
    """Write samples (S,) or (S, channels); returns the path."""
    file.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(file, samples, rate, **options)
    return file


def spoken_letters(count: int) -> list[str]:
    """Strings of 2 to 4 letters."""
    chance = random.Random(0)
    return ["".join(chance.choices(LETTERS, k=chance.randint(2, 4))) for _ in range(count)]


def write_spoken(folder: Path, count: int) -> str:
    """Write one recording, and a table of its parts: `text` is what they say, `label` its length; returns its path."""
    texts = spoken_letters(count)
    clips = [letter_tones(text) for text in texts]
    ends = np.cumsum([0, *map(len, clips)]) / RATE
    write_sound(folder / "spoken.wav", np.concatenate(clips))
    rows = [
        {"audio": "spoken.wav", "text": text, "label": str(len(text)), "start": start, "end": end}
        for text, start, end in zip(texts, ends[:-1].tolist(), ends[1:].tolist(), strict=True)
    ]
    (folder / "spoken.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(folder / "spoken.jsonl")
