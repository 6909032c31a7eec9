"""`trunkline transcribe` with an encoder-decoder: texts by hand, one token at a time; the words of windows merged."""

from pathlib import Path
from typing import Any

import pytest
import torch
from compiled_steps import record_steps
from tiny_recognizer import (
    FIXED,
    LOG_MEL,
    alphabet,
    random_writer,
    save_writer,
    speech_state,
    tones,
    write_wav,
)

from trunkline import TrunklineError
from trunkline.modules.generation.beams import beam_search
from trunkline.modules.generation.decoding import GenerationConfig
from trunkline.pipelines.commands.transcribe import transcribe
from trunkline.pipelines.recordings import Windowing
from trunkline.pipelines.transcribing import joined_words

TEXTS = ["abc fed", "fed cab", "a", "bad", "ff ff", "a bad cab"]
END = 0


def run(checkpoint: str, *audio: object, **options: Any) -> None:
    transcribe(checkpoint, [str(own) for own in audio], **{"device": "cpu", **options})


@torch.no_grad()
def by_hand(features: torch.Tensor, start: tuple[int, ...] = (END,), longest: int = 14) -> str:
    """The likeliest tokens, each by a pass over the whole text so far."""
    network, ids = random_writer(), [*start]
    while len(ids) < longest + 1:
        best = int(network(features[None], torch.tensor([ids]))[0, -1].argmax())
        if best == END:
            break
        ids.append(best)
    return " ".join(alphabet().decode(ids[len(start) :]).split())


