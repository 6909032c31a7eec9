"""Tiny checkpoints of every objective, the runs that make them, and the results of commands that use them.

`record_numbers.py checkpoints FOLDER` writes the checkpoints; tests load files that older code has written. Dropout is
off and random numbers come from numpy, so that the results of another machine are nearly the same.
"""

import contextlib
import io
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import small_data
import sound_files
from record_numbers import Shrunk, images, network, text, train

STEPS, LATER = 150, 152
"""Optimiser steps of a checkpoint, and of the run that resumes from it."""
TRUNK = {"dim": 8, "depth": 1, "num_heads": 2, "mlp_dim": 12, "dropout": 0.0, "drop_path": 0.0, "bias": False}
LENGTH, SIZE = 24, 8
"""Tokens per row, and side of an image in pixels."""
PLAIN = {"crop_scale": [1, 1]}
"""An augmentation that changes nothing."""
WORDS = len(small_data.MASKING + small_data.WORDS)


def trunk(prefix: str = "", **flags: Any) -> dict[str, Any]:
    """Flags of the trunk."""
    return network(f"{prefix}backbone.", **TRUNK, **flags)


def optimizer(name: str, lr: float) -> dict[str, Any]:
    """Flags of an optimiser with a constant learning rate; SGD has the smallest state."""
    flags = {"name": name, "lr": lr, "schedule": "constant", "warmup": 0, "weight_decay": 0.0, "momentum": 0.9}
    return {f"model.optimizer.{flag}": value for flag, value in flags.items()}


def tokens(folder: Path) -> dict[str, Any]:
    """Flags of a datamodule with a tokenizer."""
    return text(tokenizer=str(folder / "words.json"), max_length=LENGTH, batch_size=8)


def bert(prefix: str = "bert.", segments: int = 0) -> tuple[dict[str, Any], dict[str, Any]]:
    """Flags of a body, and of the sizes that come from the data."""
    sizes = network(prefix, vocab_size=WORDS, max_length=LENGTH)
    return trunk(prefix, norm_first=False, final_norm=False) | network(prefix, num_segments=segments), sizes


def image_classifier(folder: Path) -> Shrunk:
    """A classifier of dark and light pictures."""
    source = small_data.write_folders(folder / "kinds", 40, colour=False, size=(10, 10))
    data = images(source=source, image_size=SIZE, channels=1, augmentation=PLAIN, batch_size=8)
    shape = network(patch_size=4, pool="mean") | trunk() | optimizer("muon", 0.01)
    return Shrunk(data | shape, network(image_size=SIZE, in_chans=1, num_classes=2))


def causal_lm(folder: Path) -> Shrunk:
    """A language model of sentences."""
    data = text(source=small_data.write_text(folder / "lines.txt", 200)) | tokens(folder)
    return Shrunk(data | text(tokenizer="chars") | trunk() | optimizer("adamw", 0.02), network(max_length=LENGTH))


def masked_lm(folder: Path) -> Shrunk:
    """A masked language model of the same sentences."""
    data = text(source=small_data.write_text(folder / "lines.txt", 200)) | tokens(folder)
    body, _ = bert("")
    return Shrunk(data | body | optimizer("sgd", 0.3), network(max_length=LENGTH))


def text_classifier(folder: Path) -> Shrunk:
    """A classifier of good and bad texts."""
    data = text(source=small_data.write_labelled(folder / "labelled.jsonl")) | tokens(folder)
    body, sizes = bert()
    shape = network(pool="mean", dropout=0.0)
    return Shrunk(data | body | shape | optimizer("sgd", 0.1), sizes | network(num_outputs=2))


def token_classifier(folder: Path) -> Shrunk:
    """A tagger of persons and places."""
    data = text(source=small_data.write_tagged(folder / "tagged.conll")) | tokens(folder)
    body, sizes = bert()
    shape = network(pool="none", dropout=0.0)
    return Shrunk(data | body | shape | optimizer("sgd", 0.1), sizes | network(num_outputs=3))


def question_answering(folder: Path) -> Shrunk:
    """A model that answers who saw the film."""
    data = text(source=small_data.write_questions(folder / "asked.json"), doc_stride=8, max_question_length=8)
    body, sizes = bert(segments=2)
    shape = network(pool="none", num_outputs=2, dropout=0.0)
    return Shrunk(data | tokens(folder) | body | shape | optimizer("sgd", 0.1), sizes)


def contrastive(folder: Path) -> Shrunk:
    """A CLIP of small pictures and their captions."""
    data = images(source=small_data.write_pairs(folder / "pairs"), image_size=SIZE, channels=1, augmentation=PLAIN)
    body, sizes = bert()
    vision = network("image.", patch_size=4, pool="mean") | trunk("image.")
    shape = network(dim=8, text_pool="mean") | vision | body
    sizes |= network("image.", image_size=SIZE, in_chans=1)
    return Shrunk(data | tokens(folder) | shape | optimizer("sgd", 0.5), sizes)


