"""`trunkline evaluate` on pairs of texts: scores of translations by hand, the choice of the pairs, bad input."""

import inspect
import json
import random
import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from sacrebleu import corpus_bleu, corpus_chrf
from tiny import vit
from tiny_translator import (
    END,
    LANGUAGES,
    LONGEST_TARGET,
    REV,
    UP,
    by_hand,
    letters,
    network_config,
    random_network,
    save,
)
from torchmetrics.functional.text import rouge_score

from trunkline import TrunklineError
from trunkline.datamodules import ImageData
from trunkline.datamodules.splits import split_of
from trunkline.datamodules.translation.translation_data import TranslationData
from trunkline.modules.generation.beams import beam_search
from trunkline.modules.generation.decoding import GenerationConfig
from trunkline.modules.objectives.arguments import as_plain
from trunkline.modules.objectives.seq2seq import Seq2Seq
from trunkline.modules.training.checkpoints import SafeCheckpointIO
from trunkline.pipelines.cli import main
from trunkline.pipelines.evaluation.data import with_data_class
from trunkline.pipelines.evaluation.evaluate import evaluate

OWN = inspect.signature(evaluate).parameters


def sources(count: int = 12) -> list[str]:
    chance = random.Random(0)
    return ["".join(chance.choices("abcdef", k=chance.randint(1, 9))) for _ in range(count)]


def rows_for(texts: list[str], **cells: Any) -> list[dict[str, Any]]:
    """Pairs whose targets are right for every second row, and nearly so for the others."""
    network = random_network()
    targets = [by_hand(network, text) for text in texts]
    return [
        {"source": text, "target": f"{target}-" if n % 2 else target or "-", **cells}
        for n, (text, target) in enumerate(zip(texts, targets, strict=True))
    ]


