"""`trunkline predict --texts`: the tables equal forward passes without padding, and what evaluation counted."""

import io
import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
from task_files import LENGTH, asked, bert, labelled, pretrained, tagged, words
from tiny import trainer

from trunkline import TrunklineError
from trunkline.datamodules import LabelledTextData, SquadData, TaggedTextData
from trunkline.modules.metrics.squad import squad_scores
from trunkline.modules.networks import TextHeadConfig
from trunkline.modules.objectives.question_answering import QuestionAnswering
from trunkline.modules.objectives.text_classifier import TextClassifier
from trunkline.modules.objectives.token_classifier import TokenClassifier
from trunkline.modules.training.checkpoints import SafeCheckpointIO
from trunkline.modules.training.optim import OptimizerConfig
from trunkline.pipelines.commands.predict import predict

OPTIMIZER = OptimizerConfig(schedule="constant", warmup=0, lr=0.01)


def train(folder: Path, model: Any, data: Any, epochs: int = 2) -> SimpleNamespace:
    """Checkpoint, trained network, datamodule, and what a validation on the training file logged."""
    torch.manual_seed(0)
    fitted = trainer(folder, max_epochs=epochs, plugins=[SafeCheckpointIO()], num_sanity_val_steps=0)
    fitted.fit(model, datamodule=data)
    fitted.save_checkpoint(folder / "task.ckpt")
    metrics = {name: value.item() for name, value in fitted.callback_metrics.items()}
    return SimpleNamespace(checkpoint=str(folder / "task.ckpt"), model=model.eval(), data=data, metrics=metrics)


def network(**options: Any) -> TextHeadConfig:
    torch.manual_seed(0)
    return TextHeadConfig(bert=bert(), **options)


def options(folder: Path, path: str, **more: Any) -> dict[str, Any]:
    return {
        "source": path,
        "val_source": path,
        "tokenizer": pretrained(folder),
        "max_length": 16,
        "batch_size": 4,
        **more,
    }


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("class")
    data = LabelledTextData(**options(folder, labelled(folder)))
    return train(folder, TextClassifier(network(), optimizer=OPTIMIZER), data)


