"""Hidden spans of text against hand-made counts and the text itself, and rows as pure functions of their keys."""

import json
from collections import Counter
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from trunkline import TrunklineError
from trunkline.contract import HasFacts
from trunkline.datamodules import SpanCorruptionData
from trunkline.datamodules.samplers import SampleKey
from trunkline.datamodules.text.span_corruption import SpanCorruption, corrupt
from trunkline.datamodules.tokenizers import train_bpe, train_tokenizer

LINES = [" ".join(f"{'abcdefgh'[(n * k) % 8]}{k % 5}" for k in range(1, 9 + n % 30)) for n in range(80)]
PAD, END, FIRST = 0, 1, 2
"""Ids in a tokenizer that is learnt; the sentinels have 2 to 101."""


def data(folder: Path, **options: Any) -> SpanCorruptionData:
    path = folder / "text.jsonl"
    if not path.exists():
        path.write_text("".join(json.dumps({"text": line}) + "\n" for line in LINES))
    fields = {"max_length": 32, "vocab_size": 370, "val_fraction": 0.3, "batch_size": 4, "cache_dir": str(folder / "c")}
    return SpanCorruptionData(str(path), **{**fields, **options})


def ready(folder: Path, **options: Any) -> SpanCorruptionData:
    made = data(folder, **options)
    made.setup("fit")
    return made


def row(item: dict[str, Any]) -> tuple[list[int], list[int]]:
    """Source and target without end, start and padding; asserts that these are where they must be."""
    mask = item.get("mask", torch.ones(len(item["tokens"])))
    size, count = int(mask.sum()), int((item["targets"] != -100).sum())
    source, target = item["tokens"][:size].tolist(), item["targets"][:count].tolist()
    assert mask.tolist() == [True] * size + [False] * (len(mask) - size)
    assert item["target_tokens"][:count].tolist() == [PAD, *target[:-1]]
    assert (source[-1], target[-1]) == (END, END)
    return source[:-1], target[:-1]


def spans_of(source: list[int], target: list[int]) -> tuple[list[int], list[list[int]]]:
    """The text of a row, and its hidden spans, in another way than they were made: by reading both sequences."""

    def is_sentinel(token: int) -> bool:
        return FIRST <= token < FIRST + 100

    spans: dict[int, list[int]] = {}
    for token in target:
        if is_sentinel(token):
            spans[token] = []
            last = token
        else:
            spans[last].append(token)
    assert list(spans) == [FIRST + n for n in range(len(spans))]
    assert [token for token in source if is_sentinel(token)] == list(spans)
    assert all(not (is_sentinel(a) and is_sentinel(b)) for a, b in pairwise(source))
    assert all(spans.values())
    text = [token for place in source for token in (spans[place] if is_sentinel(place) else [place])]
    return text, list(spans.values())


# --- counts and lengths ---


def test_lengths_of_t5() -> None:
    """T5's own row: 568 tokens make 512 in the source and 114 in the target."""
    corruption = SpanCorruption()
    assert corruption.text_length(512) == 568
    assert corruption.counts(568) == (85, 28)
    assert corruption.lengths(568) == (512, 114)


@pytest.mark.parametrize("density", [0.01, 0.15, 0.5])
@pytest.mark.parametrize("mean", [1.0, 3.0, 20.0])
def test_any_source_length_is_reached_exactly(density: float, mean: float) -> None:
    corruption = SpanCorruption(density, mean)
    for source_length in range(2, 150):
        length = corruption.text_length(source_length)
        assert corruption.lengths(length)[0] == source_length
        assert corruption.lengths(length + 1)[0] == source_length + 1
    for length in range(1, 300):
        hidden, spans = corruption.counts(length)
        assert 1 <= spans <= hidden <= length
        assert spans <= length - hidden + 1
        assert hidden < length or length == 1


@pytest.mark.parametrize("length", [1, 2, 3, 20, 568])
def test_spans_have_these_counts_and_do_not_touch(length: int) -> None:
    corruption = SpanCorruption()
    for seed in range(200):
        starts, sizes = corruption.choose(length, np.random.default_rng(seed))
        stops = starts + sizes
        assert (int(sizes.sum()), len(sizes)) == corruption.counts(length)
        assert sizes.min() >= 1
        assert starts[0] >= 0
        assert stops[-1] <= length
        assert (starts[1:] > stops[:-1]).all()


def test_all_choices_are_equally_likely() -> None:
    """Three of eight tokens in two spans, by counting: every set of positions with two runs."""
    corruption = SpanCorruption(0.375, 1.5)
    assert corruption.counts(8) == (3, 2)
    want = {c for c in combinations(range(8), 3) if sum(b - a > 1 for a, b in pairwise(c)) == 1}
    generator, found = np.random.default_rng(0), Counter[tuple[int, ...]]()
    for _ in range(6000):
        starts, sizes = corruption.choose(8, generator)
        found[tuple(int(i) for start, size in zip(starts, sizes, strict=True) for i in range(start, start + size))] += 1
    assert set(found) == want
    expected = 6000 / len(want)
    assert all(abs(n - expected) < 5 * expected**0.5 for n in found.values())


