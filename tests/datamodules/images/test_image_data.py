"""ImageData: splits, pixels, augmentation as a pure function of (seed, epoch, index), and skipped images."""

import io
import os
import random
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.plugins.environments import LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy
from PIL import Image
from pretended_trainer import pretended_trainer
from torch import Tensor

from trunkline import TrunklineError
from trunkline.datamodules import Augmentation, ImageData
from trunkline.datamodules.images.image_data import ImageFiles, carve_splits
from trunkline.datamodules.images.image_sources import ArrayRows
from trunkline.datamodules.samplers import SampleKey

UNSPLIT = {"val_fraction": 0, "test_fraction": 0}
WHOLE = Augmentation(crop_scale=(1.0, 1.0))
EVERYTHING = Augmentation(
    crop_scale=(0.3, 1.0), hflip=0.5, rotate=20, translate=0.1, zoom=0.2, rand_augment="rand-m9-n2-inc1", erasing=0.5
)


def make(**options: Any) -> ImageData:
    """A datamodule after its setup."""
    data = ImageData(**{"image_size": 8, "channels": 1, "batch_size": 4, "num_workers": 0, **options})
    data.setup("fit")
    return data


def images(loader: Any) -> dict[int, Tensor]:
    """Index -> picture, of one epoch."""
    return {int(i): image for batch in loader for i, image in zip(batch["index"], batch["image"], strict=True)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """12 colour pictures of 12 x 10 pixels in classes a and b; the red of number n is 10 n."""
    generator = np.random.default_rng(0)
    for n in range(12):
        pixels = generator.integers(0, 256, (10, 12, 3), np.uint8)
        pixels[..., 0] = 10 * n
        (tmp_path / "in" / "ab"[n % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "in" / "ab"[n % 2] / f"{n:02}.png")
    return tmp_path / "in"


def one_picture(root: Path, pixels: np.ndarray) -> str:
    (root / "one" / "a").mkdir(parents=True)
    Image.fromarray(pixels).save(root / "one" / "a" / "1.png")
    return str(root / "one")


# --- splits


def split_rows(data: ImageData, split: str) -> np.ndarray:
    return data.datasets[split].rows.indices  # type: ignore[attr-defined]


def test_digits_are_split_by_class_without_overlap() -> None:
    data = make()
    parts = {split: split_rows(data, split) for split in ("train", "val", "test")}
    assert {split: len(rows) for split, rows in parts.items()} == {"train": 1257, "val": 180, "test": 360}
    assert sorted(np.concatenate(list(parts.values()))) == list(range(1797))
    counts = {split: np.bincount(data.datasets[split].rows.labels, minlength=10) for split in parts}  # type: ignore[attr-defined]
    for split, share in (("test", 360 / 1797), ("val", 180 / 1797), ("train", 1257 / 1797)):
        np.testing.assert_allclose(counts[split], sum(counts.values()) * share, atol=1.5)
    assert data.class_names == list("0123456789")


def test_split_depends_on_its_seed_alone() -> None:
    first = make()
    for options in ({"val_fraction": 0.3}, {"val_fraction": 0.0}, {"seed": 9, "batch_size": 8}):
        np.testing.assert_array_equal(split_rows(make(**options), "test"), split_rows(first, "test"))
    assert "val" not in make(val_fraction=0).datasets
    assert set(split_rows(make(split_seed=1), "test")) != set(split_rows(first, "test"))


def test_splits_of_the_source_are_kept_and_only_missing_ones_carved() -> None:
    rows = ArrayRows(np.zeros((20, 2, 2), np.uint8), np.arange(20) // 10, "zeros")
    own = ArrayRows(np.zeros((3, 2, 2), np.uint8), np.zeros(3), "own")
    splits = carve_splits({"train": rows, "test": own}, {"test": 0.2, "val": 0.3}, seed=0)
    assert splits["test"] is own
    assert sorted(splits["val"].labels) == [0] * 3 + [1] * 3
    assert sorted(splits["train"].labels) == [0] * 7 + [1] * 7
    names = {splits[split].name(n) for split, size in (("train", 14), ("val", 6)) for n in range(size)}
    assert names == {f"zeros, row {n}" for n in range(20)}


def test_a_class_too_small_to_split_is_an_error() -> None:
    rows = ArrayRows(np.zeros((10, 2, 2), np.uint8), np.array([0] * 9 + [1]), "zeros")
    with pytest.raises(TrunklineError, match=r"20% .* for val: .*val_split, or set val_fraction=0$"):
        carve_splits({"train": rows}, {"val": 0.2}, seed=0)


# --- batches and pixels


def test_digits_are_scaled_to_the_network_s_range() -> None:
    from sklearn.datasets import load_digits

    data = make(mean=(0.5,), std=(0.5,))
    source = load_digits()
    for n, row in enumerate(split_rows(data, "test")[:20]):
        item = data.datasets["test"][SampleKey(0, n)]
        np.testing.assert_allclose(item["image"][0], np.round(source.images[row] * 255 / 16) / 127.5 - 1, atol=1e-6)
        assert (item["label"], item["index"]) == (source.target[row], n)
    everything = torch.stack(list(images(data.test_dataloader()).values()))
    assert (everything.min(), everything.max()) == (-1, 1)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_batches_are_as_documented(split: str, channels: int) -> None:
    data = make(channels=channels, image_size=(8, 12), eval_batch_size=7)
    batch = next(iter(getattr(data, f"{split}_dataloader")()))
    size = 4 if split == "train" else 7
    assert {name: (value.dtype, tuple(value.shape)) for name, value in batch.items()} == {
        "image": (torch.float32, (size, channels, 8, 12)),
        "label": (torch.int64, (size,)),
        "index": (torch.int64, (size,)),
        "valid": (torch.bool, (size,)),
        "skipped": (torch.int64, (size,)),
    }
    assert batch["valid"].all()
    assert batch["skipped"].sum() == 0


def test_ranks_share_an_epoch_and_fillers_are_not_valid() -> None:
    data = make(eval_batch_size=50, val_fraction=0.1005)
    counted = []
    for rank in range(2):
        data.trainer = pretended_trainer(rank, 2)
        batches = list(data.loader("val"))
        assert [len(b["index"]) for b in batches] == [25, 25, 25, 16]
        counted += [int(i) for b in batches for i in b["index"][b["valid"]]]
    assert sorted(counted) == list(range(181))


def test_normalisation_is_by_channel(tmp_path: Path) -> None:
    source = one_picture(tmp_path, np.full((8, 8, 3), (255, 51, 0), np.uint8))
    data = make(source=source, channels=3, mean=(0.5, 0.2, 0.1), std=(0.5, 1.0, 0.2), **UNSPLIT)
    pixel = data.datasets["train"][SampleKey(0, 0)]["image"][:, 4, 4]
    np.testing.assert_allclose(pixel, [1.0, 0.0, -0.5], atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "size", "crop_pct", "inside"),
    [
        ((8, 16), 8, 1.0, (slice(None), slice(4, 12))),
        ((16, 8), 8, 1.0, (slice(4, 12), slice(None))),
        ((16, 16), 8, 0.5, (slice(4, 12), slice(4, 12))),
        ((8, 16), (8, 4), 1.0, (slice(None), slice(6, 10))),
    ],
)
def test_evaluation_takes_the_centre(
    shape: tuple[int, int], size: Any, crop_pct: float, inside: tuple[slice, slice], tmp_path: Path
) -> None:
    pixels = np.zeros(shape, np.uint8)
    pixels[inside] = np.arange(100, 100 + pixels[inside].size).reshape(pixels[inside].shape)
    files = [Path(one_picture(tmp_path, pixels)) / "a" / "1.png"]
    data = ImageData(image_size=size, channels=1, mean=(0.0,), std=(1.0,), interpolation="nearest", crop_pct=crop_pct)
    item = ImageFiles(files, data.preprocessing)[SampleKey(0, 0)]
    np.testing.assert_allclose(item["image"][0] * 255, pixels[inside], atol=1e-3)
    assert (item["index"], item["valid"]) == (0, True)


# --- augmentation


@pytest.mark.parametrize("channels", [1, 3])
def test_an_item_is_a_pure_function_of_seed_epoch_and_index(channels: int, folder: Path) -> None:
    options = {"source": str(folder), "augmentation": EVERYTHING, "channels": channels, **UNSPLIT}
    first = make(**options).datasets["train"]
    expected = {i: first[SampleKey(3, i)]["image"] for i in range(12)}
    again = make(**options).datasets["train"]
    for i in reversed(range(12)):
        torch.manual_seed(i), random.seed(i), np.random.seed(i)
        states = random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()
        assert torch.equal(again[SampleKey(3, i)]["image"], expected[i])
        assert states == (random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist())
    for seed, epoch in ((0, 4), (1, 3)):
        other = make(**options, seed=seed).datasets["train"][SampleKey(epoch, 5)]["image"]
        assert not torch.equal(other, expected[5])
    assert all(image.isfinite().all() and image.shape == (channels, 8, 8) for image in expected.values())


def test_any_number_of_workers_makes_the_same_images_new_ones_each_epoch(folder: Path) -> None:
    epochs: dict[int, list[dict[int, Tensor]]] = {}
    for workers in (0, 1, 2):
        data = make(source=str(folder), augmentation=EVERYTHING, num_workers=workers, **UNSPLIT)
        loader = data.train_dataloader()
        for epoch in (0, 1):
            loader.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]
            epochs.setdefault(epoch, []).append(images(loader))
    for runs in epochs.values():
        assert [sorted(run) for run in runs] == [list(range(12))] * 3
        assert all(torch.equal(run[i], runs[0][i]) for run in runs for i in range(12))
    assert all(not torch.equal(epochs[0][0][i], epochs[1][0][i]) for i in range(12))


def test_augmentation_that_is_off_changes_nothing() -> None:
    data = make(augmentation=WHOLE)
    train = data.datasets["train"]
    evaluation = data.preprocessing.evaluation()
    for i in range(20):
        plain = evaluation(train.rows.image(i))  # type: ignore[attr-defined]
        assert all(torch.equal(train[SampleKey(epoch, i)]["image"], plain) for epoch in range(3))
    assert ImageData().image_options("train", 0)[1] == Augmentation()


def test_a_crop_scale_of_one_takes_in_the_whole_picture(tmp_path: Path) -> None:
    pixels = np.repeat(np.arange(8, dtype=np.uint8)[None] * 30, 8, axis=0).repeat(4, axis=1)  # 8 x 32
    data = make(source=one_picture(tmp_path, pixels), augmentation=WHOLE, interpolation="nearest", **UNSPLIT)
    row = data.datasets["train"][SampleKey(0, 0)]["image"][0, 3]
    np.testing.assert_allclose(row, np.arange(8) * 30 / 127.5 - 1, atol=1e-6)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "change",
    [
        {"crop_scale": (0.2, 0.4)},
        {"hflip": 1.0},
        {"rotate": 45.0},
        {"translate": 0.4},
        {"zoom": 0.5},
        {"colour": 0.5},
        {"rand_augment": "rand-m9-n2-inc1"},
        {"erasing": 1.0},
    ],
    ids=lambda change: next(iter(change)),
)
def test_each_augmentation_changes_pixels(change: dict[str, Any], channels: int) -> None:
    options = {"image_size": 16, "channels": channels}
    plain = make(augmentation=WHOLE, **options).datasets["train"]
    changed = make(augmentation=Augmentation(**{"crop_scale": (1.0, 1.0), **change}), **options).datasets["train"]
    pairs = [(plain[SampleKey(0, i)]["image"], changed[SampleKey(0, i)]["image"]) for i in range(30)]
    assert sum(not torch.equal(a, b) for a, b in pairs) >= 15
    assert all(b.isfinite().all() and b.shape == a.shape for a, b in pairs)
    if "hflip" in change:
        assert all(torch.equal(a.flip(-1), b) for a, b in pairs)
    else:  # not the same way each time
        assert len({tuple((b - a).flatten().tolist()) for a, b in pairs}) > 15


