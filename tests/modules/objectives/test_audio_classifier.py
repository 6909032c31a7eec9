"""AudioClassifier: its losses against slow loops, its figures against scikit-learn, on one and two processes."""

import json
import math
import socket
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from recorded_run import CONTEXT
from sklearn.metrics import average_precision_score
from tiny import trainer
from tiny_speech import CLASSES, FRAMES, MELS, Batch, Kind, Tones, drawn, evaluation, noisy, worker
from torch import Tensor
from torch.utils.data import DataLoader

from trunkline import TrunklineError
from trunkline.contract import DataFacts
from trunkline.modules.backbone import TransformerConfig
from trunkline.modules.networks import AST, GPT, ASTConfig, GPTConfig, ViT, ViTConfig
from trunkline.modules.objectives.audio_classifier import AudioClassifier
from trunkline.modules.training.optim import OptimizerConfig

K = len(CLASSES)


def config(dim: int = 16, **options: Any) -> ASTConfig:
    trunk = TransformerConfig(dim=dim, depth=1, num_heads=2)
    sizes = {"num_mels": MELS, "max_frames": FRAMES, "patch_size": 4, "stride": 2, "num_classes": K}
    return ASTConfig(**{**sizes, "backbone": trunk, **options})  # type: ignore[arg-type]


def model(network: ASTConfig | None = None, noise: float = 0.3, **options: Any) -> AudioClassifier:
    torch.manual_seed(0)
    options = {"optimizer": OptimizerConfig(lr=0.01, warmup=0.1), **options}
    made: AudioClassifier = noisy(AudioClassifier(network or config(), **options), noise)
    return made


def for_labels(**options: Any) -> AudioClassifier:
    """An objective for clips with several labels."""
    return model(multi_label=True, **options)


MADE = {"ctc": model, "labels": for_labels}
"""By the kind of batch: with one label a clip, with several."""

# --- the loss


def alone(net: AST, batch: Batch) -> Tensor:
    """Logits of the valid clips, one at a time and without their padding."""
    rows = batch["valid"].nonzero()[:, 0].tolist()
    return torch.cat([net(batch["features"][row][batch["mask"][row]][None]) for row in rows])


def slow_losses(logits: Tensor, target: Tensor, several: bool, smoothing: float = 0.0) -> list[Tensor]:
    """Of each clip, from shares of the classes (B, K)."""
    losses = []
    for row, shares in zip(logits, target, strict=True):
        if several:
            terms = [
                -t * x.sigmoid().log() - (1 - t) * (1 - x.sigmoid()).log() for x, t in zip(row, shares, strict=True)
            ]
            losses.append(torch.stack(terms).mean())
        else:
            smooth = (1 - smoothing) * shares + smoothing / K
            losses.append(-(smooth * row.log_softmax(0)).sum())
    return losses


def shares_of(batch: Batch) -> Tensor:
    found = batch["target"] if "target" in batch else torch.eye(K)[batch["label"]]
    return found[batch["valid"]].double()


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize(("kind", "smoothing"), [("ctc", 0.0), ("ctc", 0.1), ("labels", 0.0)])
def test_loss_and_gradients(kind: Kind, smoothing: float, soft: bool) -> None:
    """Targets of mixed clips are shares. The last batch has rows that only fill it up: they count nothing."""
    made = MADE[kind](label_smoothing=smoothing).double()
    for batch in Tones(10, kind=kind).batches():
        if soft:
            batch["target"] = torch.rand(4, K, generator=torch.Generator().manual_seed(1))
            batch["target"] = batch["target"] if kind == "labels" else batch["target"].softmax(dim=1)
        batch["features"] = batch["features"].double()
        made.zero_grad()
        want = torch.stack(slow_losses(alone(made.network, batch), shares_of(batch), kind == "labels", smoothing))
        want.sum().backward()
        gradients = {name: p.grad.clone() for name, p in made.network.named_parameters() if p.grad is not None}
        made.zero_grad()
        got = made.loss(batch)  # type: ignore[arg-type]
        got.total.backward()
        assert got.count == len(want)
        assert got.total.item() == pytest.approx(want.sum().item(), rel=1e-8)
        for name, p in made.network.named_parameters():
            torch.testing.assert_close(p.grad, gradients[name], rtol=1e-6, atol=1e-9)


