"""What datamodules tell of themselves, when they know it, and what it costs."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from trunkline.contract import DataFacts, HasFacts
from trunkline.datamodules import (
    ImageData,
    ImageTextData,
    LabelledTextData,
    MaskedTextData,
    SquadData,
    TaggedTextData,
    TextData,
)
from trunkline.datamodules.images import image_data
from trunkline.datamodules.text.preparation import Preparation
from trunkline.datamodules.text_encoder import TextEncoder
from trunkline.datamodules.tokenizers import size_of, train_tokenizer

WORDS = "the cat sat on the mat and the dog ran to the barn\n" * 40


@pytest.fixture
def tokenizer(tmp_path: Path) -> str:
    path = tmp_path / "tokenizer.json"
    train_tokenizer("wordpiece", [WORDS], 80).save(str(path))
    return str(path)


@pytest.fixture
def text(tmp_path: Path) -> str:
    (tmp_path / "in.txt").write_text(WORDS)
    return str(tmp_path / "in.txt")


def rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def refuse(*_: Any, **__: Any) -> None:
    raise AssertionError("this costs too much")


def test_images_know_their_classes_at_once_and_read_their_source_once(monkeypatch: pytest.MonkeyPatch) -> None:
    read, load = [], image_data.load_image_table
    monkeypatch.setattr(image_data, "load_image_table", lambda *a, **o: read.append(a) or load(*a, **o))
    data = ImageData("digits", image_size=(8, 6), channels=3, mean=(0.5,))
    expected = DataFacts(
        class_names=[str(n) for n in range(10)], image_size=(8, 6), channels=3, mean=(0.5,) * 3, std=(0.5,) * 3
    )
    assert data.facts == expected
    data.prepare_data()
    data.setup("fit")
    assert data.facts == expected
    assert data.state_dict()["class_names"] == expected.class_names
    assert len(read) == 1


def test_images_keep_what_repeats_their_splits() -> None:
    state = ImageData("digits", image_size=8, channels=1, val_fraction=0.2, split_seed=3).state_dict()
    assert state["fractions"] == {"test": 0.2, "val": 0.2}
    assert state["split_seed"] == 3


def test_text_knows_its_sizes_before_it_is_tokenised(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = TextData(text, tokenizer="bpe", vocab_size=300, max_length=16, batch_size=2, cache_dir=str(tmp_path / "c"))
    with monkeypatch.context() as patch:
        patch.setattr(Preparation, "_tokenise", refuse)
        facts = data.facts
    assert (facts.vocab_size, facts.max_length) == (300, 16)
    assert size_of(facts.tokenizer) <= 300  # type: ignore[arg-type]
    assert facts.bytes_per_token == {}
    data.setup("fit")
    assert set(data.facts.bytes_per_token) == {"train", "val"}
    assert all(1 < ratio < 10 for ratio in data.facts.bytes_per_token.values())
    assert data.facts.unigram_entropy is None
    assert data.facts.encode_masked is None


def test_masked_text_knows_how_to_read_a_mask_and_after_setup_what_a_token_tells(text: str, tmp_path: Path) -> None:
    data = MaskedTextData(text, vocab_size=80, max_length=16, batch_size=2, cache_dir=str(tmp_path / "c"))
    facts = data.facts
    assert facts.unigram_entropy is None
    assert facts.encode_masked is not None
    assert facts.tokenizer is not None
    ids, mask = facts.encode_masked("the [MASK] sat", 16, "a test: the sentence")
    assert ids.count(mask) == 1
    assert facts.tokenizer.decode(ids) == "the sat"
    data.setup("fit")
    assert 1 < (data.facts.unigram_entropy or 0) < 4


def test_tasks_know_their_classes_without_tokenising(
    tmp_path: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TextEncoder, "encode", refuse)
    labelled = rows(tmp_path / "l.jsonl", [{"text": "the cat", "label": ("b", "a")[n % 2]} for n in range(20)])
    tagged = rows(tmp_path / "t.jsonl", [{"tokens": ["the", "cat"], "tags": ["O", "N"]} for n in range(20)])
    for cls, source, names in ((LabelledTextData, labelled, ["a", "b"]), (TaggedTextData, tagged, ["N", "O"])):
        facts = cls(source, tokenizer=tokenizer, max_length=12).facts
        assert facts.class_names == names
        assert (facts.vocab_size, facts.max_length) == (size_of(facts.tokenizer), 12)  # type: ignore[arg-type]


def test_classes_are_still_known_when_the_texts_are_forgotten(tmp_path: Path, tokenizer: str) -> None:
    source = rows(tmp_path / "l.jsonl", [{"text": "the cat", "label": n % 3} for n in range(30)])
    data = LabelledTextData(source, tokenizer=tokenizer, max_length=12, batch_size=4)
    data.setup("fit")
    assert "splits" not in vars(data)
    assert data.facts.class_names == ["0", "1", "2"]


def test_questions_are_known_after_setup(tmp_path: Path, tokenizer: str) -> None:
    asked = {"question": "who sat ?", "context": "the cat sat", "answers": {"text": ["cat"], "answer_start": [4]}}
    source = rows(tmp_path / "q.jsonl", [{"id": str(n), **asked, "context": f"the cat sat {n}"} for n in range(20)])
    data = SquadData(source, tokenizer=tokenizer, max_length=24, max_question_length=8, batch_size=2)
    assert data.facts.class_names is None
    assert data.facts.questions == {}
    data.setup("fit")
    assert [question.answers for question in data.facts.questions["train"]] == [["cat"]] * 19
    assert data.facts.questions["val"][0].context == "the cat sat 8"


def test_pairs_know_images_and_words(tmp_path: Path) -> None:
    for n in range(10):
        Image.new("RGB", (8, 8), (20 * n, 0, 0)).save(tmp_path / f"{n}.png")
    source = rows(tmp_path / "p.jsonl", [{"image": f"{n}.png", "caption": f"cat {n}"} for n in range(10)])
    data = ImageTextData(source, tokenizer="chars", image_size=8, max_length=10, cache_dir=str(tmp_path / "c"))
    facts = data.facts
    assert (facts.image_size, facts.channels, facts.mean, facts.max_length) == (8, 3, (0.5,) * 3, 10)
    assert facts.tokenizer is not None
    assert facts.vocab_size == size_of(facts.tokenizer)
    assert facts.caption is not None
    assert facts.caption("val", 0) == "cat 8"
    assert isinstance(data, HasFacts)
