"""Questions whose answers are parts of a text (SQuAD, arXiv:1606.05250 and arXiv:1806.03822)."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from tokenizers import Tokenizer
from torch.utils.data import Dataset

from trunkline import TrunklineError
from trunkline.contract import DataFacts, Question
from trunkline.datamodules.hub import NamedSource
from trunkline.datamodules.samplers import SampleKey
from trunkline.datamodules.tables import TABLES, broken_text, kind, opened
from trunkline.datamodules.text_tasks.task_text import Frame, Row, TaskTextData, padded, table_files, table_rows


@dataclass(kw_only=True, eq=False, repr=False)
class SquadData(TaskTextData):
    """Extractive question answering, as `WindowBatch`es, from SQuAD's JSON (versions 1 and 2), tables or a hub name.

    A long text is read in windows. Each begins at most `doc_stride` tokens after the window before it, and each answer
    lies completely in at least one window. A row is `[CLS] question [SEP] window [SEP]`, and `null` is the position of
    `[CLS]`; with a GPT tokenizer it is `question <|endoftext|> window <|endoftext|>`, and `null` is the position of
    the last token. `start` and `end` belong to the first answer that lies in the window. All questions of a paragraph
    go to the same split.
    """

    source: str = field(kw_only=False)
    """A SQuAD .json file or a folder of them; or a table (.jsonl, .parquet) or a hub name (a split can follow after a
    colon) with the columns id, question, context and answers (lists `text` and `answer_start`)."""
    max_length: int = 384
    doc_stride: int = 64
    """Maximum number of tokens from the beginning of a window to the beginning of the next."""
    max_question_length: int = 64
    """Maximum number of tokens of a question; the rest is left out."""

    setting_names: ClassVar[tuple[str, ...]] = ("max_length", "doc_stride", "max_question_length")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.doc_stride < 1 or self.max_question_length < 1 or self.max_length < self.max_question_length + 4:
            raise TrunklineError(
                f"max_length={self.max_length} must be at least 4 more than max_question_length="
                f"{self.max_question_length}, and that and doc_stride={self.doc_stride} at least 1",
                field="data.max_length",
            )
        self.questions: dict[str, list[Question]] = {}
        """Questions of each split, after `setup`."""

    @property
    def facts(self) -> DataFacts:
        """Adds the questions, after `setup`."""
        return replace(super().facts, questions=self.questions)

    def rows(self, source: NamedSource) -> Iterator[Row]:
        """The paragraphs of a source, each with its questions."""
        files = table_files(source, tuple(TABLES))
        if not files or files[0].suffix != ".json":
            yield from numbered(table_rows(source))
            return
        number = 0
        for file in files:
            for place, paragraph in read_squad(file):
                yield Row(number, place, paragraph)
                number += 1

    def setup(self, stage: str) -> None:
        """Read and tokenise all questions.

        Raises:
            TrunklineError: if an answer is not at its `answer_start`, or is longer than a window.
        """
        if self.datasets:
            return
        for split, rows in self.splits.items():
            self.questions[split] = [question for row in rows for question in questions_of(row)]
            self.datasets[split] = self.dataset(self.questions[split])
        del self.splits
        self.compare_tokenizers()

    def state_dict(self) -> dict[str, Any]:
        """Adds whether a question can have no answer."""
        return {**super().state_dict(), "unanswerable": any(not q.answers for q in self.questions.get("train", ()))}

    def dataset(self, questions: list[Question]) -> "Windows":
        """Tokenise the questions, and each context once; cut the contexts into windows.

        Raises:
            TrunklineError: if an answer is longer than a window.
        """
        tokenizer, frame = Tokenizer.from_str(self.vocabulary.to_str()), Frame.of(self.vocabulary)
        tokenizer.encode_special_tokens = True  # the name of a special token inside a text is ordinary text
        contexts = list(dict.fromkeys(question.context for question in questions))
        encoded = tokenizer.encode_batch(contexts, add_special_tokens=False)
        texts = {
            c: (np.array(e.ids), np.array(e.offsets).reshape(-1, 2)) for c, e in zip(contexts, encoded, strict=True)
        }
        asked = tokenizer.encode_batch([question.text for question in questions], add_special_tokens=False)
        windows: list[tuple[int, int, int, int, int]] = []
        longest_prompt = self.max_question_length
        cut = sum(len(e.ids) > longest_prompt for e in asked)
        prompts = [np.array(e.ids[:longest_prompt], np.int64) for e in asked]
        for number, (question, prompt) in enumerate(zip(questions, prompts, strict=True)):
            offsets = texts[question.context][1]
            room = self.max_length - len(frame.first) - len(prompt) - 2
            spans = answer_spans(question, offsets)
            longest = max((last - first + 1 for first, last in spans), default=1)
            if longest > room:
                raise TrunklineError(
                    f"question {question.id}: an answer has {longest} tokens, but a window has room for {room}; set "
                    f"max_length to at least {self.max_length + longest - room}, or leave this question out",
                    field="data.max_length",
                )
            for begin, stop in windows_of(len(offsets), room, min(self.doc_stride, room - longest + 1)):
                inside = [(s, e) for s, e in spans if begin <= s and e < stop]
                windows.append((number, begin, stop, *(inside[0] if inside else (-1, -1))))
        return Windows([texts[q.context] for q in questions], prompts, windows, frame, self.max_length, cut)


class Windows(Dataset[dict[str, Any]]):
    """Items of `SquadData`.

    Args:
        texts: ids (N,) and offsets (N, 2) of the context of each question.
        prompts: ids of each question.
        windows: for each window the number of its question, its first token in the context, the token after its last,
            and the first and last token of the answer (-1 if it has none).
        frame: special tokens around the texts.
        length: T.
        cut: number of questions that lost their end.
    """

    def __init__(
        self,
        texts: list[tuple[np.ndarray, np.ndarray]],
        prompts: list[np.ndarray],
        windows: list[tuple[int, int, int, int, int]],
        frame: Frame,
        length: int,
        cut: int,
    ) -> None:
        self.texts, self.prompts, self.frame, self.length, self.cut = texts, prompts, frame, length, cut
        self.windows = np.array(windows, np.int64).reshape(-1, 5)

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, key: SampleKey) -> dict[str, Any]:
        question, begin, stop, first, last = self.windows[key.index].tolist()
        frame, prompt, (ids, offsets) = self.frame, self.prompts[question], self.texts[question]
        row = np.concatenate([frame.first, prompt, [frame.end], ids[begin:stop], [frame.end]])
        shift = len(frame.first) + len(prompt) + 1
        places = np.arange(self.length)
        characters = np.zeros((self.length, 2), np.int64)
        characters[shift : shift + stop - begin] = offsets[begin:stop]
        null = 0 if frame.first else len(row) - 1
        return {
            "tokens": torch.from_numpy(padded(row, self.length, frame.pad)),
            "segment": torch.from_numpy(((places >= shift) & (places < len(row))).astype(np.int64)),
            "mask": torch.from_numpy(places < len(row)),
            "context": torch.from_numpy((places >= shift) & (places < shift + stop - begin)),
            "offsets": torch.from_numpy(characters),
            "null": null,
            "start": null if first < 0 else first - begin + shift,
            "end": null if last < 0 else last - begin + shift,
            "question": question,
            "index": key.index,
            "valid": key.valid,
        }


def windows_of(length: int, room: int, stride: int) -> Iterator[tuple[int, int]]:
    """(first token, token after the last) of each window over a text; the last window ends where the text ends."""
    for begin in range(0, max(length - room, 0) + stride, stride):
        begin = min(begin, max(length - room, 0))
        yield begin, min(begin + room, length)


def answer_spans(question: Question, offsets: np.ndarray) -> list[tuple[int, int]]:
    """First and last token of each answer.

    Args:
        question: the question, with its answers.
        offsets: (N, 2) for each token of the context: its first character, and the character after its last one.

    Raises:
        TrunklineError: for an answer that the tokenizer drops, such as one of spaces alone.
    """
    spans = []
    for answer, start in zip(question.answers, question.starts, strict=True):
        within = ((offsets[:, 1] > start) & (offsets[:, 0] < start + len(answer))).nonzero()[0]
        if not len(within):
            raise TrunklineError(
                f"question {question.id}: the tokenizer makes no token of the answer {answer!r}; fix it"
            )
        spans.append((int(within[0]), int(within[-1])))
    return spans


def read_squad(file: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(place, paragraph) of each paragraph in a file of SQuAD's format.

    Raises:
        TrunklineError: if the file has another format.
    """
    with opened(file) as stream:
        content = stream.read()
    try:
        articles = json.loads(content.decode("utf-8-sig"))["data"]
        paragraphs = [
            (a, p, entry) for a, article in enumerate(articles) for p, entry in enumerate(article["paragraphs"])
        ]
    except UnicodeDecodeError as error:
        raise broken_text(file) from error
    except (ValueError, KeyError, TypeError) as error:
        raise TrunklineError(
            f"{file} is not a SQuAD file ({type(error).__name__}: {error}); it must be one JSON object, "
            '{"data": [{"paragraphs": [{"context": …, "qas": [{"id": …, "question": …, "answers": […]}]}]}]}'
        ) from error
    for article, place, paragraph in paragraphs:
        yield f"{file}, article {article}, paragraph {place}", paragraph


