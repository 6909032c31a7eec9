"""A tiny pre-trained BERT, and a small data file for each task on text."""

import json
from itertools import product
from pathlib import Path
from typing import Any

import torch
from small_data import MASKING, word_tokenizer
from tokenizers import Tokenizer

from trunkline.modules.backbone import TransformerConfig
from trunkline.modules.networks import BERTConfig
from trunkline.modules.objectives.masked_lm import MaskedLM
from trunkline.modules.training.checkpoints import SafeCheckpointIO

NAMES = ["anna", "bo", "carl", "dora"]
WORDS = ["the", "film", "was", "good", "bad", "very", "saw", "in", "ber", "##lin", "who", "a", "?", ".", *NAMES]
LENGTH = 32


def words() -> Tokenizer:
    """A WordPiece tokenizer of lower-case words."""
    return word_tokenizer(WORDS)


def bert() -> BERTConfig:
    trunk = TransformerConfig(dim=32, depth=2, num_heads=2, norm_first=False, final_norm=False)
    return BERTConfig(len(MASKING + WORDS), LENGTH, backbone=trunk)


def pretrained(folder: Path) -> str:
    """Write a checkpoint of a MaskedLM as a run saves it; returns the path."""
    torch.manual_seed(0)
    model = MaskedLM(bert())
    content: dict[str, Any] = {"objective": "MaskedLM", "state_dict": model.state_dict()}
    content |= {"hyper_parameters": dict(model.hparams), "MaskedTextData": {"tokenizer": words().to_str()}}
    SafeCheckpointIO().save_checkpoint(content, folder / "bert.ckpt")
    return str(folder / "bert.ckpt")


def labelled(folder: Path, pairs: bool = False) -> str:
    """Write 16 texts with the label good or bad; of a pair, the second text decides. Returns the path."""
    rows = []
    for name, kind, very in product(NAMES, ("good", "bad"), ("", "very ")):
        first, second = f"{name} saw the film", f"the film was {very}{kind}."
        row = {"text": first, "pair": second} if pairs else {"text": f"{first} . {second}"}
        rows.append({**row, "label": kind})
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(folder / "train.jsonl")


def tagged(folder: Path) -> str:
    """Write 12 tagged sentences with persons and a place of two sub-words; returns the path."""
    sentences = [
        [(a.title(), "B-PER"), ("saw", "O"), (b.title(), "B-PER"), ("in", "O"), ("Berlin", "B-LOC"), (".", "O")]
        for a, b in product(NAMES, NAMES)
        if a != b
    ]
    (folder / "train.conll").write_text("\n".join("".join(f"{w} {t}\n" for w, t in s) for s in sentences))
    return str(folder / "train.conll")


def asked(folder: Path, impossible: bool = False) -> str:
    """Write 4 texts with two questions each, and with `impossible` a third one without an answer; returns the path."""
    paragraphs = []
    for n, name in enumerate(NAMES):
        other = NAMES[n - 1].title()
        context = f"The film was very good . {name.title()} saw the film in Berlin , {other} {name} ."
        answers = {"who saw the film ?": name.title(), "in a Berlin ?": f"{other} {name}"}
        qas: list[dict[str, Any]] = [
            {"id": f"{n}-{i}", "question": q, "answers": [{"text": a, "answer_start": context.index(a)}]}
            for i, (q, a) in enumerate(answers.items())
        ]
        if impossible:
            qas.append({"id": f"{n}-x", "question": "who saw a film ?", "is_impossible": True, "answers": []})
        paragraphs.append({"context": context, "qas": qas})
    (folder / "train.json").write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
    return str(folder / "train.json")
