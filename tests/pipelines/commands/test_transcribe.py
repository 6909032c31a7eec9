"""`trunkline transcribe` with CTC: texts and times of tones that are known, windows, language models, bad input."""

import json
import sys
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from tiny_recognizer import (
    LOG_MEL,
    PAUSE,
    RATE,
    STEP,
    TONE,
    alphabet,
    random_recognizer,
    save_language_model,
    save_recognizer,
    speller,
    tones,
    write_wav,
)
from tokenizers import Tokenizer

from trunkline import TrunklineError
from trunkline.datamodules.tokenizers import train_bpe, train_chars, train_wordpiece
from trunkline.modules.generation.ctc import ctc_greedy
from trunkline.modules.generation.ctc_beams import CTCDecoding, LanguageModel, ctc_texts
from trunkline.pipelines import transcribing
from trunkline.pipelines.cli import main
from trunkline.pipelines.commands.transcribe import transcribe
from trunkline.pipelines.recordings import AudioWindows, open_recordings
from trunkline.pipelines.trained import Trained
from trunkline.pipelines.transcribing import (
    CTCTranscriber,
    SpeechOptions,
    SpokenToken,
    timed_words,
    transcribe_recordings,
)

TEXTS = ["abc fed", "deaf", "a bad cab fed abba", "fa"]
LONG = "abc fed deaf bad cab a " * 6 + "fade"
FEW = {"num_mels": LOG_MEL.num_mels}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_recognizer(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Recordings of `TEXTS`, and one that is longer than those of training."""
    folder = tmp_path_factory.mktemp("sounds")
    for number, text in enumerate([*TEXTS, LONG]):
        write_wav(folder / f"{number}.wav", tones(text))
    return folder


def run(checkpoint: str, *audio: object, **options: Any) -> None:
    transcribe(checkpoint, [str(own) for own in audio], **{"device": "cpu", **options})


def transcriber(checkpoint: str, **options: Any) -> CTCTranscriber:
    return CTCTranscriber(
        Trained.read(checkpoint, "transcribe"), torch.device("cpu"), "float32", SpeechOptions(**options)
    )


# --- texts


def test_one_file_several_and_a_folder(checkpoint: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(checkpoint, folder / "0.wav")
    captured = capsys.readouterr()
    assert captured.out == "abc fed\n"
    assert captured.err == ""
    run(checkpoint, folder / "3.wav", folder / "0.wav")
    assert capsys.readouterr().out == f"{folder}/3.wav\tfa\n{folder}/0.wav\tabc fed\n"
    run(checkpoint, folder)
    lines = [f"{folder}/{number}.wav\t{text}\n" for number, text in enumerate([*TEXTS, LONG])]
    assert capsys.readouterr().out == "".join(lines)


def test_command_line(
    checkpoint: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files follow the command; a flag for yes or no needs no value."""
    monkeypatch.setattr(sys, "argv", ["trunkline"])
    given = ["--checkpoint", checkpoint, "--device=cpu"]
    main(["transcribe", str(folder / "3.wav"), *given])
    assert capsys.readouterr().out == "fa\n"
    main(["transcribe", str(folder / "3.wav"), str(folder / "1.wav"), "--skip_corrupt", *given])
    assert capsys.readouterr().out == f"{folder}/3.wav\tfa\n{folder}/1.wav\tdeaf\n"
    for flag in (["--timestamps"], ["--timestamps", "true"], ["--timestamps=true"]):
        main(["transcribe", str(folder / "3.wav"), *given, *flag])
        assert capsys.readouterr().out.split("\t")[2] == "fa\n"
    main(["transcribe", "--audio", str(folder / "3.wav"), "--timestamps", "false", *given])
    assert capsys.readouterr().out == "fa\n"
    main(["transcribe", "--help"])
    assert "--language_model" in capsys.readouterr().out


def test_recordings_by_somebody_else(checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Another rate, several channels, other formats."""
    text = tones("bad cab")
    twice = np.interp(np.arange(2 * len(text)) / 2, np.arange(len(text)), text).astype(np.float32)
    write_wav(tmp_path / "a.flac", np.stack([twice, twice], axis=1), 2 * RATE, "PCM_16")
    write_wav(tmp_path / "b.ogg", text, subtype="VORBIS")
    run(checkpoint, tmp_path)
    assert [line.partition("\t")[2] for line in capsys.readouterr().out.splitlines()] == ["bad cab", "bad cab"]


def test_files_of_texts(checkpoint: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    want = [(f"{folder}/{number}.wav", text) for number, text in enumerate([*TEXTS, LONG])]
    for suffix in ("txt", "csv", "jsonl", "parquet"):
        run(checkpoint, folder, output=str(tmp_path / f"a.{suffix}"))
        assert capsys.readouterr().out == f"wrote 5 transcripts to {tmp_path}/a.{suffix}\n"
    assert (tmp_path / "a.txt").read_text() == "".join(f"{path}\t{text}\n" for path, text in want)
    for table in (
        pd.read_csv(tmp_path / "a.csv"),
        pd.read_parquet(tmp_path / "a.parquet"),
        pd.read_json(tmp_path / "a.jsonl", lines=True),
    ):
        assert [*table.columns] == ["path", "text"]
        assert list(table.itertuples(index=False, name=None)) == want
    run(checkpoint, folder / "0.wav", output=str(tmp_path / "one.txt"))
    assert (tmp_path / "one.txt").read_text() == "abc fed\n"


def test_nothing_is_half_written(
    checkpoint: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "a.csv"
    output.write_text("before\n")

    def broken(*arguments: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(CTCTranscriber, "transcript", broken)
    with pytest.raises(KeyboardInterrupt):
        run(checkpoint, folder, output=str(output))
    assert output.read_text() == "before\n"
    assert [*tmp_path.iterdir()] == [output]


# --- batches and windows


def test_recordings_alone_and_together(tmp_path: Path) -> None:
    """The log-probabilities of a clip do not depend on the clips beside it, nor do the texts."""
    path = save_recognizer(tmp_path, random_recognizer())
    for number, seconds in enumerate((1.9, 0.3, 0.02, 1.1, 5.0)):
        write_wav(tmp_path / "s" / f"{number}.wav", tones(LONG, lead=0.0)[number : round(seconds * RATE)])
    rows = open_recordings([str(tmp_path / "s")], "audio")[0]
    listener = transcriber(path)
    data = AudioWindows(rows, listener.log_mel, listener.windowing)
    together = [own for batch in data.batches(64, 0, "hearing") for own in listener.log_probs(batch)]
    alone = [own for batch in data.batches(1, 0, "hearing") for own in listener.log_probs(batch)]
    for ours, right in zip(together, alone, strict=True):
        torch.testing.assert_close(ours, right, rtol=0, atol=1e-5)
    texts = [
        [own and own.text for own in transcribe_recordings(transcriber(path), rows, size)] for size in (1, 2, 3, 64)
    ]
    assert texts[0] == texts[1] == texts[2] == texts[3]
    assert len({*texts[0]}) == 5
    by_hand = ctc_greedy(
        *as_batch(random_recognizer()(LOG_MEL.features(torch.from_numpy(rows.waveform(0, RATE)))[None]))
    )
    assert texts[0][0] == alphabet().decode(by_hand[0])


def as_batch(log_probs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return log_probs, torch.tensor([log_probs.shape[1]])


@pytest.mark.parametrize("window", [None, 1.0, 0.5])
def test_windows_hear_what_the_whole_says(checkpoint: str, folder: Path, window: float | None) -> None:
    """The states of this network hear few frames, so that those of windows are those of the whole recording."""
    listener = transcriber(checkpoint, window=window)
    rows = open_recordings([str(folder / "4.wav")], "audio")[0]
    data = AudioWindows(rows, listener.log_mel, listener.windowing)
    assert len(data) > 10
    parts = [
        own[listener.windowing.kept(data.windows[int(number)])]
        for batch in data.batches(4, 0, "hearing")
        for number, own in zip(batch["index"], listener.log_probs(batch), strict=True)
    ]
    features = LOG_MEL.features(torch.from_numpy(tones(LONG)))
    with torch.no_grad():
        whole = speller(max_frames=len(features))(features[None]).log_softmax(dim=2)[0]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 5])
def test_long_recordings_are_decoded_in_pieces(
    checkpoint: str, folder: Path, batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Texts and times are those of the whole, and no more than a piece and a window is held at once."""
    rows = open_recordings([str(folder)], "audio")[0]
    whole = transcribe_recordings(transcriber(checkpoint, timestamps=True), rows, 3)
    monkeypatch.setattr(transcribing, "LONGEST_PIECE", 70)
    listener, held, decode = transcriber(checkpoint, timestamps=True), [0], CTCTranscriber.decode

    def watched(self: CTCTranscriber, pieces: Any) -> None:
        held.extend(len(own) for _, own in pieces)
        decode(self, pieces)

    monkeypatch.setattr(CTCTranscriber, "decode", watched)
    assert transcribe_recordings(listener, rows, batch_size) == whole
    window = listener.windowing.size // listener.windowing.unit
    assert 70 < max(held) <= 70 + window
    assert len(held) > len(rows) + 8
    assert not listener.waiting
    assert not listener.tokens


# --- times


def times(text: str, lead: float = 0.1) -> list[tuple[str, float, float]]:
    """Each word with the start of its first tone and the end of its last."""
    found, at = [], 0
    for word in text.split(" "):
        start = lead + at * (TONE + PAUSE)
        found.append((word, start, start + len(word) * (TONE + PAUSE) - PAUSE))
        at += len(word) + 1
    return found


@pytest.mark.parametrize("text", ["abc fed", "a bad cab fed abba", LONG])
@pytest.mark.parametrize("num_beams", [None, 4])
def test_words_have_the_times_of_their_tones(checkpoint: str, tmp_path: Path, text: str, num_beams: int | None) -> None:
    """Within the frames of a state and the window of a frame."""
    path = write_wav(tmp_path / "a.wav", tones(text))
    run(checkpoint, path, timestamps=True, num_beams=num_beams, output=str(tmp_path / "a.jsonl"))
    record = json.loads((tmp_path / "a.jsonl").read_text())
    assert record["text"] == text
    assert [word["word"] for word in record["words"]] == text.split()
    slack = STEP * LOG_MEL.frame_seconds + LOG_MEL.window_ms / 1000
    for word, (_, start, end) in zip(record["words"], times(text), strict=True):
        assert word["start"] == pytest.approx(start, abs=slack)
        assert word["end"] == pytest.approx(end, abs=slack)


def test_tables_of_words(checkpoint: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A row for each word; a list of words where a cell can hold one."""
    files = folder / "0.wav", folder / "3.wav"
    words = [(str(file), word) for file, text in zip(files, ("abc fed", "fa"), strict=True) for word in text.split()]
    run(checkpoint, *files, timestamps=True)
    printed = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [(path, word) for path, _, _, word in printed] == words
    for suffix in ("txt", "csv", "parquet"):
        run(checkpoint, *files, timestamps=True, output=str(tmp_path / f"a.{suffix}"))
    assert [line.split("\t") for line in (tmp_path / "a.txt").read_text().splitlines()] == printed
    table = pd.read_csv(tmp_path / "a.csv")
    assert [*table.columns] == ["path", "start", "end", "word"]
    assert list(zip(table.path, table.word, strict=True)) == words
    assert [f"{start:.2f}" for start in table.start] == [line[1] for line in printed]
    nested = pd.read_parquet(tmp_path / "a.parquet")
    assert [*nested.text] == ["abc fed", "fa"]
    assert [entry for own in nested.words for entry in own] == table.drop(columns="path")[
        ["word", "start", "end"]
    ].to_dict("records")
    write_wav(tmp_path / "noise.wav", np.linspace(0, 1e-12, RATE, dtype=np.float32))  # nothing is said
    run(checkpoint, tmp_path / "noise.wav", timestamps=True, output=str(tmp_path / "b.csv"))
    assert (tmp_path / "b.csv").read_text() == "path,start,end,word\n"


WORDS = ["the cat sat  on the mat", "caffè für 東京 alle", " it's a low-lying house"]


@pytest.mark.parametrize("tokenizer", [train_chars(WORDS, 0), train_bpe(WORDS, 300), train_wordpiece(WORDS, 90)])
@pytest.mark.parametrize("text", WORDS)
def test_words_of_any_tokenizer(tokenizer: Tokenizer, text: str) -> None:
    """The words are those of the text, and each has the time of its first and last token."""
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    tokens = [SpokenToken(token, 2 * place, 2 * place + 1) for place, token in enumerate(ids)]
    words = timed_words(tokens, tokenizer, 0.5)
    assert [word.word for word in words] == tokenizer.decode(ids).split()
    assert all(word.start < word.end for word in words)
    assert all(word.end < following.start for word, following in pairwise(words))
    assert words[-1].end == len(ids) - 0.5
    assert timed_words([], tokenizer, 0.5) == []


# --- beams and language models


def test_beams_and_language_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network = random_recognizer()
    path, model = save_recognizer(tmp_path, network), save_language_model(tmp_path)
    waveform = tones("fed cab")
    file = write_wav(tmp_path / "a.wav", waveform)
    with torch.no_grad():
        log_probs, lengths = as_batch(network(LOG_MEL.features(torch.from_numpy(waveform))[None]).log_softmax(dim=2))
    decoder: Any = Trained.read(model).network
    helper, found = LanguageModel(decoder, 0, 0), []
    for options, config, lm in (
        ({}, CTCDecoding(), None),
        ({"num_beams": 5}, CTCDecoding(5), None),
        ({"num_beams": 5, "length_bonus": 2.0}, CTCDecoding(5, length_bonus=2.0), None),
        ({"language_model": model}, CTCDecoding(10), helper),
        ({"language_model": model, "num_beams": 4, "lm_weight": 1.5}, CTCDecoding(4, 1.5), helper),
    ):
        run(path, file, **options)
        found.append(capsys.readouterr().out.removesuffix("\n"))
        assert found[-1] == " ".join(alphabet().decode(ctc_texts(log_probs, lengths, config, lm)[0]).split())
    assert len({*found}) >= 4


def test_the_decoding_of_the_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is given replaces it."""
    write_wav(tmp_path / "a.wav", tones("fed cab"))
    options: dict[str, Any]
    plain, texts = save_recognizer(tmp_path, random_recognizer()), []
    for options in ({"num_beams": 6, "length_bonus": 2.0}, {}):
        run(plain, tmp_path / "a.wav", **options)
        texts.append(capsys.readouterr().out)
    recipe = asdict(CTCDecoding(6, length_bonus=2.0))
    path = save_recognizer(
        tmp_path, random_recognizer(), change=lambda content: content["hyper_parameters"].update(decoding=recipe)
    )
    for options in ({}, {"num_beams": 1}):
        run(path, tmp_path / "a.wav", **options)
        assert capsys.readouterr().out == texts.pop(0)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_number_formats(checkpoint: str, folder: Path, capsys: pytest.CaptureFixture[str], dtype: Any) -> None:
    """The tones are so clear that rounding does not matter."""
    run(checkpoint, folder, dtype=dtype)
    assert [line.partition("\t")[2] for line in capsys.readouterr().out.splitlines()] == [*TEXTS, LONG]


# --- errors


def test_recordings_that_cannot_be_read(
    checkpoint: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those whose headers are broken, and those that prove to be broken when they are heard."""
    (tmp_path / "a.wav").write_bytes((folder / "0.wav").read_bytes())
    (tmp_path / "b.wav").write_bytes(b"no sound")
    write_wav(tmp_path / "c.wav", np.zeros(RATE, np.float32))
    output = tmp_path / "out.csv"
    with pytest.raises(TrunklineError, match=r"cannot read the recording .*b\.wav"):
        run(checkpoint, tmp_path, output=str(output))
    assert not output.exists()
    with pytest.raises(TrunklineError, match=r"cannot read the recording .*c\.wav: it is silent"):
        run(checkpoint, tmp_path / "c.wav")
    with pytest.warns(UserWarning, match=r"skipped: cannot read the recording .*c\.wav"):
        run(checkpoint, tmp_path, skip_corrupt=True)
    captured = capsys.readouterr()
    assert captured.out == f"{tmp_path}/a.wav\tabc fed\n"
    assert "skipped: cannot read the recording" in captured.err
    assert "b.wav" in captured.err
    assert captured.err.endswith("2 of 3 recordings cannot be read and are left out\n")


@pytest.mark.parametrize(
    ("options", "message", "field"),
    [
        ({"audio": []}, "there is nothing to transcribe; give audio files or folders", "audio"),
        ({"audio": "nowhere.wav"}, r"nowhere\.wav: there is no such file or folder; fix the path", "audio"),
        ({"output": "a.doc"}, r"--output a\.doc must be a \.txt, \.jsonl, \.csv or \.parquet file", None),
        ({"output": "nowhere/a.txt"}, "in a folder that exists", None),
        ({"batch_size": 0}, "batch_size must be at least 1, not 0", "batch_size"),
        ({"window": 3.0}, "a window of 3 seconds does not suit the network, which hears 0.24 to 2 seconds", "window"),
        ({"window": 0.0}, "a window of 0 seconds does not suit", "window"),
        ({"num_beams": 0}, "num_beams must be at least 1, not 0", None),
        ({"lm_weight": 0.3}, "lm_weight is the weight of a language model; give its checkpoint", "lm_weight"),
        ({"num_beams": 4, "lm_weight": 0.3}, "lm_weight is the weight of a language model", "lm_weight"),
        ({"length_bonus": 0.3}, "length_bonus helps to choose among beams; set num_beams above 1", "length_bonus"),
        ({"language_model": "x.ckpt", "num_beams": 1}, "language_model helps to choose among beams", "language_model"),
        ({"language_model": "nowhere.ckpt"}, "nowhere.ckpt", None),
        ({"compile": True}, "compile is for recognisers whose decoder writes the text, but .* with CTC", "compile"),
        ({"device": "gpu"}, "--device gpu cannot be used here", None),
    ],
)
def test_bad_options(
    checkpoint: str,
    folder: Path,
    options: Any,
    message: str,
    field: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TrunklineError, match=message) as error:
        transcribe(checkpoint, **{"audio": str(folder / "0.wav"), "device": "cpu", **options})
    assert field in (None, error.value.field)
    assert not list(tmp_path.iterdir())


def test_language_models_that_do_not_suit(checkpoint: str, folder: Path, tmp_path: Path) -> None:
    other = save_language_model(tmp_path, train_chars(["ABCabcdef "], 0))
    with pytest.raises(
        TrunklineError, match=r"lm\.ckpt has other tokens than the recogniser; train it with the rec"
    ) as e:
        run(checkpoint, folder / "0.wav", language_model=other)
    assert e.value.field == "language_model"
    with pytest.raises(TrunklineError, match="is no checkpoint of CausalLM, but of SpeechRecognizer"):
        run(checkpoint, folder / "0.wav", language_model=checkpoint)
    longer = alphabet()
    longer.add_tokens(["z"])
    run(checkpoint, folder / "0.wav", language_model=save_language_model(tmp_path, longer))  # more tokens are no fault


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(objective="CausalLM"), "is no checkpoint of .*SpeechRecognizer.*, but of CausalLM"),
        (lambda c: c.pop("SpeechData"), "was trained without SpeechData, so how to prepare its inputs is not known"),
        (lambda c: c["SpeechData"].pop("log_mel"), "was trained without SpeechData, so how to prepare"),
        (lambda c: c["SpeechData"].update(tokenizer=None), "holds no tokenizer; give a checkpoint that"),
        (lambda c: c["SpeechData"].update(tokenizer="{}"), "the tokenizer in .* is no tokenizer of"),
        (lambda c: c["state_dict"].popitem(), "do not fit its configuration"),
    ],
)
def test_bad_checkpoints(folder: Path, tmp_path: Path, change: Any, message: str) -> None:
    with pytest.raises(TrunklineError, match=message):
        run(save_recognizer(tmp_path, change=change), folder / "0.wav")


def test_clips_of_fixed_length(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The network hears the padding, as it did in training; long recordings are cut into windows as well."""
    path = save_recognizer(tmp_path, log_mel=replace(LOG_MEL, padding="fixed"))
    run(path, folder / "0.wav", folder / "4.wav")
    assert [line.partition("\t")[2] for line in capsys.readouterr().out.splitlines()] == ["abc fed", LONG]
