"""`fit --model.init_from FILE`: sizes come from the checkpoint, classes from the data, conflicts are told together."""

import re
from pathlib import Path
from typing import Any

import pytest
import tiny_clip
import torch
import yaml
from small_data import word_tokenizer
from task_files import LENGTH, WORDS, labelled, pretrained, tagged

from trunkline.files import load_checkpoint
from trunkline.modules.networks import GPT, ViT
from trunkline.pipelines.cli import main
from trunkline.seal import seal

BODY = "--model.network.bert"
SHORT = "--trainer.accelerator cpu --trainer.max_epochs 1 --data.batch_size 4"


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    return pretrained(tmp_path_factory.mktemp("bert"))


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "500")
    for variable in ("TRUNKLINE_RUN", "PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        monkeypatch.setenv(variable, "")  # so that it is restored
        monkeypatch.delenv(variable)


def command(recipe: str, source: str, bert: str) -> list[str]:
    """The documented one."""
    given = f"fit --config bert/{recipe} --data.source {source} --model.init_from {bert} --data.tokenizer {bert}"
    return given.split()


def csv_of(folder: Path) -> str:
    (folder / "cls.csv").write_text("text,label\n" + "the film was good,a\na bad film,b\nwho saw anna,c\n" * 20)
    return str(folder / "cls.csv")


def test_the_documented_command_needs_no_other_flag(bert: str, tmp_path: Path) -> None:
    main([*command("classify", csv_of(tmp_path), bert), "--trainer.accelerator", "cpu"])
    (run,) = tmp_path.glob("runs/bert/classify/*")
    trained, start = load_checkpoint(run / "checkpoints/last.ckpt"), load_checkpoint(bert)
    network, body = trained["hyper_parameters"]["network"], start["hyper_parameters"]["network"]
    assert network["num_outputs"] == 3
    assert trained["LabelledTextData"]["class_names"] == ["a", "b", "c"]
    assert trained["LabelledTextData"]["settings"]["max_length"] == LENGTH  # not 128, which the network cannot see
    rates = {"dropout": 0.1}  # of the recipe's network: they are no size
    assert network["bert"] == body | {"backbone": body["backbone"] | rates}
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["model"]["init_args"]["network"]["bert"] == network["bert"]  # the same network without the file


def test_the_folder_of_a_run_serves_too(bert: str, tmp_path: Path) -> None:
    """For the weights, and for the tokenizer, whose network limits the rows."""
    (tmp_path / "pretrained/checkpoints").mkdir(parents=True)
    torch.save(load_checkpoint(bert) | {"global_step": 1}, last := tmp_path / "pretrained/checkpoints/last.ckpt")
    seal(last)
    main([*command("classify", csv_of(tmp_path), "pretrained"), *SHORT.split()])
    (run,) = tmp_path.glob("runs/bert/classify/*")
    content = load_checkpoint(run / "checkpoints/last.ckpt")
    assert content["LabelledTextData"]["settings"]["max_length"] == LENGTH


def test_tags_too(bert: str, tmp_path: Path) -> None:
    main([*command("tagging", tagged(tmp_path), bert), *SHORT.split()])
    (run,) = tmp_path.glob("runs/bert/tagging/*")
    content = load_checkpoint(run / "checkpoints/last.ckpt")
    assert content["hyper_parameters"]["network"]["num_outputs"] == 3
    assert content["TaggedTextData"]["settings"]["max_length"] == LENGTH


def test_what_is_stated_and_differs_is_told_once_and_together(
    bert: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where the stated value is the default, as 768 is."""
    stated = f"{BODY}.backbone.dim 768 {BODY}.backbone.depth 3 {BODY}.backbone.mlp relu {BODY}.num_segments 0"
    with pytest.raises(SystemExit) as stop:
        main([*command("classify", labelled(tmp_path), bert), *stated.split()])
    assert stop.value.code == 2
    message = " ".join(capsys.readouterr().err.partition("error:")[2].split())
    place = "network.bert"
    assert message == (
        f"init_from {bert} was trained with num_segments=2, dim=32, depth=2 and mlp=gelu, but the network has 0, 768, "
        f"3 and relu; set {place}.num_segments to 2, {place}.backbone.dim to 32, {place}.backbone.depth to 2 and "
        f"{place}.backbone.mlp to gelu (--model.network.bert.num_segments)"
    )
    assert not (tmp_path / "runs").exists()


def test_a_row_that_is_stated_and_too_long_is_told(
    bert: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([*command("classify", labelled(tmp_path), bert), "--data.max_length", "64"])
    said = " ".join(capsys.readouterr().err.split())
    assert f"have max_length={LENGTH}, but the data needs at least 64; set the data's max_length to at most" in said
    assert "(--data.max_length)" in said


def test_a_mapping_in_a_flag_states_its_keys(bert: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([*command("classify", labelled(tmp_path), bert), BODY, "{backbone: {depth: 12}}"])
    assert "was trained with depth=2, but the network has 12" in " ".join(capsys.readouterr().err.split())


def test_stated_rates_are_kept(bert: str, tmp_path: Path) -> None:
    flags = f"{SHORT} {BODY}.backbone.dropout 0.3 --model.network.dropout 0"
    main([*command("classify", labelled(tmp_path), bert), *flags.split()])
    (run,) = tmp_path.glob("runs/bert/classify/*")
    network = load_checkpoint(run / "checkpoints/last.ckpt")["hyper_parameters"]["network"]
    assert (network["bert"]["backbone"]["dropout"], network["dropout"]) == (0.3, 0)
    assert (network["bert"]["backbone"]["dim"], network["bert"]["vocab_size"]) == (32, len(WORDS) + 5)


def trained_without(starts: list[Path], given: list[str], capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    """Train an epoch, remove what the run started from, validate, test and train another epoch: both checkpoints."""
    small = "--trainer.accelerator cpu --data.batch_size 4 --data.val_fraction 0.25 --data.test_fraction 0.25"
    given = [*given, *small.split(), "--test_with", "last"]
    main([*given, "--trainer.max_epochs", "1"])
    (last,) = Path("runs").rglob("last.ckpt")
    first, table = load_checkpoint(last), figures(capsys.readouterr().out)
    for start in starts:
        start.rename(start.with_name(f"{start.name} is gone"))
    with pytest.raises(SystemExit):
        main([*given, "--trainer.max_epochs", "2"])  # a new run needs them
    assert str(starts[0]) in " ".join(capsys.readouterr().err.split())
    for split, command in (("val", "validate"), ("test", "test")):
        for arguments in ([command], [command, *given[1:]]):
            main([*arguments, "--ckpt_path", str(last)])
            found = figures(capsys.readouterr().out)
            assert found == [(name, figure) for name, figure in table if name.startswith(f"{split}/")] != []
    main([*given, "--trainer.max_epochs", "2", "--resume", "auto"])
    again = load_checkpoint(last)
    assert again["global_step"] == 2 * first["global_step"] > 0
    return [first, again]


def test_the_weights_and_the_tokenizer_may_be_gone_later(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """For a resume, `validate` and `test`: the checkpoint has both, and the network's sizes."""
    start = pretrained(tmp_path)
    first, again = trained_without([Path(start)], command("classify", labelled(tmp_path), start), capsys)
    assert f"there is no tokenizer {start} any more: taking that in runs/bert/classify/" in caplog.text
    for part in ("hyper_parameters", "LabelledTextData"):  # with the name of the file, for the record
        for field in ("network", "init_from", "tokenizer", "class_names"):
            assert again[part].get(field) == first[part].get(field)
    assert first["hyper_parameters"]["init_from"] == start


def test_the_towers_may_be_gone_later(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a CLIP whose recipe leaves their sizes out."""
    towers, starts = tiny_clip.module().network, [tmp_path / "image", tmp_path / "text"]
    ViT(towers.config.image).save_pretrained(starts[0])
    GPT(towers.config.gpt).save_pretrained(starts[1])
    tiny_clip.tokenizer().save(str(tmp_path / "words.json"))
    rows = [(colour, [f"a {colour} thing"]) for colour in tiny_clip.COLOURS] * 6
    names = {"init_image_from": str(starts[0]), "init_text_from": str(starts[1])}
    network = {"dim": 8, "image": {"pool": "mean"}, "gpt": {}}
    model = {"class_path": "ContrastiveImageText", "init_args": {"network": network, **names}}
    data = {"source": str(tiny_clip.listed(tmp_path / "pairs", rows)), "tokenizer": str(tmp_path / "words.json")}
    data |= {"image_size": 8, "channels": 3, "max_length": 6, "num_workers": 0}
    recipe = {"model": model, "data": {"class_path": "ImageTextData", "init_args": data}}
    (tmp_path / "clip.yaml").write_text(yaml.safe_dump(recipe))
    first, again = trained_without(starts, ["fit", "--config", "clip.yaml"], capsys)
    assert again["hyper_parameters"] == first["hyper_parameters"]
    assert first["hyper_parameters"]["network"]["image"]["backbone"]["dim"] == towers.config.image.backbone.dim
    assert names.items() <= first["hyper_parameters"].items()


def figures(output: str) -> list[tuple[str, str]]:
    return re.findall(r"((?:test|val)/\S+) +│ ([\d.]+)", output)


def test_another_tokenizer_is_refused_when_the_weights_are_gone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The checkpoint's own is the one to compare with."""
    start = pretrained(tmp_path)
    given = [*command("classify", labelled(tmp_path), start), *SHORT.split()]
    main(given)
    Path(start).unlink()
    word_tokenizer([*WORDS[1:], "the"]).save(str(tmp_path / "tokenizer.json"))
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main([*given, "--data.tokenizer", "./tokenizer.json", "--data.max_length", str(LENGTH), "--resume", "auto"])
    said = " ".join(capsys.readouterr().err.split())
    assert "the checkpoint was trained with another tokenizer than" in said
    assert "(--data.tokenizer)" in said
