"""Small deterministic data of every kind: pictures, texts, tables, shards and tokenizers.

It does not import the code under test, so that changes of that code cannot change the data.
"""

import io
import json
import random
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

MASKING = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
CLIP_ENDS = ["<|startoftext|>", "<|endoftext|>"]
NAMES = ["anna", "bo", "carl", "dora"]
KINDS = ["dark", "light"]
WORDS = [*NAMES, *KINDS, "the", "a", "film", "was", "good", "bad", "very", "saw", "in", "ber", "##lin", "who", "?", "."]
SHADES = {"dark": 50, "light": 200}


def word_tokenizer(words: list[str] = WORDS) -> Tokenizer:
    """A lower-case WordPiece tokenizer of these words, with the special tokens of BERT."""
    made = Tokenizer(models.WordPiece({word: n for n, word in enumerate(MASKING + words)}, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    made.add_special_tokens(MASKING)
    return made


def byte_tokenizer(special: list[str]) -> Tokenizer:
    """A byte-level tokenizer with a few merges; the special tokens have the first ids."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("a", "n"), ("Ġ", "a")]
    vocabulary = {token: n for n, token in enumerate([*special, *alphabet, *(a + b for a, b in merges)])}
    made = Tokenizer(models.BPE(vocabulary, merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(special)
    return made


def save_tokenizers(folder: Path) -> None:
    """Write `words.json`, `bytes.json` (masked), `spans.json` (with sentinels), `gpt.json` and `clip.json`."""
    word_tokenizer().save(str(folder / "words.json"))
    byte_tokenizer(MASKING).save(str(folder / "bytes.json"))
    byte_tokenizer(["<pad>", "<|endoftext|>", *(f"<extra_id_{n}>" for n in range(8))]).save(str(folder / "spans.json"))
    byte_tokenizer(["<|endoftext|>"]).save(str(folder / "gpt.json"))
    byte_tokenizer(CLIP_ENDS).save(str(folder / "clip.json"))


def sentence(chance: random.Random) -> str:
    """A random sentence of `WORDS`."""
    name, other = chance.sample(NAMES, 2)
    very, kind = chance.choice(["", "very "]), chance.choice(["good", "bad"])
    forms = [
        f"{name} saw the {very}{kind} film .",
        f"the film was {very}{kind} .",
        f"{name} saw {other} in berlin .",
        f"who saw {name} ? {other} saw {name} .",
    ]
    return chance.choice(forms)


def sentences(count: int, seed: int = 0) -> list[str]:
    """Several random sentences."""
    chance = random.Random(seed)
    return [sentence(chance) for _ in range(count)]


def write_text(file: Path, count: int = 400) -> str:
    """Write one sentence per line; returns the path."""
    file.write_text("".join(f"{text}\n" for text in sentences(count)))
    return str(file)


def write_documents(file: Path, count: int = 240) -> str:
    """Write a table of documents of one to four sentences; returns its path."""
    chance = random.Random(1)
    texts = [" ".join(sentences(chance.randint(1, 4), seed)) for seed in range(count)]
    return write_rows(file, [{"text": text} for text in texts])


def write_rows(file: Path, rows: list[dict[str, object]]) -> str:
    """Write rows as JSON lines; returns the path."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def write_labelled(file: Path, count: int = 80) -> str:
    """Write texts with the label good or bad; returns the path."""
    chance, rows = random.Random(2), []
    for _ in range(count):
        kind, name = chance.choice(["good", "bad"]), chance.choice(NAMES)
        rows.append(
            {"text": f"{name} saw the film . the film was {chance.choice(['', 'very '])}{kind} .", "label": kind}
        )
    return write_rows(file, rows)


def write_translations(file: Path, count: int = 160) -> str:
    """Write opinions of a film, and a sentence that says each of them; returns the path."""
    chance, rows = random.Random(5), []
    for _ in range(count):
        opinion = chance.choice(["", "very "]) + chance.choice(["good", "bad"])
        rows.append({"source": f"{opinion} film", "target": f"the film was {opinion} ."})
    return write_rows(file, rows)


def write_tagged(file: Path, count: int = 80) -> str:
    """Write tagged sentences with persons and a place; returns the path."""
    chance, blocks = random.Random(3), []
    for _ in range(count):
        first, second = chance.sample(NAMES, 2)
        words = [(first.title(), "B-PER"), ("saw", "O"), *[("the", "O"), ("film", "O")] * chance.randint(0, 1)]
        words += [("in", "O"), ("Berlin", "B-LOC"), (second.title(), "B-PER"), (".", "O")]
        blocks.append("".join(f"{word} {tag}\n" for word, tag in words))
    file.write_text("\n".join(blocks))
    return str(file)


def write_questions(file: Path, count: int = 40) -> str:
    """Write questions as SQuAD's JSON: who saw the film? The texts are longer than a window. Returns the path."""
    chance, paragraphs = random.Random(4), []
    for number in range(count):
        name, other = chance.sample(NAMES, 2)
        filler = " ".join(["the film was very good ."] * chance.randint(1, 3))
        context = f"{filler} {name} saw the film in Berlin . {other} was bad . {filler}"
        answer = {"text": name, "answer_start": context.index(name)}
        question = {"id": str(number), "question": "who saw the film ?", "answers": [answer]}
        paragraphs.append({"context": context, "qas": [question]})
    file.write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
    return str(file)


def picture(number: int, kind: str = "dark", size: tuple[int, int] = (40, 36), colour: bool = True) -> Image.Image:
    """A noisy dark or light picture, with a stripe of random position and shade."""
    chance = np.random.default_rng(number)
    shape = (size[1], size[0], 3) if colour else (size[1], size[0])
    pixels = SHADES[kind] + chance.integers(-40, 41, shape)
    place = int(chance.integers(size[1] - 2))
    pixels[place : place + 2] = chance.integers(0, 256)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def write_folders(folder: Path, count: int, colour: bool = True, size: tuple[int, int] = (40, 36)) -> str:
    """Write PNG files, one folder per kind; returns the path of the parent folder."""
    for number in range(count):
        kind = KINDS[number % 2]
        (folder / kind).mkdir(parents=True, exist_ok=True)
        picture(number, kind, size, colour).save(folder / kind / f"{number:03d}.png")
    return str(folder)


def encoded(image: Image.Image, form: str = "png", **options: Any) -> bytes:
    """The bytes of an image file in a format; `options` are those of Pillow."""
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def write_parquet(file: Path, image_column: str, count: int) -> str:
    """Write pictures and class numbers to a Parquet file, in the layout of hub tables; returns the path."""
    import pyarrow
    from pyarrow import parquet

    images = [{"bytes": encoded(picture(n, KINDS[n % 2], (32, 32)), "PNG"), "path": None} for n in range(count)]
    parquet.write_table(pyarrow.table({image_column: images, "label": [n % 2 for n in range(count)]}), file)
    return str(file)


def caption(number: int) -> str:
    """The caption of the picture with this number."""
    return f"a {KINDS[number % 2]} film of {NAMES[number // 2 % 4]}"


def write_shards(folder: Path, shards: int = 3, count: int = 32) -> str:
    """Write tar files of JPEG pictures and captions; returns a pattern of their paths."""
    folder.mkdir()
    for shard in range(shards):
        with tarfile.open(folder / f"{shard:02d}.tar", "w") as tar:
            for number in range(shard * count, (shard + 1) * count):
                image = encoded(picture(number, KINDS[number % 2]), "JPEG")
                for name, content in ((f"{number:04d}.jpg", image), (f"{number:04d}.txt", caption(number).encode())):
                    entry = tarfile.TarInfo(name)
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))
    return str(folder / f"{{00..{shards - 1:02d}}}.tar")


def write_pairs(folder: Path, count: int = 48) -> str:
    """Write small grey pictures and a table of their captions; returns the path of the table."""
    folder.mkdir()
    rows = []
    for number in range(count):
        picture(number, KINDS[number % 2], (10, 10), colour=False).save(folder / f"{number:03d}.png")
        rows.append({"image": f"{number:03d}.png", "caption": caption(number)})
    return write_rows(folder / "pairs.jsonl", rows)
