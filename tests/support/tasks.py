"""A small task for each objective, with every option on that could break a resume; 13 batches per epoch."""

import json
import random
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from small_data import WORDS, word_tokenizer, write_questions, write_tagged
from sound_files import write_spoken

from trunkline.datamodules.tokenizers import train_tokenizer
from trunkline.modules.backbone import TransformerConfig
from trunkline.modules.networks import BERT, BERTConfig

BATCHES = 13


def trunk(exact: bool) -> dict[str, Any]:
    rate = 0.0 if exact else 0.2
    return {"dim": 16, "depth": 2, "num_heads": 2, "dropout": rate, "drop_path": rate}


SMALL_MEL = {"sample_rate": 8000, "num_mels": 12, "per_clip": "mean", "max_seconds": 0.4}
NOISY = {
    **{"speed": [0.9, 1.1], "time_shift": 0.05, "gain_db": 6.0, "mel_warp": 0.2},
    **{"noise": 0.8, "noise_snr": [0.0, 20.0], "noise_kinds": ["white", "pink", "babble"]},
    **{"freq_masks": 2, "freq_width": 3, "time_masks": 1, "time_width": 5},
}
"""All changes that there are to a clip."""


def image(folder: Path, exact: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    network = {"image_size": 8, "patch_size": 4, "in_chans": 1, "num_classes": 10, "backbone": trunk(exact)}
    model = {"class_path": "ImageClassifier", "init_args": {"network": network, "mixup": 0.0 if exact else 0.2}}
    augmentation = {"crop_scale": [0.5, 1.0], "hflip": 0.5, "rotate": 10, "translate": 0.1}
    fractions = {"val_fraction": 0.4, "test_fraction": 0.45}
    data = {"source": "digits", "image_size": 8, "channels": 1, "augmentation": augmentation, **fractions}
    return model, {"class_path": "ImageData", "init_args": data}


def sentences(count: int) -> list[str]:
    chance = random.Random(0)
    words = ["".join(chance.choices("abcdefgh", k=chance.randint(1, 6))) for _ in range(50)]
    return [" ".join(chance.choices(words, k=chance.randint(2, 12))) for _ in range(count)]


def text_block(folder: Path, exact: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    path = folder / "text.txt"
    path.write_text("\n".join(sentences(400))[:7000])
    return causal_lm(exact), text_data(folder, path, val_fraction=0.4)


def text_documents(folder: Path, exact: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    path = folder / "text.jsonl"
    path.write_text("".join(json.dumps({"text": sentence}) + "\n" for sentence in sentences(230)))
    return causal_lm(exact), text_data(folder, path, packing="documents", val_fraction=0.4)


def causal_lm(exact: bool) -> dict[str, Any]:
    network = {"max_length": 16, "backbone": trunk(exact)}
    return {"class_path": "CausalLM", "init_args": {"network": network}}


def text_data(folder: Path, path: Path, **options: Any) -> dict[str, Any]:
    fields = {"source": str(path), "tokenizer": "chars", "max_length": 16, "cache_dir": str(folder / "cache")}
    return {"class_path": "TextData", "init_args": {**fields, **options}}


def masked_lm(exact: bool, data: dict[str, Any], pairs: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    network = {"max_length": 16, "next_sentence": pairs, "backbone": {**trunk(exact), "norm_first": False}}
    data["init_args"] |= {"tokenizer": "masked_bpe", "vocab_size": 300, "next_sentence": pairs}
    return {"class_path": "MaskedLM", "init_args": {"network": network}}, {**data, "class_path": "MaskedTextData"}


def masked(folder: Path, exact: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    path = folder / "text.txt"
    path.write_text("\n".join(sentences(900))[:12000])
    return masked_lm(exact, text_data(folder, path, val_fraction=0.4), pairs=False)


def masked_pairs(folder: Path, exact: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    path = folder / "text.jsonl"
    path.write_text("".join(json.dumps({"text": sentence}) + "\n" for sentence in sentences(282)))
    return masked_lm(exact, text_data(folder, path, val_fraction=0.4), pairs=True)


def classify(folder: Path, exact: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    texts = sentences(450)
    rows = [{"text": text, "label": "abc"[len(text.split()) % 3]} for text in texts]
    (folder / "labelled.jsonl").write_text("\n".join(map(json.dumps, rows)))
    train_tokenizer("masked_bpe", texts, 300).save(str(folder / "tokenizer.json"))
    body = {"vocab_size": 300, "max_length": 16, "backbone": {**trunk(exact), "norm_first": False}}
    network = {"num_outputs": 3, "pool": "mean", "dropout": 0.0 if exact else 0.2, "bert": body}
    data = {"source": str(folder / "labelled.jsonl"), "tokenizer": str(folder / "tokenizer.json"), "max_length": 16}
    model = {"class_path": "TextClassifier", "init_args": {"network": network}}
    return model, {"class_path": "LabelledTextData", "init_args": {**data, "val_fraction": 0.4}}


def of_words(folder: Path, exact: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """The network of a task on the tokens of `small_data`'s sentences, and the options of its data."""
    tokenizer = word_tokenizer(WORDS)
    tokenizer.save(str(folder / "words.json"))
    body = {"vocab_size": tokenizer.get_vocab_size(), "max_length": 32}
    body["backbone"] = {**trunk(exact), "norm_first": False}
    data = {"tokenizer": str(folder / "words.json"), "max_length": 32, "val_fraction": 0.4}
    return {"pool": "none", "dropout": 0.0 if exact else 0.2, "bert": body}, data


def tags(folder: Path, exact: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    network, data = of_words(folder, exact)
    data["source"] = write_tagged(folder / "tags.conll", 450)
    model = {"class_path": "TokenClassifier", "init_args": {"network": network}}
    return model, {"class_path": "TaggedTextData", "init_args": data}


def questions(folder: Path, exact: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Texts are cut into windows, which overlap: 264 of 102 texts."""
    network, data = of_words(folder, exact)
    data |= {"source": write_questions(folder / "questions.json", 170), "doc_stride": 8, "max_question_length": 8}
    model = {"class_path": "QuestionAnswering", "init_args": {"network": network}}
    return model, {"class_path": "SquadData", "init_args": data}


def adapted(folder: Path, exact: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same with LoRA, on a network in a folder beside the recipe."""
    model, data = classify(folder, exact)
    body = model["init_args"]["network"]["bert"]
    torch.manual_seed(5)
    start = BERTConfig(300, 16, backbone=TransformerConfig(**body["backbone"]))
    BERT(start).save_pretrained(folder / "start")
    model["init_args"] |= {"init_from": "start", "lora": {"rank": 2, "dropout": 0.0 if exact else 0.2}}
    return model, data


def pairs(folder: Path, exact: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    texts, chance = sentences(1350), random.Random(0)
    rows = []
    for n in range(450):
        Image.frombytes("L", (12, 12), chance.randbytes(144)).save(folder / f"{n}.png")
        rows.append({"image": f"{n}.png", "caption": texts[3 * n : 3 * n + 3]})
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    train_tokenizer("masked_bpe", texts, 300).save(str(folder / "tokenizer.json"))
    image = {"image_size": 8, "patch_size": 4, "in_chans": 1, "backbone": trunk(exact)}
    text = {"vocab_size": 300, "max_length": 16, "backbone": trunk(exact)}
    network = {"dim": 8, "image": image, "gpt": text}
    data = {"source": str(folder / "pairs.jsonl"), "tokenizer": str(folder / "tokenizer.json"), "max_length": 16}
    augmentation = {"crop_scale": [0.5, 1.0], "hflip": 0.5, "rotate": 10}
    data |= {"image_size": 8, "channels": 1, "augmentation": augmentation, "val_fraction": 0.4}
    model = {"class_path": "ContrastiveImageText", "init_args": {"network": network}}
    return model, {"class_path": "ImageTextData", "init_args": data}


def translate(folder: Path, exact: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """In batches by tokens. Most have an odd number of rows, one has a single row: two processes need fillers."""
    rows = [{"source": text, "target": " ".join(text.split()[::-2])} for text in sentences(254)]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = {"scores": ["exact"], "generated_rows": 3, "label_smoothing": 0.1}
    model = {"network": {"encoder": trunk(exact), "decoder": trunk(exact)}, **options}
    data = {"source": str(folder / "pairs.jsonl"), "tokenizer": "chars", "cache_dir": str(folder / "cache")}
    data |= {"batch_tokens": 448, "max_length": 48, "max_target_length": 24, "val_fraction": 0.4}
    return {"class_path": "Seq2Seq", "init_args": model}, {"class_path": "TranslationData", "init_args": data}


def speech(folder: Path, exact: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """In batches of like length, which differ in size. The recordings are parts of one file."""
    data = {"source": write_spoken(folder, 450), "log_mel": SMALL_MEL, "batch_seconds": 7.0, "too_long": "cut"}
    data |= {"augmentation": NOISY, "cache_dir": str(folder / "cache"), "val_fraction": 0.4}
    network = {"num_mels": 12, "strides": [2], "backbone": trunk(exact)}
    model = {"class_path": "SpeechRecognizer", "init_args": {"network": network}}
    return model, {"class_path": "SpeechData", "init_args": data}


def listen(folder: Path, exact: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same recordings, for a decoder with two start tokens; its texts are written too."""
    _, data = speech(folder, exact)
    data["init_args"] |= {"form": "decoder", "start_tokens": ["<en>", "<text>"]}
    network = {"num_mels": 12, "encoder": trunk(exact), "decoder": trunk(exact)}
    options = {"scores": ["wer"], "generated_rows": 3, "label_smoothing": 0.1}
    return {"class_path": "SpeechToText", "init_args": {"network": network, **options}}, data


def sounds(folder: Path, exact: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Clips with one label, all padded to the same length, and mixed."""
    data = {"source": write_spoken(folder, 450), "log_mel": {**SMALL_MEL, "padding": "fixed"}, "val_fraction": 0.4}
    data |= {"augmentation": NOISY, "cache_dir": str(folder / "cache"), "mixup": {"probability": 0.5, "alpha": 0.3}}
    network = {"num_mels": 12, "patch_size": 4, "stride": 3, "pool": "mean", "backbone": trunk(exact)}
    model = {"class_path": "AudioClassifier", "init_args": {"network": network}}
    return model, {"class_path": "AudioData", "init_args": data}


def own(folder: Path, exact: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """The task of `own_task.py`, which the package does not know."""
    model = {"class_path": "own_task.CloudClassifier", "init_args": {"network": {"backbone": trunk(exact)}}}
    return model, {"class_path": "own_task.CloudData", "init_args": {"rows": 270}}


TASKS = {
    "image": image,
    "block": text_block,
    "documents": text_documents,
    "masked": masked,
    "masked_pairs": masked_pairs,
    "classify": classify,
    "tags": tags,
    "questions": questions,
    "adapted": adapted,
    "pairs": pairs,
    "translate": translate,
    "speech": speech,
    "listen": listen,
    "audio": sounds,
    "own": own,
}
