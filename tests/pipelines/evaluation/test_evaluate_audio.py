"""`trunkline evaluate` on recordings: error rates and scores by hand, the choice of the rows, bad input."""

import inspect
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_recognizer import (
    CLASSES,
    LOG_MEL,
    NORMALISED,
    random_classifier,
    save_classifier,
    save_language_model,
    save_recognizer,
    save_writer,
    tones,
    write_wav,
)
from tiny_translator import save as save_translator

from trunkline import TrunklineError
from trunkline.datamodules import AudioData, ImageData, SpeechData
from trunkline.datamodules.splits import split_of
from trunkline.pipelines.cli import main
from trunkline.pipelines.evaluation.data import with_data_class
from trunkline.pipelines.evaluation.evaluate import evaluate

OWN = inspect.signature(evaluate).parameters
SAID = ["abc fed", "deaf", "a bad cab", "fed", "cab fed abba deaf cab bad", "bed", "dad", "a", "be", "ace"]
WRITTEN = ["Abc, fed!", "deaf", "a bad cap", "fed", "cab fed abba deaf cab bad", "bed dab", "dad", "a", "be", "ace"]
"""Transcripts: once normalised, two of them are wrong, by a letter and by a word."""


def speech(folder: Path, **cells: Any) -> str:
    """A list of recordings with transcripts."""
    rows = []
    for number, (said, text) in enumerate(zip(SAID, WRITTEN, strict=True)):
        write_wav(folder / f"{number}.wav", tones(said))
        rows.append({"path": f"{number}.wav", "text": text, **cells})
    return write_rows(folder / "rows.jsonl", rows)


