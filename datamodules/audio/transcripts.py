"""What is said in a clip: how a transcript is written, and the tokens of it."""

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np
from tokenizers import Tokenizer

from trunkline import TrunklineError
from trunkline.datamodules.text.text_sources import Piece
from trunkline.datamodules.text_encoder import TextEncoder
from trunkline.datamodules.text_tasks.task_text import Ragged

NUMBER = re.compile(r"[0-9]+(?:[.,][0-9]+)*")
APOSTROPHE = re.compile("(?<=\\w)['\u2019](?=\\w)")
INSIDE = "\ue000"
"""Stands for an apostrophe inside a word while punctuation is removed: a character of no meaning."""
NAMED_CHARACTERS = 8
"""Largest number of unknown characters that a message names."""
SPELLING = {"unicode_rbnf": "unicode-rbnf", "babel": "babel"}
"""Module -> the package that has it; both are needed to spell numbers."""


@dataclass
class TranscriptNormalization:
    """How transcripts are written for the network; a checkpoint keeps it, so that references are written alike.

    The steps, in this order: Unicode's normal form, numbers, punctuation, case; last, runs of white space become one
    space.

    Raises:
        TrunklineError: if a language has no rules for numbers, or a package for them is missing.
    """

    case: Literal["keep", "lower", "upper"] = "lower"
    """Case of the letters."""
    punctuation: Literal["keep", "remove"] = "remove"
    """`remove` leaves out punctuation and symbols; apostrophes inside words stay, dashes and slashes become spaces."""
    numbers: Literal["keep", "words"] = "keep"
    """`words` spells numbers in digits (1,024 or 3.5) by the rules of Unicode's CLDR."""
    language: str = "en"
    """Language of the numbers, as a code of CLDR."""
    unicode: Literal["keep", "NFC", "NFKC"] = "NFKC"
    """Unicode's normal form."""

    def __post_init__(self) -> None:
        if self.numbers == "words":
            speller(self.language)

    def __call__(self, text: str) -> str:
        """The text as the network learns it."""
        if self.unicode != "keep":
            text = unicodedata.normalize(self.unicode, text)
        if self.numbers == "words":
            spell = speller(self.language)
            text = NUMBER.sub(lambda number: f" {spell(number[0])} ", text)
        if self.punctuation == "remove":
            text = APOSTROPHE.sub(INSIDE, text).translate(PLAIN).replace(INSIDE, "'")
        if self.case != "keep":
            text = text.lower() if self.case == "lower" else text.upper()
        return " ".join(text.split())


class PlainCharacters(dict[int, str]):
    """A table for `str.translate` that leaves punctuation and symbols out; a dash or a slash becomes a space."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        category = unicodedata.category(character)
        kept = "" if category[0] in "PS" else character
        self[code] = " " if category == "Pd" or character == "/" else kept
        return self[code]


PLAIN = PlainCharacters()


@cache
def speller(language: str) -> Callable[[str], str]:
    """A function that spells a number in digits, with the decimal and grouping marks of the language.

    Raises:
        TrunklineError: if a package is missing, or if there are no rules for the language.
    """
    at = "data.normalization.language"
    try:
        from babel import Locale, UnknownLocaleError
        from unicode_rbnf import RbnfEngine
    except ImportError as error:
        raise TrunklineError(
            f"numbers=words needs the packages {' and '.join(SPELLING.values())}: pip install 'trunkline[demo]'",
            field="data.normalization.numbers",
        ) from error
    try:
        engine, locale = RbnfEngine.for_language(language), Locale.parse(language, sep="-")
    except (ValueError, UnknownLocaleError) as error:
        raise TrunklineError(
            f"numbers=words: there are no rules for language={language} ({error}); give a code such as en or de, or "
            "set numbers=keep",
            at,
        ) from error
    return partial(spelled_number, engine, locale)


def spelled_number(engine: Any, locale: Any, digits: str) -> str:
    """A number of a language in words; digits that are no number of it, such as 1.2.3, are spelled part by part."""
    from babel.numbers import NumberFormatError, parse_decimal

    try:
        words: str = engine.format_number(parse_decimal(digits, locale=locale, strict=True)).text
    except NumberFormatError:
        return " ".join(spelled_number(engine, locale, part) for part in re.split("[.,]", digits))
    return words.replace("\xad", "")  # German hyphenates its long numbers invisibly


# --- tokens


class TranscriptTexts:
    """A `TextSource` of transcripts, to learn a tokenizer from."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = texts
        self.files: list[Path] = []
        content = blake2b(digest_size=20)
        for text in texts:
            content.update(text.encode() + b"\n")
        self.key = ["transcripts", content.hexdigest()]

    def pieces(self, shares: dict[str, float]) -> Iterator[Piece]:
        """All transcripts, as documents of the training split."""
        return (Piece("train", text, True) for text in self.texts)


