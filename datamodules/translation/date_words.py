"""Dates in words: patterns and names of Unicode's CLDR (package babel), numbers by its rules (package unicode-rbnf).

No text has a digit.
"""

import datetime
import importlib.util
import re
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Mapping
from importlib.metadata import version
from typing import Any, NamedTuple

from trunkline import TrunklineError

DATE_YEARS = range(1900, 2100)
"""Years of all dates."""
PACKAGES = {"babel": "babel", "unicode_rbnf": "unicode-rbnf"}
"""Module -> the package that has it."""
PATTERNS, SKELETONS = ("full", "long", "medium"), ("yMMMd", "yMMMEd", "yMMMMd", "yMMMMEd")
"""Names of the patterns in CLDR. A skeleton lists fields, and each locale has a pattern for them."""
CARDINAL, ORDINAL, YEAR = "spellout-numbering", "spellout-ordinal", "spellout-numbering-year"
"""Names of the rules for spelling numbers."""
DAY_GENDERS = {
    "de": "r",
    "da": "common",
    "sv": "reale",
    "ru": "neuter",
    "el": "feminine",
    **dict.fromkeys(("fr", "es", "pt", "hr", "ca", "it", "no"), "masculine"),
}
"""Language -> gender of a day, where ordinal numbers have genders. pl, sk, uk, ro and cs have no rules for them."""
ORDINAL_DATES = frozenset(("en", "de", "sv", "da", "ru", "fi", "hu", "hr"))
"""Languages in which the day of a date is usually read as an ordinal number, if there are rules for it."""


class DateForm(NamedTuple):
    """A way to write a date, without its numbers."""

    template: str
    """Text with the fields {weekday}, {day}, {month} and {year}."""
    months: tuple[str, ...]
    weekdays: tuple[str, ...]
    """From Monday on; empty if the template has no weekday."""


class DateWords(NamedTuple):
    """How a language writes dates."""

    locales: dict[str, list[DateForm]]
    """Distinct locales, each with its distinct forms."""
    days: list[dict[int, str]]
    """Day of the month -> word: cardinal numbers, then ordinal numbers if there are rules for them."""
    years: dict[int, str]
    long: DateForm
    """The long pattern of the main locale: day, month and year, without the weekday."""

    def write(self, form: DateForm, date: datetime.date, ordinal: bool) -> str:
        """The date in words, with the day as an ordinal or a cardinal number."""
        return form.template.format(
            day=self.days[ordinal][date.day],
            month=form.months[date.month - 1],
            year=self.years[date.year],
            weekday=form.weekdays[date.weekday()] if form.weekdays else "",
        )


def date_words(language: str, first: Collection[str] = ()) -> DateWords:
    """How a language of CLDR writes dates.

    Args:
        language: its code, such as `sv`.
        first: locales that are kept where several ones write all dates alike; else the first one by name is kept.

    Raises:
        TrunklineError: if a package is missing.
    """
    check_packages()
    from babel import Locale, localedata
    from unicode_rbnf import RbnfEngine

    engine = RbnfEngine.for_language(language)

    def spell(rules: str, numbers: Iterable[int]) -> dict[int, str]:
        return {number: clean("".join(engine.iter_format_number(number, rules))) for number in numbers}

    cardinals = spell(CARDINAL, range(1, 32))
    gender = DAY_GENDERS.get(language)
    ordinal = f"{ORDINAL}-{gender}" if gender else ORDINAL
    days = [cardinals, *([spell(ordinal, range(1, 32))] if ordinal in engine.rulesets else [])]
    names = [name for name in localedata.locale_identifiers() if name.partition("_")[0] == language]
    locales: dict[str, list[DateForm]] = {}
    for name in sorted(names, key=lambda name: (name not in first, name)):
        locale = Locale.parse(name)
        found = (date_form(locale, pattern, cardinals) for pattern in date_patterns(locale))
        forms = list(dict.fromkeys(form for form in found if form is not None))
        # en_Dsrt and en_Shaw are English in other letters, with most of the names missing
        if forms and not locale.script and set(forms) not in map(set, locales.values()):
            locales[name] = forms
    main = Locale.parse(language)
    long = date_form(main, main.date_formats["long"].pattern, cardinals)
    assert long is not None
    return DateWords(locales, days, spell(YEAR, DATE_YEARS), long)


def check_packages() -> None:
    """Check that the packages are installed.

    Raises:
        TrunklineError: if not; says how to install them.
    """
    for module, package in PACKAGES.items():
        if importlib.util.find_spec(module) is None:
            raise TrunklineError(f"dates in words need the package {package}: pip install 'trunkline[demo]'")


def package_versions() -> list[str]:
    """Versions of the packages, which decide the texts."""
    return [f"{package} {version(package)}" for package in PACKAGES.values()]


def date_patterns(locale: Any) -> Iterator[str]:
    """CLDR's patterns of a babel locale, such as `EEEE, d MMMM y`."""
    yield from (locale.date_formats[name].pattern for name in PATTERNS)
    yield from (locale.datetime_skeletons[name].pattern for name in SKELETONS if name in locale.datetime_skeletons)


def date_form(locale: Any, pattern: str, numbers: Mapping[int, str]) -> DateForm | None:
    """The form that a pattern means in a babel locale; None if its month has no name.

    Args:
        locale: has the names of months and weekdays.
        pattern: one of CLDR.
        numbers: words for the digits in names: Vietnamese has `tháng 5` and `Th 2`.
    """
    from babel.dates import tokenize_pattern

    template, months, weekdays = "", [], []
    # "10." is an ordinal number in digits; in words it has no full stop
    for _, token in tokenize_pattern(re.sub(r"([dy])\.", r"\1", pattern)):
        if isinstance(token, str):
            template += clean(token)
            continue
        field, width = token
        context, size = "stand-alone" if field in "Lc" else "format", "wide" if width == 4 else "abbreviated"
        if field in "ML" and width > 2:
            template += "{month}"
            months = [locale.months[context][size][number] for number in range(1, 13)]
        elif field in "Ec":
            template += "{weekday}"
            weekdays = [locale.days[context][size][number] for number in range(7)]
        else:
            template += {"d": "{day}", "y": "{year}", "M": "", "L": ""}[field]
    if not months or any(re.fullmatch(r"M?\d+", month) for month in months):  # M03 stands for a missing name
        return None

    def spelled(name: str) -> str:
        return clean(re.sub(r"\d+", lambda digits: numbers[int(digits[0])], name))

    return DateForm(template, tuple(map(spelled, months)), tuple(map(spelled, weekdays)))


def clean(text: str) -> str:
    """The text without invisible format characters, in Unicode's normal form NFKC, which has one kind of space."""
    visible = "".join(character for character in text if unicodedata.category(character) != "Cf")
    return unicodedata.normalize("NFKC", visible)
