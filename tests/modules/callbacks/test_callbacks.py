"""What TensorBoard shows of a run, read back from its event files."""

import csv
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from sklearn.metrics import confusion_matrix
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard_run import logged_picture
from tiny import vit
from torch import Tensor

from trunkline.datamodules import ImageData
from trunkline.modules.callbacks import (
    AttentionMaps,
    ClassificationReport,
    GracefulStop,
    LastCheckpoint,
    ProgressBar,
    Throughput,
    throughput,
)
from trunkline.modules.callbacks.drawing import GREEN, RED
from trunkline.modules.objectives.image_classifier import ImageClassifier
from trunkline.modules.training.optim import OptimizerConfig, lr_multiplier

BATCH, STEPS, INTERVAL, VALIDATIONS = 40, 17, 5, [8, 16]
LOGGED = [5, 10, 15]
OPTIMIZER = OptimizerConfig(lr=0.01, warmup=0.2)


class Witness(Callback):
    """Sees what the other callbacks see; a step takes 2 seconds on its clock, a validation 1000."""

    def __init__(self) -> None:
        self.clock, self.grad_norms, self.losses, self.validations = 0.0, [], [], []  # type: ignore[var-annotated]

    def on_train_batch_start(self, *_: Any) -> None:
        self.clock += 2

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, _: Any) -> None:
        squares = [p.grad.double().square().sum() for p in pl_module.parameters() if p.grad is not None]
        self.grad_norms.append(math.sqrt(sum(squares)))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, *_: Any) -> None:
        self.losses.append(outputs["loss"].item())

    def on_validation_epoch_start(self, *_: Any) -> None:
        self.clock += 1000
        self.validations.append([])

    def on_validation_batch_end(self, trainer: Any, pl_module: Any, outputs: dict[str, Tensor], *_: Any) -> None:
        self.validations[-1].append({name: value.clone() for name, value in outputs.items()})

    def seen(self, validation: int) -> dict[str, Tensor]:
        outputs = self.validations[validation]
        return {name: torch.cat([o[name] for o in outputs]) for name in ("image", "prediction", "label")}


def run(folder: Path, witness: Witness, *callbacks: Callback, **options: Any) -> ImageClassifier:
    torch.manual_seed(0)
    model = ImageClassifier(vit(), optimizer=OPTIMIZER)
    data = ImageData("digits", image_size=8, channels=1, batch_size=BATCH, eval_batch_size=50)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        use_distributed_sampler=False,
        default_root_dir=folder,
        logger=TensorBoardLogger(folder, name="", version="", default_hp_metric=False),
        enable_checkpointing=False,
        enable_model_summary=False,
        num_sanity_val_steps=1,
        callbacks=[ProgressBar(), witness, *callbacks],
        **{"max_steps": STEPS, "log_every_n_steps": INTERVAL, "val_check_interval": VALIDATIONS[0], **options},
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(throughput, "time", SimpleNamespace(perf_counter=lambda: witness.clock))
        trainer.fit(model, datamodule=data)
    return model


def events(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder), {"scalars": 0, "images": 0}).Reload()


def scalars(found: EventAccumulator, tag: str) -> dict[int, float]:
    """Value by position on the x-axis."""
    return {event.step: event.value for event in found.Scalars(tag)}


