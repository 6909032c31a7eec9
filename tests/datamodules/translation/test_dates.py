"""Dates in words: texts by hand, what is held out, and that every process makes the same ones."""

# ruff: noqa: RUF001 (letters that look like others)

import datetime
import hashlib
import importlib.util
import os
import re
import subprocess
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable
from functools import cache

import pytest

pytest.importorskip("babel")
pytest.importorskip("unicode_rbnf")

from trunkline import TrunklineError
from trunkline.datamodules.translation.date_words import DATE_YEARS, clean, date_form, date_words
from trunkline.datamodules.translation.dates import (
    DATE_SETS,
    LANGUAGES,
    SEEN_DIRECTIONS,
    TEST_LANGUAGES,
    TEST_LOCALES,
    TEST_YEARS,
    TRAINING_YEARS,
    UNSEEN_DIRECTIONS,
    VAL_YEARS,
    open_dates,
    words_in,
)
from trunkline.datamodules.translation.text_pairs import Pair
from trunkline.pipelines.benchmarks.ngrams import DATE_PARTS, date_matches


@cache
def pairs(name: str) -> list[Pair]:
    return list(open_dates(name).pairs())


@pytest.fixture(params=list(DATE_SETS))
def rows(request: pytest.FixtureRequest) -> list[Pair]:
    return pairs(request.param)


def sources(name: str) -> set[str]:
    return {pair.source for pair in pairs(name)}


def locales(name: str) -> set[str]:
    """Those that the places of the rows name."""
    return {pair.place.rpartition("(")[2].rstrip(")") for pair in pairs(name)}


# --- the words

HAND = [
    ("sv", "1992-05-10", "tionde maj nittonhundranittiotvå"),
    ("en", "1992-05-10", "May tenth, nineteen ninety-two"),
    ("en", "2005-02-28", "Monday, February twenty-eighth, two thousand five"),
    ("de", "1992-05-10", "Sonntag, zehnter Mai neunzehnhundertzweiundneunzig"),
    ("de", "2005-12-01", "erster Dez. zweitausendfünf"),
    ("fr", "1992-05-10", "dix mai dix-neuf-cent quatre-vingt-douze"),
    ("es", "1992-05-10", "domingo, diez de mayo de mil novecientos noventa y dos"),
    ("pt", "1992-05-10", "dez de maio de mil novecentos e noventa e dois"),
    ("nl", "1992-05-10", "tiende mei negentientweeënnegentig"),
    ("da", "1992-05-10", "søndag den tiende maj nittenhundrede og tooghalvfems"),
    ("pl", "1992-05-10", "dziesięć maja tysiąc dziewięćset dziewięćdziesiąt dwa"),
    ("ru", "1992-05-10", "десятое мая одна тысяча девятьсот девяносто второго г."),
    ("tr", "1992-05-10", "on Mayıs bin dokuz yüz doksan iki Pazar"),
    ("fi", "1992-05-10", "kymmenes toukokuuta tuhatyhdeksänsataayhdeksänkymmentäkaksi"),
    ("hu", "1992-05-10", "ezerkilencszázkilencvenkettő május tizedik, vasárnap"),
    ("el", "1992-05-10", "δέκατη Μαΐου χίλια εννιακόσια εννενήντα δύο"),
    ("id", "1992-05-10", "sepuluh Mei seribu sembilan ratus sembilan puluh dua"),
    ("vi", "1992-05-10", "mười tháng năm, một nghìn chín trăm chín mươi hai"),
    ("vi", "2005-03-01", "Th ba, một thg ba, hai nghìn không trăm lẻ năm"),
    ("hr", "1992-05-10", "nedjelja, deseti svibnja tisuću devetsto devedeset i dva"),
    ("ca", "1992-05-10", "deu de maig del mil nou-cent noranta-dos"),
    ("cs", "1992-05-10", "deset května tisíc devět set devadesát dva"),
    ("it", "1992-05-10", "dieci maggio millenovecentonovantadue"),
    ("no", "1992-05-10", "tiende mai nittenhundre og nittito"),
    ("de_AT", "1992-01-10", "zehnter Jänner neunzehnhundertzweiundneunzig"),
    ("en_BZ", "1992-05-10", "ten-May-nineteen ninety-two"),
    ("es_US", "1992-05-10", "dom, diez de may de mil novecientos noventa y dos"),
]


