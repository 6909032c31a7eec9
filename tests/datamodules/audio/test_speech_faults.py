"""Recordings, transcripts and options of `SpeechData` that cannot be used."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_speech import Make, items, listed, log_mel, prepared
from sound_files import letter_tones, spoken_letters, write_sound

from trunkline import TrunklineError
from trunkline.contract import IGNORE
from trunkline.datamodules.samplers import SampleKey
from trunkline.datamodules.tokenizers import train_chars


def test_an_empty_transcript(make: Make, tmp_path: Path) -> None:
    clips = [(text, letter_tones("abc")) for text in ("abc", "!?", "cba", "")]
    source = listed(tmp_path, clips)
    with pytest.raises(
        TrunklineError, match=r"listed\.jsonl:2 .*the transcript is empty, because .* '!\?'; 2 of 4"
    ) as error:
        prepared(make(source, val_fraction=0.0))
    assert error.value.field == "data.skip_corrupt"
    data = prepared(make(source, val_fraction=0.0, skip_corrupt=True))
    assert data.transcripts == {"train": ["abc", "cba"]}
    assert data.left_out == {"train": {"without a transcript": 2}}
    assert data.facts.row_name is not None
    assert "listed.jsonl:3" in data.facts.row_name("train", 1)


def test_no_column_of_transcripts(make: Make) -> None:
    with pytest.raises(TrunklineError, match=r"spoken\.jsonl:1 has no 'words'; it has audio, text") as error:
        make(text_column="words").prepare_data()
    assert error.value.field == "data.text_column"


def test_characters_outside_the_vocabulary(make: Make, tmp_path: Path) -> None:
    """Named with number and row, or left out and counted."""
    train_chars(["abc "], 0).save(str(tmp_path / "abc.json"))
    source = listed(tmp_path, [(text, letter_tones("abc")) for text in ("abc", "b d", "dad")])
    options = {"tokenizer": str(tmp_path / "abc.json"), "val_fraction": 0.0}
    with pytest.raises(TrunklineError, match=r"lacks 1 of .*'d' \(3 times, first in \S*listed\.jsonl:2 ") as error:
        prepared(make(source, **options))
    assert error.value.field == "data.drop_unknown"
    data = prepared(make(source, drop_unknown=True, **options))
    assert data.transcripts == {"train": ["abc", "b", "a"]}
    assert data.left_out == {"train": {"unknown characters": 3}}
    assert 1 not in data.datasets["train"].tokens.values  # type: ignore[attr-defined]  # the unknown token


@pytest.mark.parametrize("tokenizer", ["given", "learnt"])
def test_a_transcript_of_unknown_characters_only(make: Make, tmp_path: Path, tokenizer: str) -> None:
    """Without them it is empty: an error, or left out and counted, in training and in evaluation."""
    train_chars(["abc "], 0).save(str(tmp_path / "abc.json"))
    source = listed(tmp_path, [(text, letter_tones("abc")) for text in ("abc", "dd", "a")])
    (tmp_path / "abc").mkdir()
    train = source if tokenizer == "given" else listed(tmp_path / "abc", [("a b c", letter_tones("abc"))])
    chosen = str(tmp_path / "abc.json") if tokenizer == "given" else "chars"
    options = {"tokenizer": chosen, "val_source": source, "drop_unknown": True}
    split = "train" if tokenizer == "given" else "val"
    with pytest.raises(
        TrunklineError,
        match=rf"listed\.jsonl:2 .*\({split} split\).* empty, because drop_unknown leaves .* 'dd'; 1 of 3",
    ) as error:
        prepared(make(train, **options))
    assert error.value.field == "data.skip_corrupt"
    data = prepared(make(train, skip_corrupt=True, **options))
    assert data.transcripts["val"] == ["abc", "a"]
    assert data.left_out["val"] == {"without a transcript": 1}
    if tokenizer == "given":
        assert (data.transcripts["train"], data.left_out["train"]) == (["abc", "a"], {"without a transcript": 1})


def test_characters_of_clips_that_are_too_long(make: Make, tmp_path: Path) -> None:
    """They are neither learnt nor missed."""
    clips = [("ab", letter_tones("ab")), ("cd", letter_tones("cdcd")), ("ba", letter_tones("ba"))]
    long = log_mel(max_seconds=0.3)
    data = prepared(make(listed(tmp_path, clips), val_fraction=0.0, log_mel=long))
    assert data.transcripts == {"train": ["ab", "ba"]}
    assert data.left_out == {"train": {"too long": 1}}
    assert data.vocabulary.token_to_id("c") is None
    assert data.vocabulary.token_to_id("a") is not None


def test_a_file_that_proves_to_be_silent(make: Make, tmp_path: Path) -> None:
    """Only decoding shows it: the next row stands for it, in evaluation uncounted."""
    clips = [("ab", letter_tones("ab")), ("cd", np.zeros(1600, np.float32)), ("ba", letter_tones("ba"))]
    source = listed(tmp_path, clips)
    with pytest.raises(TrunklineError, match=r"listed\.jsonl:2 .* silent") as error:
        items(prepared(make(source, val_source=source)), "train", SampleKey(0, 1))
    assert error.value.field == "data.skip_corrupt"
    data = prepared(make(source, val_source=source, skip_corrupt=True))
    for split in ("train", "val"):
        with pytest.warns(UserWarning, match=r"skipped: .*listed\.jsonl:2"):
            good, replaced = items(data, split, SampleKey(0, 2), SampleKey(0, 1))
        torch.testing.assert_close(replaced["features"], good["features"], rtol=0, atol=0)
        assert (replaced["skipped"], replaced["index"], good["skipped"]) == (1, 1, 0)
        assert replaced["valid"] == (split == "train")
        if split == "train":
            assert replaced["targets"].tolist() == good["targets"].tolist()
        else:
            assert (replaced["targets"] == IGNORE).all()


def test_if_no_clip_can_be_decoded_there_is_an_error(make: Make, tmp_path: Path) -> None:
    source = listed(tmp_path, [("ab", np.zeros(1600, np.float32))] * 2)
    data = prepared(make(source, val_fraction=0.0, skip_corrupt=True))
    with pytest.warns(UserWarning, match="skipped"), pytest.raises(TrunklineError, match="silent"):
        items(data, "train", SampleKey(0, 0))


def test_broken_files_are_left_out_on_all_ranks_alike(make: Make, tmp_path: Path) -> None:
    source = listed(tmp_path, [(text, letter_tones(text)) for text in spoken_letters(12)])
    (tmp_path / "3.wav").write_bytes(b"no sound")
    with pytest.raises(TrunklineError, match=r"listed\.jsonl:4"):
        make(source).prepare_data()
    with pytest.warns(UserWarning, match=r"1 recordings of source=.* are left out; the first: .*listed\.jsonl:4"):
        first, second = (prepared(make(source, skip_corrupt=True)) for _ in range(2))
    assert first.transcripts == second.transcripts
    assert sum(map(len, first.transcripts.values())) == 11
    assert first.left_out == second.left_out == {"train": {"unreadable": 1}}


@pytest.mark.parametrize(
    ("options", "message", "field"),
    [
        ({"start_tokens": ["<en>"]}, "start_tokens=<en> are for a decoder", "start_tokens"),
        ({"form": "decoder", "start_tokens": []}, "start_tokens is an empty list", "start_tokens"),
        ({"form": "decoder", "max_length": 1}, "max_length=1 leaves no room", "max_length"),
        ({"val_fraction": 1.5}, "val_fraction=1.5 leaves nothing", "val_fraction"),
        ({"tokenizer": "bpe", "vocab_size": 3}, "vocab_size=3 is too small for bpe", "vocab_size"),
        ({"val_split": "dev", "val_source": "owner/name:test"}, "names the split test", "val_split"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], message: str, field: str, make: Make) -> None:
    with pytest.raises(TrunklineError, match=message) as error:
        make(**options)
    assert error.value.field == f"data.{field}"


def test_a_start_token_that_the_tokenizer_lacks(make: Make, tmp_path: Path) -> None:
    train_chars(["abcd"], 0).save(str(tmp_path / "abcd.json"))
    data = make(form="decoder", start_tokens=["<en>"], tokenizer=str(tmp_path / "abcd.json"))
    with pytest.raises(TrunklineError, match="has no token start_tokens=<en>") as error:
        prepared(data)
    assert error.value.field == "data.start_tokens"


def test_an_empty_split(make: Make, tmp_path: Path) -> None:
    source = listed(tmp_path, [("ab", letter_tones("ab"))])
    with pytest.raises(TrunklineError, match=r"the val split of source=.* is empty; .* val_source") as error:
        make(source).prepare_data()
    assert error.value.field == "data.val_fraction"


def test_what_cannot_be_decoded_is_not_kept(make: Make, tmp_path: Path) -> None:
    clips = [("ab", letter_tones("ab")), ("cd", np.zeros(1600, np.float32)), ("ba", letter_tones("ba"))]
    source = listed(tmp_path, clips)
    with pytest.raises(TrunklineError, match=r"listed\.jsonl:2 .* silent"):
        make(source, cache_waveforms=True, val_fraction=0.0).prepare_data()
    data = prepared(make(source, cache_waveforms=True, val_fraction=0.0, skip_corrupt=True))
    with pytest.warns(UserWarning, match=r"skipped: .*listed\.jsonl:2"):
        good, replaced = items(data, "train", SampleKey(0, 2), SampleKey(0, 1))
    torch.testing.assert_close(replaced["features"], good["features"], rtol=0, atol=0)


def test_a_missing_file_is_left_out_of_the_kept_waveforms(make: Make, tmp_path: Path) -> None:
    source = listed(tmp_path, [(text, letter_tones(text)) for text in ("ab", "cd", "ba")])
    (tmp_path / "1.wav").unlink()
    options: dict[str, Any] = {"cache_waveforms": True, "val_fraction": 0.0, "skip_corrupt": True}
    with pytest.warns(UserWarning, match=r"1 recordings of .* are left out; .*listed\.jsonl:2.* no such file"):
        data = prepared(make(source, **options))
    assert data.transcripts == {"train": ["ab", "ba"]}
    assert data.left_out == {"train": {"unreadable": 1}}
    (file,) = (tmp_path / "cache").glob("waveforms-*.f32")
    write_sound(tmp_path / "1.wav", letter_tones("cd"))  # found again: it is decoded too
    assert prepared(make(source, **options)).transcripts == {"train": ["ab", "cd", "ba"]}
    assert len(list(file.parent.glob("waveforms-*.f32"))) == 2