def test_fill_is_what_moves_into_the_picture(tmp_path: Path) -> None:
    white = one_picture(tmp_path, np.full((16, 16, 3), 255, np.uint8))
    for fill in (0.0, 0.5, 1.0):
        moved = Augmentation(crop_scale=(1.0, 1.0), rotate=40, translate=0.3, zoom=0.3, fill=fill)
        data = make(source=white, image_size=16, channels=3, augmentation=moved, **UNSPLIT)
        lowest = min(data.datasets["train"][SampleKey(epoch, 0)]["image"].min().item() for epoch in range(5))
        assert lowest == pytest.approx(2 * round(255 * fill) / 255 - 1, abs=1e-6)


# --- images that cannot be read


def spoil(folder: Path, *names: str) -> None:
    for name in names:
        file = folder / name
        file.write_bytes(file.read_bytes()[:50])


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_stops_training_with_its_name(workers: int, folder: Path) -> None:
    spoil(folder, "b/07.png")
    data = make(source=str(folder), num_workers=workers, **UNSPLIT)
    loader = data.train_dataloader()
    with pytest.raises(TrunklineError) as caught:
        list(loader)
    assert str(caught.value).startswith(f"cannot read the image {folder}/b/07.png: ")
    assert str(caught.value).endswith("or set skip_corrupt=true")
    assert caught.value.field == "data.skip_corrupt"
    if workers:  # else torch waits 5 s for them, once the garbage collector finds them through the traceback
        loader._iterator._shutdown_workers()  # type: ignore[union-attr]


