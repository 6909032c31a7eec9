"""`trunkline predict --audio` and `trunkline embed --audio`: equal to the networks by hand; long clips, bad input."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from tiny_recognizer import (
    CLASSES,
    FIXED,
    LOG_MEL,
    NORMALISED,
    RATE,
    random_classifier,
    random_recognizer,
    random_writer,
    save_classifier,
    save_recognizer,
    save_writer,
    tones,
    write_wav,
)
from torch import Tensor

from trunkline import TrunklineError
from trunkline.datamodules.audio.log_mel import LogMel
from trunkline.pipelines.cli import main
from trunkline.pipelines.commands.embed import embed
from trunkline.pipelines.commands.embed_audio import small_spectrogram
from trunkline.pipelines.commands.predict import predict

TEXTS = ["abc fed", "fed cab", "a", "f f f f", "bb"]
LONG = "bad cab a " * 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sounds")
    for number, text in enumerate([*TEXTS, LONG]):
        write_wav(folder / f"{number}.wav", tones(text))
    return folder


def windows(text: str, log_mel: LogMel) -> list[Tensor]:
    """The features (1, T, M) of the windows of a recording, which are two seconds long and overlap by a third."""
    waveform = torch.from_numpy(tones(text))
    size, unit = log_mel.max_samples, log_mel.hop
    stride = size - 2 * (size // 6 // unit * unit)
    starts = [0]
    while starts[-1] + size < len(waveform):
        starts.append(starts[-1] + stride)
    return [log_mel.features(waveform[start : start + size])[None] for start in starts]


@torch.no_grad()
def by_hand(text: str, several: bool = False) -> Tensor:
    """Probabilities (K,): the mean of the windows, each heard alone."""
    network = random_classifier()
    logits = torch.cat([network(features) for features in windows(text, NORMALISED)])
    return (logits.sigmoid() if several else logits.softmax(dim=1)).mean(dim=0)


def run(checkpoint: str, audio: object, folder: Path, **options: Any) -> pd.DataFrame:
    output = folder / "out.csv"
    predict(checkpoint, audio=str(audio), output=str(output), **{"accelerator": "cpu", **options})
    return pd.read_csv(output)


# --- predict


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_one_label(folder: Path, tmp_path: Path, batch_size: int) -> None:
    """Recordings of all lengths, in the order of their names."""
    found = run(save_classifier(tmp_path), folder, tmp_path, batch_size=batch_size)
    want = [by_hand(text) for text in [*TEXTS, LONG]]
    assert [*found.columns] == ["path", "label", "probability"]
    assert [*found.path] == [f"{folder}/{number}.wav" for number in range(6)]
    assert [*found.label] == [CLASSES[int(own.argmax())] for own in want]
    assert [*found.probability] == pytest.approx([float(own.max()) for own in want], abs=1e-5)
    assert found.label.nunique() > 1
    assert len(windows(LONG, NORMALISED)) > 5


def test_several_labels(folder: Path, tmp_path: Path) -> None:
    """A row for each label that is likely enough, the likeliest first; a row without a label if none is."""
    checkpoint = save_classifier(tmp_path, several=True)
    for threshold in (None, 0.3, 0.75, 0.99):
        found = run(checkpoint, folder, tmp_path, threshold=threshold)
        want: list[tuple[str, str, float]] = []
        for number, text in enumerate([*TEXTS, LONG]):
            own = by_hand(text, several=True)
            order = [n for n in own.argsort(descending=True).tolist() if own[n] >= (threshold or 0.5)]
            path = f"{folder}/{number}.wav"
            want += [(path, CLASSES[n], float(own[n])) for n in order] or [(path, "", np.nan)]
        assert [*found.path] == [path for path, _, _ in want]
        assert [*found.label.fillna("")] == [label for _, label, _ in want]
        assert [*found.probability] == pytest.approx([value for _, _, value in want], abs=1e-5, nan_ok=True)
    assert found.label.isna().any()


def test_command_line(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["trunkline"])
    given = ["--checkpoint", save_classifier(tmp_path), "--audio", str(folder / "0.wav"), "--accelerator=cpu"]
    main(["predict", *given, "--output", str(tmp_path / "a.parquet"), "--skip_corrupt"])
    found = pd.read_parquet(tmp_path / "a.parquet")
    assert found.label[0] == CLASSES[int(by_hand(TEXTS[0]).argmax())]


def test_recordings_that_cannot_be_read(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They are named, counted, and have no label, in their place in the table."""
    sounds = tmp_path / "s"
    write_wav(sounds / "a.wav", np.zeros(RATE, np.float32))
    write_wav(sounds / "c.wav", tones("abc fed"))
    (sounds / "b.wav").write_bytes(b"no sound")
    path = save_classifier(tmp_path)
    with pytest.raises(TrunklineError, match=r"cannot read the recording .*b\.wav"):
        run(path, sounds, tmp_path)
    with pytest.raises(TrunklineError, match=r"cannot read the recording .*a\.wav: it is silent"):
        run(path, sounds / "a.wav", tmp_path)
    assert not (tmp_path / "out.csv").exists()
    with pytest.warns(UserWarning, match=r"skipped: cannot read the recording .*a\.wav"):
        found = run(path, sounds, tmp_path, skip_corrupt=True)
    assert [*found.path] == [f"{sounds}/{name}.wav" for name in "abc"]
    assert [*found.label.isna()] == [True, True, False]
    assert found.probability[2] == pytest.approx(float(by_hand("abc fed").max()), abs=1e-5)
    assert "2 recordings cannot be read; their labels are empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"audio": "nowhere"}, "nowhere: there is no such file or folder; fix the path"),
        ({"images": "a"}, "needs --images FOLDER, --audio FOLDER or --texts FILE, not --images and --audio"),
        ({"audio": None}, "needs --images FOLDER, --audio FOLDER or --texts FILE, not none of them"),
        ({"threshold": 0.5}, "--threshold 0.5 is for clips with several labels, but .* gives each clip one; leave it"),
        ({"audio": None, "images": "a", "threshold": 0.5}, "--threshold 0.5 is for --audio; leave it out"),
        ({"output": "a.txt"}, r"--output a\.txt must be a"),
        ({"output": "a.conll"}, r"--output a\.conll: only tags can be written"),
        ({"audio": None, "images": "a"}, "is no checkpoint of ImageClassifier, but of AudioClassifier"),
        ({"audio": None, "texts": "a"}, "or TokenClassifier, but of AudioClassifier"),
    ],
)
def test_bad_options(folder: Path, tmp_path: Path, options: Any, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_classifier(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TrunklineError, match=message):
        predict(path, **{"audio": str(folder), "accelerator": "cpu", **options})
    assert {file.name for file in tmp_path.iterdir()} == {"a.ckpt"}


@pytest.mark.parametrize("threshold", [0.0, 1.5, -1.0])
def test_thresholds_that_are_no_probabilities(folder: Path, tmp_path: Path, threshold: float) -> None:
    with pytest.raises(TrunklineError, match="--threshold must be above 0 and at most 1, not"):
        run(save_classifier(tmp_path, several=True), folder, tmp_path, threshold=threshold)


def test_checkpoints_that_do_not_suit(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(TrunklineError, match="is no checkpoint of AudioClassifier, but of SpeechRecognizer"):
        run(save_recognizer(tmp_path), folder, tmp_path)
    bare = save_classifier(tmp_path, change=lambda content: content.pop("AudioData"))
    with pytest.raises(TrunklineError, match="was trained without AudioData, so how to prepare its inputs is not"):
        run(bare, folder, tmp_path)


# --- embed


@torch.no_grad()
def embedded(kind: str, text: str) -> Tensor:
    """(D,) the mean of the windows, each heard alone, of the states of real frames."""
    found = []
    if kind == "classifier":
        classifier = random_classifier()
        states = [classifier.forward_features(features) for features in windows(text, NORMALISED)]
        found = [classifier.forward_head(own, pre_logits=True)[0] for own in states]
    elif kind == "recognizer":
        recognizer = random_recognizer()
        found = [recognizer.encode(features).x[0].mean(dim=0) for features in windows(text, LOG_MEL)]
    else:
        writer = random_writer()
        for padded, own in zip(windows(text, FIXED), windows(text, LOG_MEL), strict=True):
            found.append(writer.encode(padded).x[0, : -(-own.shape[1] // 2)].mean(dim=0))
    return torch.stack(found).mean(dim=0)


@pytest.mark.parametrize(
    ("kind", "save"), [("classifier", save_classifier), ("recognizer", save_recognizer), ("writer", save_writer)]
)
@pytest.mark.parametrize("normalise", [True, False])
def test_embeddings_are_those_of_the_networks(
    kind: str, save: Any, normalise: bool, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of each recording as if it were alone, in float32."""
    path = save(tmp_path, random_recognizer()) if kind == "recognizer" else save(tmp_path)
    output = tmp_path / "a.parquet"
    embed(path, audio=str(folder), output=str(output), normalise=normalise, batch_size=4, device="cpu")
    assert capsys.readouterr().out == f"wrote 6 embeddings of 32 numbers to {output}\n"
    table = pd.read_parquet(output)
    assert [*table.columns] == ["path", "embedding"]
    assert [*table.path] == [f"{folder}/{number}.wav" for number in range(6)]
    for text, vector in zip([*TEXTS, LONG], table.embedding, strict=True):
        want = embedded(kind, text)
        want = want / want.norm() if normalise else want
        torch.testing.assert_close(torch.tensor(vector), want, rtol=0, atol=1e-5)


def test_the_projector_and_recordings_that_are_left_out(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sounds = tmp_path / "s"
    write_wav(sounds / "a.wav", tones("abc fed"))
    write_wav(sounds / "c.wav", tones("fed cab"))
    (sounds / "b.wav").write_bytes(b"no sound")
    path, output = save_classifier(tmp_path), tmp_path / "a.parquet"
    options: dict[str, Any] = {"output": str(output), "device": "cpu"}
    with pytest.raises(TrunklineError, match=r"cannot read the recording .*b\.wav"):
        embed(path, audio=str(sounds), **options)
    embed(path, audio=str(sounds), skip_corrupt=True, projector=str(tmp_path / "p"), **options)
    assert "skipped 1 of 3 recordings, which cannot be read" in capsys.readouterr().out
    assert [*pd.read_parquet(output).path] == [f"{sounds}/a.wav", f"{sounds}/c.wav"]
    (metadata,) = (tmp_path / "p").rglob("metadata.tsv")
    assert metadata.read_text().split() == [f"{sounds}/a.wav", f"{sounds}/c.wav"]
    assert (metadata.parent / "sprite.png").is_file()
    assert "sounds" in str(metadata)


def test_a_small_spectrogram() -> None:
    """Time to the right, frequency upwards: a tone that rises, then padding that is left out."""
    features = torch.full((100, 12), -5.0)
    features[:20, 0] = features[20:40, 11] = 3.0
    picture = np.asarray(small_spectrogram({"features": features, "frames": 40})).astype(int).sum(axis=2)
    assert picture.shape == (32, 32)
    bright = picture > (picture.max() + picture.min()) / 2
    assert bright[-2:, :15].all()
    assert bright[:2, 17:].all()
    assert not bright[:, :15][:20].any()
    assert not bright[:, 17:][12:].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"audio": None}, "there is nothing to embed; give --texts, --images or both, or --audio"),
        ({"audio": None, "images": "a"}, r"the network of .* hears, and embeds only sounds; give --audio alone"),
        ({"texts": "a.txt"}, "hears, and embeds only sounds; give --audio alone"),
        ({"pool": "last"}, "--pool and --tokenizer are for language models; leave them out"),
        ({"tokenizer": "x.json"}, "--pool and --tokenizer are for language models; leave them out"),
        ({"audio": "nowhere"}, "nowhere: there is no such file or folder"),
        ({"batch_size": 0}, "batch_size must be at least 1, not 0"),
        ({"output": "a.csv"}, r"--output a\.csv must be a \.parquet file"),
    ],
)
def test_bad_options_of_embed(folder: Path, tmp_path: Path, options: Any, message: str) -> None:
    with pytest.raises(TrunklineError, match=message):
        embed(save_classifier(tmp_path), **{"audio": str(folder), "device": "cpu", **options})
