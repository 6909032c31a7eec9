"""Rows of pairs: exactly the texts' tokens, on disk once, cut, left out, padded and batched as the settings say."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from trunkline import TrunklineError
from trunkline.contract import IGNORE
from trunkline.datamodules import TranslationData
from trunkline.datamodules.samplers import SampleKey
from trunkline.datamodules.splits import split_of
from trunkline.datamodules.text.preparation import Preparation
from trunkline.datamodules.translation.source_encoder import SourceEncoder

WORDS = ["</s>", "?", "a", "b", "c", "d", "to", "de", "<2de>", "<2fr>", "<pad>"]
END, A, B, C, D, TO, DE, FR, PAD = 0, 2, 3, 4, 5, 6, 8, 9, 10


def words(folder: Path, vocabulary: list[str] = WORDS, name: str = "words.json") -> str:
    """The file of a tokenizer of whole words."""
    made = Tokenizer(models.WordLevel({word: n for n, word in enumerate(vocabulary)}, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens([AddedToken(word, special=True) for word in vocabulary if "<" in word])
    made.save(str(folder / name))
    return str(folder / name)


def table(file: Path, rows: list[tuple[str, ...]]) -> str:
    names = ("source", "target", "language")
    file.write_text("".join(json.dumps(dict(zip(names, row, strict=False))) + "\n" for row in rows))
    return str(file)


def data(folder: Path, rows: list[tuple[str, ...]] | None = None, **options: Any) -> TranslationData:
    source = options.pop("source", None) or table(folder / "pairs.jsonl", rows or [])
    options = {"cache_dir": str(folder / "cache"), "batch_size": 4, **options}
    if "tokenizer" not in options:
        options["tokenizer"] = words(folder)
    return TranslationData(source, **options)


def sentences(count: int, longest: int = 20) -> list[tuple[str, str]]:
    chance = random.Random(3)
    return [
        (" ".join(chance.choices("abcd", k=chance.randint(1, longest))), " ".join(chance.choices("abc", k=n % 9 + 1)))
        for n in range(count)
    ]


def batch(made: TranslationData, split: str, *rows: int, valid: bool = True) -> dict[str, torch.Tensor]:
    made.setup("fit")
    items = made.datasets[split].__getitems__([SampleKey(0, row, valid) for row in rows])  # type: ignore[attr-defined]
    return torch.utils.data.default_collate(items)


def unpadded(rows: dict[str, torch.Tensor]) -> list[list[int]]:
    return [tokens[mask].tolist() for tokens, mask in zip(rows["tokens"], rows["mask"], strict=True)]


FOUR = [("a b", "c"), ("d", "a b c d a b c d"), ("a a a a a a a a a", "b"), ("c", "d")]


# --- a row


def test_a_batch_is_padded_to_its_longest_row(tmp_path: Path) -> None:
    got = batch(data(tmp_path, FOUR, val_fraction=0), "train", 0, 1, 2)
    assert got["tokens"].tolist() == [
        [A, B, END] + [0] * 13,
        [D, END] + [0] * 14,
        [A] * 9 + [END] + [0] * 6,
    ]
    assert got["mask"].tolist() == [[n < size for n in range(16)] for size in (3, 2, 10)]
    # The longest target has 8 tokens and its end.
    assert got["target_tokens"].tolist() == [
        [END, C] + [0] * 14,
        [END, A, B, C, D, A, B, C, D] + [0] * 7,
        [END, B] + [0] * 14,
    ]
    assert got["targets"].tolist() == [
        [C, END] + [IGNORE] * 14,
        [A, B, C, D, A, B, C, D, END] + [IGNORE] * 7,
        [B, END] + [IGNORE] * 14,
    ]
    assert got["index"].tolist() == [0, 1, 2]
    assert got["valid"].tolist() == [True] * 3
    assert got["truncated"].tolist() == [0] * 3
    assert {name: values.dtype for name, values in got.items()} == {
        **dict.fromkeys(["tokens", "target_tokens", "targets", "truncated", "index"], torch.int64),
        **dict.fromkeys(["mask", "valid"], torch.bool),
    }
    short = batch(data(tmp_path, FOUR, val_fraction=0), "train", 0, 3)
    assert (short["tokens"].shape, short["targets"].shape) == ((2, 8), (2, 8))
    assert short["tokens"][0].tolist() == got["tokens"][0, :8].tolist()


def test_a_row_is_never_padded_beyond_the_maximum(tmp_path: Path) -> None:
    got = batch(data(tmp_path, FOUR, val_fraction=0, max_length=10, max_target_length=13), "train", 1, 2)
    assert (got["tokens"].shape, got["targets"].shape) == ((2, 10), (2, 13))


def test_a_filler_has_no_targets(tmp_path: Path) -> None:
    made = data(tmp_path, FOUR, val_fraction=0, max_length=6)
    real, filler = batch(made, "train", 2), batch(made, "train", 2, valid=False)
    assert (real["truncated"].tolist(), filler["truncated"].tolist()) == ([1], [0])
    assert filler["targets"].tolist() == [[IGNORE] * 8]
    assert filler["valid"].tolist() == [False]
    for name in ("tokens", "mask", "target_tokens", "index"):
        assert torch.equal(real[name], filler[name])


def test_a_start_token_can_be_named(tmp_path: Path) -> None:
    made = data(tmp_path, FOUR, val_fraction=0, start_token="<pad>")
    assert batch(made, "train", 0)["target_tokens"].tolist() == [[PAD, C, 0, 0, 0, 0, 0, 0]]
    assert (made.facts.start_token, made.facts.end_token) == (PAD, END)


# --- prefixes and languages


def test_a_source_begins_with_its_language_and_the_prefix(tmp_path: Path) -> None:
    rows = [("a b", "c", "fr"), ("e d", "a", "de")]
    options = {"languages": ["de", "fr"], "language_column": "language", "prefix": "to "}
    got = batch(data(tmp_path, rows, val_fraction=0, **options), "train", 0, 1)
    assert unpadded(got) == [[FR, TO, A, B, END], [DE, TO, 1, D, END]]
    assert got["targets"][:, 0].tolist() == [C, A]


@pytest.mark.parametrize(("tokenizer", "length"), [("chars", 50), ("bpe", 30), ("wordpiece", 30)])
def test_sources_are_encoded_as_in_training(tokenizer: str, length: int, tmp_path: Path) -> None:
    # In a text, the name of a special token is no special token.
    rows = [(f"Ünder {text} <2de> </s>.", "b", ("de", "fr")[n % 2]) for n, (text, _) in enumerate(sentences(40))]
    options: dict[str, Any] = {"languages": ["de", "fr"], "language_column": "language", "prefix": "translate: "}
    made = data(tmp_path, rows, tokenizer=tokenizer, val_fraction=0, max_length=length, **options)
    got = unpadded(batch(made, "train", *range(40)))
    facts = made.facts
    assert facts.encode_source is not None
    assert got == [facts.encode_source([text], language)[0] for text, _, language in rows]
    again = SourceEncoder.from_state(json.loads(json.dumps(made.state_dict())))
    assert got == [again.encode([text], language)[0] for text, _, language in rows]
    assert {len(row) == length for row in got} == {True, False}
    first = [token for row in got for token in row[1:]]
    assert made.vocabulary.token_to_id("<2de>") not in first


def test_both_directions_of_a_row_are_in_one_split(tmp_path: Path) -> None:
    rows = [{"translation": {"de": f"a {n}", "fr": f"b {n}"}} for n in range(40)]
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"pairs": ["de-fr", "fr-de"], "languages": ["de", "fr"], "tokenizer": "chars", "val_fraction": 0.2}
    made = data(tmp_path, source=str(source), **options)
    made.setup("fit")
    assert {split: len(made.datasets[split]) for split in ("train", "val")} == {"train": 66, "val": 14}  # type: ignore[arg-type]
    held_out = [n for n in range(40) if split_of(n, {"train": 0.8, "val": 0.2}) == "val"]
    texts = [made.pair("val", row) for row in range(14)]
    assert texts == [pair for n in held_out for pair in ((f"a {n}", f"b {n}"), (f"b {n}", f"a {n}"))]
    first = batch(made, "val", 0, 1)["tokens"][:, 0].tolist()
    assert [made.vocabulary.id_to_token(token) for token in first] == ["<2fr>", "<2de>"]


# --- one tokenizer or two


def test_a_tokenizer_for_each_side(tmp_path: Path) -> None:
    reverse = words(tmp_path, ["x", "<s>", "?", "c", "b", "a", "</s>"], "reverse.json")
    made = data(tmp_path, FOUR, val_fraction=0, target_tokenizer=reverse, target_vocab_size=16, start_token="<s>")
    got = batch(made, "train", 0, 1)
    assert unpadded(got) == [[A, B, END], [D, END]]
    assert got["target_tokens"].tolist() == [[1, 3] + [0] * 14, [1, 5, 4, 3, 2, 5, 4, 3, 2] + [0] * 7]
    assert got["targets"][0, :3].tolist() == [3, 6, IGNORE]
    facts = made.facts
    assert (facts.vocab_size, facts.target_vocab_size) == (len(WORDS), 16)
    assert (facts.start_token, facts.end_token) == (1, 6)
    assert facts.tokenizer is not None
    assert facts.target_tokenizer is not None
    assert facts.tokenizer.to_str() == Tokenizer.from_file(words(tmp_path)).to_str()
    assert facts.target_tokenizer.to_str() == Tokenizer.from_file(reverse).to_str()
    assert made.pair("train", 0) == ("a b", "c")


def test_two_learnt_tokenizers_know_their_side_alone(tmp_path: Path) -> None:
    made = data(tmp_path, [("ab", "xy"), ("b", "y")] * 5, tokenizer="chars", target_tokenizer="chars")
    assert sorted(made.vocabulary.get_vocab()) == ["<|endoftext|>", "<|unk|>", "a", "b"]
    assert sorted(made.target_vocabulary.get_vocab()) == ["<|endoftext|>", "<|unk|>", "x", "y"]
    both = data(tmp_path, [("ab", "xy"), ("b", "y")] * 5, tokenizer="chars")
    assert sorted(both.vocabulary.get_vocab()) == ["<|endoftext|>", "<|unk|>", "a", "b", "x", "y"]
    assert (both.facts.target_tokenizer, both.facts.target_vocab_size) == (None, None)


def test_facts_are_known_before_anything_is_tokenised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Preparation, "_tokenise", None)
    facts = data(tmp_path, FOUR, max_length=30, max_target_length=20, vocab_size=50).facts
    assert (facts.vocab_size, facts.max_length, facts.max_target_length) == (50, 30, 20)
    assert facts.pair is not None


# --- too long


LONG = [("a b c d a b", "c"), ("a", "b c d a b c d"), ("a b c d", "d c b a"), *[("a", "b")] * 6, ("a a a a a a", "b")]


def test_what_is_too_long_loses_its_end(tmp_path: Path) -> None:
    made = data(tmp_path, LONG, val_fraction=0, max_length=5, max_target_length=5)
    got = batch(made, "train", 0, 1, 2)
    assert unpadded(got) == [[A, B, C, D, END], [A, END], [A, B, C, D, END]]
    assert got["targets"].tolist() == [[C, END] + [IGNORE] * 3, [B, C, D, A, END], [D, C, B, A, END]]
    assert got["target_tokens"][1].tolist() == [END, B, C, D, A]
    assert got["truncated"].tolist() == [1, 1, 0]
    assert made.overlong == {"train": 3}
    assert made.summary("train") == "10 pairs, 3 of them too long and cut"


def test_what_is_too_long_can_be_left_out_of_training(tmp_path: Path) -> None:
    rows = [*LONG[:8], ("a a a a a a", "d d"), LONG[9]]  # the ninth row is that of validation
    made = data(tmp_path, rows, max_length=5, max_target_length=5, too_long="skip")
    got = batch(made, "train", *range(6))
    assert unpadded(got) == [[A, B, C, D, END]] + [[A, END]] * 5
    assert got["index"].tolist() == [*range(6)]
    assert len(made.datasets["train"]) == 6  # type: ignore[arg-type]
    assert made.overlong == {"train": 3, "val": 1}
    assert made.summary("train") == "9 pairs, 3 of them too long and left out"
    assert made.pair("train", 0) == ("a b c d", "d c b a")
    held_out = batch(made, "val", 0)
    assert unpadded(held_out) == [[A, A, A, A, END]]
    assert held_out["truncated"].tolist() == [1]
    assert made.pair("val", 0) == ("a a a a a a", "d d")
    assert made.summary("val") == "1 pairs, 1 of them too long and cut"


# --- texts of a row


def test_texts_of_evaluation_are_the_file_s_own(tmp_path: Path) -> None:
    rows = [(f"The  Number {n}\tÄ", f"Die  ZAHL {n} {'x' * n}") for n in range(30)]
    options: dict[str, Any] = {"prefix": "Say: ", "val_fraction": 0.2, "test_fraction": 0.2, "max_length": 8}
    for target in (None, "wordpiece"):
        made = data(tmp_path, rows, tokenizer="wordpiece", target_tokenizer=target, **options)
        made.setup("fit")
        pairs = {split: [made.pair(split, n) for n in range(len(rows))] for split, rows in made.datasets.items()}  # type: ignore[arg-type]
        assert len(pairs["val"]) == len(pairs["test"]) == 6
        assert set(pairs["val"] + pairs["test"]) < set(rows)
        assert pairs["val"] == [row for row in rows if row in pairs["val"]]  # in order
        assert all(target.startswith("die zahl") for _, target in pairs["train"])  # decoded, in lower case


# --- batches by tokens


def test_batches_by_tokens(tmp_path: Path) -> None:
    made = data(tmp_path, sentences(300), batch_tokens=200, val_fraction=0.2)
    made.setup("fit")
    for loader, size in ((made.train_dataloader(), 240), (made.val_dataloader(), 60)):
        batches = list(loader)
        assert len(batches) == len(loader)
        assert sorted(n for got in batches for n in got["index"].tolist()) == list(range(size))
        assert max(got[name].numel() for got in batches for name in ("tokens", "targets")) <= 200
        assert sum(got["tokens"].numel() for got in batches) < 1.6 * sum(int(got["mask"].sum()) for got in batches)
    assert [len(got["index"]) for got in batches[:2]] == [200 // 24, 200 // 24]  # longest first, not shuffled
    assert batches[0]["index"].tolist() == sorted(batches[0]["index"].tolist())


def test_evaluation_can_have_batches_of_rows(tmp_path: Path) -> None:
    made = data(tmp_path, sentences(300), batch_tokens=200, eval_batch_size=7, val_fraction=0.2)
    made.setup("fit")
    assert [got["index"].tolist() for got in made.val_dataloader()][1] == list(range(7, 14))
    assert len(made.train_dataloader()) > 240 / (200 // 8)
    rows = data(tmp_path, sentences(300), val_fraction=0.2)
    rows.setup("fit")
    assert {len(got["index"]) for got in rows.train_dataloader()} == {4}


def test_a_row_counts_with_what_is_left_of_it(tmp_path: Path) -> None:
    made = data(tmp_path, [("a " * 500, "b"), *sentences(50)], batch_tokens=64, val_fraction=0, max_length=24)
    made.setup("fit")
    assert max(got["tokens"].numel() for got in made.train_dataloader()) <= 64


def test_batches_by_tokens_smaller_than_the_longest_row(tmp_path: Path) -> None:
    made = data(tmp_path, [*sentences(20), ("a " * 60, "b")], batch_tokens=63, val_fraction=0)
    made.setup("fit")
    with pytest.raises(TrunklineError, match=r"batch_tokens=63 .* \(row 20: 61 tokens, padded to 64\)") as caught:
        made.train_dataloader()
    assert caught.value.field == "data.batch_tokens"


# --- on disk


def test_texts_are_tokenised_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = batch(data(tmp_path, FOUR, val_fraction=0), "train", 0)
    monkeypatch.setattr(Preparation, "_tokenise", None)
    # Lengths, batches and the start token are not part of the tokens.
    options = {
        "max_length": 20,
        "max_target_length": 9,
        "batch_tokens": 100,
        "too_long": "skip",
        "start_token": "<pad>",
    }
    again = data(tmp_path, FOUR, val_fraction=0, **options)
    assert torch.equal(batch(again, "train", 0)["tokens"], first["tokens"])
    stream = again.datasets["train"].source.stream  # type: ignore[attr-defined]
    assert isinstance(stream.maps[0].base, np.memmap)


def test_separate_files(tmp_path: Path) -> None:
    for name in ("train", "val", "test"):
        (tmp_path / f"{name}.de").write_text(f"a {name}\nb\n")
        (tmp_path / f"{name}.fr").write_text(f"c\nd {name}\n")
    names = {"target_source": "train.fr", "val_source": "val.de", "val_target_source": "val.fr"}
    names |= {"test_source": "test.de", "test_target_source": "test.fr"}
    paths = {field: str(tmp_path / name) for field, name in names.items()}
    made = data(tmp_path, source=str(tmp_path / "train.de"), tokenizer="chars", **paths)
    made.setup("fit")
    assert {split: len(rows) for split, rows in made.datasets.items()} == {"train": 2, "val": 2, "test": 2}  # type: ignore[arg-type]
    assert made.pair("train", 0) == ("a train", "c")
    assert made.pair("val", 0) == ("a val", "c")
    assert made.pair("test", 1) == ("b", "d test")


# --- checkpoints


def test_a_checkpoint_keeps_what_translation_needs(tmp_path: Path) -> None:
    made = data(tmp_path, FOUR, val_fraction=0, prefix="to ", languages=None, max_length=9, max_target_length=7)
    made.setup("fit")
    torch.save({"TranslationData": made.state_dict()}, tmp_path / "a.ckpt")
    state = torch.load(tmp_path / "a.ckpt", weights_only=True)["TranslationData"]
    assert state == {
        "tokenizer": Tokenizer.from_file(words(tmp_path)).to_str(),
        "target_tokenizer": None,
        "settings": {
            "prefix": "to ",
            "languages": None,
            "max_length": 9,
            "max_target_length": 7,
            "start_token": "</s>",
        },
        "source": made.source,
        "rows": {"train": 4},
        "fractions": {"val": 0, "test": 0.0},
        "overlong": {"train": 2},
    }
    made.load_state_dict(state)


def test_tokenizers_of_a_checkpoint(tmp_path: Path) -> None:
    rows = sentences(20)
    made = data(tmp_path, rows, tokenizer="chars", target_tokenizer="bpe", target_vocab_size=260)
    torch.save({"state_dict": {}, "TranslationData": made.state_dict()}, tmp_path / "a.ckpt")
    file = str(tmp_path / "a.ckpt")
    again = data(tmp_path, rows, tokenizer=file, target_tokenizer=file)
    assert again.vocabulary.to_str() == made.vocabulary.to_str()
    assert again.target_vocabulary.to_str() == made.target_vocabulary.to_str()
    again.load_state_dict(made.state_dict())
    shared = data(tmp_path, rows, tokenizer="chars")
    torch.save({"state_dict": {}, "TranslationData": shared.state_dict()}, tmp_path / "b.ckpt")
    both = data(tmp_path, rows, tokenizer="chars", target_tokenizer=str(tmp_path / "b.ckpt"))
    assert both.target_vocabulary.to_str() == shared.vocabulary.to_str()


@pytest.mark.parametrize("field", ["tokenizer", "target_tokenizer"])
def test_a_resume_with_another_tokenizer_is_refused(field: str, tmp_path: Path) -> None:
    other = words(tmp_path, ["</s>", "?", "e"], "other.json")
    before = {"tokenizer": words(tmp_path), "target_tokenizer": words(tmp_path)}
    state = data(tmp_path, FOUR, **before).state_dict()
    with pytest.raises(TrunklineError, match=f"give that checkpoint as {field}") as caught:
        data(tmp_path, FOUR, **{**before, field: other}).load_state_dict(state)
    assert caught.value.field == f"data.{field}"
