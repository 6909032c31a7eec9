"""The datamodule of text: its batches, its sizes, its checkpoint, and what it refuses."""

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from trunkline import TrunklineError
from trunkline.datamodules import TextData
from trunkline.datamodules.text.preparation import Preparation
from trunkline.datamodules.tokenizers import end_of_text_id, train_bpe

LINES = "".join(f"{n} bottles of beer on the wall, {n} bottles of beer.\n" for n in range(400))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "in.txt"
    path.write_text(LINES)
    os.utime(path, ns=(0, 10**9))
    return path


def make(path: Path | str, **options: Any) -> TextData:
    given = {"tokenizer": "chars", "max_length": 16, "batch_size": 6, "cache_dir": str(Path(path).parent / "cache")}
    return TextData(str(path), **{**given, **options})


def ready(path: Path | str, **options: Any) -> TextData:
    data = make(path, **options)
    data.prepare_data()
    data.setup("fit")
    return data


def test_a_character_file_is_nanogpt_s(text: Path) -> None:
    data = ready(text)
    characters = ["<|endoftext|>", "<|unk|>", *sorted(set(LINES[: int(len(LINES) * 0.9)]))]
    number = {c: n for n, c in enumerate(characters)}
    for split, part in (("train", LINES[: int(len(LINES) * 0.9)]), ("val", LINES[int(len(LINES) * 0.9) :])):
        stream = data.preparation.stream(split)
        assert stream.read(0, len(stream)).tolist() == [*(number[c] for c in part), 0]
        assert data.bytes_per_token[split] == len(part) / (len(part) + 1)
    assert data.facts.vocab_size == len(characters)
    assert "test" not in data.datasets
    assert data.test_dataloader() == []


def test_batches_have_their_documented_keys_and_types(text: Path) -> None:
    data = ready(text, packing="documents", test_fraction=0.1)
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        batch: dict[str, Tensor] = next(iter(loader))
        assert set(batch) == {"tokens", "targets", "document", "index", "valid"}
        assert {name: tuple(batch[name].shape) for name in ("tokens", "targets", "document")} == dict.fromkeys(
            ("tokens", "targets", "document"), (6, 16)
        )
        assert {batch[name].dtype for name in ("tokens", "targets", "document", "index")} == {torch.int64}
        assert batch["valid"].dtype == torch.bool
    assert "document" not in next(iter(ready(text).train_dataloader()))


