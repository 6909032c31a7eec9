"""The digest of what training reads."""

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import lightning as L
import pytest
import torch
from own_task import CloudData
from small_data import (
    word_tokenizer,
    write_folders,
    write_labelled,
    write_shards,
    write_text,
    write_translations,
)
from sound_files import write_spoken
from tokenizers import Tokenizer
from torch import Tensor

from trunkline import TrunklineError
from trunkline.contract import DataFacts
from trunkline.datamodules import (
    ImageData,
    ImageTextData,
    LabelledTextData,
    SpeechData,
    TextData,
    TranslationData,
)
from trunkline.datamodules.base import TrunklineDataModule
from trunkline.datamodules.folders import FileNames
from trunkline.datamodules.tokenizers import train_tokenizer
from trunkline.pipelines.preflight import leave_token, survey
from trunkline.pipelines.record import RunRecord


@dataclass
class Shake:
    width: float = 0.1


class WithTokenizer(TrunklineDataModule):
    words: Tokenizer

    @property
    def facts(self) -> DataFacts:
        return DataFacts(tokenizer=self.words)


@dataclass(kw_only=True, eq=False, repr=False)
class FolderOfClouds(CloudData):
    folder: Path | None = None
    shake: Shake = field(default_factory=Shake)
    names: list[str] = field(default_factory=list)
    content: ClassVar[list[Any]] = []

    def data_key(self) -> list[Any]:
        return self.content


def digest(content: list[Any] | None = None, **fields: Any) -> str | None:
    data = FolderOfClouds(**fields)
    data.content = content or []  # type: ignore[misc]
    data.setup("fit")
    return data.digest()


def test_digest_changes_with_what_is_read_and_with_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    plain = digest()
    assert re.fullmatch("[0-9a-f]{16}", str(plain))
    assert digest(batch_size=6, eval_batch_size=3, num_workers=2) == plain
    assert digest(folder=tmp_path / "a") == digest(folder=tmp_path / "b")  # the same data in another place
    changed: list[dict[str, Any]] = [
        {"seed": 1},
        {"rows": 12},
        {"shake": Shake(0.2)},
        {"names": ["x"]},
        {"content": ["x"]},
    ]
    assert len({plain, digest(folder=tmp_path), *(digest(**fields) for fields in changed)}) == 2 + len(changed)


def words(folder: Path) -> str:
    word_tokenizer().save(str(folder / "words.json"))
    return str(folder / "words.json")


def replaced(file: Path, old: str, new: str) -> None:
    file.write_text(file.read_text().replace(old, new, 1))


OWN: dict[str, tuple[Callable[[Path], TrunklineDataModule], Callable[[Path], object]]] = {
    # how its files are written and read, and a change of them
    "images": (
        lambda folder: ImageData(write_folders(folder / "in", 40), image_size=8, channels=1),
        lambda folder: (folder / "in" / "dark" / "000.png").rename(folder / "in" / "dark" / "0.png"),
    ),
    "shards": (
        lambda folder: ImageTextData(str(Path(write_shards(folder / "in")).parent), tokenizer="chars"),
        lambda folder: os.truncate(folder / "in" / "00.tar", (folder / "in" / "00.tar").stat().st_size + 512),
    ),
    "text": (
        lambda folder: TextData(write_text(folder / "in.txt"), tokenizer="chars", max_length=16),
        lambda folder: replaced(folder / "in.txt", "film", "fulm"),
    ),
    "labelled": (
        lambda folder: LabelledTextData(write_labelled(folder / "in.jsonl"), tokenizer=words(folder.parent)),
        lambda folder: replaced(folder / "in.jsonl", "film", "films"),
    ),
    "translation": (
        lambda folder: TranslationData(write_translations(folder / "in.jsonl"), tokenizer="chars"),
        lambda folder: replaced(folder / "in.jsonl", "good film", "goad film"),
    ),
    "speech": (
        lambda folder: SpeechData(write_spoken(folder, 40)),
        lambda folder: replaced(folder / "spoken.jsonl", '"text": "', '"text": "a'),
    ),
}