def numbered(rows: Iterable[Row], needed: Sequence[str] = ("id", "question", "context", "answers")) -> Iterator[Row]:
    """Make a paragraph of each row of a table with one question per row; rows with the same context get one number.

    Args:
        rows: the rows of the table.
        needed: columns that must exist; `answers` are read only if they are needed.

    Raises:
        TrunklineError: if a column is missing, or `answers` is not two lists of one length.
    """
    numbers: dict[str, int] = {}
    for row in rows:
        missing = [name for name in needed if name not in row.cells]
        if missing:
            listed = f"{', '.join(needed[:-1])} and {needed[-1]}"
            raise TrunklineError(f"{row.place} has no '{missing[0]}'; question answering needs {listed}")
        context, answers = row.cells["context"], row.cells["answers"] if "answers" in needed else None
        if isinstance(answers, Mapping):
            texts, starts = answers.get("text"), answers.get("answer_start")
            if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
                raise TrunklineError(f"{row.place}: 'answers' needs two lists of one length, text and answer_start")
            answers = [{"text": text, "answer_start": start} for text, start in zip(texts, starts, strict=True)]
        name = row.cells["id"] if "id" in needed else row.cells.get("id", row.number)
        entry = {"id": name, "question": row.cells["question"], "answers": answers}
        yield Row(numbers.setdefault(str(context), len(numbers)), row.place, {"context": context, "qas": [entry]})


