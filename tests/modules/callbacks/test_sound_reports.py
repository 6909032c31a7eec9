"""What TensorBoard shows of a classifier of sounds, read back from its event files."""

import csv
import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from sklearn.metrics import confusion_matrix
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard_run import logged_picture, logged_trainer
from tiny_speech import CLASSES, FRAMES, MELS, Kind, Tones, noisy
from torch import Tensor, nn

from trunkline import TrunklineError
from trunkline.modules.backbone import TransformerConfig
from trunkline.modules.callbacks import AttentionMaps, ClassificationReport
from trunkline.modules.callbacks.attention_maps import (
    GAP,
    attention_maps,
    attention_rollout,
    over_frames,
    overlay,
    to_patches,
)
from trunkline.modules.callbacks.classification import SOUND, leading_rows, verdicts
from trunkline.modules.callbacks.drawing import GREEN, LINE, RED, written
from trunkline.modules.callbacks.spectrograms import sound_picture, spectrogram
from trunkline.modules.networks import AST, ASTConfig
from trunkline.modules.objectives.audio_classifier import AudioClassifier
from trunkline.modules.training.optim import OptimizerConfig

ROWS, RATE, HEADS = 10, 4000, 2


def config(**options: Any) -> ASTConfig:
    trunk = TransformerConfig(dim=16, depth=2, num_heads=HEADS)
    sizes = {"num_mels": MELS, "max_frames": FRAMES, "patch_size": 4, "stride": 2, "num_classes": len(CLASSES)}
    return ASTConfig(**{**sizes, "backbone": trunk, **options})


def run(folder: Path, kind: Kind, *callbacks: Any) -> SimpleNamespace:
    """Two epochs in which the weights do not change, with a validation after each."""

    def waveform(split: str, row: int) -> Tensor:
        return torch.cos(torch.arange(500 + row) / 3) / 2

    data = Tones(ROWS, kind=kind, waveform=waveform, sample_rate=RATE)
    torch.manual_seed(0)
    options = {"optimizer": OptimizerConfig(lr=1e-12, warmup=0.1), "multi_label": kind == "labels"}
    model: AudioClassifier = noisy(AudioClassifier(config(), **options), 0.3)
    logged_trainer(folder, *callbacks, max_epochs=2).fit(model, datamodule=data)
    model.eval()
    batches = data.batches()
    clips = [b["features"][n][b["mask"][n]] for b in batches for n in b["valid"].nonzero()[:, 0].tolist()]
    with torch.no_grad():
        logits = torch.cat([model.network(clip[None]) for clip in clips])
    right = torch.cat([b["target" if kind == "labels" else "label"][b["valid"]] for b in batches])
    found = EventAccumulator(str(folder), {"images": 0, "audio": 0}).Reload()
    return SimpleNamespace(model=model, clips=clips, logits=logits, right=right, found=found, folder=folder)


