"""The digest of data sees what is inside its files, in any kind of source."""

import json
import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image
from small_data import (
    encoded,
    picture,
    save_tokenizers,
    sentences,
    write_folders,
    write_labelled,
    write_pairs,
    write_questions,
    write_rows,
    write_shards,
    write_tagged,
    write_text,
    write_translations,
)
from small_speech import listed, log_mel
from sound_files import letter_tones, write_sound

from trunkline.datamodules import (
    AudioData,
    ImageData,
    ImageTextData,
    LabelledTextData,
    MaskedTextData,
    SpanCorruptionData,
    SpeechData,
    SquadData,
    TaggedTextData,
    TextData,
    TranslationData,
)
from trunkline.datamodules.audio.spoken_digits import SpokenDigits
from trunkline.datamodules.base import TrunklineDataModule
from trunkline.datamodules.content_digest import different_parts, sampled_digest
from trunkline.datamodules.images import image_sources
from trunkline.datamodules.pairs import emoji_pictures

ROWS = 9
"""Files or rows of most sources here; all of them are looked at."""
FIRST, MIDDLE, LAST = 0, ROWS // 2, ROWS - 1
WHOLE: dict[str, Any] = {"val_fraction": 0, "test_fraction": 0}
"""All rows are of training."""
LOADING: dict[str, Any] = {"num_workers": 0, "batch_size": 2}


def flip(file: Path, place: int = -1) -> None:
    """Change one byte of a file, and neither its name nor its size."""
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


def flipped(contents: list[bytes], number: int | None) -> list[bytes]:
    """The contents, one of them with another last byte."""
    return [content[:-1] + bytes([content[-1] ^ (n == number)]) for n, content in enumerate(contents)]


def relettered(file: Path, number: int | None) -> Path:
    """Change a letter in a line of `small_data`'s sentences: in that with this number among `ROWS`, evenly spaced."""
    if number is not None:
        texts = file.read_text().splitlines(keepends=True)
        place = number * (len(texts) - 1) // (ROWS - 1)
        texts[place], count = re.subn("(.*)[fs](ilm|aw)", r"\1z\2", texts[place], count=1)
        assert count == 1
        file.write_text("".join(texts))
    return file


def hub(monkeypatch: pytest.MonkeyPatch, table: Any) -> None:
    """What the hub answers."""
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: table)


def sounds(folder: Path) -> list[Path]:
    return [write_sound(folder / f"{n}.wav", letter_tones("abcd"[n % 4] + "bd")) for n in range(ROWS)]


# --- a source of each kind: written into a folder, with one byte changed in row `number`


def pictures(folder: Path, number: int | None, patch: Any) -> TrunklineDataModule:
    files = sorted(Path(write_folders(folder / "in", ROWS)).rglob("*.png"))
    if number is not None:
        flip(files[number])
    return ImageData(str(folder / "in"), image_size=8, channels=1, **WHOLE, **LOADING)


def picture_table(folder: Path, number: int | None, patch: Any) -> TrunklineDataModule:
    contents = flipped([encoded(picture(n)) for n in range(ROWS)], number)
    images = [{"bytes": content, "path": f"{folder}/{n}.png"} for n, content in enumerate(contents)]
    table = datasets.Dataset.from_dict({"image": images, "label": [n % 2 for n in range(ROWS)]})
    hub(patch, {"train": table.cast_column("image", datasets.Image(decode=False))})
    return ImageData("owner/pictures", image_size=8, channels=1, **WHOLE, **LOADING)


def picture_paths(folder: Path, number: int | None, patch: Any) -> TrunklineDataModule:
    files = sorted(Path(write_folders(folder / "in", ROWS)).rglob("*.png"))
    if number is not None:
        flip(files[number])
    images = [{"bytes": None, "path": str(file)} for file in files]
    table = datasets.Dataset.from_dict({"image": images, "label": [n % 2 for n in range(ROWS)]})
    hub(patch, {"train": table.cast_column("image", datasets.Image(decode=False))})
    return ImageData("owner/pictures", image_size=8, channels=1, **WHOLE, **LOADING)


def parquet(folder: Path, number: int | None, patch: Any) -> TrunklineDataModule:
    contents = flipped([encoded(picture(n)) for n in range(ROWS)], number)
    images = [{"bytes": content, "path": None} for content in contents]
    table = datasets.Dataset.from_dict({"image": images, "label": [n % 2 for n in range(ROWS)]})
    table.to_parquet(folder / "in.parquet")
    options = {"image_size": 8, "channels": 1, "cache_dir": str(folder / "cache")}
    return ImageData(str(folder / "in.parquet"), **options, **WHOLE, **LOADING)


