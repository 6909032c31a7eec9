"""`trunkline evaluate --what translation`: scores of the texts that an encoder-decoder writes for given pairs."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from trunkline import TrunklineError
from trunkline.datamodules.splits import shares_of, split_of
from trunkline.datamodules.translation.parallel_sources import open_pairs
from trunkline.datamodules.translation.text_pairs import Pair, check_language
from trunkline.datamodules.translation.translation_data import TranslationData
from trunkline.modules.metrics.translation import USUAL_TOKENS, check_scores, signatures, translation_scores
from trunkline.pipelines.evaluation.data import chosen_split, refuse_other_preparation
from trunkline.pipelines.evaluation.results import Evaluation, Result
from trunkline.pipelines.trained import Trained
from trunkline.pipelines.translating import Translator, generation_of, pair_settings

TRANSLATION_TASK = "translation"
USUAL_SCORES = ("exact", "bleu", "chrf")


class TranslationOptions(NamedTuple):
    """Options of `evaluate` that apply to translations; None if they are left out."""

    scores: Sequence[str] | None = None
    tokenize: str | None = None
    num_beams: int | None = None
    length_penalty: float | None = None
    no_repeat_ngram: int | None = None
    max_new_tokens: int | None = None


def evaluate_translation(
    trained: Trained, data: TranslationData, split: str | None, options: TranslationOptions, device: torch.device
) -> Evaluation:
    """Let the network of a checkpoint write a text for each source, and compare it with the target.

    `trunkline evaluate` says what the arguments mean.

    Raises:
        TrunklineError: as `evaluate`.
    """
    translator = Translator.of(trained, device)
    refuse_other_preparation(data, pair_settings(trained))
    scores, tokenize = scores_of(trained, options)
    generation = {name: value for name, value in options._asdict().items() if name not in ("scores", "tokenize")}
    config = generation_of(trained, translator.longest, **generation)
    translator.check_length(config)
    source, rows, pairs = choose_pairs(data, split, trained)
    predictions = translator.write(
        encode_sources(translator, pairs), config, data.eval_batch_size or data.batch_size, f"translating {source}"
    )
    found = translation_scores(predictions, [pair.target for pair in pairs], scores, tokenize)
    signed = signatures(scores, tokenize)
    results = [Result(TRANSLATION_TASK, name, value, signature=signed.get(name, "")) for name, value in found.items()]
    return Evaluation(source, rows, results, len(pairs))


def scores_of(trained: Trained, options: TranslationOptions) -> tuple[list[str], str]:
    """The scores, and how sacreBLEU cuts texts into words.

    Unless they are given, these are the usual scores and those of the run's validation, and its words.

    Raises:
        TrunklineError: for a score that is not known, or a tokenizer that sacreBLEU cannot load.
    """
    recipe = trained.content["hyper_parameters"]
    scores = options.scores or [*dict.fromkeys([*USUAL_SCORES, *recipe.get("scores", ())])]
    tokenize = options.tokenize or recipe.get("tokenize") or USUAL_TOKENS
    try:
        check_scores(scores, tokenize)
    except TrunklineError as error:  # it names the field of a recipe
        raise TrunklineError(str(error), "scores" if "scores" in str(error.field) else "tokenize") from error
    return list(scores), tokenize


def choose_pairs(data: TranslationData, split: str | None, trained: Trained) -> tuple[str, str, list[Pair]]:
    """The pairs to evaluate on.

    Args:
        data: the data that the user gave.
        split: the split, or `all` pairs of the source. None is the test split if there is one, else the validation
            split of the source that the network was trained on, or all pairs of any other source.
        trained: the checkpoint.

    Returns:
        Name of the source, split or `all`, and the pairs.

    Raises:
        TrunklineError: if there is no such split or no pair in it, or if a pair cannot be read.
    """
    data, split = chosen_split(data, split, trained, "pairs")
    named, targets, shares = data.named_sources, data.named_targets, shares_of(data.fractions)
    own = split if split in named else "train"
    pairs = list(open_pairs(named[own], targets.get(own), data.columns).pairs())
    if own == "train" and split != "all":
        pairs = [pair for pair in pairs if split_of(pair.number, shares) == split]
    if not pairs:
        raise TrunklineError(
            f"the {split} split of {named[own].name} has no pairs; give more, or another split", "split"
        )
    return named[own].name, split, pairs


def encode_sources(translator: Translator, pairs: list[Pair]) -> list[list[int]]:
    """Token ids of the sources, as in training; prints how many were cut.

    Raises:
        TrunklineError: if the language of a target is unknown, or not known to the network.
    """
    sources, groups, rows = translator.sources, dict[str | None, list[int]](), dict[int, list[int]]()
    for number, pair in enumerate(pairs):
        if pair.language is not None and pair.language not in (sources.languages or [pair.language]):
            raise TrunklineError(
                f"{pair.place}: the network was not trained to write '{pair.language}', only "
                f"{', '.join(sources.languages or [])}; leave this row out"
            )
        check_language(pair, sources.languages)
        groups.setdefault(None if sources.languages is None else pair.language, []).append(number)
    for language, group in groups.items():
        names = [pairs[number].place for number in group]
        found = sources.encode([pairs[number].source for number in group], language, names)
        rows |= dict(zip(group, found, strict=True))
    if sources.cut:
        print(f"{sources.cut} of {len(pairs)} sources were cut to {sources.max_length} tokens, as in training")
    return [rows[number] for number in range(len(pairs))]
