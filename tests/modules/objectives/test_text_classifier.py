"""TextClassifier: loss and metrics against scikit-learn, sizes against the data, and learning."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import f1_score
from tiny import mean_loss, trainer
from tokenizers import Tokenizer, models
from torch.utils.data import DataLoader, Dataset

from trunkline import TrunklineError
from trunkline.contract import DataFacts
from trunkline.datamodules.base import TrunklineDataModule
from trunkline.datamodules.samplers import SampleKey
from trunkline.modules.backbone import TransformerConfig
from trunkline.modules.networks import BERTConfig, GPTConfig
from trunkline.modules.networks.text_head import TextHeadConfig
from trunkline.modules.objectives.causal_lm import CausalLM
from trunkline.modules.objectives.image_classifier import ImageClassifier
from trunkline.modules.objectives.masked_lm import MaskedLM
from trunkline.modules.objectives.text_classifier import TextClassifier
from trunkline.modules.objectives.token_classifier import TokenClassifier
from trunkline.modules.training.optim import OptimizerConfig

V, T, ROWS, CLASSES = 30, 6, 23, 4


def network(pool: Any = "cls", gpt: bool = False, **options: Any) -> TextHeadConfig:
    trunk = TransformerConfig(dim=16, depth=2, num_heads=2)
    body: Any = {"gpt": GPTConfig(V, T, backbone=trunk)} if gpt else {"bert": BERTConfig(V, T, backbone=trunk)}
    return TextHeadConfig(**{**body, "num_outputs": CLASSES, "pool": pool, **options})


def model(config: TextHeadConfig | None = None, **options: Any) -> TextClassifier:
    torch.manual_seed(0)
    made = TextClassifier(config or network(), optimizer=OptimizerConfig(lr=0.01, warmup=0.1), **options)
    torch.nn.init.normal_(made.network.head.weight)
    return made


class Rows(Dataset[Any]):
    """Random texts of different lengths; the label is the first word modulo 4, or drawn."""

    def __init__(self, learnable: bool = False) -> None:
        draw = torch.Generator().manual_seed(2)
        self.tokens = torch.randint(0, V, (ROWS, T), generator=draw)
        self.mask = torch.arange(T) < torch.randint(1, T + 1, (ROWS, 1), generator=draw)
        self.label = self.tokens[:, 0] % CLASSES if learnable else torch.randint(0, CLASSES, (ROWS,), generator=draw)

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, key: SampleKey) -> dict[str, Any]:
        row = key.index
        own = {"tokens": self.tokens[row], "mask": self.mask[row], "segment": self.tokens[row] % 2}
        return {**own, "label": self.label[row], "index": row, "valid": key.valid and row != 5}


class RowsData(TrunklineDataModule):
    facts = DataFacts(class_names=["a", "b", "c", "d"], vocab_size=V, max_length=T)

    def __init__(self, facts: DataFacts | None = None, **options: Any) -> None:
        super().__init__(batch_size=8, eval_batch_size=8, num_workers=0, seed=0)
        self.facts = facts or self.facts
        self.datasets = {"train": Rows(**options), "val": Rows(**options), "test": Rows(**options)}


@pytest.mark.parametrize("stage", ["val", "test"])
def test_metrics(stage: str, tmp_path: Path) -> None:
    own, data, counted = model(), Rows(), [row for row in range(ROWS) if row != 5]
    run = {"val": trainer(tmp_path).validate, "test": trainer(tmp_path).test}[stage]
    got = run(own, datamodule=RowsData(), verbose=False)[0]
    with torch.no_grad():
        logits = own.eval()(data.tokens, data.tokens % 2, data.mask)[counted]
    label, best = data.label[counted], logits.argmax(dim=1)
    want = {"loss": F.cross_entropy(logits, label), "acc": (best == label).float().mean()}
    want["f1"] = torch.tensor(f1_score(label, best, average="macro"))
    assert got == pytest.approx({f"{stage}/{name}": value.item() for name, value in want.items()}, rel=1e-5)
    assert 0 < got[f"{stage}/acc"] < 1


def test_what_steps_return() -> None:
    own, batch = model().eval(), next(iter(DataLoader([Rows()[SampleKey(0, i)] for i in range(4, 8)], batch_size=4)))
    own.log = lambda *_, **__: None  # type: ignore[method-assign]
    with torch.no_grad():
        outputs, predicted = own.validation_step(batch, 0), own.predict_step(batch, 0)
    assert outputs["label"].tolist() == Rows().label[[4, 6, 7]].tolist()
    assert predicted["index"].tolist() == [4, 6, 7]
    assert torch.equal(predicted["probability"].argmax(dim=1), outputs["prediction"])
    torch.testing.assert_close(predicted["probability"].sum(dim=1), torch.ones(3))
    assert own.batch_size(batch) == 4
    assert own.unit == "texts"


def test_label_smoothing() -> None:
    own, batch = model(label_smoothing=0.2).eval(), next(iter(DataLoader([Rows()[SampleKey(0, 0)]], batch_size=1)))
    own.log = lambda *_, **__: None  # type: ignore[method-assign]
    scores = own(batch["tokens"], batch["segment"], batch["mask"]).log_softmax(dim=1)[0]
    want = -0.8 * scores[batch["label"][0]] - 0.2 * scores.mean()
    assert mean_loss(own, batch).item() == pytest.approx(want.item(), rel=1e-5)


@pytest.mark.parametrize(("pool", "gpt"), [("cls", False), ("mean", False), ("last", True)])
def test_learns(pool: Any, gpt: bool, tmp_path: Path) -> None:
    own = model(network(pool, gpt, dropout=0.0))
    fitted = trainer(tmp_path, max_epochs=40, num_sanity_val_steps=0, check_val_every_n_epoch=40)
    fitted.fit(own, datamodule=RowsData(learnable=True))
    assert fitted.callback_metrics["val/acc"] > 0.9


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_flops(pool: Any) -> None:
    batch = next(iter(DataLoader([Rows()[SampleKey(0, i)] for i in range(3)], batch_size=3)))

    def block(queries: int) -> int:
        return queries * 256 + T * 256 * 2 + queries * 256 + 2 * queries * 4 * 256 + 2 * queries * T * 16

    want = 3 * 2 * 3 * (block(T) + block(1 if pool == "cls" else T) + 16 * CLASSES)
    assert model(network(pool)).flops_per_batch(batch) == want


@pytest.mark.parametrize(
    ("change", "message", "field"),
    [
        ({"class_names": ["x", "y"]}, r"has num_outputs=4, but the data needs 2; .*set it to 2$", "num_outputs"),
        ({"class_names": list("abcde")}, r"has num_outputs=4, but the data needs 5; .*set it to 5$", "num_outputs"),
        ({"max_length": 9}, r"has max_length=6, but the data needs at least 9; .*set it to 9$", "bert.max_length"),
        ({"vocab_size": 99}, r"has vocab_size=30, but the data needs at least 99; .*to 99$", "bert.vocab_size"),
    ],
)
def test_sizes_are_compared_with_the_data(change: dict[str, Any], message: str, field: str, tmp_path: Path) -> None:
    data = RowsData(replace(RowsData.facts, **change))
    with pytest.raises(TrunklineError, match=rf"^the network {message}") as caught:
        trainer(tmp_path, max_steps=1).fit(model(), datamodule=data)
    assert caught.value.field == f"model.network.{field}"


def test_weights_of_another_tokenizer_are_refused(tmp_path: Path) -> None:
    """The ids of a pre-trained body mean the words of its own tokenizer."""
    own = model()
    content = {"objective": "TextClassifier", "hyper_parameters": dict(own.hparams), "state_dict": own.state_dict()}
    for tokens, name in (("0123", "own"), ("0132", "other")):
        words = Tokenizer(models.WordLevel({token: n for n, token in enumerate(tokens)}, "0"))
        torch.save({**content, "MaskedTextData": {"tokenizer": words.to_str()}}, tmp_path / f"{name}.ckpt")
    data = RowsData(replace(RowsData.facts, tokenizer=words))
    trainer(tmp_path, max_steps=1, limit_val_batches=0).fit(
        model(init_from=str(tmp_path / "other.ckpt")), datamodule=data
    )
    message = r"^init_from .*own\.ckpt was trained with another tokenizer than the data's.*set tokenizer to .*own"
    with pytest.raises(TrunklineError, match=message) as caught:
        trainer(tmp_path, max_steps=1).fit(model(init_from=str(tmp_path / "own.ckpt")), datamodule=data)
    assert caught.value.field == "data.tokenizer"


@pytest.mark.parametrize("value", [-0.1, 1.0])
def test_impossible_label_smoothing(value: float) -> None:
    tasks = partial(TextClassifier, network()), partial(TokenClassifier, network("none"))
    for objective in (*tasks, CausalLM, MaskedLM, ImageClassifier):
        message = rf"^label_smoothing must be from 0 up to below 1, not {value}$"
        with pytest.raises(TrunklineError, match=message) as caught:
            objective(label_smoothing=value)
        assert caught.value.field == "model.label_smoothing"
    with pytest.raises(TrunklineError, match=r"^z_loss must be 0 or more, not -1") as caught:
        CausalLM(z_loss=-1.0)
    assert caught.value.field == "model.z_loss"


@pytest.mark.parametrize("options", [{"num_outputs": 1}, {"pool": "none"}])
def test_impossible_heads(options: dict[str, Any]) -> None:
    with pytest.raises(TrunklineError, match=r"num_outputs of 2 or more, not \d, .*pool of cls, mean or last") as e:
        TextClassifier(network(**options))
    assert e.value.field == "model.network"


def test_hyperparameters_are_plain_data_and_rebuild(tmp_path: Path) -> None:
    own = model(network("last", True), label_smoothing=0.1, freeze_blocks=1, seed=3)
    fitted = trainer(tmp_path, max_steps=1, num_sanity_val_steps=0, limit_val_batches=0)
    fitted.fit(own, datamodule=RowsData())
    fitted.save_checkpoint(tmp_path / "a.ckpt")
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    plain = json.loads(json.dumps(checkpoint["hyper_parameters"]))
    again = TextClassifier(**plain)
    assert (again.network.config, again.hparams, again.seed) == (own.network.config, own.hparams, 3)
    again.load_state_dict(checkpoint["state_dict"])
