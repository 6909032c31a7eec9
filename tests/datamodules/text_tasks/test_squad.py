"""SquadData: every answer lies whole in a window and is found again in the text; what a broken file says."""

import json
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from trunkline import TrunklineError
from trunkline.datamodules.samplers import SampleKey
from trunkline.datamodules.text_tasks.squad import SquadData, windows_of
from trunkline.datamodules.tokenizers import train_bpe, train_wordpiece

TEXT = "the Mill of Zürich, built in (1874) by O'Neill & sons stood near a river: quiet 日本 place! naïve café tower"
WORDS = TEXT.split()


def paragraph(number: int, words: int = 60) -> dict[str, Any]:
    """A text, and questions whose answers are drawn from it, up to 12 words long."""
    draw = random.Random(number)
    chosen = [draw.choice(WORDS) for _ in range(words)]
    starts = [len(" ".join([*chosen[:i], ""])) for i in range(words)]
    context = " ".join(chosen)
    qas: list[dict[str, Any]] = []
    for n in range(6):
        first = draw.randrange(words)
        last = min(words, first + draw.randint(1, 12))
        start, text = starts[first], " ".join(chosen[first:last])
        qas.append({"id": f"{number}-{n}", "question": f"what stood {n} near the river?"})
        qas[-1]["answers"] = [{"text": text, "answer_start": start}]
    qas.append({"id": f"{number}-x", "question": "who?", "answers": [], "is_impossible": True})
    return {"context": context, "qas": qas}


def write(file: Path, paragraphs: list[dict[str, Any]]) -> str:
    file.write_text(json.dumps({"version": "v2.0", "data": [{"title": "t", "paragraphs": paragraphs}]}))
    return str(file)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("tokenizers")
    texts = [" ".join(WORDS)] * 3
    for name, made in {"wordpiece": train_wordpiece(texts, 120), "bpe": train_bpe(texts, 300)}.items():
        made.save(str(folder / f"{name}.json"))
    return {name: str(folder / f"{name}.json") for name in ("wordpiece", "bpe")}


def ready(path: str, tokenizer: str, **options: Any) -> SquadData:
    sizes: dict[str, Any] = {"max_length": 100, "doc_stride": 16, "max_question_length": 12, "val_fraction": 0.0}
    made = SquadData(path, tokenizer=tokenizer, **{**sizes, **options})
    made.setup("fit")
    return made


def items(made: SquadData, split: str = "train") -> list[dict[str, Any]]:
    data: Any = made.datasets[split]
    return [data[SampleKey(0, n)] for n in range(len(data))]


@pytest.mark.parametrize("stride", [1, 16, 1000])
@pytest.mark.parametrize("name", ["wordpiece", "bpe"])
def test_every_answer_is_whole_in_a_window(name: str, stride: int, tokenizers: dict[str, str], tmp_path: Path) -> None:
    words = 60 if stride > 1 else 30
    path = write(tmp_path / "s.json", [paragraph(n, words) for n in range(4)])
    made = ready(path, tokenizers[name], doc_stride=stride, max_length=100 if name == "wordpiece" else 120)
    found: dict[int, set[str]] = {n: set() for n in range(len(made.questions["train"]))}
    seen: dict[int, set[int]] = {n: set() for n in found}
    for row in items(made):
        question = made.questions["train"][row["question"]]
        seen[row["question"]].update(*(range(s, e) for s, e in row["offsets"][row["context"]].tolist()))
        if row["start"] == row["end"] == row["null"]:
            continue
        assert row["context"][[row["start"], row["end"]]].all()
        assert row["start"] <= row["end"]
        text = question.context[row["offsets"][row["start"], 0] : row["offsets"][row["end"], 1]]
        assert question.answers[0] in text  # a token may reach over the answer's border, such as a space
        assert len(text.strip()) - len(question.answers[0]) <= 8
        found[row["question"]].add(text)
    for number, question in enumerate(made.questions["train"]):
        assert bool(found[number]) == bool(question.answers), question.id
        assert all(n in seen[number] for n, c in enumerate(question.context) if not c.isspace())


def test_rows(tokenizers: dict[str, str], tmp_path: Path) -> None:
    text = "the mill stood near a river"
    qas = [{"id": 7, "question": "who stood near?", "answers": [{"text": "mill stood", "answer_start": 4}]}]
    path = write(tmp_path / "s.json", [{"context": text, "qas": qas}])
    for name, first in (("wordpiece", [2]), ("bpe", [])):
        tokenizer = Tokenizer.from_file(tokenizers[name])
        end = tokenizer.token_to_id("[SEP]") or 0
        pad = tokenizer.token_to_id("[PAD]") or 0
        (row,) = items(ready(path, tokenizers[name], max_length=40))
        question, context = tokenizer.encode("who stood near?"), tokenizer.encode(text)
        ids = [*first, *question.ids[:12], end, *context.ids, end]
        shift = len(first) + len(question.ids[:12]) + 1
        n, words = len(ids), len(context.ids)
        assert row["tokens"].tolist() == ids + [pad] * (40 - n)
        assert row["mask"].tolist() == [True] * n + [False] * (40 - n)
        assert row["segment"].tolist() == [0] * shift + [1] * (n - shift) + [0] * (40 - n)
        assert row["context"].tolist() == [False] * shift + [True] * words + [False] * (40 - shift - words)
        assert row["offsets"][shift : shift + words].tolist() == [list(pair) for pair in context.offsets]
        assert row["null"] == (0 if first else n - 1)
        assert text[row["offsets"][row["start"], 0] : row["offsets"][row["end"], 1]].strip() == "mill stood"
        assert (row["question"], row["index"], row["valid"]) == (0, 0, True)