def write(file: Path, rows: list[dict[str, Any]]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def judge(checkpoint: str, source: str, folder: Path, **options: Any) -> dict[str, Any]:
    """What `evaluate` writes. Options may be fields of the data."""
    fields = {name: value for name, value in options.items() if name not in OWN}
    own = {name: value for name, value in options.items() if name in OWN}
    output = folder / "out.json"
    evaluate(checkpoint, TranslationData(source, **fields), output=str(output), device="cpu", **own)
    found: dict[str, Any] = json.loads(output.read_text())
    return found


def values(found: dict[str, Any]) -> dict[str, float]:
    return {name: figure["value"] for name, figure in found["translation"].items()}


# --- scores


def test_scores_are_those_of_translations_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = rows_for(sources())
    path = write(tmp_path / "a.jsonl", rows)
    found = judge(save(tmp_path), path, tmp_path, batch_size=5)
    network = random_network()
    predictions, targets = [by_hand(network, row["source"]) for row in rows], [row["target"] for row in rows]
    bleu, chrf = corpus_bleu(predictions, [targets]), corpus_chrf(predictions, [targets])
    exact = sum(ours == right for ours, right in zip(predictions, targets, strict=True)) / len(rows)
    assert 0 < exact < 1
    assert values(found) == pytest.approx({"exact": exact, "bleu": bleu.score, "chrf": chrf.score})
    assert {name: found[name] for name in ("source", "split", "pairs")} == {
        "source": path,
        "split": "all",
        "pairs": 12,
    }
    signature = found["translation"]["chrf"]["signature"]
    assert re.fullmatch(r"nrefs:1\|case:mixed\|eff:yes\|nc:6\|nw:0\|space:no\|version:[\d.]+", signature)
    assert "signature" not in found["translation"]["exact"]
    printed = capsys.readouterr().out
    assert f"chrf: {signature}" in printed.splitlines()
    assert f"bleu: {found['translation']['bleu']['signature']}" in printed.splitlines()
    assert f"{exact:.4g}" in printed
    assert "chance" not in printed
    assert "12 pairs" in " ".join(printed.split())


def test_other_scores(tmp_path: Path) -> None:
    """ROUGE for summaries; BLEU of characters."""
    rows = rows_for(sources())
    path = write(tmp_path / "a.jsonl", rows)
    network = random_network()
    predictions, targets = [by_hand(network, row["source"]) for row in rows], [row["target"] for row in rows]
    rouge = rouge_score(predictions, [[target] for target in targets], rouge_keys=("rouge1", "rouge2", "rougeL"))
    found = judge(save(tmp_path), path, tmp_path, scores=["rouge", "bleu"], tokenize="char")
    want = {name: rouge[f"{name}_fmeasure"].item() for name in ("rouge1", "rouge2", "rougeL")}
    want["bleu"] = corpus_bleu(predictions, [targets], tokenize="char").score
    assert values(found) == pytest.approx(want)
    assert "tok:char" in found["translation"]["bleu"]["signature"]
    recipe = save(tmp_path, change=lambda c: c["hyper_parameters"].update(scores=["rouge"]))
    assert [*values(judge(recipe, path, tmp_path))] == ["exact", "bleu", "chrf", "rouge1", "rouge2", "rougeL"]
    no_scores = save(tmp_path, change=lambda c: c["hyper_parameters"].update(scores=[]))
    assert values(judge(no_scores, path, tmp_path)).keys() == {"exact", "bleu", "chrf"}


def test_beams_and_the_generation_of_the_recipe(tmp_path: Path) -> None:
    texts = sources()
    network, config = random_network(), GenerationConfig(LONGEST_TARGET, temperature=0, num_beams=3)
    targets = []
    for text in texts:
        decoder = network.decoder_of(torch.tensor([[*letters().encode(text).ids, END]]))
        best = beam_search(decoder, torch.tensor([[END]]), None, config, [END])[0][0]
        targets.append(letters().decode(best.tokens) or "-")
    path = write(tmp_path / "a.jsonl", [{"source": a, "target": b} for a, b in zip(texts, targets, strict=True)])
    full = sum(target != "-" for target in targets) / len(texts)
    plain = save(tmp_path)
    assert values(judge(plain, path, tmp_path, num_beams=3))["exact"] == full > 0.5
    assert values(judge(plain, path, tmp_path))["exact"] < full
    recipe = save(tmp_path, change=lambda c: c["hyper_parameters"].update(generation=asdict(config)))
    assert values(judge(recipe, path, tmp_path))["exact"] == full
    assert values(judge(recipe, path, tmp_path, num_beams=1))["exact"] < full


def test_each_row_has_its_language(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network, rows = random_network(), []
    for n, text in enumerate(sources()):
        language = LANGUAGES[n % 2]
        rows.append({"source": text, "lang": language, "target": by_hand(network, text, ((UP, REV)[n % 2],)) or "-"})
    checkpoint = save(tmp_path, {"languages": LANGUAGES})
    options: dict[str, Any] = {"language_column": "lang", "languages": LANGUAGES}  # as in training: may be repeated
    path = write(tmp_path / "a.jsonl", rows)
    full = sum(row["target"] != "-" for row in rows) / len(rows)
    assert values(judge(checkpoint, path, tmp_path, **options))["exact"] == full > 0.5
    swapped = write(tmp_path / "b.jsonl", [{**row, "lang": {"up": "rev", "rev": "up"}[row["lang"]]} for row in rows])
    assert values(judge(checkpoint, swapped, tmp_path, **options))["exact"] < full
    with pytest.raises(TrunklineError, match=r"a\.jsonl:1: the language of the target is not known; name the column"):
        judge(checkpoint, path, tmp_path)
    strange = write(tmp_path / "c.jsonl", [rows[0], {**rows[1], "lang": "de"}])
    with pytest.raises(TrunklineError, match=r"c\.jsonl:2: the network was not trained to write 'de', only up, rev; "):
        judge(checkpoint, strange, tmp_path, **options)


def test_sources_are_prepared_as_in_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the prefix of training, and cut to its length."""
    checkpoint = save(tmp_path, {"prefix": "be "})
    network = random_network()
    texts = ["abc", "abcdefabcdef"]
    rows = [{"source": text, "target": by_hand(network, ("be " + text)[:11]) or "-"} for text in texts]
    assert values(judge(checkpoint, write(tmp_path / "a.jsonl", rows), tmp_path))["exact"] == 1
    assert "1 of 2 sources were cut to 12 tokens, as in training" in capsys.readouterr().out


# --- which pairs


def test_the_choice_of_pairs(tmp_path: Path) -> None:
    """The first split that was not trained on; pairs of other sources are all new."""
    rows = rows_for(sources(20))
    shares = {"train": 0.75, "val": 0.25}
    count = {split: sum(split_of(n, shares) == split for n in range(20)) for split in shares}
    path, other = write(tmp_path / "trained.jsonl", rows), write(tmp_path / "other.jsonl", rows[:7])
    checkpoint = save(tmp_path, change=lambda c: c["TranslationData"].update(source=path))

    def chosen(source: str, **options: Any) -> tuple[str, str, int]:
        found = judge(checkpoint, source, tmp_path, **options)
        return Path(found["source"]).name, found["split"], found["pairs"]

    assert chosen(path) == ("trained.jsonl", "val", count["val"])  # with the share of training
    assert chosen(path, split="train") == ("trained.jsonl", "train", count["train"])
    assert chosen(path, split="all") == ("trained.jsonl", "all", 20)
    assert chosen(path, val_fraction=0.5)[2] != count["val"]
    assert chosen(path, test_fraction=0.3)[1] == "test"
    assert chosen(other) == ("other.jsonl", "all", 7)
    assert chosen(other, split="val", val_fraction=0.5)[1] == "val"
    assert chosen(path, test_source=other) == ("other.jsonl", "test", 7)
    assert chosen(path, val_source=other) == ("other.jsonl", "val", 7)
    with pytest.raises(TrunklineError, match=r"trained\.jsonl has no test split, only train, val; set test_fraction, "):
        chosen(path, split="test")
    with pytest.raises(TrunklineError, match=r"was trained on all pairs of .*; give pairs that it has not seen"):
        chosen(path, val_fraction=0.0)


def test_rows_of_a_split_are_those_of_training(tmp_path: Path) -> None:
    rows = rows_for(sources(20))
    shares = {"train": 0.75, "val": 0.25}
    checked = [{**row, "target": row["target"] if split_of(n, shares) == "val" else "f"} for n, row in enumerate(rows)]
    path = write(tmp_path / "trained.jsonl", checked)
    checkpoint = save(tmp_path, change=lambda c: c["TranslationData"].update(source=path))
    network = random_network()
    kept = [row for n, row in enumerate(rows) if split_of(n, shares) == "val"]
    exact = sum(by_hand(network, row["source"]) == row["target"] for row in kept) / len(kept)
    assert values(judge(checkpoint, path, tmp_path))["exact"] == pytest.approx(exact)


def test_two_files(tmp_path: Path) -> None:
    rows = rows_for(sources())
    files = [tmp_path / "a.src", tmp_path / "a.tgt"]
    for file, column in zip(files, ("source", "target"), strict=True):
        file.write_text("".join(row[column] + "\n" for row in rows))
    found = judge(save(tmp_path), str(files[0]), tmp_path, target_source=str(files[1]))
    table = judge(save(tmp_path), write(tmp_path / "a.jsonl", rows), tmp_path)
    assert values(found) == values(table)
    tested = {"test_source": str(files[0]), "test_target_source": str(files[1])}
    assert judge(save(tmp_path), "nowhere.jsonl", tmp_path, **tested)["split"] == "test"  # the rest is not read


def test_figures_of_the_test_in_training(tmp_path: Path) -> None:
    """A run's own test and `evaluate` on its checkpoint agree."""
    texts = sources(40)
    table = write(tmp_path / "a.jsonl", [{"source": text, "target": text[::-1]} for text in texts])
    test = write(tmp_path / "t.jsonl", rows_for(sources(9)))
    letters().save(str(tmp_path / "t.json"))
    data = TranslationData(
        table,
        test_source=test,
        tokenizer=str(tmp_path / "t.json"),
        max_length=12,
        max_target_length=10,
        batch_size=8,
        cache_dir=str(tmp_path / "cache"),
    )
    model = Seq2Seq(network_config())
    model.network.load_state_dict(random_network().state_dict())
    options: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    options |= {"enable_model_summary": False, "use_distributed_sampler": False, "accelerator": "cpu"}
    trainer = L.Trainer(max_steps=1, plugins=[SafeCheckpointIO()], **options)
    trainer.fit(model, datamodule=data)
    trainer.save_checkpoint(tmp_path / "own.ckpt")
    (want,) = trainer.test(model, datamodule=data, verbose=False)
    found = judge(str(tmp_path / "own.ckpt"), test, tmp_path, max_length=12)
    assert values(found) == pytest.approx({name: want[f"test/{name}"] for name in ("exact", "bleu", "chrf")})
    assert want["test/chrf"] > 0


# --- the command line


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ("--data.source dates:years", "TranslationData"),
        ("--data.source=phrases --what all", "TranslationData"),
        ("--data.source a.jsonl --what translation", "TranslationData"),
        ("--data.source a.jsonl --checkpoint CHECKPOINT", "TranslationData"),
        ("--data.source a.jsonl --what knn --checkpoint CHECKPOINT", "ImageData"),
        ("--data.source a.jsonl --checkpoint nowhere.ckpt", "ImageData"),
        ("--data.source openmoji --checkpoint CHECKPOINT", "ImageTextData"),
        ("--data.source a.jsonl --data ImageData --checkpoint CHECKPOINT", None),
    ],
)
def test_the_class_of_the_data(arguments: str, name: str | None, tmp_path: Path) -> None:
    given = arguments.replace("CHECKPOINT", save(tmp_path)).split()
    assert with_data_class(given) == (given if name is None else ["--data", name, *given])


