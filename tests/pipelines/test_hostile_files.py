"""Files that would run code if they were read carelessly: nothing of them runs, and the message says what to use."""

import json
import pickle
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.demos.boring_classes import BoringModel
from tiny import classifier, fit, vit

from trunkline import TrunklineError
from trunkline.datamodules.tokenizers import load_tokenizer
from trunkline.files import load_checkpoint
from trunkline.modules.networks import ViT
from trunkline.modules.training.checkpoints import SafeCheckpointIO
from trunkline.pipelines.cli import main
from trunkline.pipelines.configs import config_names
from trunkline.pipelines.unnamed_configs import refuse_foreign
from trunkline.run_folders import newest_valid
from trunkline.seal import proves_itself, seal

INSTEAD = "checkpoint that `trunkline fit` wrote, or weights as safetensors"


class Hostile:
    """Unpickling it makes a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.trace,)


@pytest.fixture
def trace(tmp_path: Path) -> Iterator[Path]:
    """The file that shows that code has run; none has at the end of the test."""
    yield tmp_path / "trace"
    assert not (tmp_path / "trace").exists()


@pytest.fixture
def hostile(trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint as of a run, with a digest that fits, where torch is told to load anything."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    path = tmp_path / "runs/vit/one/checkpoints/last.ckpt"
    path.parent.mkdir(parents=True)
    needed = {"state_dict": {}, "epoch": 0, "global_step": 9, "pytorch-lightning_version": "2.6", "loops": {}}
    torch.save({**needed, "callbacks": {}, "hyper_parameters": Hostile(trace)}, path)
    seal(path)
    assert proves_itself(path)
    return path


@pytest.fixture
def message(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Run a command that must fail with one message, and return that in one line."""
    monkeypatch.setattr(sys, "argv", ["trunkline"])

    def run(*arguments: str) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main(list(arguments))
        output = capsys.readouterr().err
        assert stop.value.code == 2
        assert output.count("error:") == 1, output
        assert "Traceback" not in output
        return " ".join(output.split())

    return run


COMMANDS = [
    "fit --config vit/digits --resume FILE",
    "fit --config vit/digits --model.init_from FILE",
    "test --config vit/digits --ckpt_path FILE",
    "validate --ckpt_path FILE",
    "predict --images . --output out.csv --checkpoint FILE",
    "generate --prompt x --checkpoint FILE",
    "fit --config gpt/demo --data.vocab_size null --data.tokenizer FILE",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_runs_a_pickle(command: str, hostile: Path, trace: Path, message: Callable[..., str]) -> None:
    shutil.copy("runs/vit/one/checkpoints/last.ckpt", "weights.ckpt")
    config = yaml.safe_load((Path(__file__).parents[2] / "configs/vit/digits.yaml").read_text())
    (hostile.parents[1] / "config.yaml").write_text(yaml.safe_dump({"model": config["model"], "data": config["data"]}))
    said = message(*command.replace("FILE", str(hostile)).split())
    assert "last.ckpt is not a checkpoint of plain data" in said
    assert INSTEAD in said
    assert "weights_only" not in said  # torch's own advice
    assert not trace.exists()
    torch.load(hostile, weights_only=False)  # elsewhere it does run
    assert trace.exists()
    trace.unlink()


def raw(content: Any, path: Path) -> None:
    path.write_bytes(pickle.dumps(content))


def legacy(content: Any, path: Path) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize("name", ["weights.ckpt", "weights.pt", "pytorch_model.bin"])
@pytest.mark.parametrize("write", [torch.save, legacy, raw])
def test_no_reader_runs_a_pickle(
    write: Callable[[Any, Path], None], name: str, hostile: Path, trace: Path, tmp_path: Path
) -> None:
    path = tmp_path / "other" / name
    path.parent.mkdir()
    write({"state_dict": {"x": Hostile(trace)}, "global_step": 5}, path)
    readers: list[Callable[[], Any]] = [
        lambda: load_checkpoint(path),
        lambda: load_checkpoint(path, mmap=True),
        lambda: SafeCheckpointIO().load_checkpoint(path, weights_only=False),
        lambda: ViT.from_checkpoint(path),
        lambda: classifier(init_from=str(path)),
    ]
    for read in readers:
        with pytest.raises(TrunklineError, match=INSTEAD):
            read()
    with pytest.raises(TrunklineError, match=r"give|fix the path"):
        load_tokenizer(str(path))
    assert newest_valid(path.parent)[0] is None


def test_a_backbone_whose_files_are_pickles(trace: Path, tmp_path: Path) -> None:
    """Weights and configuration of `save_pretrained`, and a tokenizer, replaced one after the other."""
    folder = tmp_path / "backbone"
    ViT(vit()).save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    torch.save({"x": Hostile(trace)}, folder / "pytorch_model.bin")  # nobody reads it
    assert ViT.from_pretrained(folder).config.image_size == 8
    for name in ("tokenizer.json", "model.safetensors", "config.json"):
        raw({"x": Hostile(trace)}, folder / name)
        with pytest.raises(TrunklineError, match=r"give|needs"):
            load_tokenizer(str(folder))
        if name != "tokenizer.json":
            for read in (lambda: ViT.from_pretrained(folder), lambda: classifier(init_from=str(folder))):
                with pytest.raises(
                    TrunklineError,
                    match=r"cannot read .*(model\.safetensors|config\.json)|give",
                ):
                    read()
    (folder / "config.json").write_text("[1]")
    with pytest.raises(TrunklineError, match=r"config\.json is no JSON object"):
        ViT.from_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"network": "dataclasses", "image_size": 8}))
    with pytest.raises(TrunklineError, match="describes a dataclasses, which is no network"):
        ViT.from_pretrained(folder)


