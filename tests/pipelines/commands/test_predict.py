"""`trunkline predict`: the table equals an independent forward pass; bad input is one clear message."""

import errno
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from tiny import classifier, trainer, vit

from trunkline import TrunklineError
from trunkline.datamodules import Augmentation, ImageData
from trunkline.modules.networks import ViT
from trunkline.modules.training.checkpoints import SafeCheckpointIO
from trunkline.pipelines.cli import main
from trunkline.pipelines.commands.embed import embed
from trunkline.pipelines.commands.predict import predict

CLASSES = ["ant", "bee", "cat", "dog"]
NAMES = ["1.png", "a/10.png", "a/2.png", "a/b/0.png", "a/b/9.jpg", "a.png", "c/x.png"]
"""In the order of the table: `a.png` comes after all that lies in `a`."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8 colour pictures of each class."""
    folder, draw = tmp_path_factory.mktemp("source"), np.random.default_rng(0)
    for name in CLASSES:
        (folder / name).mkdir()
        for n in range(8):
            Image.fromarray(draw.integers(0, 256, (8, 8, 3), np.uint8)).save(folder / name / f"{n}.png")
    return folder


def train(source: Path, folder: Path, channels: int) -> Path:
    """Checkpoint of a few steps."""
    options = {"mean": (0.4,) * channels, "std": (0.1,) * channels, "val_fraction": 0, "num_workers": 0}
    data = ImageData(
        str(source), image_size=8, channels=channels, batch_size=8, augmentation=Augmentation((1.0, 1.0)), **options
    )
    model = classifier(vit(in_chans=channels, num_classes=4))
    fitted = trainer(folder, max_steps=3, plugins=[SafeCheckpointIO()])
    fitted.fit(model, datamodule=data)
    fitted.save_checkpoint(folder / "a.ckpt")
    return folder / "a.ckpt"