def test_skip_corrupt_lets_the_next_row_stand_in(folder: Path) -> None:
    spoil(folder, "a/02.png", "b/09.png", "b/11.png")  # rows 1, 10 and 11: sorted by class, 11 goes round to 0
    options = {"source": str(folder), "skip_corrupt": True, "mean": (0.0,), "std": (1.0,), **UNSPLIT}
    data = make(**options, channels=3, augmentation=WHOLE, image_size=(10, 12))
    with pytest.warns(UserWarning, match=r"skipped: cannot read the image .*/a/02\.png"):
        batches = list(data.train_dataloader())
    assert [len(batch["index"]) for batch in batches] == [4, 4, 4]
    rows = {int(b["index"][i]): {k: v[i] for k, v in b.items()} for b in batches for i in range(4)}
    assert {i for i, row in rows.items() if row["skipped"] == 1} == {1, 10, 11}
    assert all(row["valid"] for row in rows.values())  # a stand-in is fine to learn from
    reds = {i: round(float(row["image"][0, 0, 0]) * 25.5) for i, row in rows.items()}
    assert (reds[1], reds[10], reds[11], reds[2]) == (4, 0, 0, 4)
    assert [int(rows[i]["label"]) for i in (1, 9, 10, 11)] == [0, 1, 0, 0]  # the stand-in's own labels


