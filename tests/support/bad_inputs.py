"""Files that are wrong in many ways, and the table of commands that must end with one clear message for each."""

import json
import os
import shlex
import shutil
import struct
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import small_data
import sound_files
import torch

FIXTURES = Path(__file__).parent.parent / "fixtures"
TABLE = FIXTURES / "bad_inputs.txt"
SHORT = {
    "VIT": "fit --config vit/digits --threads 1",
    "GPT": "fit --config gpt/demo --data.source lines.txt --data.tokenizer chars --data.vocab_size null --threads 1",
    "BERT": "fit --config bert/demo --data.source lines.txt --data.tokenizer words.json --data.vocab_size null",
    "CLASSIFY": "fit --config bert/classify_demo --data.tokenizer words.json --data.train_rows null --data.source",
    "TAG": "fit --config bert/tagging --data.tokenizer words.json --data.val_source null --data.source",
    "ASK": "fit --config bert/squad --data.tokenizer words.json --data.val_source null --data.source",
    "CLIP": "fit --config clip/emoji --data.tokenizer words.json --data.vocab_size null --data.first_caption null "
    "--data.source",
    "PAIRS": "fit --config seq2seq/dates --data.val_source null --data.test_source null --data.source",
    "SPEECH": "fit --config audio/digits --data.val_source null --data.test_source null --data.source",
    "SOUNDS": "fit --config audio/esc50 --data.source",
}
"""Names that stand for the beginning of a command in the table."""
CHECKPOINTS = {
    "vit": "ImageClassifier",
    "gpt": "CausalLM",
    "bert": "MaskedLM",
    "clip": "ContrastiveImageText",
    "classes": "TextClassifier",
    "tags": "TokenClassifier",
    "answers": "QuestionAnswering",
    "seq2seq": "Seq2Seq",
    "ctc": "SpeechRecognizer",
    "whisper": "SpeechToText",
    "ast": "AudioClassifier",
}
"""Name of a checkpoint in the table -> objective of the fixture that it is."""


class BadInput(NamedTuple):
    """A line of the table."""

    command: str
    words: list[str]
    """Texts that the message must hold, each of them."""
    slow: bool
    """Whether `make test` leaves it out, because it is much like others."""

    @property
    def arguments(self) -> list[str]:
        """The command line."""
        first, _, rest = self.command.partition(" ")
        return shlex.split(f"{SHORT.get(first, first)} {rest}")


def read_table() -> list[BadInput]:
    """The cases; lines that begin with # and empty ones are comments."""
    lines = [line for line in TABLE.read_text(encoding="utf-8").splitlines() if line.strip() and line[0] != "#"]
    return [
        BadInput(command.removeprefix("~ "), words.split(" | "), slow=command.startswith("~ "))
        for command, _, words in (line.partition(" => ") for line in lines)
    ]


def snapshot(folder: Path) -> set[tuple[str, int, int]]:
    """(path, size, time of change) of everything below a folder; of folders only the path."""
    found = set()
    for path in folder.rglob("*"):
        state = path.lstat()
        found.add((str(path), 0, 0) if path.is_dir() else (str(path), state.st_size, state.st_mtime_ns))
    return found


def write_files(folder: Path) -> None:
    """Write the good and the bad files that the table names."""
    small_data.save_tokenizers(folder)
    small_data.write_text(folder / "lines.txt", 200)
    small_data.write_labelled(folder / "labelled.jsonl")
    small_data.write_tagged(folder / "tagged.conll")
    small_data.write_questions(folder / "asked.json")
    small_data.write_translations(folder / "opinions.jsonl")
    small_data.write_pairs(folder / "pairs")
    small_data.write_folders(folder / "kinds", 40, colour=False, size=(10, 10))
    small_data.write_parquet(folder / "kinds.parquet", "picture", 20)
    sound_files.write_spoken(folder, 20)
    for name, objective in CHECKPOINTS.items():
        for suffix in (".ckpt", ".ckpt.sha256"):
            shutil.copyfile(FIXTURES / "checkpoints" / f"{objective}{suffix}", folder / f"{name}{suffix}")
    write_bad_checkpoints(folder)
    write_bad_texts(folder)
    write_bad_media(folder)
    write_bad_configs(folder)