@pytest.fixture(scope="module", params=[1, 3])
def checkpoint(request: pytest.FixtureRequest, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(source, tmp_path_factory.mktemp("run"), request.param)


@pytest.fixture(scope="module")
def grey_checkpoint(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(source, tmp_path_factory.mktemp("grey"), 1)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Nested pictures of several modes, and what is no image."""
    draw, folder = np.random.default_rng(1), tmp_path / "images"
    for number, name in enumerate(reversed(NAMES)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shape = (8, 8) if number % 2 else (8, 8, 3)
        Image.fromarray(draw.integers(30 * number, 30 * number + 40, shape, np.uint8)).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    return folder


def run(checkpoint: Path, images: Path, output: Path, **options: Any) -> pd.DataFrame:
    predict(str(checkpoint), str(images), str(output), accelerator="cpu", **options)
    return pd.read_csv(output) if output.suffix.lower() == ".csv" else pd.read_parquet(output)


def by_hand(checkpoint: Path, files: list[Path]) -> tuple[list[str], list[float]]:
    """Labels and probabilities from the weights alone, an image at a time."""
    content = torch.load(checkpoint, weights_only=True)
    weights = {name.removeprefix("network."): value for name, value in content["state_dict"].items()}
    channels = weights["patch_embed.proj.weight"].shape[1] // 16
    network = ViT(vit(in_chans=channels, num_classes=4))
    network.load_state_dict({name: weights[name] for name in network.state_dict()})
    labels, probabilities = [], []
    for file in files:
        pixels = np.asarray(Image.open(file).convert("L" if channels == 1 else "RGB"), dtype=np.float32)
        image = torch.from_numpy((pixels / 255 - 0.4) / 0.1).reshape(8, 8, channels).permute(2, 0, 1)
        with torch.no_grad():
            logits = network.eval()(image[None])[0].double().tolist()
        best = max(range(4), key=logits.__getitem__)
        labels.append(CLASSES[best])
        probabilities.append(math.exp(logits[best]) / sum(math.exp(value) for value in logits))
    return labels, probabilities


@pytest.mark.parametrize(("ending", "batch_size"), [("csv", 3), ("parquet", 7), ("CSV", 64)])
def test_table(checkpoint: Path, images: Path, tmp_path: Path, ending: str, batch_size: int) -> None:
    table = run(checkpoint, images, tmp_path / f"out.{ending}", batch_size=batch_size)
    files = [images / name for name in NAMES]
    labels, probabilities = by_hand(checkpoint, files)
    assert len(set(labels)) > 1
    assert list(table.columns) == ["path", "label", "probability"]
    assert table.path.tolist() == [str(file) for file in files]
    assert table.label.tolist() == labels
    assert table.probability.tolist() == pytest.approx(probabilities, abs=1e-5)


def test_nothing_of_lightnings_is_said(
    checkpoint: Path, images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `fit` does: no devices that are not there, no advertisement."""
    monkeypatch.setattr("sys.argv", ["trunkline"])
    given = ["--checkpoint", str(checkpoint), "--images", str(images), "--output", str(tmp_path / "out.csv")]
    main(["predict", *given, "--accelerator", "cpu"])
    assert len(pd.read_csv(tmp_path / "out.csv")) == len(NAMES)
    said = [record.getMessage() for record in caplog.records]
    assert [text for text in said if "available" in text or "Tip" in text] == []


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_full_disk(
    grey_checkpoint: Path, images: Path, tmp_path: Path, ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One message; an older file stays as it was, and no empty one is left."""

    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    output = tmp_path / f"out.{ending}"
    monkeypatch.setattr("trunkline.files.fsync", full)
    for before in (None, b"older"):
        if before:
            output.write_bytes(before)
        words = (
            rf"cannot write {output} \([\d,]+\.\d MB free there\): No space .*; free some space, or choose another out"
        )
        with pytest.raises(TrunklineError, match=words):
            run(grey_checkpoint, images, output)
        assert {path.name for path in tmp_path.iterdir()} == {"images", *([output.name] if before else [])}
    assert output.read_bytes() == b"older"


def test_output_that_is_no_file(grey_checkpoint: Path, images: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.csv")
    (tmp_path / "folder.csv").mkdir()
    for name, words in (("pipe.csv", "is a device or a pipe; give a regular file"), ("folder.csv", "is a folder")):
        with pytest.raises(TrunklineError, match=f"--output .*{name} {words}"):
            run(grey_checkpoint, images, tmp_path / name)
    assert (tmp_path / "pipe.csv").is_fifo()


def test_folder_of_a_run(grey_checkpoint: Path, images: Path, tmp_path: Path, capsys: Any) -> None:
    """Its checkpoint is taken, and named outside of what the command prints."""
    table = run(grey_checkpoint, images, tmp_path / "1.csv")
    assert capsys.readouterr().err.count("reading") == 0
    pd.testing.assert_frame_equal(run(grey_checkpoint.parent, images, tmp_path / "2.csv"), table)
    assert f"reading {grey_checkpoint}\n" in capsys.readouterr().err


def test_one_image(checkpoint: Path, images: Path, tmp_path: Path) -> None:
    table = run(checkpoint, images / NAMES[1], tmp_path / "out.csv")
    (label,), (probability,) = by_hand(checkpoint, [images / NAMES[1]])
    assert table.path.tolist() == [str(images / NAMES[1])]
    assert table.label.tolist() == [label]
    assert table.probability.tolist() == pytest.approx([probability], abs=1e-5)
    with pytest.raises(TrunklineError, match=r"images=.*notes\.txt is not a folder"):
        run(checkpoint, images / "notes.txt", tmp_path / "out.csv")


@pytest.mark.parametrize("one", [False, True])
def test_a_classifier_embeds_images(checkpoint: Path, images: Path, tmp_path: Path, one: bool) -> None:
    files = [images / name for name in (NAMES[:1] if one else NAMES)]
    given, output = str(files[0] if one else images), tmp_path / "out.parquet"
    embed(str(checkpoint), images=given, output=str(output), normalise=False, device="cpu", batch_size=3)
    table = pd.read_parquet(output)
    assert table.path.tolist() == [str(file) for file in files]
    network = ViT.from_checkpoint(checkpoint).eval()
    logits = torch.from_numpy(np.stack(table.embedding.to_list())) @ network.head.weight.T + network.head.bias
    best = [CLASSES[n] for n in logits.argmax(dim=1).tolist()]
    assert best == by_hand(checkpoint, files)[0]  # what the head reads


@pytest.mark.parametrize(
    "given", [{"texts": "a.txt"}, {"texts": "a.txt", "images": "."}, {"images": ".", "pool": "cls"}]
)
def test_a_classifier_embeds_only_images(grey_checkpoint: Path, tmp_path: Path, given: dict[str, Any]) -> None:
    with pytest.raises(TrunklineError, match="sees, and embeds only images; give --images alone"):
        embed(str(grey_checkpoint), output=str(tmp_path / "out.parquet"), device="cpu", **given)


def test_worker_processes_change_nothing(checkpoint: Path, images: Path, tmp_path: Path) -> None:
    alone = run(checkpoint, images, tmp_path / "1.csv", batch_size=2)
    pd.testing.assert_frame_equal(run(checkpoint, images, tmp_path / "2.csv", batch_size=2, num_workers=1), alone)


def test_modes_of_one_picture(checkpoint: Path, tmp_path: Path) -> None:
    """The same grey picture in any mode; half of it transparent is the same as white there."""
    pixels, folder = np.random.default_rng(2).integers(0, 256, (8, 8), np.uint8), tmp_path / "modes"
    folder.mkdir()
    grey = Image.fromarray(pixels)
    for mode in ("L", "RGB", "RGBA", "LA"):
        grey.convert(mode).save(folder / f"{mode}.png")
    Image.fromarray(pixels.astype(np.uint16) * 257).save(folder / "I16.png")
    half = np.stack([pixels] * 3 + [np.full_like(pixels, 255)], axis=-1)
    half[:, 4:, 3] = 0
    Image.fromarray(half).save(folder / "transparent.png")
    white = pixels.copy()
    white[:, 4:] = 255
    Image.fromarray(white).save(folder / "white.png")
    table = run(checkpoint, folder, tmp_path / "out.csv").assign(path=lambda t: t.path.map(lambda p: Path(p).stem))
    found = table.set_index("path")
    for same in (["L", "RGB", "RGBA", "LA", "I16"], ["transparent", "white"]):
        (label,), (probability,) = by_hand(checkpoint, [folder / f"{same[-2].replace('transparent', 'white')}.png"])
        assert set(found.label[same]) == {label}
        assert found.probability[same].tolist() == pytest.approx([probability] * len(same), abs=1e-5)
    assert found.probability["L"] != pytest.approx(found.probability["white"], abs=1e-3)


# --- errors


def test_no_images(grey_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(TrunklineError, match=r"^images=.*nowhere is not a folder; give one that holds images$"):
        run(grey_checkpoint, tmp_path / "nowhere", tmp_path / "out.csv")
    with pytest.raises(TrunklineError, match=r"^images=.*a\.ckpt is not a folder; give one that holds images$"):
        run(grey_checkpoint, grey_checkpoint, tmp_path / "out.csv")
    (tmp_path / "empty" / "below").mkdir(parents=True)
    (tmp_path / "empty" / "notes.txt").write_text("no image")
    with pytest.raises(TrunklineError, match=r"^images=.*empty holds no image file \(.*\.png.*\); give one that does$"):
        run(grey_checkpoint, tmp_path / "empty", tmp_path / "out.csv")


@pytest.mark.parametrize("workers", [0, 1])
def test_corrupt_image_is_named(workers: int, grey_checkpoint: Path, images: Path, tmp_path: Path) -> None:
    whole = (images / "a/2.png").read_bytes()
    (images / "a/2.png").write_bytes(whole[: len(whole) // 2])
    message = r"^cannot read the image .*images/a/2\.png: .*; replace or remove it, or set skip_corrupt=true$"
    with pytest.raises(TrunklineError, match=message):
        run(grey_checkpoint, images, tmp_path / "out.csv", num_workers=workers)
    assert not (tmp_path / "out.csv").exists()


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_corrupt_images_are_skipped(
    grey_checkpoint: Path, images: Path, tmp_path: Path, ending: str, capsys: pytest.CaptureFixture[str]
) -> None:
    want = run(grey_checkpoint, images, tmp_path / f"all.{ending}")
    (images / "a/2.png").write_bytes(b"no image")
    found = run(grey_checkpoint, images, tmp_path / f"out.{ending}", skip_corrupt=True, batch_size=3)
    said = capsys.readouterr()
    assert f"\n1 images cannot be read; their labels are empty: {images / 'a/2.png'}\n" in f"\n{said.out}"
    assert "skip_corrupt" not in said.out + said.err
    broken = NAMES.index("a/2.png")
    assert found.path.tolist() == want.path.tolist()
    assert found.isna().to_numpy().tolist() == [[False] + [n == broken] * 2 for n in range(len(NAMES))]
    pd.testing.assert_frame_equal(found.drop(broken), want.drop(broken))


def test_nothing_but_corrupt_images(grey_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(b"no image")
    found = run(grey_checkpoint, tmp_path / "in", tmp_path / "out.csv", skip_corrupt=True)
    assert found.isna().to_numpy().tolist() == [[False, True, True]]


def damaged(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.unlink(), r"there is no checkpoint .*a\.ckpt"),
        (lambda path: path.write_bytes(b""), r"a\.ckpt is empty"),
        (damaged, r"a\.ckpt is damaged"),
    ],
)
def test_bad_checkpoint(grey_checkpoint: Path, images: Path, tmp_path: Path, make: Any, message: str) -> None:
    (tmp_path / "a.ckpt").write_bytes(grey_checkpoint.read_bytes())
    make(tmp_path / "a.ckpt")
    with pytest.raises(TrunklineError, match=message):
        run(tmp_path / "a.ckpt", images, tmp_path / "out.csv")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"state_dict": {}}, "no checkpoint of ImageClassifier, but of something else"),
        ({"objective": "CausalLM", "ImageData": {}}, "no checkpoint of ImageClassifier, but of CausalLM"),
        (torch.zeros(3), "not a checkpoint of a training run: it holds a Tensor"),
        (Path("x"), "not a checkpoint of plain data: Unsupported global.*could run code"),
        (b"any text\n", "not a checkpoint of plain data: "),
        (b"}u\n", "not a checkpoint of plain data: "),  # of which torch raises an IndexError
    ],
)
def test_checkpoint_of_another_program(images: Path, tmp_path: Path, content: Any, message: str) -> None:
    file = tmp_path / "a.ckpt"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content, file)
    with pytest.raises(TrunklineError, match=rf"a\.ckpt is {message}"):
        run(file, images, tmp_path / "out.csv")


@pytest.mark.parametrize("output", ["out.txt", "out", "nowhere/out.csv"])
def test_bad_output_is_found_before_any_work(tmp_path: Path, output: str) -> None:
    message = r"must be a \.csv, \.parquet or \.conll file in a folder that exists"
    with pytest.raises(TrunklineError, match=rf"^--output .*{output} {message}$"):  # not: there is no checkpoint
        predict(str(tmp_path / "no.ckpt"), str(tmp_path / "no images"), str(tmp_path / output))
    assert not any(tmp_path.iterdir())