def test_skip_corrupt_leaves_evaluation_uncounted(folder: Path) -> None:
    data = make(source=str(folder), skip_corrupt=True, val_fraction=0.25, test_fraction=0)
    spoil(folder, data.datasets["val"].rows.name(1))  # type: ignore[attr-defined]
    with pytest.warns(UserWarning, match="skipped"):
        (batch,) = list(data.val_dataloader())
    assert batch["valid"].tolist() == [True, False, True]
    assert batch["skipped"].tolist() == [0, 1, 0]
    assert batch["index"].tolist() == [0, 1, 2]


@pytest.mark.filterwarnings("ignore:skipped")
def test_skip_corrupt_gives_up_when_all_images_are_broken(folder: Path) -> None:
    data = make(source=str(folder), skip_corrupt=True, **UNSPLIT)
    spoil(folder, *(str(f.relative_to(folder)) for f in folder.rglob("*.png")))
    with pytest.raises(TrunklineError, match="cannot read the image"):
        data.datasets["train"][SampleKey(0, 5)]


# --- settings


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": 2}, "channels must be 1 (grey) or 3 (RGB), not 2"),
        ({"channels": 1, "mean": (0.1, 0.2, 0.3)}, "mean has 3 values for 1 channel(s)"),
        ({"channels": 3, "std": (0.1, 0.2)}, "std has 2 values for 3 channel(s)"),
    ],
)
def test_wrong_settings_name_their_flag(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TrunklineError, match=f"^{re.escape(message)}"):
        ImageData(**options)