# --- URLs


@pytest.fixture
def server(hostile: Path) -> Iterator[tuple[str, list[str]]]:
    """The URL of the hostile checkpoint, and the requests that came for it."""
    requests: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            requests.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(hostile.read_bytes())

        do_HEAD = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as served:
        thread = threading.Thread(target=served.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{served.server_port}/last.ckpt", requests
        served.shutdown()
        thread.join()


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_reads_a_url(
    command: str, server: tuple[str, list[str]], trace: Path, message: Callable[..., str]
) -> None:
    url, requests = server
    said = message(*command.replace("FILE", url).split())
    assert requests == []
    if "init_from" in command:
        assert f"'{url}' is no folder; fix the path, or give the name of a hub repository" in said
    elif "tokenizer" in command:
        assert "there is no file http:/127.0.0.1" in said
    else:
        assert f"there is no file {url}: nothing is loaded from a URL, so download the file first" in said


def test_lightning_reads_no_url(server: tuple[str, list[str]], trace: Path, tmp_path: Path) -> None:
    """Its own reader does, and runs what it finds."""
    url, requests = server
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    trainer = L.Trainer(max_steps=1, plugins=[SafeCheckpointIO()], default_root_dir=tmp_path, **quiet)
    with pytest.raises(TrunklineError, match=f"there is no file {url}: nothing is loaded from a URL"):
        trainer.fit(BoringModel(), ckpt_path=url, weights_only=False)
    assert requests == []


# --- configs


MAKE = '!!python/object/apply:os.mkdir ["trace"]'
NAMED = '!!python/name:os.system ""'


@pytest.mark.parametrize("tag", [MAKE, NAMED])
def test_tags_of_yaml_make_no_objects(tag: str, hostile: Path, trace: Path, message: Callable[..., str]) -> None:
    """In a config that is named, in one beside a checkpoint, and in a flag."""
    text = f"trainer:\n  max_steps: {tag}\n"
    Path("own.yaml").write_text(text)
    (hostile.parents[1] / "config.yaml").write_text(text)
    for arguments in (
        ["fit", "--config", "vit/digits", "--config", "own.yaml"],
        ["test", "--ckpt_path", str(hostile)],
        ["fit", "--config", "vit/digits", "--trainer.max_steps", tag],
        ["fit", "--config", "vit/digits", "--data", tag],
    ):
        said = message(*arguments)
        assert "tag" in said or "must be" in said, said
    assert yaml.unsafe_load(MAKE) is None  # elsewhere it does run
    trace.rmdir()


OWN = {
    "class_path": "trunkline.modules.objectives.image_classifier.ImageClassifier",
    "init_args": {"network": {"image_size": 8}},
}
DATA = {"class_path": "trunkline.datamodules.ImageData", "init_args": {"source": "own.csv", "batch_size": 8}}
PROBES = {
    "class_path": "trunkline.pipelines.evaluation.ImageProbes",
    "init_args": {"data": {"source": "own.csv"}, "monitor": "evil.txt"},
}
MODEL_CHECKPOINT = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"filename": "{step}"}}
CALLS = {"class_path": "lightning.pytorch.callbacks.LambdaCallback", "init_args": {"on_test_start": "evil.run"}}
NESTED = {"class_path": "lightning.pytorch.callbacks.LambdaCallback", "init_args": {"on_test_start": {}}}
NESTED["init_args"]["on_test_start"] = {"class_path": "lightning.pytorch.cli.os.system", "init_args": {}}  # type: ignore[index]
FOREIGN: list[tuple[str, Any, str]] = [
    ("model", {**OWN, "class_path": "evil.Model"}, "evil.Model"),
    ("model", {**OWN, "class_path": "lightning.pytorch.demos.BoringModel"}, "lightning.pytorch.demos.BoringModel"),
    ("model", "evil.Model", "evil.Model"),
    ("model", "sub/evil.yaml", "sub/evil.yaml"),
    ("model", {**OWN, "init_args": {"network": {"class_path": "evil.Network"}}}, "evil.Network"),
    ("model", {**OWN, "init_args": {"facts": {"pair": "evil.pair"}}}, "evil.pair"),
    ("data", {**DATA, "class_path": "evil.Data"}, "evil.Data"),
    ("data", ["evil.Data"], "['evil.Data']"),
    ("trainer", "sub/evil.yaml", "sub/evil.yaml"),
    ("trainer", {"callbacks": [MODEL_CHECKPOINT, {"class_path": "evil.Callback"}]}, "evil.Callback"),
    ("trainer", {"callbacks": ["evil.Callback"]}, "evil.Callback"),
    ("trainer", {"callbacks": "sub/evil.yaml"}, "sub/evil.yaml"),
    ("trainer", {"callbacks": [CALLS]}, "evil.run"),
    ("trainer", {"callbacks": [NESTED]}, "lightning.pytorch.cli.os.system"),
    ("trainer", {"callbacks": [{**PROBES, "init_args": {"data": {"class_path": "evil.Data"}}}]}, "evil.Data"),
    ("trainer", {"strategy": {"class_path": "subprocess.Popen", "init_args": {"args": ["ls"]}}}, "subprocess.Popen"),
    ("trainer", {"logger": "evil.Logger"}, "evil.Logger"),
]