def test_training_order_and_offsets_are_pure_functions_of_seed_and_epoch(text: Path) -> None:
    def epoch(number: int, **options: Any) -> list[list[int]]:
        loader = ready(text, **options).train_dataloader()
        loader.batch_sampler.set_epoch(number)  # type: ignore[union-attr]
        return [row for batch in loader for row in batch["tokens"].tolist()]

    assert epoch(1) == epoch(1, num_workers=2) != epoch(2)
    assert epoch(1) != epoch(1, seed=1)
    data = ready(text)
    stream = data.preparation.stream("train")
    offset = int(np.random.default_rng((0, 1)).integers(16))
    order = np.random.default_rng((0, 1)).permutation((len(stream) - 1) // 16)
    start = min(offset + 16 * int(order[0]), len(stream) - 17)
    assert epoch(1)[0] == stream.read(start, start + 16).tolist()


def test_sizes_of_the_vocabulary(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert make(text, tokenizer="bpe", vocab_size=300).facts.vocab_size == 300
    data = make(text, tokenizer="bpe")
    assert 257 < data.facts.vocab_size < 8192  # so little text has no more to merge
    assert not list((text.parent / "cache").rglob("*.bin"))  # the tokenizer alone
    monkeypatch.setattr(Preparation, "_keep_tokenizer", None)
    assert make(text, tokenizer="bpe").facts.vocab_size == data.facts.vocab_size  # trained once


def test_a_tokenizer_file_is_used_and_padded(text: Path, tmp_path: Path) -> None:
    tokenizer = train_bpe([LINES], 280)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    data = ready(text, tokenizer=str(tmp_path / "tokenizer.json"), vocab_size=512)
    assert data.facts.vocab_size == 512
    stream = data.preparation.stream("train")
    assert stream.read(0, len(stream)).tolist() == [*tokenizer.encode(LINES[: int(len(LINES) * 0.9)]).ids, 0]
    assert (data.preparation.folder / "tokenizer.json").read_text() == tokenizer.to_str()
    with pytest.raises(TrunklineError, match=r"vocab_size=200 is smaller than the 280 tokens .* at least 280"):
        make(text, tokenizer=str(tmp_path / "tokenizer.json"), vocab_size=200).prepare_data()


def test_splits_of_their_own(text: Path, tmp_path: Path) -> None:
    (tmp_path / "val.txt").write_text("99 bottles of beer, €")
    data = ready(text, val_source=str(tmp_path / "val.txt"), test_fraction=0.5)
    stream = data.preparation.stream("val")
    assert len(data.preparation.stream("train")) == len(LINES) // 2 + 1
    decoded = data.vocabulary.decode(stream.read(0, len(stream)).tolist(), skip_special_tokens=False)
    assert decoded == "99 bottles of beer, <|unk|><|endoftext|>"  # the training text has no €
    assert data.bytes_per_token["val"] == 23 / 22


def test_setup_alone_prepares_and_a_second_one_reads(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = make(text)
    first.setup("fit")
    monkeypatch.setattr(Preparation, "_tokenise", None)
    second = ready(text)
    assert second.datasets["train"][_key(0)]["tokens"].tolist() == first.datasets["train"][_key(0)]["tokens"].tolist()


def _key(index: int) -> Any:
    from trunkline.datamodules.samplers import SampleKey

    return SampleKey(0, index)


def test_a_checkpoint_knows_its_tokenizer(text: Path) -> None:
    data = ready(text)
    state = data.state_dict()
    sizes = {split: len(rows) for split, rows in data.datasets.items()}  # type: ignore[arg-type]
    assert state == {"tokenizer": data.vocabulary.to_str(), "source": str(text), "rows": sizes}
    assert sizes["train"] > sizes["val"] > 0
    ready(text, packing="documents").load_state_dict(state)
    with pytest.raises(TrunklineError, match=r"another tokenizer than tokenizer=bpe on source=.*in\.txt"):
        ready(text, tokenizer="bpe", vocab_size=300).load_state_dict(state)


def test_documents_end_with_the_end_of_text(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text("".join(f'{{"body": "row {n} of these"}}\n' for n in range(30)))
    data = ready(tmp_path / "in.jsonl", text_column="body", tokenizer="wordpiece", vocab_size=80, packing="documents")
    stream = data.preparation.stream("train")
    end = end_of_text_id(data.vocabulary)
    assert stream.read(0, len(stream)).tolist().count(end) == len(stream.document_ends()) == 27
    assert data.preparation.prepare()["splits"]["val"]["documents"] == 3


def test_only_the_first_documents_are_read(tmp_path: Path) -> None:
    lines = [f'{{"text": "row {n} of these"}}\n' for n in range(50)]
    (tmp_path / "in.jsonl").write_text("".join(lines[:30]) + "broken")
    (tmp_path / "val.jsonl").write_text("".join(lines[30:]))
    val, cache = str(tmp_path / "val.jsonl"), str(tmp_path / "cache")
    data = ready(tmp_path / "in.jsonl", max_documents=30, val_source=val, cache_dir=cache)
    splits = data.preparation.prepare()["splits"]
    assert {name: split["documents"] for name, split in splits.items()} == {"train": 30, "val": 20}
    fewer = ready(tmp_path / "in.jsonl", max_documents=20, val_source=val, cache_dir=cache)
    assert fewer.preparation.prepare()["splits"]["train"]["documents"] == 20
    assert pickle.loads(pickle.dumps(data)).preparation.folder == data.preparation.folder
    with pytest.raises(TrunklineError, match=r"in\.jsonl"):
        ready(tmp_path / "in.jsonl", max_documents=31, val_source=val, cache_dir=cache)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_documents": 0}, "max_documents must be at least 1, not 0"),
        ({"max_documents": 9}, r"max_documents=9 counts rows of a table .*in\.txt has none; leave it out"),
        ({"max_length": 0}, "max_length must be at least 1"),
        ({"val_fraction": 1.0}, "val_fraction=1.0 leaves nothing"),
        ({"val_fraction": 0.5, "test_fraction": 0.5}, "leaves nothing for training"),
        ({"test_fraction": -0.1}, "test_fraction=-0.1"),
        (
            {"tokenizer": "bpe", "vocab_size": 100},
            "vocab_size=100 is too small for bpe; set it to at least 257",
        ),
        ({"max_length": 100_000}, "the train split of .* fewer than one row needs .* lower max_length"),
        ({"vocab_size": 5}, "vocab_size=5 is smaller than the"),
        ({"path": "nothing.txt"}, "source=nothing.txt: there is no such file"),
        ({"val_source": "nothing.txt"}, "val_source=nothing.txt: there is no such file"),
        ({"tokenizer": "no.json"}, "tokenizer=no.json: there is no file no.json"),
    ],
)
def test_bad_input_is_refused(options: dict[str, Any], message: str, text: Path) -> None:
    with pytest.raises(TrunklineError, match=message):
        ready(options.pop("path", text), **options)


@pytest.mark.parametrize("packing", ["block", "documents"])
def test_the_books_fit_rows(packing: Any, tmp_path: Path) -> None:
    data = ready("pydoc", packing=packing, max_length=64, cache_dir=str(tmp_path))
    counted = sum(int((batch["targets"] != -100).sum()) for batch in data.val_dataloader())
    entry = data.preparation.prepare()["splits"]["val"]
    copy = pickle.loads(pickle.dumps(data))  # as processes that are spawned get it
    assert copy.datasets["val"][_key(1)]["tokens"].tolist() == data.datasets["val"][_key(1)]["tokens"].tolist()
    assert counted == entry["tokens"] - (1 if packing == "block" else entry["documents"])