def printed(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line.rpartition("\t")[2] for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_texts_are_those_of_decoding_by_hand(
    tmp_path: Path, batch_size: int, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, text in enumerate(TEXTS):
        write_wav(tmp_path / "s" / f"{number}.wav", tones(text))
    run(save_writer(tmp_path), tmp_path / "s", batch_size=batch_size)
    want = [by_hand(FIXED.features(torch.from_numpy(tones(text)))) for text in TEXTS]
    assert printed(capsys) == want
    assert len({*want}) > 2
    assert any(want)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
@pytest.mark.parametrize(("clips", "graphs"), [(FIXED, 1), (LOG_MEL, 2)], ids=["fixed", "own lengths"])
def test_a_compiled_step_writes_the_same(
    tmp_path: Path,
    clips: Any,
    graphs: int,
    options: Any,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From one graph over one memory: the last batch is filled up. One of shorter clips has fewer states."""
    steps = record_steps(monkeypatch)
    for number, text in enumerate(TEXTS):
        write_wav(tmp_path / "s" / f"{number}.wav", tones(text))
    path = save_writer(tmp_path, change=lambda c: c.update(SpeechData=speech_state(clips, "decoder")))
    run(path, tmp_path / "s", batch_size=4, **options)
    want = printed(capsys)
    assert not steps
    run(path, tmp_path / "s", batch_size=4, compile=True, **options)
    assert printed(capsys) == want
    assert len(steps) == graphs


def test_beams_and_start_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, words = write_wav(tmp_path / "a.wav", tones("a")), alphabet()
    features = FIXED.features(torch.from_numpy(tones("a")))
    run(save_writer(tmp_path), file, num_beams=3)
    decoder = random_writer().decoder_of(features[None])
    best = beam_search(decoder, torch.tensor([[END]]), None, GenerationConfig(14, temperature=0, num_beams=3), [END])
    assert printed(capsys) == [" ".join(words.decode(best[0][0].tokens).split())]
    names = ["b", "<|endoftext|>", "f"]
    path = save_writer(tmp_path, change=lambda c: c["SpeechData"]["settings"].update(start_tokens=names))
    run(path, file)
    start: Any = tuple(words.token_to_id(name) for name in names)
    assert printed(capsys) == [by_hand(features, start)]
    fewer = GenerationConfig(3, temperature=0)
    run(save_writer(tmp_path, change=lambda c: c["hyper_parameters"].update(generation=vars(fewer))), file)
    assert printed(capsys) == [by_hand(features, longest=3)]


def test_clips_of_their_own_lengths(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With a mask, a clip is heard as if it were alone."""
    for number, text in enumerate(TEXTS):
        write_wav(tmp_path / "s" / f"{number}.wav", tones(text))
    path = save_writer(tmp_path, change=lambda c: c.update(SpeechData=speech_state(LOG_MEL, "decoder")))
    run(path, tmp_path / "s")
    assert printed(capsys) == [by_hand(LOG_MEL.features(torch.from_numpy(tones(text)))) for text in TEXTS]


def test_the_words_of_windows_are_merged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    waveform = torch.from_numpy(tones("bad cab a " * 4))
    windowing = Windowing.of(FIXED, FIXED.max_frames, 2)
    windows = list(windowing.cut(0, len(waveform)))
    assert len(windows) > 3
    want: list[str] = []
    for window in windows:
        words = by_hand(FIXED.features(waveform[window.start : window.stop])).split()
        want = joined_words(want, words, 2 * windowing.margin / windowing.size) if window.start else words
    run(save_writer(tmp_path), write_wav(tmp_path / "a.wav", waveform.numpy()))
    assert printed(capsys) == [" ".join(want)]
    assert len(want) > 3


@pytest.mark.parametrize(
    ("before", "after", "want"),
    [
        (
            "one two three four five six",
            "five six seven eight nine ten",
            "one two three four five six seven eight nine ten",
        ),
        ("one two three four fi", "four five six seven eight nine", "one two three four five six seven eight nine"),
        (
            "one two three four five",
            "ve six seven eight nine ten",
            "one two three four five ve six seven eight nine ten",
        ),
        ("One two, three. Four", "three four five six seven eight", "One two, three. four five six seven eight"),
        ("the cat sat on the mat", "lay the dog and ate a bone", "the cat sat on the dog and ate a bone"),
        ("one two", "", "one two"),
        ("", "one two", "one two"),
        ("one", "one", "one"),
        ("a a a a a a", "a a a a a a", None),
    ],
)
def test_merging(before: str, after: str, want: str | None) -> None:
    """Words that both windows heard stand once; half a word at the border gives way to the whole one."""
    found = joined_words(before.split(), after.split(), 1 / 3)
    if want is None:
        assert 6 <= len(found) < 12
    else:
        assert " ".join(found) == want


def test_a_word_far_away_does_not_join_windows() -> None:
    """Only words near the border can be those of the overlap."""
    before = ["key", *"abcdefghij"]
    after = [*"klmnopqrs", "key", "end"]
    assert joined_words(before, after, 1 / 3) == before + after


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"timestamps": True}, "timestamps"),
        ({"language_model": "x.ckpt"}, "language_model"),
        ({"lm_weight": 0.5}, "lm_weight"),
        ({"length_bonus": 0.5}, "length_bonus"),
    ],
)
def test_options_of_ctc(tmp_path: Path, options: Any, name: str) -> None:
    file = write_wav(tmp_path / "a.wav", tones("a"))
    with pytest.raises(
        TrunklineError, match=rf"{name} is for recognisers with CTC, but .* of SpeechToText, whose decoder writes"
    ) as error:
        run(save_writer(tmp_path), file, **options)
    assert error.value.field == name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["SpeechData"].pop("settings"), "was trained without SpeechData, so how to prepare"),
        (lambda c: c["SpeechData"]["settings"].update(start_tokens=["<s>"]), "has no token <s>; train again"),
        (lambda c: c["hyper_parameters"].update(generation={"top_k": 0}), "top_k must be at least 1, not 0"),
    ],
)
def test_bad_checkpoints(tmp_path: Path, change: Any, message: str) -> None:
    file = write_wav(tmp_path / "a.wav", tones("a"))
    with pytest.raises(TrunklineError, match=message):
        run(save_writer(tmp_path, change=change), file)


def test_windows_of_clips_of_fixed_length(tmp_path: Path) -> None:
    file = write_wav(tmp_path / "a.wav", tones("a"))
    with pytest.raises(
        TrunklineError, match=r"a window of 3 seconds does not suit the network, which hears 0\.15 to 2"
    ):
        run(save_writer(tmp_path), file, window=3.0)
