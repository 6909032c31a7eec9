"""ImageClassifier: loss, metrics, checkpoints and averages, each against an independent computation."""

import json
import os
import socket
from pathlib import Path
from typing import Any

import lightning as L
import machine_settings
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging
from recorded_run import CONTEXT
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from tiny import batches, classifier, fit, mean_loss, trainer, vit, weights
from torch import Tensor
from torch.utils.data import Dataset

from trunkline import TrunklineError
from trunkline.datamodules import ImageData
from trunkline.datamodules.base import TrunklineDataModule
from trunkline.datamodules.samplers import SampleKey
from trunkline.modules.objectives.image_classifier import ImageClassifier

ROWS, SKIPPED = 23, (3, 17)  # validation rows, and those that are not to be counted


# --- the training loss


def log_softmax(logits: Tensor) -> np.ndarray:
    x = logits.detach().double().numpy()
    return x - np.log(np.exp(x).sum(axis=1, keepdims=True))


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_label_smoothing(smoothing: float) -> None:
    model, (batch,) = classifier(label_smoothing=smoothing), batches(1, size=5)
    target = np.full((5, 10), smoothing / 10)
    target[range(5), batch["label"]] += 1 - smoothing
    want = -(target * log_softmax(model(batch["image"]))).sum(axis=1).mean()
    assert mean_loss(model, batch).item() == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.4, 0.0), (0.0, 1.0), (0.4, 1.0)])
def test_mixed_targets(mixup: float, cutmix: float) -> None:
    model = classifier(mixup=mixup, cutmix=cutmix, label_smoothing=0.2)
    mix, soft = Mixup(mixup, cutmix, label_smoothing=0.2, num_classes=10), SoftTargetCrossEntropy()
    plain, changed = classifier(label_smoothing=0.2), 0
    for seed, batch in enumerate(batches(6, size=8)):
        before = batch["image"].clone()
        np.random.seed(seed)
        image, target = mix(batch["image"].clone(), batch["label"])
        np.random.seed(seed)
        loss = mean_loss(model, batch).item()
        assert loss == pytest.approx(soft(model(image), target).item(), rel=1e-5)
        changed += loss != pytest.approx(mean_loss(plain, batch).item(), rel=1e-3)
        assert torch.equal(batch["image"], before)  # callbacks may still want to see it
    assert changed >= 3  # a share of almost 0 or 1 is drawn now and then


def test_mix_prob_is_the_share_of_mixed_batches() -> None:
    model, plain, (batch,) = classifier(mixup=1.0, mix_prob=0.25), classifier(), batches(1)
    unmixed = mean_loss(plain, batch).item()
    losses = [mean_loss(model, batch).item() for _ in range(200) if np.random.seed(_) is None]
    assert np.mean([loss != pytest.approx(unmixed) for loss in losses]) == pytest.approx(0.25, abs=0.1)


def test_mixing_an_odd_batch_is_an_error() -> None:
    with pytest.raises(TrunklineError, match=r"5 images per process is an odd number; set batch_size") as caught:
        classifier(mixup=0.1).loss(batches(1, size=5)[0])
    assert caught.value.field == "data.batch_size"


# --- metrics


class Rows(Dataset[Any]):
    """Random images, and a few rows that are not to be counted."""

    def __init__(self, classes: int) -> None:
        draw = torch.Generator().manual_seed(2)
        self.image = torch.randn(ROWS, 1, 8, 8, generator=draw)
        self.label = torch.randint(0, classes, (ROWS,), generator=draw)

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, key: SampleKey) -> dict[str, Any]:
        row = key.index
        valid = key.valid and row not in SKIPPED
        skipped = int(key.valid and row in SKIPPED)
        return {"image": self.image[row], "label": self.label[row], "index": row, "valid": valid, "skipped": skipped}


class RowsData(TrunklineDataModule):
    def __init__(self, classes: int) -> None:
        super().__init__(batch_size=8, eval_batch_size=8, num_workers=0, seed=0)
        self.datasets = {"val": Rows(classes), "test": Rows(classes)}


def evaluate(folder: Path, classes: int, stage: str = "validate", **options: Any) -> dict[str, float]:
    """Metrics as Lightning returns them: of all 3 batches, of 8, 8 and 7 rows."""
    run = getattr(trainer(folder, **options), stage)
    return run(classifier(vit(num_classes=classes)), datamodule=RowsData(classes), verbose=False)[0]


def by_hand(stage: str, classes: int) -> dict[str, float]:
    """The same metrics, counted row by row."""
    data, rows = Rows(classes), [row for row in range(ROWS) if row not in SKIPPED]
    with torch.no_grad():
        scores = log_softmax(classifier(vit(num_classes=classes)).eval()(data.image[rows]))
    label = data.label[rows].numpy()
    own = scores[range(len(rows)), label]
    rank = (scores > own[:, None]).sum(axis=1)  # classes that look likelier than the true one
    counts = {"loss": -own.mean(), "acc": (rank == 0).mean(), "skipped_images": len(SKIPPED)}
    return {f"{stage}/{name}": float(v) for name, v in (counts | {"acc_top5": (rank < 5).mean()}).items()}


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_metrics_of_one_process(tmp_path: Path, stage: str) -> None:
    name = {"validate": "val", "test": "test"}[stage]
    want = by_hand(name, 10)
    assert 0 < want[f"{name}/acc"] < want[f"{name}/acc_top5"] < 1
    assert evaluate(tmp_path, 10, stage) == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize(
    ("classes", "names"), [(5, {"loss", "acc", "skipped_images"}), (6, {"loss", "acc", "acc_top5", "skipped_images"})]
)
def test_top5_needs_more_than_5_classes(tmp_path: Path, classes: int, names: set[str]) -> None:
    want = {key: value for key, value in by_hand("val", classes).items() if key.removeprefix("val/") in names}
    assert evaluate(tmp_path, classes) == pytest.approx(want, rel=1e-5)


