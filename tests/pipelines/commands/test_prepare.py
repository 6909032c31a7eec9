"""`trunkline prepare`: the data section of a recipe, and nothing else of it."""

import json
import sys
from pathlib import Path

import pytest

from trunkline import TrunklineError
from trunkline.pipelines.commands.prepare import own_arguments, run_prepare

RECIPE = """
model:
  class_path: ImageClassifier
  init_args: {{network: {{image_size: 16, no_such_field: 3}}}}
data:
  class_path: TextData
  init_args: {{source: {path}, tokenizer: chars, max_length: 8, cache_dir: {cache}}}
trainer:
  max_epochs: 45
  callbacks+:
    - class_path: no.such.Callback
threads: 1
test_with: last
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "in.txt").write_text("to be or not to be, that is the question\n" * 50)
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(path=tmp_path / "in.txt", cache=tmp_path / "cache"))
    monkeypatch.setattr(sys, "argv", ["trunkline"])
    return str(tmp_path / "recipe.yaml")


def test_prepares_what_the_data_section_says(recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--trainer.max_epochs", "3", "--trainer.devices=2", "--seed_everything", "1", "--data.val_fraction", "0.5"]
    run_prepare(["prepare", "--config", recipe, "--config", "trainer/cpu", *flags])
    printed = capsys.readouterr().out
    folder = next(f for f in (tmp_path / "cache").iterdir() if f.is_dir())
    assert str(folder) in printed
    assert (folder / "index.json").exists()
    for split in ("train", "val"):
        assert f"{split} " in printed
    assert printed.count("1,026 tokens, 1 documents, 0.0 MB of text") == 2  # half of 50 lines of 41, and an end
    assert "tokens of chars" in printed
    assert "MB/s" in printed


def test_needs_no_recipe(tmp_path: Path, recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"source": tmp_path / "in.txt", "tokenizer": "chars", "cache_dir": tmp_path / "cache"}
    run_prepare(["--data", "TextData", *(f"--data.{name}={value}" for name, value in options.items())])
    assert "1,846 tokens" in capsys.readouterr().out


@pytest.mark.parametrize("own", [False, True])
def test_prepares_pairs(own: bool, tmp_path: Path, recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [json.dumps({"source": "to be " * (n % 3 + 1), "target": "or not"}) + "\n" for n in range(20)]
    (tmp_path / "pairs.jsonl").write_text("".join(rows))
    options = {"source": tmp_path / "pairs.jsonl", "tokenizer": "chars", "cache_dir": tmp_path / "cache"}
    options |= {"max_length": 13, "too_long": "skip", **({"target_tokenizer": "chars"} if own else {})}
    run_prepare(["--data", "TranslationData", *(f"--data.{name}={value}" for name, value in options.items())])
    printed = " ".join(capsys.readouterr().out.split())
    assert "train pairs │ 19 pairs, 5 of them too long and left out" in printed
    assert "val pairs │ 1 pairs, 1 of them too long and cut" in printed
    if own:
        expected = ["train sources │ 235 tokens, 19 documents", "train targets │ 133 tokens, 19 documents"]
        expected += ["vocabulary │ 7 tokens of chars", "of the targets │ 7 tokens of chars"]
    else:
        expected = ["train │ 368 tokens, 38 documents", "vocabulary │ 9 tokens of chars"]
    assert [part for part in expected if part not in printed] == []
    assert printed.count(f"{tmp_path}/cache/") == 1 + own


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run_prepare(["prepare", "--help"])
    printed = capsys.readouterr().out
    assert "usage: trunkline prepare" in printed
    assert "--trainer" not in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "trunkline prepare needs a recipe"),
        (["--config", "vit/no_such"], "there is no config 'vit/no_such'"),
        (["--config", "RECIPE", "--data.sorce", "x"], "there is no option --data.sorce; did you mean '--data.source'"),
        (["--config", "RECIPE", "--data.max_length", "x"], "--data.max_length must be int, not 'x'"),
        (["--config", "RECIPE", "--data.source", "/no/such.txt"], "source=/no/such.txt: there is no such file"),
        (["--config", "RECIPE", "--traner.max_epochs", "3"], "there is no option --traner.max_epochs"),
    ],
)
def test_bad_input_names_the_flag(arguments: list[str], message: str, recipe: str) -> None:
    with pytest.raises(TrunklineError) as caught:
        run_prepare(["prepare", *(recipe if a == "RECIPE" else a for a in arguments)])
    assert message in str(caught.value)


def test_other_data_has_nothing_to_prepare(capsys: pytest.CaptureFixture[str]) -> None:
    run_prepare(["prepare", "--config", "vit/digits"])
    assert "ImageData keeps nothing" in capsys.readouterr().out


def test_flags_of_other_sections_are_left_out() -> None:
    given = (
        "--config a --model.x 1 --model.y=2 -c b --trainer.callbacks+ C --data.source p --compile true --data.seed 3"
    )
    assert own_arguments(given.split()) == ["--config", "a", "-c", "b", "--data.source", "p", "--data.seed", "3"]
    assert own_arguments(["--trainer.fast_dev_run", "--data.seed", "3"]) == ["--data.seed", "3"]
    assert own_arguments(["--model.shift", "-1", "--data.seed", "3"]) == ["--data.seed", "3"]