def seq2seq(folder: Path) -> Shrunk:
    """A model that makes a sentence of an opinion."""
    data = text(source=small_data.write_translations(folder / "opinions.jsonl"), max_target_length=LENGTH)
    trunks = {f"{side}.{name}": value for side in ("encoder", "decoder") for name, value in TRUNK.items()}
    shape = network(scale_embeddings=True, **trunks) | {"model.label_smoothing": 0.1}
    return Shrunk(data | tokens(folder) | shape | optimizer("sgd", 0.3))


def sounds(folder: Path) -> dict[str, Any]:
    """Flags of a datamodule of tones."""
    features = {"sample_rate": sound_files.RATE, "num_mels": 8, "max_seconds": 1.0}
    data = text(source=sound_files.write_spoken(folder / "sounds", 60), batch_size=8)
    return data | {f"data.log_mel.{name}": value for name, value in features.items()}


def audio_classifier(folder: Path) -> Shrunk:
    """A classifier of strings of tones by their length."""
    return Shrunk(sounds(folder) | network(patch_size=8, stride=4) | trunk() | optimizer("adamw", 0.02))


def speech_recognizer(folder: Path) -> Shrunk:
    """A recogniser of strings of tones."""
    return Shrunk(sounds(folder) | network(positions="sinusoidal") | trunk() | optimizer("sgd", 0.05))


def speech_to_text(folder: Path) -> Shrunk:
    """The same with a decoder."""
    trunks = {f"{side}.{name}": value for side in ("encoder", "decoder") for name, value in TRUNK.items()}
    return Shrunk(sounds(folder) | text(form="decoder", max_length=8) | network(**trunks) | optimizer("adamw", 0.02))


@dataclass
class Objective:
    """How to train and use the checkpoint of an objective."""

    data: str
    make: Callable[[Path], Shrunk]
    """Writes the data below a folder, and returns the flags."""
    ask: Callable[[str, Path], Any]
    """Runs a command with a checkpoint and returns its results; may write below a folder."""


def call(*arguments: str) -> str:
    """Run a command and return what it prints."""
    from trunkline.pipelines.cli import main

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        main([*arguments])
    return printed.getvalue()


def predicted(checkpoint: str, folder: Path, *arguments: str) -> list[Any]:
    """Rows of a table of predictions, with file names instead of paths."""
    output = folder / "predictions.csv"
    call("predict", f"--checkpoint={checkpoint}", f"--output={output}", "--accelerator=cpu", *arguments)
    table = pd.read_csv(output)
    if "path" in table:
        table["path"] = [Path(path).name for path in table["path"]]
    rows: list[Any] = json.loads(table.to_json(orient="values"))
    return rows


def classify_pictures(checkpoint: str, folder: Path) -> Any:
    """Name, label and probability of new pictures."""
    (folder / "new").mkdir()
    for number in range(100, 104):
        kind = small_data.KINDS[number % 2]
        small_data.picture(number, kind, (10, 10), colour=False).save(folder / "new" / f"{kind}-{number}.png")
    return predicted(checkpoint, folder, f"--images={folder / 'new'}")


def continue_text(checkpoint: str, folder: Path) -> Any:
    """The likeliest text after a prompt."""
    return call(
        *("generate", f"--checkpoint={checkpoint}", "--prompt=anna saw ", "--max_new_tokens=16"),
        *("--temperature=0", "--device=cpu"),
    )


def fill_and_embed(checkpoint: str, folder: Path) -> Any:
    """The likeliest words for a mask with their probabilities, and the embeddings of two texts."""
    sentence = "anna saw the [MASK] film ."
    printed = call("fill-mask", sentence, f"--checkpoint={checkpoint}", "--top_k=3", "--device=cpu")
    filled = [[word, float(number)] for word, number in re.findall(r"(\S+) (\d\.\d+)", printed)]
    return {"filled": filled, "embedded": embedded(checkpoint, folder)}


def embedded(checkpoint: str, folder: Path, *arguments: str) -> Any:
    """Embeddings of two texts, and of the images if the arguments name some."""
    (folder / "texts.txt").write_text("a dark film of anna\na light film of bo\n")
    output, texts = folder / "embeddings.parquet", folder / "texts.txt"
    call("embed", f"--checkpoint={checkpoint}", f"--texts={texts}", f"--output={output}", "--device=cpu", *arguments)
    return [[float(number) for number in vector] for vector in pd.read_parquet(output)["embedding"]]


def classify_texts(checkpoint: str, folder: Path) -> Any:
    """Text, label and probability of new texts."""
    (folder / "new.txt").write_text(
        "bo saw the film . the film was very bad .\ndora saw the film . the film was good .\n"
    )
    return predicted(checkpoint, folder, f"--texts={folder / 'new.txt'}")


def tag_words(checkpoint: str, folder: Path) -> Any:
    """Sentence, word, tag and probability of a new sentence."""
    (folder / "new.txt").write_text("Dora saw in Berlin Carl .\n")
    return predicted(checkpoint, folder, f"--texts={folder / 'new.txt'}")


