"""`trunkline search`, and `trunkline embed` with a CLIP: a text finds its pictures."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from tiny_clip import COLOURS, encoder, folders, overfitted, picture, pixels, save

from trunkline import TrunklineError
from trunkline.modules.callbacks.drawing import GREY
from trunkline.pipelines.cli import main
from trunkline.pipelines.commands.embed import embed
from trunkline.pipelines.commands.search import search


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    return save(tmp_path, overfitted())


def by_hand(files: list[Path], texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    network = overfitted()
    with torch.no_grad():
        images = network.encode_image(torch.stack([pixels(Image.open(file)) for file in files]))
        words = [network.encode_text(*(x for x in encoder().encode([text])[:2]))[0] for text in texts]
    return images.numpy(), torch.stack(words).numpy()


def printed(capsys: pytest.CaptureFixture[str]) -> list[tuple[int, float, str]]:
    lines = re.findall(r"^ +(\d+)  (-?\d\.\d{4})  (.+)$", capsys.readouterr().out, re.M)
    return [(int(rank), float(cosine), path) for rank, cosine, path in lines]


def test_finds_the_pictures(checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From a folder, from embeddings alone, and from embeddings of the folder."""
    images, sheet, table = folders(tmp_path / "images", 3), tmp_path / "sheet.png", tmp_path / "e.parquet"
    options = ["--count", "7", "--output", str(sheet), "--device", "cpu", "--batch_size", "5"]
    main(["search", "a blue thing", "--images", str(images), "--checkpoint", checkpoint, *options])
    found = printed(capsys)
    files = sorted(images.rglob("*.png"))
    vectors, (text,) = by_hand(files, ["a blue thing"])
    order = np.argsort(-(vectors @ text))[:7]
    assert [rank for rank, _, _ in found] == list(range(1, 8))
    assert [path for _, _, path in found] == [str(files[n]) for n in order]
    assert [cosine for _, cosine, _ in found] == pytest.approx(list((vectors @ text)[order]), abs=1e-4)
    assert {Path(path).parent.name for _, _, path in found[:3]} == {"blue"}
    tiles = np.asarray(Image.open(sheet))
    height, width = 160 + 6 + 3 * 14, 160 + 6
    assert tiles.shape == (2 * height, 5 * width, 3)  # 7 pictures, 5 a row
    for n, row in enumerate(order):
        top, left = n // 5 * height, n % 5 * width
        assert tuple(tiles[top, left]) == GREY
        shown = tiles[top + 3 : top + 163, left + 3 : left + 163].mean(axis=(0, 1))
        np.testing.assert_allclose(shown, np.asarray(Image.open(files[row])).mean(axis=(0, 1)), atol=1)
    assert (tiles[height:, 2 * width :] == 255).all()
    embed(checkpoint, images=str(images), output=str(table), device="cpu")
    for source in ([], ["--images", str(images)]):
        main(["search", "a blue thing", "--embeddings", str(table), "--checkpoint", checkpoint, *source, *options])
        again = printed(capsys)
        assert [path for _, _, path in again] == [path for _, _, path in found]
        assert (np.asarray(Image.open(sheet)) == tiles).all()