@pytest.mark.parametrize(
    ("length", "room", "stride"), [(0, 5, 3), (5, 5, 3), (6, 5, 3), (11, 5, 3), (30, 7, 7), (9, 4, 1)]
)
def test_windows_cover_the_text(length: int, room: int, stride: int) -> None:
    windows = list(windows_of(length, room, stride))
    begins = [begin for begin, _ in windows]
    assert {n for window in windows for n in range(*window)} == set(range(length))
    assert all(end - begin == min(room, length) for begin, end in windows)
    assert all(0 < b - a <= stride for a, b in pairwise(begins))
    for size in range(1, min(room - stride + 1, length) + 1):  # each span that is short enough lies whole in one
        assert all(any(b <= s and s + size <= e for b, e in windows) for s in range(length - size + 1))


def test_splits_keep_paragraphs_together(tokenizers: dict[str, str], tmp_path: Path) -> None:
    write(tmp_path / "a.json", [paragraph(n) for n in range(12)])
    made = ready(str(tmp_path), tokenizers["wordpiece"], val_fraction=0.3, batch_size=4)
    contexts = {split: {q.context for q in own} for split, own in made.questions.items()}
    assert not contexts["train"] & contexts["val"]
    assert len(contexts["train"]) + len(contexts["val"]) == 12
    batch = next(iter(made.train_dataloader()))
    assert batch["offsets"].shape == (4, 100, 2)
    assert batch["start"].dtype == torch.int64
    flat = []
    for own in map(paragraph, range(12)):
        for entry in own["qas"]:
            columns = {name: [answer[name] for answer in entry["answers"]] for name in ("text", "answer_start")}
            flat.append({**entry, "context": own["context"], "answers": columns})
    (tmp_path / "flat.jsonl").write_text("\n".join(map(json.dumps, flat)))
    again = ready(str(tmp_path / "flat.jsonl"), tokenizers["wordpiece"], val_fraction=0.3)
    assert again.questions == made.questions


def one(answer: Any, context: str = "the mill of Zürich stood") -> list[dict[str, Any]]:
    return [{"context": context, "qas": [{"id": "q7", "question": "what?", "answers": [answer]}]}]


@pytest.mark.parametrize(
    ("paragraphs", "message"),
    [
        (
            one({"text": "mill", "answer_start": 5}),
            r"question q7: the answer 'mill' is not at character 5 .*'ill ' is; fix",
        ),
        (one({"text": "mill", "answer_start": -20}), "is not at character -20"),
        (one({"text": "", "answer_start": 0}), "the answer '' is not at"),
        (one({"text": "mill"}), r"article 0, paragraph 0, question q7: KeyError: 'answer_start'; each question needs"),
        (one("mill"), "question q7: TypeError"),
        (one({"text": 5, "answer_start": 0}), "question q7: TypeError: int is not a text"),
        ([{"context": "a", "qas": [{"id": 1, "question": None}]}], "question 1: TypeError: null is not a text"),
        (one({"text": "mill", "answer_start": 4}, context=" "), "paragraph 0: 'context' is not a text"),
        (one({"text": " ", "answer_start": 3}), "question q7: the tokenizer makes no token of the answer ' '"),
        (
            one({"text": "mill " * 97, "answer_start": 0}, context="mill " * 100),
            r"q7: an answer has \d+ tokens, but a window has room for \d+; set max_length to at least \d+",
        ),
    ],
)
def test_broken_answers(paragraphs: Any, message: str, tokenizers: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(TrunklineError, match=message):
        ready(write(tmp_path / "s.json", paragraphs), tokenizers["wordpiece"])


def test_the_size_that_the_message_names_is_enough(tokenizers: dict[str, str], tmp_path: Path) -> None:
    path = write(tmp_path / "s.json", one({"text": "mill " * 40, "answer_start": 0}, context="mill " * 60))
    with pytest.raises(TrunklineError) as error:
        ready(path, tokenizers["wordpiece"], max_length=30)
    needed = int(str(error.value).partition("at least ")[2].partition(",")[0])
    assert any(row["start"] > 0 for row in items(ready(path, tokenizers["wordpiece"], max_length=needed)))
    with pytest.raises(TrunklineError, match=f"at least {needed},"):
        ready(path, tokenizers["wordpiece"], max_length=needed - 1)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "[]", r"a\.json is not a SQuAD file \(TypeError"),
        ("a.json", '{"rows": []}', r"a\.json is not a SQuAD file \(KeyError: 'data'\)"),
        ("a.json", '{"data": ', r"a\.json is not a SQuAD file \(JSONDecodeError"),
        (
            "a.jsonl",
            '{"id": 1, "question": "?", "context": "a", "answers": {"text": ["a"], "answer_start": []}}',
            r"a\.jsonl:1: 'answers' needs two lists of one length, text and answer_start",
        ),
        (
            "a.jsonl",
            '{"id": 1, "question": "?", "context": 3, "answers": []}',
            "a.jsonl:1: 'context' is not a text but int",
        ),
        ("a.json", '{"data": []}', r"the train split .* is empty"),
        (
            "a.jsonl",
            '{"id": 1, "question": "?"}',
            r"a\.jsonl:1 has no 'context'; question answering needs id, question",
        ),
    ],
)
def test_broken_files(name: str, content: str, message: str, tokenizers: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(TrunklineError, match=message):
        ready(str(tmp_path / name), tokenizers["wordpiece"])


def test_sizes_that_leave_no_room(tokenizers: dict[str, str]) -> None:
    for sizes in ({"max_length": 15}, {"doc_stride": 0}, {"max_question_length": 0}):
        with pytest.raises(TrunklineError, match=r"must be at least 4 more than max_question_length"):
            ready("x.json", tokenizers["wordpiece"], **sizes)