def digits(folder: Path, number: int | None, patch: Any) -> TrunklineDataModule:
    """In memory; of the 1,797 rows 64 are looked at, among them 912."""
    table = image_sources.load_digits_table()
    if number is not None:
        table.splits["train"].images[{FIRST: 0, MIDDLE: 912, LAST: 1796}[number], 3, 3] ^= 1  # type: ignore[attr-defined]
    patch.setattr(image_sources, "load_digits_table", lambda: table)
    return ImageData("digits", image_size=8, channels=1, **WHOLE, **LOADING)


def pair_options(folder: Path) -> dict[str, Any]:
    return {"tokenizer": "chars", "image_size": 8, "cache_dir": str(folder / "cache"), **WHOLE, **LOADING}


def pair_list(folder: Path, number: int | None, patch: Any) -> TrunklineDataModule:
    write_pairs(folder / "in", ROWS)
    if number is not None:
        flip(folder / "in" / f"{number:03d}.png")
    return ImageTextData(str(folder / "in"), **pair_options(folder))


def caption_list(folder: Path, number: int | None, patch: Any) -> TrunklineDataModule:
    relettered(Path(write_pairs(folder / "in", ROWS)), number)
    return ImageTextData(str(folder / "in" / "pairs.jsonl"), **pair_options(folder))


def pair_table(folder: Path, number: int | None, patch: Any) -> TrunklineDataModule:
    images = [{"bytes": c, "path": None} for c in flipped([encoded(picture(n)) for n in range(ROWS)], number)]
    table = datasets.Dataset.from_dict({"image": images, "caption": ["a film"] * ROWS})
    hub(patch, {"train": table.cast_column("image", datasets.Image(decode=False))})
    return ImageTextData("owner/pairs", **pair_options(folder))


def caption_table(folder: Path, number: int | None, patch: Any) -> TrunklineDataModule:
    images = [{"bytes": encoded(picture(n)), "path": None} for n in range(ROWS)]
    captions = [f"a {'d' if n == number else 'b'}" for n in range(ROWS)]
    table = datasets.Dataset.from_dict({"image": images, "caption": captions})
    hub(patch, {"train": table.cast_column("image", datasets.Image(decode=False))})
    options = pair_options(folder) | {"tokenizer": str(folder.parent / "bytes.json")}
    return ImageTextData("owner/pairs", **options)


def shards(folder: Path, number: int | None, patch: Any, suffix: str = ".jpg") -> TrunklineDataModule:
    pattern = write_shards(folder / "in", shards=3, count=3)
    if number is not None:
        file = folder / "in" / f"{number // 3:02d}.tar"
        with tarfile.open(file) as archive:
            member = archive.getmember(f"{number:04d}{suffix}")
        flip(file, member.offset_data + member.size - 1)
    options = pair_options(folder) | {"tokenizer": str(folder.parent / "bytes.json")}
    return ImageTextData(pattern, **options)


def shard_captions(folder: Path, number: int | None, patch: Any) -> TrunklineDataModule:
    return shards(folder, number, patch, ".txt")


def emoji(folder: Path, number: int | None, patch: Any) -> TrunklineDataModule:
    images = [picture(n, size=(72, 72)) for n in range(ROWS)]
    if number is not None:
        pixels = np.array(images[number])
        pixels[5, 5, 1] ^= 1
        images[number] = Image.fromarray(pixels)
    concepts = [emoji_pictures.Concept(str(n), [f"number {n}"], image, False) for n, image in enumerate(images)]
    patch.setattr(emoji_pictures, "concepts", lambda: concepts)
    return ImageTextData("twemoji", **pair_options(folder))


def sound_options(folder: Path) -> dict[str, Any]:
    return {"log_mel": log_mel(), "cache_dir": str(folder / "cache"), **WHOLE, **LOADING}


def sound_classes(folder: Path, number: int | None, patch: Any) -> TrunklineDataModule:
    files = sounds(folder / "in" / "one")
    for n in range(0, ROWS, 2):
        (folder / "in" / "two").mkdir(exist_ok=True)
        files[n] = files[n].rename(folder / "in" / "two" / f"{n}.wav")
    if number is not None:
        flip(files[number])
    return AudioData(str(folder / "in"), **sound_options(folder))


def sound_list(folder: Path, number: int | None, patch: Any, **options: Any) -> TrunklineDataModule:
    folder.joinpath("in").mkdir()
    source = listed(folder / "in", [(f"{'abcd'[n % 4]}bd", letter_tones(f"{'abcd'[n % 4]}bd")) for n in range(ROWS)])
    if number is not None:
        flip(folder / "in" / f"{number}.wav")
    return SpeechData(source, **sound_options(folder), **options)


