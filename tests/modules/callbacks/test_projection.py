"""Embeddings of TensorBoard's projector: read back, placed in a plane, and drawn."""

from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image
from torch.utils.tensorboard import SummaryWriter
from written_run import CLASSES, EACH, add_embeddings, class_vectors

from trunkline.modules.callbacks.projection import (
    DOT,
    FRAME,
    MARGIN,
    MOST_COLOURS,
    SIDE,
    draw_projection,
    in_plane,
    read_projections,
    to_cells,
)

LABELS = [name for name in CLASSES for _ in range(EACH)]


@pytest.mark.parametrize("header", [False, True])
def test_what_is_read(tmp_path: Path, header: bool) -> None:
    """The last step of each tag, with labels and thumbnails."""
    assert read_projections(tmp_path) == {}
    with SummaryWriter(str(tmp_path)) as writer:
        for step in (3, 12):
            add_embeddings(writer, "val/features", step, header=header)
        add_embeddings(writer, "texts", pictures=False)
    found = read_projections(tmp_path)
    assert found.keys() == {"val/features", "texts"}
    np.testing.assert_allclose(found["val/features"].vectors, class_vectors(12), rtol=1e-5)
    np.testing.assert_allclose(found["texts"].vectors, class_vectors(0), rtol=1e-5)
    assert found["val/features"].labels == found["texts"].labels == LABELS
    assert found["texts"].thumbnails == []
    shown = [np.asarray(picture) for picture in found["val/features"].thumbnails]
    assert {picture.shape for picture in shown} == {(16, 16, 3)}
    for label, picture in zip(LABELS, shown, strict=True):
        np.testing.assert_allclose(picture.astype(int), np.broadcast_to(CLASSES[label], (16, 16, 3)), atol=1)


def test_like_ones_stand_together() -> None:
    places = in_plane(class_vectors().numpy())
    assert places.shape == (3 * EACH, 2)
    np.testing.assert_array_equal(places.min(axis=0), [0, 0])
    np.testing.assert_array_equal(places.max(axis=0), [1, 1])
    apart = np.linalg.norm(places[:, None] - places, axis=2)
    np.fill_diagonal(apart, np.inf)
    classes = np.arange(3).repeat(EACH)
    # t-SNE leaves a stray now and then, and rounding decides which; by chance a third would stand beside their kind.
    assert (classes[apart.argmin(axis=1)] == classes).mean() > 0.8
    np.testing.assert_array_equal(places, in_plane(class_vectors().numpy()))


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_few_embeddings(count: int) -> None:
    places = in_plane(class_vectors()[::5][:count].numpy())
    assert places.shape == (count, 2)
    assert len(np.unique(places, axis=0)) == count


def at(picture: np.ndarray, place: tuple[float, float], right: int = 0) -> tuple[int, ...]:
    """The pixel at a place from 0 to 1, or to the right of it."""
    x, y = (round(MARGIN + part * (SIDE - 2 * MARGIN)) for part in place)
    return tuple(picture[y, x + right].tolist())


def colours_in(picture: np.ndarray) -> set[tuple[int, ...]]:
    found = Image.fromarray(picture).getcolors(picture.size)
    assert found is not None
    return {colour for _, colour in found}  # type: ignore[misc]


def colours_of(count: int) -> list[tuple[int, ...]]:
    return [tuple(shade[:3]) for shade in matplotlib.colormaps["tab10"](range(count), bytes=True).tolist()]


def test_what_is_drawn() -> None:
    """Thumbnails in the cells next to their places, in frames of their label's colour, and a line with the labels."""
    places = np.array([[0, 0], [1, 0], [0.5, 1]])
    tiles = [Image.new("RGB", (20, 20), (n, n, n)) for n in (10, 60, 110)]
    picture = np.asarray(draw_projection(places, ["b", "a", "b"], tiles))
    assert picture.shape == (SIDE + 18, SIDE, 3)
    cell = SIDE // 3  # 3 thumbnails on 9 cells
    shades = dict(zip("ab", colours_of(2), strict=True))
    want = {(0, 0): ("b", 10), (0, 2): ("a", 60), (2, 1): ("b", 110)}
    for row, column in np.ndindex(3, 3):
        shown = picture[row * cell : (row + 1) * cell, column * cell : (column + 1) * cell]
        if (row, column) not in want:
            assert (shown == 255).all()
            continue
        label, grey = want[row, column]
        assert (shown[FRAME:-FRAME, FRAME:-FRAME] == grey).all()
        assert colours_in(np.ascontiguousarray(shown[:FRAME])) == {shades[label]}
        assert colours_in(np.ascontiguousarray(shown[:, -FRAME:])) == {shades[label]}
    assert set(shades.values()) <= colours_in(picture[SIDE:])


def test_thumbnails_without_labels_keep_their_shape() -> None:
    picture = np.asarray(draw_projection(np.array([[0.0, 0.0]]), [], [Image.new("RGB", (40, 20), (9, 9, 9))]))
    assert picture.shape == (SIDE, SIDE, 3)
    inside = SIDE // 2 - 2 * FRAME  # of a quarter
    assert (picture == 9).all(axis=2).sum() == inside * (inside // 2)


def test_no_cell_is_used_twice() -> None:
    """Those at the same place stand around it, the first one nearest."""
    cells = to_cells(np.array([[0.5, 0.5]] * 9 + [[0.0, 0.0], [1.0, 1.0]]), 5)
    assert cells[0].tolist() == [2, 2]
    assert sorted(map(tuple, cells[1:5].tolist())) == [(1, 2), (2, 1), (2, 3), (3, 2)]
    assert sorted(map(tuple, cells[5:9].tolist())) == [(1, 1), (1, 3), (3, 1), (3, 3)]
    assert cells[9:].tolist() == [[0, 0], [4, 4]]
    assert len(np.unique(cells, axis=0)) == 11


def test_points() -> None:
    """Without thumbnails; with too many labels, or none, they are black, and nothing is listed."""
    places = np.array([[0.25, 0.25], [0.75, 0.75]])
    picture = np.asarray(draw_projection(places, ["a", "b"], []))
    for place, colour in zip(places, colours_of(2), strict=True):
        assert at(picture, tuple(place)) == at(picture, tuple(place), DOT // 2 - 1) == colour
        assert at(picture, tuple(place), DOT // 2) == (255, 255, 255)
    many = np.linspace(0, 1, MOST_COLOURS + 1)[:, None].repeat(2, axis=1)
    for labels in ([], [str(n) for n in range(len(many))]):
        picture = np.asarray(draw_projection(many, labels, []))
        assert picture.shape == (SIDE, SIDE, 3)
        assert colours_in(picture) == {(0, 0, 0), (255, 255, 255)}


def test_many_labels_are_listed_in_several_lines() -> None:
    labels = [f"a label of some length {n}" for n in range(MOST_COLOURS)]
    picture = draw_projection(np.linspace(0, 1, MOST_COLOURS)[:, None].repeat(2, axis=1), labels, [])
    assert picture.size == (SIDE, SIDE + 18 * 5)  # four a line
