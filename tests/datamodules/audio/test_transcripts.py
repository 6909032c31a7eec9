"""How transcripts are written, and what a tokenizer does not know of them."""

from typing import Any

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from trunkline import TrunklineError
from trunkline.datamodules.audio.transcripts import (
    TranscriptNormalization,
    TranscriptTexts,
    refuse_characters,
    transcript_tokens,
    unknown_characters,
)
from trunkline.datamodules.tokenizers import train_bpe, train_chars, train_wordpiece

KEEP: dict[str, Any] = {"case": "keep", "punctuation": "keep", "unicode": "keep"}


@pytest.mark.parametrize(
    ("options", "text", "written"),
    [
        ({}, "  Don't  STOP,\tit's 5\u00a0o'clock! ", "don't stop it's 5 o'clock"),
        ({}, "the dogs' 'big' rock\u2019n\u2019roll", "the dogs big rock'n'roll"),
        ({}, "well-known and/or U.S. \u2014 50% of \u20ac3", "well known and or us 50 of 3"),
        ({}, "\ufb01ne \u2460 \uff28\uff49", "fine 1 hi"),  # a ligature, a circled digit, wide letters
        ({}, "हिन्दी में, नमस्ते।", "हिन्दी में नमस्ते"),  # vowel signs are no punctuation
        ({}, "?!...", ""),
        (KEEP, " A  b-c, \ufb01 ", "A b-c, \ufb01"),
        ({"case": "upper", "unicode": "NFC"}, "cafe\u0301 stra\u00dfe", "CAFÉ STRASSE"),
        ({"case": "keep"}, "Oh, No", "Oh No"),
        ({"punctuation": "keep"}, "Oh, No", "oh, no"),
    ],
)
def test_normalization(options: dict[str, Any], text: str, written: str) -> None:
    normalize = TranscriptNormalization(**options)
    assert normalize(text) == written
    assert normalize(written) == written


@pytest.mark.parametrize(
    ("language", "text", "written"),
    [
        ("en", "21 or 1,024", "twenty one or one thousand twenty four"),
        ("en", "3.5kg, 0!", "three point five kg zero"),
        ("en", "1.2.3 and 12,5", "one two three and twelve five"),  # no numbers of English
        ("de", "1.024 und 3,5", "eintausendvierundzwanzig und drei komma fünf"),
        ("en", "no number", "no number"),
    ],
)
def test_numbers_in_words(language: str, text: str, written: str) -> None:
    assert TranscriptNormalization(numbers="words", language=language)(text) == written


def test_a_language_without_rules_for_numbers() -> None:
    with pytest.raises(TrunklineError, match="no rules for language=xx") as error:
        TranscriptNormalization(numbers="words", language="xx")
    assert error.value.field == "data.normalization.language"
    TranscriptNormalization(language="xx")  # which spells none


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "unicode_rbnf", None)
    with pytest.raises(TrunklineError, match=r"packages unicode-rbnf and babel: pip install 'trunkline\[demo\]'"):
        TranscriptNormalization(numbers="words", language="fi")  # not one that was asked for before


# --- tokens


def test_characters_that_a_tokenizer_does_not_have() -> None:
    texts = ["ab c", "déjà", "ab"]
    assert unknown_characters(train_chars(["abcd "], 0), texts) == {"é", "j", "à"}
    assert unknown_characters(train_chars(["abcd"], 0), texts) == {"é", "j", "à", " "}
    assert unknown_characters(train_bpe(["ab"], 300), texts) == set()
    assert unknown_characters(train_wordpiece(["déjà abc"], 64), ["ab c", "x"]) == {"x"}  # it has no token for spaces
    assert unknown_characters(train_chars(["a"], 0), []) == set()
    assert unknown_characters(train_chars(["a"], 0), [""]) == set()


def test_characters_that_a_tokenizer_leaves_out() -> None:
    """A normaliser can take characters away, so that nothing is unknown."""
    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    tokenizer.normalizer = normalizers.Replace("b", "")
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    assert unknown_characters(tokenizer, ["a b c"]) == {"b", "c"}


def test_characters_of_known_words_are_known() -> None:
    tokenizer = Tokenizer(models.WordLevel({"yes": 0, "no": 1, "?": 2}, "?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    assert unknown_characters(tokenizer, ["yes no", "no"]) == set()
    assert unknown_characters(tokenizer, ["yes no", "on"]) == {"o", "n"}


def test_the_message_about_unknown_characters() -> None:
    """Each with its number and a row, the most frequent first."""
    transcripts = {"train": ["ab", "xyx", "y"], "val": ["xz"]}
    with pytest.raises(TrunklineError) as error:
        refuse_characters({"x", "y", "z"}, transcripts, lambda split, row: f"{split} {row}", "mine.json")
    assert str(error.value).startswith(
        "the tokenizer mine.json lacks 3 of the characters in the transcripts: 'x' (3 times, first in train 1), "
        "'y' (2 times, first in train 1), 'z' (1 times, first in val 0); "
    )
    assert error.value.field == "data.drop_unknown"
    many = {chr(number) for number in range(97, 117)}
    with pytest.raises(TrunklineError, match=r"lacks 20 of .*, and 12 more; change"):
        refuse_characters(many, {"train": ["".join(sorted(many))]}, lambda split, row: f"row {row}", "chars")


def test_tokens_of_transcripts() -> None:
    tokenizer = train_chars(["ab "], 0)
    tokens = transcript_tokens(tokenizer, ["ab", "", "b a"])
    ids = {token: tokenizer.token_to_id(token) for token in "ab "}
    assert [tokens[row].tolist() for row in range(3)] == [
        [ids["a"], ids["b"]],
        [],
        [ids["b"], ids[" "], ids["a"]],
    ]


def test_texts_are_known_by_their_content() -> None:
    first = TranscriptTexts(["ab", "c"])
    assert first.key == TranscriptTexts(["ab", "c"]).key
    assert first.key != TranscriptTexts(["a", "bc"]).key
    assert [(piece.split, piece.text, piece.ends) for piece in first.pieces({"train": 1.0})] == [
        ("train", "ab", True),
        ("train", "c", True),
    ]