def test_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["trunkline"])
    path, output = write(tmp_path / "a.jsonl", rows_for(sources())), tmp_path / "o.json"
    given = ["evaluate", "--checkpoint", save(tmp_path), "--data.source", path, "--device", "cpu"]
    main([*given, "--num_beams", "2", "--output", str(output)])
    assert values(json.loads(output.read_text())).keys() == {"exact", "bleu", "chrf"}
    capsys.readouterr()
    for options, message, flag in (
        (["--data.max_length=9"], "max_length=9 does not apply: texts are prepared as in", "--data.max_length"),
        (["--max_new_tokens=99"], "max_new_tokens=99 is more than the 11 tokens", "--max_new_tokens"),
        (["--split=test"], "has no test split, only train, val", "--split"),
        (["--tokenize=klingon"], "tokenize=klingon: sacreBLEU has no such tokenizer", "--tokenize"),
        (["--data.batch_size=0"], "batch_size must be at least 1, not 0", "--data.batch_size"),
        (["--data.source=nowhere.jsonl"], "there is no such file or folder here", "--data.source"),
    ):
        with pytest.raises(SystemExit):
            main([*given, *options])
        said, _, place = capsys.readouterr().err.strip().rpartition("\n")
        assert message in " ".join(said.split())
        assert place == f"  ({flag})"


