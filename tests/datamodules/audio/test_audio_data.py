"""Labelled sounds: batches with one label or several, mixup, windows, and the classes."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sound_files import RATE, letter_tones, write_sound

from trunkline import TrunklineError
from trunkline.contract import DataFacts
from trunkline.datamodules import AudioAugmentation, AudioData
from trunkline.datamodules.audio.audio_data import AudioMixup
from trunkline.datamodules.audio.log_mel import LogMel
from trunkline.datamodules.samplers import SampleKey
from trunkline.datamodules.splits import rows_by_number, shares_of

LABELS = ["b", "a", "c"]
Make = Callable[..., AudioData]


def log_mel(**options: Any) -> LogMel:
    return LogMel(**{"sample_rate": RATE, "num_mels": 12, "max_seconds": 0.4, **options})


def listed(folder: Path, rows: list[tuple[Any, str]]) -> str:
    """A table of labels, and of letters whose tones are the sound."""
    cells = []
    for number, (label, text) in enumerate(rows):
        cells.append({"audio": write_sound(folder / f"{number}.wav", letter_tones(text)).name, "label": label})
    (folder / "sounds.jsonl").write_text("\n".join(map(json.dumps, cells)))
    return str(folder / "sounds.jsonl")


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Makes sounds: 30 of three classes, or what is given."""

    def made(rows: list[tuple[Any, str]] | None = None, source: str | None = None, **options: Any) -> AudioData:
        rows = rows or [(LABELS[n % 3], "abcd"[: 1 + n % 4]) for n in range(30)]
        fields: dict[str, Any] = {"log_mel": log_mel(), "batch_size": 4, "num_workers": 0, "val_fraction": 0.2}
        fields |= {"cache_dir": str(tmp_path / "cache"), **options}
        data = AudioData(source or listed(tmp_path, rows), **fields)
        data.prepare_data()
        return data

    return made


def prepared(data: AudioData) -> AudioData:
    data.setup("fit")
    return data


def items(data: AudioData, split: str, *keys: SampleKey) -> list[dict[str, Any]]:
    dataset: Any = data.datasets[split]
    return dataset.__getitems__(list(keys))


# --- labels


def test_one_label(make: Make) -> None:
    """Classes are sorted; each split has the same proportion of them."""
    data = prepared(make())
    assert data.facts.class_names == data.class_names == ["a", "b", "c"]
    assert data.facts.multi_label is False
    counts = {split: Counter(names[0] for names in rows.labels or []) for split, rows in data.splits.items()}
    assert counts == {"train": {"a": 8, "b": 8, "c": 8}, "val": {"a": 2, "b": 2, "c": 2}}
    for batch in data.train_dataloader():
        assert batch.keys() == {"features", "mask", "label", "index", "valid", "skipped", "truncated"}
        names = [data.class_names[number] for number in batch["label"].tolist()]
        assert names == [(data.splits["train"].labels or [])[row][0] for row in batch["index"].tolist()]
        assert batch["label"].dtype == torch.int64


def test_numbered_classes_are_in_order(make: Make) -> None:
    assert make([(n, "ab") for n in (10, 2, 10, 2, 1, 1)], val_fraction=0.0).class_names == ["1", "2", "10"]


def test_several_labels(make: Make) -> None:
    """A clip without a label has none of the classes; the number of a row decides its split."""
    labels: list[list[str]] = [["a"], ["b", "a"], [], ["c"], ["a"], ["c", "b"], ["b"], ["a"], ["b"], ["c"]]
    data = prepared(make([(names, "ab") for names in labels], val_fraction=0.2))
    assert data.facts.multi_label is True
    chosen = rows_by_number(10, shares_of({"val": 0.2}))
    for split, rows in chosen.items():
        for row, number in enumerate(rows):
            (item,) = items(data, split, SampleKey(0, row))
            assert "label" not in item
            assert item["target"].tolist() == [float(name in labels[number]) for name in "abc"]


def test_a_separator_makes_several_labels(make: Make) -> None:
    data = make([("a,b", "ab"), ("b", "ab"), ("a", "ab")], label_separator=",", val_fraction=0.0)
    assert data.facts.multi_label is True
    assert data.class_names == ["a", "b"]


def test_one_label_can_be_one_of_several(make: Make) -> None:
    """By flag: later rows may have more."""
    data = prepared(make(multi_label=True))
    assert data.facts.multi_label is True
    assert items(data, "train", SampleKey(0, 0))[0]["target"].sum() == 1


# --- mixup