@pytest.mark.parametrize("kind", OWN)
def test_digest_of_files_is_the_same_anywhere_until_they_change(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, change = OWN[kind]

    def found(place: str, changed: bool = False) -> str | None:
        monkeypatch.setenv("TRUNKLINE_CACHE", str(tmp_path / f"cache of {place}"))
        (tmp_path / place).mkdir(exist_ok=True)
        data = make(tmp_path / place)
        if changed:
            change(tmp_path / place)
        data.setup("fit")
        return data.digest()

    assert None is not found("here") == found("there") != found("elsewhere", changed=True)


def test_the_files_are_looked_at_once_in_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The processes compare the digest, and the run's record holds it."""
    looks: list[int] = []
    names = FileNames.digest
    monkeypatch.setattr(FileNames, "digest", lambda self: (looks.append(len(self)), names(self))[1])
    monkeypatch.setenv("TRUNKLINE_CACHE", str(tmp_path / "cache"))
    data = ImageData(write_folders(tmp_path / "in", 40), image_size=8, channels=1)
    data.setup("fit")
    ranks = {"global_rank": 0, "world_size": 1, "is_global_zero": True}
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    options = {"fast_dev_run": False, "precision": "32-true", "strategy": strategy}
    trainer: Any = SimpleNamespace(datamodule=data, **ranks, **options)
    compared = survey(trainer, tmp_path, leave_token(tmp_path)).data
    RunRecord(tmp_path / "record.json", []).on_fit_start(trainer, L.LightningModule())
    assert json.loads((tmp_path / "record.json").read_text())["data"]["digest"] == compared == data.digest() is not None
    assert looks == [40]
    data.seed = 1
    assert data.digest() != compared


@pytest.mark.parametrize("second", ["another", "the same"])
def test_processes_with_different_tokenizers_stop(second: str) -> None:
    """One process of two; the other's digest comes from a strategy that gathers."""
    words = {name: train_tokenizer("chars", [text], None) for name, text in (("mine", "abc"), ("another", "abd"))}
    words["the same"] = words["mine"]

    def data(which: str, gather: Callable[[Tensor], Tensor]) -> TrunklineDataModule:
        data = WithTokenizer()
        data.words = words[which]
        strategy = SimpleNamespace(root_device=torch.device("cpu"), all_gather=gather)
        data.trainer = SimpleNamespace(world_size=2, strategy=strategy)  # type: ignore[assignment]
        return data

    given: list[Tensor] = []
    data(second, lambda own: (given.append(own), torch.stack([own, own]))[1]).compare_tokenizers()
    asking = data("mine", lambda own: torch.stack([own, given[0]]))
    if second == "the same":
        asking.compare_tokenizers()
        return
    with pytest.raises(
        TrunklineError, match=r"process 1 has another tokenizer than process 0.*share the folder cache_dir"
    ):
        asking.compare_tokenizers()


ONE_OF_TWO = """
import sys
import lightning as L
import torch
from trunkline.datamodules import TextData

class Nothing(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
    def training_step(self, batch, number):
        return self.weight.sum()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

data = TextData(sys.argv[1], tokenizer=sys.argv[2], max_length=16, batch_size=4, num_workers=0)
options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "limit_val_batches": 0}
trainer = L.Trainer(accelerator="cpu", devices=2, strategy="ddp", max_steps=1, use_distributed_sampler=False, **options)
trainer.fit(Nothing(), datamodule=data)
print("trained")
"""


@pytest.mark.slow
@pytest.mark.parametrize("second", ["abcd", "abce"])
def test_two_processes_with_a_cache_each(second: str, tmp_path: Path) -> None:
    text = write_text(tmp_path / "in.txt")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    started = []
    for rank, words in enumerate(("abcd", second)):
        train_tokenizer("chars", [words], None).save(str(tmp_path / f"{rank}.json"))
        launch = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "GROUP_RANK": 0}
        launch |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
        launch["TRUNKLINE_CACHE"] = tmp_path / f"cache {rank}"
        environment = os.environ | {name: str(value) for name, value in launch.items()}
        command = [sys.executable, "-c", ONE_OF_TWO, text, str(tmp_path / f"{rank}.json")]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, env=environment, **pipes))  # type: ignore[call-overload]
    try:
        for process in started:
            output, errors = process.communicate(timeout=300)
            if second == "abcd":
                assert (process.returncode, "trained" in output) == (0, True), errors
            else:
                assert process.returncode == 1
                assert "TrunklineError: process 1 has another tokenizer than process 0" in errors
    finally:
        for process in started:
            process.kill()


def test_no_digest_of_a_datamodule_that_says_nothing() -> None:
    assert TrunklineDataModule().digest() is None