def decoded_sounds(folder: Path, number: int | None, patch: Any) -> TrunklineDataModule:
    return sound_list(folder, number, patch, cache_waveforms=True)


def sound_table(folder: Path, number: int | None, patch: Any) -> TrunklineDataModule:
    contents = flipped([file.read_bytes() for file in sounds(folder / "in")], number)
    audio = [{"bytes": content, "path": None} for content in contents]
    table = datasets.Dataset.from_dict({"audio": audio, "text": [f"{'abcd'[n % 4]}bd" for n in range(ROWS)]})
    hub(patch, table.cast_column("audio", datasets.Audio(decode=False)))
    return SpeechData("owner/speech", **sound_options(folder))


def kaldi(folder: Path, number: int | None, patch: Any) -> TrunklineDataModule:
    files = sounds(folder / "in")
    (folder / "in" / "wav.scp").write_text("".join(f"r{n} {n}.wav\n" for n in range(ROWS)))
    (folder / "in" / "text").write_text("".join(f"r{n} {'abcd'[n % 4]}bd\n" for n in range(ROWS)))
    if number is not None:
        flip(files[number])
    return SpeechData(str(folder / "in"), **sound_options(folder))


def librispeech(folder: Path, number: int | None, patch: Any) -> TrunklineDataModule:
    files = [write_sound(folder / "in" / f"1-2-{n}.flac", letter_tones(f"{'abcd'[n % 4]}bd")) for n in range(ROWS)]
    (folder / "in" / "1-2.trans.txt").write_text("".join(f"1-2-{n} {'abcd'[n % 4]}bd\n" for n in range(ROWS)))
    if number is not None:
        flip(files[number])
    return SpeechData(str(folder / "in"), **sound_options(folder))


def text(folder: Path, number: int | None, patch: Any) -> TrunklineDataModule:
    write_text(folder / "in.txt")
    relettered(folder / "in.txt", number)
    return TextData(str(folder / "in.txt"), tokenizer=str(folder.parent / "gpt.json"), max_length=16, **LOADING)


def text_hub(folder: Path, number: int | None, patch: Any) -> TrunklineDataModule:
    """Its texts are streamed into the cache, and seen there."""
    file = relettered(Path(write_rows(folder / "in.jsonl", [{"text": text} for text in sentences(60)])), number)
    hub(patch, [json.loads(line) for line in file.read_text().splitlines()])
    options = {"tokenizer": str(folder.parent / "gpt.json"), "max_length": 16, "val_fraction": 0.2}
    return TextData("owner/texts", **options, **LOADING)


def documents(folder: Path, number: int | None, patch: Any) -> TrunklineDataModule:
    texts = write_rows(folder / "in.jsonl", [{"text": text} for text in sentences(60)])
    relettered(Path(texts), number)
    options = {"tokenizer": str(folder.parent / "bytes.json"), "max_length": 32, "val_fraction": 0.2}
    return MaskedTextData(texts, **options, **LOADING)


def spans(folder: Path, number: int | None, patch: Any) -> TrunklineDataModule:
    (folder / "in").mkdir()
    for n, sentence in enumerate(sentences(ROWS)):
        (folder / "in" / f"{n}.txt").write_text(20 * f"{sentence}\n")
    if number is not None:
        relettered(folder / "in" / f"{number}.txt", 0)
    options = {"tokenizer": str(folder.parent / "spans.json"), "max_length": 32, "val_fraction": 0.2}
    return SpanCorruptionData(str(folder / "in"), **options, **LOADING)


def task_options(folder: Path) -> dict[str, Any]:
    return {"tokenizer": str(folder.parent / "words.json"), "max_length": 32, **LOADING}


def labelled(folder: Path, number: int | None, patch: Any) -> TrunklineDataModule:
    file = relettered(Path(write_labelled(folder / "in.jsonl")), number)
    return LabelledTextData(str(file), **task_options(folder))


def labelled_hub(folder: Path, number: int | None, patch: Any) -> TrunklineDataModule:
    file = relettered(Path(write_labelled(folder / "in.jsonl")), number)
    hub(patch, [json.loads(line) for line in file.read_text().splitlines()])
    return LabelledTextData("owner/texts", **task_options(folder))


def tagged(folder: Path, number: int | None, patch: Any) -> TrunklineDataModule:
    file = Path(write_tagged(folder / "in.conll"))
    sentences = file.read_text().split("\n\n")
    if number is not None:
        place = number * (len(sentences) - 1) // (ROWS - 1)
        sentences[place] = sentences[place].replace("saw", "sew", 1)
        file.write_text("\n\n".join(sentences))
    return TaggedTextData(str(file), **task_options(folder))


