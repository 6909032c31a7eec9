"""`trunkline predict --texts`: classes of texts, tags of words, answers to questions; computed as in evaluation."""

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch.utils.data import Dataset

from trunkline import TrunklineError
from trunkline.datamodules.tables import STANDARD, TABLES, read_lines, read_table, reader_of
from trunkline.datamodules.text_tasks.labelled_text import LabelledTextData
from trunkline.datamodules.text_tasks.squad import SquadData, numbered, questions_of, read_squad
from trunkline.datamodules.text_tasks.tagged_text import CONLL, TaggedTextData, read_conll
from trunkline.datamodules.text_tasks.task_text import Row
from trunkline.modules.metrics.squad import merge_windows
from trunkline.names import check_regular
from trunkline.pipelines.objectives import PREDICT_TEXTS
from trunkline.pipelines.trained import Trained

Run = Callable[[Any, Dataset[Any]], list[Any]]
"""A function from a module and a dataset to the results of `predict_step`, one per batch."""


def predict_texts(trained: Trained, texts: str, columns: dict[str, str | None], run: Run) -> pd.DataFrame:
    """The table of predictions.

    Args:
        trained: the checkpoint.
        texts: as for `predict`.
        columns: `text_column` and `pair_column`; None takes the column of training.
        run: makes the predictions.

    Raises:
        TrunklineError: with the flag, or the file and row, that is wrong.
    """
    trained.require(PREDICT_TEXTS)
    task = TASKS[trained.objective]
    given = {name: column for name, column in columns.items() if column is not None}
    if given and task.table is not class_table:
        raise TrunklineError(f"--{next(iter(given))} is for classes of texts, but {trained.file} is of {task.name}")
    file = Path(texts)
    if texts != STANDARD:
        check_regular(file, "texts")
    if texts != STANDARD and not file.is_file():
        raise TrunklineError(f"--texts {texts}: there is no such file; fix the path")
    data = data_of(trained, file, given)
    return task.table(trained.module(), data, file, trained.data or {}, run)


def data_of(trained: Trained, file: Path, given: dict[str, str]) -> Any:
    """A datamodule that prepares the texts of a file as in training.

    Args:
        trained: the checkpoint, which holds the settings of training.
        file: the file with the texts.
        given: names of columns that replace those of training.

    Raises:
        TrunklineError: if the checkpoint does not say how texts were prepared, or if a column of pairs is given to a
            model of single texts.
    """
    state = trained.data
    if state is None or "settings" not in state:
        raise TrunklineError(
            f"{trained.file} does not say how its texts were prepared, because it was trained without "
            f"{trained.data_name} or by an older version; train again"
        )
    settings = state["settings"]
    if given.get("pair_column") and settings["pair_column"] is None:
        raise TrunklineError(
            f"--pair_column {given['pair_column']}: {trained.file} was trained on single texts; leave it out"
        )
    data: Any = trained.data_class(str(file), tokenizer="", **{**settings, **given})
    data.vocabulary, data.class_names = trained.tokenizer(), trained.class_names
    return data


def class_table(model: Any, data: LabelledTextData, file: Path, state: dict[str, Any], run: Run) -> pd.DataFrame:
    """A table with `text` (and `pair`), `label` and `probability`."""
    if reader_of(file) is None:
        if data.pair_column is not None:
            raise TrunklineError(
                f"--texts {file} is no table, but pairs of texts need two columns; give a .jsonl, .csv or .parquet file"
            )
        rows = text_lines(file, data.text_column)
    else:
        rows = [Row(number, *row) for number, row in enumerate(read_table(file))]
    texts = [list(data.texts(row)) for row in rows]
    for row, own in zip(rows, texts, strict=True):
        check_text(all(text.strip() for text in own), row.place)
    check_any(rows, file)
    dataset = data.dataset(rows, np.zeros(len(rows), np.int64))
    probability, label = torch.cat([b["probability"] for b in run(model, dataset)]).max(dim=1)
    warn_of_cut(dataset.cut, f"texts were longer than {data.max_length} tokens")
    names = ["text", "pair"] if data.pair_column is not None else ["text"]
    table = pd.DataFrame(texts, columns=names)
    return table.assign(label=[data.class_names[n] for n in label.tolist()], probability=probability.tolist())


