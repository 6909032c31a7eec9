"""Settings and data that do not fit TranslationData: one message, which names the field."""

from pathlib import Path
from typing import Any

import pytest
from test_translation_data import FOUR, data, words

from trunkline import TrunklineError


@pytest.mark.parametrize(
    ("options", "message", "field"),
    [
        ({"languages": ["de", "de"]}, "languages=de, de must be different names", "languages"),
        ({"languages": []}, "must be different names, at least one", "languages"),
        ({"language_column": "l"}, "language_column=l is of no use without languages", "languages"),
        ({"target_vocab_size": 9}, "target_vocab_size=9 is of a target_tokenizer", "target_vocab_size"),
        ({"target_tokenizer": "bpe", "target_vocab_size": 9}, "target_vocab_size=9 is too small", "target_vocab_size"),
        ({"tokenizer": "bpe", "vocab_size": 258, "languages": ["a", "b"]}, "set it to at least 259", "vocab_size"),
        ({"batch_tokens": 0}, "batch_tokens must be 1 or more, not 0", "batch_tokens"),
        ({"max_length": 1}, "max_length=1 leaves no room", "max_length"),
        ({"max_length": 2, "languages": ["de"]}, "max_length=2 leaves no room", "max_length"),
        ({"max_target_length": 1}, "max_target_length=1 leaves no room", "max_target_length"),
        ({"val_target_source": "x"}, "val_target_source=x needs val_source", "val_source"),
        ({"val_fraction": 1.0}, "val_fraction=1.0 leaves nothing for training", "val_fraction"),
        ({"source_column": "target"}, "source_column and target_column are both 'target'", "target_column"),
    ],
)
def test_settings_that_do_not_fit(options: dict[str, Any], message: str, field: str, tmp_path: Path) -> None:
    with pytest.raises(TrunklineError) as caught:
        data(tmp_path, FOUR, **options)
    assert message in str(caught.value)
    assert caught.value.field == f"data.{field}"


NO_END = ["?", "a", "b"]


@pytest.mark.parametrize(
    ("options", "message", "field"),
    [
        ({"start_token": "<s>"}, "has no token start_token=<s>", "start_token"),
        ({"prefix": "a b c d to ", "max_length": 6}, "special tokens and the prefix 'a b c d to '", "max_length"),
        ({"languages": ["de", "it"], "language_column": "language"}, "no token <2it>", "tokenizer"),
        ({"tokenizer": "NO END"}, "no token that ends a document", "tokenizer"),
        ({"target_tokenizer": "NO END"}, "no token that ends a document", "target_tokenizer"),
        ({"target_tokenizer": "/no/such.json"}, "target_tokenizer=/no/such.json: there is no file", "target_tokenizer"),
        ({"vocab_size": 5}, "vocab_size=5 is smaller than the 11 tokens", "vocab_size"),
        (
            {"target_tokenizer": "WORDS", "target_vocab_size": 5},
            "target_vocab_size=5 is smaller than the 11 tokens",
            "target_vocab_size",
        ),
        ({"test_fraction": 0.01}, "the test split is empty", "test_fraction"),
        ({"val_source": "/no/such.jsonl"}, "/no/such.jsonl: there is no such file", "val_source"),
        ({"max_target_length": 2, "too_long": "skip"}, "all 3 pairs of training are too long", "max_length"),
        ({"language_column": "language", "languages": ["de"]}, "jsonl:1: the target's language 'fr'", "languages"),
        ({"languages": ["de", "fr"]}, "pairs.jsonl:1: the language of the target is not known", "language_column"),
        ({"target_column": "goal"}, "has no 'goal'", "target_column"),
    ],
)
def test_data_that_does_not_fit(options: dict[str, Any], message: str, field: str, tmp_path: Path) -> None:
    rows = [("a b c", "b c d", "fr"), ("b c d", "c d a", "de"), ("c d a", "d a b", "fr")]
    files = {"NO END": words(tmp_path, NO_END, "none.json"), "WORDS": words(tmp_path)}
    options = {name: files.get(str(value), value) for name, value in options.items()}
    made = data(tmp_path, rows, **{"val_fraction": 0, **options})
    with pytest.raises(TrunklineError) as caught:
        made.setup("fit")
    assert message in str(caught.value)
    assert caught.value.field == f"data.{field}"