def squad(folder: Path, number: int | None, patch: Any) -> TrunklineDataModule:
    file = Path(write_questions(folder / "in.json"))
    content = json.loads(file.read_text())
    if number is not None:
        texts = content["data"][0]["paragraphs"]
        chosen = texts[number * (len(texts) - 1) // (ROWS - 1)]
        chosen["context"] = chosen["context"].replace("was bad", "was bed")
        file.write_text(json.dumps(content))
    return SquadData(str(file), **task_options(folder), doc_stride=8, max_question_length=8)


def translation(folder: Path, number: int | None, patch: Any) -> TrunklineDataModule:
    file = relettered(Path(write_translations(folder / "in.jsonl")), number)
    return TranslationData(str(file), tokenizer=str(folder.parent / "gpt.json"), max_length=32, **LOADING)


def parallel(folder: Path, number: int | None, patch: Any) -> TrunklineDataModule:
    for language in ("en", "de"):
        write_text(folder / f"in.{language}", 60)
    relettered(folder / "in.de", number)
    options = {"tokenizer": str(folder.parent / "gpt.json"), "max_length": 32, **LOADING}
    return TranslationData(str(folder / "in.en"), target_source=str(folder / "in.de"), **options)


KINDS: list[Callable[[Path, int | None, Any], TrunklineDataModule]] = [
    *(pictures, picture_table, picture_paths, parquet, digits),
    *(pair_list, caption_list, pair_table, caption_table, shards, shard_captions, emoji),
    *(sound_classes, sound_list, decoded_sounds, sound_table, kaldi, librispeech),
    *(text, text_hub, documents, spans, labelled, labelled_hub, tagged, squad, translation, parallel),
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_one_byte_changes_the_digest_and_another_folder_does_not(
    kind: Callable[[Path, int | None, Any], TrunklineDataModule], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tokenizers(tmp_path)

    def found(place: str, number: int | None = None) -> str | None:
        folder = tmp_path / place
        folder.mkdir()
        monkeypatch.setenv("TRUNKLINE_CACHE", str(folder / "cache"))
        data = kind(folder, number, monkeypatch)
        data.setup("fit")
        alone = data.digest()
        ranks = {"global_rank": 1, "local_rank": 1, "world_size": 2, "num_devices": 2}
        data.trainer = SimpleNamespace(**ranks)  # type: ignore[assignment]
        del data.__dict__["_key"]  # it is found again
        assert data.digest() == alone
        return alone

    plain = found("here")
    assert plain is not None
    assert found("there") == plain
    changed = {found(name, number) for name, number in (("first", FIRST), ("middle", MIDDLE), ("last", LAST))}
    assert len({plain, *changed}) == 4


def test_the_clips_of_the_spoken_digits() -> None:
    """They are made on each machine, and kept in its cache."""
    clips = SpokenDigits.__new__(SpokenDigits)  # no voice is needed for this
    clips.samples, clips.borders = np.arange(90, dtype=np.int16), np.arange(0, 100, 10)
    found = []
    for place in (None, 0, 45, 89):
        if place is not None:
            clips.samples[place] ^= 1
        found.append(sampled_digest(9, clips.stored))
    assert len({*found}) == 4


def test_prepared_tokens_that_are_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training reads them from the cache, which each host may have for itself."""
    save_tokenizers(tmp_path)
    monkeypatch.setenv("TRUNKLINE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "a").mkdir()

    def parts() -> dict[str, Any]:
        data = text(tmp_path / "a", None, monkeypatch)
        data.setup("fit")
        return data.digest_parts()

    before = parts()
    (tokens,) = (tmp_path / "cache").rglob("val-*.bin")
    flip(tokens, 100)
    assert different_parts(before, parts()) == ["val"]


def test_the_split_that_differs_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def parts(place: str, changed: str | None, **options: Any) -> dict[str, Any]:
        for seed, split in enumerate(("train", "val")):
            write_folders(tmp_path / place / split, 4 + seed)
        if changed is not None:
            flip(next((tmp_path / place / changed).rglob("*.png")))
        data = ImageData(str(tmp_path / place), image_size=8, channels=1, test_fraction=0, **LOADING, **options)
        data.setup("fit")
        return data.digest_parts()

    plain = parts("plain", None)
    assert different_parts(plain, parts("a", "train")) == ["train"]
    assert different_parts(plain, parts("b", "val")) == ["val"]
    assert different_parts(plain, parts("c", None, seed=3)) == ["data.seed"]
    assert different_parts(plain, parts("d", None)) == []
    assert different_parts({"settings": {"old": 1}, "a": "1"}, {"settings": {"new": 1}, "a": "1"}) == []