def test_corrupt_by_hand() -> None:
    tokens, sentinels = np.arange(10, 20), np.array([99, 98, 97])
    source, target = corrupt(tokens, np.array([0, 4]), np.array([1, 3]), sentinels)
    assert source.tolist() == [99, 11, 12, 13, 98, 17, 18, 19]
    assert target.tolist() == [99, 10, 98, 14, 15, 16]
    assert tokens.tolist() == list(range(10, 20))  # not changed


# --- rows ---


def test_source_and_target_give_back_the_text(tmp_path: Path) -> None:
    made = ready(tmp_path)
    assert isinstance(made, HasFacts)
    val, stream = made.datasets["val"], made.preparation.stream("val")
    text, hidden = [], 0
    for n in range(len(val)):  # type: ignore[arg-type]
        found, spans = spans_of(*row(val[SampleKey(0, n)]))
        text += found
        hidden += sum(map(len, spans))
    assert text == stream.read(0, len(stream)).tolist()
    assert hidden / len(text) == pytest.approx(0.15, abs=0.02)


def test_training_rows_are_whole_and_their_text_is_the_corpus(tmp_path: Path) -> None:
    made = ready(tmp_path, max_length=96)
    train, stream = made.datasets["train"], made.preparation.stream("train")
    whole, lengths = bytes(stream.read(0, len(stream)).astype(np.uint16)), []
    for epoch in range(3):
        for n in range(len(train)):  # type: ignore[arg-type]
            item = train[SampleKey(epoch, n)]
            assert item["tokens"].shape == (96,)
            assert item["target_tokens"].shape == item["targets"].shape == (made.max_target_length,)
            assert "mask" not in item
            assert (item["targets"] != -100).all()
            text, spans = spans_of(*row(item))
            assert len(text) == made.text_length
            assert bytes(np.array(text, np.uint16)) in whole
            lengths += [len(span) for span in spans]
    assert np.mean(lengths) == pytest.approx(3, abs=0.3)
    assert len(set(lengths)) > 4


def test_the_last_row_in_evaluation_is_padded(tmp_path: Path) -> None:
    made = ready(tmp_path)
    val, size = made.datasets["val"], len(made.preparation.stream("val"))
    last = val[SampleKey(0, len(val) - 1)]  # type: ignore[arg-type]
    rest = size % made.text_length
    assert rest  # else this test shows nothing
    assert (int(last["mask"].sum()), int((last["targets"] != -100).sum())) == SpanCorruption().lengths(rest)
    assert last["tokens"].shape == (32,)


def test_rows_are_pure_functions_of_seed_epoch_and_index(tmp_path: Path) -> None:
    made, again, seeded = ready(tmp_path), ready(tmp_path), ready(tmp_path, seed=1)
    for split in ("train", "val"):
        for key in (SampleKey(epoch, n) for epoch in range(2) for n in range(4)):
            item, other = made.datasets[split][key], again.datasets[split][key]
            assert item.keys() == other.keys()
            assert all(np.array_equal(item[name], other[name]) for name in item)
    train, val = made.datasets["train"], made.datasets["val"]
    assert not torch.equal(train[SampleKey(0, 3)]["targets"], train[SampleKey(1, 3)]["targets"])
    assert not torch.equal(train[SampleKey(0, 3)]["targets"], seeded.datasets["train"][SampleKey(0, 3)]["targets"])
    assert torch.equal(val[SampleKey(0, 2)]["targets"], val[SampleKey(5, 2)]["targets"])
    texts = [spans_of(*row(val[SampleKey(epoch, 1)]))[0] for epoch in (0, 5)]
    assert texts[0] == texts[1]


def test_the_same_text_has_other_spans_in_another_epoch(tmp_path: Path) -> None:
    train: Any = ready(tmp_path).datasets["train"]
    text = train.blocks.read(SampleKey(0, 0))
    train.blocks.read = lambda key: text  # else the text moves with the epoch too
    first, again, later = (row(train[SampleKey(epoch, 0)]) for epoch in (0, 0, 1))
    assert first == again != later
    train.fixed = True
    assert row(train[SampleKey(0, 0)]) == row(train[SampleKey(1, 0)])


