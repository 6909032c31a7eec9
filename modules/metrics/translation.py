"""Scores of generated texts against references: exact match, BLEU, chrF, ROUGE, error rates.

BLEU and chrF are sacreBLEU's own numbers, ROUGE is torchmetrics'. Both libraries are imported at the first use.
"""

from collections.abc import Sequence
from typing import Any

from trunkline import TrunklineError
from trunkline.modules.metrics.error_rates import UNITS, error_rate

SCORES = ("exact", "bleu", "chrf", "rouge", *UNITS)
"""All names that `translation_scores` knows."""
ROUGE_KINDS = ("rouge1", "rouge2", "rougeL")
"""Not rougeLsum, for which torchmetrics downloads a sentence splitter."""
USUAL_TOKENS = "13a"
"""SacreBLEU's default: the words of NIST's script mteval-v13a."""


def check_scores(names: Sequence[str], tokenize: str = USUAL_TOKENS) -> None:
    """Check that all scores can be computed, before a training starts.

    Args:
        names: names of scores.
        tokenize: as in `translation_scores`.

    Raises:
        TrunklineError: for an unknown name, or a tokenizer that sacreBLEU cannot load.
    """
    unknown = [name for name in names if name not in SCORES]
    if unknown:
        raise TrunklineError(
            f"scores={', '.join(names)}: there is no score {unknown[0]}; choose among {', '.join(SCORES)}",
            field="model.scores",
        )
    if "bleu" in names and tokenize != USUAL_TOKENS:
        sacrebleu_metric("bleu", tokenize)


def translation_scores(
    predictions: Sequence[str], references: Sequence[str], names: Sequence[str], tokenize: str = USUAL_TOKENS
) -> dict[str, float]:
    """Scores over all rows together.

    Args:
        predictions: generated texts.
        references: the right text of each row.
        names: the scores to compute: `exact`, `bleu`, `chrf`, `rouge`, `wer`, `cer`.
        tokenize: how sacreBLEU cuts texts into words for BLEU: `13a`, `intl`, `zh`, `ja-mecab`, `ko-mecab`, `char`,
            `flores200`, …

    Returns:
        Nothing if there are no rows, else

        - `exact`: share of rows that equal their reference, apart from whitespace at both ends; 0 to 1.
        - `bleu`: BLEU of the corpus (Papineni et al., 2002), 0 to 100.
        - `chrf`: chrF2 of the corpus (Popović, 2015), 0 to 100.
        - `rouge1`, `rouge2`, `rougeL` for `rouge`: mean F1 of the rows (Lin, 2004), 0 to 1. Words consist of a-z and
          0-9 in lower case, as in Google's script, so it says nothing about other alphabets; without stemming.
        - `wer` and `cer`: error rates of words (between whitespace) and of characters, over all rows; 0 is best.

    Raises:
        TrunklineError: as `check_scores`.
        ValueError: if the numbers of predictions and references differ.
    """
    check_scores(names, tokenize)
    if len(predictions) != len(references):  # sacreBLEU would ignore the rest
        raise ValueError(f"{len(predictions)} predictions, but {len(references)} references")
    scores: dict[str, float] = {}
    if not predictions:
        return scores
    if "exact" in names:
        pairs = zip(predictions, references, strict=True)
        scores["exact"] = sum(ours.strip() == right.strip() for ours, right in pairs) / len(references)
    for name in ("bleu", "chrf"):
        if name in names:
            scores[name] = float(sacrebleu_metric(name, tokenize).corpus_score(predictions, [references]).score)
    scores |= {name: error_rate(predictions, references, UNITS[name]) for name in UNITS if name in names}
    if "rouge" in names:
        from torchmetrics.functional.text import rouge_score

        found = rouge_score(list(predictions), [[right] for right in references], rouge_keys=ROUGE_KINDS)
        scores |= {kind: found[f"{kind}_fmeasure"].item() for kind in ROUGE_KINDS}
    return scores


def signatures(names: Sequence[str], tokenize: str = USUAL_TOKENS) -> dict[str, str]:
    """How sacreBLEU computes the scores among `names` that are its own: `bleu` and `chrf`.

    A signature, such as `nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:2.6.0`, belongs to every published score
    (arXiv:1804.08771).
    """
    found = {}
    for name in ("bleu", "chrf"):
        if name in names:
            metric = sacrebleu_metric(name, tokenize)
            metric.corpus_score(["a"], [["a"]])  # a signature has the number of references, known after a score only
            found[name] = str(metric.get_signature())
    return found


def sacrebleu_metric(name: str, tokenize: str) -> Any:
    """SacreBLEU's metric `bleu` or `chrf`; chrF needs no words.

    Raises:
        TrunklineError: if the tokenizer is unknown, or needs something that is not there.
    """
    from sacrebleu.metrics import BLEU, CHRF

    if name == "chrf":
        return CHRF()
    if tokenize not in BLEU.TOKENIZERS:
        raise TrunklineError(
            f"tokenize={tokenize}: sacreBLEU has no such tokenizer; choose among {', '.join(BLEU.TOKENIZERS)}",
            field="model.tokenize",
        )
    try:
        return BLEU(tokenize=tokenize)
    except Exception as error:  # missing packages and failing downloads raise many kinds
        reason = " ".join(str(error).split())
        raise TrunklineError(
            f"sacreBLEU cannot load tokenize={tokenize}: {reason}; or choose another one, such as {USUAL_TOKENS}, intl "
            "or char",
            field="model.tokenize",
        ) from error
