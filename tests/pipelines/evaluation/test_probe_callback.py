"""Probes during training: same results as `trunkline evaluate`, measured when due, with no effect on training."""

import inspect
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.strategies import FSDPStrategy
from tiny import classifier, trainer
from tiny_clip import COLOURS, PREPROCESSING, WORDS, encoder, folders, module, picture, pixels, save, tokenizer
from torch import Tensor
from torch.utils.data import DataLoader

from trunkline import TrunklineError
from trunkline.contract import DataFacts
from trunkline.datamodules import ImageData
from trunkline.datamodules.images.preprocessing import ImageInput, Preprocessing
from trunkline.modules.metrics.probes import Labelled, knn_accuracy, linear_probe_accuracy
from trunkline.modules.networks import CLIP
from trunkline.pipelines.evaluation.evaluate import evaluate
from trunkline.pipelines.evaluation.probe_callback import ImageProbes, fifth, spread

NAMES = WORDS[-10:]
DIGITS: dict[str, Any] = {"class_names": NAMES, "templates": ["a {}", "{} thing"], "k": 5}
OWN = inspect.signature(ImageProbes).parameters


def probes(source: str = "digits", **options: Any) -> ImageProbes:
    """The callback. Options may be fields of its data."""
    fields = {name: value for name, value in options.items() if name not in OWN}
    return ImageProbes(ImageData(source, **fields), **{k: v for k, v in options.items() if k in OWN})


class Pairs(ImageInput, L.LightningDataModule):
    """Eight pairs in batches of four, shuffled by the global generator."""

    preprocessing = PREPROCESSING
    facts = DataFacts(tokenizer=tokenizer(), max_length=6)

    def __init__(self) -> None:
        L.LightningDataModule.__init__(self)

    def loader(self, shuffle: bool) -> DataLoader[Any]:
        rows = [(colour, n) for n in range(2) for colour in COLOURS]
        tokens, mask, _ = encoder().encode([f"a {colour}" for colour, _ in rows])
        items = [
            {"image": pixels(picture(*row)), "tokens": tokens[n], "mask": mask[n], "index": n, "valid": True}
            | {"caption_key": [*COLOURS].index(row[0])}
            for n, row in enumerate(rows)
        ]
        return DataLoader(items, 4, shuffle=shuffle)  # type: ignore[arg-type]

    def train_dataloader(self) -> DataLoader[Any]:
        return self.loader(True)

    def val_dataloader(self) -> DataLoader[Any]:
        return self.loader(False)


class Grey(Pairs):
    """Grey images with labels, for a classifier of digits."""

    preprocessing = Preprocessing(8, 1, (0.5,), (0.5,), "bicubic", 1.0)
    facts = DataFacts()

    def loader(self, shuffle: bool) -> DataLoader[Any]:
        items = [{"image": torch.full((1, 8, 8), n / 4), "label": n, "valid": True} for n in range(8)]
        return DataLoader(items, 4, shuffle=shuffle)  # type: ignore[arg-type]