def write_bad_checkpoints(folder: Path) -> None:
    """Checkpoints that are damaged, hold NaN, or are no checkpoints at all."""
    whole = (folder / "vit.ckpt").read_bytes()
    (folder / "cut.ckpt").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.ckpt").touch()
    (folder / "words.ckpt").write_text("these are words")
    (folder / "flipped.ckpt").write_bytes(whole[:3000] + bytes([whole[3000] ^ 1]) + whole[3001:])
    shutil.copyfile(folder / "vit.ckpt.sha256", folder / "flipped.ckpt.sha256")
    torch.save([1, 2], folder / "list.ckpt")
    torch.save({"weight": torch.ones(2)}, folder / "other.ckpt")
    torch.save({"made": print}, folder / "code.ckpt")
    for name in ("vit", "bert", "clip", "gpt"):
        content = torch.load(folder / f"{name}.ckpt", weights_only=True)
        weights: dict[str, Any] = content["state_dict"]
        for key in weights:
            if key.startswith("network.") and key.endswith("weight"):
                weights[key] = torch.full_like(weights[key], torch.nan)
        torch.save(content, folder / f"nan_{name}.ckpt")
    lacking = torch.load(folder / "vit.ckpt", weights_only=True)
    del lacking["state_dict"]
    torch.save(lacking, folder / "no_weights.ckpt")


def write_bad_texts(folder: Path) -> None:
    """Texts and tables with faults."""
    texts = {
        "empty.txt": "",
        "blank.txt": "\n\n",
        "empty.csv": "",
        "header.csv": "text,label\n",
        "commas.csv": "text,label\ngood film,good\nbad film,bad,very\n",
        "doubled.csv": "text,label,text\ngood film,good,a\nbad film,bad,b\n",
        "few_cells.csv": "text,label\ngood film,good\nbad film\n",
        "quote.csv": 'text,label\n"good film,good\n',
        "one_class.csv": "text,label\n" + "good film,good\n" * 20,
        "rare.csv": "text,label\n" + "good film,good\nbad film,bad\n" * 10 + "odd film,odd\n",
        "empty_text.csv": "text,label\n,good\nbad film,bad\n",
        "broken.jsonl": '{"text": "a", "label": "b"}\n{"text": \n',
        "list.jsonl": "[1, 2]\n",
        "number.jsonl": '{"text": 3, "label": "b"}\n',
        "mixed.jsonl": '{"text": "a", "label": "b"}\n{"text": "a", "label": 3.5}\n' * 20,
        "nothing.jsonl": '{"text": null, "label": "b"}\n' * 20,
        "one_column.conll": "anna\nsaw\n",
        "empty.conll": "\n",
        "asked.txt": "who?",
        "no_data.json": '{"paragraphs": []}',
        "answer.json": json.dumps(
            {
                "data": [
                    {
                        "paragraphs": [
                            {
                                "context": "anna saw bo",
                                "qas": [
                                    {"id": "1", "question": "who?", "answers": [{"text": "dora", "answer_start": 0}]}
                                ],
                            }
                        ]
                    }
                ]
            }
        ),
        "short.txt": "one\ntwo\n",
        "long.txt": "one\ntwo\nthree\n",
        "bad.tmx": "<tmx><body><tu>",
        "one_side.jsonl": '{"source": "a"}\n',
        "empty_target.jsonl": '{"source": "a", "target": ""}\n',
        "no_image.jsonl": "".join(f'{{"image": "nowhere{n}.png", "caption": "a film"}}\n' for n in range(20)),
        "no_caption.jsonl": '{"image": "pairs/000.png"}\n',
        "number_caption.jsonl": '{"image": "pairs/000.png", "caption": 3}\n',
        "no_sound.jsonl": '{"audio": "nowhere.wav", "text": "ab"}\n',
        "words_sound.jsonl": '{"audio": "words.wav", "text": "ab"}\n',
        "backwards.jsonl": '{"audio": "tone.wav", "text": "ab", "start": 2, "end": 1}\n',
        "no_model.json": '{"version": "1.0"}',
        "broken.json": "{",
        "deep.txt": "a" * 10,
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "latin.txt").write_bytes("caf\xe9\n".encode("latin1") * 40)
    (folder / "zeros.txt").write_bytes(b"a\0b\n" * 20)
    (folder / "binary.csv").write_bytes(bytes(range(256)) * 4)
    (folder / "text.parquet").write_text("no table")
    (folder / "texts.txt.gz").write_bytes(b"no gzip")
    (folder / "lines.jsonl.gz").write_bytes(b"no gzip")
    os.mkfifo(folder / "pipe.txt")
    os.mkfifo(folder / "pipe.jsonl")
    (folder / "empty_folder").mkdir()
    with (folder / "huge.json").open("wb") as stream:
        stream.truncate(101_000_000)  # takes no space