@pytest.mark.parametrize(("part", "content", "name"), FOREIGN)
def test_an_unnamed_config_decides_no_code(part: str, content: Any, name: str, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/evil.yaml").write_text("callbacks: [evil.Callback]")
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({"seed_everything": 0, "model": OWN, "data": DATA, part: content}))
    with pytest.raises(TrunklineError) as caught:
        refuse_foreign(config)
    said = str(caught.value)
    assert f" names {name}, which is no class of Trunkline; " in said
    assert said.endswith(f"if you trust it, name it: --config {config}")
    line = said.partition(", line ")[2].partition(",")[0]
    if line:
        assert name in config.read_text().splitlines()[int(line) - 1]
    assert line or name == "['evil.Data']"


def test_an_unnamed_config_of_trunkline_is_obeyed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names of files in the data, of files of the same name as modules, and classes of both packages."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.csv").touch()
    trainer = {"callbacks": [MODEL_CHECKPOINT, PROBES], "logger": "lightning.pytorch.loggers.CSVLogger"}
    trainer |= {"precision": "16-mixed", "strategy": {"class_path": "lightning.pytorch.strategies.DDPStrategy"}}
    config = tmp_path / "config.yaml"
    for rest in ({}, {"model": {**OWN, "class_path": "ImageClassifier"}}, {"trainer": None}):
        config.write_text(yaml.safe_dump({"model": OWN, "data": DATA, "trainer": trainer, "name": "a.b", **rest}))
        refuse_foreign(config)


@pytest.mark.parametrize("machine", [name for name in config_names() if name.startswith("trainer/")])
def test_what_a_run_on_any_machine_saves_is_obeyed(
    machine: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["fit", "--config", "vit/digits", "--config", machine, "--print_config"])
    (tmp_path / "config.yaml").write_text(capsys.readouterr().out)
    refuse_foreign(tmp_path / "config.yaml")


EVIL = """
import pathlib
from trunkline.modules.objectives.image_classifier import ImageClassifier
pathlib.Path("trace").touch()
class Model(ImageClassifier):
    pass
"""


@pytest.mark.parametrize("command", ["test", "validate"])
def test_a_foreign_run_imports_nothing_until_its_config_is_named(
    command: str, trace: Path, tmp_path: Path, message: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The module lies where it would be found, beside the run."""
    monkeypatch.chdir(tmp_path)
    module = f"evil_{command}"
    (tmp_path / f"{module}.py").write_text(EVIL)
    checkpoint = tmp_path / "run/checkpoints/last.ckpt"
    checkpoint.parent.mkdir(parents=True)
    fit(classifier(), tmp_path, [], plugins=[SafeCheckpointIO()]).save_checkpoint(checkpoint, weights_only=False)
    config = tmp_path / "run/config.yaml"
    text = (Path(__file__).parents[2] / "configs/vit/digits.yaml").read_text()
    config.write_text(text.replace("class_path: ImageClassifier", f"class_path: {module}.Model"))
    said = message(command, "--ckpt_path", "run")
    assert f"run/config.yaml, line {1 + text[: text.index('class_path: ImageC')].count(chr(10))}," in said
    assert f"names {module}.Model, which is no class of Trunkline" in said
    assert "name it: --config run/config.yaml" in said
    assert module not in sys.modules
    message(command, "--ckpt_path", "run", "--config", "run/config.yaml")  # another network than the recipe's
    assert trace.exists()
    trace.unlink()