class Witness(DummyLogger, Callback):
    """Records the results of each validation, and the weights that are trained (not their average)."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[dict[str, float]] = []
        self.learning: Tensor | None = None

    def log_metrics(self, metrics: Any, *_: Any, **__: Any) -> None:
        if "val/loss" in metrics:
            wanted = ("zero_shot", "knn", "linear_probe")
            names = {name.removeprefix("val/"): value for name, value in metrics.items()}
            self.seen.append({name: value for name, value in names.items() if name.startswith(wanted)})

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.learning = (
            pl_module.network.state_dict()["image.head.weight"].clone() if pl_module.unit == "pairs" else None
        )


class Spy(ImageProbes):
    """Records the weights that it measures."""

    def measure(self, module: Any) -> dict[str, float]:
        assert not any(part.training for part in module.modules())
        self.used = {name: weight.clone() for name, weight in module.network.state_dict().items()}
        return super().measure(module)


def run(folder: Path, *callbacks: Callback, data: Any = Pairs, model: Any = None, epochs: int = 1) -> SimpleNamespace:
    model, witness = model or module(), Witness()
    torch.manual_seed(3)
    fitted = trainer(folder, max_epochs=epochs, callbacks=[*callbacks, witness], logger=witness)
    fitted.fit(model, datamodule=data())
    return SimpleNamespace(model=model, witness=witness, trainer=fitted)


def features(network: CLIP, rows: Any, chosen: np.ndarray) -> Labelled:
    """Features of the chosen digits, computed in one batch."""
    with torch.no_grad():
        images = torch.stack([pixels(rows.image(n).convert("RGB")) for n in chosen])
        found = network.image.forward_features(images).patches.mean(dim=1)
    return Labelled(found.numpy(), rows.labels[chosen])


class TestFigures:
    def test_are_those_of_the_command(self, tmp_path: Path) -> None:
        """Zero-shot and neighbours, with all rows; the command cannot measure the linear probe on validation rows."""
        callback = probes(**DIGITS, max_train=2000, test_fraction=0.5, batch_size=256)
        fitted = run(tmp_path, callback)
        checkpoint, output = save(tmp_path, fitted.model.network), tmp_path / "out.json"
        found: dict[str, float] = {}
        for what in ("zero_shot", "knn"):
            own = ("class_names", "templates") if what == "zero_shot" else ("k",)
            given: Any = {name: DIGITS[name] for name in own} | {"what": what, "split": "val"}
            data = ImageData("digits", test_fraction=0.5, batch_size=256)
            evaluate(checkpoint, data, **given, device="cpu", output=str(output))
            found |= {f"{what}_{k}": v["value"] for k, v in json.loads(output.read_text())[what].items()}
        (logged,) = fitted.witness.seen[-1:]
        assert logged["zero_shot_acc"] == pytest.approx(found["zero_shot_top1"])
        assert logged["zero_shot_acc_top5"] == pytest.approx(found["zero_shot_top5"])
        assert logged["knn_acc"] == pytest.approx(found["knn_accuracy"])
        assert 0 < logged["zero_shot_acc"] < logged["zero_shot_acc_top5"] < 1
        assert 0.3 < logged["knn_acc"] < 1

    def test_of_few_rows(self, tmp_path: Path) -> None:
        fitted = run(tmp_path, probes(**DIGITS, what=["knn", "linear_probe"], max_train=200, max_val=90))
        data = ImageData("digits", image_size=8)
        data.setup("fit")
        rows: Any = {split: dataset.rows for split, dataset in data.datasets.items()}  # type: ignore[attr-defined]
        train, val = (
            features(fitted.model.network.eval(), rows[split], spread(rows[split].labels, limit))
            for split, limit in (("train", 200), ("val", 90))
        )
        (logged,) = fitted.witness.seen[-1:]
        assert logged.keys() == {"knn_acc", "linear_probe_acc"}
        assert logged["knn_acc"] == pytest.approx(knn_accuracy(train, val, 5), abs=1.1 / 90)  # near ties
        held = np.zeros(200, bool)
        for label in range(10):  # every fifth row, with the rows sorted by class
            before = int((train.labels < label).sum())
            for n, row in enumerate(np.flatnonzero(train.labels == label)):
                held[row] = (before + n) % 5 == 4
        parts = (Labelled(train.features[rows], train.labels[rows]) for rows in (~held, held))
        assert logged["linear_probe_acc"] == pytest.approx(linear_probe_accuracy(*parts, val)[0], abs=2.1 / 90)

    def test_of_averaged_weights(self, tmp_path: Path) -> None:
        """The order of the callbacks does not matter."""
        for order in (1, -1):
            spy = Spy(ImageData("digits"), **DIGITS, what=["zero_shot"], max_train=20, max_val=20)
            fitted = run(tmp_path, *[EMAWeightAveraging(decay=0.9), spy][::order])
            used, average = (
                spy.used["image.head.weight"],
                fitted.model.network.image.head.weight,
            )  # at the end of training
            assert torch.equal(used, average)
            assert not torch.equal(used, fitted.witness.learning)

    def test_of_a_classifier(self, tmp_path: Path) -> None:
        options = {"source": "digits", "max_train": 200, "max_val": 90}
        fitted = run(tmp_path, probes(**options), data=Grey, model=classifier())
        assert fitted.witness.seen[-1].keys() == {"knn_acc", "linear_probe_acc"}
        assert fitted.witness.seen[-1]["linear_probe_acc"] > 0.3


def test_rows_of_the_last_test_are_left_out(tmp_path: Path) -> None:
    """If the training data is ImageData too, its split is used, except for settings that are given."""
    shares = {"val_fraction": 0.2, "test_fraction": 0.4, "split_seed": 3}
    learnt = ImageData("digits", image_size=8, channels=1, **shares)
    learnt.setup("fit")
    machine: Any = SimpleNamespace(strategy=None, precision="32-true", datamodule=learnt, is_global_zero=True)
    for options, expected in ({}, shares), ({"split_seed": 4}, {**shares, "split_seed": 4}):
        callback = probes(**options, max_train=2000)
        callback.setup(machine, classifier(), "fit")
        data = ImageData("digits", image_size=8, channels=1, **expected)
        data.setup("fit")
        assert callback.data is not None
        for split in ("train", "val"):
            taken, rows = (d.datasets[split].rows for d in (callback.data, data))  # type: ignore[attr-defined]
            assert np.array_equal(taken.rows.indices, rows.indices)
            assert len(taken.labels) == len(rows.labels)


def test_every_nth_validation_and_nothing_in_the_sanity_check(tmp_path: Path) -> None:
    callback = probes(**DIGITS, what=["knn"], every=2, max_train=20, max_val=20)
    fitted = run(tmp_path, callback, epochs=5)
    assert [bool(seen) for seen in fitted.witness.seen] == [False, True, False, True, False]
    assert callback.state_dict() == {"validations": 5}
    resumed = probes(**DIGITS, what=["knn"], every=2, max_train=20, max_val=20)
    resumed.load_state_dict(callback.state_dict())
    assert [bool(seen) for seen in run(tmp_path, resumed, epochs=2).witness.seen] == [True, False]
    witness = Witness()
    alone = probes(**DIGITS, what=["knn"], every=2, max_train=20, max_val=20)
    trainer(tmp_path, callbacks=[alone], logger=witness).validate(fitted.model, datamodule=Pairs(), verbose=False)
    assert witness.seen[0].keys() == {"knn_acc"}


def test_training_is_the_same_without(tmp_path: Path) -> None:
    """Weights are equal to the last bit, although the loader shuffles with the global generator after validations."""
    plain = run(tmp_path, epochs=3).model.network.state_dict()
    probed = run(tmp_path, probes(**DIGITS, max_train=50, max_val=20), epochs=3).model.network.state_dict()
    start = module().network.state_dict()
    assert all(torch.equal(probed[name], weight) for name, weight in plain.items())
    assert not all(torch.equal(start[name], weight) for name, weight in plain.items())


def test_rows_are_spread_over_the_classes() -> None:
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 2], [500, 100, 10]))
    chosen = spread(labels, 61)
    assert len(set(chosen)) == 61
    assert np.array_equal(chosen, np.sort(chosen))
    assert np.abs(np.bincount(labels[chosen]) - [50, 10, 1]).max() <= 1
    assert np.array_equal(spread(labels, 1000), np.arange(610))
    held, others = fifth(Labelled(np.arange(610)[:, None], labels))
    assert np.bincount(held.labels).tolist() == [100, 20, 2]
    assert sorted([*held.features[:, 0], *others.features[:, 0]]) == [*range(610)]


def test_what_cannot_be_read_is_found_or_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = folders(tmp_path / "images", 10)
    for colour in COLOURS:
        for n in range(2):
            (source / colour / f"{n}.png").write_bytes(b"no picture")
    options: dict[str, Any] = {"source": str(source), "k": 3, "val_fraction": 0.3, "test_fraction": 0}
    with pytest.raises(TrunklineError, match=r"^ImageProbes: cannot read the image .*png.*or set skip_corrupt=true"):
        run(tmp_path, probes(**options))
    with pytest.warns(UserWarning, match="skipped: "):
        fitted = run(tmp_path, probes(**options, skip_corrupt=True))
    assert "pictures, which cannot be read" in capsys.readouterr().out
    assert fitted.witness.seen[-1].keys() == {"zero_shot_acc", "knn_acc", "linear_probe_acc"}  # no top 5 with 4 classes


class Bare(L.LightningDataModule):
    """A datamodule without `preprocessing`."""

    def train_dataloader(self) -> DataLoader[Any]:
        return Pairs().train_dataloader()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "./nowhere"}, r"^ImageProbes: .*source.*\./nowhere.* there is no such file"),
        ({"k": 21, "max_train": 20}, r"^ImageProbes: k=21 must be from 1 to 20, the number of training rows"),
        ({"max_train": 4}, r"the 4 training rows .* digits are too few .* or raise max_train"),
        (
            {"val_fraction": 0},
            r"digits has no validation rows; set val_fraction or val_split",
        ),
        ({"templates": ["a photo"]}, r"^ImageProbes: the template 'a photo' has no {}"),
        ({"class_names": ["red"]}, r"^ImageProbes: class_names has 1 names, but the source has 10 classes"),
        ({"every": 0}, r"^ImageProbes: every must be 1 or more, not 0"),
        ({"max_val": 0}, r"^ImageProbes: max_val must be 1 or more, not 0"),
        ({"batch_size": 0}, r"^batch_size must be at least 1, not 0"),
        ({"image_size": 8}, r"^ImageProbes: image_size=8 does not apply: images are prepared as in the network's tra"),
    ],
)
def test_bad_input(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    model = module()
    before = {name: weight.clone() for name, weight in model.network.state_dict().items()}
    with pytest.raises(TrunklineError, match=message):
        run(tmp_path, probes(**{**DIGITS, **options}), model=model)
    assert all(torch.equal(before[name], weight) for name, weight in model.network.state_dict().items())


def test_what_cannot_be_probed(tmp_path: Path) -> None:
    with pytest.raises(TrunklineError, match="what has zero_shot, but ImageClassifier allows knn, linear_probe; remo"):
        run(tmp_path, probes(what=["knn", "zero_shot"]), data=Grey, model=classifier())
    for unsuited in (Bare, type("Wordless", (Pairs,), {"facts": DataFacts()})):
        with pytest.raises(TrunklineError, match="how the training data prepares images and texts; train with Image"):
            run(tmp_path, probes(), data=unsuited)
    for made, strategy, precision, message in (
        (L.LightningModule(), None, "32-true", "and ImageClassifier, not of LightningModule; leave it out"),
        (module(), FSDPStrategy(), "32-true", "FSDPStrategy shards over processes; set --trainer.strategy ddp"),
        (module(), None, "bf16-true", "float32, not --trainer.precision bf16-true; set bf16-mixed"),
    ):
        machine: Any = SimpleNamespace(strategy=strategy, precision=precision, datamodule=Pairs(), is_global_zero=True)
        with pytest.raises(TrunklineError, match=message):
            probes().setup(machine, made, "fit")