def answer_questions(checkpoint: str, folder: Path) -> Any:
    """Id, question, answer and score of new questions."""
    small_data.write_questions(folder / "new.json", 3)
    return predicted(checkpoint, folder, f"--texts={folder / 'new.json'}")


def embed_and_search(checkpoint: str, folder: Path) -> Any:
    """Embeddings of texts and pictures, and the order in which a text finds the pictures."""
    (folder / "new").mkdir()
    for number, kind in enumerate(small_data.KINDS, start=100):
        small_data.picture(number, kind, (10, 10), colour=False).save(folder / "new" / f"{kind}.png")
    vectors = embedded(checkpoint, folder, f"--images={folder / 'new'}")
    printed = call(
        *("search", "a light film of carl", f"--checkpoint={checkpoint}", f"--images={folder / 'new'}", "--count=2"),
        *(f"--output={folder / 'found.png'}", "--device=cpu"),
    )
    return {"embedded": vectors, "found": re.findall(r"(dark|light)\.png", printed)}


def translate_texts(checkpoint: str, folder: Path) -> Any:
    """Sentences for two opinions, greedy and by beam search."""
    texts, flags = ("very good film", "bad film"), (f"--checkpoint={checkpoint}", "--device=cpu")
    return [call("translate", *texts, *flags, f"--num_beams={beams}").splitlines() for beams in (1, 3)]


def new_sounds(folder: Path) -> list[str]:
    """Files of strings of tones."""
    return [
        str(sound_files.write_sound(folder / "new" / f"{letters}.wav", sound_files.letter_tones(letters)))
        for letters in ("ab", "dcba")
    ]


def classify_sounds(checkpoint: str, folder: Path) -> Any:
    """Name, label and probability of new sounds."""
    new_sounds(folder)
    return predicted(checkpoint, folder, f"--audio={folder / 'new'}")


def transcribe_sounds(checkpoint: str, folder: Path) -> Any:
    """The texts of new sounds."""
    printed = call("transcribe", *new_sounds(folder), f"--checkpoint={checkpoint}", "--device=cpu")
    return [line.partition("\t")[2] for line in printed.splitlines()]


OBJECTIVES = {
    "ImageClassifier": Objective("ImageData", image_classifier, classify_pictures),
    "CausalLM": Objective("TextData", causal_lm, continue_text),
    "MaskedLM": Objective("MaskedTextData", masked_lm, fill_and_embed),
    "TextClassifier": Objective("LabelledTextData", text_classifier, classify_texts),
    "TokenClassifier": Objective("TaggedTextData", token_classifier, tag_words),
    "QuestionAnswering": Objective("SquadData", question_answering, answer_questions),
    "Seq2Seq": Objective("TranslationData", seq2seq, translate_texts),
    "ContrastiveImageText": Objective("ImageTextData", contrastive, embed_and_search),
    "AudioClassifier": Objective("AudioData", audio_classifier, classify_sounds),
    "SpeechRecognizer": Objective("SpeechData", speech_recognizer, transcribe_sounds),
    "SpeechToText": Objective("SpeechData", speech_to_text, transcribe_sounds),
}


def fit(objective: str, folder: Path, steps: int, *arguments: str, **recorder: Any) -> Any:
    """Train an objective, and return what `record_numbers.LossRecorder` wrote.

    Args:
        objective: name of the objective.
        folder: a folder for data and run; must be new, or that of an earlier run.
        steps: optimiser steps, counted from the start of training.
        arguments: further arguments of the command.
        recorder: arguments of `LossRecorder`.
    """
    os.environ["TRUNKLINE_CACHE"] = str(folder / "cache")
    small_data.save_tokenizers(folder)
    made = OBJECTIVES[objective]
    shutil.rmtree(folder / "pairs", ignore_errors=True)
    flags = [*made.make(folder).arguments(), f"--trainer.max_steps={steps}", "--trainer.enable_checkpointing=false"]
    config = folder / "objective.yaml"
    config.write_text(f"model:\n  class_path: {objective}\ndata:\n  class_path: {made.data}\n")
    return train(["--config", str(config), *flags, *arguments], folder, **recorder)


def make_checkpoints(target: Path, only: str | None = None) -> None:
    """Write a checkpoint of each objective, and `figures.json` with the results and the losses after the checkpoint.

    Args:
        target: the folder.
        only: name of an objective that is new: the files of the others, which older code wrote, stay.
    """
    target.mkdir(parents=True, exist_ok=True)
    figures = {} if only is None else json.loads((target / "figures.json").read_text())
    for name, objective in OBJECTIVES.items():
        if only not in (None, name):
            continue
        file = target / f"{name}.ckpt"
        with tempfile.TemporaryDirectory() as folder:
            recorded = fit(name, Path(folder), LATER, checkpoint=str(file), step=STEPS)
            found = objective.ask(str(file), Path(folder))
        later = [float.fromhex(loss) for loss in recorded["losses"][STEPS:]]
        figures[name] = {"step": STEPS, "later": later, "found": found}
    (target / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")
