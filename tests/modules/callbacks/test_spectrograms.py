"""Pictures of sounds, pixel by pixel."""

import numpy as np
import pytest
import torch
from PIL import Image

from trunkline.modules.callbacks.drawing import GREY, LINE, RED
from trunkline.modules.callbacks.spectrograms import (
    COLUMN,
    PALE,
    PINK,
    Mark,
    attended,
    compared,
    heard_frames,
    lane,
    spectrogram,
    stacked,
    time_axis,
    with_starts,
)
from trunkline.modules.metrics.error_rates import edit_pairs


def pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture).astype(int)


def ink(box: np.ndarray) -> str:
    """The colour of the letters in a box: they are drawn smooth, so that many shades lie between them and the paper."""
    darkest = box.reshape(-1, 3)[box.sum(axis=-1).argmin()]
    if darkest.min() > 200:
        return "none"
    return "red" if darkest[0] > darkest[1] + 80 else "black" if darkest.max() < 80 else "grey"


def letters(picture: Image.Image, line: int) -> list[str]:
    """The colour of each letter of a line."""
    rows = pixels(picture)[LINE * line : LINE * (line + 1)]
    return [ink(rows[:, at : at + COLUMN]) for at in range(0, rows.shape[1] - COLUMN + 1, COLUMN)]


# --- frames


def test_padding_is_left_out() -> None:
    features = torch.zeros(9, 2)
    features[[1, 4], 0] = torch.tensor([3.0, 1.0])  # a silence in the clip is no padding
    mask = torch.arange(9) < 6
    assert heard_frames(features, mask).tolist() == features[:6].tolist()
    assert heard_frames(features, None).tolist() == features[:6].tolist()  # 5, and one frame of padding
    assert heard_frames(features[:5], None).tolist() == features[:5].tolist()
    assert heard_frames(features[5:], None).tolist() == features[5:6].tolist()  # silence alone


@pytest.mark.parametrize(("bins", "height"), [(4, 88), (80, 80), (128, 128)])
def test_low_frequencies_are_at_the_bottom_and_loud_ones_bright(bins: int, height: int) -> None:
    features = torch.zeros(5, bins)
    features[2, 0], features[4, bins - 1] = 6.0, 3.0
    shown = pixels(spectrogram(features, scale=3)).sum(axis=-1)
    assert shown.shape == (height, 15)
    cell = height // bins
    assert (shown[-cell:, 6:9] == shown.max()).all()
    loud, half = shown[-1, 6], shown[0, 12]
    assert loud > half > shown[0, 0]
    assert (shown[:cell, 12:] == half).all()
    rest = np.ones_like(shown, bool)
    rest[-cell:, 6:9] = rest[:cell, 12:] = False
    assert (shown[rest] == shown[0, 0]).all()


def test_level_and_scale_of_the_features_do_not_matter() -> None:
    features = torch.randn(40, 8)
    np.testing.assert_allclose(pixels(spectrogram(features)), pixels(spectrogram(features * 4 - 30)), atol=6)
    assert len(np.unique(pixels(spectrogram(torch.full((3, 4), -15.9))))) > 0  # all equal: nothing divides by zero


def test_lines_stand_at_the_starts() -> None:
    picture = Image.new("RGB", (40, 5), "black")
    shown = pixels(with_starts(picture, [Mark("a", 2, 4), Mark("b", 7, 8)], scale=3)).sum(axis=-1)
    white = np.zeros(40, bool)
    white[[6, 21]] = True
    assert (shown == 765 * white).all()
    assert not pixels(picture).any()  # the picture itself is as before


def test_seconds() -> None:
    shown = pixels(time_axis(frames=300, frame_seconds=0.01, scale=2))
    assert shown.shape == (LINE, 600, 3)
    ticks = np.flatnonzero((shown[0] == GREY).all(axis=-1))  # above the numbers
    assert ticks.tolist() == list(range(0, 600, 100))  # half a second is 100 pixels, 0.2 seconds would be too narrow
    assert ink(shown[4:, 102:130]) == "grey"
    assert ink(shown[4:, 140:195]) == "none"
    assert pixels(time_axis(frames=1, frame_seconds=0.01, scale=1)).shape == (LINE, 1, 3)


# --- tokens at their frames


