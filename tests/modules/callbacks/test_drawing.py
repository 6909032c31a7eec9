"""The pictures in TensorBoard, pixel by pixel, and the attention that they show."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import vit

from trunkline.contract import DataFacts
from trunkline.modules.callbacks.attention_maps import attention_rollout, overlay, to_patches
from trunkline.modules.callbacks.classification import draw_confusion
from trunkline.modules.callbacks.drawing import GREEN, RED, captioned, grid, to_pictures
from trunkline.modules.networks import ViT


def test_rollout() -> None:
    attention = [torch.randn(2, 3, 5, 5).softmax(dim=-1) for _ in range(4)]
    want = np.zeros((2, 5, 5))
    for image in range(2):
        product = np.eye(5)
        for layer in attention:
            mixed = sum(layer[image, head].double().numpy() for head in range(3)) / 3
            product = np.array([[0.5 * mixed[i, j] + 0.5 * (i == j) for j in range(5)] for i in range(5)]) @ product
        want[image] = product
    got = attention_rollout(attention)
    np.testing.assert_allclose(got, want, atol=1e-6)
    np.testing.assert_allclose(got.sum(dim=-1), np.ones((2, 5)), atol=1e-6)


@pytest.mark.parametrize(("pool", "registers"), [("cls", 0), ("cls", 2), ("mean", 0), ("mean", 2)])
def test_what_the_output_looks_at(pool: Any, registers: int) -> None:
    network = ViT(vit(pool=pool, num_registers=registers, image_size=(8, 12)))  # 2 x 3 patches
    prefix = registers + (pool == "cls")
    weights = torch.rand(2, 4, prefix + 6, prefix + 6)
    maps = to_patches(weights, network)
    assert maps.shape == (2, 4, 2, 3)
    for row in range(2):
        for column in range(3):
            to_patch = weights[..., prefix + 3 * row + column]  # of each token
            want = to_patch[..., 0] if pool == "cls" else sum(to_patch[..., prefix + n] for n in range(6)) / 6
            torch.testing.assert_close(maps[..., row, column], want)


def test_overlay_is_brightest_where_the_weight_is() -> None:
    weights = torch.zeros(2, 3)
    weights[1, 2] = 0.3
    shown = np.asarray(overlay(Image.new("RGB", (30, 20), "black"), weights)).astype(int).sum(axis=-1)
    assert shown.shape == (20, 30)
    assert shown[-1, -1] == shown.max() > shown[0, 0] + 100


def test_pictures_of_normalised_images() -> None:
    pixels = torch.randint(0, 256, (4, 3, 5, 7), dtype=torch.uint8)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    data = SimpleNamespace(facts=DataFacts(mean=mean, std=std))
    normalised = (pixels / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    shown = to_pictures(normalised, SimpleNamespace(datamodule=data), side=7)  # type: ignore[arg-type]
    assert len(shown) == 4
    for image, picture in zip(pixels, shown, strict=True):
        np.testing.assert_array_equal(np.asarray(picture), image.permute(1, 2, 0))
    (grey,) = to_pictures(pixels[:1, :1] / 255, SimpleNamespace(datamodule=None), side=14)  # type: ignore[arg-type]
    assert grey.size == (14, 10)
    np.testing.assert_array_equal(np.asarray(grey)[::2, ::2], pixels[0, [0, 0, 0]].permute(1, 2, 0))


@pytest.mark.parametrize("colour", [GREEN, RED])
def test_frame(colour: tuple[int, int, int]) -> None:
    inside = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    shown = np.asarray(captioned(Image.fromarray(inside), "8 not 3", colour))
    assert shown.shape == (20 + 6 + 14, 30 + 6, 3)
    np.testing.assert_array_equal(shown[3:23, 3:33], inside)
    frame = np.ones((26, 36), bool)
    frame[3:23, 3:33] = False
    assert (shown[:26][frame] == colour).all()
    ink = (255 - shown[26:].astype(float)).sum(axis=(0, 1))  # of the text, on white
    np.testing.assert_allclose(ink / ink.sum(), (255 - np.array(colour)) / (765 - sum(colour)), atol=0.01)
    assert (shown[-1] == 255).all()


def test_grid() -> None:
    tiles = [Image.new("RGB", (4, 2), (n, n, n)) for n in range(1, 6)]
    want = np.repeat(np.repeat([[1, 2, 3], [4, 5, 255]], 2, axis=0), 4, axis=1)
    np.testing.assert_array_equal(grid(tiles, columns=3), want[..., None].repeat(3, axis=-1))


def test_confusion_drawing() -> None:
    counts = torch.tensor([[6, 2, 0], [0, 0, 0], [1, 0, 3]])
    (axes,) = draw_confusion(counts, ["cat", "dog", "eel"]).axes
    np.testing.assert_allclose(axes.images[0].get_array(), [[0.75, 0.25, 0], [0, 0, 0], [0.25, 0, 0.75]])
    assert {(t.get_position(), t.get_text()) for t in axes.texts} == {  # (x, y): (predicted, true)
        ((0, 0), "6"),
        ((1, 0), "2"),
        ((0, 2), "1"),
        ((2, 2), "3"),
    }
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted", "true")
    assert [t.get_text() for t in axes.get_yticklabels()] == ["cat", "dog", "eel"]