def test_batches_have_their_documented_keys_and_types(tmp_path: Path) -> None:
    made = ready(tmp_path)
    names = {"tokens", "target_tokens", "targets", "truncated", "index", "valid"}
    for batch, padded in ((next(iter(made.train_dataloader())), False), ([*made.val_dataloader()][-1], True)):
        assert set(batch) == names | ({"mask"} if padded else set())
        assert {batch[name].dtype for name in ("tokens", "target_tokens", "targets", "truncated")} == {torch.int64}
        assert {batch[name].dtype for name in ("mask", "valid") if name in batch} == {torch.bool}
        assert set(batch["truncated"].tolist()) == {0}


def test_fillers_have_no_targets(tmp_path: Path) -> None:
    filler = ready(tmp_path).datasets["val"][SampleKey(0, 0, valid=False)]
    assert set(filler["targets"].tolist()) == {-100}


# --- facts and tokenizers ---


def test_facts_before_the_text_is_tokenised(tmp_path: Path) -> None:
    made = data(tmp_path)
    facts = made.facts
    assert not made.datasets
    assert (facts.start_token, facts.end_token, facts.max_length) == (PAD, END, 32)
    assert (facts.vocab_size, facts.target_vocab_size, facts.pair) == (370, None, None)
    assert facts.max_target_length == made.max_target_length == SpanCorruption().lengths(made.text_length)[1]
    assert set(made.state_dict()) == {"source", "rows", "tokenizer"}


def test_a_tokenizer_of_t5_s_kind(tmp_path: Path) -> None:
    """Its sentinels have the last ids in falling order, and `</s>` ends a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "</s>", "<unk>", *sorted({word for line in LINES for word in line.split()})]
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>", *(f"<extra_id_{n}>" for n in reversed(range(10)))])
    tokenizer.save(str(tmp_path / "t5.json"))
    made = ready(tmp_path, tokenizer=str(tmp_path / "t5.json"), vocab_size=None)
    assert (made.facts.start_token, made.facts.end_token) == (0, 1)
    item = made.datasets["train"][SampleKey(0, 0)]
    top = len(words) + 9
    assert [token for token in item["tokens"].tolist() if token >= len(words)] == [top, top - 1]
    assert item["targets"][0] == top
    with pytest.raises(
        TrunklineError, match=r"max_length=300 has 17 hidden spans, but .*t5\.json has only 10"
    ) as caught:
        data(tmp_path, tokenizer=str(tmp_path / "t5.json"), vocab_size=None, max_length=300).prepare_data()
    assert caught.value.field == "data.max_length"


def test_without_padding_the_end_token_starts_a_target(tmp_path: Path) -> None:
    special = ["<|endoftext|>", *(f"<extra_id_{n}>" for n in range(4))]
    train_bpe(LINES, 300, special).save(str(tmp_path / "t.json"))
    facts = data(tmp_path, tokenizer=str(tmp_path / "t.json"), vocab_size=None).facts
    assert facts.start_token == facts.end_token == 0


def test_learnt_tokenizer_has_sentinels_that_take_the_space_before_them() -> None:
    tokenizer = train_tokenizer("span_bpe", ["the cat sat on the mat"] * 9, 400)
    assert tokenizer.token_to_id("<extra_id_99>") == FIRST + 99
    ids = tokenizer.encode("the <extra_id_0> sat").ids
    assert ids == [*tokenizer.encode("the").ids, FIRST, *tokenizer.encode(" sat").ids]
    with pytest.raises(TrunklineError, match=r"vocab_size=357 is too small for span_bpe; set it to at least 358"):
        train_tokenizer("span_bpe", LINES, 357)
    assert train_tokenizer("span_bpe", LINES, 358).get_vocab_size() == 358


@pytest.mark.parametrize(
    ("options", "field", "message"),
    [
        ({"max_length": 4}, "max_length", "max_length=4 leaves no room"),
        ({"noise_density": 0.0}, "noise_density", r"noise_density=0.0 must lie between 0 and 1"),
        ({"noise_density": 1.0}, "noise_density", r"noise_density=1.0 must lie between 0 and 1"),
        ({"noise_density": 0.8}, "noise_density", r"noise_density=0.8 with mean_span=3.0 leaves too few tokens to"),
        ({"mean_span": 0.5}, "mean_span", r"mean_span=0.5 must be at least 1"),
        ({"tokenizer": "bpe", "vocab_size": 300}, "tokenizer", r"tokenizer bpe has no token <extra_id_0>.*span_bpe"),
        ({"max_length": 4000}, "max_length", r"max_length=4000 has 222 hidden spans, .* only 100 tokens <extra_id_0>"),
        (
            {"max_length": 8000, "mean_span": 20.0},
            "max_length",
            r"the train split of .* fewer than one row needs \(9\d{3}\)",
        ),
    ],
)
def test_bad_input(options: dict[str, Any], field: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(TrunklineError, match=message) as caught:
        ready(tmp_path, **options)
    assert caught.value.field == f"data.{field}"