def unknown_id(tokenizer: Tokenizer) -> int | None:
    """Id of the token for what the tokenizer does not know; None if it knows all text."""
    model = json.loads(tokenizer.to_str())["model"]
    token = model.get("unk_token")
    return model.get("unk_id") if token is None else tokenizer.token_to_id(token)


def unknown_characters(tokenizer: Tokenizer, texts: list[str]) -> set[str]:
    """The characters that a tokenizer leaves out of texts, or replaces by its token for unknown text.

    It may leave white space out. A character that is known only as a part of words is not unknown in these words.
    """
    characters = sorted(set().union(*texts))
    if not characters:
        return set()
    encoder, unknown = TextEncoder(tokenizer), unknown_id(tokenizer)
    counts = encoder.encode(characters)[1]
    left_out = {c for c, count in zip(characters, counts, strict=True) if not count and not c.isspace()}
    replaced = {characters[n] for n in texts_with(unknown, characters, encoder)}
    if not replaced:
        return left_out
    seen = set().union(*(texts[row] for row in texts_with(unknown, texts, encoder)))
    return left_out | (replaced & seen)


def texts_with(token: int | None, texts: list[str], encoder: TextEncoder) -> np.ndarray:
    """Numbers of the texts that have a token; none of them has None."""
    if token is None:
        return np.zeros(0, np.int64)
    ids, counts = encoder.encode(texts)
    return np.unique(np.repeat(np.arange(len(texts)), counts)[ids == token])


def refuse_characters(
    unknown: set[str], transcripts: Mapping[str, Sequence[str]], name: Callable[[str, int], str], title: str
) -> NoReturn:
    """Raise the error for characters that a tokenizer does not have.

    Args:
        unknown: the characters.
        transcripts: split -> its texts.
        name: (split, row) -> the file or row.
        title: name of the tokenizer.

    Raises:
        TrunklineError: always; names the characters, how often each occurs, and the first row that has it.
    """
    counts: Counter[str] = Counter()
    places: dict[str, str] = {}
    for split, texts in transcripts.items():
        for row, text in enumerate(texts):
            for character in sorted(unknown.intersection(text)):
                counts[character] += text.count(character)
                if character not in places:
                    places[character] = name(split, row)
    common = counts.most_common(NAMED_CHARACTERS)
    shown = [f"{character!r} ({count} times, first in {places[character]})" for character, count in common]
    more = f", and {len(counts) - len(common)} more" if len(counts) > len(common) else ""
    raise TrunklineError(
        f"the tokenizer {title} lacks {len(counts)} of the characters in the transcripts: {', '.join(shown)}{more}; "
        "change the normalization or the tokenizer, or set drop_unknown=true to leave these characters out",
        field="data.drop_unknown",
    )


def transcript_tokens(tokenizer: Tokenizer, texts: list[str]) -> Ragged:
    """Token ids of each text, without special tokens."""
    ids, counts = TextEncoder(tokenizer).encode(texts)
    return Ragged(np.split(ids, counts.cumsum()[:-1]), np.uint32)
