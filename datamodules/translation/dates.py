"""Offline pairs: dates written in words, in many languages, with the date in ISO 8601 or in another language.

"tionde maj nittonhundranittiotvå" -> "1992-05-10". The texts are made in code, always the same. A source is drawn in
steps, each uniform: the language, one of its locales, one of the locale's patterns, the date, and whether the day is a
cardinal or an ordinal number.
"""

import datetime
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import NamedTuple, TypeVar

import numpy as np

from trunkline import TrunklineError
from trunkline.datamodules.translation.date_words import (
    DATE_YEARS,
    ORDINAL_DATES,
    DateWords,
    check_packages,
    date_words,
    package_versions,
)
from trunkline.datamodules.translation.text_pairs import Pair, PairSource

T = TypeVar("T")

LANGUAGES = (
    *("en", "de", "fr", "es", "pt", "nl", "sv", "da", "pl", "sk", "ru"),
    *("uk", "tr", "fi", "hu", "el", "id", "vi", "ro", "hr", "ca"),
)
"""The languages of the training strings."""
TEST_LANGUAGES = ("cs", "it", "no")
"""Czech, Italian and Norwegian are never trained on. Their relatives are: Slovak, Spanish and Catalan, Danish and
Swedish."""
TEST_LOCALES = ("de_AT", "en_BZ", "en_IN", "es_MX", "es_PY", "es_US")
"""Locales that are never trained on; nor are their twins, such as de_IT, which writes all dates like de_AT."""
TRAINING_ROWS, TEST_ROWS = 200_000, 2_000
SEED = 12
DATES_FORMAT = 1
"""Version of the rules here and in `date_words.py`; with a new number, prepared corpora are made again."""


def shuffled(items: Sequence[T]) -> list[T]:
    """The items in random order, the same on each machine."""
    return [items[int(place)] for place in np.random.default_rng(SEED).permutation(len(items))]