def test_mixup_mixes_sounds_and_labels(make: Make) -> None:
    """Against the sum of the two clips; the longer clip's end is cut off, the shorter one's is silent."""
    data = prepared(make(mixup=AudioMixup(probability=1.0, alpha=1.0)))
    dataset: Any = data.datasets["train"]
    rows, classes = data.splits["train"], data.class_names
    shares = set()
    for row in range(12):
        clip, (item,) = dataset.clip(SampleKey(3, row)), items(data, "train", SampleKey(3, row))
        mine, other = rows.waveform(row, RATE), rows.waveform(clip.mix.row, RATE)
        fitted = np.zeros_like(mine)
        fitted[: len(other)] = other[: len(mine)]
        share = clip.mix.share
        features = data.log_mel.features(torch.from_numpy((share * mine + (1 - share) * fitted).astype(np.float32)))
        torch.testing.assert_close(item["features"][: len(features)], features, atol=1e-3, rtol=0)
        expected = np.zeros(3)
        for number, part in ((row, share), (clip.mix.row, 1 - share)):
            expected[classes.index((rows.labels or [])[number][0])] += part
        np.testing.assert_allclose(item["target"].numpy(), expected, atol=1e-6)
        assert item["label"] == classes.index((rows.labels or [])[row][0])
        shares.add(share)
    assert len(shares) == 12
    assert "target" not in items(data, "val", SampleKey(0, 0))[0]


def test_mixup_is_a_function_of_seed_epoch_and_index(make: Make) -> None:
    data = prepared(make(mixup=AudioMixup(), augmentation=AudioAugmentation(noise=0.5, gain_db=3.0)))
    alone, again = items(data, "train", SampleKey(1, 4))[0], items(data, "train", SampleKey(0, 1), SampleKey(1, 4))[1]
    length = int(alone["mask"].sum())
    torch.testing.assert_close(again["features"][:length], alone["features"][:length], rtol=0, atol=0)
    torch.testing.assert_close(again["target"], alone["target"], rtol=0, atol=0)
    drawn = [items(data, "train", SampleKey(epoch, 4))[0]["target"].tolist() for epoch in range(8)]
    assert len({tuple(target) for target in drawn}) > 1
    mixed = [items(data, "train", SampleKey(e, r))[0]["target"].max() < 1 for e in range(20) for r in range(20)]
    assert 60 < sum(mixed) < 200  # half of them, less those mixed with their own class


def test_mixup_of_several_labels(make: Make) -> None:
    rows = [(["a", "b"], "ab"), (["c"], "cd"), ([], "d")]
    data = prepared(make(rows, val_fraction=0.0, mixup=AudioMixup(probability=1.0)))
    dataset: Any = data.datasets["train"]
    hot = np.array([[1, 1, 0], [0, 0, 1], [0, 0, 0]])
    for epoch in range(5):
        for row in range(3):
            mix = dataset.clip(SampleKey(epoch, row)).mix
            (item,) = items(data, "train", SampleKey(epoch, row))
            expected = mix.share * hot[row] + (1 - mix.share) * hot[mix.row]
            np.testing.assert_allclose(item["target"].numpy(), expected, atol=1e-6)


@pytest.mark.parametrize(("options", "field"), [({"probability": 1.5}, "probability"), ({"alpha": 0.0}, "alpha")])
def test_mixup_that_cannot_be(options: dict[str, float], field: str) -> None:
    with pytest.raises(TrunklineError, match=f"mixup: {field}=") as error:
        AudioMixup(**options)
    assert error.value.field == f"data.mixup.{field}"


# --- lengths


def test_all_clips_are_padded_to_the_same_length(make: Make) -> None:
    data = prepared(make(log_mel=log_mel(padding="fixed", mean=-5.0, std=4.0)))
    batch = next(iter(data.train_dataloader()))
    assert "mask" not in batch
    assert batch["features"].shape == (4, 40, 12)
    assert data.facts.max_frames == 40