def test_a_new_head_guesses() -> None:
    (batch,) = drawn(1, 8)
    new = AudioClassifier(config())
    loss = new.loss(batch)  # type: ignore[arg-type]
    assert loss.total.item() / 8 == pytest.approx(math.log(K), rel=1e-6)
    (batch,) = drawn(1, 8, "labels")
    loss = AudioClassifier(config(), multi_label=True).loss(batch)  # type: ignore[arg-type]
    assert loss.total.item() / 8 == pytest.approx(math.log(2), rel=1e-6)


def test_seconds_and_operations_of_a_step() -> None:
    made, (batch,) = model(), Tones(4).batches()
    made.trainer = SimpleNamespace(datamodule=Tones(), strategy=None)  # type: ignore[assignment]
    assert made.batch_size(batch) == batch["mask"].sum()
    assert (made.unit, made.unit_size) == ("audio_seconds", 0.25)
    assert made.flops_per_batch(batch) > 0  # type: ignore[arg-type]
    assert made(batch["features"], batch["mask"]).shape == (4, K)
    features = made.features(batch)  # type: ignore[arg-type]
    net = made.network
    torch.testing.assert_close(net.head(net.head_norm(features)), net(batch["features"], batch["mask"]))


# --- evaluation


@pytest.mark.parametrize("kind", ["ctc", "labels"])
def test_learns_to_hear(kind: Kind, tmp_path: Path) -> None:
    optimizer = OptimizerConfig("muon", lr=0.02, warmup=0.1)
    made, run = MADE[kind](noise=0.0, optimizer=optimizer), trainer(tmp_path, max_epochs=1)
    run.fit(made, DataLoader(drawn(100, 32, kind), batch_size=None))  # type: ignore[arg-type]
    (got,) = trainer(tmp_path).validate(made, datamodule=Tones(60, kind=kind), verbose=False)
    assert got["val/acc" if kind == "ctc" else "val/mAP"] > 0.9


@pytest.mark.parametrize("stage", ["val", "test"])
@pytest.mark.parametrize("kind", ["ctc", "labels"])
def test_all_figures_against_slow_ones(kind: Kind, stage: str, tmp_path: Path) -> None:
    data, run, made = Tones(30, kind=kind), trainer(tmp_path), MADE[kind]()
    data.texts = [list(text) for text in dict.fromkeys(map(tuple, data.texts))]  # equal clips have no order
    assert len(data.texts) % data.size  # the last batch is filled up
    (got,) = (run.validate if stage == "val" else run.test)(made, datamodule=data, verbose=False)
    net = made.network.eval()
    with torch.no_grad():
        logits = torch.cat([alone(net, batch) for batch in data.batches()])
    assert logits.sort(dim=0).values.diff(dim=0).min() > 1e-5  # rounding changes no order
    target = torch.cat([shares_of(batch) for batch in data.batches()])
    want = {"loss": torch.stack(slow_losses(logits, target, kind == "labels")).mean().item()}
    if kind == "labels":
        columns = [(target[:, k].numpy(), logits[:, k].numpy()) for k in range(K)]
        want["mAP"] = sum(average_precision_score(*column) for column in columns) / K
    else:
        want["acc"] = (logits.argmax(1) == target.argmax(1)).double().mean().item()
    want |= {"skipped_clips": 0.0, "truncated_clips": 0.0}
    assert got == pytest.approx({f"{stage}/{name}": value for name, value in want.items()}, rel=1e-5)


