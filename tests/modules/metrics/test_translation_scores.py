"""Scores of generated texts: sacreBLEU's numbers as its own functions give them, ROUGE counted by hand."""

import subprocess
import sys
from importlib.metadata import version

import pytest
import sacrebleu

from trunkline import TrunklineError
from trunkline.modules.metrics.translation import (
    SCORES,
    check_scores,
    sacrebleu_metric,
    signatures,
    translation_scores,
)

PREDICTIONS = ["The cat sat on the mat.", "Il fait beau aujourd'hui, non?", "", "今日は良い天気です。", "one two three"]
REFERENCES = [
    "The cat is on the mat.",
    "Il fait très beau aujourd'hui !",
    "A text.",
    "今日は天気が良い。",
    "one two three",
]


def test_bleu_and_chrf_are_sacrebleus() -> None:
    scores = translation_scores(PREDICTIONS, REFERENCES, ["chrf", "bleu"])
    assert scores == {
        "bleu": sacrebleu.corpus_bleu(PREDICTIONS, [REFERENCES]).score,
        "chrf": sacrebleu.corpus_chrf(PREDICTIONS, [REFERENCES]).score,
    }
    assert 10 < scores["bleu"] < 90
    assert 10 < scores["chrf"] < 90


def test_bleu_by_hand() -> None:
    """5 of 6 words, 3 of 5 pairs, 2 of 4 triples, 1 of 3 quadruples, and one word less than the reference."""
    scores = translation_scores(["a b c d x y"], ["a b c d e y z"], ["bleu"])
    precisions = (5 / 6) * (3 / 5) * (2 / 4) * (1 / 3)
    assert scores["bleu"] == pytest.approx(100 * precisions**0.25 * 2.718281828459045 ** (1 - 7 / 6))


@pytest.mark.parametrize("tokenize", ["intl", "zh", "char", "none"])
def test_words_of_bleu_can_be_chosen(tokenize: str) -> None:
    scores = translation_scores(PREDICTIONS, REFERENCES, ["bleu", "chrf"], tokenize)
    assert scores["bleu"] == sacrebleu.corpus_bleu(PREDICTIONS, [REFERENCES], tokenize=tokenize).score
    assert scores["bleu"] != sacrebleu.corpus_bleu(PREDICTIONS, [REFERENCES]).score
    assert scores["chrf"] == sacrebleu.corpus_chrf(PREDICTIONS, [REFERENCES]).score
    assert f"|tok:{tokenize}|" in signatures(["bleu"], tokenize)["bleu"]


def test_exact_match_ignores_whitespace_at_the_ends_only() -> None:
    predictions = ["1992-05-10", " 1992-05-10\n", "1992 -05-10", "1992-05-1O", "É"]
    references = ["1992-05-10", "1992-05-10", "1992-05-10", "1992-05-10", "é"]
    assert translation_scores(predictions, references, ["exact"]) == {"exact": 2 / 5}


def test_rouge_by_hand() -> None:
    # 4 and 6 words, 3 of them common (`the` counts once), common pairs: `the cat`, `cat sat`, order: the cat sat.
    # 3 and 3 words, all common, one common pair, order: two words.
    predictions = ["The cat, sat down!", "b c a"]
    references = ["the cat sat on the mat", "A B C"]
    scores = translation_scores(predictions, references, ["rouge"])
    f1 = {"rouge1": (2 * 3 / (4 + 6), 2 * 3 / 6), "rouge2": (2 * 2 / (3 + 5), 2 / 4), "rougeL": (2 * 3 / 10, 2 * 2 / 6)}
    assert scores == {name: pytest.approx(sum(rows) / 2) for name, rows in f1.items()}
    assert translation_scores(["", "x"], ["x", "x"], ["rouge"]) == {"rouge1": 0.5, "rouge2": 0.0, "rougeL": 0.5}


def test_rouge_is_a_mean_over_many_rows() -> None:
    scores = translation_scores(["a b", "x", "c", "a"] * 50, ["a b", "a", "c", "a c d"] * 50, ["rouge"])
    assert scores == {"rouge1": pytest.approx(2.5 / 4), "rouge2": pytest.approx(0.25), "rougeL": pytest.approx(2.5 / 4)}


def test_rouge_needs_no_other_package() -> None:
    """Without nltk, which torchmetrics would let download data, nothing is missing."""
    code = """
import sys
sys.modules["nltk"] = None
from trunkline.modules.metrics.translation import translation_scores
before = [name for name in ("sacrebleu", "torchmetrics") if name in sys.modules]
print(before, translation_scores(["a b c."], ["a b c."], ["rouge", "exact"]))
"""
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert run.stdout.strip() == "[] {'exact': 1.0, 'rouge1': 1.0, 'rouge2': 1.0, 'rougeL': 1.0}"


def test_signatures_are_sacrebleus() -> None:
    mark = f"version:{version('sacrebleu')}"
    assert signatures(SCORES) == {
        "bleu": f"nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|{mark}",
        "chrf": f"nrefs:1|case:mixed|eff:yes|nc:6|nw:0|space:no|{mark}",
    }
    metric = sacrebleu.metrics.BLEU()
    metric.corpus_score(PREDICTIONS, [REFERENCES])
    assert signatures(["bleu"]) == {"bleu": str(metric.get_signature())}
    assert signatures(["exact", "rouge"]) == {}


def test_all_scores_in_the_order_of_their_names_and_none_without_rows() -> None:
    scores = translation_scores(PREDICTIONS, REFERENCES, ["rouge", "chrf", "bleu", "exact"])
    assert list(scores) == ["exact", "bleu", "chrf", "rouge1", "rouge2", "rougeL"]
    assert all(type(score) is float for score in scores.values())
    assert translation_scores(PREDICTIONS, REFERENCES, []) == {}
    assert translation_scores([], [], SCORES) == {}


def test_unknown_scores_are_refused() -> None:
    check_scores(SCORES)
    with pytest.raises(TrunklineError, match="there is no score BLEU; choose among exact, bleu, chrf, rouge") as caught:
        check_scores(["exact", "BLEU"])
    assert caught.value.field == "model.scores"
    with pytest.raises(TrunklineError, match="no score meteor"):
        translation_scores(["a"], ["a"], ["meteor"])


def test_unknown_tokenizers_are_refused() -> None:
    check_scores(["exact", "chrf"], "words")  # nothing needs words
    check_scores(SCORES, "intl")
    with pytest.raises(TrunklineError, match="sacreBLEU has no such tokenizer; choose among none, zh, 13a") as caught:
        check_scores(["bleu"], "words")
    assert caught.value.field == "model.tokenize"


def test_a_tokenizer_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "MeCab", None)
    monkeypatch.delitem(sys.modules, "sacrebleu.tokenizers.tokenizer_ja_mecab", raising=False)
    with pytest.raises(TrunklineError, match=r"cannot load tokenize=ja-mecab: .*pip install sacrebleu\[ja\]"):
        sacrebleu_metric("bleu", "ja-mecab")


def test_unequal_numbers_are_an_error() -> None:
    with pytest.raises(ValueError, match="2 predictions, but 1 references"):
        translation_scores(["a", "b"], ["a"], ["bleu"])