@pytest.mark.parametrize(("locale", "date", "text"), HAND)
def test_a_locale_writes_what_a_person_would(locale: str, date: str, text: str) -> None:
    words, day = words_in(locale[:2]), datetime.date.fromisoformat(date)
    kinds = [False, True][: len(words.days)]
    assert text in {words.write(form, day, kind) for form in words.locales[locale] for kind in kinds}


def test_each_language_has_distinct_locales() -> None:
    words = {language: words_in(language) for language in (*LANGUAGES, *TEST_LANGUAGES)}
    names = [name for language in words.values() for name in language.locales]
    assert set(TEST_LOCALES) < set(names)
    assert len(names) >= 40
    assert not {"de_IT", "de_DE", "en_US", "en_Dsrt", "en_Shaw", "sv_FI"} & set(names)  # twins, and other letters
    for language, entry in words.items():
        assert language in entry.locales
        forms = [frozenset(forms) for forms in entry.locales.values()]
        assert len(set(forms)) == len(forms)
        assert all(len(set(f)) == len(f) for f in entry.locales.values())
        for form in {form for forms in entry.locales.values() for form in forms}:
            assert {"{day}", "{month}", "{year}"} <= set(re.findall(r"\{\w+\}", form.template))
            assert len(set(form.months)) == 12
            assert len(set(form.weekdays)) in (0, 7)
            assert not any(re.search(r"\d", month) for month in form.months)
    assert {language for language, entry in words.items() if len(entry.days) == 1} == {"pl", "sk", "uk", "ro", "cs"}
    assert all(len(set(day.values())) == 31 for entry in words.values() for day in entry.days)
    assert all(len(set(entry.years.values())) == len(DATE_YEARS) for entry in words.values())


def test_the_long_form_has_no_weekday() -> None:
    for language in LANGUAGES:
        long = words_in(language).long
        assert long.weekdays == ()
        assert sorted(re.findall(r"\{(\w+)\}", long.template)) == ["day", "month", "year"]


def test_a_month_without_a_name_makes_no_form() -> None:
    from babel import Locale

    names = {number: f"M{number:02}" for number in range(1, 13)}
    locale = type("Locale", (), {"months": {"format": {"wide": names, "abbreviated": names}}})
    assert date_form(locale, "d MMMM y", {}) is None
    assert date_form(locale, "d MMM y", {}) is None
    assert date_form(Locale.parse("sk"), "d. M. y", {}) is None
    assert date_form(Locale.parse("sk"), "d. MMMM y", {}) is not None


def test_texts_are_cleaned() -> None:
    assert clean("neun\u00adzehn\u200f y\u202fг. \u00a0e\u0301") == "neunzehn y г.  \u00e9"
    assert "\u00ad" not in "".join(words_in("de").years.values())


def test_which_twin_is_kept() -> None:
    assert "de_IT" in date_words("de", first=("de_IT",)).locales
    assert "de_AT" not in date_words("de", first=("de_IT",)).locales


# --- the sets


def test_years_and_directions_are_frozen() -> None:
    """They must never change: a model that was trained on other years would be tested on what it has seen."""
    years = "1920 1940 1944 1950 1958 1960 1970 1990 1995 2003 2033 2042 2045 2053 2057 2069 2079 2093 2096 2098"
    assert sorted(TEST_YEARS) == [int(year) for year in years.split()]
    assert sorted(VAL_YEARS) == [1905, 1951, 1978, 2019, 2032]
    assert sorted((*TEST_YEARS, *VAL_YEARS, *TRAINING_YEARS)) == list(DATE_YEARS)
    assert len(set(UNSEEN_DIRECTIONS)) == 40
    assert not set(UNSEEN_DIRECTIONS) & set(SEEN_DIRECTIONS)
    assert len({*UNSEEN_DIRECTIONS, *SEEN_DIRECTIONS}) == 420
    for side in (0, 1):
        unseen, seen = (Counter(pair[side] for pair in found) for found in (UNSEEN_DIRECTIONS, SEEN_DIRECTIONS))
        assert {unseen[language] for language in LANGUAGES} == {1, 2}
        assert min(seen[language] for language in LANGUAGES) >= 18