def test_many_classes_have_the_best_five() -> None:
    assert "acc_top5" not in model().make_metrics()
    assert "acc_top5" in model(config(num_classes=6)).make_metrics()
    assert model(config(num_classes=6), multi_label=True).make_metrics().keys() == {"loss", "mAP"}


def test_a_class_that_no_clip_has(tmp_path: Path) -> None:
    """It does not count."""
    data, made = Tones(12, kind="labels"), for_labels()
    data.texts = [[3 if token == 5 else token for token in text] for text in data.texts]
    (got,) = trainer(tmp_path).validate(made, datamodule=data, verbose=False)
    with torch.no_grad():
        logits = torch.cat([alone(made.network.eval(), batch) for batch in data.batches()])
    target = torch.cat([shares_of(batch) for batch in data.batches()])
    want = [average_precision_score(target[:, k].numpy(), logits[:, k].numpy()) for k in range(2)]
    assert got["val/mAP"] == pytest.approx(sum(want) / 2, rel=1e-5)
    data.texts = [[2]] * 12
    (got,) = trainer(tmp_path).validate(made, datamodule=data, verbose=False)
    assert got["val/mAP"] == 0


@pytest.mark.parametrize("kind", ["ctc", "labels"])
def test_predictions_and_what_callbacks_get(kind: Kind, tmp_path: Path) -> None:
    data, made = Tones(6, kind=kind), MADE[kind]()
    found: Any = trainer(tmp_path).predict(made, data.val_dataloader())
    assert torch.cat([part["index"] for part in found]).tolist() == list(range(6))
    probability = torch.cat([part["probability"] for part in found])
    with torch.no_grad():
        logits = torch.cat([alone(made.network.eval(), batch) for batch in data.batches()])
    want = logits.sigmoid() if kind == "labels" else logits.softmax(dim=1)
    torch.testing.assert_close(probability, want, rtol=0, atol=1e-5)
    batch = data.batches()[1]
    with torch.no_grad():
        shown = made.evaluate(batch, made.metrics["val"])  # type: ignore[arg-type]
    assert shown["index"].tolist() == [4, 5]
    if kind == "labels":
        assert torch.equal(shown["target"], batch["target"][:2].long())
        torch.testing.assert_close(shown["probability"], want[4:], rtol=0, atol=1e-5)
    else:
        assert torch.equal(shown["label"], batch["label"][:2])
        assert torch.equal(shown["prediction"], want[4:].argmax(dim=1))