def tag_table(model: Any, data: TaggedTextData, file: Path, state: dict[str, Any], run: Run) -> pd.DataFrame:
    """A table with `row` (number of the sentence, from 1), `word`, `tag` and `probability`."""
    column = data.tokens_column
    if file.suffix in CONLL and file.suffix != ".txt":
        rows = [Row(number, *row) for number, row in enumerate(read_conll(file, column, None))]
    elif reader_of(file) is None:
        lines = text_lines(file, column)
        rows = [row._replace(cells={column: row.cells[column].split()}) for row in lines]
    else:
        raise TrunklineError(
            f"--texts {file}: words to be tagged stand in a .txt file, a sentence a line, or in a {CONLL[0]} file; "
            "give one of these"
        )
    check_any(rows, file)
    words = [row.cells[column] for row in rows]
    batches = run(model, data.dataset(rows, [[0] * len(own) for own in words]))
    found = {name: torch.cat([b[name] for b in batches]).tolist() for name in ("index", "prediction", "probability")}
    return pd.DataFrame(
        {
            "row": [index + 1 for index in found["index"]],
            "word": [word for own in words for word in own],
            "tag": [data.class_names[n] for n in found["prediction"]],
            "probability": found["probability"],
        }
    )


def answer_table(model: Any, data: SquadData, file: Path, state: dict[str, Any], run: Run) -> pd.DataFrame:
    """A table with `id`, `question`, `answer` and `score` (sum of the logits of the answer's first and last token).

    As in evaluation, if some question of training had no answer, an empty answer is predicted where that scores higher.
    """
    if file.suffix == ".json":
        rows = [Row(number, *row) for number, row in enumerate(read_squad(file))]
    elif file.suffix in TABLES:
        table = (Row(number, *row) for number, row in enumerate(read_table(file)))
        rows = list(numbered(table, needed=("question", "context")))
    else:
        raise TrunklineError(
            f"--texts {file}: questions stand in a .json file in SQuAD's format, or in a table (.jsonl, .csv, "
            ".parquet) with the columns question and context; give one of these"
        )
    questions = [question for row in rows for question in questions_of(row, answered=False)]
    check_any(questions, file)
    for question in questions:
        check_text(bool(question.text.strip()), f"{file}, question {question.id}")
    dataset = data.dataset(questions)
    found = [window for batch in run(model, dataset) for window in batch]
    warn_of_cut(dataset.cut, f"questions were longer than {data.max_question_length} tokens")
    null: dict[int, float] = defaultdict(lambda: float("inf"))
    for window in found:
        null[window.question] = min(null[window.question], window.null_score)
    answers = []
    for number, best in merge_windows(found, state["unanswerable"]).items():
        question = questions[number]
        text = "" if best is None else question.context[best.start : best.end]
        answers.append((question.id, question.text, text, null[number] if best is None else best.score))
    return pd.DataFrame(answers, columns=["id", "question", "answer", "score"])


def text_lines(file: Path, column: str) -> list[Row]:
    """The lines of a text file, without empty lines at its end.

    Raises:
        TrunklineError: if another line is empty.
    """
    rows = [Row(number, *row) for number, row in enumerate(read_lines(file, column))]
    while rows and not rows[-1].cells[column].strip():
        rows.pop()
    for row in rows:
        check_text(bool(row.cells[column].strip()), row.place)
    return rows


def check_text(there: bool, place: str) -> None:
    """Raise an error for a row without text."""
    if not there:
        raise TrunklineError(f"{place} is empty; write a text there, or remove it")


def check_any(rows: list[Any], file: Path) -> None:
    """Raise an error for a file without rows."""
    if not rows:
        raise TrunklineError(f"--texts {file} holds no text; give one with at least one row")


def warn_of_cut(count: int, what: str) -> None:
    """Print how many texts were cut."""
    if count:
        print(f"{count} {what} and were cut, as in training")


def conll(table: pd.DataFrame) -> bytes:
    """A word and its tag per line, and an empty line after each sentence."""
    lines = []
    for _, sentence in table.groupby("row"):
        lines += [f"{word}\t{tag}\n" for word, tag in zip(sentence.word, sentence.tag, strict=True)]
        lines.append("\n")
    return "".join(lines).encode()


class TaskOnTexts(NamedTuple):
    """A task that a checkpoint can do on texts."""

    name: str
    table: Callable[..., pd.DataFrame]


TASKS = {
    "TextClassifier": TaskOnTexts("classes of texts", class_table),
    "TokenClassifier": TaskOnTexts("tags of words", tag_table),
    "QuestionAnswering": TaskOnTexts("answers to questions", answer_table),
}
"""Tasks by the name of the objective."""