def evaluate_rank(rank: int, port: int, folder: Path) -> None:
    """One of two processes that evaluate together, as a cluster starts them; 4 + 4 + 4 rows each, 1 a filler."""
    machine_settings.apply()
    names = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    names |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
    os.environ.update({name: str(value) for name, value in names.items()})
    metrics = evaluate(folder, 10, devices=2, strategy="ddp")
    (folder / f"{rank}.json").write_text(json.dumps(metrics))


@pytest.mark.timeout(120)
def test_metrics_of_two_processes(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [CONTEXT.Process(target=evaluate_rank, args=(rank, port, tmp_path)) for rank in range(2)]
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join(90)
        assert [process.exitcode for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == pytest.approx(by_hand("val", 10), rel=1e-5)


@pytest.mark.parametrize("command", ["fit", "validate"])
def test_another_number_of_classes_than_the_data(tmp_path: Path, command: str) -> None:
    data = ImageData("digits", image_size=8, channels=1)
    message = r"the network has num_classes=7, but the data needs 10; leave num_classes out .* or set it to 10$"
    with pytest.raises(TrunklineError, match=message) as caught:
        getattr(trainer(tmp_path, max_steps=1), command)(classifier(vit(num_classes=7)), datamodule=data)
    assert caught.value.field == "model.network.num_classes"
    with pytest.raises(TrunklineError, match="at least 2 classes, not num_classes=1") as caught:
        ImageClassifier(vit(num_classes=1))
    assert caught.value.field == "model.network.num_classes"


# --- checkpoints, cost, divergence, averages


def test_hyperparameters_are_plain_data_and_rebuild(tmp_path: Path) -> None:
    model = classifier(vit(dropout=0.1), label_smoothing=0.1, cutmix=0.5, mix_prob=0.7, freeze_blocks=1, seed=3)
    fit(model, tmp_path, batches(1)).save_checkpoint(tmp_path / "a.ckpt")
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    plain = json.loads(json.dumps(checkpoint["hyper_parameters"]))
    assert plain == checkpoint["hyper_parameters"]
    again = ImageClassifier(**plain)
    assert again.network.config == model.network.config
    assert again.optimizer_config == model.optimizer_config
    assert again.hparams == model.hparams
    assert (again.seed, again.label_smoothing, again.mix.cutmix_alpha, again.mix.mix_prob) == (3, 0.1, 0.5, 0.7)
    again.load_state_dict(checkpoint["state_dict"])
    image = torch.randn(3, 1, 8, 8)
    assert torch.equal(again.eval()(image), model.eval()(image))


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_flops(pool: Any) -> None:
    batch, patches, dim, depth, classes = 3, 4, 16, 2, 10
    tokens = patches + (pool == "cls")

    def block(queries: int) -> int:
        matrices = queries * dim * dim + tokens * dim * 2 * dim + queries * dim * dim + 2 * queries * dim * 4 * dim
        return matrices + 2 * queries * tokens * dim  # q·k and weights·v

    last = 1 if pool == "cls" else tokens  # the others are read by no head
    multiplications = patches * 4 * 4 * dim + (depth - 1) * block(tokens) + block(last) + dim * classes
    model = classifier(vit(depth=depth, pool=pool))
    assert model.flops_per_batch(batches(1, size=batch)[0]) == 3 * 2 * batch * multiplications


class Record(Callback):
    """The weights after each step, before anything averages them."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        self.steps.append(weights(pl_module))


def test_divergence_stops_before_the_weights_change(tmp_path: Path) -> None:
    model, record, data = classifier(), Record(), batches(3)
    data[1]["image"][2, 0, 0, 0] = float("nan")
    with pytest.raises(TrunklineError, match=r"loss is not finite by step 1 \(epoch 0\).*Lower optimizer\.lr"):
        fit(model, tmp_path, data, callbacks=[record])
    (after_one_step,) = record.steps
    torch.testing.assert_close(weights(model), after_one_step, rtol=0, atol=0)
    assert all(value.isfinite().all() for value in after_one_step.values())


def test_averaged_weights(tmp_path: Path) -> None:
    model, record = classifier(), Record()
    fit(model, tmp_path, batches(5), callbacks=[record, EMAWeightAveraging(decay=0.7)])
    average = {name: value.double() for name, value in record.steps[0].items()}
    for step in record.steps[1:]:
        average = {name: 0.7 * average[name] + 0.3 * step[name].double() for name in average}
    for name, value in weights(model).items():
        torch.testing.assert_close(value.double(), average[name], rtol=1e-5, atol=1e-7)
        assert not torch.equal(value, record.steps[-1][name])
