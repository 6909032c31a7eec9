"""What a broken table, an empty folder or a mixed-up hub table says."""

from pathlib import Path
from typing import Any

import pytest
from pair_files import fake_hub, fault, write

GOOD = '{"source": "a", "target": "b"}'


@pytest.mark.parametrize(
    ("name", "content", "columns", "part", "field"),
    [
        ("a.jsonl", '{"en": "a", "de": "b"}', {}, "a.jsonl:1 has no 'source'; it has en, de; set", "source_column"),
        ("a.jsonl", '{"source": "a", "de": "b"}', {}, "has no 'target'; it has source, de; set", "target_column"),
        ("a.csv", "en,de\na,b\n", {"pairs": ["en-fr"]}, "a.csv:2 has no 'fr'; it has en, de; set pairs", "pairs"),
        (
            "a.jsonl",
            '{"source": "a", "target": "b", "to": "de"}',
            {"language": "lang"},
            "a.jsonl:1 has no 'lang'; it has source, target, to; set language_column",
            "language_column",
        ),
        (
            "a.jsonl",
            '{"source": "a", "target": "b", "l": 1}',
            {"language": "l"},
            "not a text but int",
            "language_column",
        ),
        ("a.jsonl", '{"source": "a", "target": "b", "l": ""}', {"language": "l"}, "a.jsonl:1: 'l' is empty", "source"),
        (
            "a.jsonl",
            f'{GOOD}\n{{"source": 7, "target": ""}}',
            {},
            "a.jsonl:2: 'source' is not a text but int",
            "source_column",
        ),
        ("a.jsonl", '{"source": "a", "target": ["b"]}', {}, "'target' is not a text but list", "target_column"),
        ("a.jsonl", f'{GOOD}\n\n{{"source": "", "target": "b"}}', {}, "a.jsonl:3: 'source' is empty", "source"),
        ("a.jsonl", '{"source": "a", "target": " \\u3000\\n"}', {}, "a.jsonl:1: 'target' is empty", "source"),
        ("a.jsonl", f'{GOOD}\n{{"source"', {}, "a.jsonl:2 is not JSON", None),
        ("a.jsonl", "[1]", {}, "a.jsonl:1 is not a JSON object but list", None),
        ("a.jsonl", "\n", {}, "a.jsonl has no row", None),
        ("a.jsonl.gz", "no gzip", {}, "a.jsonl.gz is not a gzip file", None),
        ("a.csv.gz", "no gzip", {}, "a.csv.gz is compressed", None),
        ("a.csv", "source,target\na,b\nc\n", {}, "a.csv:3 has 1 cell, but the header names 2; put texts", None),
        ("a.csv", "source,target\na,b\nc, d,e\n", {}, "a.csv:3 has 3 cells, but the header names 2; put texts", None),
        ("a.parquet", "PAR1", {}, "a.parquet is not a Parquet file", None),
    ],
)
def test_broken_rows(
    name: str, content: str, columns: dict[str, Any], part: str, field: str | None, tmp_path: Path
) -> None:
    error = fault(write(tmp_path / name, content), **columns)
    assert part in str(error)
    assert error.field == (field and f"data.{field}")


def test_folders_that_are_empty_or_mixed(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    assert "the folder is empty; give one with .jsonl" in str(fault(tmp_path / "in"))
    write(tmp_path / "in/a.jsonl", "{}")
    write(tmp_path / "in/b.tmx", "<tmx/>")
    error = fault(tmp_path / "in")
    assert "holds files of two kinds, such as a.jsonl and b.tmx" in str(error)
    assert error.field == "data.source"


@pytest.mark.parametrize(
    ("row", "columns", "part", "field"),
    [
        (
            {"translation": {"de": "a", "en": "b"}},
            {"pairs": ["de-fr"]},
            "row 0, 'translation' has no language 'fr'; it has de, en; name the direction with pairs, such as de-en",
            "data.pairs",
        ),
        (
            {"translation": {"de_AT": "a", "en": "b"}},
            {},
            "row 0, 'translation' has no language 'source'; it has de_AT, en; name the direction with pairs, such as "
            "de-en",
            "data.pairs",
        ),
        (
            {"translation": {"de": "a", "en": None}},
            {"pairs": ["de-en"]},
            "row 0, 'translation': 'en' is not a text but null; fix the row or set pairs",
            "data.pairs",
        ),
        (
            {"translation": {"de": "a", "en": " "}},
            {"pairs": ["de-en"]},
            "row 0, 'translation': 'en' is empty",
            "data.source",
        ),
        (
            {"translation": "a", "text": "b"},
            {},
            "row 0 has no 'source'; it has translation, text; set source_column",
            "data.source_column",
        ),
        (  # summaries are found only if no column was named
            {"document": "a", "summary": "b"},
            {"target": "x"},
            "row 0 has no 'source'; it has document, summary; set source_column",
            "data.source_column",
        ),
    ],
)
def test_mixed_up_columns_of_the_hub(
    row: dict[str, Any], columns: dict[str, Any], part: str, field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_hub(monkeypatch, [row])
    error = fault("owner/name", **columns)
    assert part in str(error)
    assert error.field == field
