"""Time warping of spoken digits: against a slow search over all ways to cut a clip into digits."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from trunkline.datamodules.audio import spoken_digits
from trunkline.pipelines.benchmarks.dtw import ENTRY_COST, Templates, described, dtw_errors, recorded_templates


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def warped_cost(frames: Tensor, template: Tensor) -> float:
    """Cost of a template that is warped onto all of these frames; infinite if it is too long for them."""
    costs = np.full((len(frames), len(template)), np.inf)
    for t in range(len(frames)):
        for j in range(len(template)):
            before = (
                [costs[t - 1, i] for i in (j, j - 1, j - 2) if i >= 0] if t else [0.0 if j < 2 else np.inf]
            )  # may skip one
            costs[t, j] = min(before) + float((frames[t] - template[j]).norm())
    return float(costs[-1, -1])


def best_spelling(frames: Tensor, recordings: list[tuple[int, Tensor]], entry_cost: float) -> str:
    found: list[tuple[float, str]] = [(0.0, "")] + [(np.inf, "")] * len(frames)
    for end in range(1, len(frames) + 1):
        for begin in range(end):
            for digit, template in recordings:
                cost = found[begin][0] + entry_cost + warped_cost(frames[begin:end], template)
                found[end] = min(found[end], (cost, found[begin][1] + str(digit)))
    return found[-1][1]


@pytest.mark.parametrize("entry_cost", [0.0, 2.0])
def test_the_best_of_all_spellings(entry_cost: float) -> None:
    recordings = [(digit, noise(length, 3, seed=digit)) for digit, length in ((0, 3), (4, 5), (7, 2), (9, 4))]
    templates, spellings = Templates(recordings), set()
    for seed in range(12):
        frames = noise(9, 3, seed=100 + seed)
        spelling = best_spelling(frames, recordings, entry_cost)
        assert templates.spell(frames, entry_cost) == spelling
        spellings.add(spelling)
    assert len(spellings) >= 4


def test_slow_and_fast_digits() -> None:
    recordings = [(digit, noise(8, 5, seed=digit)) for digit in range(10)]
    clip = torch.cat([recordings[3][1], recordings[3][1][::2], recordings[7][1].repeat_interleave(3, 0)])
    clip = clip + 0.1 * noise(*clip.shape, seed=20)
    assert Templates(recordings).spell(clip, ENTRY_COST) == "337"


def test_a_price_for_each_digit() -> None:
    recordings = [(digit, noise(4, 5, seed=digit)) for digit in range(10)]
    clip = noise(40, 5, seed=30)
    lengths = [len(Templates(recordings).spell(clip, cost)) for cost in (0.0, 3.0, 1000.0)]
    assert lengths[0] > lengths[1] > lengths[2] == 1


def test_a_clip_that_is_too_short() -> None:
    assert Templates([(1, noise(9, 3, seed=0))]).spell(noise(3, 3, seed=1)) == ""


def test_frames() -> None:
    waveform = noise(8000, seed=3).numpy()
    frames = described(waveform)
    assert frames.shape == (34, 26)
    torch.testing.assert_close(frames[:, :13].mean(0), torch.zeros(13), atol=1e-5, rtol=0)
    torch.testing.assert_close(frames[:, :13].std(0), torch.ones(13))
    torch.testing.assert_close(described(10 * waveform), frames, atol=1e-2, rtol=0)  # the volume says nothing
    time, cepstra = np.arange(5) - 2, frames[10:15, :13].numpy()
    slopes = 2 * np.polyfit(time, cepstra, 1)[0]
    np.testing.assert_allclose(frames[12, 13:].numpy(), slopes, atol=1e-5)


def test_digit_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("espeakng_loader")
    for name, rows in (("spoken_digits:single", 600), ("spoken_digits:val", 40), ("spoken_digits:val_white", 40)):
        monkeypatch.setitem(spoken_digits.SPOKEN_SETS, name, replace(spoken_digits.SPOKEN_SETS[name], rows=rows))
    spoken_digits.draw_clips.cache_clear()
    try:
        templates = recorded_templates(tmp_path, 12)
        assert sorted(templates.digits) == sorted(list(range(10)) * 12)
        errors = dtw_errors(("spoken_digits:val", "spoken_digits:val_white"), tmp_path, 12)
        assert errors["spoken_digits:val"] < 0.35 < errors["spoken_digits:val_white"] < 0.95
    finally:
        spoken_digits.draw_clips.cache_clear()