def test_long_clips_become_windows(make: Make) -> None:
    """In training and in evaluation; all windows of a clip are in its split, with its label."""
    rows = [(LABELS[n % 3], "abcd" * (1 + n // 3)) for n in range(9)]  # 0.4, 0.8 and 1.2 s, of each class
    data = prepared(make(rows, too_long="window", val_fraction=0.3, log_mel=log_mel(max_seconds=0.4)))
    names = {split: [rows.name(n).partition(",")[0] for n in range(len(rows))] for split, rows in data.splits.items()}
    assert not set(names["train"]) & set(names["val"])
    assert sum(map(len, names.values())) == 3 * (1 + 2 + 3)
    for split, dataset in data.datasets.items():
        for row in range(len(dataset)):  # type: ignore[arg-type]
            (item,) = items(data, split, SampleKey(0, row))
            assert int(item["mask"].sum()) == data.log_mel.frames_of(3200)
            assert item["truncated"] == 0
    assert data.left_out == {}


def test_recordings_of_hours_are_cut_into_windows_only(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trunkline.datamodules.audio import audio_listing, audio_sources

    short = audio_sources.MAX_HOURS
    rows = [("a", "abcd"), ("b", "abcd" * 2)]
    assert short == 1
    header = audio_listing.audio_header
    # what says so is the header alone: nobody waits for ten hours of sound
    monkeypatch.setattr(
        audio_listing, "audio_header", lambda file, name: header(file, name)._replace(seconds=10 * 3600.0)
    )
    for choice in ("cut", "skip"):
        with pytest.raises(TrunklineError, match=r"sounds\.jsonl:1 .* lasts 10\.0 hours, .* too_long=window") as error:
            make(rows, too_long=choice, val_fraction=0.0)
        assert error.value.field == "data.skip_corrupt"
    data = make(rows, too_long="window", val_fraction=0.0, cache_dir=str(tmp_path / "other"))
    assert len(data.splits["train"]) == 2 * 90_000


@pytest.mark.parametrize(("choice", "kept"), [("cut", 4), ("skip", 2)])
def test_long_clips_are_cut_or_left_out(choice: str, kept: int, make: Make) -> None:
    rows = [("a", "abcd"), ("b", "abcda"), ("a", "abcdab"), ("b", "ab")]
    data = prepared(make(rows, too_long=choice, val_fraction=0.0))
    assert len(data.splits["train"]) == kept
    truncated = [item["truncated"] for item in items(data, "train", *(SampleKey(0, n) for n in range(kept)))]
    assert truncated == ([0, 1, 1, 0] if choice == "cut" else [0, 0])


# --- faults


def test_labels_that_do_not_fit(make: Make, tmp_path: Path) -> None:
    (tmp_path / "val").mkdir()
    strange = listed(tmp_path / "val", [("a", "ab"), ("z", "ab")])
    with pytest.raises(
        TrunklineError, match=r"sounds\.jsonl:2 .*val split\): no training row has the label 'z'"
    ) as error:
        prepared(make(val_source=strange))
    assert error.value.field == "data.label_column"
    several = listed(tmp_path / "val", [("a", "ab"), (["a", "b"], "ab")])
    with pytest.raises(TrunklineError, match=r"sounds\.jsonl:2 .* has 2 labels, but training rows have one") as error:
        prepared(make(val_source=several))
    assert error.value.field == "data.multi_label"
    with pytest.raises(TrunklineError, match="one class only, a; set label_column"):
        prepared(make([("a", "ab")] * 3, val_fraction=0.0))
    with pytest.raises(TrunklineError, match="the training rows have no labels"):
        prepared(make([([], "ab")] * 3, val_fraction=0.0))


def test_a_source_without_labels(make: Make) -> None:
    data = make()
    rows: Any = data.splits["train"]
    rows.labels = None
    with pytest.raises(TrunklineError, match="has no label, nor do the others"):
        prepared(data)


def test_a_checkpoint_has_all_that_is_needed(make: Make) -> None:
    data = prepared(make())
    state = data.state_dict()
    assert LogMel(**state["log_mel"]) == data.log_mel
    assert (state["class_names"], state["multi_label"], state["split_seed"]) == (["a", "b", "c"], False, 0)
    assert json.loads(json.dumps(state)) == state
    data.load_state_dict(state)
    with pytest.raises(TrunklineError, match="the checkpoint knows the classes x, but the data has a, b, c"):
        data.load_state_dict({**state, "class_names": ["x"]})


def test_facts(make: Make) -> None:
    data = prepared(make())
    facts = data.facts
    assert facts.row_name is not None
    assert facts.waveform is not None
    assert facts.row_name("val", 0).startswith(data.source)
    torch.testing.assert_close(facts.waveform("val", 0).numpy(), data.splits["val"].waveform(0, RATE), rtol=0, atol=0)
    known = {name for name, value in vars(facts).items() if value not in (None, {}, ())}
    assert known == {
        *("class_names", "multi_label", "sample_rate", "num_mels", "max_frames", "frame_seconds"),
        *("ragged", "row_name", "waveform"),
    }
    fixed = prepared(make(log_mel=log_mel(padding="fixed"))).facts
    assert (facts.ragged, fixed.ragged) == (True, False)
    assert (facts.sample_rate, facts.num_mels, facts.max_frames, facts.frame_seconds) == (RATE, 12, 40, 0.01)
    assert isinstance(facts, DataFacts)
