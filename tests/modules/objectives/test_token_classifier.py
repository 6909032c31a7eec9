"""TokenClassifier: metrics against scikit-learn, and learning to F1 1."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import f1_score
from tiny import mean_loss, trainer
from torch.utils.data import Dataset

from trunkline import TrunklineError
from trunkline.contract import DataFacts
from trunkline.datamodules.base import TrunklineDataModule
from trunkline.datamodules.samplers import SampleKey
from trunkline.modules.backbone import TransformerConfig
from trunkline.modules.metrics.entities import entities
from trunkline.modules.networks import BERTConfig
from trunkline.modules.networks.text_head import TextHeadConfig
from trunkline.modules.objectives.token_classifier import TokenClassifier
from trunkline.modules.training.optim import OptimizerConfig

V, T, ROWS = 20, 7, 11
BIO = ["B-LOC", "B-PER", "I-LOC", "I-PER", "O"]


def model(**options: Any) -> TokenClassifier:
    torch.manual_seed(0)
    trunk = TransformerConfig(dim=16, depth=1, num_heads=2)
    fields: dict[str, Any] = {"num_outputs": 5, "pool": "none", "dropout": 0.0, **options}
    network = TextHeadConfig(bert=BERTConfig(V, T, backbone=trunk), **fields)
    return TokenClassifier(network, optimizer=OptimizerConfig(lr=0.01, warmup=0.1))


class Rows(Dataset[Any]):
    """Words of one or two tokens; a word's tag is its first token modulo 5. The first and last token are special."""

    def __init__(self) -> None:
        draw = torch.Generator().manual_seed(1)
        self.tokens = torch.randint(0, V, (ROWS, T), generator=draw)
        lengths = torch.randint(3, T + 1, (ROWS, 1), generator=draw)
        places = torch.arange(T)
        self.mask = places < lengths
        begins = (places > 0) & (places < lengths - 1) & (torch.rand(ROWS, T, generator=draw) < 0.7)
        self.targets = torch.where(begins, self.tokens % 5, -100)

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, key: SampleKey) -> dict[str, Any]:
        row = key.index
        own = {"tokens": self.tokens[row], "mask": self.mask[row], "targets": self.targets[row]}
        return {**own, "index": row, "valid": key.valid and row != 5}


class RowsData(TrunklineDataModule):
    facts = DataFacts()

    def __init__(self, names: list[str]) -> None:
        super().__init__(batch_size=4, eval_batch_size=4, num_workers=0, seed=0)
        self.facts = DataFacts(class_names=names)
        self.datasets = {"train": Rows(), "val": Rows(), "test": Rows()}


@pytest.mark.parametrize(("stage", "names"), [("val", list("01234")), ("test", list("01234")), ("val", BIO)])
def test_metrics(stage: str, names: list[str], tmp_path: Path) -> None:
    own, data, counted = model(), Rows(), [row for row in range(ROWS) if row != 5]
    run = {"val": trainer(tmp_path).validate, "test": trainer(tmp_path).test}[stage]
    got = run(own, datamodule=RowsData(names), verbose=False)[0]
    with torch.no_grad():
        logits = own.eval()(data.tokens, mask=data.mask)[counted]
    targets, best = data.targets[counted], logits.argmax(dim=2)
    words = targets != -100
    want = {"loss": F.cross_entropy(logits[words], targets[words]), "acc": (best == targets)[words].float().mean()}
    f1 = f1_score(targets[words], best[words], average="macro")
    if names is BIO:
        tags = [[[BIO[i] for i in row[w]] for row, w in zip(side, words, strict=True)] for side in (best, targets)]
        found, true = ({(n, *e) for n, row in enumerate(side) for e in entities(row)} for side in tags)
        f1 = 2 * len(found & true) / (len(found) + len(true))
    assert got == pytest.approx({f"{stage}/{n}": float(v) for n, v in {**want, "f1": f1}.items()}, rel=1e-5)


def test_the_training_loss_is_the_mean_over_words() -> None:
    own, data = model(), Rows()
    own.log = lambda *_, **__: None  # type: ignore[method-assign]
    batch = {"tokens": data.tokens, "mask": data.mask, "targets": data.targets}
    want = F.cross_entropy(own(data.tokens, mask=data.mask).flatten(0, 1), data.targets.flatten())
    assert mean_loss(own, batch).item() == pytest.approx(want.item(), rel=1e-6)


def test_learns_to_f1_1(tmp_path: Path) -> None:
    fitted = trainer(tmp_path, max_epochs=60, num_sanity_val_steps=0, check_val_every_n_epoch=60)
    fitted.fit(model(), datamodule=RowsData(BIO))
    assert fitted.callback_metrics["val/f1"] == 1.0


@pytest.mark.parametrize("options", [{"pool": "cls"}, {"num_outputs": 1}])
def test_impossible_heads(options: dict[str, Any]) -> None:
    with pytest.raises(
        TrunklineError, match=r"tagging needs .*num_outputs of 2 or more, not \d, and .*pool none, not"
    ) as e:
        model(**options)
    assert e.value.field == "model.network"
