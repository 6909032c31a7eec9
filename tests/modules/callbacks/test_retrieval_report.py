"""What TensorBoard shows of a CLIP, read back from its event files."""

import csv
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from tensorboard_run import logged_picture
from test_callbacks import events
from tiny_clip import COLOURS, PREPROCESSING, encoder, module, pixels
from tiny_clip import picture as drawn
from torch import Tensor
from torch.utils.data import DataLoader

from trunkline.contract import DataFacts
from trunkline.modules.callbacks import RetrievalReport
from trunkline.modules.callbacks.drawing import GREEN, GREY, LINE, RED, captioned, wrapped, written
from trunkline.modules.callbacks.retrieval import draw_similarity

ROWS = [(colour, n) for n in range(6) for colour in COLOURS]
"""Of equal colour is of equal caption."""
POOL, TILE = 20, (80 + 6 + 3 * LINE, 80 + 6)


class Data(L.LightningDataModule):
    """Batches of 7 pairs."""

    facts = DataFacts(mean=PREPROCESSING.mean, std=PREPROCESSING.std)

    def loader(self) -> DataLoader[Any]:
        tokens, mask, _ = encoder().encode([f"a {colour}" for colour, _ in ROWS])
        items = [
            {"image": pixels(drawn(*row)), "tokens": tokens[n], "mask": mask[n], "index": n, "valid": n != 2}
            | {"caption_key": [*COLOURS].index(row[0])}
            for n, row in enumerate(ROWS)
        ]
        return DataLoader(items, 7)  # type: ignore[arg-type]

    train_dataloader = val_dataloader = loader


def caption(split: str, row: int) -> str:
    assert split == "val"
    return f"a {ROWS[row][0]}\nthing"


class Captioned(Data):
    facts = replace(Data.facts, caption=caption)


class Witness(Callback):
    """Sees what validations return."""

    def __init__(self) -> None:
        self.validations: list[list[dict[str, Tensor]]] = []

    def on_validation_epoch_start(self, *_: Any) -> None:
        self.validations.append([])

    def on_validation_batch_end(self, trainer: Any, pl_module: Any, outputs: dict[str, Tensor], *_: Any) -> None:
        self.validations[-1].append(outputs)


def run(folder: Path, data: Data, report: RetrievalReport) -> Witness:
    witness = Witness()
    logger = TensorBoardLogger(folder, name="", version="", default_hp_metric=False)
    quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = L.Trainer(accelerator="cpu", devices=1, max_epochs=2, logger=logger, callbacks=[report, witness], **quiet)
    trainer.fit(module(), datamodule=data)
    return witness


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    folder, report = tmp_path_factory.mktemp("run"), RetrievalReport(pairs=5, queries=3, pool=POOL)
    witness = run(folder, Captioned(), report)
    last = {name: torch.cat([o[name] for o in witness.validations[-1]])[:POOL] for name in witness.validations[-1][0]}
    return SimpleNamespace(folder=folder, report=report, found=events(folder), last=last)


def test_after_each_validation_but_the_sanity_check(fitted: SimpleNamespace) -> None:
    assert set(fitted.found.Tags()["images"]) == {"val/similarity", "val/retrieval"}
    for tag in fitted.found.Tags()["images"]:
        assert [event.step for event in fitted.found.Images(tag)] == [4, 8]
    assert len(fitted.report.pictures) == POOL
    assert {image.size for image in fitted.report.pictures} == {(80, 80)}


def test_retrieval_grid(fitted: SimpleNamespace) -> None:
    last, (height, width) = fitted.last, TILE
    assert last["index"].tolist() == [0, 1, *range(3, 21)]  # the one that is not valid is left out
    shown = logged_picture(fitted.found, "val/retrieval")
    assert shown.shape == (3 * height, 6 * width, 3)
    images, texts = last["image_embedding"].double(), last["text_embedding"].double()
    colours = [ROWS[n][0] for n in last["index"]]
    right = []
    for query in range(3):
        top = query * height
        assert tuple(shown[top, 0]) == GREY
        cosines = images @ texts[query]
        order = sorted(range(POOL), key=lambda n: -float(cosines[n]))[:5]
        rank = 1 + sum(  # of the best right one
            float(cosines[n]) >= max(float(cosines[m]) for m in range(POOL) if colours[m] == colours[query])
            for n in range(POOL)
            if colours[n] != colours[query]
        )
        tile = captioned(written(f"a {colours[query]}\nthing", (80, 80)), wrapped(f"rank {rank} of 20", 80, 3), GREY)
        np.testing.assert_array_equal(shown[top : top + height, :width], np.asarray(tile))
        for column, n in enumerate(order, start=1):
            left = column * width
            right.append(colours[n] == colours[query])
            assert tuple(shown[top, left]) == (GREEN if right[-1] else RED)
            image = (last["image"][n].permute(1, 2, 0).numpy() * 0.5 + 0.5) * 255
            np.testing.assert_allclose(shown[top + 8 : top + 83 : 10, left + 8 : left + 83 : 10], image, atol=0.51)
    assert {*right} == {True, False}


def test_projector(fitted: SimpleNamespace) -> None:
    (folder,) = {file.parent for file in fitted.folder.rglob("tensors.tsv")}
    rows = np.array(list(csv.reader((folder / "tensors.tsv").open(), delimiter="\t")), dtype=float)
    np.testing.assert_allclose(rows, fitted.last["image_embedding"], rtol=1e-3, atol=1e-5)
    captions = [f"a {ROWS[n][0]} thing" for n in fitted.last["index"]]
    assert (folder / "metadata.tsv").read_text().splitlines() == captions
    sprite = np.asarray(Image.open(folder / "sprite.png").convert("RGB"))
    assert sprite.shape == (5 * 32, 5 * 32, 3)  # a square that holds 20
    image = (fitted.last["image"][6].permute(1, 2, 0).numpy() * 0.5 + 0.5) * 255  # second row, second place
    np.testing.assert_allclose(sprite[32:64, 32:64].mean(axis=(0, 1)), image.mean(axis=(0, 1)), atol=1.5)


def test_data_without_captions_and_few_pairs(tmp_path: Path) -> None:
    report = RetrievalReport(pool=3)
    run(tmp_path, Data(), report)
    assert len(report.pictures) == 3
    assert logged_picture(events(tmp_path), "val/retrieval").shape == (3 * TILE[0], 4 * TILE[1], 3)
    (file,) = tmp_path.rglob("metadata.tsv")
    assert file.read_text().split() == ["0", "1", "3"]


def test_similarity_drawing() -> None:
    cosines = torch.tensor([[0.9, -0.2], [0.1, 0.3]])
    axes, _bar = draw_similarity(cosines, ["short", "one that is far too long to show"]).axes
    np.testing.assert_array_equal(axes.images[0].get_array(), cosines)
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("picture of", "text")
    labels = ["short", "one that is far too…"]
    assert [t.get_text() for t in axes.get_yticklabels()] == [t.get_text() for t in axes.get_xticklabels()] == labels


def test_wrapped_text() -> None:
    assert wrapped("a red fruit on a table", 60, 3) == "a red\nfruit on a\ntable"
    assert wrapped("short", 60, 3) == "short\n\n"
    assert wrapped("a red fruit on a table", 60, 2) == "a red\nfruit on…"
    tile = captioned(Image.new("RGB", (20, 10)), "a\nb", GREEN)
    assert tile.size == (26, 16 + 2 * LINE)
    ink = np.asarray(tile)[16:].min(axis=(1, 2))
    assert (ink[:LINE] < 255).any()
    assert (ink[LINE:] < 255).any()