# --- errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokenizer": "chars"}, "tokenizer=chars does not apply: texts are prepared as in the network's training"),
        ({"target_tokenizer": "chars"}, "target_tokenizer=chars does not apply"),
        ({"max_target_length": 64}, "max_target_length=64 does not apply"),
        ({"prefix": "to "}, "prefix=to  does not apply"),
        ({"languages": ["up", "de"]}, "languages=up, de does not apply"),
        ({"start_token": "<2up>"}, "start_token=<2up> does not apply"),
        (
            {"what": "knn"},
            "--what knn is for ImageData, but .* is read as TranslationData, which is measured by translation; choose",
        ),
        ({"k": 3}, "--k is for knn, but .* is measured by translation; leave it out"),
        ({"captions": "all"}, "--captions is for retrieval, but"),
        ({"num_beams": 0}, "num_beams must be at least 1"),
        ({"source_column": "text"}, "a.jsonl:1 has no 'text'; it has source, target"),
        ({"batch_size": 0}, "batch_size must be at least 1, not 0"),
    ],
)
def test_bad_input(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(TrunklineError, match=message):
        judge(save(tmp_path), write(tmp_path / "a.jsonl", rows_for(sources())), tmp_path, **options)


def test_fields_of_training_may_be_repeated(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", rows_for(sources()))
    repeated = {"max_length": 12, "max_target_length": 10, "start_token": "</s>"}
    checkpoint = save(tmp_path)
    assert values(judge(checkpoint, path, tmp_path, **repeated)) == values(judge(checkpoint, path, tmp_path))


def test_data_and_networks_of_other_kinds(tmp_path: Path) -> None:
    pairs = TranslationData(write(tmp_path / "a.jsonl", rows_for(sources())))
    translator = save(tmp_path)
    hyper_parameters = {"network": as_plain(vit())}
    content = {"objective": "ImageClassifier", "hyper_parameters": hyper_parameters, "state_dict": {}}
    SafeCheckpointIO().save_checkpoint(content, tmp_path / "v.ckpt")
    with pytest.raises(TrunklineError, match="is no checkpoint of Seq2Seq, but of ImageClassifier"):
        evaluate(str(tmp_path / "v.ckpt"), pairs, device="cpu")
    with pytest.raises(TrunklineError, match="of ContrastiveImageText or ImageClassifier, but of Seq2Seq"):
        evaluate(translator, ImageData("digits"), device="cpu")
    images: dict[str, Any]
    for images, message in (
        ({"what": "translation"}, "--what translation is for TranslationData, but digits is read as ImageData"),
        (
            {"split": "all"},
            "--split all is for TranslationData, SpeechData or AudioData, but digits is read as ImageData",
        ),
        (
            {"num_beams": 2},
            "--num_beams is for translation and transcription, but digits is measured by zero_shot, knn, linear_probe",
        ),
        ({"scores": ["bleu"]}, "--scores is for translation, but"),
    ):
        with pytest.raises(TrunklineError, match=message):
            evaluate(translator, ImageData("digits"), device="cpu", **images)
