"""`trunkline evaluate`: measure a network on images, or on pairs of texts."""

from typing import Any, Literal

from trunkline import TrunklineError
from trunkline.datamodules.base import TrunklineDataModule
from trunkline.datamodules.images.image_data import ImageData
from trunkline.datamodules.pairs.image_text_data import ImageTextData
from trunkline.datamodules.translation.translation_data import TranslationData
from trunkline.pipelines.commands.output import check_output
from trunkline.pipelines.devices import find_device
from trunkline.pipelines.evaluation.images import LABELLED, ImageOptions, evaluate_images
from trunkline.pipelines.evaluation.results import check_task_options, save, show
from trunkline.pipelines.evaluation.translation import TASK, TranslationOptions, evaluate_translation
from trunkline.pipelines.trained import Trained

Measure = Literal["retrieval", "zero_shot", "knn", "linear_probe", "translation"]


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
    output: str | None = None,
    device: str = "auto",
) -> None:
    """Evaluate the network of a checkpoint on images with captions or labels or on pairs of texts, and print a table.

    `retrieval` finds the right text for each image, and the right image for each text. `zero_shot` chooses the class
    whose text is most similar to the image. `knn` and `linear_probe` learn the classes from frozen features of the
    training split; they work for image classifiers too. `translation` compares the texts that an encoder-decoder writes
    with the targets: BLEU and chrF with their signatures, exact match, ROUGE. `all` measures everything that data and
    checkpoint allow.

    Images and texts are prepared as in the checkpoint's training. If the data is of the same class as in training (and
    for pairs of texts, of the same source), shares (`val_fraction`, `test_fraction`) and seed (`split_seed`) that you
    leave out are those of training, so that no training row is tested; a `split_seed` of 0 counts as left out. Old
    checkpoints do not store them; for these the default shares are used.

    Args:
        checkpoint: file that `trunkline fit` saved, of a network for images and texts, of an image classifier or of an
            encoder-decoder.
        data: ImageTextData, ImageData or TranslationData, with the flags of `trunkline fit` (`--data.source openmoji`).
            If the class is left out, it is TranslationData for `--what translation`, for `dates` and `phrases` and for
            an encoder-decoder; ImageTextData for `twemoji`, `openmoji`, `--what retrieval` and flags that only this
            class has (`--data.caption_column`); otherwise ImageData. With `skip_corrupt`, images that cannot be read
            are skipped and counted.
        what: the task to measure.
        split: the split to measure on; `all` pairs of texts of the source. None is the test split. If there is none, it
            is the validation split, except that pairs of another source than that of training are all taken.
        captions: use only the first caption of each image, or all.
        class_names: names that replace those of the data: a list, or a file with one name per line.
        templates: zero-shot prompts with {} for the class name: a list, a single one, or a file with one per line.
        k: number of neighbours that vote. None is 20.
        scores: the scores of translations; None takes exact, bleu, chrf and those of training.
        tokenize: how sacreBLEU cuts texts into words (13a, intl, zh, char, …); None takes that of training.
        num_beams: above 1, translate with beam search. None and the next three options: as in training's validation.
        length_penalty: of beam search; above 0 favours longer texts.
        no_repeat_ngram: no sequence of this many tokens occurs twice in a translation.
        max_new_tokens: largest number of tokens of a translation.
        output: a .json file to which the results are written as well.
        device: auto, cpu, cuda, cuda:1, mps, …

    Raises:
        TrunklineError: for a missing file or split, an option that does not apply, class names or templates that cannot
            be used, or a task that data or network do not allow.
    """
    if output is not None:
        check_output(output, (".json",))
    pictures = ImageOptions(None if captions == "first" else captions, class_names, templates, k)
    texts = TranslationOptions(scores, tokenize, num_beams, length_penalty, no_repeat_ngram, max_new_tokens)
    place, trained = find_device(device), Trained.read(checkpoint)
    if isinstance(data, TranslationData):
        if what not in ("all", TASK):
            raise TrunklineError(f"{data.source} has pairs of texts, as TranslationData reads it; give --what {TASK}")
        check_task_options(pictures._asdict(), [TASK], data.source)
        found = evaluate_translation(trained, data, split, texts, place)
    elif isinstance(data, ImageData | ImageTextData):
        if what == TASK or split == "all":
            option = f"--what {TASK}" if what == TASK else "--split all"
            raise TrunklineError(f"{option} is for TranslationData, but {data.source} is read as {type(data).__name__}")
        check_task_options(
            texts._asdict(), ["retrieval"] if isinstance(data, ImageTextData) else [*LABELLED], data.source
        )
        found = evaluate_images(trained, data, what, split, pictures, place)
    else:
        raise TrunklineError(
            f"{type(data).__name__} holds no images; give ImageData or ImageTextData, or TranslationData for pairs of "
            "texts",
            "data",
        )
    show(found.results, f"{checkpoint} on {found.rows}")
    if output is not None:
        about: dict[str, Any] = {"checkpoint": checkpoint, "source": found.source, "split": found.split}
        if found.pairs is not None:
            about["pairs"] = found.pairs
        save(found.results, output, about)
