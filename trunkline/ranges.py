"""One way of saying which values a field may have, used where the field is declared."""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from trunkline import TrunklineError

INTERVAL = re.compile(r"([\[(]) *(\S+), *(\S+?) *([\])])(?:; *(.+))?")


def check_ranges(place: str, values: Any, **ranges: str) -> None:
    """Check that numbers lie in their intervals; None passes, and of a list each number is checked.

    Args:
        place: where a recipe has the fields (`model.optimizer`), for the error's `field`. A * stands for any further
            parts of the name (`model.network*`); empty if the names are those of flags.
        values: an object with the fields as attributes, or a mapping from their names.
        **ranges: the interval of each field as mathematics writes it, `[1, inf)` or `(0, 1]`: a square bracket includes
            the limit, a round one excludes it. What to do instead may follow a semicolon.

    Raises:
        TrunklineError: for the first number outside; names the field, the interval in words, and the number.
    """
    for name, text in ranges.items():
        value = values[name] if isinstance(values, Mapping) else getattr(values, name)
        found = INTERVAL.fullmatch(text)
        assert found is not None, f"{name}: {text} is no interval"
        opening, low, high, closing, mend = found.groups()
        for number in numbers_in(value):
            above = number > float(low) or (opening == "[" and number == float(low))
            below = number < float(high) or (closing == "]" and number == float(high))
            if not (above and below):  # NaN is neither
                raise TrunklineError(
                    f"{name} must be {in_words(opening, low, high, closing)}, not {value}"
                    + (f"; {mend}" if mend else ""),
                    f"{place}.{name}" if place else name,
                )


def check_rising(place: str, values: Any, *names: str) -> None:
    """Check that pairs of numbers are a smallest and a largest one.

    Raises:
        TrunklineError: for the first pair that is not; arguments as in `check_ranges`.
    """
    for name in names:
        low, high = getattr(values, name)
        if not low <= high:
            raise TrunklineError(
                f"{name} must be a smallest and a largest number, not {low} and {high}", f"{place}.{name}"
            )


def numbers_in(value: Any) -> Iterator[float]:
    """The number itself, or the numbers in a list; none for None."""
    if isinstance(value, list | tuple):
        for item in value:
            yield from numbers_in(item)
    elif value is not None:
        yield value


def in_words(opening: str, low: str, high: str, closing: str) -> str:
    """The interval as messages write it."""
    if math.isinf(float(low)) and math.isinf(float(high)):
        return "a finite number"
    if math.isinf(float(high)):
        return f"at least {low}" if opening == "[" else f"above {low}"
    if opening == "[":
        return f"from {low} to {high}" if closing == "]" else f"from {low} up to below {high}"
    return f"above {low} and at most {high}" if closing == "]" else f"above {low} and below {high}"
