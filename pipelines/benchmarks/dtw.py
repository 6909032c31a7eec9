"""A baseline for spoken digits without training: dynamic time warping, which compares clips with recorded digits.

Connected words are found in one pass (Ney, 1984): all templates are warped along a clip at once, and where one ends,
any other can begin.
"""

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from trunkline.datamodules.audio.espeak import ESPEAK_RATE
from trunkline.datamodules.audio.log_mel import LogMel
from trunkline.datamodules.audio.spoken_digits import open_spoken_digits
from trunkline.modules.metrics.error_rates import characters, error_rate

TEMPLATES_A_DIGIT = 72
"""Templates of a digit, each in another voice; `spoken_digits` trains on 73 voices."""
MELS, CEPSTRA = 40, 13
"""Log-mel bands of a frame, and the cosine coefficients that describe them."""
CHANGE_WEIGHT = 2.0
"""Weight of a coefficient's change over time beside itself."""
ENTRY_COST = 1.0
"""Added for each digit, in distances of a frame; it balances lost digits against too many."""
COST_STEPS, PLACES, NO_PATH = 1000, 4096, 2**62
"""A path is an integer: its cost in steps, times `PLACES`, plus the frame at which its template began."""


class Templates:
    """Recorded digits, laid out for `spell`: each has two cells before those of its frames.

    A cell holds the best path that ends there. Of the two cells before a template, the first has none, and the second
    has the best path through whole templates up to the frame before; so the same moves lead to all frames of a
    template, the first ones included.

    Args:
        recordings: (digit, its frames (T, C)) of each template.
    """

    def __init__(self, recordings: Sequence[tuple[int, Tensor]]) -> None:
        self.digits = np.array([digit for digit, _ in recordings])
        lengths = np.array([len(frames) for _, frames in recordings])
        self.ends = np.cumsum(lengths + 2) - 1
        """(N,) cell of the last frame of each template."""
        self.entries = self.ends - lengths
        """(N,) cell before the first frame."""
        self.cells = torch.cat([F.pad(frames, (0, 0, 2, 0)) for _, frames in recordings])
        """(J, C) the frames; zeros in the cells before."""

    def spell(self, frames: Tensor, entry_cost: float = ENTRY_COST) -> str:
        """The digits whose templates, warped, lie nearest to a clip.

        Each frame of the clip counts once. From one frame to the next, a path stays in a template's frame, moves on by
        one, or by two.

        Args:
            frames: (T, C) of the clip, T below `PLACES`.
            entry_cost: added to the cost for each digit.

        Returns:
            digit characters; none if the clip is too short for every template.
        """
        # As integers, the smaller of two paths is the better one, and still knows where its template began.
        distances = (torch.cdist(frames, self.cells) * COST_STEPS).to(torch.int64).mul_(PLACES).numpy()
        entry = int(entry_cost * COST_STEPS) * PLACES
        paths, best = np.full(len(self.cells) + 2, NO_PATH), np.empty(len(self.cells), np.int64)
        total, words = 0, []
        for time, row in enumerate(distances):
            paths[2 + self.entries] = total + entry + time
            np.minimum(paths[2:], paths[1:-1], out=best)
            np.minimum(best, paths[:-2], out=best)
            np.add(best, row, out=paths[2:])
            paths[1 + self.entries] = NO_PATH
            word = int(paths[2 + self.ends].argmin())
            cost, begin = divmod(int(paths[2 + self.ends[word]]), PLACES)
            total = cost * PLACES
            words.append((self.digits[word], begin))
        text, end = "", len(words) if total < NO_PATH else 0
        while end > 0:
            digit, end = words[end - 1]
            text = str(digit) + text
        return text


def described(waveform: np.ndarray) -> Tensor:
    """Frames (T, 2 * `CEPSTRA`) of a clip (S,): mel cepstra, normalised over the clip, and their change over time."""
    log_mel = LogMel(sample_rate=ESPEAK_RATE, num_mels=MELS).features(torch.from_numpy(waveform))
    angles = (torch.arange(MELS) + 0.5)[:, None] * torch.arange(CEPSTRA) * math.pi / MELS
    cepstra = log_mel @ angles.cos()
    cepstra = (cepstra - cepstra.mean(0)) / cepstra.std(0)
    edges = F.pad(cepstra.T[None], (2, 2), mode="replicate")[0].T
    changes = (2 * (edges[4:] - edges[:-4]) + edges[3:-1] - edges[1:-3]) / 10  # slope of the line through 5 frames
    return torch.cat((cepstra, CHANGE_WEIGHT * changes), 1)


def recorded_templates(cache_folder: Path | None = None, count: int = TEMPLATES_A_DIGIT) -> Templates:
    """The first clip of `spoken_digits:single` in each of `count` voices, for each digit."""
    rows = open_spoken_digits("spoken_digits:single", cache_folder)
    chosen: dict[tuple[int, str], int] = {}
    for row, clip in enumerate(rows.clips):
        digit = int(clip.digits)
        if sum(known == digit for known, _ in chosen) < count:
            chosen.setdefault((digit, clip.voice), row)
    return Templates(
        [(digit, described(rows.waveform(row, ESPEAK_RATE))) for (digit, _), row in sorted(chosen.items())]
    )


def dtw_errors(
    names: Sequence[str] = ("spoken_digits:voices", "spoken_digits:white"),
    cache_folder: Path | None = None,
    templates: int = TEMPLATES_A_DIGIT,
) -> dict[str, float]:
    """Digit error of time warping: edits of digits divided by the digits that were said.

    The settings were chosen on `spoken_digits:val`.

    Args:
        names: sets of spoken digits.
        cache_folder: the folder of all prepared data; None for the usual one.
        templates: number of templates of a digit.

    Returns:
        name of the set -> digit error.
    """
    recorded = recorded_templates(cache_folder, templates)
    errors = {}
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for name in names:
            rows = open_spoken_digits(name, cache_folder)
            written = pool.map(
                lambda row, rows=rows: recorded.spell(described(rows.waveform(row, ESPEAK_RATE))), range(len(rows))
            )
            errors[name] = error_rate(list(written), [clip.digits for clip in rows.clips], characters)
    return errors
