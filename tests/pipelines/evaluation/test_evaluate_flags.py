"""The command line of `trunkline evaluate`: the data's flags, their class where none is given, and messages."""

import re
from pathlib import Path

import pytest
from tiny_clip import folders, save

from trunkline.pipelines.cli import main
from trunkline.pipelines.evaluation.data import with_data_class


def test_messages_name_the_commands_own_flags(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Below the message is a flag: the wrong one, or one that can fix the error."""
    monkeypatch.setattr("sys.argv", ["trunkline"])
    source = str(folders(tmp_path / "images", 1))
    given = ["evaluate", "--checkpoint", save(tmp_path), "--data.source", source, "--what=zero_shot", "--device", "cpu"]
    given += ["--data.val_fraction", "0", "--data.test_fraction", "0"]
    for options, expected, flag in (
        (["--split", "train", "--class_names", "[a]"], "class_names has 1 names, .* give 4 names$", "--class_names"),
        (["--split=train", "--templates=a photo"], "cannot read templates a photo: ", "--templates"),
        (["--split=test"], "has no test split, only train; ", "--data.source"),
        (["--data.image_size=8"], "image_size=8 does not apply", "--data.image_size"),
        (["--data.channels=2"], "channels must be 1 .grey. or 3 .RGB., not 2", "--data.channels"),
        (["--split=test", "--data.batch_size=0"], "batch_size must be at least 1, not 0", "--data.batch_size"),
    ):
        with pytest.raises(SystemExit):
            main([*given, *options])
        message, _, place = capsys.readouterr().err.strip().rpartition("\n")
        assert re.search(expected, " ".join(message.split()))
        assert place == f"  ({flag})"


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ("--data.source digits", "ImageData"),
        ("--data.source=openmoji --what all", "ImageTextData"),
        ("--data.init_args.source twemoji", "ImageTextData"),
        ("--data.source list.jsonl --data.caption_column text", "ImageTextData"),
        ("--data.source list.jsonl --data.image_folder images", "ImageTextData"),
        ("--data.source list.jsonl --what=retrieval", "ImageTextData"),
        ("--data.source images --data.label_column text --what knn", "ImageData"),
        ("--data.source openmoji --data ImageData", None),
        ("--data=ImageData --data.source openmoji", None),
        ("--data.class_path ImageData --data.source openmoji", None),
        ("--data.help ImageTextData", None),
        ("--what retrieval", None),
        ("--help", None),
        ("--config no_class.yaml", "ImageTextData"),
        ("--config no_class.yaml --data.source digits", "ImageData"),
        ("--config class.yaml --data.source openmoji", None),
    ],
)
def test_the_class_of_the_data(
    arguments: str, name: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "no_class.yaml").write_text("data: {source: openmoji}\n")
    (tmp_path / "class.yaml").write_text("data:\n  class_path: ImageData\n  init_args: {batch_size: 3}\n")
    given = arguments.split()
    assert with_data_class(given) == (given if name is None else ["--data", name, *given])


@pytest.mark.parametrize("name", ["ImageData", "ImageTextData"])
def test_help(name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The help explains the fields of the data as `trunkline fit` does."""
    monkeypatch.setattr("sys.argv", ["trunkline"])
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", "--data.help", name])
    assert not stop.value.code
    said = " ".join(capsys.readouterr().out.split())
    assert "--data.val_fraction VAL_FRACTION Share of the training rows to" in said
    assert ("--data.caption_column CAPTION_COLUMN Column that holds the captions" in said) == (name == "ImageTextData")