@pytest.mark.parametrize(
    ("source", "given", "cores", "devices", "workers"),
    [
        ("digits", None, 16, 1, 0),  # in memory
        ("digits", 3, 16, 1, 3),
        ("folder", 0, 16, 1, 0),
        ("folder", None, 1, 1, 1),
        ("folder", None, 4, 1, 3),
        ("folder", None, 16, 1, 8),
        ("folder", None, 16, 4, 3),
        ("folder", None, 2, 4, 1),
    ],
)
def test_worker_count_suits_data_and_machine(
    source: str, given: int | None, cores: int, devices: int, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)), raising=False)
    data = ImageData(source=source, num_workers=given)
    strategy = DDPStrategy(cluster_environment=LightningEnvironment())
    data.trainer = SimpleNamespace(num_devices=devices, strategy=strategy)  # type: ignore[assignment]
    assert data.worker_count() == workers


@pytest.mark.parametrize(
    ("environment", "affinity", "machine", "asked", "workers"),
    [
        (SLURMEnvironment, 12, 96, None, 8),  # SLURM has bound the task to its own 12
        (SLURMEnvironment, 5, 96, "12", 4),
        (SLURMEnvironment, 96, 96, "6", 5),  # it binds no task, but says how many are its own
        (SLURMEnvironment, 96, 96, None, 8),  # 12 for each of 8
        (SLURMEnvironment, 32, 32, None, 3),
        (SLURMEnvironment, 40, 96, None, 4),  # it binds only the job as a whole, to 40
        (TorchElasticEnvironment, 12, 96, None, 1),  # torchrun's processes share what torchrun has
        (TorchElasticEnvironment, 32, 96, "32", 3),  # also inside a task of SLURM
        (LightningEnvironment, 32, 96, "32", 3),
    ],
)
def test_worker_count_of_eight_processes_on_a_cluster(
    environment: type[Any],
    affinity: int,
    machine: int,
    asked: str | None,
    workers: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(affinity)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: machine)
    monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", str(min(machine, 40)))  # of the job
    if asked:
        monkeypatch.setenv("SLURM_CPUS_PER_TASK", asked)
    data = ImageData(source="folder")
    strategy = DDPStrategy(cluster_environment=environment())
    data.trainer = SimpleNamespace(num_devices=8, strategy=strategy)  # type: ignore[assignment]
    assert data.worker_count() == workers


def test_a_checkpoint_tells_predict_how_pictures_are_prepared() -> None:
    state = make(channels=3, mean=(0.1,)).state_dict()
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    assert torch.load(buffer, weights_only=True) == state
    assert state["preprocessing"]["mean"] == (0.1, 0.1, 0.1)
    assert state["class_names"] == list("0123456789")
