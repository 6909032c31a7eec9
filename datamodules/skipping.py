"""What is said about files and rows that are left out because they cannot be read."""

import warnings

from trunkline import TrunklineError

MOST_NAMES = 3
"""Number of files that are named."""
ADVICE = ", or set skip_corrupt=true"
"""The end of an error's message, which means nothing to who has set it."""


class Skipped:
    """Warns of the first files that a dataset leaves out, and once more that there are others, which metrics count."""

    def __init__(self) -> None:
        self.said: set[str] = set()

    def add(self, error: TrunklineError) -> None:
        """Warn of a file, unless it or enough others are named already."""
        message = f"skipped: {str(error).removesuffix(ADVICE)}"
        if message in self.said or len(self.said) > MOST_NAMES:
            return
        self.said.add(message)
        if len(self.said) <= MOST_NAMES:
            warnings.warn(message, stacklevel=3)
        else:
            warnings.warn(f"skipped: more than {MOST_NAMES} files that cannot be read", stacklevel=3)


def first_names(names: list[str]) -> str:
    """`a, b, c, …`: the first names."""
    return ", ".join([*names[:MOST_NAMES], *(["…"] if len(names) > MOST_NAMES else [])])
