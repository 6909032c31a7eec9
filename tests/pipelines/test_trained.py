"""The reader of checkpoints: old ones and new ones, of Trunkline's own classes and of somebody else's."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from task_files import pretrained, words
from tiny import classifier
from tiny_clip import COLOURS, PREPROCESSING, save, tokenizer
from torch import nn

from trunkline import TrunklineError
from trunkline.modules.networks import BERT, CLIP, Network, ViT
from trunkline.modules.objectives.base import TrunklineModule
from trunkline.modules.objectives.image_classifier import ImageClassifier
from trunkline.modules.training.checkpoints import SafeCheckpointIO, load_checkpoint
from trunkline.pipelines.objectives import KINDS, able, data_classes, import_class, objective_classes
from trunkline.pipelines.trained import Trained, read_language_model


def rewritten(file: str, **changes: Any) -> str:
    """The checkpoint with some of its content replaced; None removes it."""
    content = {name: value for name, value in (load_checkpoint(file) | changes).items() if value is not None}
    SafeCheckpointIO().save_checkpoint(content, file)
    return file


def paths(**own: str) -> dict[str, str]:
    """What a MaskedLM's checkpoint says of its classes, or something else."""
    return {
        "objective": "trunkline.modules.objectives.masked_lm.MaskedLM",
        "network": "trunkline.modules.networks.bert.BERT",
        "data": "trunkline.datamodules.text.masked_text.MaskedTextData",
        **own,
    }


def test_the_table_is_complete() -> None:
    """Every objective stands there under its name, and every class that it names can be imported."""
    folder = Path(sys.modules[TrunklineModule.__module__].__file__ or "").parent
    for file in folder.glob("*.py"):
        __import__(f"trunkline.modules.objectives.{file.stem}")

    def below(cls: type) -> set[type]:
        return {cls}.union(*(below(child) for child in cls.__subclasses__()))

    own = {cls for cls in below(TrunklineModule) if cls.__module__.startswith("trunkline.modules.objectives.")}
    concrete = own - {cls for cls in own if cls.__subclasses__() and cls.__name__ not in KINDS}
    assert concrete == set(objective_classes())
    assert [cls.__name__ for cls in objective_classes()] == list(KINDS)
    for kind in KINDS.values():
        assert issubclass(import_class(kind.network), Network)
    assert len(set(data_classes())) == len(KINDS) - 1  # both that write what is said take the same
    assert able("generate") == ["CausalLM"]
    assert able("no command") == []


@pytest.mark.parametrize("classes", [None, paths()])
def test_old_and_new_checkpoints(classes: Any, tmp_path: Path) -> None:
    """A new one names its classes; of an old one the table says them."""
    file = rewritten(pretrained(tmp_path), classes=classes)
    trained = Trained.read(file, "fill-mask")
    assert (trained.objective, trained.kind) == ("MaskedLM", KINDS["MaskedLM"])
    assert trained.network_class is BERT
    assert trained.network is trained.network
    assert not trained.network.training
    saved = load_checkpoint(file)["state_dict"]
    assert all(torch.equal(saved[f"network.{name}"], value) for name, value in trained.network.state_dict().items())
    assert trained.tokenizer().to_str() == words().to_str()
    assert type(trained.module()).__name__ == "MaskedLM"
    network, found = read_language_model(file, "embed")
    assert (type(network), found.to_str()) == (BERT, words().to_str())


def test_all_about_images_and_texts(tmp_path: Path) -> None:
    trained = Trained.read(save(tmp_path), "search")
    assert isinstance(trained.network, CLIP)
    assert trained.preprocessing == PREPROCESSING
    assert trained.encoder().max_length == 6
    assert trained.tokenizer().to_str() == tokenizer().to_str()
    with pytest.raises(TrunklineError, match=r"clip\.ckpt was trained without ImageTextData, so how to prepare"):
        _ = trained.class_names


