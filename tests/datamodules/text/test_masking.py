"""Which tokens are hidden, and rows of MaskedTextData as pure functions of (seed, epoch, index)."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models

from trunkline import TrunklineError
from trunkline.datamodules import MaskedTextData
from trunkline.datamodules.samplers import SampleKey
from trunkline.datamodules.text.masking import Masker, MaskingConfig, continuations, special_ids

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = [*SPECIAL, *(f"w{n}" for n in range(20)), *(f"##s{n}" for n in range(20))]


def tokenizer(names: list[str] = WORDS) -> Tokenizer:
    return Tokenizer(models.WordPiece({name: n for n, name in enumerate(names)}, unk_token="[UNK]"))


def row(length: int = 62) -> np.ndarray:
    """[CLS] words [SEP]; each word has one to three pieces."""
    draw = np.random.default_rng(1)
    tokens = [2]
    while len(tokens) < length + 1:
        tokens += [int(draw.integers(5, 25)), *draw.integers(25, 45, draw.integers(0, 3)).tolist()]
    return np.array([*tokens[: length + 1], 3])


def words_of(tokens: np.ndarray) -> np.ndarray:
    return (tokens < 25).cumsum()


@pytest.mark.parametrize("unit", ["tokens", "words", "spans"])
def test_share_and_no_special_token(unit: Any) -> None:
    masker, tokens = Masker(MaskingConfig(unit=unit), tokenizer()), row()
    counts = np.zeros(len(tokens))
    for seed in range(2000):
        chosen = masker.choose(tokens, np.random.default_rng(seed))
        assert (np.diff(chosen) > 0).all()
        assert len(chosen) == 9 if unit != "words" else 7 <= len(chosen) <= 9  # 15% of 62; a word may not fit
        counts[chosen] += 1
    assert counts[0] == counts[-1] == 0
    inner = counts[12:-12] / 2000
    assert inner.min() > 0.09
    assert inner.max() < 0.21


def test_whole_words() -> None:
    masker, tokens = Masker(MaskingConfig(unit="words"), tokenizer()), row()
    words = words_of(tokens)
    for seed in range(100):
        chosen = masker.choose(tokens, np.random.default_rng(seed))
        hidden = set(words[chosen].tolist())
        assert chosen.tolist() == [n for n in range(1, 63) if words[n] in hidden]


def test_one_long_word_is_hidden_in_part() -> None:
    tokens = np.array([2, 5, *range(25, 45), 3])
    assert len(Masker(MaskingConfig(unit="words"), tokenizer()).choose(tokens, np.random.default_rng(0))) == 3


def test_spans_are_longer_than_single_tokens() -> None:
    def runs(unit: Any) -> float:
        masker, tokens = Masker(MaskingConfig(unit=unit), tokenizer()), row()
        sizes = [
            len(c) / (1 + (np.diff(c) > 1).sum())
            for c in (masker.choose(tokens, np.random.default_rng(s)) for s in range(300))
        ]
        return float(np.mean(sizes))

    assert runs("tokens") < 1.4
    assert runs("spans") > 2


def test_eighty_ten_ten() -> None:
    masker, tokens = Masker(MaskingConfig(), tokenizer()), row()
    found = {"masked": 0, "same": 0, "other": 0}
    replacements = set()
    for seed in range(3000):
        generator = np.random.default_rng(seed)
        chosen = masker.choose(tokens, generator)
        hidden = masker.hide(tokens, chosen, generator)
        assert np.array_equal(np.delete(hidden, chosen), np.delete(tokens, chosen))
        for new, old in zip(hidden[chosen], tokens[chosen], strict=True):
            found["masked" if new == 4 else "same" if new == old else "other"] += 1
            replacements |= {int(new)} if new not in (4, old) else set()
    shares = {name: count / sum(found.values()) for name, count in found.items()}
    assert shares == pytest.approx({"masked": 0.8, "same": 0.1 + 0.1 / 40, "other": 0.1 * 39 / 40}, abs=0.01)
    assert replacements == set(range(5, 45))  # never a special one


def test_nothing_to_hide() -> None:
    masker = Masker(MaskingConfig(), tokenizer())
    assert len(masker.choose(np.array([2, 3]), np.random.default_rng(0))) == 0


@pytest.mark.parametrize(
    ("names", "want"),
    [
        (["a", "##b", "[CLS]"], [False, True, False]),
        (["Ġa", "b", "<s>", ",", "Ġ"], [False, True, False, False, False]),
        (["a", "b"], [False, False]),
    ],
)
def test_continuations(names: list[str], want: list[bool]) -> None:
    assert continuations(names).tolist() == want


@pytest.mark.parametrize("missing", ["[MASK]", "[CLS]", "[SEP]", "[PAD]"])
def test_tokenizer_without_a_special_token(missing: str) -> None:
    with pytest.raises(TrunklineError, match=rf"the tokenizer has no \{missing[:-1]}\] or <.*> token"):
        special_ids(tokenizer([name for name in WORDS if name != missing]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"probability": 0.0}, r"masking.probability=0.0 must lie between"),
        ({"masked": -0.1}, "masked=-0.1"),
        ({"masked": 0.9, "replaced": 0.2}, "are shares of a whole"),
        ({"mean_span": 0.5}, "mean_span is 1 or more"),
    ],
)
def test_bad_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TrunklineError, match=message):
        MaskingConfig(**options)


def data(folder: Path, **options: Any) -> MaskedTextData:
    path = folder / "text.jsonl"
    lines = [" ".join(f"{'abcdefgh'[(n * k) % 8]}{k % 5}" for k in range(1, 4 + n % 30)) for n in range(60)]
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    fields = {"max_length": 16, "vocab_size": 80, "val_fraction": 0.3, "batch_size": 4, "cache_dir": str(folder / "c")}
    made = MaskedTextData(str(path), **{**fields, **options})  # type: ignore[arg-type]
    made.setup("fit")
    return made


def whole(item: dict[str, Any]) -> list[int]:
    """The row before anything was hidden."""
    tokens = item["tokens"].clone()
    counted = item["targets"] != -100
    tokens[item["positions"][counted]] = item["targets"][counted]
    return tokens.tolist()


@pytest.mark.parametrize("pairs", [False, True])
def test_rows_are_pure_functions_of_seed_epoch_and_index(pairs: bool, tmp_path: Path) -> None:
    made, again = data(tmp_path, next_sentence=pairs), data(tmp_path, next_sentence=pairs)
    train, val = made.datasets["train"], made.datasets["val"]
    keys = [SampleKey(0, n) for n in range(8)]
    batch: Any = train.__getitems__(keys)  # type: ignore[attr-defined]
    for key, item in zip(keys, batch, strict=True):
        other = again.datasets["train"][key]
        assert all(np.array_equal(item[name], other[name]) for name in other)
    rows = [[train[SampleKey(epoch, 3)]["tokens"].tolist() for epoch in (0, 1)] for _ in range(2)]
    assert rows[0] == rows[1]
    assert rows[0][0] != rows[0][1]  # drawn anew
    assert val[SampleKey(0, 2)]["tokens"].tolist() == val[SampleKey(5, 2)]["tokens"].tolist()
    seeded = data(tmp_path, next_sentence=pairs, seed=1)
    assert seeded.datasets["train"][SampleKey(0, 3)]["tokens"].tolist() != rows[0][0]


def test_any_number_of_workers_hides_the_same(tmp_path: Path) -> None:
    """Which tokens are hidden is drawn for a row alone, by seed, epoch and index."""
    made = data(tmp_path, num_workers=0)
    expected = [{name: values.tolist() for name, values in batch.items()} for batch in made.train_dataloader()]
    made.num_workers = 2
    assert [{name: values.tolist() for name, values in batch.items()} for batch in made.train_dataloader()] == expected
    for index, positions, targets in (
        (i, *v) for b in expected for i, *v in zip(b["index"], b["positions"], b["targets"], strict=True)
    ):
        text = np.array(whole(made.datasets["train"][SampleKey(0, index)]))
        size = len(text) - text[::-1].tolist().index(3)
        chosen = made.masker.choose(text[:size], np.random.default_rng((0, 0, index)))
        assert positions[: len(chosen)] == chosen.tolist()
        assert targets == [*text[chosen], *[-100] * (len(targets) - len(chosen))]


def test_validation_rows_are_the_text(tmp_path: Path) -> None:
    made = data(tmp_path)
    val, stream = made.datasets["val"], made.preparation.stream("val")
    text = []
    for n in range(len(val)):  # type: ignore[arg-type]
        tokens = whole(val[SampleKey(0, n)])
        stop = len(tokens) - tokens[::-1].index(3)  # the last [SEP]
        assert tokens[0] == 2
        assert set(tokens[stop:]) <= {0}
        text += tokens[1 : stop - 1]
    assert text == stream.read(0, len(stream)).tolist()


def test_targets_padding_and_fillers(tmp_path: Path) -> None:
    val = data(tmp_path).datasets["val"]
    last = val[SampleKey(0, len(val) - 1)]  # type: ignore[arg-type]
    assert last["positions"].shape == last["targets"].shape == (2,)  # 15% of 14
    assert last["mask"].tolist() == [token != 0 for token in whole(last)]
    assert set(val[SampleKey(0, 0, valid=False)]["targets"].tolist()) == {-100}
    assert "mask" not in val[SampleKey(0, 0)]
    pairs = data(tmp_path, next_sentence=True).datasets["train"]
    rows = [pairs[SampleKey(0, n)] for n in range(len(pairs))]  # type: ignore[arg-type]
    assert any(row["mask"].all() for row in rows)  # also a batch without padding has a mask


def test_pairs_come_from_document_order(tmp_path: Path) -> None:
    made = data(tmp_path, next_sentence=True)
    train, stream = made.datasets["train"], made.preparation.stream("train")
    ends = stream.document_ends().tolist()
    documents = [stream.read(a, b - 1).tolist() for a, b in zip([0, *ends[:-1]], ends, strict=True)]

    def inside(part: list[int]) -> set[int]:
        return {n for n, d in enumerate(documents) for i in range(len(d)) if d[i : i + len(part)] == part}

    follows = []
    for epoch in range(3):
        for n in range(len(train)):  # type: ignore[arg-type]
            item = train[SampleKey(epoch, n)]
            row = whole(item)
            first = row[1 : row.index(3)]
            second = row[len(first) + 2 : row.index(3, len(first) + 2)]
            assert item["segment"].tolist() == [0] * (len(first) + 2) + [1] * (len(second) + 1) + [0] * (
                16 - len(first) - len(second) - 3
            )
            assert first
            assert second
            assert inside(first)
            assert inside(second)
            follows.append(item["follows"])
            if item["follows"]:
                assert inside(first + second)
    assert 0.4 < np.mean(follows) < 0.6
    filler = train[SampleKey(0, 0, valid=False)]
    assert filler["follows"] == -100


def test_unigram_entropy(tmp_path: Path) -> None:
    made = data(tmp_path)
    stream = made.preparation.stream("train")
    counts = np.bincount(stream.read(0, len(stream)), minlength=5).astype(float)
    counts[:5] = 0
    share = counts[counts > 0] / counts.sum()
    assert made.unigram_entropy == pytest.approx(-(share * np.log(share)).sum())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 4}, "max_length=4 leaves no room"),
        ({"tokenizer": "bpe", "vocab_size": 300}, r"no \[CLS\] or <s> token, .* set tokenizer=wordpiece"),
    ],
)
def test_bad_input(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(TrunklineError, match=message):
        data(tmp_path, **options)
