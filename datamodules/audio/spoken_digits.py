"""Offline speech: strings of digits, said by eSpeak NG in many voices. The clips are made in code, always the same.

A clip is drawn in steps, each uniform: the digits, the accent, the voice, the rate, the pitch and its range. Voices are
split by family, so that no voice of a test sounds like one that was trained on.
"""

import re
from collections import defaultdict
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from trunkline import TrunklineError
from trunkline.datamodules.audio.espeak import (
    ESPEAK_RATE,
    Utterance,
    espeak_version,
    espeak_voices,
    speak_groups,
)
from trunkline.datamodules.text.preparation import default_cache, write_array
from trunkline.files import cannot_write, lock, replacing

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
"""The names of 0 to 9, as they are said."""
ACCENTS = ("en", "en-029", "en-GB-x-gbclan", "en-GB-x-gbcwmd", "en-GB-x-rp", "en-US", "en-US-nyc")
"""Accents that are trained on: British, Caribbean, Lancaster, West Midlands, Received Pronunciation, American and that
of New York."""
TEST_ACCENT = "en-GB-scotland"
"""The Scottish accent is never trained on."""
RATES, PITCHES = (130, 260), (20, 80)
"""Lowest and highest words per minute; lowest and highest pitch, and range of pitch."""
VALIDATION_VOICES, TEST_VOICES = 10, 21
"""Number of voices that are never trained on."""
LARGE_FAMILY = 4
"""Families of at least so many voices stay in training."""
SNR = 10.0
"""Decibels from the noise to the speech, in the sets with noise."""
TALKERS = 5
"""Number of other clips that are heard at once as babble."""
GROUP = 125
"""Clips that one process says."""
SPOKEN_SEED = 13
SPOKEN_FORMAT = 1
"""Version of the rules here; with a new number, the clips are made again."""

RELATIVES = {"anxiousandy": "andy", "anikarobot": "anika", "ricishaymax": "max", "whisperf": "whisper"}
"""Voices whose names do not show their family: they change a few numbers of the other voice."""

Part = Literal["train", "val", "test"]


@dataclass(frozen=True)
class SpokenSet:
    """What a set is drawn from."""

    stream: int
    """Number of its stream of random numbers; sets with the same number have the same clips but for the accent."""
    rows: int
    part: Part
    """The voices."""
    lengths: tuple[int, int] = (3, 6)
    """Least and greatest number of digits."""
    accent: str | None = None
    """The accent of all clips; None for `ACCENTS`."""
    noise: Literal["white", "babble"] | None = None

    @property
    def single(self) -> bool:
        """Whether a clip has one digit, its class."""
        return self.lengths == (1, 1)


SPOKEN_SETS = {
    "spoken_digits": SpokenSet(0, 10_000, "train"),
    "spoken_digits:val": SpokenSet(1, 500, "val"),
    "spoken_digits:val_white": SpokenSet(1, 500, "val", noise="white"),
    "spoken_digits:val_babble": SpokenSet(1, 500, "val", noise="babble"),
    "spoken_digits:voices": SpokenSet(2, 1_000, "test"),
    "spoken_digits:accent": SpokenSet(2, 1_000, "test", accent=TEST_ACCENT),
    "spoken_digits:white": SpokenSet(2, 1_000, "test", noise="white"),
    "spoken_digits:babble": SpokenSet(2, 1_000, "test", noise="babble"),
    "spoken_digits:single": SpokenSet(3, 4_000, "train", (1, 1)),
    "spoken_digits:single_val": SpokenSet(4, 500, "val", (1, 1)),
    "spoken_digits:single_test": SpokenSet(5, 1_000, "test", (1, 1)),
}
"""The sets by name.

- `spoken_digits`: 10,000 strings of 3 to 6 digits, for training: 73 voices, 7 accents.
- `spoken_digits:val`: 10 voices that neither training nor a test has. Settings are chosen on these, and with noise on
  `val_white` and `val_babble`.
- `spoken_digits:voices`: 21 voices that are never trained on, in the accents of training.
- `spoken_digits:accent`: the same strings in the same voices, all in an accent that is never trained on.
- `spoken_digits:white`, `spoken_digits:babble`: the clips of `voices` under white noise, and under five other clips at
  once, 10 dB below the speech.
- `spoken_digits:single`, `single_val`, `single_test`: one digit a clip, with its name as the class.
"""