def test_rows_are_distinct_and_clean(rows: list[Pair]) -> None:
    assert len(rows) == (200_000 if rows[0].place.partition(",")[0] in ("dates", "phrases") else 2_000)
    assert [pair.number for pair in rows] == list(range(len(rows)))
    assert len({pair.source for pair in rows}) == len({pair.place for pair in rows}) == len(rows)
    text = "".join(pair.source for pair in rows)
    assert not any(character.isnumeric() for character in set(text))
    assert "Cf" not in {unicodedata.category(character) for character in set(text)}
    assert all(unicodedata.is_normalized("NFKC", pair.source) for pair in rows)
    assert all(pair.source == pair.source.strip() and "  " not in pair.source for pair in rows)
    assert not re.search("ERROR|[{}]", text)


def test_targets(rows: list[Pair]) -> None:
    name = rows[0].place.partition(",")[0]
    if name.startswith("dates"):
        assert {pair.language for pair in rows} == {None}
        assert all(str(datetime.date.fromisoformat(pair.target)) == pair.target for pair in rows)
        assert len({pair.target[5:7] for pair in rows}) == 12 or name == "dates:forms"
        assert len({pair.target[8:] for pair in rows}) == 31
    else:
        assert {pair.language for pair in rows} == set(LANGUAGES)


def test_what_is_held_out() -> None:
    years = {name: {int(pair.target[:4]) for pair in pairs(name)} for name in DATE_SETS if name.startswith("dates")}
    assert years["dates:years"] == set(TEST_YEARS)
    assert years["dates:val"] == set(VAL_YEARS)
    assert all(
        found == set(TRAINING_YEARS) for name, found in years.items() if name not in ("dates:years", "dates:val")
    )
    training = {name for language in LANGUAGES for name in words_in(language).locales if name not in TEST_LOCALES}
    for name in ("dates", "dates:val", "dates:years", "phrases", "phrases:seen", "phrases:unseen"):
        assert locales(name) == training
    assert locales("dates:locales") == set(TEST_LOCALES)
    assert locales("dates:forms") == set(TEST_LOCALES) - {"en_IN"}  # which mixes known patterns in a new way
    assert {name[:2] for name in locales("dates:languages")} == set(TEST_LANGUAGES)


def test_no_test_source_is_trained_on() -> None:
    training = sources("dates")
    assert sources("phrases") == training
    assert [name for name in DATE_SETS if sources(name) & training] == ["dates", "phrases"]


def test_a_source_has_one_date() -> None:
    """Across all languages and sets: else no model could be right."""
    found: dict[str, set[str]] = {}
    for name in DATE_SETS:
        if name.startswith("dates"):
            for pair in pairs(name):
                found.setdefault(pair.source, set()).add(pair.target)
    assert {source: dates for source, dates in found.items() if len(dates) > 1} == {}


def test_known_forms_among_the_test_locales() -> None:
    """`dates:forms` are the texts of `dates:locales` that no training locale writes."""

    def known(pair: Pair) -> bool:
        language, day = pair.place.rpartition("(")[2][:2], datetime.date.fromisoformat(pair.target)
        words = words_in(language)
        forms = {form for name, forms in words.locales.items() if name not in TEST_LOCALES for form in forms}
        return any(words.write(form, day, kind) == pair.source for form in forms for kind in (False, True))

    assert not any(map(known, pairs("dates:forms")))
    assert 0.08 < sum(not known(pair) for pair in pairs("dates:locales")) / 2000 < 0.18


