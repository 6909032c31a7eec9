"""Columns and languages that contradict each other."""

from typing import Any

import pytest

from trunkline import TrunklineError
from trunkline.datamodules.translation.text_pairs import Pair, PairColumns, check_language


@pytest.mark.parametrize(
    ("columns", "part", "field"),
    [
        ({"pairs": []}, "pairs is an empty list", "pairs"),
        ({"pairs": ["en-de", "ende"]}, "pairs=en-de, ende: 'ende' is not a direction, two", "pairs"),
        ({"pairs": ["en-pt-BR"]}, "'en-pt-BR' is not a direction", "pairs"),
        ({"pairs": ["en-"]}, "'en-' is not a direction", "pairs"),
        ({"pairs": ["en-en"]}, "two different languages", "pairs"),
        ({"pairs": ["en-de", "en-de"]}, "'en-de' is there twice", "pairs"),
        ({"pairs": ["en-de"], "language": "to"}, "and so does language_column=to", "language_column"),
        ({"pairs": ["en-de"], "source": "en"}, "and so does source_column=en", "source_column"),
        ({"pairs": ["en-de"], "target": "en"}, "and so does target_column=en", "target_column"),
        ({"source": "text", "target": "text"}, "source_column and target_column are both 'text'", "target_column"),
    ],
)
def test_columns_that_contradict_each_other(columns: dict[str, Any], part: str, field: str) -> None:
    with pytest.raises(TrunklineError) as caught:
        PairColumns(**columns)
    assert part in str(caught.value)
    assert caught.value.field == f"data.{field}"


def test_check_language() -> None:
    pair = Pair(0, "a.jsonl:1", "a", "b", "fr")
    check_language(pair, None)
    check_language(pair._replace(language=None), None)
    check_language(pair, ["de", "fr"])
    with pytest.raises(TrunklineError, match="the target's language 'fr' is not among languages=de, en; add") as caught:
        check_language(pair, ["de", "en"])
    assert caught.value.field == "data.languages"
    with pytest.raises(TrunklineError, match="the language of the target is not known; name") as caught:
        check_language(pair._replace(language=None), ["de"])
    assert caught.value.field == "data.language_column"