@pytest.mark.parametrize("counts", [[5, 2], [7, 0]], ids=str)
def test_processes_hear_together(counts: list[int], tmp_path: Path) -> None:
    """Also where one of them has no clip in its last batch, or none at all."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    jobs = {"ctc": (model, Tones), "labels": (for_labels, partial(Tones, kind="labels"))}
    processes = [CONTEXT.Process(target=worker, args=(rank, jobs, counts, port, tmp_path)) for rank in range(2)]
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join(90)
        assert [process.exitcode for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    for name, (make, data) in jobs.items():
        alone = evaluation(make, data(7), [7])["logged"]
        for rank in range(2):
            found = torch.load(tmp_path / f"{rank}.pt")[name]["logged"]
            assert found == pytest.approx(alone, rel=1e-5)


# --- sizes and weights from elsewhere


def test_hyperparameters_are_plain_and_rebuild_it() -> None:
    for made in (model(config(stride=(2, 1)), label_smoothing=0.1), for_labels()):
        again = AudioClassifier(**json.loads(json.dumps(made.hparams)))
        assert again.network.config == made.network.config
        assert (again.multi_label, again.label_smoothing) == (made.multi_label, made.label_smoothing)


def test_sizes_and_number_of_labels_come_from_the_data() -> None:
    trunk = TransformerConfig(dim=16, depth=1, num_heads=2)
    for kind in ("ctc", "labels"):
        made = AudioClassifier(ASTConfig(patch_size=4, stride=2, backbone=trunk), facts=Tones(kind=kind).facts)  # type: ignore[arg-type]
        found = made.network.config
        assert (found.num_classes, found.num_mels, found.max_frames) == (K, MELS, FRAMES)
        assert made.multi_label == (kind == "labels")


@pytest.mark.parametrize(
    ("kind", "have", "expects"), [("labels", "several labels", "one"), ("ctc", "one label", "several")]
)
def test_data_with_another_number_of_labels(kind: Kind, have: str, expects: str) -> None:
    made = model(multi_label=kind == "ctc")
    made.trainer = SimpleNamespace(datamodule=Tones(kind=kind), strategy=None)  # type: ignore[assignment]
    message = f"the data's clips have {have}, but the objective expects {expects}; leave multi_label out"
    with pytest.raises(TrunklineError, match=message) as caught:
        made.setup("fit")
    assert caught.value.field == "model.multi_label"
    made.trainer = SimpleNamespace(datamodule=SimpleNamespace(facts=DataFacts(num_mels=MELS)), strategy=None)  # type: ignore[arg-type, assignment]
    made.setup("fit")


@pytest.mark.parametrize(
    ("options", "message", "field"),
    [
        ({"network": config(num_classes=1)}, "needs at least 2 classes, not num_classes=1", "network.num_classes"),
        (
            {"network": config(num_classes=0), "multi_label": True},
            "needs at least 1 class, not num_classes=0",
            "network.num_classes",
        ),
        (
            {"label_smoothing": 0.1, "multi_label": True},
            "label_smoothing is for clips with one label",
            "label_smoothing",
        ),
        ({"label_smoothing": 1.0}, "label_smoothing must be from 0 up to below 1", "label_smoothing"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str, field: str) -> None:
    with pytest.raises(TrunklineError, match=message) as caught:
        AudioClassifier(**{"network": config(), **options})
    assert caught.value.field == f"model.{field}"


def test_starts_from_another_ast(tmp_path: Path) -> None:
    """Of longer clips and other classes: what it hears in a short clip is the same, and the head is new."""
    source = model(config(max_frames=2 * FRAMES, num_classes=5))
    source.network.save_pretrained(tmp_path)
    made = AudioClassifier(config(), init_from=str(tmp_path)).eval()
    (batch,) = drawn(1, 4)
    batch["mask"] = batch["mask"].clone()
    torch.testing.assert_close(made.features(batch), source.eval().features(batch))  # type: ignore[arg-type]
    assert not made.network.head.weight.any()


def test_starts_from_images(tmp_path: Path) -> None:
    trunk = TransformerConfig(dim=16, depth=1, num_heads=2)
    vit = ViT(ViTConfig(image_size=16, patch_size=4, num_classes=7, backbone=trunk))
    vit.save_pretrained(tmp_path / "vit")
    made = AudioClassifier(config(), init_from=str(tmp_path / "vit"))
    want = AST.from_images(vit, config())
    for name, value in made.network.state_dict().items():
        if not name.startswith("head"):
            assert torch.equal(value, want.state_dict()[name]), name
    assert torch.equal(made.network.backbone.blocks[0].attn.qkv.weight, vit.backbone.blocks[0].attn.qkv.weight)  # type: ignore[union-attr]
    wider = config(backbone=TransformerConfig(dim=16, depth=1, num_heads=4))
    with pytest.raises(TrunklineError, match="was trained with num_heads=2, but the network has 4"):
        AudioClassifier(wider, init_from=str(tmp_path / "vit"))
    with pytest.raises(TrunklineError, match="an AST with patch_size=2 cannot start from a ViT that has patch_size=4"):
        AudioClassifier(config(patch_size=2, stride=2), init_from=str(tmp_path / "vit"))
    GPT(GPTConfig(9, 8, backbone=trunk)).save_pretrained(tmp_path / "gpt")
    with pytest.raises(TrunklineError, match="holds a GPT; give a checkpoint or a folder of AST or ViT"):
        AudioClassifier(config(), init_from=str(tmp_path / "gpt"))