@pytest.fixture(scope="module")
def of_pairs(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("pairs")
    data = LabelledTextData(**options(folder, labelled(folder, pairs=True), pair_column="pair"))
    return train(folder, TextClassifier(network(), optimizer=OPTIMIZER), data, epochs=1)


@pytest.fixture(scope="module")
def tagger(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("tags")
    data = TaggedTextData(**options(folder, tagged(folder)))
    return train(folder, TokenClassifier(network(pool="none", num_outputs=3), optimizer=OPTIMIZER), data)


def answers(folder: Path, impossible: bool) -> SimpleNamespace:
    data = SquadData(**options(folder, asked(folder, impossible), max_question_length=6, doc_stride=4))
    return train(folder, QuestionAnswering(network(pool="none"), optimizer=OPTIMIZER), data, epochs=15)


@pytest.fixture(scope="module")
def answerer(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    return answers(tmp_path_factory.mktemp("answers"), impossible=False)


@pytest.fixture(scope="module")
def doubter(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Knows questions without an answer."""
    return answers(tmp_path_factory.mktemp("doubts"), impossible=True)


def run(trained: SimpleNamespace, texts: Path | str, output: Path, **more: Any) -> pd.DataFrame:
    predict(trained.checkpoint, texts=str(texts), output=str(output), accelerator="cpu", batch_size=3, **more)
    return pd.read_csv(output, keep_default_na=False) if output.suffix == ".csv" else pd.read_parquet(output)


def by_hand(trained: SimpleNamespace, text: str, pair: str | None = None) -> torch.Tensor:
    """(K,) or (T, K) probabilities from the library's own tokens, without padding."""
    text, tail = f"[CLS] {text} [SEP]", "" if pair is None else f"{pair} [SEP]"
    first, second = (words().encode(part, add_special_tokens=False).ids for part in (text, tail))
    segments = torch.tensor([[0] * len(first) + [1] * len(second)])
    with torch.no_grad():
        return trained.model.network(torch.tensor([first + second]), segments)[0].softmax(dim=-1)


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv", ".parquet"])
def test_classes(classifier: SimpleNamespace, suffix: str, tmp_path: Path) -> None:
    texts = [json.loads(line)["text"] for line in Path(classifier.data.source).read_text().splitlines()]
    if suffix == ".txt":
        (tmp_path / "in.txt").write_text("\ufeff" + "\r\n".join(texts) + "\n\n")
    else:
        jsonl = partial(pd.DataFrame.to_json, orient="records", lines=True)
        writers: dict[str, Any] = {".csv": pd.DataFrame.to_csv, ".parquet": pd.DataFrame.to_parquet, ".jsonl": jsonl}
        writers[suffix](pd.DataFrame({"body": texts}), tmp_path / f"in{suffix}")
    more = {} if suffix == ".txt" else {"text_column": "body"}
    found = run(classifier, tmp_path / f"in{suffix}", tmp_path / "out.csv", **more)
    assert list(found.columns) == ["text", "label", "probability"]
    assert found.text.tolist() == texts
    for text, label, probability in found.itertuples(index=False):
        want = by_hand(classifier, text)
        assert label == ["bad", "good"][int(want.argmax())]
        assert probability == pytest.approx(want.max().item(), abs=1e-5)
    right = sum(("good" in text) == (label == "good") for text, label in zip(texts, found.label, strict=True))
    assert right / len(texts) == pytest.approx(classifier.metrics["val/acc"])


def test_lines_on_the_standard_input(
    classifier: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same table as of a file with these lines."""
    lines = "who saw anna\na bad film\n"
    (tmp_path / "in.txt").write_text(lines)
    of_file = run(classifier, tmp_path / "in.txt", tmp_path / "a.csv")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
    pd.testing.assert_frame_equal(run(classifier, "-", tmp_path / "b.csv"), of_file)
    assert of_file.text.tolist() == lines.splitlines()


def test_pairs(of_pairs: SimpleNamespace, tmp_path: Path) -> None:
    source = of_pairs.data.source
    found = run(of_pairs, source, tmp_path / "out.parquet")
    assert list(found.columns) == ["text", "pair", "label", "probability"]
    for text, pair, label, probability in found.itertuples(index=False):
        want = by_hand(of_pairs, text, pair)
        assert (label, probability) == (["bad", "good"][int(want.argmax())], pytest.approx(want.max().item(), abs=1e-5))
    (tmp_path / "in.txt").write_text("anna")
    with pytest.raises(TrunklineError, match=r"in\.txt is no table, but pairs of texts need two columns; give a"):
        run(of_pairs, tmp_path / "in.txt", tmp_path / "out.csv")
    with pytest.raises(TrunklineError, match=r":1 has no 'other'; it has text, pair, label; set pair_column$"):
        run(of_pairs, source, tmp_path / "out.csv", pair_column="other")


def test_long_texts_lose_their_end_and_are_counted(
    classifier: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = " ".join(["good"] * 14)
    (tmp_path / "in.txt").write_text(f"{long}\n{long} bad bad\nthe film\n{long} good")
    found = run(classifier, tmp_path / "in.txt", tmp_path / "out.csv")
    assert "2 texts were longer than 16 tokens and were cut, as in training" in capsys.readouterr().out
    want = by_hand(classifier, long).max().item()
    assert found.probability[[0, 1, 3]].tolist() == pytest.approx([want] * 3, abs=1e-5)
    assert found.text[1] == f"{long} bad bad"


@pytest.mark.parametrize("suffix", [".txt", ".conll", ".bare.conll"])
def test_tags(tagger: SimpleNamespace, suffix: str, tmp_path: Path) -> None:
    sentences = ["Anna saw Bo in Berlin .", "Carl", "the film was good in Berlin"]
    file = tmp_path / f"in{suffix}"
    if suffix == ".txt":
        file.write_text("\n".join(sentences))
    else:
        tail = "" if "bare" in suffix else " O"
        file.write_text("\n\n".join("\n".join(f"{word}{tail}" for word in s.split()) for s in sentences))
    found = run(tagger, file, tmp_path / "out.csv")
    assert list(found.columns) == ["row", "word", "tag", "probability"]
    assert found.row.tolist() == [1] * 6 + [2] + [3] * 6
    assert found.word.tolist() == " ".join(sentences).split()
    for number, sentence in enumerate(sentences, start=1):
        pieces = words().encode(sentence.split(), is_pretokenized=True, add_special_tokens=False)
        first = [pieces.word_ids.index(n) + 1 for n in range(len(sentence.split()))]
        want = by_hand(tagger, sentence)[first].max(dim=1)
        own = found[found.row == number]
        assert own.tag.tolist() == [["B-LOC", "B-PER", "O"][n] for n in want.indices.tolist()]
        assert own.probability.tolist() == pytest.approx(want.values.tolist(), abs=1e-5)
    predict(tagger.checkpoint, texts=str(file), output=str(tmp_path / "out.conll"), accelerator="cpu")
    lines = (tmp_path / "out.conll").read_text().splitlines()
    assert [line for line in lines if line] == [f"{w}\t{t}" for w, t in zip(found.word, found.tag, strict=True)]
    assert [n for n, line in enumerate(lines) if not line] == [6, 8, 15]


def test_tags_are_those_of_evaluation(tagger: SimpleNamespace, tmp_path: Path) -> None:
    source = tagger.data.source
    gold = [line.split()[1] for line in Path(source).read_text().splitlines() if line]
    found = run(tagger, source, tmp_path / "out.csv")
    assert (found.tag == gold).mean() == pytest.approx(tagger.metrics["val/acc"])


@pytest.mark.parametrize("kind", ["answerer", "doubter"])
def test_answers(request: pytest.FixtureRequest, kind: str, tmp_path: Path) -> None:
    answerer = request.getfixturevalue(kind)
    source = Path(answerer.data.source)
    found = run(answerer, source, tmp_path / "out.csv")
    assert list(found.columns) == ["id", "question", "answer", "score"]
    questions = {question.id: question for question in answerer.data.questions["val"]}
    assert found.id.tolist() == list(questions)
    assert found.question.tolist() == [question.text for question in questions.values()]
    scores = squad_scores((row.answer, questions[row.id].answers) for row in found.itertuples())
    assert scores["exact"] == pytest.approx(answerer.metrics["val/exact"])
    assert all(row.answer in questions[row.id].context for row in found.itertuples())
    content = json.loads(source.read_text())
    for paragraph in content["data"][0]["paragraphs"]:
        for entry in paragraph["qas"]:
            entry["answers"] = [{"text": "wrong", "answer_start": 0}]  # not looked at
            if entry["id"].endswith("0"):
                del entry["answers"]
    (tmp_path / "bare.json").write_text(json.dumps(content))
    pd.testing.assert_frame_equal(run(answerer, tmp_path / "bare.json", tmp_path / "2.csv"), found)
    flat = pd.DataFrame([{"question": q.text, "context": q.context} for q in questions.values()])
    flat.to_csv(tmp_path / "flat.csv", index=False)
    again = run(answerer, tmp_path / "flat.csv", tmp_path / "3.csv")
    assert again.id.tolist() == list(range(len(flat)))
    pd.testing.assert_frame_equal(again.drop(columns="id"), found.drop(columns="id"))


def test_long_questions_are_counted(
    answerer: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"id": "a", "question": q, "context": "Bo was bad"} for q in ("who " * 6, "who " * 7)]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = run(answerer, tmp_path / "in.jsonl", tmp_path / "out.csv")
    assert "1 questions were longer than 6 tokens and were cut" in capsys.readouterr().out
    assert found.id.tolist() == ["a", "a"]
    assert found.score[0] == pytest.approx(found.score[1])


# --- errors


@pytest.mark.parametrize(
    ("kind", "name", "content", "message"),
    [
        ("classifier", "in.txt", "a\n\nb\n", r"in\.txt:2 is empty; write a text there, or remove it"),
        ("classifier", "in.txt", "", r"--texts .*in\.txt holds no text"),
        ("classifier", "in.txt", "a\n\xff", r"in\.txt, byte 2: not UTF-8"),
        ("classifier", "in.jsonl", '{"text": " "}', r"in\.jsonl:1 is empty"),
        ("classifier", "in.jsonl", '{"text": 3}', r"in\.jsonl:1: 'text' is not a text but int; .* set text_column$"),
        ("classifier", "in.csv", "body\na\n", r"in\.csv:2 has no 'text'; it has body; set text_column$"),
        ("classifier", "none.txt", None, r"--texts .*none\.txt: there is no such file; fix the path"),
        ("tagger", "in.txt", "anna\n\nbo", r"in\.txt:2 is empty"),
        ("tagger", "in.jsonl", "{}", r"in\.jsonl: words to be tagged stand in a \.txt file"),
        ("tagger", "in.conll", "\n\n", r"in\.conll holds no text"),
        ("tagger", "in.txt", "anna " * 15, r"in\.txt:1 has 15 sub-words, but there is room for 14; .*cut this sent"),
        ("answerer", "in.jsonl", '{"question": "a"}', r":1 has no 'context'; question answering needs question and c"),
        ("answerer", "in.jsonl", '{"question": "", "context": "a"}', r"in\.jsonl, question 0 is empty"),
        ("answerer", "in.json", "[]", r"in\.json is not a SQuAD file"),
        ("answerer", "in.txt", "who", r"in\.txt: questions stand in a \.json file in SQuAD's format, or in a table"),
    ],
)
def test_bad_texts(
    request: pytest.FixtureRequest,
    kind: str,
    name: str,
    content: str | None,
    message: str,
    tmp_path: Path,
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content.encode("latin1"))
    with pytest.raises(TrunklineError, match=message):
        run(request.getfixturevalue(kind), tmp_path / name, tmp_path / "out.csv")
    assert not (tmp_path / "out.csv").exists()


def test_flags_that_do_not_fit(classifier: SimpleNamespace, tagger: SimpleNamespace, tmp_path: Path) -> None:
    path, text = str(tmp_path / "out.csv"), str(tmp_path / "in.txt")
    (tmp_path / "in.txt").write_text("anna")
    for flags, given in (({}, "none of them"), ({"images": "a", "texts": "b"}, "--images and --texts")):
        with pytest.raises(
            TrunklineError, match=rf"needs --images FOLDER, --audio FOLDER or --texts FILE, not {given}"
        ):
            predict(classifier.checkpoint, output=path, **flags)  # type: ignore[arg-type]
    with pytest.raises(TrunklineError, match=r"but of TextClassifier; give --texts instead of --images"):
        predict(classifier.checkpoint, images=str(tmp_path), output=path)
    with pytest.raises(
        TrunklineError, match=r"is no checkpoint of .*TextClassifier or TokenClassifier, but of MaskedLM; give such"
    ):
        predict(pretrained(tmp_path), texts=text, output=path)
    with pytest.raises(TrunklineError, match=r"--pair_column pair: .* was trained on single texts; leave it out"):
        predict(classifier.checkpoint, texts=text, output=path, pair_column="pair")
    with pytest.raises(TrunklineError, match=r"--text_column is for classes of texts, but .* is of tags of words"):
        predict(tagger.checkpoint, texts=text, output=path, text_column="a")
    with pytest.raises(
        TrunklineError, match=r"--output .*out\.conll: only tags can be written to a \.conll file; give"
    ):
        predict(classifier.checkpoint, texts=text, output=str(tmp_path / "out.conll"))
    content = torch.load(classifier.checkpoint, weights_only=True)
    del content["LabelledTextData"]["settings"]
    SafeCheckpointIO().save_checkpoint(content, tmp_path / "old.ckpt")
    with pytest.raises(TrunklineError, match=r"old\.ckpt does not say how its texts were prepared"):
        predict(str(tmp_path / "old.ckpt"), texts=text, output=path)


def test_positions_are_those_of_training(classifier: SimpleNamespace) -> None:
    state = classifier.data.state_dict()
    assert state["settings"] == {"max_length": 16, "text_column": "text", "pair_column": None}
    assert LENGTH > 16