class TestRun:
    """One run with the callbacks that recipes have by default, and those of a ViT."""

    @pytest.fixture(scope="class")
    def fitted(self, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
        folder, witness = tmp_path_factory.mktemp("run"), Witness()
        report = ClassificationReport(images=20, projected=60)
        callbacks = (Throughput(), GracefulStop(), LastCheckpoint(), EMAWeightAveraging(decay=0.5), report)
        model = run(folder, witness, *callbacks, AttentionMaps(images=3, heads=1))
        return SimpleNamespace(model=model, folder=folder, witness=witness, report=report, found=events(folder))

    def test_scalars_that_are_there(self, fitted: SimpleNamespace) -> None:
        train = {"train/loss", "train/lr", "train/grad_norm", "train/skipped_images"}
        main = train | {"val/loss", "val/acc", "val/acc_top5", "val/skipped_images"}
        speed = {
            "throughput/images_per_sec",
            "throughput/flops_per_sec",
            "images_seen",
            "throughput/data_wait",
            "epoch",
        }
        assert set(fitted.found.Tags()["scalars"]) == main | speed | {
            f"by_images/{name}" for name in main - {"train/skipped_images"}
        }

    def test_speed(self, fitted: SimpleNamespace) -> None:
        per_image = fitted.model.flops_per_batch({"image": torch.zeros(BATCH, 1, 8, 8)}) / BATCH
        assert scalars(fitted.found, "images_seen") == {step: step * BATCH for step in LOGGED}
        # 2 seconds a step, whatever validations take
        speed = dict.fromkeys(LOGGED, BATCH / 2)
        assert scalars(fitted.found, "throughput/images_per_sec") == pytest.approx(speed)
        flops = {step: per_image * value for step, value in speed.items()}
        assert scalars(fitted.found, "throughput/flops_per_sec") == pytest.approx(flops)

    def test_training_curves(self, fitted: SimpleNamespace) -> None:
        steps = [step - 1 for step in LOGGED]  # Lightning counts from 0
        want = {
            "train/loss": fitted.witness.losses,
            "train/grad_norm": fitted.witness.grad_norms,
            "train/lr": [0.01 * lr_multiplier(step, STEPS, OPTIMIZER) for step in range(STEPS)],
        }
        for tag, values in want.items():
            assert len(values) == STEPS
            assert scalars(fitted.found, tag) == pytest.approx({step: values[step] for step in steps}, rel=1e-5)
            by_samples = {BATCH * (step + 1): values[step] for step in steps}
            assert scalars(fitted.found, f"by_images/{tag}") == pytest.approx(by_samples, rel=1e-5)

    def test_validation_curves(self, fitted: SimpleNamespace) -> None:
        accuracies = []
        for number in (1, 2):  # 0 was the sanity check
            seen = fitted.witness.seen(number)
            assert len(seen["label"]) == 180
            accuracies.append((seen["prediction"] == seen["label"]).double().mean().item())
        assert len(fitted.witness.validations) == 3
        assert accuracies[0] != accuracies[1]
        assert list(scalars(fitted.found, "val/acc").values()) == pytest.approx(accuracies)
        for name in ("val/acc", "val/loss"):
            by_samples = scalars(fitted.found, f"by_images/{name}")
            assert list(by_samples) == [step * BATCH for step in VALIDATIONS]
            assert list(by_samples.values()) == list(scalars(fitted.found, name).values())

    def test_pictures(self, fitted: SimpleNamespace) -> None:
        assert set(fitted.found.Tags()["images"]) == {"val/images", "val/attention", "val/confusion"}
        for tag in fitted.found.Tags()["images"]:
            assert [event.step for event in fitted.found.Images(tag)] == VALIDATIONS
        assert logged_picture(fitted.found, "val/confusion").shape == (400, 400, 3)
        # a line of titles and 3 images with a gap after each; beside each the rollout and one head
        shown = logged_picture(fitted.found, "val/attention")
        assert shown.shape == (14 + 3 * (96 + 4), 3 * (96 + 4), 3)
        assert all((shown[:14, left : left + 100] < 100).any() for left in (0, 100, 200))
        shown, height, width = logged_picture(fitted.found, "val/images"), 96 + 6 + 14, 96 + 6
        assert shown.shape == (3 * height, 8 * width, 3)  # 20 images, 8 a row
        seen = fitted.witness.seen(2)
        right = (seen["prediction"] == seen["label"])[:20].tolist()
        assert True in right
        assert False in right
        for number, expected in enumerate(right):
            top, left = number // 8 * height, number % 8 * width
            assert tuple(shown[top, left]) == (GREEN if expected else RED)
            image = (seen["image"][number, 0].numpy() * 0.5 + 0.5) * 255
            np.testing.assert_allclose(shown[top + 9 : top + 99 : 12, left + 9 : left + 99 : 12, 0], image, atol=0.51)

    def test_confusion_matrix(self, fitted: SimpleNamespace) -> None:
        seen = fitted.witness.seen(2)
        want = confusion_matrix(seen["label"], seen["prediction"], labels=range(10))
        assert want.sum() == 180
        np.testing.assert_array_equal(fitted.report.matrix.compute().numpy(), want)

    def test_projector(self, fitted: SimpleNamespace) -> None:
        (folder,) = {file.parent for file in fitted.folder.rglob("tensors.tsv")}
        rows = list(csv.reader((folder / "tensors.tsv").open(), delimiter="\t"))
        seen = fitted.witness.seen(2)
        assert (folder / "metadata.tsv").read_text().split() == [str(int(n)) for n in seen["label"][:60]]
        with torch.no_grad():
            features = fitted.model.network.eval().forward_features(seen["image"][:60]).patches.mean(dim=1)
        np.testing.assert_allclose(np.array(rows, dtype=float), features, rtol=1e-3, atol=1e-4)
        assert Image.open(folder / "sprite.png").size == (8 * 32, 8 * 32)  # a square that holds 60


@pytest.mark.parametrize("peak", [None, 10**6])
def test_utilisation_where_the_peak_is_known(tmp_path: Path, peak: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "peak_speed", lambda device, dtype: peak)
    report = ClassificationReport(max_classes=9)
    run(tmp_path, Witness(), Throughput(), report, log_every_n_steps=2, max_steps=4, val_check_interval=3)
    found = events(tmp_path)
    speed = scalars(found, "throughput/flops_per_sec")
    assert list(speed) == [2, 4]
    assert found.Tags()["images"] == ["val/images"]  # too many classes for a matrix
    if peak is None:
        assert "throughput/mfu" not in found.Tags()["scalars"]
    else:
        want = {step: value / peak for step, value in speed.items()}
        assert scalars(found, "throughput/mfu") == pytest.approx(want)


def test_a_resume_that_begins_with_a_validation_knows_the_samples_seen(tmp_path: Path) -> None:
    before, after = Throughput(), Throughput()
    run(tmp_path / "1", Witness(), before, max_steps=2, val_check_interval=31)
    after.load_state_dict(before.state_dict())
    logger = TensorBoardLogger(tmp_path, name="", version="2")
    trainer: Any = SimpleNamespace(loggers=[logger], is_global_zero=True, sanity_checking=False, global_step=2)
    trainer.callback_metrics = {"val/acc": 0.5, "train/loss": 1.0}
    after.on_validation_end(trainer, SimpleNamespace(unit="images", unit_size=1))  # type: ignore[arg-type]
    logger.finalize("success")
    found = events(tmp_path / "2")
    assert found.Tags()["scalars"] == ["by_images/val/acc"]
    assert scalars(found, "by_images/val/acc") == {2 * BATCH: 0.5}
