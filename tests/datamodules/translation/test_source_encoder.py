"""Sources as tokens, against the tokenizers themselves and against the rows of training."""

import json
from pathlib import Path
from typing import Any

import pytest
from pair_files import write
from tokenizers import Tokenizer, models, pre_tokenizers

from trunkline import TrunklineError
from trunkline.datamodules.samplers import SampleKey
from trunkline.datamodules.tokenizers import train_tokenizer
from trunkline.datamodules.translation.source_encoder import SourceEncoder
from trunkline.datamodules.translation.translation_data import TranslationData

TEXTS = ["the cat sat on the mat", "a  mat,\nand <|endoftext|> a <2de> hat ", "ü"]


def tokenizer(name: str = "bpe", languages: tuple[str, ...] = ("de", "fr")) -> Tokenizer:
    learnt = train_tokenizer(name, TEXTS * 3, 300)
    learnt.add_special_tokens([f"<2{language}>" for language in languages])
    return learnt


def fault(encoder: SourceEncoder, texts: list[str], language: str | None = None) -> TrunklineError:
    with pytest.raises(TrunklineError) as caught:
        encoder.encode(texts, language)
    return caught.value


@pytest.mark.parametrize("name", ["bpe", "chars", "masked_bpe", "wordpiece"])
def test_sources_are_language_prefix_text_and_end(name: str) -> None:
    learnt = tokenizer(name)
    end, german = (learnt.token_to_id(token) for token in ("<|endoftext|>", "<2de>"))
    end = learnt.token_to_id("[SEP]") if end is None else end
    plain = Tokenizer.from_str(learnt.to_str())
    plain.encode_special_tokens = True  # their names in a text are text
    texts = [plain.encode(text, add_special_tokens=False).ids for text in TEXTS]
    prefixed = [plain.encode(f"translate: {text}", add_special_tokens=False).ids for text in TEXTS]

    encoder = SourceEncoder(learnt, max_length=100)
    assert encoder.encode(TEXTS) == [[*ids, end] for ids in texts]
    encoder = SourceEncoder(learnt, prefix="translate: ", languages=["de", "fr"], max_length=100)
    assert encoder.encode(TEXTS, "de") == [[german, *ids, end] for ids in prefixed]
    assert encoder.encode([TEXTS[2]], "fr") == [[learnt.token_to_id("<2fr>"), *prefixed[2], end]]
    assert encoder.encode([], "de") == []
    assert encoder.cut == 0


def test_long_sources_lose_the_end_of_their_text_and_are_counted() -> None:
    encoder = SourceEncoder(tokenizer(), max_length=100)
    whole = encoder.encode(TEXTS)
    short = SourceEncoder(tokenizer(), max_length=len(whole[0]))
    assert short.encode(TEXTS[:1]) == whole[:1]  # as long as it may be
    assert short.cut == 0
    short = SourceEncoder(tokenizer(), max_length=4)
    assert short.encode(TEXTS) == [[*ids[:3], ids[-1]] if len(ids) > 4 else ids for ids in whole]
    assert short.cut == 2
    short.encode(TEXTS)
    assert short.cut == 4
    short = SourceEncoder(tokenizer(), languages=["de", "fr"], max_length=4)
    german = tokenizer().token_to_id("<2de>")
    assert short.encode(TEXTS, "de")[0] == [german, *whole[0][:2], whole[0][-1]]


def test_a_source_of_one_token() -> None:
    learnt = tokenizer("chars")
    assert SourceEncoder(learnt, max_length=2).encode(["cat"]) == [[learnt.token_to_id("c"), 0]]
    encoder = SourceEncoder(learnt, languages=["de"], max_length=3)
    assert encoder.encode(["cat"], "de") == [[learnt.token_to_id("<2de>"), learnt.token_to_id("c"), 0]]


def test_long_sources_are_refused_with_both_numbers() -> None:
    encoder = SourceEncoder(tokenizer("chars"), languages=["de"], max_length=10, too_long="refuse")
    assert len(encoder.encode(["the cat", "the mat "], "de")[1]) == 10
    error = fault(encoder, ["the cat", "the cat sat"], "de")
    assert "text 2 has 13 tokens, but the model reads at most 10; shorten it" in str(error)