def questions_of(row: Row, answered: bool = True) -> Iterator[Question]:
    """The questions of a paragraph; if `answered` is False, their answers are left out.

    Raises:
        TrunklineError: if the paragraph or a question is malformed, or an answer is not at its `answer_start`.
    """
    context = row.cells.get("context")
    if not isinstance(context, str) or not context.strip():
        raise TrunklineError(f"{row.place}: 'context' is not a text but {kind(context)}; fix it")
    for entry in row.cells.get("qas", ()):
        name = entry.get("id", "?") if isinstance(entry, Mapping) else "?"
        try:
            text, golds = as_text(entry["question"]), entry.get("answers") or []
            known = answered and not entry.get("is_impossible")
            answers = [(as_text(g["text"]), int(g["answer_start"])) for g in golds] if known else []
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise TrunklineError(
                f"{row.place}, question {name}: {type(error).__name__}: {error}; each question needs id, question and "
                "answers with text and answer_start"
            ) from error
        for answer, start in answers:
            found = context[start : start + len(answer)]
            if not answer or found != answer or start < 0:
                raise TrunklineError(
                    f"{row.place}, question {name}: the answer {answer!r} is not at character {start} of the "
                    f"context, but {found!r} is; fix answer_start"
                )
        yield Question(str(name), text, context, [a for a, _ in answers], [s for _, s in answers])


def as_text(value: Any) -> str:
    """The value, which must be a string.

    Raises:
        TypeError: if it is not.
    """
    if not isinstance(value, str):
        raise TypeError(f"{kind(value)} is not a text")
    return value