class SpokenClip(NamedTuple):
    """A clip as it was drawn."""

    digits: str
    accent: str
    voice: str
    rate: int
    pitch: int
    range: int

    def utterance(self) -> Utterance:
        """What eSpeak is told to say."""
        words = " ".join(DIGITS[int(digit)] for digit in self.digits)
        return Utterance(f"gmw/{self.accent}+{self.voice}", words, self.rate, self.pitch, self.range)


# --- drawing


def family_of(voice: str) -> str:
    """The family of a voice: its name without numbers, or that of the voice from which it was made."""
    name = re.sub(r"\d+$", "", voice.lower())
    return RELATIVES.get(name, name)


@cache
def voices_of(part: Part) -> tuple[str, ...]:
    """The voices of a part. Families in random order fill the test first, then validation; the others are trained on.

    Raises:
        TrunklineError: if the package is not installed.
    """
    families = defaultdict(list)
    for voice in espeak_voices():
        families[family_of(voice)].append(voice)
    names = sorted(families)
    parts: dict[Part, list[str]] = {"test": [], "val": [], "train": []}
    space = {"test": TEST_VOICES, "val": VALIDATION_VOICES, "train": len(espeak_voices())}
    for place in np.random.default_rng(SPOKEN_SEED).permutation(len(names)):
        family = families[names[place]]
        fitting = (part for part in parts if len(parts[part]) + len(family) <= space[part])
        parts["train" if len(family) >= LARGE_FAMILY else next(fitting)] += family
    return tuple(parts[part])


@cache
def draw_clips(name: str) -> tuple[SpokenClip, ...]:
    """The clips of a set, drawn but not yet said."""
    settings = SPOKEN_SETS[name]
    generator = np.random.default_rng([SPOKEN_SEED, settings.stream])
    voices = voices_of(settings.part)
    clips = []
    for _ in range(settings.rows):
        shortest, longest = settings.lengths
        digits = "".join(map(str, generator.integers(0, 10, generator.integers(shortest, longest + 1))))
        accent, voice = ACCENTS[generator.integers(len(ACCENTS))], voices[generator.integers(len(voices))]
        rate, pitch, pitch_range = (int(generator.integers(low, high + 1)) for low, high in (RATES, PITCHES, PITCHES))
        clips.append(SpokenClip(digits, settings.accent or accent, voice, rate, pitch, pitch_range))
    return tuple(clips)


# --- speaking


