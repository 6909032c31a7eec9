"""`trunkline translate`: write translations or summaries of texts with a checkpoint."""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from trunkline import TrunklineError
from trunkline.datamodules.tables import STANDARD, read_lines
from trunkline.files import atomic_write
from trunkline.modules.generation.decoding import GenerationConfig
from trunkline.names import check_regular
from trunkline.pipelines.commands.output import check_folder
from trunkline.pipelines.devices import find_device
from trunkline.pipelines.generating import NumberFormat, readers_may_leave, write
from trunkline.pipelines.trained import Trained
from trunkline.pipelines.translating import Translator, check_batch, generation_of


class Source(NamedTuple):
    """A text to translate."""

    name: str
    """What messages call it."""
    text: str


def translate(
    checkpoint: str,
    text: list[str] | str | None = None,
    texts: str | None = None,
    output: str | None = None,
    language: str | None = None,
    num_beams: int | None = None,
    length_penalty: float | None = None,
    no_repeat_ngram: int | None = None,
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    seed: int | None = None,
    too_long: Literal["refuse", "cut"] = "refuse",
    batch_size: int = 64,
    dtype: NumberFormat = "float32",
    compile: bool = False,
    device: str = "auto",
) -> None:
    """Write a translation of each text, or whatever else an encoder-decoder was trained to write, such as a summary.

    The texts follow the command (`trunkline translate "one" "two" --checkpoint FILE`) or are the lines of a file. For
    each line of a file one line is written, in the same order; for an empty line, an empty line. Options of generation
    that you leave out are those of the validation in training: the likeliest token is always taken, unless the recipe
    says otherwise.

    Args:
        checkpoint: a checkpoint of an encoder-decoder, from `trunkline fit` with TranslationData.
        text: the texts; they can also follow the command without the flag.
        texts: a file with one text per line; - is the standard input.
        output: a file for the translations, which is written completely or not at all. None is the standard output.
        language: the target language, such as de, for a model that was trained on several.
        num_beams: above 1, use beam search with this many beams.
        length_penalty: of beam search; above 0 favours longer texts.
        no_repeat_ngram: no sequence of this many tokens occurs twice in a translation.
        max_new_tokens: largest number of tokens of a translation; None is that of training.
        temperature: above 0, sample instead of taking the likeliest token; it divides the logits.
        top_k: sample from this many likeliest tokens; as `top_p` and `min_p`, it sets the temperature to 1.
        top_p: sample from the likeliest tokens that together have this probability.
        min_p: sample from tokens with at least this fraction of the likeliest token's probability.
        repetition_penalty: above 1, tokens that are already in the translation become less likely.
        seed: seed of sampling.
        too_long: `refuse` texts that are longer than those of training, or `cut` them as in training.
        batch_size: number of texts at a time.
        dtype: number format of the weights; float32 is exact.
        compile: compile the step that makes a token, on a GPU into a CUDA graph. The first token then takes up to a
            minute, so this is for many texts. Greedy translations in float32 stay the same.
        device: auto, cpu, cuda, cuda:1, mps, …

    Raises:
        TrunklineError: for wrong options, a text that cannot be translated, or a checkpoint that cannot be used, before
            anything is written.
    """
    sources = check_sources(text, texts, output)
    check_batch(batch_size)
    place = find_device(device)
    trained = Trained.read(checkpoint, "translate")
    translator = Translator.of(trained, place, dtype, too_long, compile)
    config = generation_of(
        trained,
        translator.longest,
        num_beams=num_beams,
        length_penalty=length_penalty,
        no_repeat_ngram=no_repeat_ngram,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    given = list(sources)
    found = translations(translator, given, language, config, batch_size)
    lines = found if texts is None else [" ".join(line.splitlines()) for line in found]
    write_lines(lines, output)


def check_sources(text: list[str] | str | None, texts: str | None, output: str | None) -> Iterator[Source]:
    """The texts to translate; the arguments are checked now, and a file is read later.

    Raises:
        TrunklineError: if there is no text, texts of both kinds, no such file, or no folder for the output.
    """
    if text is not None and texts is not None:
        raise TrunklineError("a text and --texts are both given; leave one of them out")
    if output is not None:
        check_folder(output)
    if texts is not None:
        if texts != STANDARD:
            check_regular(texts, "texts")
        if texts != STANDARD and not Path(texts).is_file():
            raise TrunklineError(f"--texts {texts}: there is no such file; fix the path")
        return (Source(place, cells["text"]) for place, cells in read_lines(Path(texts), "text"))
    given = [text] if isinstance(text, str) else text or []
    if not given:
        raise TrunklineError("there is nothing to translate; give a text, or --texts with a file (- is standard input)")
    for number, own in enumerate(given, start=1):
        if not own.strip():
            raise TrunklineError(f"text {number} is empty; give a text, or leave it out")
    return (Source(f"text {number}", own) for number, own in enumerate(given, start=1))


def translations(
    translator: Translator, given: Sequence[Source], language: str | None, config: GenerationConfig, batch_size: int
) -> list[str]:
    """The translation of each text; that of an empty text is empty.

    Raises:
        TrunklineError: for a text that is too long, or a language that the model was not trained on.
    """
    translator.sources.language_id(language)
    full = [number for number, source in enumerate(given) if source.text.strip()]
    rows = translator.sources.encode([given[n].text for n in full], language, [given[n].name for n in full])
    if translator.sources.cut:
        print(
            f"{translator.sources.cut} of {len(full)} texts were cut to {translator.sources.max_length} tokens, as in "
            "training",
            file=sys.stderr,
        )
    found = [""] * len(given)
    for number, text in zip(full, translator.write(rows, config, batch_size), strict=True):
        found[number] = text
    return found


def write_lines(lines: Sequence[str], output: str | None) -> None:
    """Write lines to a file, completely or not at all, or to the standard output.

    Raises:
        TrunklineError: if the file cannot be written.
    """
    if output is not None:
        atomic_write(Path(output), (f"{line}\n".encode() for line in lines), field="output")
        print(f"wrote {len(lines)} lines to {output}")
        return
    with readers_may_leave():
        write("".join(f"{line}\n" for line in lines))