def bomb() -> bytes:
    """A PNG file of a few bytes that claims to be 60,000 x 60,000 pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def write_bad_media(folder: Path) -> None:
    """Folders of pictures and sounds with faults."""
    good = small_data.encoded(small_data.picture(0), "PNG")
    pictures = {"cut": good[: len(good) // 2], "word": b"no picture", "bomb": bomb(), "none": b""}
    for name, content in pictures.items():
        for kind in small_data.KINDS:
            (folder / f"{name}_pictures" / kind).mkdir(parents=True)
            for number in range(10):
                (folder / f"{name}_pictures" / kind / f"{number}.png").write_bytes(content if number == 5 else good)
    (folder / "flat").mkdir()
    (folder / "flat" / "a.png").write_bytes(good)
    shutil.copytree(folder / "kinds", folder / "hollow")
    (folder / "hollow" / "none").mkdir()
    (folder / "single" / "dark").mkdir(parents=True)
    for number in range(8):
        (folder / "single" / "dark" / f"{number}.png").write_bytes(good)
    sound_files.write_sound(folder / "tone.wav", sound_files.letter_tones("ab"))
    (folder / "words.wav").write_text("no sound")
    (folder / "silent").mkdir()
    (folder / "silent" / "empty.wav").touch()
    for kind in "ab":
        (folder / "sounds" / kind).mkdir(parents=True)
        for number in range(8):
            shutil.copyfile(folder / "tone.wav", folder / "sounds" / kind / f"{number}.wav")
    shutil.copytree(folder / "sounds", folder / "bad_sounds")
    (folder / "bad_sounds" / "a" / "3.wav").write_text("no sound")


def write_bad_configs(folder: Path) -> None:
    """Configs with faults."""
    texts = {
        "list.yaml": "- a\n",
        "open.yaml": "model: [1,\n",
        "words.yaml": "just words\n",
        "empty.yaml": "",
        "tab.yaml": "model:\n\tinit_args: 3\n",
        "twice.yaml": "trainer:\n  max_epochs: 3\n  max_epochs: 4\n",
        "section.yaml": "trainr:\n  max_epochs: 3\n",
        "rate.yaml": "model:\n  init_args:\n    optimizer: {lr: -1}\n",
        "class.yaml": "model:\n  class_path: os.system\n",
        "stop.yaml": "trainer:\n  callbacks+:\n    - class_path: lightning.pytorch.callbacks.EarlyStopping\n"
        "      init_args: {monitor: val/nothing}\n",
        "best.yaml": "trainer:\n  callbacks+:\n    - class_path: lightning.pytorch.callbacks.ModelCheckpoint\n"
        "      init_args: {monitor: val/nothing}\n",
        "callback.yaml": "trainer:\n  callbacks+:\n    - class_path: trunkline.modules.callbacks.Nothing\n",
        "argument.yaml": "trainer:\n  callbacks+:\n    - class_path: trunkline.modules.callbacks.LastCheckpoint\n"
        "      init_args: {often: 3}\n",
        "parallel.yaml": "trainer:\n  strategy:\n    class_path: DDPStrategy\n"
        "    init_args:\n      tensor_parallel_size: 2\n",
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "binary.yaml").write_bytes(b"\xff\xfe\0")