@pytest.mark.parametrize("empty", ["", "  ", "\n", "\u3000"])
def test_empty_texts_are_named(empty: str) -> None:
    encoder = SourceEncoder(tokenizer(), prefix="translate: ", max_length=100)
    assert "text 2 is empty" in str(fault(encoder, ["a", empty, "b"]))


def test_messages_name_texts_as_the_caller_does() -> None:
    encoder = SourceEncoder(tokenizer("chars"), max_length=4, too_long="refuse")
    for texts, part in ((["a", " "], "in.txt:7 is empty"), (["a", "a hat"], "in.txt:7 has 6 tokens")):
        with pytest.raises(TrunklineError, match=part):
            encoder.encode(texts, names=["in.txt:6", "in.txt:7"])


def test_languages() -> None:
    several = SourceEncoder(tokenizer(), languages=["de", "fr"], max_length=100)
    error = fault(several, ["a"], "es")
    assert "language=es: the model was not trained on it; choose among de, fr" in str(error)
    assert error.field == "language"
    error = fault(several, ["a"])
    assert "the model has several target languages; name one with language: de, fr" in str(error)
    assert error.field == "language"
    error = fault(SourceEncoder(tokenizer(), max_length=100), ["a"], "de")
    assert "language=de, but the model was trained without target languages; leave it out" in str(error)
    assert error.field == "language"


def test_tokenizers_that_do_not_fit() -> None:
    with pytest.raises(TrunklineError, match="the tokenizer has no token <2es> for the target language 'es'") as caught:
        SourceEncoder(tokenizer(), languages=["de", "es"], max_length=100)
    assert caught.value.field == "data.tokenizer"
    endless = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    endless.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(TrunklineError, match="the tokenizer has no token that ends a document") as caught:
        SourceEncoder(endless, max_length=100)
    assert caught.value.field == "data.tokenizer"
    for languages, length in ((None, 1), (["de"], 2)):
        with pytest.raises(TrunklineError, match=f"max_length={length} leaves no room"):
            SourceEncoder(tokenizer(), languages=languages, max_length=length)


def sources_of(data: TranslationData) -> list[list[int]]:
    """The training sources as the network sees them."""
    items = [data.datasets["train"][SampleKey(0, row)] for row in range(len(data.datasets["train"]))]
    return [item["tokens"][item["mask"]].tolist() for item in items]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"prefix": "translate: ", "max_length": 8},
        {"languages": ["de", "fr"], "language_column": "to", "prefix": "x ", "tokenizer": "chars"},
        {"languages": ["de", "fr"], "language_column": "to", "target_tokenizer": "chars", "max_length": 5},
    ],
)
def test_sources_are_those_of_training(options: dict[str, Any], tmp_path: Path) -> None:
    """From the data itself, and from what a checkpoint keeps of it."""
    languages = ["de", "fr", "de"]
    rows = [{"source": text, "target": "x y", "to": to} for text, to in zip(TEXTS, languages, strict=True)]
    train = write(tmp_path / "in.jsonl", "\n".join(map(json.dumps, rows)))
    options = {"tokenizer": "bpe", "vocab_size": 300, **options}
    data = TranslationData(source=str(train), val_source=str(train), cache_dir=str(tmp_path / "cache"), **options)
    data.setup("fit")
    wanted = sources_of(data)
    encoders = [data.facts.encode_source, SourceEncoder.from_state(data.state_dict()).encode]
    for encode in encoders:
        assert encode is not None
        told = [language if "languages" in options else None for language in languages]
        assert [encode([text], language)[0] for text, language in zip(TEXTS, told, strict=True)] == wanted
    assert max(map(len, wanted)) <= options.get("max_length", 128)


def test_an_encoder_from_a_checkpoint_can_refuse(tmp_path: Path) -> None:
    state = {
        "tokenizer": tokenizer("chars").to_str(),
        "target_tokenizer": None,
        "settings": {
            "prefix": "> ",
            "languages": None,
            "max_length": 8,
            "max_target_length": 9,
            "start_token": "<|endoftext|>",
        },
    }
    assert len(SourceEncoder.from_state(state).encode(["the cat"])[0]) == 8
    error = fault(SourceEncoder.from_state(state, too_long="refuse"), ["the cat"])
    assert "text 1 has 10 tokens, but the model reads at most 8" in str(error)