def spoken_clips(name: str, cache_folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """The clips of a set. The first call says them and keeps them in a folder; other processes wait for it.

    10,000 clips take about 10 seconds on 2 cores, and 600 MB.

    Args:
        name: one of `SPOKEN_SETS`. Sets that differ only in noise share a folder.
        cache_folder: the folder of all prepared data.

    Returns:
        the samples of all clips, int16 at `ESPEAK_RATE`, one clip after the other, and (rows + 1,) where they begin and
        end.

    Raises:
        TrunklineError: if eSpeak is missing or does not work, or the folder cannot be written.
    """
    utterances = [clip.utterance() for clip in draw_clips(name)]
    groups = [utterances[start : start + GROUP] for start in range(0, len(utterances), GROUP)]
    key = blake2b(repr((SPOKEN_FORMAT, espeak_version(), groups)).encode(), digest_size=12).hexdigest()
    samples, borders = cache_folder / f"spoken-{key}.bin", cache_folder / f"spoken-{key}.npy"
    with lock(samples.with_suffix(".lock")):
        if not borders.exists():  # it is written last
            write_clips(samples, borders, groups)
        return np.memmap(samples, "<i2", "r"), np.load(borders)


def write_clips(samples: Path, borders: Path, groups: list[list[Utterance]]) -> None:
    """Say groups of utterances, and write all samples into one file, and where the clips begin and end into another."""
    places = [0]
    try:
        with replacing(samples) as (temporary,), temporary.open("wb") as stream:
            for clip in chain.from_iterable(speak_groups(groups)):
                stream.write(clip.data)
                places.append(places[-1] + len(clip))
    except OSError as error:
        raise cannot_write(samples, error) from error
    write_array(borders, np.array(places))


class SpokenDigits:
    """The clips of a set (`AudioRows`), with the noise of the set.

    Args:
        name: one of `SPOKEN_SETS`.
        cache_folder: the folder of all prepared data.
    """

    def __init__(self, name: str, cache_folder: Path) -> None:
        self.set_name, self.cache_folder = name, cache_folder
        self.settings, self.clips = SPOKEN_SETS[name], draw_clips(name)
        self.samples, self.borders = spoken_clips(name, cache_folder)
        self.seconds = np.diff(self.borders) / ESPEAK_RATE
        self.texts: list[str] | None = [clip.digits for clip in self.clips]
        self.labels: list[list[str]] | None = None
        if self.settings.single:
            self.labels = [[DIGITS[int(clip.digits)]] for clip in self.clips]

    def __reduce__(self) -> tuple[Any, ...]:
        return SpokenDigits, (self.set_name, self.cache_folder)  # else a worker process would be sent all samples

    def __len__(self) -> int:
        return len(self.clips)

    def name(self, row: int) -> str:
        """Names a row for messages."""
        return f"{self.set_name}, clip {row} ({self.clips[row].accent}, {self.clips[row].voice})"

    def stored(self, row: int) -> list[bytes | Path]:
        """What is stored of a row, as it is, for `sampled_digest`."""
        return [self.samples[self.borders[row] : self.borders[row + 1]].tobytes()]

    def waveform(self, row: int, rate: int, start: float = 0.0, end: float | None = None) -> np.ndarray:
        """(S,) float32 at `rate` samples per second. The set's noise is added before anything else."""
        clip = self.clean(row)
        if self.settings.noise is not None:
            clip = mixed_at(clip, self._noise(row, len(clip)), SNR)
        clip = clip[round(start * ESPEAK_RATE) : None if end is None else round(end * ESPEAK_RATE)]
        if rate == ESPEAK_RATE:
            return clip
        from torchaudio.functional import resample  # here, because commands without sound start sooner

        return resample(torch.from_numpy(clip), ESPEAK_RATE, rate).numpy()

    def clean(self, row: int) -> np.ndarray:
        """(S,) float32 at `ESPEAK_RATE`: the clip without noise, from -1 to 1."""
        return self.samples[self.borders[row] : self.borders[row + 1]].astype(np.float32) / 32_768

    def _noise(self, row: int, length: int) -> np.ndarray:
        """(length,) noise for a row, at any volume."""
        generator = np.random.default_rng([SPOKEN_SEED, self.settings.stream, row])
        if self.settings.noise == "white":
            return generator.standard_normal(length, dtype=np.float32)
        babble = np.zeros(length, np.float32)
        others = (row + 1 + generator.choice(len(self) - 1, TALKERS, replace=False)) % len(self)
        for other in others:
            clip = self.clean(int(other))
            start = int(generator.integers(len(clip)))
            babble += np.resize(np.roll(clip, -start), length) / np.sqrt(power(clip))
        return babble


def power(waveform: np.ndarray) -> float:
    """Mean of the squared samples."""
    return float(np.mean(np.square(waveform, dtype=np.float64)))


def mixed_at(speech: np.ndarray, noise: np.ndarray, decibels: float) -> np.ndarray:
    """(S,) the speech with noise, scaled so that its power lies `decibels` below that of the speech."""
    return speech + noise * np.float32(np.sqrt(power(speech) / power(noise) * 10 ** (-decibels / 10)))


def open_spoken_digits(name: str, cache_folder: Path | None = None) -> SpokenDigits:
    """A set by its name; its clips are said now if that was not done before.

    Args:
        name: one of `SPOKEN_SETS`.
        cache_folder: the folder of all prepared data; None for `default_cache()`.

    Raises:
        TrunklineError: if there is no such set, eSpeak is missing or does not work, or the folder cannot be written.
    """
    if name not in SPOKEN_SETS:
        raise TrunklineError(f"there is no set of spoken digits {name}; choose from {', '.join(SPOKEN_SETS)}")
    return SpokenDigits(name, cache_folder or default_cache())