def test_all_is_drawn_uniformly() -> None:
    rows = pairs("dates")
    languages = Counter(pair.place.rpartition("(")[2].rstrip(")").partition("_")[0] for pair in rows)
    assert languages.keys() == set(LANGUAGES)
    # a standard deviation is 95; a language of few texts loses some rows, which were drawn twice
    assert all(abs(count - 200_000 / 21) < 500 for count in languages.values())
    english = Counter(pair.place.rpartition("(")[2] for pair in rows if "(en" in pair.place)
    assert max(english.values()) < 1.2 * min(english.values())
    years = Counter(pair.target[:4] for pair in rows)
    assert max(years.values()) < 1.25 * min(years.values())
    ordinal = [bool(re.search(r"(first|second|third|th)\b", pair.source)) for pair in rows if "(en" in pair.place]
    assert 0.45 < sum(ordinal) / len(ordinal) < 0.55
    weekdays = [datetime.date.fromisoformat(pair.target).weekday() for pair in rows]
    assert set(weekdays) == set(range(7))


def test_phrases() -> None:
    def directions(name: str) -> set[tuple[str, str]]:
        return {(pair.place.rpartition("(")[2][:2], str(pair.language)) for pair in pairs(name)}

    assert directions("phrases") == set(SEEN_DIRECTIONS)
    assert directions("phrases:seen") < set(SEEN_DIRECTIONS)
    assert directions("phrases:unseen") == set(UNSEEN_DIRECTIONS)
    dates = {pair.source: pair.target for pair in pairs("dates")}
    targets: dict[tuple[str | None, str], set[str]] = {}
    for pair in pairs("phrases"):
        targets.setdefault((pair.language, dates[pair.source]), set()).add(pair.target)
    assert all(len(found) == 1 for found in targets.values())  # the date and the language decide the target
    begin = {"sv": "tionde maj ", "es": "diez de mayo de ", "hr": "deseti svibnja ", "vi": "mười tháng năm, "}
    for language, words in begin.items():
        found = {
            text for (to, date), texts in targets.items() if to == language and date[5:] == "05-10" for text in texts
        }
        assert len(found) > 5
        assert all(text.startswith(words) for text in found)


DIGEST = """
import hashlib
from trunkline.pipelines.quick_imports import import_torchmetrics
import_torchmetrics([])  # without what takes it seconds
from trunkline.datamodules.translation.dates import open_dates
print(hash("x"), hashlib.sha256(repr([tuple(pair) for pair in open_dates("phrases").pairs()]).encode()).hexdigest())
"""


def test_every_process_makes_the_same_rows() -> None:
    environment = {**os.environ, "PYTHONHASHSEED": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", DIGEST], env=environment, check=True, capture_output=True, text=True)
    seed, digest = done.stdout.split()
    assert int(seed) != hash("x")  # so sets are in another order there
    assert digest == hashlib.sha256(repr([tuple(pair) for pair in pairs("phrases")]).encode()).hexdigest()


# --- what is wrong


def test_the_key_names_set_and_packages() -> None:
    source = open_dates("dates:years")
    assert source.files == []
    assert source.key[0] == "dates:years"
    assert [word.partition(" ")[0] for word in source.key[2:]] == ["babel", "unicode-rbnf"]
    assert open_dates("phrases").key != open_dates("dates").key


def test_an_unknown_set() -> None:
    with pytest.raises(TrunklineError, match=r"there is no set of dates dates:moon; choose from dates, dates:val, "):
        open_dates("dates:moon")


@pytest.mark.parametrize(("module", "package"), [("babel", "babel"), ("unicode_rbnf", "unicode-rbnf")])
def test_a_missing_package_is_named(module: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found: Callable = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == module else found(name))
    with pytest.raises(TrunklineError, match=rf"need the package {package}: pip install 'trunkline\[demo\]'"):
        open_dates("dates")


# --- the baseline


def test_ngrams_read_years_that_were_never_there() -> None:
    assert date_matches(["dates:years"], rows=3000)["dates:years"] > 0.1  # by chance, no date would be right


def test_parts_make_up_the_date() -> None:
    assert "-".join(["1992-05-10"[part] for part in DATE_PARTS.values()]) == "19-9-2-05-10"