@pytest.mark.parametrize("data", [None, "somewhere.MyImages"])
def test_class_names_of_the_datamodule_that_was_there(data: str | None, tmp_path: Path) -> None:
    model = classifier()
    content: dict[str, Any] = {"objective": "ImageClassifier", "state_dict": model.state_dict()}
    content |= {"hyper_parameters": dict(model.hparams), "MyImages": {"class_names": [*COLOURS]}}
    if data is not None:
        own = {"objective": KINDS["ImageClassifier"].objective, "network": "trunkline.modules.networks.vit.ViT"}
        content["classes"] = {**own, "data": data}
    SafeCheckpointIO().save_checkpoint(content, tmp_path / "a.ckpt")
    trained = Trained.read(str(tmp_path / "a.ckpt"))
    assert isinstance(trained.network, ViT)
    if data is not None:
        assert trained.class_names == [*COLOURS]
    else:
        with pytest.raises(TrunklineError, match="was trained without ImageData"):
            _ = trained.class_names


@pytest.mark.parametrize(
    ("changes", "command", "message"),
    [
        ({}, "generate", "is no checkpoint of CausalLM, but of MaskedLM; give such a checkpoint"),
        ({}, "predict --texts", "of QuestionAnswering, TextClassifier or TokenClassifier, but of MaskedLM; "),
        (
            {"objective": None},
            "embed",
            "of AudioClassifier, CausalLM, ContrastiveImageText, .* or SpeechToText, but of something else",
        ),
        ({"objective": "Mine"}, "embed", "but of Mine; give"),
        ({"classes": paths(objective="a.MaskedLM", network="a.Net")}, "fill-mask", r"of MaskedLM, but of a\.MaskedLM"),
        ({"MaskedTextData": None}, "embed", "holds no tokenizer; name its file with --tokenizer tokenizer.json"),
        ({"MaskedTextData": {"tokenizer": "{}"}}, "embed", "is no tokenizer of the tokenizers library"),
        ({"hyper_parameters": {}}, "embed", "names no network"),
        ({"state_dict": {}}, "embed", "do not fit its configuration: Missing key"),
    ],
)
def test_what_a_command_cannot_use(changes: Any, command: str, message: str, tmp_path: Path) -> None:
    file = rewritten(pretrained(tmp_path), **changes)
    with pytest.raises(TrunklineError, match=message):
        read_language_model(file, command)


def test_somebody_elses_objective_on_our_network(tmp_path: Path) -> None:
    """Does what needs the network alone, though its class is not there."""
    file = rewritten(pretrained(tmp_path), objective="Mine", classes=paths(objective="mine.Mine", data="mine.Words"))
    trained = Trained.read(file, "fill-mask")
    assert (trained.objective, trained.kind, trained.suits("generate")) == ("Mine", None, False)
    assert isinstance(trained.network, BERT)
    assert trained.tokenizer().to_str() == words().to_str()
    with pytest.raises(TrunklineError, match=r"the objective of .* is mine\.Mine, which is not known here; import its"):
        trained.module()


@pytest.mark.parametrize(
    "path", ["colorsys.rgb_to_hls", "subprocess.Popen", "trunkline.pipelines.cli.main", "mine.Net"]
)
def test_a_checkpoint_chooses_no_code(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is imported, and what is there already is called only if it is such a class."""
    for name in ("colorsys", "mine"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    trained = Trained.read(rewritten(pretrained(tmp_path), classes=paths(objective=path, network=path)))
    for use in (lambda: trained.network, trained.module):
        with pytest.raises(TrunklineError, match=rf"is {path}, which is not known here; import its module first"):
            use()
    assert {"colorsys", "mine"}.isdisjoint(sys.modules)


def test_classes_that_were_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Mine(ImageClassifier):
        pass

    class Net(ViT):
        pass

    module: Any = ModuleType("mine")
    module.Mine, module.Net = Mine, Net
    monkeypatch.setitem(sys.modules, "mine", module)
    model = classifier()
    nn.init.ones_(model.network.head.bias)
    content: dict[str, Any] = {"objective": "Mine", "classes": {"objective": "mine.Mine", "network": "mine.Net"}}
    content |= {"state_dict": model.state_dict(), "hyper_parameters": dict(model.hparams)}
    SafeCheckpointIO().save_checkpoint(content, tmp_path / "a.ckpt")
    trained = Trained.read(str(tmp_path / "a.ckpt"))
    assert isinstance(trained.network, Net)
    assert isinstance(trained.module(), Mine)
    assert (trained.module().network.head.bias == 1).all()
    assert not trained.suits("evaluate")
    with pytest.raises(TrunklineError, match=r"a\.ckpt is of Mine and does not name the class of its data"):
        _ = trained.data_class