class TestOneLabel:
    @pytest.fixture(scope="class")
    def done(self, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
        report = ClassificationReport(images=6, projected=9, played=5)
        folder = tmp_path_factory.mktemp("one")
        done = run(folder, "ctc", report, AttentionMaps(images=5, heads=1))
        return SimpleNamespace(report=report, **vars(done))

    def test_what_is_there(self, done: SimpleNamespace) -> None:
        assert set(done.found.Tags()["images"]) == {"val/sounds", "val/confusion", "val/attention"}
        for tag in done.found.Tags()["images"]:
            assert [event.step for event in done.found.Images(tag)] == [3, 6]
        assert done.found.Tags()["audio"] == [f"val/audio/{row}" for row in range(5)]

    def test_spectrograms_with_predictions(self, done: SimpleNamespace) -> None:
        """Six of two batches, whose clips have been padded to different lengths."""
        shown, height, width = logged_picture(done.found, "val/sounds"), SOUND[1] + 6 + LINE, SOUND[0] + 6
        assert shown.shape == (2 * height, 4 * width, 3)
        right = (done.logits.argmax(dim=1) == done.right)[:6].tolist()
        assert True in right
        assert False in right
        for number, expected in enumerate(right):
            top, left = number // 4 * height, number % 4 * width
            assert tuple(shown[top, left]) == (GREEN if expected else RED)
            inside = shown[top + 3 : top + 3 + SOUND[1], left + 3 : left + 3 + SOUND[0]]
            np.testing.assert_array_equal(
                inside, np.asarray(spectrogram(done.clips[number]).resize(SOUND, Image.Resampling.BOX))
            )

    def test_confusion_matrix(self, done: SimpleNamespace) -> None:
        want = confusion_matrix(done.right, done.logits.argmax(dim=1), labels=range(3))
        assert want.sum() == ROWS
        np.testing.assert_array_equal(done.report.matrix.compute().numpy(), want)

    def test_sounds_are_there_once(self, done: SimpleNamespace) -> None:
        for row in range(5):
            (event,) = done.found.Audio(f"val/audio/{row}")
            samples, rate = soundfile.read(io.BytesIO(event.encoded_audio_string), dtype="float32")
            assert (event.step, rate, len(samples)) == (3, RATE, 500 + row)
            np.testing.assert_allclose(samples, torch.cos(torch.arange(500 + row) / 3) / 2, atol=1e-4)

    def test_projector(self, done: SimpleNamespace) -> None:
        (folder,) = {file.parent for file in done.folder.rglob("tensors.tsv")}
        rows = np.array(list(csv.reader((folder / "tensors.tsv").open(), delimiter="\t")), dtype=float)
        network = done.model.network
        with torch.no_grad():
            states = [network.forward_head(network.forward_features(c[None]), pre_logits=True) for c in done.clips[:9]]
        np.testing.assert_allclose(rows, torch.cat(states), rtol=1e-3, atol=1e-4)
        assert (folder / "metadata.tsv").read_text().split() == [CLASSES[n] for n in done.right[:9].tolist()]
        sprites = np.asarray(Image.open(folder / "sprite.png").convert("RGB"))
        assert sprites.shape == (3 * 32, 3 * 32, 3)
        clip = done.clips[4]
        want = np.asarray(sound_picture(clip, torch.ones(len(clip), dtype=torch.bool), (32, 32))).astype(int)
        np.testing.assert_allclose(sprites[32:64, 32:64], want, atol=1)

    def test_attention(self, done: SimpleNamespace) -> None:
        shown = logged_picture(done.found, "val/attention")
        # a line of titles, then spectrogram, rollout and one head, with a gap after each
        width, height = SOUND[0] + GAP, SOUND[1] + GAP
        assert shown.shape == (LINE + 5 * height, 3 * width, 3)
        titles = [written(name, (width, LINE)) for name in ("input", "rollout", "head 0")]
        np.testing.assert_allclose(shown[:LINE], np.hstack([np.asarray(t).astype(int) for t in titles]), atol=2)
        clip, network = done.clips[4], done.model.network  # of the second batch
        plain = spectrogram(clip).resize(SOUND, Image.Resampling.BOX)
        with torch.no_grad():
            maps = over_frames(attention_maps(network, clip[None], 1)[0], network.config, len(clip))
        for number, want in enumerate([plain, *(overlay(plain, weights) for weights in maps)]):
            tile = shown[LINE + 4 * height :, number * width : (number + 1) * width].astype(int)
            np.testing.assert_allclose(tile[:-GAP, :-GAP], np.asarray(want).astype(int), atol=2)
            assert (tile[-GAP:] == 255).all()
            assert (tile[:, -GAP:] == 255).all()


def test_several_labels(tmp_path: Path) -> None:
    """There is no matrix; a prediction is right if as many of the likeliest classes as there are labels are labels."""
    done = run(tmp_path, "labels", ClassificationReport(images=10, projected=4))
    assert done.found.Tags()["images"] == ["val/sounds"]
    shown, height, width = logged_picture(done.found, "val/sounds"), SOUND[1] + 6 + 2 * LINE, SOUND[0] + 6
    assert shown.shape == (3 * height, 4 * width, 3)
    rights = []
    for number, (logits, target) in enumerate(zip(done.logits, done.right, strict=True)):
        labels = {n for n in range(3) if target[n]}
        best = set(sorted(range(3), key=lambda n: -float(logits[n]))[: len(labels)])
        rights.append(best == labels)
        assert tuple(shown[number // 4 * height, number % 4 * width]) == (GREEN if rights[-1] else RED)
    assert {True, False} == set(rights)
    (folder,) = {file.parent for file in tmp_path.rglob("metadata.tsv")}
    want = [", ".join(name for name, has in zip(CLASSES, row, strict=True) if has) for row in done.right[:4].tolist()]
    assert (folder / "metadata.tsv").read_text().splitlines() == want


def test_captions() -> None:
    names = ["dog", "cat", "rain"]
    batch = {"label": torch.tensor([0, 2]), "prediction": torch.tensor([0, 1])}
    assert verdicts(batch, names) == [("dog", True), ("cat not rain", False)]
    batch = {"target": torch.tensor([[1, 0, 1], [1, 0, 1], [0, 0, 0]])}
    batch["probability"] = torch.tensor([[0.2, 0.1, 0.9], [0.2, 0.3, 0.9], [0.1, 0.0, 0.0]])
    assert verdicts(batch, names) == [
        ("dog, rain\nrain 0.90, dog 0.20", True),
        ("dog, rain\nrain 0.90, cat 0.30", False),
        ("no label\ndog 0.10", False),
    ]
    long = {"target": torch.ones(1, 40), "probability": torch.rand(1, 40)}
    (caption, right), *_ = verdicts(long, [f"class {n}" for n in range(40)])
    assert right
    assert [len(line) <= SOUND[0] // 6 for line in caption.split("\n")] == [True, True]


def test_leading_rows() -> None:
    batches = [{"a": torch.arange(n)} for n in (3, 0, 2, 4)]
    assert [b["a"].tolist() for b in leading_rows(batches, 6)] == [[0, 1, 2], [0, 1], [0]]
    assert leading_rows(batches, 0) == []


# --- attention over overlapping patches


@pytest.mark.parametrize("stride", [4, 2, (3, 1)])
@pytest.mark.parametrize("frames", [4, 9, 40, 72])
def test_a_place_has_the_mean_weight_of_the_patches_that_see_it(stride: Any, frames: int) -> None:
    network = AST(config(stride=stride, max_frames=50))
    rows, columns = network.config.grid[0], network.columns(frames)
    weights = torch.rand(3, rows, columns)
    got = over_frames(weights, network.config, frames)
    assert got.shape == (3, MELS, frames)
    time, mel = network.config.steps
    for low in range(MELS):
        for frame in range(frames):
            seeing = [
                weights[:, row, column]
                for row in range(rows)
                for column in range(columns)
                if row * mel <= low < row * mel + 4 and column * time <= frame < column * time + 4
            ]
            want = torch.stack(seeing).mean(dim=0) if seeing else torch.zeros(3)
            torch.testing.assert_close(got[:, MELS - 1 - low, frame], want)


@pytest.mark.parametrize("pool", ["cls", "distilled", "mean"])
@torch.no_grad()
def test_maps_are_of_what_the_head_reads(pool: Any) -> None:
    torch.manual_seed(0)
    network = AST(config(pool=pool)).eval()
    nn.init.normal_(network.pos_embed)
    clip = torch.randn(2, 20, MELS)
    maps = attention_maps(network, clip, 1)
    attention = network.forward_features(clip, return_attention=True).attention
    assert attention is not None
    prefix, rows, columns = network.num_prefix_tokens, 2, network.columns(20)
    assert maps.shape == (2, 2, rows, columns)
    readers = range(prefix) if pool != "mean" else range(prefix + rows * columns)
    for number, weights in enumerate((attention_rollout(attention), attention[-1][:, 0])):
        for row in range(rows):
            for column in range(columns):
                to_patch = weights[:, :, prefix + row * columns + column]
                want = sum(to_patch[:, n] for n in readers) / len(readers)
                torch.testing.assert_close(maps[:, number, row, column], want)
    assert to_patches(torch.rand(1, 1, maps[0, 0].numel() + prefix, maps[0, 0].numel() + prefix), network).ndim == 4


# --- errors


def test_other_objectives_and_networks() -> None:
    module: Any = SimpleNamespace(network=nn.Linear(1, 1))
    trainer: Any = None
    with pytest.raises(TrunklineError, match="ClassificationReport needs an objective with classes, but SimpleNamesp"):
        ClassificationReport().setup(trainer, module, "fit")
    with pytest.raises(TrunklineError, match="AttentionMaps needs a ViT or AST, but the network is a Linear; leave"):
        AttentionMaps().setup(trainer, module, "fit")
    with torch.device("meta"):
        module = AudioClassifier(config())
    ClassificationReport().setup(trainer, module, "fit")
    AttentionMaps().setup(trainer, module, "fit")
