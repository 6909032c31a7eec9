"""`trunkline evaluate`: measure a network on images, pairs of texts, speech or sounds."""

from typing import Any, Literal

from trunkline.datamodules.base import TrunklineDataModule
from trunkline.pipelines.commands.output import check_output
from trunkline.pipelines.devices import find_device
from trunkline.pipelines.evaluation.families import family_of_data
from trunkline.pipelines.evaluation.results import save, show
from trunkline.pipelines.trained import Trained

Measure = Literal["retrieval", "zero_shot", "knn", "linear_probe", "translation", "transcription", "classification"]


def evaluate(
    checkpoint: str,
    data: TrunklineDataModule,
    what: Measure | Literal["all"] = "all",
    split: Literal["train", "val", "test", "all"] | None = None,
    captions: Literal["first", "all"] = "first",
    class_names: list[str] | str | None = None,
    templates: list[str] | str | None = None,
    k: int | None = None,
    scores: list[Literal["exact", "bleu", "chrf", "rouge"]] | None = None,
    tokenize: str | None = None,
    num_beams: int | None = None,
    length_penalty: float | None = None,
    no_repeat_ngram: int | None = None,
    max_new_tokens: int | None = None,
    language_model: str | None = None,
    lm_weight: float | None = None,
    length_bonus: float | None = None,
    output: str | None = None,
    device: str = "auto",
) -> None:
    """Evaluate the network of a checkpoint on images, pairs of texts, speech or sounds, and print a table.

    `retrieval` finds the right text for each image, and the right image for each text. `zero_shot` chooses the class
    whose text is most similar to the image. `knn` and `linear_probe` learn the classes from frozen features of the
    training split; they work for image classifiers too. `translation` compares the texts that an encoder-decoder writes
    with the targets: BLEU and chrF with their signatures, exact match, ROUGE. `transcription` compares what is heard
    with the transcripts: error rates of words and characters, exact match. `classification` is the accuracy of a
    classifier of sounds, or if sounds can have several labels the mean average precision. `all` measures everything
    that data and checkpoint allow.

    Images, texts and sounds are prepared as in the checkpoint's training; recordings longer than those of training are
    heard in windows. If the data is of the same class as in training (and for pairs of texts and recordings, of the
    same source), shares (`val_fraction`, `test_fraction`) and seed (`split_seed`) that you leave out are those of
    training, so that no training row is tested; a `split_seed` of 0 counts as left out. Old checkpoints do not store
    them; for these the default shares are used.

    Args:
        checkpoint: file that `trunkline fit` saved, of a network for images and texts, of an image classifier, of an
            encoder-decoder, or of a network that hears.
        data: ImageTextData, ImageData, TranslationData, SpeechData or AudioData, with the flags of `trunkline fit`
            (`--data.source openmoji`). If the class is left out, it is TranslationData for `--what translation`, for
            `dates` and `phrases` and for an encoder-decoder; SpeechData or AudioData for a network that hears;
            ImageTextData for `twemoji`, `openmoji`, `--what retrieval` and flags that only this class has
            (`--data.caption_column`); otherwise ImageData. With `skip_corrupt`, images and recordings that cannot be
            read are skipped and counted.
        what: the task to measure.
        split: the split to measure on; `all` rows of the source, except for images. None is the test split. If there is
            none, it is the validation split; of another source than that of training, all rows except images.
        captions: use only the first caption of each image, or all.
        class_names: names that replace those of the data: a list, or a file with one name per line.
        templates: zero-shot prompts with {} for the class name: a list, a single one, or a file with one per line.
        k: number of neighbours that vote. None is 20.
        scores: the scores of translations; None takes exact, bleu, chrf and those of training.
        tokenize: how sacreBLEU cuts texts into words (13a, intl, zh, char, …); None takes that of training.
        num_beams: above 1, use beam search for translation or transcription. None and the next three options: as in
            training's validation.
        length_penalty: of beam search; above 0 favours longer texts.
        no_repeat_ngram: no sequence of this many tokens occurs twice in a translation.
        max_new_tokens: largest number of tokens of a translation.
        language_model: for recognisers with CTC, as the next two options; see `trunkline transcribe --help`.
        lm_weight: factor of the language model's log-probability.
        length_bonus: of beam search with CTC: added to the score of a text for each token.
        output: a .json file to which the results are written as well.
        device: auto, cpu, cuda, cuda:1, mps, …

    Raises:
        TrunklineError: for a missing file or split, an option that does not apply, class names or templates that cannot
            be used, or a task that data or network do not allow.
    """
    if output is not None:
        check_output(output, (".json",))
    given = {
        "captions": None if captions == "first" else captions,
        "class_names": class_names,
        "templates": templates,
        "k": k,
        "scores": scores,
        "tokenize": tokenize,
        "num_beams": num_beams,
        "length_penalty": length_penalty,
        "no_repeat_ngram": no_repeat_ngram,
        "max_new_tokens": max_new_tokens,
        "language_model": language_model,
        "lm_weight": lm_weight,
        "length_bonus": length_bonus,
    }
    family = family_of_data(data, what, split, given)
    place, trained = find_device(device), Trained.read(checkpoint)
    found = family.evaluate(trained, data, split, family.chosen({**given, "what": what}), place)
    show(found.results, f"{checkpoint} on {found.rows}")
    if output is not None:
        about: dict[str, Any] = {"checkpoint": checkpoint, "source": found.source, "split": found.split}
        if found.number is not None:
            about[found.unit] = found.number
        save(found.results, output, about)