def test_tokens_stand_at_their_frames() -> None:
    shown = pixels(lane([Mark("b", 2, 5), Mark("x", 20, 30, wrong=True)], width=200, scale=4))
    assert shown.shape == (LINE, 200, 3)
    paper = shown[-1]
    assert (paper[8:20] == PALE).all()
    assert (paper[80:120] == PINK).all()
    assert (np.delete(paper, [*range(8, 20), *range(80, 120)], axis=0) == 255).all()
    assert ink(shown[:, 8 : 8 + COLUMN]) == "black"
    assert ink(shown[:, 80 : 80 + COLUMN]) == "red"


def test_a_name_ends_where_the_next_one_begins() -> None:
    marks = [Mark("MMMMMM", 0, 1), Mark(".", 5, 6)]
    shown = pixels(lane(marks, width=100, scale=4))
    assert ink(shown[:, COLUMN : 2 * COLUMN]) == "black"
    assert ink(shown[: LINE // 2, 2 * COLUMN :]) == "none"  # 20 pixels have room for 2 letters
    marks = [Mark("MMMMMM", 90, 92), Mark("M", 300, 301)]  # beyond the end of the picture
    assert pixels(lane(marks, width=100, scale=1)).shape == (LINE, 100, 3)


# --- texts


def test_wrong_letters_are_red_on_both_sides() -> None:
    pairs = edit_pairs("WEIT", "WASER")  # in this order: ours, right
    assert pairs == [("W", "W"), (None, "A"), ("E", "S"), ("I", "E"), ("T", "R")]
    shown = compared(pairs, width=12 * COLUMN)
    assert shown.height == 2 * LINE
    for line in (0, 1):
        assert letters(shown, line)[:9] == ["grey"] * 3 + ["none", "black"] + ["red"] * 4
    assert letters(shown, 0)[9:] == ["none"] * 3
    alike = compared(edit_pairs("MM", "MM"), width=70)
    assert letters(alike, 1)[4:] == ["black"] * 2 + ["none"] * 4


def test_a_missing_letter_is_a_dot() -> None:
    assert edit_pairs("", "W") == [(None, "W")]
    missing, dot = (pixels(compared([pair], width=50)) for pair in ((None, "W"), ("·", "W")))
    np.testing.assert_array_equal(missing, dot)
    assert ink(missing[LINE:, 4 * COLUMN :]) == "red"


def test_long_texts_are_wrapped_and_cut() -> None:
    pairs = [("M", "M")] * 6 + [("M", "W")] + [("M", "M")] * 30
    shown = compared(pairs, width=9 * COLUMN, most=2)  # 5 letters beside the title
    assert shown.size == (9 * COLUMN, 4 * LINE)
    assert letters(shown, 0)[4:] == ["black"] * 5
    assert letters(shown, 2)[4:] == letters(shown, 3)[4:] == ["black", "red"] + ["black"] * 3
    assert compared([], width=70).height == 2 * LINE  # nothing was said, and nothing heard
    assert compared(pairs, width=1).width == 1


# --- weights


def test_weights_over_time() -> None:
    weights = torch.zeros(3, 5)
    weights[0, 1], weights[0, 3], weights[1, 4] = 0.2, 0.1, 0.9
    shown = pixels(attended(weights, ["W", "MMMM", "."], width=50, margin=3 * COLUMN))
    assert shown.shape == (3 * LINE, 3 * COLUMN + 50, 3)
    values = shown[:, 3 * COLUMN :].sum(axis=-1).reshape(3, LINE, 5, 10)
    assert (values == values[:, :1, :, :1]).all()  # a cell has one colour
    values = values[:, 0, :, 0]
    assert values[0, 1] == values[1, 4] == values.max()  # each line has a maximum
    assert values[0, 1] > values[0, 3] > values[0, 0]
    assert (values[2] == values[0, 0]).all()
    assert letters(attended(weights, ["W", "MMMM", "."], 50, 3 * COLUMN), 0)[:3] == ["black", "none", "none"]
    assert letters(attended(weights, ["W", "MMMM", "."], 50, 3 * COLUMN), 1)[:3] == ["black"] * 3  # cut off


def test_pictures_below_each_other() -> None:
    parts = [Image.new("RGB", (4, 2), RED), Image.new("RGB", (6, 3), GREY)]
    shown = pixels(stacked(parts))
    assert shown.shape == (5, 6, 3)
    assert (shown[:2, :4] == RED).all()
    assert (shown[:2, 4:] == 255).all()
    assert (shown[2:] == GREY).all()