def write_rows(file: Path, rows: list[dict[str, Any]]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def judge(checkpoint: str, kind: Any, source: str, folder: Path, **options: Any) -> dict[str, Any]:
    """What `evaluate` writes. Options may be fields of the data."""
    fields = {name: value for name, value in options.items() if name not in OWN}
    own = {name: value for name, value in options.items() if name in OWN}
    output = folder / "out.json"
    evaluate(checkpoint, kind(source, num_workers=0, **fields), output=str(output), device="cpu", **own)
    found: dict[str, Any] = json.loads(output.read_text())
    return found


def values(found: dict[str, Any], task: str) -> dict[str, float]:
    return {name: figure["value"] for name, figure in found[task].items()}


# --- speech


@pytest.mark.parametrize("batch_size", [1, 4])
def test_error_rates(tmp_path: Path, batch_size: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Edits over all rows; transcripts are normalised as in training; one recording is longer than those there."""
    path = speech(tmp_path)
    found = judge(save_recognizer(tmp_path), SpeechData, path, tmp_path, batch_size=batch_size)
    words, letters = sum(len(text.split()) for text in WRITTEN), sum(len(text) for text in WRITTEN) - 2
    # "cap" is heard as "cab"; the second word of "bed dab" is not said
    assert values(found, "transcription") == pytest.approx({"wer": 2 / words, "cer": 5 / letters, "exact": 0.8})
    assert {name: found[name] for name in ("source", "split", "recordings")} == {
        "source": path,
        "split": "all",
        "recordings": 10,
    }
    assert "10 recordings" in " ".join(capsys.readouterr().out.split())


def test_splits(tmp_path: Path) -> None:
    """Of the source of training, the rows that were set aside there; a split that is named; rows that are left out."""
    path = speech(tmp_path)
    checkpoint = save_recognizer(tmp_path, change=lambda c: c["SpeechData"].update(source=path))
    found = judge(checkpoint, SpeechData, path, tmp_path)
    chosen = [n for n in range(10) if split_of(n, {"train": 0.75, "val": 0.25}) == "val"]
    assert (found["split"], found["recordings"]) == ("val", len(chosen))
    other = judge(checkpoint, SpeechData, path, tmp_path, split="train", val_fraction=0.5)
    assert other["recordings"] == sum(split_of(n, {"train": 0.5, "val": 0.5}) == "train" for n in range(10))
    assert judge(checkpoint, SpeechData, path, tmp_path, split="all")["recordings"] == 10
    plain = save_recognizer(tmp_path)
    assert judge(plain, SpeechData, path, tmp_path, test_fraction=0.3)["split"] == "test"
    assert judge(plain, SpeechData, path, tmp_path, split="val")["split"] == "val"
    (tmp_path / "more").mkdir()
    named = judge(plain, SpeechData, path, tmp_path, split="val", val_source=speech(tmp_path / "more"))
    assert (named["source"], named["recordings"]) == (str(tmp_path / "more" / "rows.jsonl"), 10)
    with pytest.raises(TrunklineError, match=r"has no test split, only train, val; set test_fraction, name a") as error:
        judge(plain, SpeechData, path, tmp_path, split="test")
    assert error.value.field == "split"
    whole = save_recognizer(
        tmp_path, change=lambda c: c["SpeechData"].update(source=path, fractions={"val": 0.0, "test": 0.0})
    )
    with pytest.raises(TrunklineError, match=r"was trained on all recordings .*; give recordings that it has not"):
        judge(whole, SpeechData, path, tmp_path)


def test_recordings_that_cannot_be_read(tmp_path: Path) -> None:
    path = speech(tmp_path, **{"class": "bell"})
    (tmp_path / "3.wav").write_bytes(b"no sound")
    checkpoint = save_recognizer(tmp_path)
    with pytest.raises(TrunklineError, match=r"rows\.jsonl:4"):
        judge(checkpoint, SpeechData, path, tmp_path)
    with pytest.warns(UserWarning, match="1 recordings"):
        found = judge(checkpoint, SpeechData, path, tmp_path, skip_corrupt=True)
    assert found["recordings"] == 9
    for number in range(10):  # what proves to be broken when it is heard
        write_wav(tmp_path / f"{number}.wav", np.zeros(800, np.float32))
    for kind, save, column in (
        (SpeechData, save_recognizer, {}),
        (AudioData, save_classifier, {"label_column": "class"}),
    ):
        with (
            pytest.warns(UserWarning, match="it is silent"),
            pytest.raises(TrunklineError, match=r"none of the recordings of .* can be read; give others"),
        ):
            judge(save(tmp_path), kind, path, tmp_path, split="all", skip_corrupt=True, **column)


def test_beams_and_language_models(tmp_path: Path) -> None:
    """The tones are so clear that they change nothing, but a strong language model does."""
    path, checkpoint = speech(tmp_path), save_recognizer(tmp_path)
    plain = values(judge(checkpoint, SpeechData, path, tmp_path), "transcription")
    assert values(judge(checkpoint, SpeechData, path, tmp_path, num_beams=4), "transcription") == plain
    model = save_language_model(tmp_path)
    options = {"language_model": model, "lm_weight": 30.0, "num_beams": 3}
    assert values(judge(checkpoint, SpeechData, path, tmp_path, **options), "transcription") != plain


def test_an_encoder_decoder(tmp_path: Path) -> None:
    """Its random texts are mostly wrong, but counted."""
    path = speech(tmp_path)
    found = judge(save_writer(tmp_path), SpeechData, path, tmp_path, split="all", num_beams=2)
    assert values(found, "transcription")["exact"] < 0.5 < values(found, "transcription")["wer"]
    assert found["recordings"] == 10


# --- classes


def sounds(folder: Path, labels: list[Any]) -> str:
    rows = []
    for number, (text, own) in enumerate(zip(SAID, labels, strict=True)):
        write_wav(folder / f"{number}.wav", tones(text))
        rows.append({"path": f"{number}.wav", "label": own})
    return write_rows(folder / "rows.jsonl", rows)


@torch.no_grad()
def probability(text: str, several: bool = False) -> torch.Tensor:
    """(K,) of a recording: the mean of its windows of two seconds, which overlap by a third."""
    waveform, size = torch.from_numpy(tones(text)), LOG_MEL.max_samples
    stride = size - 2 * (size // 6 // LOG_MEL.hop * LOG_MEL.hop)
    parts = (
        [waveform]
        if len(waveform) <= size
        else [waveform[:size], waveform[stride : stride + size], waveform[2 * stride :]]
    )
    found = torch.cat([random_classifier()(NORMALISED.features(part)[None]) for part in parts])
    return (found.sigmoid() if several else found.softmax(dim=1)).mean(dim=0)


def test_accuracy(tmp_path: Path) -> None:
    """Seven of ten are right, and one more is among the first five; the chance is that of a guess."""
    ranks = [probability(text).argsort(descending=True).tolist() for text in SAID]
    places = [-1 if n in (2, 6) else 2 if n == 7 else 0 for n in range(10)]  # of the right class
    path = sounds(tmp_path, [CLASSES[own[place]] for own, place in zip(ranks, places, strict=True)])
    found = judge(save_classifier(tmp_path), AudioData, path, tmp_path, split="all", batch_size=3)
    assert found["recordings"] == 10
    assert found["classification"] == {
        "acc": {"value": pytest.approx(0.7), "chance": pytest.approx(1 / 7)},
        "acc_top5": {"value": pytest.approx(0.8), "chance": pytest.approx(5 / 7)},
    }


def test_mean_average_precision(tmp_path: Path) -> None:
    """By the definition: the mean, over the classes that occur, of the precision at each right row."""
    labels = [CLASSES[n % 3 : n % 3 + 1 + n % 2] for n in range(10)]
    labels[5] = []  # so that three classes occur
    path = sounds(tmp_path, labels)
    found = judge(save_classifier(tmp_path, several=True), AudioData, path, tmp_path, split="all")
    scores = torch.stack([probability(text, several=True) for text in SAID])
    precisions = []
    for number, name in enumerate(CLASSES[:3]):
        right = torch.tensor([name in own for own in labels])[scores[:, number].argsort(descending=True)]
        places = right.nonzero()[:, 0] + 1
        precisions.append(float((torch.arange(1, len(places) + 1) / places).mean()))
    figure = found["classification"]["mAP"]
    assert figure["value"] == pytest.approx(sum(precisions) / 3, abs=1e-5)
    assert figure["chance"] == pytest.approx(sum(map(len, labels)) / 30)


# --- the class of the data, and bad input


def test_the_class_of_the_data_follows_from_the_checkpoint(tmp_path: Path) -> None:
    for save, name in (
        (save_recognizer, "SpeechData"),
        (save_writer, "SpeechData"),
        (save_classifier, "AudioData"),
        (save_translator, "TranslationData"),
    ):
        given = ["--checkpoint", save(tmp_path), "--data.source", "spoken_digits:accent"]
        assert with_data_class(given) == ["--data", name, *given]
        assert with_data_class([*given, "--data", "ImageData"]) == [*given, "--data", "ImageData"]
    for what, name in (("transcription", "SpeechData"), ("classification", "AudioData"), ("knn", "ImageData")):
        given = ["--checkpoint", "nowhere.ckpt", "--data.source", "a.jsonl", "--what", what]
        assert with_data_class(given) == ["--data", name, *given]


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["trunkline"])
    path, output = speech(tmp_path), tmp_path / "a.json"
    given = ["evaluate", "--checkpoint", save_recognizer(tmp_path), "--data.source", path, "--device", "cpu"]
    main([*given, "--output", str(output), "--data.num_workers=0"])
    assert json.loads(output.read_text())["recordings"] == 10
    capsys.readouterr()
    for options, message, flag in (
        (["--data.log_mel.num_mels=40"], "log_mel.num_mels=40 does not apply: sounds are", "--data.log_mel.num_mels"),
        (["--data.tokenizer=bpe"], "tokenizer=bpe does not apply: texts are prepared as", "--data.tokenizer"),
        (["--lm_weight=0.5"], "lm_weight is the weight of a language model", "--lm_weight"),
        (["--split=test"], "has no test split, only train, val", "--split"),
        (["--data.batch_size=0"], "batch_size must be at least 1, not 0", "--data.batch_size"),
        (["--data.text_column=words"], "words", "--data.text_column"),
    ):
        with pytest.raises(SystemExit):
            main([*given, *options])
        said, _, place = capsys.readouterr().err.strip().rpartition("\n")
        assert message in " ".join(said.split())
        assert place == f"  ({flag})"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokenizer": "bpe"}, "tokenizer=bpe does not apply: texts are prepared as in the network's training"),
        ({"vocab_size": 40}, "vocab_size=40 does not apply"),
        ({"form": "decoder"}, "form=decoder does not apply: transcripts are prepared as in"),
        ({"log_mel": replace(LOG_MEL, num_mels=40)}, "log_mel.num_mels=40 does not apply: sounds are prepared as in"),
        ({"what": "knn"}, "--what knn is for ImageData, but .* is read as SpeechData, which is measured by transc"),
        ({"k": 3}, "--k is for knn, but .* is measured by transcription; leave it out"),
        ({"length_penalty": 0.5}, "--length_penalty is for translation, but"),
        ({"batch_size": 0}, "batch_size must be at least 1, not 0"),
    ],
)
def test_bad_input(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(TrunklineError, match=message):
        judge(save_recognizer(tmp_path), SpeechData, speech(tmp_path), tmp_path, **options)


def test_fields_of_training_may_be_repeated(tmp_path: Path) -> None:
    found = judge(save_recognizer(tmp_path), SpeechData, speech(tmp_path), tmp_path, log_mel=LOG_MEL, too_long="skip")
    assert found["recordings"] == 10


def test_labels_that_do_not_suit(tmp_path: Path) -> None:
    checkpoint = save_classifier(tmp_path)
    path = sounds(tmp_path, ["bell"] * 9 + ["horse"])
    with pytest.raises(
        TrunklineError, match=r"rows\.jsonl:10.* has the label 'horse', which the network does not know"
    ):
        judge(checkpoint, AudioData, path, tmp_path, split="all")
    path = sounds(tmp_path, [["bell"]] * 9 + [["bell", "cat"]])
    with pytest.raises(
        TrunklineError, match=r"rows\.jsonl:10.* has 2 labels, but the network gives each recording one"
    ):
        judge(checkpoint, AudioData, path, tmp_path, split="all")
    with pytest.raises(TrunklineError, match="multi_label=True does not apply: sounds are prepared as in"):
        judge(checkpoint, AudioData, path, tmp_path, multi_label=True)
    with pytest.raises(
        TrunklineError, match=r"--num_beams is for translation and transcription, but .* classification"
    ):
        judge(checkpoint, AudioData, path, tmp_path, num_beams=2)
    path = sounds(tmp_path, [[]] * 10)
    with pytest.raises(TrunklineError, match="none of the recordings has a label; give some that have"):
        judge(save_classifier(tmp_path, several=True), AudioData, path, tmp_path, split="all")


def test_data_and_networks_of_other_kinds(tmp_path: Path) -> None:
    path = speech(tmp_path)
    with pytest.raises(TrunklineError, match="is no checkpoint of SpeechRecognizer or SpeechToText, but of AudioClass"):
        judge(save_classifier(tmp_path), SpeechData, path, tmp_path)
    with pytest.raises(TrunklineError, match="is no checkpoint of AudioClassifier, but of SpeechRecognizer"):
        judge(save_recognizer(tmp_path), AudioData, path, tmp_path, label_column="text")
    with pytest.raises(TrunklineError, match="of ContrastiveImageText or ImageClassifier, but of SpeechRecognizer"):
        evaluate(save_recognizer(tmp_path), ImageData("digits"), device="cpu")
