"""Speech with transcripts: batches for CTC and for decoders, splits, long clips, checkpoints."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_speech import SPOKEN, Make, items, listed, log_mel, prepared
from sound_files import RATE, letter_tones, spoken_letters, write_sound

from trunkline import TrunklineError
from trunkline.contract import IGNORE
from trunkline.datamodules import AudioAugmentation, SpeechData
from trunkline.datamodules.audio.log_mel import LogMel
from trunkline.datamodules.audio.transcripts import TranscriptNormalization
from trunkline.datamodules.samplers import SampleKey

TEXTS = spoken_letters(SPOKEN)


def everything(data: SpeechData) -> list[list[torch.Tensor]]:
    """All training batches of an epoch."""
    return [[value for _, value in sorted(batch.items())] for batch in data.train_dataloader()]


# --- batches


def test_a_batch_for_ctc(make: Make) -> None:
    """Features of the longest clip rounded up to 8 frames, zeros behind the others; characters as targets."""
    data = prepared(make())
    tokens = {letter: data.vocabulary.token_to_id(letter) for letter in "abcd"}
    seen = []
    for batch in data.val_dataloader():
        assert batch.keys() == {"features", "mask", "targets", "index", "valid", "skipped", "truncated"}
        rows = batch["index"].tolist()
        seen += rows
        lengths = [data.log_mel.frames_of(len(data.waveform("val", row))) for row in rows]
        longest = -(-max(lengths) // 8) * 8
        assert batch["features"].shape == (len(rows), longest, 12)
        assert batch["features"].dtype == torch.float32
        assert batch["mask"].sum(dim=1).tolist() == lengths
        assert not batch["features"][~batch["mask"]].any()
        for n, row in enumerate(rows):
            text = data.transcript("val", row)
            assert batch["targets"][n].tolist()[: len(text)] == [tokens[letter] for letter in text]
            assert (batch["targets"][n, len(text) :] == IGNORE).all()
            samples = data.waveform("val", row)
            np.testing.assert_allclose(samples, letter_tones(text), atol=1e-4)  # 16 bits
            expected = data.log_mel.features(samples)
            torch.testing.assert_close(batch["features"][n, : lengths[n]], expected, atol=1e-5, rtol=0)
    assert sorted(seen) == list(range(len(data.datasets["val"])))  # type: ignore[arg-type]


def test_the_number_of_a_row_decides_its_split(make: Make) -> None:
    from trunkline.datamodules.splits import split_of

    data = prepared(make())
    expected = [text for n, text in enumerate(TEXTS) if split_of(n, {"train": 0.75, "val": 0.25}) == "val"]
    assert data.transcripts["val"] == expected
    assert len(data.transcripts["train"]) == SPOKEN - len(expected)


def test_batches_for_a_decoder(make: Make) -> None:
    """It reads start tokens and text, and predicts text and end, but none of the start tokens."""
    data = prepared(make(form="decoder", start_tokens=["<en>", "<text>"], max_length=16))
    vocabulary = data.vocabulary
    start, end = [vocabulary.token_to_id("<en>"), vocabulary.token_to_id("<text>")], 0
    batch = next(iter(data.train_dataloader()))
    for n, row in enumerate(batch["index"].tolist()):
        ids = vocabulary.encode(data.transcript("train", row), add_special_tokens=False).ids
        size = 2 + len(ids)
        assert batch["target_tokens"][n].tolist() == [*start, *ids] + [0] * (8 - size)
        assert batch["targets"][n].tolist() == [IGNORE, *ids, end] + [IGNORE] * (8 - size)
    facts = data.facts
    assert (facts.start_token, facts.start_tokens, facts.end_token) == (start[0], start, end)
    assert (facts.max_target_length, facts.max_length, facts.vocab_size) == (16, None, 8)
    assert facts.pair is not None
    assert facts.pair("train", 0) == (data.row_name("train", 0), data.transcript("train", 0))


def test_the_usual_start_is_the_end_of_a_text(make: Make) -> None:
    """And too long a transcript loses its end: a decoder that reads 4 tokens has room for 3."""
    data = prepared(make(form="decoder", max_length=4))
    long = next(row for row, text in enumerate(data.transcripts["train"]) if len(text) == 4)
    (item,) = items(data, "train", SampleKey(0, long))
    ids = data.vocabulary.encode(data.transcript("train", long)).ids
    assert item["target_tokens"].tolist() == [0, *ids[:3]]
    assert item["targets"].tolist() == [*ids[:3], 0]
    assert item["truncated"] == 1


def test_a_filler_has_no_targets(make: Make) -> None:
    for options in ({}, {"form": "decoder"}):
        data = prepared(make(**options))
        real, filler = items(data, "train", SampleKey(0, 1), SampleKey(0, 1, valid=False))
        assert (real["targets"] != IGNORE).any()
        assert (filler["targets"] == IGNORE).all()
        assert (real["valid"], filler["valid"]) == (True, False)
        torch.testing.assert_close(filler["features"], real["features"], rtol=0, atol=0)


def test_batches_of_like_length(make: Make) -> None:
    """Limited in padded seconds, over all processes; every clip once in an epoch."""
    data = prepared(make(batch_seconds=2.0))
    rows = []
    for batch in data.train_dataloader():
        assert batch["features"].shape[0] * batch["features"].shape[1] <= 200
        rows += batch["index"].tolist()
    assert sorted(rows) == list(range(len(data.transcripts["train"])))
    sizes = [len(batch["index"]) for batch in data.val_dataloader()]
    assert len(set(sizes)) > 1
    assert {len(batch["index"]) for batch in prepared(make(batch_seconds=2.0, eval_batch_size=2)).val_dataloader()} <= {
        1,
        2,
    }
    with pytest.raises(TrunklineError, match=r"batch_seconds=0\.1 is less than the longest clip, .* 0\.4 s") as error:
        make(batch_seconds=0.1)
    assert error.value.field == "data.batch_seconds"


NOISY = AudioAugmentation(
    **{"speed": (0.8, 1.2), "time_shift": 0.05, "gain_db": 6.0, "mel_warp": 0.2, "noise": 0.8},
    **{"noise_kinds": ("white", "babble"), "freq_masks": 1, "freq_width": 3, "time_masks": 1, "time_width": 5},
)


def test_an_item_depends_on_seed_epoch_and_index_alone(make: Make) -> None:
    """Not on the other rows of its batch, nor on what was read before; evaluation changes nothing."""
    data = prepared(make(augmentation=NOISY))
    alone = items(data, "train", SampleKey(1, 5))[0]
    length = int(alone["mask"].sum())
    again = items(data, "train", SampleKey(0, 2), SampleKey(1, 5), SampleKey(1, 3))[1]
    assert int(again["mask"].sum()) == length
    torch.testing.assert_close(again["features"][:length], alone["features"][:length], rtol=0, atol=0)
    for seed, key in ((0, SampleKey(2, 5)), (1, SampleKey(1, 5))):
        other = items(prepared(make(augmentation=NOISY, seed=seed)), "train", key)[0]["features"]
        assert other.shape != alone["features"].shape or not torch.equal(other, alone["features"])
    first, second = (items(data, "val", SampleKey(epoch, 0))[0]["features"] for epoch in (0, 1))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_slow_speech_is_not_longer_than_the_limit(make: Make) -> None:
    slow = AudioAugmentation(speed=(0.5, 0.5))
    data = prepared(make(augmentation=slow))
    lengths = [int(batch["mask"].sum(1).max()) for batch in data.train_dataloader()]
    assert max(lengths) == data.log_mel.max_frames == data.facts.max_frames


def test_workers_change_nothing(make: Make) -> None:
    torch.set_num_threads(2)  # a worker has one
    here, there = (everything(prepared(make(augmentation=NOISY, num_workers=workers))) for workers in (0, 2))
    assert len(here) == len(there) > 0
    for ours, theirs in zip(here, there, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


# --- long clips


@pytest.mark.parametrize("choice", ["cut", "skip"])
def test_clips_that_are_too_long(choice: str, make: Make, tmp_path: Path) -> None:
    """Evaluation keeps all clips; a clip that is longer by less than a frame is not too long."""
    seconds = [0.3, 0.4, 0.405, 0.5, 0.9]
    source = listed(tmp_path, [("ab", letter_tones("abcdabcdabcd")[: round(RATE * s)]) for s in seconds])
    data = prepared(make(source, val_source=source, too_long=choice))
    kept = 3 if choice == "skip" else 5
    assert len(data.transcripts["train"]) == kept
    assert data.left_out == ({"train": {"too long": 2}} if choice == "skip" else {})
    assert ("left out: 2 too long" in data.summary("train")) == (choice == "skip")
    assert "2 too long and cut" in data.summary("val")
    cut = items(data, "val", *(SampleKey(0, row) for row in range(5)))
    assert [item["truncated"] for item in cut] == [0, 0, 0, 1, 1]
    frames = data.log_mel.frames_of(data.log_mel.max_samples)
    assert [int(item["mask"].sum()) for item in cut] == [data.log_mel.frames_of(2400), *[frames] * 4]
    torch.testing.assert_close(cut[3]["features"], cut[4]["features"], rtol=0, atol=1e-5)  # the same beginning
    assert data.facts.waveform is not None
    assert len(data.facts.waveform("val", 4)) == data.log_mel.max_samples


def test_if_all_clips_are_too_long_there_is_an_error(make: Make) -> None:
    with pytest.raises(
        TrunklineError, match=r"all 31 recordings of the train split are left out \(31 too long\)"
    ) as error:
        prepared(make(log_mel=log_mel(max_seconds=0.05)))
    assert error.value.field == "data.log_mel.max_seconds"


# --- the rest


def test_a_checkpoint_has_all_that_is_needed(make: Make) -> None:
    written = TranscriptNormalization(case="upper")
    data = prepared(make(normalization=written))
    state = data.state_dict()
    assert LogMel(**state["log_mel"]) == data.log_mel
    assert TranscriptNormalization(**state["normalization"]) == written
    assert state["normalization"] == asdict(written)
    assert (state["form"], state["fractions"]["val"], state["left_out"]) == ("ctc", 0.25, {})
    assert json.loads(json.dumps(state)) == state
    prepared(make(normalization=written)).load_state_dict(state)
    with pytest.raises(TrunklineError, match="trained with another tokenizer than tokenizer=chars on source="):
        prepared(make()).load_state_dict(state)  # lower case


@pytest.mark.parametrize("rate", [RATE, 11_025])
def test_decoded_waveforms_are_kept_by_flag(rate: int, make: Make, tmp_path: Path) -> None:
    """They change no number of a clip that is a whole file; the second time no file is decoded."""
    source = listed(tmp_path, [(text, letter_tones(text)) for text in TEXTS[:8]])
    options: dict[str, Any] = {"log_mel": log_mel(sample_rate=rate), "augmentation": NOISY}
    plain = everything(prepared(make(source, **options)))
    assert not list((tmp_path / "cache").glob("waveforms-*.f32"))
    kept = everything(prepared(make(source, cache_waveforms=True, **options)))
    (file,) = (tmp_path / "cache").glob("waveforms-*.f32")
    total = sum(len(data) for data in map(letter_tones, TEXTS[:8])) * rate / RATE
    assert abs(file.stat().st_size - 4 * total) < 4 * 8
    for _ in range(2):
        for ours, theirs in zip(kept, plain, strict=True):
            for a, b in zip(ours, theirs, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=0)
        state = file.stat().st_mtime_ns
        kept = everything(prepared(make(source, cache_waveforms=True, **options)))
        assert file.stat().st_mtime_ns == state
    write_sound(tmp_path / "0.wav", letter_tones("dddd"))  # changed: decoded again
    prepared(make(source, cache_waveforms=True, **options))
    assert len(list((tmp_path / "cache").glob("waveforms-*.f32"))) == 2


def test_parts_of_kept_waveforms(make: Make) -> None:
    """Recordings that are parts of a file, and the beginnings of those that are too long."""
    plain, kept = (
        prepared(make(too_long="cut", log_mel=log_mel(max_seconds=0.25), cache_waveforms=flag))
        for flag in (False, True)
    )
    assert any("too long and cut" in data.summary("train") for data in (plain, kept))
    for ours, theirs in zip(everything(kept), everything(plain), strict=True):
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