def test_embeddings_of_texts_and_images(checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images, texts, output = folders(tmp_path / "images", 1), [f"a {c} thing" for c in COLOURS], tmp_path / "e.parquet"
    (tmp_path / "lines.txt").write_text("\n".join([*texts, "a thing of a dark red"]))
    embed(checkpoint, str(tmp_path / "lines.txt"), str(output), str(images), projector=str(tmp_path / "board"))
    assert capsys.readouterr().out.splitlines() == [
        "1 of 5 texts were cut to 6 tokens, as in training",
        f"wrote 9 embeddings of 8 numbers to {output}",
    ]
    table = pd.read_parquet(output)
    files = sorted(images.rglob("*.png"))
    vectors, words = by_hand(files, [*texts, "a thing of a"])
    np.testing.assert_allclose(np.stack(table.embedding), np.concatenate([words, vectors]), atol=1e-5)
    assert table.text[:5].tolist() == [*texts, "a thing of a dark red"]
    assert table.path[5:].tolist() == [str(file) for file in files]
    assert table.path[:5].isna().all()
    assert table.text[5:].isna().all()
    np.testing.assert_allclose(table.similarity[:5], (words @ words.T - 3 * np.eye(5)).max(axis=1), atol=1e-5)
    assert (tmp_path / "board" / "00000" / "texts" / "tensors.tsv").exists()
    sprite = np.asarray(Image.open(tmp_path / "board" / "00000" / "images" / "sprite.png"))
    assert sprite.shape[:2] == (64, 64)  # 4 thumbnails
    for n, file in enumerate(files):
        tile = sprite[n // 2 * 32 :, n % 2 * 32 :][:32, :32, :3]
        np.testing.assert_allclose(tile.mean(axis=(0, 1)), np.asarray(Image.open(file)).mean(axis=(0, 1)), atol=1.5)


def test_a_broken_picture(checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images, output = folders(tmp_path / "images", 1), str(tmp_path / "a.png")
    (images / "blue" / "0.png").write_bytes(b"no picture")
    options: dict[str, Any] = {"images": str(images), "output": output, "device": "cpu"}
    for workers in (0, 1):
        with pytest.raises(TrunklineError, match=r"^cannot read the image .*blue/0\.png: .*or set skip_corrupt=true$"):
            search("red", checkpoint, **{**options, "num_workers": workers})
    assert not Path(output).exists()
    search("red", checkpoint, skip_corrupt=True, **options)
    shown = capsys.readouterr().out
    assert "skipped 1 of 4 pictures" in shown
    assert "wrote the 3 best of 3 pictures" in shown


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output": "a.pdf"}, "--output a.pdf must be a .png or .jpg file in a folder that exists"),
        ({"query": " "}, "--query is empty; say what to look for"),
        ({"count": 0}, "--count must be at least 1, not 0"),
        ({"images": None}, "there is nothing to search; give --images, or --embeddings"),
        ({"images": "nowhere"}, "images=nowhere is not a folder; give one that holds images"),
        (
            {"embeddings": "nowhere.parquet"},
            "cannot read --embeddings nowhere.parquet: .*write it with `trunkline embed",
        ),
        ({"checkpoint": "nowhere.ckpt"}, "there is no checkpoint nowhere.ckpt"),
        ({"embeddings": {"text": ["a"], "embedding": [[1.0] * 8]}}, "has no column 'path'; write it with"),
        ({"embeddings": {"path": ["a"], "embedding": [[1.0] * 9]}}, "has 9 numbers a picture, but .* makes 8"),
        (
            {"embeddings": {"path": ["a", "b"], "embedding": [[1.0] * 8, [1.0] * 7]}},
            "has 7 or 8 numbers a picture, but",
        ),
        ({"embeddings": {"path": ["a", "b"], "embedding": [[1.0] * 8, None]}}, "has 1 or 8 numbers a picture, but"),
        (
            {"embeddings": {"path": ["a"], "embedding": [[1.0] * 8]}},
            "a is not among --images .*; write the table again",
        ),
        ({"embeddings": {"path": [None], "embedding": [[1.0] * 8]}}, "has no picture; write it with"),
        (
            {"embeddings": {"path": ["gone.png"], "embedding": [[1.0] * 8]}, "images": None},
            r"cannot read the image gone\.png",
        ),
    ],
)
def test_bad_input(options: dict[str, Any], message: str, tmp_path: Path, checkpoint: str) -> None:
    if isinstance(options.get("embeddings"), dict):
        pd.DataFrame(options["embeddings"]).to_parquet(tmp_path / "e.parquet")
        options = {**options, "embeddings": str(tmp_path / "e.parquet")}
    (tmp_path / "images").mkdir()
    picture("red").save(tmp_path / "images" / "a.png")
    given = {"query": "red", "images": str(tmp_path / "images"), "output": str(tmp_path / "a.png"), "device": "cpu"}
    with pytest.raises(TrunklineError, match=message):
        search(**{"checkpoint": checkpoint, **given, **options})
    assert not (tmp_path / "a.png").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "there is nothing to embed; give --texts, --images or both"),
        ({"images": "nowhere"}, "images=nowhere is not a folder; give one that holds images"),
        ({"images": ".", "normalise": False}, "--pool, --normalise and --tokenizer are for language models"),
        ({"images": ".", "pool": "cls"}, "is of a CLIP, which embeds as in training; leave them out"),
    ],
)
def test_embed_bad_input(options: dict[str, Any], message: str, checkpoint: str, tmp_path: Path) -> None:
    with pytest.raises(TrunklineError, match=message):
        embed(checkpoint, output=str(tmp_path / "e.parquet"), device="cpu", **options)