TEST_YEARS = tuple(shuffled(DATE_YEARS)[:20])
"""20 whole years that are never trained on, in any locale: they test whether numbers are composed."""
VAL_YEARS = tuple(shuffled(DATE_YEARS)[20:25])
"""5 more, on which settings are chosen."""
TRAINING_YEARS = tuple(shuffled(DATE_YEARS)[25:])
_circle = shuffled(LANGUAGES)
UNSEEN_DIRECTIONS = tuple((_circle[n % 21], _circle[(n + 1 + n // 21) % 21]) for n in range(40))
"""40 of the 420 pairs (source language, target language), which `phrases` never trains on. Each language is one or two
times the source and the target of an unseen direction, and at least 18 times of a seen one."""
SEEN_DIRECTIONS = tuple(
    (source, target)
    for source in LANGUAGES
    for target in LANGUAGES
    if source != target and (source, target) not in UNSEEN_DIRECTIONS
)


@dataclass(frozen=True)
class DateSet:
    """What a set is drawn from."""

    stream: int
    """Number of its stream of random numbers; the sources of sets with the same number are the same."""
    rows: int = TEST_ROWS
    years: tuple[int, ...] = TRAINING_YEARS
    languages: tuple[str, ...] = LANGUAGES
    test_locales: bool = False
    """Whether the locales are `TEST_LOCALES`, or all but these."""
    new_forms: bool = False
    """Whether to leave out texts that a training locale could have, too."""
    directions: tuple[tuple[str, str], ...] = ()
    """Pairs (source language, target language) to draw from; empty if the target is ISO 8601."""


DATE_SETS = {
    "dates": DateSet(0, TRAINING_ROWS),
    "dates:val": DateSet(1, years=VAL_YEARS),
    "dates:years": DateSet(2, years=TEST_YEARS),
    "dates:locales": DateSet(3, languages=("de", "en", "es"), test_locales=True),
    "dates:forms": DateSet(4, languages=("de", "en", "es"), test_locales=True, new_forms=True),
    "dates:languages": DateSet(5, languages=TEST_LANGUAGES),
    "phrases": DateSet(0, TRAINING_ROWS, directions=SEEN_DIRECTIONS),
    "phrases:seen": DateSet(6, directions=SEEN_DIRECTIONS),
    "phrases:unseen": DateSet(7, directions=UNSEEN_DIRECTIONS),
}
"""The sets by name. In none of them is a source there twice, and no source of `dates` is in another one but `phrases`.

- `dates`: 200,000 strings for training. Rows of it that are set aside for validation are easier than the tests, because
  their locales and years are trained on; choose settings on `dates:val`.
- `dates:val`: 5 whole years, which neither training nor a test has, in the training locales.
- `dates:years`: 20 whole years, in the training locales.
- `dates:locales`: `TEST_LOCALES`, in the training years. They are new as a whole, but about seven of eight texts could
  come from a training locale: en_IN has only a new mixture of known patterns.
- `dates:forms`: the other eighth alone, newly drawn: names such as "Jänner", and patterns that no training locale has.
- `dates:languages`: `TEST_LANGUAGES`, in the training years.
- `phrases`: the sources of `dates`, each with the date in another language. That is written in one form only, the long
  one of the language's main locale, without the weekday, so that the source and the language decide the target.
- `phrases:seen`, `phrases:unseen`: more sources of this kind, with the directions of `phrases`, and with
  `UNSEEN_DIRECTIONS`. They differ in nothing else.
"""


def open_dates(name: str) -> PairSource:
    """A set by its name; nothing is drawn yet.

    Args:
        name: one of `DATE_SETS`.

    Raises:
        TrunklineError: if there is no such set, or a package is missing.
    """
    if name not in DATE_SETS:
        raise TrunklineError(f"there is no set of dates {name}; choose from {', '.join(DATE_SETS)}")
    check_packages()
    return PairSource([], [name, DATES_FORMAT, *package_versions()], partial(read_dates, name))


def read_dates(name: str) -> Iterator[Pair]:
    """The pairs of a set; 200,000 take about 2 seconds."""
    settings = DATE_SETS[name]
    for number, drawn in enumerate(distinct(settings)):
        target, language = drawn.date.isoformat(), drawn.target_language
        if language is not None:
            words = words_in(language)
            target = words.write(words.long, drawn.date, language in ORDINAL_DATES)
        yield Pair(number, f"{name}, row {number} ({drawn.locale})", drawn.source, target, language)


class DrawnDate(NamedTuple):
    """A source as it was drawn."""

    source: str
    date: datetime.date
    locale: str
    target_language: str | None
    """None if the target is ISO 8601."""


def distinct(settings: DateSet) -> Iterator[DrawnDate]:
    """The rows of a set: with different sources, none of them in `dates` if the set has other sources."""
    taken = set() if settings.stream == DATE_SETS["dates"].stream else set(training_sources())
    draws = draw_dates(settings)
    for _ in range(settings.rows):
        drawn = next(drawn for drawn in draws if drawn.source not in taken)
        taken.add(drawn.source)
        yield drawn


@cache
def training_sources() -> frozenset[str]:
    """The sources of `dates`."""
    return frozenset(drawn.source for drawn in distinct(DATE_SETS["dates"]))


def draw_dates(settings: DateSet) -> Iterator[DrawnDate]:
    """Draw dates without end; a text can come again."""
    words = {language: words_in(language) for language in settings.languages}
    locales, known = {}, {}
    for language in settings.languages:
        named = words[language].locales.items()
        locales[language] = [item for item in named if (item[0] in TEST_LOCALES) == settings.test_locales]
        known[language] = {form for name, forms in named for form in forms if name not in TEST_LOCALES}
    days = [day for year in settings.years for day in days_of(year)]
    targets = {first: [second for source, second in settings.directions if source == first] for first in words}
    generator = np.random.default_rng([SEED, settings.stream])
    while True:
        for places in generator.random((1000, 6)).tolist():
            language = pick(settings.languages, places[0])
            locale, forms = pick(locales[language], places[1])
            form, date = pick(forms, places[2]), pick(days, places[3])
            ordinal = pick((False, True)[: len(words[language].days)], places[4])
            target = pick(targets[language], places[5]) if settings.directions else None
            source = words[language].write(form, date, ordinal)
            if settings.new_forms and source in {words[language].write(f, date, ordinal) for f in known[language]}:
                continue
            yield DrawnDate(source, date, locale, target)


def pick(items: Sequence[T], place: float) -> T:
    """The item at a place between 0 and 1."""
    return items[int(place * len(items))]


def days_of(year: int) -> list[datetime.date]:
    """All days of a year."""
    first, end = (datetime.date(y, 1, 1).toordinal() for y in (year, year + 1))
    return [datetime.date.fromordinal(day) for day in range(first, end)]


@cache
def words_in(language: str) -> DateWords:
    """How a language of the sets writes dates."""
    return date_words(language, first=TEST_LOCALES)
